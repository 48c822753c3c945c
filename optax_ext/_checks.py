"""Checks of arguments.

Every check takes the arguments by their own names, `decay_rate(b1=b1, b2=b2)`, and raises at
construction time. Tracers have no value yet, so their values are not checked. Arrays with a value
are checked like numbers.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def decay_rate(**arguments: Any) -> None:
    """Require averaging coefficients in [0, 1)."""
    _numbers(arguments, lambda x: 0 <= x < 1, "[0, 1)")


def tractable_decay_rate(**arguments: Any) -> None:
    """Require decays in (2/3, 1): for others, rho_inf <= 5 and rectification never starts."""
    _numbers(arguments, lambda x: 2 / 3 < x < 1, "(2/3, 1)")


def fraction(**arguments: Any) -> None:
    """Require shares in [0, 1]."""
    _numbers(arguments, lambda x: 0 <= x <= 1, "[0, 1]")


def non_negative(**arguments: Any) -> None:
    """Require finite sizes in [0, inf)."""
    _numbers(arguments, lambda x: x >= 0, "[0, inf)")


def positive(**arguments: Any) -> None:
    """Require finite sizes in (0, inf)."""
    _numbers(arguments, lambda x: x > 0, "(0, inf)")


def period(**arguments: Any) -> None:
    """Require numbers of steps: positive integers that fit an int32 counter.

    Floats are refused, even whole ones, because float32 has no exact value for some counts above
    2^24.
    """
    for name, value in arguments.items():
        _scalar(name, value)
        valid = _is_integer(value) and (isinstance(value, Tracer) or 1 <= int(value) < 2**31)
        if not valid:
            raise ValueError(f"{name} must be an integer in [1, 2147483647], got {value!r}")


def size(**arguments: Any) -> None:
    """Require Python integers >= 1: sizes decide shapes."""
    for name, value in arguments.items():
        number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (number and value >= 1):
            raise ValueError(f"{name} must be a Python integer >= 1, got {value!r}")


def schedule_or(check: Callable[..., None], **arguments: Any) -> None:
    """Require schedules, or values that `check` accepts."""
    for name, value in arguments.items():
        (schedule if callable(value) else check)(**{name: value})


def schedule(**arguments: Any) -> None:
    """Require schedules."""
    for name, value in arguments.items():
        if not callable(value):
            raise ValueError(f"{name} must be a schedule, got {value!r}")
        if not _takes_a_count(value):
            raise ValueError(f"{name} must be a schedule, got {_uncalled(value)}")


def of_adam(**arguments: Any) -> None:
    """Check the arguments of AdamW, which all methods have in common."""
    for name, value in arguments.items():
        _OF_ADAM[name](**{name: value})


def one_of(choices: Sequence[str], **arguments: Any) -> None:
    """Require one of a few named options."""
    for name, value in arguments.items():
        if not (isinstance(value, str) and value in choices):
            listed = ", ".join(map(repr, choices))
            nearest = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.8)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name} must be one of {listed}, got {value!r}{hint}")


def transformation(**arguments: Any) -> None:
    """Require objects of any class that have the functions `init` and `update`."""
    for name, value in arguments.items():
        functions = (getattr(value, field, None) for field in ("init", "update"))
        if isinstance(value, type) or not all(map(callable, functions)):
            raise ValueError(f"{name} must be a GradientTransformation, got {_uncalled(value)}")


def returned_by(kind: type, **arguments: Any) -> None:
    """Require instances of a class, such as its factories return."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {_uncalled(value)}")


def float_leaves(**trees: Any) -> None:
    """Require trees of real or complex floats, because nothing else has a gradient."""
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            is_array = hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))
            got = jnp.result_type(leaf) if is_array else repr(leaf)
            if not (is_array and jnp.issubdtype(got, jnp.inexact)):
                where = "/".join((name, *(jax.tree_util.keystr((k,), simple=True) for k in path)))
                raise ValueError(
                    f"{name} must be floats, but {where} is {got}: leave it out with"
                    " optax.masked or optax.partition"
                )


def memory(**arguments: Any) -> None:
    """Require `None` (memory of the device) or JAX's name of the host's memory."""
    for name, value in arguments.items():
        if value not in (None, "pinned_host"):
            raise ValueError(f"{name} must be None or 'pinned_host', got {value!r}")


def mask(**arguments: Any) -> None:
    """Require `None`, a function of the parameters, or a tree of Python bools.

    A single bool is refused, although it is a tree: `optax.inject_hyperparams` makes one of a
    function, which it calls as a schedule.
    """
    for name, value in arguments.items():
        leaves = [] if callable(value) else jax.tree.leaves(value)
        injected = isinstance(value, (jax.Array, bool, np.bool_))
        for got in leaves:
            if injected or not isinstance(got, (bool, np.bool_)):
                hint = f"; under optax.inject_hyperparams, name {name} in its static_args"
                raise ValueError(
                    f"{name} must be None, a function of the parameters or a tree of Python bools,"
                    f" got {got!r}{hint if injected else ''}"
                )


def flag(**arguments: Any) -> None:
    """Require Python bools. Arrays are refused, because a flag decides what is compiled."""
    for name, value in arguments.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def storage_dtype(kind: Any = jnp.inexact, **arguments: Any) -> None:
    """Require `None` (the default) or a dtype of the given kind."""
    for name, value in arguments.items():
        if value is None:
            continue
        wanted = f"{name} must be None or of {kind.__name__} dtype, got {value!r}"
        if isinstance(value, jax.Array):  # inject_hyperparams called the dtype as a schedule
            raise ValueError(
                f"{wanted}; under optax.inject_hyperparams, name {name} in its static_args"
            )
        try:
            valid = jnp.issubdtype(jnp.dtype(value), kind)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(wanted)


def _numbers(arguments: dict[str, Any], inside: Callable[[float], bool], interval: str) -> None:
    for name, value in arguments.items():
        _scalar(name, value)
        if isinstance(value, Tracer):
            continue
        number = _as_float(value)
        if number is None:
            raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
        if not (math.isfinite(number) and inside(number)):
            raise ValueError(f"{name} must be in {interval}, got {value}{_rounding(value)}")


def _scalar(name: str, value: Any) -> None:
    if getattr(value, "ndim", 0) != 0:
        raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}")


def _is_integer(value: Any) -> bool:
    return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.integer)


def _as_float(value: Any) -> float | None:
    """Return `value` as a float, or `None` for other things, text and bools included."""
    if isinstance(value, str) or jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.bool_):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _rounding(value: Any) -> str:
    """Return a hint for a number that may have been in its range before it was rounded."""
    if not isinstance(value, jax.Array) or value.dtype.itemsize > 2:
        return ""
    return f" in {value.dtype}; under optax.inject_hyperparams, set hyperparam_dtype=jnp.float32"


def _takes_a_count(function: Callable[..., Any]) -> bool:
    """Return whether a function can be called with one argument, as far as it tells."""
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # some callables have no signature
        return True
    return True


def _uncalled(value: Any) -> str:
    if not callable(value):
        return repr(value)
    kind = "class" if isinstance(value, type) else "function"
    return f"the {kind} {getattr(value, '__name__', value)}: call it first"


_OF_ADAM: dict[str, Callable[..., None]] = {
    "learning_rate": partial(schedule_or, non_negative),
    "b1": decay_rate,
    "b2": decay_rate,
    "eps": non_negative,
    "weight_decay": partial(schedule_or, non_negative),
    "mask": mask,
    "mu_dtype": storage_dtype,
    "nu_dtype": partial(storage_dtype, jnp.floating),
}
