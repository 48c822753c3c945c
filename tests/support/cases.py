"""The one table of methods that all tests draw from, with trees and gradients to run them on.

A new method, or a new option, is tested by adding one row to `CASES`: oracle, contract and
property tests are parametrized with it. (A new method also needs an oracle of its name in
`oracles.py`.) Parameters and gradients are NumPy, so that the caller chooses the precision.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext

# Tags: what a test may, or may not, expect of a case.
SCALE_INVARIANT = "scale_invariant"  # a factor on all gradients matters only next to eps
SQUARES_GRADIENTS = "squares_gradients"  # steps grow with g^2: no extreme magnitudes

Factory = Callable[..., optax.GradientTransformationExtraArgs]


@dataclass(frozen=True)
class Case:
    """One row: a method with one set of options.

    Attributes:
      factory: the public method.
      tags: see above.
      name: what the options are there to test.
      options: the arguments that are not at their defaults.
    """

    factory: Factory
    tags: frozenset[str]
    name: str
    options: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.factory.__name__

    @property
    def kwargs(self) -> dict[str, Any]:
        """All arguments, with a rate that moves the parameters visibly in a few steps."""
        return {"learning_rate": 0.01, **self.options}

    def build(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer; `overrides` replace or add arguments."""
        return self.factory(**self.kwargs | overrides)

    def __str__(self) -> str:
        return f"{self.method}-{self.name}"


def rows(factory: Factory, *tags: str, **options: Mapping[str, Any]) -> list[Case]:
    """One row for each of the named option sets."""
    return [Case(factory, frozenset(tags), name, chosen) for name, chosen in options.items()]


def kernels_only(params: optax.Params) -> Any:
    """A mask: weight decay for matrices and kernels, none for vectors and scalars."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def falling(count: Any) -> Any:
    """A schedule for rate and decay alike."""
    return 0.02 / (1 + 0.1 * count)


def falling_share(count: Any) -> Any:
    """A schedule of DualAdam's inverse share: the first step is all inverse."""
    return 1.0 / (1.0 + count)


# Large enough to be seen beside the step.
DECAY = {"weight_decay": 0.3, "mask": kernels_only}
SCHEDULES = {"learning_rate": falling, "weight_decay": falling}

CASES: Sequence[Case] = [
    *rows(
        optax_ext.fame,
        SCALE_INVARIANT,
        default={},
        amsgrad={"amsgrad": True, "b2": 0.9},
        exact={"bias_correction": "exact"},
        uncorrected={"bias_correction": "none"},
        tema={"second_moment": "tema"},
        tema_exact={"second_moment": "tema", "bias_correction": "exact"},
        paper={"second_moment": "tema", "bias_correction": "none", "b3": 0.3, "b5": 0.8},
    ),
    *rows(
        optax_ext.fame,
        l2=DECAY,
        schedules=SCHEDULES,
        amsgrad_exact={"amsgrad": True, "b2": 0.9, "bias_correction": "exact", **DECAY},
        # Equal decays of the squares fall below zero after a large gradient: clamped there, the
        # step is limited by eps alone.
        clamped={
            "second_moment": "tema",
            "bias_correction": "exact",
            **dict.fromkeys(("b1", "b2", "b3", "b4", "b5"), 0.7),
            "eps": 0.1,
        },
    ),
    *rows(
        optax_ext.vradam,
        default={},
        decay=DECAY,
        schedules=SCHEDULES,
        mean={"norm_reduction": "mean", "beta3": 100.0},
        corrected={"norm_of": "corrected_velocity"},
        gradient={"norm_of": "gradient", "beta3": 0.1},
        power={"power": 1.5},
        saturated={"beta3": 50.0, "lr_cutoff": 3.0, **DECAY},
    ),
    *rows(
        optax_ext.vradam,
        tensor={"norm_scope": "tensor"},
        tensor_mean={"norm_scope": "tensor", "norm_reduction": "mean", "beta3": 100.0},
        tensor_corrected={"norm_scope": "tensor", "norm_of": "corrected_velocity", "power": 3.0},
    ),
    *rows(
        optax_ext.invadam,
        SQUARES_GRADIENTS,
        default={},
        decay={"eps": 0.1, **DECAY},
        schedules=SCHEDULES,
        scale_free={"scale_free": True},
    ),
    *rows(
        optax_ext.dualadam,
        SQUARES_GRADIENTS,
        default={},
        decay={"switch_rate": 0.1, **DECAY},
        schedules={"switch_rate": falling_share, **SCHEDULES},
        crossing={"switch_rate": 0.05},
        inverse={"switch_rate": 0.0},
        scale_free={"switch_rate": 0.05, "scale_free": True},
    ),
    *rows(optax_ext.dualadam, SCALE_INVARIANT, adam={"switch_rate": 1.0}),
    *rows(
        optax_ext.novak,
        SCALE_INVARIANT,
        default={},
        decay=DECAY,
        schedules=SCHEDULES,
        effective={"decay_coupling": "effective", **DECAY},
        nadam={"nesterov": "nadam"},
        nadam_scheduled={"nesterov": "nadam_scheduled"},
        classical={"nesterov": "classical"},
        hybrid={"nesterov": "hybrid"},
        unrectified={"rectify": False},
        trust={"trust_ratio": True},
        trust_decay={"trust_ratio": True, **DECAY},
        trust_effective={"trust_ratio": True, "decay_coupling": "effective", **DECAY},
        slow={"sync_period": 3, "slow_step_size": 0.8},
        rotating={"lookahead": "rotating"},
        rotating_unequal={"lookahead": "rotating", "sync_period": 3, "slow_step_size": 0.8},
    ),
    *rows(optax_ext.novak, SCALE_INVARIANT, alone={"lookahead": "none"}),
    *rows(
        optax_ext.novak,
        momentum={"rectify_fallback": "momentum"},
        momentum_nadam={"rectify_fallback": "momentum", "nesterov": "nadam", "b2": 0.98},
    ),
    *rows(
        optax_ext.novak,
        autoscale={"autoscale": True},
        full={
            "decay_coupling": "effective",
            "nesterov": "hybrid",
            "rectify_fallback": "momentum",
            "trust_ratio": True,
            "autoscale": True,
            "autoscale_decay": 0.7,
            "lookahead": "rotating",
            "sync_period": 4,
            **DECAY,
        },
    ),
    *rows(
        optax_ext.caadam,
        SCALE_INVARIANT,
        default={},
        decay=DECAY,
        schedules=SCHEDULES,
        weak={"strength": 0.5},
        amsgrad={"amsgrad": True, "b2": 0.9},
        multiplicative={"scaling": "multiplicative"},
        signed={"scaling": "signed"},
        depth={"scaling": "depth"},
        leaf={"units": "leaf"},
        leaf_multiplicative={"units": "leaf", "scaling": "multiplicative", "strength": 2.0},
        leaf_signed={"units": "leaf", "scaling": "signed"},
        leaf_depth={"units": "leaf", "scaling": "depth", "strength": 2.0},
    ),
]
CASE: Mapping[str, Case] = {str(case): case for case in CASES}
METHODS: Sequence[Case] = [CASE[f"{name}-default"] for name in optax_ext.METHODS]
# One row for every code path that treats tensors in a way of its own.
PATHS: Sequence[Case] = [
    *METHODS,
    *(CASE[name] for name in ("fame-tema_exact", "vradam-tensor", "dualadam-scale_free")),
    *(CASE[name] for name in ("novak-full", "caadam-leaf")),
]


def slow_unless(fast: Iterable[Any], rows: Iterable[Any], *, group: bool = False) -> list[Any]:
    """Return the rows as test parameters, those that are not among the fast ones marked slow.

    With `group`, one worker runs all tests of a row, and compiles it once.
    """
    quick = [str(row) for row in fast]
    return [
        pytest.param(
            row,
            id=str(row),
            marks=[
                *([] if str(row) in quick else [pytest.mark.slow]),
                *([pytest.mark.xdist_group(str(row))] if group else []),
            ],
        )
        for row in rows
    ]


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# Trees of shapes; `parameters` and `gradients` fill them. Few axes of `network` are multiples of
# each other, so that a rotating lookahead meets full, partial and empty chunks.
TREES: Mapping[str, Any] = {
    "network": {
        "conv1": {"kernel": _shape(3, 3, 1, 2), "bias": _shape(2)},
        "conv2": {"kernel": _shape(2, 7)},
        "conv10": {"kernel": _shape(1, 1, 7, 4)},
        "norm": {"scale": _shape(4)},
        "head": {"kernel": _shape(11, 3), "bias": _shape(3)},
        "temperature": _shape(),
    },
    "containers": {"blocks": [(_shape(4, 3), _shape(3)), (_shape(3, 6), None)], "last": _shape(6)},
    "flat": {
        "w1": _shape(4, 6),
        "w2": _shape(6, 6),
        "w3": _shape(6, 2),
        "b1": _shape(6),
        "b2": _shape(6),
        "b3": _shape(2),
    },
    "zero_size": {"empty": _shape(0, 3), "full": _shape(2, 2), "none": None},
    "scalar": _shape(),
    "array": _shape(5, 2),
    "no_leaves": {},
}


def parameters(tree: Any, *, seed: int = 0, dtype: Any = np.float64) -> Any:
    """Normal values of size 0.5."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(0.5 * rng.standard_normal(x.shape), dtype), tree)


def gradients(tree: Any, steps: int, *, seed: int = 1, dtype: Any = np.float64) -> Any:
    """A stream of gradients: every leaf gets a leading axis of length `steps`.

    A constant part that differs by coordinate, and noise that grows from step to step over two
    orders of magnitude; one step is ten times larger than its neighbours, and the first
    coordinate of each leaf receives nothing at all.
    """
    rng = np.random.default_rng(seed)
    size = np.geomspace(0.01, 1.0, steps)
    size[steps // 2] *= 10

    def stream(x):
        values = size[:, None] * (
            rng.standard_normal((steps, x.size)) + rng.standard_normal(x.size)
        )
        if x.ndim > 0:
            values[:, :1] = 0
        return np.asarray(values.reshape(steps, *x.shape), dtype)

    return jax.tree.map(stream, tree)


def trajectory(
    optimizer: optax.GradientTransformation, params: optax.Params, grads: optax.Updates
) -> Any:
    """The parameters after each step of a stream of gradients, as float64 NumPy."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    start = params, optimizer.init(params)
    _, after = jax.jit(partial(jax.lax.scan, step))(start, grads)
    return jax.tree.map(np.float64, after)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves in their order, by paths such as "conv1/kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def relative_errors(ours: Any, expected: Any, *, start: Any = None) -> list[float]:
    """Return every leaf's largest error in a trajectory, relative to its largest absolute value.

    With `start`, the parameters before the first step, it is the displacements that are compared.
    """
    if start is not None:
        ours, expected = (
            jax.tree.map(lambda x, x0: np.diff(x, axis=0, prepend=x0[None]), after, start)
            for after in (ours, expected)
        )
    return [
        float(np.max(np.abs(x - y)) / np.max(np.abs(y)))
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
        if y.size
    ]
