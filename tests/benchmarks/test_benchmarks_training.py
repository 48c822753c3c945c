"""The benchmark of whole training steps: its arithmetic, and that what it times does train."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import networks, timing, train
from benchmarks.networks import NETWORKS, Network
from benchmarks.optimizers import OPTIMIZERS, trained

pytestmark = pytest.mark.slow

SMALL = "small"
TINY = {
    "convolutional": partial(networks.convnet, (4,), batch=2, pixels=4),
    "transformer": partial(networks.transformer, 8, layers=1, vocabulary=8, batch=2, length=3),
}


def dense() -> Network:
    """A layer, of which the optimizers' programs compile in no time."""

    def loss(params, batch):
        inputs, targets = batch
        return jnp.mean((inputs @ params["kernel"] + params["bias"][None] - targets) ** 2)

    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    return Network("a batch", params, loss, (jnp.ones((4, 3)), jnp.zeros((4, 2))))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A network that takes no time, and no rest."""
    monkeypatch.setitem(NETWORKS, SMALL, dense)
    monkeypatch.setattr(timing, "REST_SECONDS", 0.0)


def test_a_row_is_a_calculation_by_hand():
    # Turns of which a busy spell made the second slower, for all alike.
    whole, gradient = timing.Times((0.1, 0.4, 0.2)), timing.Times((0.08, 0.32, 0.1))
    row = train.make_row(
        whole, gradient, timing.Times((0.01, 0.02, 0.03)), timing.Times((0.1,) * 3)
    )
    assert row == {
        "median_ms": pytest.approx(200),
        "spread_ms": pytest.approx(150),
        "to_adamw": pytest.approx(2),
        "to_adamw_spread": pytest.approx(1.5),
        "share": pytest.approx(0.2),
        "share_spread": pytest.approx(0.15),
        "gradient_ms": pytest.approx(100),
        "gradient_spread_ms": pytest.approx(120),
        "alone_ms": pytest.approx(20),
        "alone_spread_ms": pytest.approx(10),
        "times_ms": pytest.approx([100, 400, 200]),
        "gradient_times_ms": pytest.approx([80, 320, 100]),
        "alone_times_ms": pytest.approx([10, 20, 30]),
    }


def programs(caplog) -> list[str]:
    """Return the names of the programs that JAX has compiled since the last call."""
    found = [message for message in caplog.messages if message.startswith("Compiling")]
    caplog.clear()
    return found


def assert_compiles_once(run, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        programs(caplog)
        run(1)
        assert len(programs(caplog)) == 1
        run(2)
        assert not programs(caplog)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_compile_once(name, caplog):
    assert_compiles_once(train.Turns(SMALL, "cpu", 2).whole(name), caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_networks_compile_once_and_all_of_them_is_trained(name, monkeypatch, caplog):
    monkeypatch.setitem(NETWORKS, name, TINY[name])
    turns = train.Turns(name, "cpu", 2)
    assert_compiles_once(turns.whole("adamw"), caplog)
    gradient = turns.gradient(turns.network.params, turns.network.batch)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all()
        # A shift of all keys changes no attention.
        place = jax.tree_util.keystr(path)
        assert leaf.any() or ("key" in place and "bias" in place), place


def test_gradients_are_taken_at_the_fast_weights():
    params = dense().params
    for name, optimizer in OPTIMIZERS.items():
        found = trained(optimizer.prepare(params))
        for ours, expected in zip(*map(jax.tree.leaves, (found, params)), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=2**-8, err_msg=name)


def test_a_training_step_is_gradient_and_update():
    # With the slow weights elsewhere, a gradient taken at them would be another.
    network, optimizer = dense(), OPTIMIZERS["optax.lookahead(adamw)"]
    fast, slow = network.params, jax.tree.map(jnp.zeros_like, network.params)
    both, state = optax.LookaheadParams(fast, slow), optimizer.tx.init(optimizer.prepare(fast))
    found, _ = train.training_step(network.loss, optimizer)(both, state, network.batch)
    grads = jax.grad(network.loss)(fast, network.batch)
    updates, _ = optimizer.tx.update(grads, state, both)
    jax.tree.map(np.testing.assert_array_equal, found, optax.apply_updates(both, updates))


def measure(folder: Path, *names: str) -> dict[str, Any]:
    options = ["--networks", SMALL, "--repeats=2", f"--out={folder}"]
    train.main([*options, "--optimizers", *names])
    return json.loads((folder / "train-cpu.json").read_text(encoding="utf-8"))


def test_history_has_times_and_shares(tmp_path):
    row = measure(tmp_path, "adamw")[f"{SMALL} / adamw"]
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    found = {(x["case"], x["unit"]): (x["median"], x["spread"]) for x in map(json.loads, lines)}
    assert found == {
        (f"{SMALL} / adamw", "ms"): (row["median_ms"], row["spread_ms"]),
        (f"{SMALL} / adamw, share", "%"): (100 * row["share"], 100 * row["share_spread"]),
    }


def test_on_a_gpu_the_fused_step_takes_turns_too():
    rows = train.Turns(SMALL, "gpu", 2).measure("novak")
    assert list(rows) == [f"{SMALL} / novak", f"{SMALL} / novak, fused"]
