"""Each method is its authors' method: the trajectories of the released code, step by step."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import optax_ext
from support import oracles
from support.cases import relative_errors, trajectory

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDENS / "cases.json").read_text())

# What our arguments are called in the authors' code.
RENAMED = {
    "fame": {"lr": "learning_rate", "beta4": "b5", "beta3": "b3"},
    "vradam": {"eta": "learning_rate"},
    "dualadam": {"lr": "learning_rate"},
    "caadam": {"strategy": "scaling", "scaling_factor": "strength", "epsilon": "eps"},
}
# Theirs where ours has no default, or another one on purpose.
DEFAULTS: dict[str, dict[str, Any]] = {
    "fame": {"learning_rate": 1e-3},
    "vradam": {"learning_rate": 1e-3},
    "dualadam": {"learning_rate": 1e-3},
    "caadam": {"learning_rate": 1e-3, "units": "leaf"},
}


def our_arguments(method: str, theirs: dict[str, Any]) -> dict[str, Any]:
    ours = dict(DEFAULTS[method])
    for name, value in theirs.items():
        if name == "normgrad":
            ours["norm_of"] = "gradient" if value else "velocity"
        elif name == "betas":
            ours["b1"], ours["b2"] = value
        else:
            ours[RENAMED[method].get(name, name)] = value
    return ours


def load(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / file) as arrays:
        return dict(arrays)


INPUTS = load("inputs.npz")
LEAVES = sorted(name.removeprefix("params/") for name in INPUTS if name.startswith("params/"))
PARAMS = {p: INPUTS[f"params/{p}"] for p in LEAVES}
GRADS = {p: INPUTS[f"grads/{p}"] for p in LEAVES}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The method, our arguments for it, and the authors' parameters after each step."""
    method = CASES[request.param]["method"]
    arguments = our_arguments(method, CASES[request.param]["arguments"])
    return method, arguments, load(f"{request.param}.npz")


def test_every_golden_file_has_a_case():
    assert {file.stem for file in GOLDENS.glob("*.npz")} == {*CASES, "inputs"}


def assert_agrees(ours: Any, golden: Any, tolerance: float, *, start: Any = None) -> None:
    errors = relative_errors(ours, golden, start=start)
    assert max(errors) <= tolerance


def test_oracle(case):
    method, arguments, golden = case
    steps = [{p: g[t] for p, g in GRADS.items()} for t in range(40)]
    after = getattr(oracles, method)(PARAMS, steps, **arguments)
    theirs = {p: np.stack([theta[p] for theta in after]) for p in LEAVES}
    assert_agrees(theirs, golden, 1e-12)
    assert_agrees(theirs, golden, 1e-12, start=PARAMS)


def test_trajectory(case):
    method, arguments, golden = case
    optimizer = getattr(optax_ext, method)
    with jax.enable_x64(True):
        ours = trajectory(optimizer(**arguments), PARAMS, GRADS)
    assert_agrees(ours, golden, 1e-10)
    # A small rate must not hide a wrong step behind the size of the parameters.
    assert_agrees(ours, golden, 1e-10, start=PARAMS)
    narrow = trajectory(optimizer(**arguments), *jax.tree.map(np.float32, (PARAMS, GRADS)))
    assert_agrees(narrow, golden, 2e-5)
