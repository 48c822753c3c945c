"""One gradient whose square overflows float32, and the steps after it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext

PARAMS = {"struck": jnp.array([0.5, -1.0, 2.0]), "spared": jnp.array([1.0, 0.3])}
GRADIENT = {"struck": jnp.array([0.1, -0.2, 0.3]), "spared": jnp.array([0.2, 0.4])}
SPIKE = {"struck": jnp.array([0.1, 1e25, 0.3]), "spared": jnp.array([0.2, 0.4])}


def after_spike(optimizer: Any, steps: int = 60) -> Iterator[tuple[int, Any, Any]]:
    """Yield updates and states; the fourth gradient is the spike."""
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for t in range(steps):
        updates, state = update(SPIKE if t == 3 else GRADIENT, state, PARAMS)
        yield t, updates, state


# The gate and the trust ratio keep nothing between steps; the average of `autoscale` must recover.
GATES = {
    "gate": optax_ext.velocity_regularized(
        optax.sgd(0.1, momentum=0.9), beta3=1.0, lr_cutoff=10.0, norm_of="gradient"
    ),
    "autoscale": optax_ext.autoscale(optax.sgd(0.1), decay=0.5),
    "trust_ratio": optax.chain(
        optax.identity(), optax_ext.scale_by_trust_ratio(max_ratio=10.0), optax.scale(-0.1)
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_recovers(name):
    """It closes for the spike at most, and opens again by itself."""
    values = []
    for t, updates, state in after_spike(GATES[name], steps=200):
        values.append(np.asarray(optax.tree.get(state, name)))
        assert np.all(np.isfinite(values[-1]))
        if t != 3:
            assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    before, during = values[2], values[3]
    assert np.min(during) < 0.2 * np.max(before)
    np.testing.assert_allclose(values[-1], before, rtol=1e-5)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_velocity_gate_recovers_with_its_velocity(scope):
    tx = optax_ext.velocity_regularized(
        optax.scale_by_adam(b1=0.5), beta3=1.0, lr_cutoff=10.0, norm_scope=scope
    )
    gates = [float(jnp.min(state.gate)) for _, _, state in after_spike(tx, steps=150)]
    assert gates[3] == pytest.approx(1 / 11)
    assert gates[-1] == pytest.approx(gates[2], rel=0.1)


@pytest.mark.parametrize("norm_of", ["velocity", "corrected_velocity", "gradient"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_gate_without_penalty_is_open(norm_of, scope):
    tx = optax_ext.vradam(0.1, beta3=0.0, norm_of=norm_of, norm_scope=scope)
    updates, state = tx.update(SPIKE, tx.init(PARAMS), PARAMS)
    assert np.all(np.asarray(optax.tree.get(state, "gate")) == 1)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("size", [1e-15, 1e-9, 1.0, 1e9, 1e18])
def test_the_scale_free_inverse_is_scale_free(size):
    """This holds even if a large tensor's sum of squares overflows, or a small one's underflows."""
    params = {"kernel": jnp.ones((100, 100))}
    gradient = {"kernel": size * jnp.linspace(0.5, 1.5, 10000).reshape(100, 100)}
    tx = optax_ext.invadam(1.0, scale_free=True)
    updates, _ = tx.update(gradient, tx.init(params), params)
    once, _ = tx.update({"kernel": gradient["kernel"] / size}, tx.init(params), params)
    np.testing.assert_allclose(
        optax.tree.get(updates, "kernel") / size, optax.tree.get(once, "kernel"), rtol=1e-4
    )


FACTORS = {"invadam": optax_ext.invadam, "dualadam": optax_ext.dualadam}


@pytest.mark.parametrize("name", FACTORS)
def test_the_scale_free_inverse_stands_still_where_adam_does(name):
    """It goes on everywhere else, in the struck tensor too."""
    ours = list(after_spike(FACTORS[name](0.1, scale_free=True)))
    adam = list(after_spike(optax.adam(0.1)))
    for (t, updates, _), (_, expected, _) in zip(ours, adam, strict=True):
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
        if t >= 3:
            assert updates["struck"][1] == expected["struck"][1] == 0
            assert np.all(updates["struck"][jnp.array([0, 2])] != 0)
            assert np.all(updates["spared"] != 0)
    spared = [updates["spared"] for _, updates, _ in ours]
    unstruck = FACTORS[name](0.1, scale_free=True)
    state = unstruck.init(PARAMS)
    for expected in spared:
        updates, state = unstruck.update(GRADIENT, state, PARAMS)
        np.testing.assert_allclose(updates["spared"], expected, rtol=1e-6)


def test_the_mean_square_leaves_out_what_overflowed():
    tx = optax_ext.product(eps=0.0, scale_free=True)
    state = tx.init(PARAMS)
    v = jnp.array([4.0, jnp.inf, 12.0])
    product = tx.combine(jnp.ones(3), v, state)
    np.testing.assert_allclose(product, [2 / np.sqrt(16 / 3), 0, np.sqrt(12 / (16 / 3))], rtol=1e-6)


def test_a_gradient_that_is_no_number_stays_visible():
    tx = optax_ext.invadam(0.1, scale_free=True)
    bad = GRADIENT | {"struck": jnp.array([0.1, jnp.nan, 0.3])}
    updates, _ = tx.update(bad, tx.init(PARAMS), PARAMS)
    assert np.isnan(optax.tree.get(updates, "struck")[1])
