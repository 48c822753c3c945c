"""Every piece, every method and Optax's own optimizers keep the contract of a transformation."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized

import optax_ext
from optax_ext.testing import check_transformation, random_like
from support.cases import CASE, METHODS, PATHS, SQUARES_GRADIENTS, slow_unless

PARAMS = {
    "in": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.linspace(0.1, 1, 3)},
    "out": [{"kernel": jnp.full((2, 3), 0.5)}, (), None],
    "temperature": jnp.asarray(0.3),
    "empty": jnp.zeros((0, 3)),
}
MOMENTS = optax_ext.ema(decay=0.9), optax_ext.ema_of_squares(decay=0.99)
INNER = optax_ext.scale_by_moments(*MOMENTS, optax_ext.ratio(eps=1e-8))

PIECES: Mapping[str, optax.GradientTransformation] = {
    "ema": MOMENTS[0],
    "ema_of_squares": MOMENTS[1],
    "max_ema_of_squares": optax_ext.max_ema_of_squares(decay=0.9),
    "triple_ema": optax_ext.triple_ema(decays=(0.9, 0.5, 0.5), bias_correction="exact"),
    "triple_ema_of_squares": optax_ext.triple_ema_of_squares(decays=(0.9, 0.9, 0.9)),
    "nesterov_ema": optax_ext.nesterov_ema(decay=0.9, variant="hybrid"),
    "scheduled_nesterov_ema": optax_ext.scheduled_nesterov_ema(decay=0.9),
    "scale_by_moments": INNER,
    "correct_bias": optax_ext.correct_bias(b1=0.9, b2=0.99),
    "rectify": optax_ext.rectify(b2=0.99),
    "autoscale": optax_ext.autoscale(INNER, decay=0.9),
    "scale_by_trust_ratio": optax_ext.scale_by_trust_ratio(max_ratio=10.0),
    "velocity_regularized": optax_ext.velocity_regularized(INNER, beta3=1.0, lr_cutoff=10.0),
    "scale_by_connections": optax_ext.scale_by_connections(scaling="additive"),
    "lookahead": optax_ext.lookahead(INNER, sync_period=2, slow_step_size=0.5),
    "rotating": optax_ext.lookahead(INNER, sync_period=2, slow_step_size=0.5, mode="rotating"),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name):
    check_transformation(PIECES[name], PARAMS)


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

    @chex.variants(  # pyright: ignore[reportCallIssue]
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
