"""The methods inside what Optax, JAX and Flax put around an optimizer."""

from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_ext
from support.cases import CASE, CASES, METHODS, slow_unless
from support.runs import build, run, step
from support.strategies import filled, shape

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
# One that couples leaves, one with parameters in its state, one that reads their names.
FEW = [CASE[f"{name}-default"] for name in ("vradam", "novak", "caadam")]
few_methods = pytest.mark.parametrize("case", FEW, ids=str)
few_or_slow = pytest.mark.parametrize("case", slow_unless(FEW[:2], METHODS))
TREE = {"bias": shape(3), "kernel": shape(2, 3)}
PARAMS, *GRADS = [filled(TREE, seed) for seed in range(4)]


def double(tree):
    return jax.tree.map(np.float64, tree)


def assert_equal(ours, expected, *, rtol=0.0):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol), ours, expected)


# A period that decides shapes, and functions that Optax would take for a hyperparameter's schedule.
STATIC = {"novak-full": ["sync_period", "mask"], "dualadam-schedules": ["switch_rate"]}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    slow_unless(
        [*METHODS, CASE["novak-full"]],
        [
            *METHODS,
            *(case for case in CASES if case.name == "schedules"),
            *(CASE[name] for name in ("vradam-tensor_corrected", "novak-full", "caadam-weak")),
        ],
    ),
)
def test_injected_hyperparameters(case):
    inject = optax.inject_hyperparams(case.factory, static_args=STATIC.get(str(case), ()))
    problem = double((PARAMS, GRADS))
    assert_equal(run(inject(**case.kwargs), *problem), run(case.build(), *problem), rtol=1e-12)


@every_method
def test_changed_rate_does_not_compile_again(case):
    optimizer = optax.inject_hyperparams(case.factory)(**case.kwargs)
    traces = []

    @jax.jit
    def update(*arguments):
        traces.append(arguments)
        return optimizer.update(*arguments)

    state = optimizer.init(PARAMS)
    slow, after = update(GRADS[0], state, PARAMS)
    state.hyperparams["learning_rate"] = 10 * after.hyperparams["learning_rate"]
    fast, _ = update(GRADS[0], state, PARAMS)
    assert_equal(fast, jax.tree.map(lambda u: 10 * u, slow), rtol=1e-6)
    assert len(traces) == 1


@few_methods
def test_unknown_extra_arguments_are_ignored(case):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), case.build())
    state = optimizer.init(PARAMS)
    ours = optimizer.update(GRADS[0], state, PARAMS, value=jnp.ones(()), unknown="argument")
    assert_equal(ours, optimizer.update(GRADS[0], state, PARAMS))


@pytest.mark.usefixtures("x64")
@few_methods
def test_gradient_accumulation(case):
    params, *grads = double([PARAMS, *GRADS[:2]])
    accumulating = optax.MultiSteps(build(case), every_k_schedule=2).gradient_transformation()
    mean = jax.tree.map(lambda *g: sum(g) / 2, *grads)
    ours = run(accumulating, params, grads * 2, jit=True)
    assert_equal(ours, run(build(case), params, [mean] * 2), rtol=1e-12)


@few_methods
def test_step_that_is_not_finite_never_happened(case):
    optimizer = optax.apply_if_finite(build(case), max_consecutive_errors=3)
    nan = jax.tree.map(lambda g: np.nan * g, GRADS[0])
    first, *later = GRADS
    interrupted = run(optimizer, PARAMS, [first, nan, *later], jit=True)
    assert_equal(interrupted, run(optimizer, PARAMS, GRADS, jit=True))


@pytest.mark.usefixtures("x64")
@few_or_slow
def test_vmap_over_seeds_and_rates(case):
    """One program trains several models, each at a rate of its own."""

    @jax.jit
    def final(params, rate, grads):
        return run(build(case, learning_rate=rate), params, grads)

    seeds = [double(filled(TREE, seed)) for seed in (10, 20, 30)]
    rates = jnp.array([0.1, 0.01, 0.001])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    ours = jax.vmap(final, in_axes=(0, 0, None))(stacked, rates, double(GRADS))
    for i, (params, rate) in enumerate(zip(seeds, rates, strict=True)):
        alone = final(params, float(rate), double(GRADS))
        assert_equal(jax.tree.map(lambda x, i=i: x[i], ours), alone, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@few_or_slow
def test_gradient_through_steps(case):
    """Meta-learning differentiates a loss after two steps, by parameters and rate."""

    @jax.jit
    def outcome(params, rate):
        def loss(params):
            return jnp.sum(jnp.sin(params["kernel"]) ** 2) + jnp.sum(params["bias"] ** 4)

        optimizer = build(case, learning_rate=rate)
        state = optimizer.init(params)
        for _ in range(2):
            params, state = step(optimizer, params, state, jax.grad(loss)(params))
        return loss(params)

    def slope(f, h=1e-6):
        return float(f(h) - f(-h)) / (2 * h)

    params, direction = double((PARAMS, GRADS[0]))
    by_params, by_rate = jax.jit(jax.grad(outcome, argnums=(0, 1)))(params, 0.01)
    along = slope(lambda h: outcome(optax.tree.add_scale(params, h, direction), 0.01))
    assert float(optax.tree.vdot(by_params, direction)) == pytest.approx(along, rel=1e-6)
    assert float(by_rate) == pytest.approx(slope(lambda h: outcome(params, 0.01 + h)), rel=1e-6)


INPUTS, TARGETS = filled(shape(8, 4), 0), filled(shape(8, 2), 1)


def reference_run(optimizer, params):
    """Three steps of a two-layer network without any framework."""

    @jax.jit
    @jax.grad
    def gradient(params):
        first, last = params["conv2"], params["conv10"]
        hidden = jnp.tanh(INPUTS @ first["kernel"] + first["bias"][None])
        return jnp.mean((hidden @ last["kernel"] + last["bias"][None] - TARGETS) ** 2)

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(optimizer, params, state, gradient(params))
    return params


class LinenNetwork(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.tanh(flax.linen.Dense(5, name="conv2")(x))
        return flax.linen.Dense(2, name="conv10")(x)


@few_methods
def test_linen_train_state(case):
    network = LinenNetwork()
    params = jax.jit(network.init)(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=build(case))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.mean((network.apply({"params": params}, INPUTS) - TARGETS) ** 2)

    for _ in range(3):
        state = state.apply_gradients(grads=gradient(state.params))
    assert_equal(state.params, reference_run(build(case), params), rtol=1e-5)


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv2 = nnx.Linear(4, 5, rngs=rngs)
        self.conv10 = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.conv10(nnx.tanh(self.conv2(x)))


@few_methods
def test_nnx_optimizer(case):
    """CaAdam finds the same units in paths that end in `.value`."""
    network = NnxNetwork(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    optimizer = nnx.Optimizer(network, build(case), wrt=nnx.Param)

    def loss(network):
        return jnp.mean((network(INPUTS) - TARGETS) ** 2)

    for _ in range(3):
        optimizer.update(network, nnx.grad(loss)(network))
    ours = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    assert_equal(ours, reference_run(build(case), params), rtol=1e-5)


def test_connection_table_of_an_nnx_module():
    state = nnx.state(NnxNetwork(nnx.Rngs(0)), nnx.Param)
    options = {"scaling": "depth", "overrides": {"conv10": {"scale": 0.5}}}
    table = optax_ext.connection_table(state, **options)
    assert [(row.path, row.connections) for row in table] == [("conv2", 20), ("conv10", 10)]
    assert table == optax_ext.connection_table(nnx.to_pure_dict(state), **options)
