"""A fused optimizer is its chain: the same parameters and state, in value and in type."""

import functools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import explain, fuse, launches
from support.cases import CASE, CASES, METHODS, PATHS, slow_unless
from support.fused import (
    ELEMENTWISE,
    INTERPRETERS,
    RAGGED,
    SMALL,
    SUMMED,
    Race,
    assert_close,
    assert_fused_is_chain,
    assert_trained,
)
from support.optax_battery import load
from support.strategies import shape

# Statistics of every kind and scope, a select on another statistic, vectors of scalars, and what is
# not elementwise; then one case for every other code path, as slow rows.
KINDS = ("fame-tema_exact", "vradam-tensor", "dualadam-crossing", "novak-full")
RACED = [CASE[name] for name in KINDS]
PATH_NAMES = {*KINDS, "caadam-schedules", *map(str, PATHS)}
every_race = pytest.mark.parametrize(
    "case", slow_unless(RACED, [case for case in CASES if str(case) in PATH_NAMES], group=True)
)


@functools.cache
def race(name: str) -> Race:
    return Race(CASE[name].build(), RAGGED)


@every_race
def test_trajectory(case):
    """Fused steps, and a run that changes between them and the chain, end where the chain does."""
    run = race(str(case))
    expected = run.run([run.chain], run.grads())
    fused = run.run([run.fused], run.grads())
    assert_close(fused, expected, run.tolerance)
    assert_close(run.run([run.fused, run.chain, run.chain], run.grads()), expected, run.tolerance)
    assert_trained(run.params, fused[0])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@every_race
def test_gradient_that_is_not_finite(case, value):
    run = race(str(case))
    grads = run.grads(8)
    kernel = grads[3]["blocks"][0]["kernel"]
    grads[3]["blocks"][0]["kernel"] = kernel.at[-1, -1].set(value)
    ends = assert_fused_is_chain(run, grads)
    assert not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ends))


def test_only_sums_roots_and_powers_of_arrays_are_not_exact():
    """So that the tolerance of the races is no larger than it must be."""
    assert Race(optax.contrib.madgrad(0.1), SMALL).tolerance == SUMMED
    assert Race(optax.adam(0.1), SMALL).tolerance == ELEMENTWISE


@pytest.mark.parametrize("case", slow_unless([CASE["novak-default"]], METHODS))
def test_update(case):
    """Optax's protocol, for loops that must have updates."""
    tx = case.build()
    run = Race(tx, SMALL)
    ends = []
    updates: list[Any] = [fuse(tx, backend="interpret").update, tx.update]
    for update in updates:
        params, state, step = run.params, tx.init(run.params), None
        jitted = jax.jit(update)
        for gradient in run.grads(5):
            step, state = jitted(gradient, state, params)
            params = optax.apply_updates(params, step)
        ends.append((step, state))
    fused, expected = ends
    assert_close(fused, expected, run.tolerance)


def optax_rows() -> dict[str, Mapping[str, Any]]:
    """Every optimizer that Optax tests as one of its own, with the arguments of its tests."""
    cases = [
        *load("optax._src.alias_test", "AliasTest"),
        *(
            case
            for case in load("optax.contrib._common_test", "ContribTest")
            if case.test == "test_preserve_dtype"  # of those that visit the main rows only
        ),
    ]
    rows = {}
    for case in cases:
        if "opt_kwargs" in case.arguments:
            options = ",".join(f"{k}={v}" for k, v in case.arguments["opt_kwargs"].items())
            wrapper = case.arguments.get("wrapper_name") or ""
            rows.setdefault(f"{wrapper}({case.row}({options}))".replace("()", ""), case.arguments)
    return rows


OPTAX = optax_rows()
# Rows that run what no row of `RACED` does: signs, maxima, extra arguments.
OPTAX_PATHS = {"rprop", "adamax", "momo_adam"}
# What the optimizers that need more than gradients are given.
EXTRA = {
    "polyak_sgd": {"value": 2.0},
    "momo": {"value": 2.0},
    "momo_adam": {"value": 2.0},
    "sophia": {"obj_fn": lambda params: optax.tree.norm(params, squared=True)},
}
# Large enough for Adafactor to factorize; SM3, GaLore and Muon fail where an axis or a leaf is
# missing.
DENSE = {"kernel": shape(129, 130), "bias": shape(7), "conv": shape(2, 3, 1, 2)}


def optax_race(row: Mapping[str, Any]) -> Race:
    name, wrapper = row["opt_name"], row.get("wrapper_name")
    with warnings.catch_warnings(action="ignore"):  # some names are deprecated
        factory = getattr(optax.contrib, name, None) or getattr(optax, name)
        tx = factory(**row["opt_kwargs"])
    if wrapper == "reduce_on_plateau":
        tx = optax.chain(tx, optax.contrib.reduce_on_plateau())
        return Race(tx, DENSE, {"value": 2.0})
    if wrapper is not None:
        tx = getattr(optax.contrib, wrapper)(tx, **row["wrapper_kwargs"])
    return Race(tx, DENSE, EXTRA.get(name, {}))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=name,
            marks=[] if row["opt_name"] in OPTAX_PATHS else [pytest.mark.slow],
        )
        for name, row in OPTAX.items()
    ],
)
def test_optimizers_of_optax(row):
    run = optax_race(row)
    assert_trained(run.params, assert_fused_is_chain(run)[0])


def test_optax_lists_its_optimizers():
    """An empty list would test nothing."""
    named = {row["opt_name"] for row in OPTAX.values()}
    assert {"adabelief", "yogi", "acprop", "galore"} <= named
    assert {row.get("wrapper_name") for row in OPTAX.values()} >= {"mechanize", "schedule_free"}


@pytest.mark.parametrize(
    "case",
    slow_unless(
        [CASE["novak-default"]], [case for case in RACED if case.method != "vradam"], group=True
    ),
)
def test_bfloat16_is_exact(case):
    """Kernel and chain round alike if nothing is summed."""
    tree = jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), SMALL)
    run = Race(case.build(), tree)
    exact = all(phase.work == "update" for phase in explain(run.tx, run.params).phases)
    fused, chain = (run.run([step], run.grads()) for step in (run.fused, run.chain))
    assert_close(fused, chain, 0 if exact else 2**-7)
    assert_trained(run.params, fused[0])


MIXED = {
    "kernel": shape(9, 65),
    "bias": shape(70, dtype=jnp.bfloat16),
    "half": shape(3, 30, dtype=jnp.float16),
    "scale": shape(dtype=jnp.bfloat16),
}
# Blocks of a kernel hold 512 elements.
SIZES = {f"of_{n}": shape(n) for n in (0, 1, 2, 7, 511, 512, 513, 1024, 4097)} | {"scalar": shape()}


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), tx)


TREES = {
    "sizes": (clipped(optax.adamw(0.01)), SIZES),
    "mixed_dtypes": (clipped(optax.adamw(0.05)), MIXED),
    "narrow_moments": (optax.adamw(0.01, mu_dtype=jnp.bfloat16), SMALL),
    "per_leaf_norms": (optax.lamb(0.05), MIXED),
    "one_leaf": (clipped(optax.adamw(0.01)), shape(9, 65)),
    "one_number": (clipped(optax.adamw(0.01)), shape()),
    "no_leaves": (clipped(optax.adamw(0.01)), {"none": None}),
    "masked": (
        optax.chain(
            optax.masked(optax.adam(0.01), {"kernel": True, "bias": False, "temperature": True}),
            optax.masked(optax.sgd(0.1), {"kernel": False, "bias": True, "temperature": False}),
        ),
        SMALL,
    ),
    "frozen": (
        optax.partition(
            {"moving": optax.adamw(0.01), "frozen": optax.set_to_zero()},
            {"kernel": "moving", "bias": "frozen", "temperature": "moving"},
        ),
        SMALL,
    ),
    "apply_if_finite": (optax.apply_if_finite(clipped(optax.adamw(0.01)), 3), SMALL),
    "accumulating": (optax.MultiSteps(optax.lamb(0.05), 3).gradient_transformation(), SMALL),
}


QUICK_TREES = "mixed_dtypes", "no_leaves", "masked"


@pytest.mark.parametrize("name", slow_unless(QUICK_TREES, TREES))
def test_leaves_of_every_kind(name):
    tx, tree = TREES[name]
    run = Race(tx, tree)
    fused = assert_fused_is_chain(run)
    assert tree == {"none": None} or any(
        np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (run.params, fused[0])), strict=True)
    )


def damp_by_flips() -> optax.GradientTransformation:
    """Integers and truth values in the state, one a coordinate, and statistics of them."""

    def init(params):
        flips = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.int32), params)
        rising = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)
        return flips, rising

    def damp(g, n):
        return g / (1 + n + jnp.max(n, initial=0) + (n > 100).any())

    def update(updates, state, params=None):
        flips, rising = state
        now = jax.tree.map(lambda g: g > 0, updates)
        flips = jax.tree.map(lambda n, a, b: n + (a != b), flips, rising, now)
        return jax.tree.map(damp, updates, flips), (flips, now)

    return optax.GradientTransformation(init, update)


def test_integers_in_the_state():
    run = Race(optax.chain(damp_by_flips(), optax.sgd(0.1)), SMALL)
    assert not explain(run.tx, run.params).fallback_reasons
    assert_trained(run.params, assert_fused_is_chain(run)[0])


def test_float64_goes_to_xla(x64):
    tree = {"wide": shape(9, 65, dtype=jnp.float64), "narrow": shape(9, 65)}
    run = Race(clipped(optax.adamw(0.01)), tree)
    report = explain(run.tx, run.params)
    assert any(line.endswith("no kernel for float64") for line in report.fallback_reasons)
    fused = run.run([run.fused], run.grads())
    expected = run.run([run.chain], run.grads())
    assert_close(fused, expected, run.tolerance)
    for ours, theirs in zip(fused, expected, strict=True):
        wide = [x for x in jax.tree.leaves(ours) if x.dtype == jnp.float64 and x.ndim]
        exact = [x for x in jax.tree.leaves(theirs) if x.dtype == jnp.float64 and x.ndim]
        assert_close(wide, exact, 1e-7)


def test_more_leaves_than_a_launch_holds(monkeypatch):
    monkeypatch.setattr(sys.modules["pallas_kernels.launches"], "LEAVES_PER_LAUNCH", 2)
    run = Race(optax.lamb(0.05), {f"leaf{n}": shape(n) for n in range(2, 7)})
    assert_fused_is_chain(run)


@pytest.mark.parametrize("backend", INTERPRETERS)
@pytest.mark.parametrize("value", [3.0, np.nan])
def test_tiles_of_a_large_statistic_are_combined(backend, value, monkeypatch):
    """Each statistic of 8 parts has 4 tiles; a NaN in one of them is not lost."""
    monkeypatch.setattr(launches, "TILE", 2)

    def scaled(g):
        return g / (jnp.sum(g) + jnp.max(g) - jnp.min(g))

    tx = optax.stateless(lambda updates, _: jax.tree.map(scaled, updates))
    grads = {"long": jnp.linspace(-1, 2, 8 * 512).at[1700].set(value), "short": jnp.arange(3.0)}
    params = jax.tree.map(jnp.zeros_like, grads)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    once, again = (
        jax.jit(fuse(tx, backend=backend, strict=True).step)(params, tx.init(params), grads)[0]
        for _ in range(2)
    )
    assert np.isnan(once["long"]).all() == np.isnan(value)
    for name, result in once.items():
        np.testing.assert_allclose(result, expected[name], rtol=SUMMED)
        np.testing.assert_array_equal(result, again[name])
