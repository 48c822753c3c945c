"""Every option does what its equation says: each method beside an independent float64 oracle."""

from typing import Any

import jax
import numpy as np
import pytest

import optax_ext
from support import oracles
from support.cases import (
    CASE,
    CASES,
    METHODS,
    PATHS,
    TREES,
    Case,
    gradients,
    named_leaves,
    parameters,
    relative_errors,
    rows,
    slow_unless,
    trajectory,
)

STEPS = 32  # long enough for a rotating lookahead of period 5 to come around
NETWORK = TREES["network"]


def expected(case: Case, params: Any, grads: Any) -> dict[str, np.ndarray]:
    """The oracle's parameters after each step, by name."""
    start, stream = named_leaves(params), named_leaves(grads)
    kwargs = case.kwargs
    if "mask" in kwargs:
        kwargs["mask"] = named_leaves(kwargs["mask"](params))
    steps = [{name: g[t] for name, g in stream.items()} for t in range(STEPS)]
    after = getattr(oracles, case.method)(start, steps, **kwargs)
    return {name: np.stack([theta[name] for theta in after]) for name in start}


def errors(case: Case, params: Any, grads: Any) -> tuple[float, float]:
    """Largest relative errors of the parameters and of their displacements."""
    ours = named_leaves(trajectory(case.build(), params, grads))
    theirs = expected(case, params, grads)
    start = named_leaves(params)
    return max(relative_errors(ours, theirs)), max(relative_errors(ours, theirs, start=start))


def assert_exact(case: Case, tree: Any) -> None:
    of_parameters, of_displacements = errors(case, parameters(tree), gradients(tree, STEPS))
    assert of_parameters <= 1e-10
    assert of_displacements <= 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", slow_unless(PATHS, CASES))
def test_float64(case):
    assert_exact(case, NETWORK)


@pytest.mark.parametrize("case", slow_unless(METHODS, CASES[::4]))
def test_float32(case):
    params = parameters(NETWORK, dtype=np.float32)
    grads = gradients(NETWORK, STEPS, dtype=np.float32)
    of_parameters, _ = errors(case, params, grads)
    # A few ulps (6e-8) of rounding in each of the steps, as for the goldens.
    assert of_parameters <= 2e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tree", ["containers", "flat", "zero_size", "scalar", "array"])
@pytest.mark.parametrize(
    "name",
    slow_unless(
        ["vradam-tensor_mean", "caadam-depth"],
        [
            "fame-tema_exact",
            "vradam-tensor_mean",
            "dualadam-scale_free",
            "novak-full",
            "caadam-depth",
        ],
    ),
)
def test_trees(name, tree):
    assert_exact(CASE[name], TREES[tree])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_matter(case):
    """An option that changed nothing on these gradients would not be tested by them."""
    params, grads = parameters(NETWORK), gradients(NETWORK, STEPS)
    plain = CASE[f"{case.method}-default"]
    moved = relative_errors(expected(case, params, grads), expected(plain, params, grads))
    assert (max(moved) > 1e-3) == (case is not plain)


OVERRIDES = rows(
    optax_ext.caadam,
    connections={"overrides": {"conv2": {"connections": 50}}},
    depth={"scaling": "depth", "overrides": {"head": {"depth": 0}}},
    scale={"overrides": {"norm": {"scale": 2.5}, "head": {"scale": 0.5, "connections": 9}}},
    leaf={"units": "leaf", "overrides": {"head/kernel": {"connections": 9}}},
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", OVERRIDES, ids=str)
def test_connection_overrides(case):
    assert_exact(case, NETWORK)


@pytest.mark.usefixtures("x64")
def test_rotating_lookahead_of_long_axes():
    """Two blocks of 20 groups of 8, which k = 3 does not divide; single entries; groups of 2."""
    (case,) = rows(optax_ext.novak, blocks={"lookahead": "rotating", "sync_period": 3})
    shapes = {"blocks": (2, 320, 3), "single": (19, 40), "pairs": (2, 38)}
    assert_exact(case, {name: jax.ShapeDtypeStruct(x, float) for name, x in shapes.items()})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("coupling", ["base", "effective"])
def test_trust_ratio_of_vanishing_norms(coupling):
    """The ratio is 1 for a tensor at zero, and for one that receives no gradient."""
    (case,) = rows(optax_ext.novak, vanishing={"trust_ratio": True, "decay_coupling": coupling})
    tree = {"at_zero": TREES["array"], "idle": TREES["array"]}
    params, grads = parameters(tree), gradients(tree, STEPS)
    params["at_zero"] *= 0
    grads["idle"] *= 0
    assert max(errors(case, params, grads)) <= 1e-10
