"""The effect of narrow storage on averages, and the averages that are stored wide by default."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext
from support.cases import CASES

# 200 steps at 1, then 5000 at 0.01.
FALL = np.repeat([1.0, 0.01], [200, 5000])


def averaged(optimizer, params, sizes):
    """The state after gradients of these sizes, the same in every coordinate."""

    def step(state, size):
        gradient = jax.tree.map(lambda p: jnp.full_like(p, size), params)
        return optimizer.update(gradient, state, params)[1], None

    state, _ = jax.jit(partial(jax.lax.scan, step))(
        optimizer.init(params), jnp.asarray(sizes, jnp.float32)
    )
    return state


def expected_average(decay, values):
    average = 0.0
    for value in values:
        average = decay * average + (1 - decay) * value
    return average


ONE_OF_EACH = {  # by what they keep of the squares
    str(case): case
    for case in CASES
    if case.name in ("default", "amsgrad", "tema") and "b2" not in case.options
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
def test_second_moment_of_narrow_parameters_follows_the_gradient(case, dtype):
    params = {"in": {"kernel": jnp.ones((2, 3), dtype)}, "out": {"kernel": jnp.ones((3, 3), dtype)}}
    state = averaged(case.build(learning_rate=0.0), params, FALL)
    nu = jax.tree.leaves(optax.tree.get(state, "nu"))
    assert {x.dtype for x in nu} == {jnp.dtype(jnp.float32)}
    expected = expected_average(0.999, np.float32(dtype(FALL[-1])) ** 2 * (FALL < 1) + (FALL == 1))
    np.testing.assert_allclose(jnp.concatenate([x.ravel() for x in nu]), expected, rtol=1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_squares_are_never_narrow_by_default(case):
    """Averages, their maximum and all stages of a cascade."""
    state = jax.eval_shape(case.build().init, {"kernel": jnp.ones((2, 3), jnp.bfloat16)})
    for name in ("nu", "nu_max"):
        for _, tree in optax.tree.get_all_with_path(state, name):
            assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    for _, cascade in optax.tree.get_all_with_path(state, "CascadeOfSquaresState"):
        assert {x.dtype for x in jax.tree.leaves(cascade.nu_later)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("decay", "least", "most"), [(0.9, 0.02, 0.04), (0.95, 0.04, 0.08), (0.99, 0.2, 0.4)]
)
@pytest.mark.parametrize(
    ("estimator", "name", "power"),
    [(optax_ext.ema, "mu", 1), (optax_ext.ema_of_squares, "nu", 2)],
    ids=["ema", "ema_of_squares"],
)
def test_where_a_bfloat16_average_stops(estimator, name, power, decay, least, most):
    """The figures of the docstrings, in shares of the average: the worst of many gradients."""
    gradient = jnp.linspace(1, 2, 64)
    tx = estimator(decay=decay, bias_correction="none", dtype=jnp.bfloat16)

    def error(state, size):
        def step(state, _):
            return tx.update(size * gradient, state)[1], None

        state, _ = jax.lax.scan(step, state, length=5000)
        average = getattr(state, name).astype(jnp.float32)
        return state, jnp.max(jnp.abs((size * gradient) ** power / average - 1))

    risen, rising = error(tx.init(jnp.zeros(64)), 1.0)
    _, falling = error(risen, 0.1)
    assert least < rising < most
    assert least < falling < most


def test_a_bfloat16_second_moment_of_the_usual_decay_does_not_fall():
    tx = optax_ext.ema_of_squares(decay=0.999, bias_correction="none", dtype=jnp.bfloat16)
    top = averaged(tx, jnp.zeros(1), FALL[:200]).nu
    assert averaged(tx, jnp.zeros(1), FALL).nu == top > 0.15


@pytest.mark.parametrize(("moved", "stands_still"), [(1e-3, True), (2e-2, False)])
def test_bfloat16_slow_weights_stop_small_steps(moved, stands_still):
    """`moved` is what a period of five steps adds to a weight of 1.1."""

    def end(slow_dtype):
        tx = optax_ext.lookahead(
            optax.sgd(1.0), sync_period=5, slow_step_size=0.5, slow_dtype=slow_dtype
        )

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.full(1, -moved / 5), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.full(1, 1.1)
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=500)
        return np.asarray(params).item() - 1.1

    share = end(jnp.bfloat16) / end(None)
    assert (share < 0.1) == stands_still
    assert stands_still or share > 0.9
