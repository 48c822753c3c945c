"""Every method and every piece through the tests that Optax wrote for its own."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import optax
import pytest

import optax_ext
from support import cases
from support.cases import slow_unless
from support.optax_battery import (
    Case,
    Factory,
    Row,
    alias_tests,
    contrib_tests,
    float64_tests,
    sharding_tests,
)
from support.pieces import PIECES


def full_novak(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Hides `sync_period`, which `inject_hyperparams` would trace: rotating needs its value."""
    return optax_ext.novak(
        learning_rate, nesterov="nadam", trust_ratio=True, autoscale=True, lookahead="rotating"
    )


def scheduled_dualadam(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """Hides `switch_rate`, whose schedule `inject_hyperparams` would turn into a plain number."""
    return optax_ext.dualadam(learning_rate, switch_rate=optax.linear_schedule(1.0, 0.0, 100))


# Adam's step at this rate crosses the parabola, of length 11, within Optax's 10,000 steps. VRAdam's
# does at ten times the rate, as its gate falls to 1/11 on the slope. InvAdam, whose step grows with
# the square of the gradient, crosses the complex Rosenbrock valley in time at rates from 0.011 on,
# and diverges there from 0.015 on.
RATE = 0.01
RATES = {optax_ext.vradam: 0.1, optax_ext.invadam: 0.0125}


def method(name: str, factory: Factory, **options: Any) -> Row:
    return Row(name, factory, {"learning_rate": RATES.get(factory, RATE), **options})


DEFAULTS = tuple(method(case.method, case.factory) for case in cases.METHODS)
OPTIONS = (
    method(
        "fame_paper",
        optax_ext.fame,
        b3=0.3,
        b5=0.8,
        second_moment="tema",
        bias_correction="none",
    ),
    method("vradam_per_tensor", optax_ext.vradam, norm_scope="tensor", norm_reduction="mean"),
    method("dualadam_scheduled", scheduled_dualadam),
    method("novak_full", full_novak),
    method("caadam_leaf", optax_ext.caadam, units="leaf", amsgrad=True),
)
METHODS = DEFAULTS + OPTIONS


def state_dtype_tests(rows: Sequence[Row]) -> list[Case]:
    """The one test that names its optimizers itself: each of ours in turn answers to "adam"."""
    return [
        dataclasses.replace(case, row=row.name)
        for row in rows
        for case in alias_tests([dataclasses.replace(row, name="adam")])
        if case.test == "test_explicit_dtype" and case.row == "adam"
    ]


CONTRIB = contrib_tests(METHODS)
ALIAS = [case for case in alias_tests(METHODS) if case.test != "test_explicit_dtype"]
STATE_DTYPE = state_dtype_tests(DEFAULTS)
SHARDING = [
    case
    for case in sharding_tests(METHODS + PIECES)
    if case.test != "test_microbatch_with_explicit_sharding"
]
FLOAT64 = float64_tests(METHODS + PIECES)


def every(cases: Sequence[Case], fast: Sequence[Row] = DEFAULTS) -> pytest.MarkDecorator:
    """Most options share their method's path, and most pieces are parts of a method."""
    names = {row.name for row in fast}
    return pytest.mark.parametrize(
        "case", slow_unless([case for case in cases if case.row in names], cases)
    )


@every(CONTRIB, fast=DEFAULTS[:2])
def test_contrib(case):
    case.run()


@every(ALIAS, fast=())
def test_alias(case):
    case.run()


@every(STATE_DTYPE)
def test_state_dtype(case):
    case.run()


@every(SHARDING, fast=())
def test_sharding(case):
    case.run()


@every(FLOAT64, fast=())
def test_float64(case):
    case.run()


def test_every_public_factory_has_a_row():
    public = [getattr(optax_ext, name) for name in optax_ext.__all__]
    factories = {f for f in filter(inspect.isfunction, public) if returns_transformation(f)}
    # Their parameters are bfloat16, which the batteries have not: see `test_low_precision.py`.
    of_bfloat16 = {optax_ext.master_weights, optax_ext.stochastic_rounding}
    by_name = {optax_ext.get}  # it calls the factories: see `test_registry.py`
    assert factories == {row.factory for row in DEFAULTS + PIECES} | of_bfloat16 | by_name


def returns_transformation(factory):
    returned = inspect.signature(factory).return_annotation
    return inspect.isclass(returned) and issubclass(returned, optax.GradientTransformation)


@pytest.mark.parametrize(
    ("battery", "rows", "exceptions"),
    [
        pytest.param(CONTRIB, METHODS, {}, id="contrib"),
        pytest.param(ALIAS + STATE_DTYPE, METHODS, {"test_explicit_dtype": DEFAULTS}, id="alias"),
        pytest.param(
            SHARDING,
            METHODS + PIECES,
            {"test_microbatch_with_explicit_sharding": ()},  # of no optimizer
            id="sharding",
        ),
        pytest.param(FLOAT64, METHODS + PIECES, {}, id="float64"),
    ],
)
def test_every_test_of_optax_visits_every_row(battery, rows, exceptions):
    visited = {name: set() for name in vars(battery[0].owner) if name.startswith("test_")}
    for case in battery:
        visited[case.test].add(case.row)
    assert visited == {test: {row.name for row in exceptions.get(test, rows)} for test in visited}
