"""Derivatives by hyperparameters stay finite where parameters and gradients are zero.

A row of an embedding that no batch looks up, a frozen bias: zero leaves with zero gradients are
common, and a root's infinite derivative at 0 times a zero is NaN.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext
from optax_ext.transforms import bias_correction
from support.cases import CASE, METHODS, slow_unless

ALIVE = {
    "in": {"kernel": np.array([[0.5, -1.0], [2.0, 0.3]])},
    "out": {"kernel": np.ones((2, 3))},
}
DEAD = {"unused": {"bias": np.zeros(3)}}
STEPS = 3


def numbers(case):
    """All arguments of a method that are floats, as it would take them by default."""
    parameters = inspect.signature(case.factory).parameters
    arguments = {name: p.default for name, p in parameters.items()} | case.kwargs
    return {name: value for name, value in arguments.items() if isinstance(value, float)}


def loss_after_steps(factory, params):
    """A function of hyperparameters: the sum of what a quadratic loss, which ignores what is dead,
    makes of all parameters.
    """

    def loss(params):
        alive = [leaf for name, leaf in params.items() if name in ALIVE]
        return sum((jnp.sum(x**2) for x in jax.tree.leaves(alive)), jnp.zeros(()))

    def train(hyperparameters):
        optimizer, start = factory(**hyperparameters), jax.tree.map(jnp.asarray, params)

        def advance(carry, _):
            trained, state = carry
            updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
            return (optax.apply_updates(trained, updates), state), None

        (trained, _), _ = jax.lax.scan(advance, (start, optimizer.init(start)), length=STEPS)
        return sum(map(jnp.sum, jax.tree.leaves(trained)))

    return train


def derivatives(train, hyperparameters):
    """Return the derivative by each hyperparameter in reverse mode, and by all in forward mode."""
    each = jax.jit(jax.grad(train))(hyperparameters)
    ones = jax.tree.map(jnp.ones_like, hyperparameters)
    _, together = jax.jit(lambda *args: jax.jvp(train, (args[0],), (args[1],)))(
        hyperparameters, ones
    )
    return each | {"together": together}


def assert_dead_leaf_adds_nothing(factory, hyperparameters, *, exactly=True):
    found = derivatives(loss_after_steps(factory, ALIVE | DEAD), hyperparameters)
    assert all(np.isfinite(x) for x in found.values()), found
    if exactly:
        expected = derivatives(loss_after_steps(factory, ALIVE), hyperparameters)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-12, err_msg=name)


# Roots and norms; all other code paths are slow rows.
PATHS = [
    *("dualadam-scale_free", "vradam-tensor_corrected", "novak-full", "fame-tema_exact"),
    *("novak-momentum_nadam", "caadam-default", "fame-clamped", "vradam-mean"),
]


@pytest.mark.parametrize("name", slow_unless([], PATHS))
def test_by_all_hyperparameters_of_a_method(name, x64):
    case = CASE[name]
    options = {name: value for name, value in case.kwargs.items() if not isinstance(value, float)}
    # A mean counts the coordinates of all leaves, and a depth by leaf counts leaves.
    exactly = not {"mean", "leaf"} & {x for x in options.values() if isinstance(x, str)}
    assert_dead_leaf_adds_nothing(
        lambda **floats: case.factory(**options | floats), numbers(case), exactly=exactly
    )


@pytest.mark.parametrize("case", slow_unless([], METHODS))
def test_by_a_first_decay_of_zero(case, x64):
    """The end of its range, where the logarithm in the bias correction has no derivative."""
    assert_dead_leaf_adds_nothing(case.factory, numbers(case) | {"b1": 0.0})


def trust_ratio_around_adam(learning_rate, max_ratio):
    return optax.chain(
        optax.scale_by_adam(),
        optax_ext.scale_by_trust_ratio(max_ratio=max_ratio),
        optax.scale_by_learning_rate(learning_rate),
    )


def autoscaled_adam(learning_rate, decay):
    return optax_ext.autoscale(optax.adam(learning_rate), decay=decay)


def gate_per_tensor(learning_rate, beta3, power):
    return optax_ext.velocity_regularized(
        optax.adam(learning_rate), beta3=beta3, lr_cutoff=10.0, power=power, norm_scope="tensor"
    )


GATES = {
    "trust ratio": (trust_ratio_around_adam, {"learning_rate": 0.1, "max_ratio": 10.0}),
    "autoscaled": (autoscaled_adam, {"learning_rate": 0.1, "decay": 0.9}),
    "gate": (gate_per_tensor, {"learning_rate": 0.1, "beta3": 0.3, "power": 1.0}),
    "root of a gate": (gate_per_tensor, {"learning_rate": 0.1, "beta3": 0.3, "power": 0.5}),
}


@pytest.mark.parametrize("name", slow_unless([], GATES))
def test_of_gates_around_adam(name, x64):
    """Optax's own Adam has derivatives by its rate there, and the gates keep them."""
    factory, hyperparameters = GATES[name]
    assert_dead_leaf_adds_nothing(factory, hyperparameters)
    found = derivatives(loss_after_steps(factory, DEAD), hyperparameters)
    assert all(x == 0 for x in found.values()), found


def test_of_a_correction_is_that_of_the_plain_form(x64):
    decays = jnp.array([0.0, 0.3, 0.9, 0.999])
    for t in (1, 2, 1000):
        ours = jax.vmap(
            jax.grad(lambda b, t=t: bias_correction.total_weight(b, jnp.int32(t), float))
        )(decays)
        np.testing.assert_allclose(ours, -t * decays ** (t - 1), rtol=1e-12)


def test_second_derivative_of_a_correction(x64):
    for t in (1, 2, 3, 1000):
        for decay in (0.0, 0.5):
            ours = jax.grad(
                jax.grad(lambda b, t=t: bias_correction.total_weight(b, jnp.int32(t), float))
            )(decay)
            expected = -t * (t - 1) * decay ** (t - 2) if t > 1 else 0.0
            np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("count", slow_unless([10**5], [1, 6, 10**5, 2**31 - 2]))
def test_of_rectification_late_in_training(count):
    """Powers of the decay vanish by then, and their inverses overflow."""

    def term(b2):
        optimizer = optax_ext.rectify(b2=b2)
        state = optimizer.init(jnp.ones(3))._replace(count=jnp.int32(count))
        return optimizer.update(jnp.ones(3), state)[1].rectification

    found = derivatives(lambda floats: term(**floats), {"b2": 0.999})
    assert all(np.isfinite(x) for x in found.values())
