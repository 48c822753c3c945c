"""The examples to copy: each runs alone, resumes bit-exactly, and does what its options say."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_ext

FOLDER = Path(__file__).parents[2] / "examples"
# Options that make a run small, and one that makes it another run.
SMALL = {
    "hyperparameters": (["--steps=3", "--rates=3", "--seeds=2"], "--rounds=1"),
    "language_model": (["--steps=6", "--width=8", "--layers=1"], "--rate=1"),
    "sharded": (["--steps=6", "--width=16", "--layers=1", "--batch=8"], "--optimizer=novak"),
    "train_nnx": (["--steps=6", "--optimizer=novak"], "--seed=1"),
}
STEPS, EVERY = 6, 2


@pytest.fixture
def run(load_module, monkeypatch, tmp_path, capsys):
    """Run an example in small, with a checkpoint folder of this name; return what it prints."""

    def run(name: str, folder: str, *options: str) -> list[str]:
        module = load_module(name)
        if name == "sharded":
            monkeypatch.setattr(module, "start_jax", lambda options: None)  # it runs already
        small = [*SMALL[name][0], f"--every={EVERY}", f"--checkpoints={tmp_path / folder}"]
        module.main([*small, *options])
        return [line for line in capsys.readouterr().out.splitlines() if "━" not in line]

    return run


def interrupt(module, monkeypatch, call: int) -> None:
    """Let Ctrl-C happen while the batch of a call is drawn."""
    name = "draw_batches" if hasattr(module, "draw_batches") else "draw_batch"
    draw, calls = getattr(module, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(module, name, interrupted)


def read(folder: Path):
    """Return all arrays of the last checkpoint."""
    with ocp.CheckpointManager(folder) as checkpoints:
        assert checkpoints.latest_step() == STEPS
        arrays = checkpoints.restore(STEPS, args=ocp.args.StandardRestore())
    return optax.tree.unwrap_random_key_data(arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_resumes_bit_exactly_and_refuses_what_it_cannot(
    load_module, run, monkeypatch, tmp_path, capsys, name
):
    whole = run(name, "whole")
    with monkeypatch.context() as patch:
        interrupt(load_module(name), patch, call=4)
        with pytest.raises(KeyboardInterrupt):
            run(name, "resumed")
    capsys.readouterr()
    resumed = run(name, "resumed")
    assert any(line.startswith("2 steps done") for line in resumed)
    assert resumed[-1] == whole[-1]
    ends = [read(tmp_path / folder) for folder in ("whole", "resumed")]
    assert len(jax.tree.leaves(ends[0])) > 10
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert run(name, "resumed")[-1] == whole[-1]  # no step is left

    with pytest.raises(SystemExit, match=r"resumed has checkpoints of \{.*\}, not of \{"):
        run(name, "resumed", SMALL[name][1])
    (tmp_path / f"resumed/{STEPS}/default/_METADATA").write_bytes(b"")
    with pytest.raises(SystemExit, match=rf"resumed: step {STEPS} can't be read; move it away"):
        run(name, "resumed")
    # As the message says, without that step the run resumes from an earlier one.
    shutil.move(tmp_path / f"resumed/{STEPS}", tmp_path / "aside")
    assert run(name, "resumed")[-1] == whole[-1]


@pytest.mark.slow
def test_sharded_run_resumes_in_another_layout(run):
    run("sharded", "run", "--steps=2")
    resumed = run("sharded", "run", "--layout=replicated", "--model-parallel=2")
    assert any(line.startswith("2 steps done") for line in resumed)
    assert re.fullmatch("weights [0-9a-f]{16}", resumed[-1])


def test_sharded_accumulates_batches_into_one_step(load_module):
    module = load_module("sharded")
    weights = {"kernel": jnp.linspace(0.5, 1, 12).reshape(3, 4), "scale": jnp.ones(4)}
    params = optax_ext.bfloat16_weights(weights)

    def train(accumulate: int, batches: list[float]) -> Any:
        """Return the float32 weights after each batch, on gradients of one value each."""
        options = ["--optimizer=novak", "--bits=32", f"--accumulate={accumulate}"]
        tx = module.make_optimizer(module.parse([*options, "--decay-steps=5"]))

        def step(carry, value):
            grads = jax.tree.map(lambda p: jnp.full_like(p, value), params)
            updates, state = tx.update(grads, carry[1], carry[0])
            carry = optax.apply_updates(carry[0], updates), state
            return carry, optax_ext.float32_weights(*carry)

        return jax.lax.scan(step, (params, tx.init(weights)), jnp.array(batches))[1]

    whole, halves = train(1, [0.25, 0.5]), train(2, [0.125, 0.375, 0.75, 0.25])
    for name, weight in weights.items():
        np.testing.assert_array_equal(halves[name][0], weight)
        np.testing.assert_array_equal(halves[name][2], halves[name][1])
        np.testing.assert_array_equal(halves[name][1::2], whole[name])
        assert (whole[name][1] < weight).all()
    # NOVAK's first update is 1 for equal gradients, so the rest is decay.
    moved = {name: weight - whole[name][0] for name, weight in weights.items()}
    decay = moved["kernel"] / moved["scale"][0] - 1
    np.testing.assert_allclose(decay, 0.1 * weights["kernel"], atol=1e-3)


def test_train_nnx_has_rates_and_decay_of_groups(load_module):
    module = load_module("train_nnx")
    model = nnx.eval_shape(lambda: module.Network(rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), nnx.as_pure(nnx.state(model, nnx.Param)))
    tx = module.make_optimizer("vradam", rate=0.1, steps=4)
    # Without a gradient only decay moves parameters, at the highest rate.
    step = jax.jit(lambda params: tx.update(optax.tree.zeros_like(params), tx.init(params), params))
    updates, _ = step(params)

    for path, update in jax.tree.leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rate = 0.1 * (module.HEAD_RATE if name.startswith("head/") else 1)
        expected = -rate * module.WEIGHT_DECAY if name.endswith("kernel") else 0
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)


def test_epoch_draws_each_image_once_in_another_order(load_module):
    draw, batch = load_module("train_nnx").draw_batch, load_module("train_nnx").BATCH
    steps = [draw(step, 3 * batch + 1, seed=1) for step in range(1, 7)]
    epochs = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert all(len(np.unique(epoch)) == 3 * batch for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_language_model_writes_what_it_predicts(load_module):
    module = load_module("language_model")

    def next_byte(variables, tokens):
        return 100.0 * jax.nn.one_hot(tokens + variables["params"]["shift"], 256)

    state = module.FusedTrainState.create(
        apply_fn=next_byte, params={"shift": jnp.ones((), jnp.int32)}, tx=optax.identity()
    )
    prompt = np.full(module.LENGTH, ord("a"), np.uint8)
    written = module.write(state, prompt, jax.random.key(0), length=4)
    assert bytes(np.asarray(written, np.uint8)) == b"bcde"


@pytest.mark.slow
def test_rates_change_without_recompiling_and_train_like_a_schedule(load_module):
    module = load_module("hyperparameters")
    data, *_ = module.load_data()
    runs, restarts = module.make_runs(3, 2), module.warm_restarts(7)
    batches = [module.draw_batches(step, len(data.labels), 2) for step in range(7)]
    compiled = module.train_step._cache_size()
    for step, batch in enumerate(batches):
        runs = module.set_rates(runs, jnp.array([0.01, 0.02, 0.03]) * restarts(step))
        runs = module.train_step(runs, data.images[batch], data.labels[batch])
    assert module.train_step._cache_size() == compiled + 1

    tx = optax_ext.fame(lambda count: 0.02 * restarts(count))
    alone = jax.tree.map(lambda x: x[1:2, 1:2], module.make_runs(3, 2))
    alone = alone.replace(tx=tx, opt_state=jax.vmap(jax.vmap(tx.init))(alone.params))
    for batch in batches:
        alone = module.train_step(alone, data.images[batch[1:]], data.labels[batch[1:]])
    in_sweep = jax.tree.map(lambda x: x[1:2, 1:2], runs.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), in_sweep, alone.params)


def test_restarts_are_warm(load_module):
    restarts = load_module("hyperparameters").warm_restarts(70)
    factors = np.array([restarts(step) for step in range(70)])
    assert np.flatnonzero(factors == 1).tolist() == [0, 10, 30]
    assert factors[[9, 29, 69]].max() < 0.03
    np.testing.assert_allclose(factors[[5, 20, 50]], 0.5, atol=1e-6)


def test_rounds_close_in_on_the_best_rate(load_module):
    module = load_module("hyperparameters")
    sweep = module.Sweep(None, jnp.zeros((2, 5)), jnp.zeros((2, 5, 3)).at[0, 3].set(1.0))
    first = module.choose_rates(sweep, 0)
    np.testing.assert_allclose(first[[0, 2, 4]], [5e-3 / 27, 5e-3, 5e-3 * 27], rtol=1e-5)
    sweep = sweep._replace(rates=sweep.rates.at[0].set(first))
    second = np.asarray(module.choose_rates(sweep, 1))
    np.testing.assert_allclose(second[[0, 2, 4]], first[3] * np.array([1 / 3, 1, 3]), rtol=1e-5)


def test_interval_is_students(load_module):
    # 4 values with deviation 1, whose mean lies within 3.182 / sqrt(4).
    values = np.array([-1.5, -0.5, 0.5, 1.5])
    values = 0.5 + 0.01 * values / values.std(ddof=1)
    assert load_module("hyperparameters").percent(values) == "50.0 ± 1.6 %"
