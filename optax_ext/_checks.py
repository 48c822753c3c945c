"""The one validator of hyperparameters.

Every check takes the arguments by their own names, `decay_rate(b1=b1, b2=b2)`, and raises at
construction time. Tracers have no value yet and pass unseen; arrays that hold a value are checked
like numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def decay_rate(**arguments: Any) -> None:
    """Averaging coefficients: [0, 1)."""
    _numbers(arguments, lambda x: 0 <= x < 1, "[0, 1)")


def tractable_decay_rate(**arguments: Any) -> None:
    """Second-moment decays for which rectification ever starts, rho_inf > 5: (2/3, 1)."""
    _numbers(arguments, lambda x: 2 / 3 < x < 1, "(2/3, 1)")


def fraction(**arguments: Any) -> None:
    """Shares: [0, 1]."""
    _numbers(arguments, lambda x: 0 <= x <= 1, "[0, 1]")


def non_negative(**arguments: Any) -> None:
    """Finite sizes: [0, inf)."""
    _numbers(arguments, lambda x: x >= 0, "[0, inf)")


def positive(**arguments: Any) -> None:
    """Finite sizes that divide or are raised to a power: (0, inf)."""
    _numbers(arguments, lambda x: x > 0, "(0, inf)")


def period(**arguments: Any) -> None:
    """Numbers of steps: integers >= 1."""
    _numbers(arguments, lambda x: x >= 1 and x == int(x), "the integers >= 1")


def schedule_or(check: Callable[..., None], **arguments: Any) -> None:
    """Schedules, or what `check` takes."""
    check(**{name: value for name, value in arguments.items() if not callable(value)})


def schedule(**arguments: Any) -> None:
    """Schedules only."""
    for name, value in arguments.items():
        if not callable(value):
            raise ValueError(f"{name} must be a schedule, got {value!r}")


def one_of(choices: Sequence[str], **arguments: Any) -> None:
    """One of a few named options."""
    for name, value in arguments.items():
        if not (isinstance(value, str) and value in choices):
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def transformation(**arguments: Any) -> None:
    """Require pairs of `init` and `update`, which Optax's factories return when called."""
    for name, value in arguments.items():
        if isinstance(value, optax.GradientTransformation):
            continue
        called = getattr(value, "__name__", None) if callable(value) else None
        got = repr(value) if called is None else f"the function {called}: call it first"
        raise ValueError(f"{name} must be a GradientTransformation, got {got}")


def memory(**arguments: Any) -> None:
    """`None` (the device's own) or JAX's name of the host's."""
    for name, value in arguments.items():
        if value not in (None, "pinned_host"):
            raise ValueError(f"{name} must be None or 'pinned_host', got {value!r}")


def flag(**arguments: Any) -> None:
    """Python bools: they decide what is compiled, so they can't be arrays."""
    for name, value in arguments.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def storage_dtype(kind: Any = jnp.inexact, **arguments: Any) -> None:
    """`None` (the parameters' own dtype) or a dtype of the given kind."""
    for name, value in arguments.items():
        if value is None:
            continue
        try:
            valid = jnp.issubdtype(jnp.dtype(value), kind)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"{name} must be None or of {kind.__name__} dtype, got {value!r}")


def _numbers(arguments: dict[str, Any], inside: Callable[[float], bool], interval: str) -> None:
    for name, value in arguments.items():
        if getattr(value, "ndim", 0) != 0:
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}")
        if isinstance(value, Tracer):
            continue
        number = _as_float(value)
        if number is None:
            raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
        if not (math.isfinite(number) and inside(number)):
            raise ValueError(f"{name} must be in {interval}, got {value}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, str):  # "0.1" is no number, whatever float says
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
