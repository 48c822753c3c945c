"""Properties of every method on every tree, independent of its equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.cases import (
    CASES,
    METHODS,
    PATHS,
    SCALE_INVARIANT,
    SQUARES_GRADIENTS,
    Case,
    slow_unless,
)
from support.runs import build, run
from support.strategies import (
    MENAGERIE,
    NARROW,
    SINGLE,
    WIDE,
    filled,
    seeds,
    shape,
    trees,
    with_some_missing,
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_path = pytest.mark.parametrize("case", PATHS, ids=str)
path_or_slow = pytest.mark.parametrize("case", slow_unless(PATHS, CASES))


PAIR = {"kernel": shape(2, 3), "bias": shape(3)}


def mask_as_tree(case: Case, params: Any) -> dict[str, Any]:
    """Optax calls a mask that is a function with the updates, which lack the missing gradients."""
    if "mask" not in case.options:
        return {}
    mask = case.options["mask"](params)
    if isinstance(mask, bool):  # refused, unless a function returns it
        return {"mask": lambda updates: jax.tree.map(lambda _: mask, updates)}
    return {"mask": mask}


def problem(tree: Any, seed: int, steps: int) -> tuple[Any, list[Any]]:
    """Parameters and as many gradients, some of their leaves missing throughout."""
    params, *grads = [filled(tree, seed + t) for t in range(steps + 1)]
    return params, [with_some_missing(gradient, seed) for gradient in grads]


def assert_bitwise(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def assert_stable(case, tree, seed):
    """Structure, shapes, dtypes and weak types: what decides whether `jit` compiles again."""
    params, (grads,) = problem(tree, seed, steps=1)
    optimizer = case.build(**mask_as_tree(case, params))
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, grads, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    assert jax.tree.leaves(updates) == jax.tree.leaves(jax.eval_shape(lambda g: g, grads))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)


@every_path
@pytest.mark.parametrize("dtypes", [NARROW, WIDE], ids=["narrow", "wide"])
@given(tree=st.data(), seed=seeds)
@settings(max_examples=3)
def test_structure_is_stable(case, dtypes, tree, seed):
    """The trees are random; `test_contract.py` checks one tree, and the values too."""
    with jax.enable_x64(dtypes is WIDE):
        assert_stable(case, tree.draw(trees(dtypes)), seed)


# A user's schedule may promote; ours don't.
OURS = [case for case in CASES if not any(callable(value) for value in case.options.values())]


@pytest.mark.parametrize("case", OURS, ids=str)
def test_no_dtype_is_promoted_implicitly(case):
    """So that none can change precision by surprise."""
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, dtype=dtype: shape(*x.shape, dtype=dtype), PAIR)
        with jax.numpy_dtype_promotion("strict"):
            state = jax.eval_shape(case.build().init, params)
            updates, _ = jax.eval_shape(case.build().update, params, state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_storage_dtypes_last(case):
    narrow = {"mu_dtype": jnp.bfloat16, "nu_dtype": jnp.float16}
    if case.method == "novak":
        narrow["slow_dtype"] = jnp.float16
    optimizer = case.build(**narrow)
    params = filled(MENAGERIE, seed=0)
    state = jax.eval_shape(optimizer.init, params)
    _, state = jax.eval_shape(optimizer.update, params, state, params)
    for name, dtype in narrow.items():
        stored = optax.tree.get(state, name.removesuffix("_dtype"))
        assert jax.tree.structure(stored) == jax.tree.structure(params)
        assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(dtype)}


@path_or_slow
def test_zero_gradients_without_decay_move_nothing(case):
    params, (grads,) = problem(MENAGERIE, seed=0, steps=1)
    options = {"weight_decay": 0.0} | mask_as_tree(case, params)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    assert_bitwise(run(build(case, **options), params, [zeros] * 3), params)


@pytest.mark.parametrize("callable_mask", [False, True], ids=["tree", "callable"])
@pytest.mark.parametrize("case", METHODS, ids=str)
@given(tree=trees(SINGLE), seed=seeds)
@example(tree=MENAGERIE, seed=0)
@settings(max_examples=2)
def test_masked_decay(case, callable_mask, tree, seed):
    """The steps are those with decay where the mask is true, and those without elsewhere."""
    params, *grads = [filled(tree, seed + t) for t in range(3)]
    rng = np.random.default_rng(seed)
    mask = jax.tree.map(lambda p: bool(rng.integers(2)), params)
    one = isinstance(mask, bool)  # refused, unless a function returns it

    decayed, plain, masked = (
        run(case.build(**options), params, grads)
        for options in (
            {"weight_decay": 0.5},
            {"weight_decay": 0.0},
            {"weight_decay": 0.5, "mask": (lambda p: mask) if callable_mask or one else mask},
        )
    )
    assert_bitwise(masked, jax.tree.map(lambda m, d, p: d if m else p, mask, decayed, plain))


MODULES = [
    {"kernel": shape(2, 3), "bias": shape(3)},
    {"kernel": shape(4, 3), "bias": shape(3)},
    {"kernel": shape(5, 3)},
    {"scale": shape(3)},
]
NAMES = ["conv1", "conv2", "conv10", "norm"]


# The depth of a module is its place among the names.
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.method == "caadam" and case.options.get("scaling") != "depth"],
    ids=str,
)
@given(names=st.permutations(NAMES), seed=seeds)
@settings(max_examples=2)
def test_renaming_modules_renames_results(case, names, seed):
    def renamed(tree):
        return dict(zip(names, [tree[name] for name in NAMES], strict=True))

    tree = dict(zip(NAMES, MODULES, strict=True))
    params, *grads = [filled(tree, seed + t) for t in range(3)]
    expected = renamed(run(build(case), params, grads))
    ours = run(build(case), renamed(params), map(renamed, grads))
    assert_bitwise(ours, expected)


@pytest.mark.parametrize(
    "case", slow_unless(PATHS, [case for case in CASES if SCALE_INVARIANT in case.tags])
)
def test_gradient_scale_cancels(case):
    """A power of two cancels bit-exactly."""
    params, *grads = [filled(PAIR, seed) for seed in range(5)]
    optimizer = build(case, eps=0.0)
    plain = run(optimizer, params, grads)
    scaled = run(optimizer, params, jax.tree.map(lambda g: 1024 * g, grads))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(plain))
    assert_bitwise(scaled, plain)


def powers_of_ten(smallest: int, largest: int):
    """Gradients of `PAIR`, each of their values a power of ten or zero, of either sign."""
    power = st.integers(smallest, largest).map(lambda n: 10.0**n) | st.just(0.0)
    value = st.builds(lambda sign, x: sign * x, st.sampled_from([-1, 1]), power)

    def array(x):
        flat = st.lists(value, min_size=x.size, max_size=x.size)
        return flat.map(lambda values: np.reshape(values, x.shape).astype(x.dtype))

    return st.fixed_dictionaries({name: array(x) for name, x in PAIR.items()})


def constant(value: float) -> Any:
    return jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), PAIR)


@path_or_slow
@given(grads=st.lists(powers_of_ten(-30, 30), min_size=3, max_size=3))
@example(grads=[constant(1e30)] * 3)
@example(grads=[constant(1e-30)] * 3)
@example(grads=[constant(1e30), constant(0), constant(1e-30)])
@settings(max_examples=3)
def test_extreme_gradients_make_finite_steps(case, grads):
    """Steps that grow with squares are finite where these are."""
    largest = 1e18 if SQUARES_GRADIENTS in case.tags else 1e30
    grads = jax.tree.map(lambda g: np.clip(g, -largest, largest), grads)
    after = run(build(case), filled(PAIR, seed=0), grads)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
