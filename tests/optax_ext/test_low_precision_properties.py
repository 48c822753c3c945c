"""Properties of state and weights in few bits, for chains, trees and gradients of any kind."""

from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_ext
from support.cases import PATHS, SQUARES_GRADIENTS
from support.runs import build
from support.strategies import (
    GROUPED,
    SINGLE,
    WITH_INFINITIES,
    filled,
    streams,
    trees,
)

STEPS = 4


def in_small_groups(field: Any, parameter: Any, leaf: Any) -> Any:
    """Return the default formats in groups of 4, or of 1 where these don't fit."""
    size = 4 if leaf.size % 4 == 0 else 1
    return optax_ext.default_formats(group_size=size, min_size=1)(field, parameter, leaf)


quantize = partial(optax_ext.quantize_state, formats=in_small_groups)
RATE = 1e-2
# Zero weight decay, so that zero gradients move nothing.
OPTIMIZERS = {str(case): build(case, weight_decay=0.0) for case in PATHS} | {
    "adam": optax.adam(RATE),
    "amsgrad": optax.amsgrad(RATE),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
    "lion": optax.lion(RATE, weight_decay=0.0),
    "momentum": optax.sgd(RATE, momentum=0.9),
}
SQUARES = {str(case) for case in PATHS if SQUARES_GRADIENTS in case.tags}
WEIGHTS = {
    "float32": lambda tx: tx,
    "24 bits": optax_ext.master_weights,
    "32 bits": partial(optax_ext.master_weights, bits=32),
    "stochastic": optax_ext.stochastic_rounding,
}
FAST = [("adam", "float32"), ("adam", "24 bits")]
PAIRS = [("adam", name) for name in WEIGHTS] + [(name, "float32") for name in OPTIMIZERS]
every_pair = pytest.mark.parametrize(
    ("name", "weights"),
    [
        pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow])
        for pair in dict.fromkeys(PAIRS)
    ],
)


def multi_steps(tx):
    multi = optax.MultiSteps(tx, 2)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)


AROUND = [
    lambda tx: tx,
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    multi_steps,
    lambda tx: optax.apply_if_finite(tx, 2),
    lambda tx: optax.masked(tx, partial(jax.tree.map, lambda p: p.ndim > 1)),
    lambda tx: optax_ext.lookahead(tx, sync_period=2, slow_step_size=0.5),
]
around = st.sampled_from(AROUND)


def types(tree):
    return jax.tree.structure(tree), jax.tree.leaves(tree)


@given(
    tree=trees(SINGLE, [(), (1,), (4,), (3, 8), (4, 3), (0, 4)]),
    tx=st.sampled_from(sorted(OPTIMIZERS)).map(OPTIMIZERS.get),
    inside=around,
    outside=around,
    weights=st.sampled_from(sorted(WEIGHTS)),
)
@settings(max_examples=20)
def test_types_are_stable(tree, tx, inside, outside, weights):
    """Structure, shapes, dtypes and weak types: what decides whether `jit` compiles again."""
    tx = WEIGHTS[weights](outside(quantize(inside(tx))))
    params = jax.eval_shape(partial(initial, weights), tree)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(tree)


def initial(weights, params):
    return params if weights == "float32" else optax_ext.bfloat16_weights(params)


@cache
def compiled(name, weights):
    """Return compiled inits and steps of an optimizer: in float32, and in few bits."""

    def step(tx, params, state, grads):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    exact = OPTIMIZERS[name]
    both = exact, WEIGHTS[weights](quantize(exact))
    return [(jax.jit(tx.init), jax.jit(partial(step, tx))) for tx in both]


def run(name, weights, grads):
    """Return the parameters of both before and after each step, and the last state in few bits."""
    params = jax.tree.map(jnp.asarray, filled(GROUPED, seed=0))
    (init, step), (init_ours, step_ours) = compiled(name, weights)
    exact = params, init(params)
    params = initial(weights, params)
    ours = params, init_ours(params)
    history = [(exact[0], ours[0])]
    # Steps that grow with squares are finite where these are.
    largest = 1e18 if name in SQUARES else np.inf
    for g in grads:
        g = jax.tree.map(lambda x: np.clip(x, -largest, largest), g)
        exact, ours = step(*exact, g), step_ours(*ours, g)
        history.append((exact[0], ours[0]))
    return history, ours[1]


def all_finite(tree):
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


@every_pair
@given(grads=streams(GROUPED, STEPS))
@settings(max_examples=20)
def test_finite_gradients_make_finite_steps(name, weights, grads):
    history, _ = run(name, weights, grads)
    assert all_finite(history)


@every_pair
@given(grads=streams(GROUPED, STEPS, WITH_INFINITIES))
@settings(max_examples=20)
def test_parameters_are_finite_where_those_of_float32_are(name, weights, grads):
    history, _ = run(name, weights, grads)
    for exact, ours in history:
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(ours), strict=True):
            assert all_finite(np.asarray(b)[np.isfinite(a)])


@pytest.mark.parametrize("weights", ["float32", "24 bits"])
@given(grads=streams(GROUPED, STEPS))
@settings(max_examples=20)
def test_no_element_explodes(weights, grads):
    """A step of Adam is at most about the rate, also for an element that is small in its group."""
    history, _ = run("adam", weights, grads)
    for (_, before), (_, after) in pairwise(history):
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            rounding = 0 if weights == "float32" else 2**-7 * np.abs(a)
            assert (np.abs(b - a) < 5 * RATE + rounding).all()


@every_pair
def test_zero_gradients_move_nothing(name, weights):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), GROUPED)
    (_, before), *history = run(name, weights, STEPS * [zeros])[0]
    # Slow weights of 24 bits, from which NOVAK's parameters restart.
    rounding = 2**-15 if "novak" in name else 0
    for _, after in history:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=rounding), after, before)
