"""The examples to copy: they go on exactly, and their optimizers do what their options say."""

import errno
import os
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_ext

pytestmark = pytest.mark.slow

# In small, and how many steps that takes.
RUNS = {
    "train_nnx": (["--steps=5", "--batch=8", "--log-every=2", "--optimizer=novak"], 5),
    "language_model": (
        ["--steps=5", "--batch=2", "--width=8", "--layers=1", "--log-every=2", "--write=3"],
        5,
    ),
    "hyperparameters": (["--steps=3", "--batch=4", "--rounds=2", "--rates=3", "--seeds=2"], 6),
}


def interrupt_in(module, monkeypatch, call: int) -> None:
    """Ctrl-C while the batch of a call is drawn."""
    draw, calls = module.draw, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return draw(*args, **kwargs)

    monkeypatch.setattr(module, "draw", interrupted)


def saved(folder: Path, step: int):
    """All arrays of a checkpoint."""
    with ocp.CheckpointManager(folder) as checkpoints:
        assert checkpoints.latest_step() == step
        arrays = checkpoints.restore(step, args=ocp.args.StandardRestore())
    return optax.tree.unwrap_random_key_data(arrays)


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_run_ends_where_the_whole_one_ends(
    load_module, monkeypatch, tmp_path, capsys, name
):
    module, (options, steps) = load_module(name), RUNS[name]
    module.main([*options, f"--checkpoints={tmp_path / 'whole'}"])
    printed = capsys.readouterr().out.splitlines()[-1]

    options = [*options, f"--checkpoints={tmp_path / 'interrupted'}"]
    with monkeypatch.context() as patch:
        interrupt_in(module, patch, call=2)
        with pytest.raises(SystemExit, match=rf"stopped after step [23] of {steps}; the same line"):
            module.main(options)
    module.main(options)
    again = capsys.readouterr().out.splitlines()
    assert any(re.match("goes on after step [23]", line) for line in again)
    assert again[-1] == printed
    ends = [saved(tmp_path / run, steps) for run in ("whole", "interrupted")]
    assert len(jax.tree.leaves(ends[0])) > 10
    jax.tree.map(np.testing.assert_array_equal, *ends)
    module.main(options)  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-1] == printed


@pytest.mark.parametrize("name", RUNS)
def test_run_goes_on_from_the_checkpoint_before_an_unreadable_one(
    load_module, tmp_path, capsys, name
):
    module, (options, steps) = load_module(name), RUNS[name]
    options = [*options, "--save-every=1", f"--checkpoints={tmp_path}"]
    module.main(options)
    printed, whole = capsys.readouterr().out.splitlines()[-1], saved(tmp_path, steps)

    truncate_arrays(tmp_path / str(steps))
    module.main(options)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"step {steps} can't be read \(.*OUT_OF_RANGE.*\) and was deleted", lines[0])
    assert lines[1] == f"goes on after step {steps - 1}"
    assert lines[-1] == printed
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path, steps), whole)

    for step in (steps, steps - 1):
        truncate_arrays(tmp_path / str(step))
    problems = rf"step {steps} can't be read \(.*\); step {steps - 1} can't be read \(.*\)"
    with pytest.raises(SystemExit, match=f"^{tmp_path} can't be gone on from: {problems}$"):
        module.main(options)
    assert {str(steps), str(steps - 1)} <= {path.name for path in tmp_path.iterdir()}


def truncate_arrays(checkpoint: Path) -> None:
    """Leave half of each of a checkpoint's largest files, which hold the arrays."""
    files = [path for path in checkpoint.rglob("d/*") if path.is_file()]
    for path in files:
        os.truncate(path, path.stat().st_size // 2)
    assert files


@pytest.fixture
def two_checkpoints(load_module, tmp_path):
    """Opens a folder with arrays of ones after step 1 and of twos after step 2."""

    def begin():
        options = Namespace(checkpoints=tmp_path, save_every=1)
        return load_module("_resume").open_checkpoints("this", options)

    with begin() as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": np.full(9, step)}, force=False)
    return begin


@pytest.mark.parametrize(
    "damage",
    {
        "no manifest": lambda step: (step / "default/manifest.ocdbt").unlink(),
        "corrupt manifest": lambda step: (step / "default/manifest.ocdbt").write_bytes(bytes(99)),
        "empty metadata": lambda step: (step / "default/_METADATA").write_bytes(b""),
        "no arrays": lambda step: shutil.rmtree(step / "default/d"),
        "truncated arrays": truncate_arrays,
        "nothing": lambda step: shutil.rmtree(step / "default"),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_unreadable_checkpoint_is_replaced(two_checkpoints, tmp_path, capfd, damage):
    damage[1](tmp_path / "2")
    with two_checkpoints() as checkpoints:
        restored = checkpoints.restore({"x": np.zeros(9, int)})
        np.testing.assert_array_equal(restored["x"], 1)
        assert checkpoints.done == 1
        checkpoints.save(2, {"x": np.full(9, 3)}, force=False)
    printed = capfd.readouterr()
    assert re.fullmatch(r"step 2 can't be read \(.*\) and was deleted\n", printed.out)
    assert "Traceback" not in printed.err
    with two_checkpoints() as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore({"x": np.zeros(9, int)})["x"], 3)


def test_checkpoints_of_a_changed_model_are_left_alone(two_checkpoints, tmp_path):
    written = sorted(tmp_path.rglob("*"))
    with (
        two_checkpoints() as checkpoints,
        pytest.raises(SystemExit, match=r"step 2 can't be read .*; step 1 can't be read"),
    ):
        checkpoints.restore({"y": np.zeros(9, int)})
    assert sorted(tmp_path.rglob("*")) == written


def test_one_of_several_processes_deletes_nothing(two_checkpoints, monkeypatch, tmp_path):
    truncate_arrays(tmp_path / "2")
    with two_checkpoints() as checkpoints:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(SystemExit, match=r"from: step 2 can't be read \([^;]*\)$"):
            checkpoints.restore({"x": np.zeros(9, int)})
        monkeypatch.undo()
    assert (tmp_path / "2").is_dir()


@pytest.mark.parametrize("text", ["", "[]", '{"custom_metadata": {"save'])
def test_unreadable_options(two_checkpoints, tmp_path, text):
    (tmp_path / "metadata/_ROOT_METADATA").write_text(text)
    with pytest.raises(SystemExit, match=f"^{tmp_path} can't be gone on from: no options can be"):
        two_checkpoints()


@pytest.mark.parametrize("failing", [["save", "close"], ["close"]], ids=["save", "close"])
def test_disk_that_is_full(two_checkpoints, monkeypatch, tmp_path, failing):
    def make(call):
        def fail(*_, **__):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {call}")

        return fail if call in failing else lambda *_, **__: True

    def save_another():
        with two_checkpoints() as checkpoints:
            checkpoints.save(3, {"x": np.ones(9)}, force=False)

    for call in ("save", "close"):
        monkeypatch.setattr(ocp.CheckpointManager, call, make(call))
    message = rf"can't be written to \(OSError: .*No space left on device: {failing[0]}\)"
    with pytest.raises(SystemExit) as exit_:
        save_another()
    assert re.match(
        f"--checkpoints {tmp_path}: {message}; the last checkpoint: 2", str(exit_.value)
    )


def test_second_interrupt_ends_at_once(load_module, tmp_path):
    resume = load_module("_resume")
    options, taken = Namespace(checkpoints=tmp_path, save_every=1), []

    def take_steps():
        with (
            resume.open_checkpoints("this", options) as checkpoints,
            resume.steps_to(9, checkpoints) as steps,
        ):
            for step in steps:
                taken.append(step)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        take_steps()
    assert taken == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_folder_is_of_one_training(load_module, tmp_path):
    open_checkpoints = load_module("_resume").open_checkpoints

    def begin(program="this", **changes):
        options = {"checkpoints": tmp_path / "run", "save_every": 1, "log_every": 2, "head_rate": 1}
        may_change = {"steps"}
        open_checkpoints(program, Namespace(**options | changes), may_change=may_change).close()

    begin(steps=1)
    begin(steps=2, save_every=3, log_every=4)
    with pytest.raises(SystemExit, match="it began with --head-rate 1, got 2"):
        begin(head_rate=2)
    with pytest.raises(SystemExit, match="another version of the program wrote it"):
        begin(text=None)
    with pytest.raises(SystemExit, match="another program wrote it"):
        begin("that")


def test_folder_is_of_one_text_wherever_that_lies(load_module, tmp_path):
    open_checkpoints = load_module("_resume").open_checkpoints

    def begin(text: Path):
        options = Namespace(checkpoints=tmp_path / "run", save_every=1, text=text)
        open_checkpoints("this", options).close()

    text = tmp_path / "text"
    text.write_text("one")
    begin(text)
    begin(text.rename(tmp_path / "moved"))
    text.write_text("two")
    with pytest.raises(SystemExit, match=r"began with --text a file of 3 bytes, SHA-256 .*, got"):
        begin(text)


def test_folder_of_another_program_is_left_alone(load_module, tmp_path):
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(3, args=ocp.args.StandardSave({"x": np.ones(2)}))
    written = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="another program wrote it"):
        load_module("_resume").open_checkpoints("this", Namespace(checkpoints=tmp_path))
    assert sorted(tmp_path.rglob("*")) == written


def test_folder_must_be_writable(load_module, monkeypatch, tmp_path):
    resume, file = load_module("_resume"), tmp_path / "file"
    file.touch()
    for folder, message in (file, "File exists"), (file / "run", "Not a directory"):
        with pytest.raises(SystemExit, match=f"--checkpoints {folder}: {message}"):
            resume.open_checkpoints("this", Namespace(checkpoints=folder))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(SystemExit, match=f"--checkpoints {tmp_path}: Permission denied"):
        resume.open_checkpoints("this", Namespace(checkpoints=tmp_path))


def test_sharded_folder_is_of_one_training(load_module, monkeypatch, tmp_path, capsys):
    module = load_module("sharded")
    monkeypatch.setattr(module, "start_jax", lambda options: None)  # it runs already
    options = [f"--checkpoints={tmp_path}", "--width=16", "--layers=1", "--steps=1"]
    options.append(f"--batch={jax.device_count()}")

    def last_line(*changes: str) -> str:
        module.main([*options, *changes])
        return capsys.readouterr().out.splitlines()[-1]

    line = last_line()
    assert re.fullmatch(r"step 1: loss \d\.\d{4}, parameters [0-9a-f]{16}", line), line
    assert last_line("--layout=replicated") == f"step 1: parameters {line.split()[-1]}"
    two = last_line("--steps=2")
    assert two.startswith("step 2: loss")
    truncate_arrays(tmp_path / "2")
    assert last_line("--steps=2") == two
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp"))
    assert last_line().startswith("step 2: parameters")
    for change, message in {
        "--rate=5": r"it began with --rate 0\.001, got 5\.0",
        "--optimizer=novak": "it began with --optimizer fame, got novak",
    }.items():
        with pytest.raises(SystemExit, match=message):
            module.main([*options, change])


def test_batch_is_shared_evenly(load_module):
    make_mesh, devices = load_module("sharded").make_mesh, jax.device_count()
    assert make_mesh(devices, batch=3).shape == {"data": 1, "model": devices}
    with pytest.raises(SystemExit, match=f"--batch must be a multiple of {devices}, .* got 3"):
        make_mesh(1, batch=3)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("train_nnx", "--steps=0", "must be a whole number above 0, got '0'"),
        ("train_nnx", "--rate=-1", "must be a finite number above 0, got '-1'"),
        ("train_nnx", "--rate=nan", "must be a finite number above 0, got 'nan'"),
        ("train_nnx", "--head-rate=inf", "must be a finite number, 0 or above, got 'inf'"),
        ("train_nnx", "--decay=-1", "must be a finite number, 0 or above, got '-1'"),
        ("train_nnx", "--decay=much", "must be a finite number, 0 or above, got 'much'"),
        ("train_nnx", "--seed=-1", "must be a whole number from 0 to 2³² - 1, got '-1'"),
        ("train_nnx", "--seed=4294967296", "must be a whole number from 0 to 2³² - 1"),
        ("train_nnx", "--data=none.npz", "none.npz: no such file"),
        ("language_model", "--text=none.txt", "--text none.txt: No such file or directory"),
        ("language_model", "--rate=0", "must be a finite number above 0, got '0'"),
        ("language_model", "--temperature=-1", "must be a finite number, 0 or above, got '-1'"),
        ("language_model", "--width=12", "--width must be a multiple of 8, got 12"),
        ("hyperparameters", "--rates=4", "--rates must be odd, .* got 4"),
        ("hyperparameters", "--seeds=1", "--seeds must be 2 or more .* got 1"),
        ("sharded", "--steps=0", "must be a whole number above 0, got '0'"),
        ("sharded", "--width=12", "--width must be a multiple of 8, got 12"),
        ("sharded", "--rate=nan", "must be a finite number above 0, got 'nan'"),
        ("sharded", "--model-parallel=0", "must be a whole number above 0, got '0'"),
        ("sharded", "--process=-1", "must be a whole number from 0 to 2³² - 1, got '-1'"),
        ("sharded", "--process=0", "--processes and --process need --coordinator"),
        ("sharded", "--processes=2", "--processes and --process need --coordinator"),
        (
            "sharded",
            "--coordinator=localhost:1 --processes=2 --process=2",
            "--process must be below 2, got 2",
        ),
        ("sharded", "--coordinator=localhost:1", "--coordinator needs --processes and --process"),
    ],
)
def test_bad_options(load_module, capsys, name, argument, message):
    with pytest.raises(SystemExit) as exit_:
        load_module(name).main(argument.split())
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f": error: .*{message}", last), last


def test_short_text(load_module, tmp_path, capsys):
    parse, path = load_module("language_model").parse, tmp_path / "short.txt"
    path.write_bytes(b"a" * 1319)
    with pytest.raises(SystemExit):
        parse([f"--text={path}"])
    assert "short.txt: 1319 bytes are too few" in capsys.readouterr().err
    path.write_bytes(b"a" * 1320)
    assert len(parse([f"--text={path}"])[1]) == 1320


def test_rates_and_decay_are_of_groups(load_module):
    module = load_module("train_nnx")
    options, _ = module.parse(["--steps=4", "--rate=0.1", "--head-rate=0.5", "--decay=0.2"])
    model = nnx.eval_shape(lambda: module.Network(1, 3, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), nnx.as_pure(nnx.state(model, nnx.Param)))
    tx = module.make_optimizer(options)
    # Without a gradient there is nothing but decay, at the peak of the rate.
    step = jax.jit(lambda params: tx.update(optax.tree.zeros_like(params), tx.init(params), params))
    updates, _ = step(params)

    moved = {}
    for path, update in jax.tree.leaves_with_path(updates):
        (moved[jax.tree_util.keystr(path, simple=True, separator="/")],) = set(
            update.ravel().tolist()
        )
    decaying = {name: change for name, change in moved.items() if change}
    assert len(moved) == 11
    assert len(decaying) == 4
    assert decaying.pop("head/kernel") == pytest.approx(-0.1 * 0.5 * 0.2)
    assert list(decaying.values()) == pytest.approx([-0.1 * 0.2] * 3)


def test_epoch_draws_each_image_once_in_another_order(load_module):
    draw = load_module("_data").draw
    epochs = [np.concatenate([draw(3 * e + i, 10, 3, seed=1) for i in range(3)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert sorted(draw(7, 4, 64, seed=0).tolist()) == [0, 1, 2, 3]


def test_master_weights_keep_what_bfloat16_loses(load_module):
    wrap = load_module("language_model").with_master_weights
    params = {"w": jnp.full((3,), 1.0, jnp.bfloat16), "v": jnp.full((), -2.0, jnp.bfloat16)}
    gradients = optax.tree.ones_like(params)

    def end(tx):
        moved, state = params, tx.init(params)
        for _ in range(512):
            updates, state = tx.update(gradients, state, moved)
            moved = optax.apply_updates(moved, updates)
        assert optax.tree.dtype(moved) == jnp.bfloat16
        return moved

    small = optax.sgd(2**-10)
    jax.tree.map(np.testing.assert_array_equal, end(small), params)
    expected = {"w": jnp.full((3,), 0.5), "v": jnp.full((), -2.5)}
    jax.tree.map(np.testing.assert_array_equal, end(wrap(small)), expected)


def test_writes_what_the_model_says(load_module):
    module = load_module("language_model")

    def next_byte(variables, tokens):
        return 100.0 * jax.nn.one_hot(tokens + variables["params"]["shift"], 256)

    state = module.FusedTrainState.create(
        apply_fn=next_byte, params={"shift": jnp.ones((), jnp.int32)}, tx=optax.identity()
    )
    prompt = np.full(module.LENGTH, ord("a"), np.uint8)
    written = module.write(state, prompt, jax.random.key(0), 0.5, length=4)
    assert module.decode(written) == "bcde"
    assert module.decode([0xC3, 0xA9, 0xFF]) == "é\ufffd"


def test_temperature_is_of_the_draws(load_module):
    module = load_module("language_model")
    logits = jnp.log(jnp.full(256, 1e-9).at[jnp.array([65, 66])].set(jnp.array([0.8, 0.2])))
    state = module.FusedTrainState.create(
        apply_fn=lambda variables, tokens: jnp.broadcast_to(logits, (*tokens.shape, 256)),
        params={},
        tx=optax.identity(),
    )

    def share_of_likeliest(temperature):
        prompt = np.zeros(module.LENGTH, np.uint8)
        written = module.write(state, prompt, jax.random.key(0), temperature, length=2000)
        return module.decode(written).count("A") / 2000

    assert share_of_likeliest(0.0) == 1
    # 4 : 1, to the power of 1 / temperature; five standard deviations of a share.
    assert share_of_likeliest(1.0) == pytest.approx(4 / 5, abs=0.045)
    assert share_of_likeliest(0.5) == pytest.approx(16 / 17, abs=0.026)


def test_rates_change_without_compiling(load_module, monkeypatch):
    """As the loop has it, a run is one whose rate is a schedule."""
    module = load_module("hyperparameters")
    options, data = module.parse(["--steps=7", "--batch=16", "--rates=3", "--seeds=2"])
    traces, loss = [], optax.softmax_cross_entropy_with_integer_labels

    def counted(*args):
        traces.append(args)
        return loss(*args)

    monkeypatch.setattr(optax, "softmax_cross_entropy_with_integer_labels", counted)

    runs = module.make_runs(data, 3, 2)
    rates, restarts = jnp.array([0.01, 0.02, 0.03]), module.warm_restarts(7)
    for step in range(7):
        batches = module.draw_batches(step, data.train, options)
        runs = module.set_rates(runs, rates * restarts(step))
        runs = module.train_step(runs, data.train, batches)
    assert len(traces) == 1

    tx = optax_ext.fame(lambda count: 0.02 * restarts(count))
    run = jax.tree.map(lambda x: x[1, 1], module.make_runs(data, 3, 2))
    run = run.replace(tx=tx, opt_state=tx.init(run.params))

    @jax.jit
    def train_step(run, batch):
        def loss_of(params):
            logits = run.apply_fn({"params": params}, data.train.images[batch])
            return loss(logits, data.train.labels[batch]).mean()

        return run.apply_gradients(grads=jax.grad(loss_of)(run.params))

    for step in range(7):
        run = train_step(run, module.draw_batches(step, data.train, options)[1])
    in_sweep = jax.tree.map(lambda x: x[1, 1], runs.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), in_sweep, run.params)


def test_restarts_are_warm(load_module):
    restarts = load_module("hyperparameters").warm_restarts(70)
    shares = np.array([restarts(step) for step in range(70)])
    assert np.flatnonzero(shares == 1).tolist() == [0, 10, 30]
    assert shares[[9, 29, 69]].max() < 0.03
    np.testing.assert_allclose(shares[[5, 20, 50]], 0.5, atol=1e-6)


def test_rounds_close_in_on_the_best_rate(load_module):
    module = load_module("hyperparameters")
    scores = jnp.zeros((2, 5, 3)).at[0, 3].set(1.0)
    sweep = module.Sweep(None, jnp.zeros((2, 5)), scores)
    first = module.choose_rates(sweep, 0)
    np.testing.assert_allclose(first[[0, 2, 4]], [5e-3 / 27, 5e-3, 5e-3 * 27], rtol=1e-5)
    sweep = sweep._replace(rates=sweep.rates.at[0].set(first))
    second = np.asarray(module.choose_rates(sweep, 1))
    np.testing.assert_allclose(second[[0, 2, 4]], first[3] * np.array([1 / 3, 1, 3]), rtol=1e-5)


def test_interval_is_students(load_module):
    # Of 4 values with deviation 1, whose mean lies within 3.182 / sqrt(4).
    values = np.array([-1.5, -0.5, 0.5, 1.5])
    values = 0.5 + 0.01 * values / values.std(ddof=1)
    assert load_module("hyperparameters").percent(values) == "50.0 ± 1.6 %"
