"""A fused step outside of `jit`: compiled once for what it is given, and as right as the chain."""

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import explain, fuse
from support.fused import SMALL, SUMMED, assert_close, chain_step, in_dtypes_of, parameters, stream

PARAMS = in_dtypes_of(SMALL, parameters(SMALL))
GRADS = stream(SMALL, 7)


class Counted:
    """An optimizer that counts how often its update is traced or run."""

    def __init__(self, update=lambda g, **extra: g):
        self.traces = 0

        def counted(updates, state, params=None, **extra):
            del params
            self.traces += 1
            return jax.tree.map(lambda g: update(g, **extra), updates), state

        first = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), counted)
        self.tx = optax.chain(first, optax.adamw(0.1))

    def run(self, step, params=PARAMS, grads=GRADS, **extra):
        state = self.tx.init(params)
        for gradient in grads:
            params, state = step(params, state, gradient, **extra)
        return params, state


def first_moment(result: Any) -> Any:
    """Return the first moment in the result of a step of `Counted.tx`."""
    _, (_, (adam, *_)) = result
    return adam.mu


@pytest.fixture(autouse=True, scope="module")
def interpreter_has_run():
    """Pallas adds settings to JAX when its interpreter first runs, and `jit` then traces anew."""
    first = Counted()
    first.run(fuse(first.tx, backend="interpret").step, grads=GRADS[:1])


@pytest.mark.parametrize("backend", ["auto", "interpret"])
def test_seven_steps_trace_once(backend):
    counted = Counted()
    ours = counted.run(fuse(counted.tx, backend=backend).step)
    assert counted.traces == 1
    assert_close(ours, counted.run(chain_step(counted.tx)), SUMMED)


def test_explain_and_step_share_one_trace():
    counted = Counted()
    fused = fuse(counted.tx, backend="interpret")
    explained = explain(fused, PARAMS, backend="interpret")
    counted.run(fused.step)
    assert explain(fused, PARAMS, backend="interpret") == explained
    assert counted.traces == 1


def test_seven_updates_trace_once():
    counted = Counted()
    fused, state = fuse(counted.tx), counted.tx.init(PARAMS)
    for gradient in GRADS:
        _, state = fused.update(gradient, state, PARAMS)
    assert counted.traces == 1


def test_the_chain_itself_is_not_compiled():
    counted = Counted()
    counted.run(fuse(counted.tx, backend="xla").step)
    assert counted.traces == len(GRADS)


def sharded(tree):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


OTHERS = {
    "structure": lambda tree: list(tree.values()),
    "dtype": lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree),
    "shape": lambda tree: jax.tree.map(lambda x: x[:2], tree),
    "sharding": sharded,
}
# Types contain no shardings on automatic axes, so the chain's trace serves both.
TRACES = {"sharding": 1}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_new_is_traced_anew(name):
    """Earlier programs are still known."""
    counted = Counted()
    step = fuse(counted.tx, backend="interpret").step
    tree = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(4)}
    other = OTHERS[name](tree)
    for params in (tree, other, tree, other):
        ours = counted.run(step, params, [params])
        assert counted.traces == TRACES.get(name, 2) or params is tree
        count = counted.traces
        assert_close(ours, counted.run(jax.jit(chain_step(counted.tx)), params, [params]), 2**-7)
        counted.traces = count
    assert jax.tree.map(lambda x: x.sharding, ours[0]) == jax.tree.map(lambda x: x.sharding, other)


@pytest.mark.parametrize("number", [np.float32, jnp.float32], ids=str)
def test_numbers_take_effect_and_trace_once(number):
    counted = Counted(lambda g, *, value: g * value)
    step, chain = fuse(counted.tx).step, chain_step(counted.tx)
    state = counted.tx.init(PARAMS)
    ours = [step(PARAMS, state, GRADS[0], value=number(v))[1] for v in (2, 3, 5)]
    assert counted.traces == 1
    for moments, v in zip(ours, (2, 3, 5), strict=True):
        assert_close(moments, chain(PARAMS, state, GRADS[0], value=number(v))[1], SUMMED)


@pytest.mark.parametrize("values", [(True, False), ("up", "down")], ids=["bool", "str"])
def test_options_trace_once_each(values):
    counted = Counted(lambda g, *, option: g if option in (True, "up") else -g)
    step = fuse(counted.tx).step
    state = counted.tx.init(PARAMS)
    up, down, again = (
        first_moment(step(PARAMS, state, GRADS[0], option=values[i])) for i in (0, 1, 0)
    )
    assert counted.traces == 2
    assert_close(again, up, 0)
    assert_close(down, jax.tree.map(jnp.negative, up), 0)


def test_one_and_true_are_different_options():
    counted = Counted(lambda g, *, option: g * (2 if option is True else 3))
    step, state = fuse(counted.tx).step, counted.tx.init({"w": jnp.ones(3)})
    moments = [
        first_moment(step({"w": jnp.ones(3)}, state, {"w": jnp.ones(3)}, option=x))["w"][0]
        for x in (True, 1, 1.0)
    ]
    np.testing.assert_allclose(moments, [0.2, 0.3, 0.3], rtol=1e-6)


READS_A_NUMBER = {
    "branch": lambda g, *, value: g if value > 1 else -g,
    "shape": lambda g, *, value: jnp.tile(g, int(value))[..., : g.shape[-1]],
    "key": lambda g, *, value: g * {2.0: 1.0, 3.0: 5.0}.get(value, 7.0),
    "type": lambda g, *, value: g * (2 if isinstance(value, float) else 3),
    "double": lambda g, *, value: g * (value * 1e300 * 1e-300),
    "large": lambda g, *, value: g * (int(value * 2**40) % 7),
}


@pytest.mark.parametrize("update", READS_A_NUMBER.values(), ids=READS_A_NUMBER)
def test_a_number_whose_value_decides_is_right(update):
    """The chain may look at it, so every call traces, once."""
    counted = Counted(lambda g, *, value: update(g, value=value) if g.ndim else g)
    step, chain = fuse(counted.tx).step, chain_step(counted.tx)
    state = counted.tx.init(PARAMS)
    for calls, value in enumerate((2.0, 3.0, 1.0), start=1):
        ours = step(PARAMS, state, GRADS[0], value=value)
        assert counted.traces == calls
        assert_close(ours, chain(PARAMS, state, GRADS[0], value=value), SUMMED)
        counted.traces = calls


def test_functions_are_called_at_every_step():
    """They may close over what changes, such as a batch."""
    batch = [2.0]
    counted = Counted(lambda g, *, factor: g * factor())
    step, state = fuse(counted.tx).step, counted.tx.init(PARAMS)

    def factor():
        return batch[0]

    before = first_moment(step(PARAMS, state, GRADS[0], factor=factor))
    batch[0] = 4.0
    after = first_moment(step(PARAMS, state, GRADS[0], factor=factor))
    assert_close(after, jax.tree.map(lambda m: 2 * m, before), SUMMED)


def rate_tracers():
    rates = []
    tx = optax.stateless(lambda updates, _: jax.tree.map(lambda g: -rates[-1] * g, updates))
    step = fuse(tx).step

    def trained(rate):
        rates.append(rate)
        params, _ = step({"w": jnp.ones(3)}, optax.EmptyState(), {"w": jnp.ones(3)})
        rates.clear()
        return optax.tree.sum(params)

    return trained


@pytest.mark.parametrize("transform", [jax.grad, jax.jit, jax.vmap, jax.jacfwd])
def test_closing_over_a_tracer(transform):
    """Only the closure knows of the transformation, and no later call may see its tracer."""
    trained = rate_tracers()
    rates = jnp.array([0.5, 0.25]) if transform is jax.vmap else 0.5
    results = [transform(trained)(rates), transform(trained)(2 * rates)]
    expected = {
        jax.grad: [-3.0, -3.0],
        jax.jacfwd: [-3.0, -3.0],
        jax.jit: [1.5, 0.0],
        jax.vmap: [[1.5, 2.25], [0.0, 1.5]],
    }
    np.testing.assert_allclose(results, expected[transform])


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.grad(rate_tracers())(0.5)


def test_no_array_is_kept():
    counted = Counted()
    step = fuse(counted.tx).step
    params = jax.tree.map(jnp.copy, PARAMS)
    known = [weakref.ref(x) for x in jax.tree.leaves(params)]
    counted.run(step, params)
    del params
    gc.collect()
    assert all(ref() is None for ref in known)


@pytest.mark.slow
def test_few_programs_are_kept():
    counted = Counted()
    step = fuse(counted.tx).step
    trees = [{f"leaf{i}": jnp.ones(3)} for i in range(40)]
    for tree in trees:
        counted.run(step, tree, [tree])
    assert counted.traces == 40
    counted.run(step, trees[-1], [trees[-1]])
    assert counted.traces == 40
    counted.run(step, trees[0], [trees[0]])
    assert counted.traces == 41


def test_threads_share_what_is_compiled():
    counted = Counted()
    step = fuse(counted.tx).step
    expected = counted.run(step)
    with ThreadPoolExecutor(4) as threads:
        for ours in threads.map(lambda _: counted.run(step), range(8)):
            assert_close(ours, expected, 0)
    assert counted.traces == 1


def test_settings_of_jax_are_respected():
    counted = Counted(lambda g: g * jnp.arange(1.0, 2.0)[0].astype(float).astype(g.dtype))
    step = fuse(counted.tx).step
    counted.run(step)
    with jax.enable_x64(True):
        counted.run(step)
    assert counted.traces == 2
    with jax.disable_jit():
        ours = counted.run(step, grads=GRADS[:1])
    assert_close(ours, counted.run(chain_step(counted.tx), grads=GRADS[:1]), SUMMED)


def test_arguments_stay_usable():
    """Nothing is donated that the caller did not donate."""
    counted = Counted()
    params, state = PARAMS, counted.tx.init(PARAMS)
    fuse(counted.tx).step(params, state, GRADS[0])
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state, GRADS[0])))


@pytest.mark.slow
def test_time_of_161_leaves():
    """A step outside of `jit` costs a small part of the chain there."""
    tx = optax.adamw(1e-3)
    params = {f"leaf{i}": jnp.ones((64, 64)) for i in range(161)}
    steps = {
        "chain": chain_step(tx),
        "jitted": jax.jit(fuse(tx).step),
        "fused": fuse(tx).step,
    }
    seconds = {}
    for name, step in steps.items():
        state = tx.init(params)
        jax.block_until_ready(step(params, state, params))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(step(params, state, params))
            times.append(time.perf_counter() - start)
        seconds[name] = sorted(times)[3]
    print({name: f"{1e3 * time:.1f} ms" for name, time in seconds.items()})
    assert seconds["fused"] < seconds["chain"] / 3
