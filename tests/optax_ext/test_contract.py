"""Every piece, every method and Optax's own optimizers keep the contract of a transformation."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized

from optax_ext.testing import check_transformation, random_like
from support.cases import CASE, METHODS, PATHS, SQUARES_GRADIENTS, slow_unless
from support.pieces import PIECES

PARAMS = {
    "in": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.linspace(0.1, 1, 3)},
    "out": [{"kernel": jnp.full((2, 3), 0.5)}, (), None],
    "temperature": jnp.asarray(0.3),
    "empty": jnp.zeros((0, 3)),
}


# An estimator, a join, a gate, a wrapper and a scaling; the others have the same kinds of state.
KINDS = ["triple_ema", "product", "velocity_regularized", "lookahead_exact", "autoscale"]


@pytest.mark.parametrize("name", slow_unless(KINDS, [piece.name for piece in PIECES]))
def test_pieces(name):
    (piece,) = (piece for piece in PIECES if piece.name == name)
    check_transformation(piece.factory(**piece.arguments), PARAMS)


# Besides what decides the step, options that keep more in the state.
MORE_PATHS = [*PATHS, CASE["novak-momentum"], CASE["caadam-amsgrad"]]


@pytest.mark.parametrize("case", slow_unless(METHODS, MORE_PATHS))
def test_methods(case):
    options: dict[str, Any] = {}
    if "mask" in case.options:  # as a function it would be called with the part of the tree
        options["mask"] = None
    scales = (1e-18, 1e9) if SQUARES_GRADIENTS in case.tags else (1e-18, 1e18)
    check_transformation(case.build(**options), PARAMS, scales=scales)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_weakly_typed_parameters_leave_no_trace_in_the_state(case):
    """`jnp.full` makes them; else the second step would be compiled again."""
    params = {"kernel": jnp.full((2, 3), 0.5)}
    state = jax.eval_shape(case.build().init, params)
    assert not any(x.weak_type for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", slow_unless(["adamw"], ["adamw", "lion", "lamb", "nadam", "sgd"]))
def test_optimizers_of_optax(name):
    check_transformation(getattr(optax, name)(0.1), PARAMS, absent_gradients=False)


def broken(update: Callable[..., Any]) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


BROKEN = {
    "promotes the state": lambda u, s, p=None: (u, s + 1.0),
    "promotes updates": lambda u, s, p=None: (jax.tree.map(lambda x: x + jnp.ones(()), u), s),
    "changes the structure": lambda u, s, p=None: (jax.tree.leaves(u), s),
    "reads a tracer": lambda u, s, p=None: (u, s + 1) if s == 0 else (u, s),
    "overflows": lambda u, s, p=None: (jax.tree.map(lambda x: x**3, u), s),
    "couples what is masked": lambda u, s, p=None: (
        jax.tree.map(lambda x: x / len(jax.tree.leaves(u, is_leaf=lambda x: x is None)), u),
        s,
    ),
}


@pytest.mark.parametrize("update", BROKEN.values(), ids=BROKEN)
def test_a_broken_transformation_is_found(update):
    errors = AssertionError, jax.errors.TracerBoolConversionError
    with pytest.raises(errors):
        check_transformation(broken(update), PARAMS, absent_gradients=False)


class Variants(chex.TestCase):
    """Trajectories under chex's variants: compiled or not, placed on a device or not, mapped."""

    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True, with_pmap=True
    )
    @parameterized.named_parameters(
        ("vradam", CASE["vradam-default"]), ("novak", CASE["novak-default"])
    )
    def test_one_trajectory(self, case):
        params = {"kernel": PARAMS["in"]["kernel"], "bias": PARAMS["in"]["bias"]}
        tx = case.build()
        step = self.variant(lambda g, s, p: tx.update(g, s, p))
        state, expected_state = tx.init(params), tx.init(params)
        for seed in range(2):
            gradient = random_like(params, seed)
            updates, state = step(gradient, state, params)
            expected, expected_state = tx.update(gradient, expected_state, params)
            chex.assert_trees_all_close(updates, expected, rtol=1e-5)
            chex.assert_trees_all_equal_structs(state, expected_state)
