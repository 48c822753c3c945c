"""Bad arguments are refused where they are given, in words that name argument, range and value."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_ext
from support.cases import METHODS
from support.pieces import PIECES

# What a caller may pass there can't be told by looking at it.
FREE_FORM = {
    *("params", "weights", "state", "shardings", "apply_fn", "example_inputs"),
    "arguments",
}


def schedule(count: Any) -> Any:
    return 0.5 / (1 + count)


@dataclass(frozen=True)
class Range:
    """Values that an argument takes, and values that it refuses with what its error says.

    `traceable` is a number that may be traced, if any may.
    """

    good: tuple[Any, ...]
    bad: tuple[tuple[Any, str], ...]
    traceable: float | None = None


def number(interval: str, *, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> Range:
    arrays = jnp.asarray(outside[0]), np.asarray(outside[0])
    numbers = *outside, *arrays, math.nan, math.inf, -math.inf
    others = None, "half", "0.5", 1j, [0.5], True, np.False_, jnp.asarray(True), schedule
    return Range(
        good=(*inside, *map(jnp.asarray, inside), *map(np.asarray, inside)),
        bad=(
            *((value, f"must be in {interval}, got {value}") for value in numbers),
            *((value, f"must be a number in {interval}, got {value!r}") for value in others),
            (jnp.ones(2), "must be a scalar, got an array of shape (2,)"),
        ),
        traceable=0.5,
    )


def scheduled(numbers: Range) -> Range:
    """A number of that range, or a schedule."""
    numbers = also(schedule, numbers)
    factory = optax.cosine_decay_schedule
    uncalled = (factory, "got the function cosine_decay_schedule: call it first")
    return Range(numbers.good, (*numbers.bad, uncalled), numbers.traceable)


def also(value: Any, others: Range) -> Range:
    bad = tuple(pair for pair in others.bad if pair[0] is not value)
    return Range((value, *others.good), bad, others.traceable)


def choice(*names: str) -> Range:
    listed = ", ".join(map(repr, names))
    wrong = "other", "", None, 2, [names[0]]
    return Range(
        names, tuple((value, f"must be one of {listed}, got {value!r}") for value in wrong)
    )


def dtype(kind: str, *, good: tuple[Any, ...], bad: tuple[Any, ...]) -> Range:
    wrong = *bad, jnp.int32, bool, "float33", 16
    return Range((None, *good), tuple((value, f"{kind} dtype, got {value!r}") for value in wrong))


DECAY = number("[0, 1)", inside=(0.0, 0.5), outside=(1.0, -0.1, 2))
TRACTABLE = number("(2/3, 1)", inside=(0.67, 0.999), outside=(0.5, 2 / 3, 1.0))
SHARE = number("[0, 1]", inside=(0.0, 1, 0.5), outside=(1.001, -0.1, 2))
SIZE = number("[0, inf)", inside=(0, 1e-30, 1e30), outside=(-1e-8, -1))
POSITIVE = number("(0, inf)", inside=(1e-30, 3), outside=(0, -1.0))
PERIOD = Range(
    (1, 2**31 - 1, np.int64(5), np.uint8(5), np.asarray(5), jnp.asarray(5)),
    (
        *(
            (value, f"must be an integer in [1, 2147483647], got {value!r}")
            for value in (0, -5, 2**31, 1e12, 2.5, 5.0, np.float32(5), jnp.asarray(5.0), True, "5")
        ),
        (jnp.ones(2, int), "must be a scalar, got an array of shape (2,)"),
    ),
    traceable=5,
)
COUNT = Range(
    (1, 64, np.int64(5)),
    tuple(
        (value, f"must be a Python integer >= 1, got {value!r}")
        for value in (0, -5, 2.5, 5.0, True, "5", None, jnp.asarray(5))
    ),
)
FORMATS = Range(
    (None, lambda field, parameter, leaf: None),
    tuple(
        (value, f"must be a function of field, parameter and leaf, got {value!r}")
        for value in (8, "int8", optax_ext.formats.SignedRoot())
    ),
)
BITS = Range(
    (24, 32), tuple((value, f"must be 24 or 32, got {value!r}") for value in (8, 16, True, "24"))
)
FLAG = Range(
    (True, False),
    tuple((value, f"must be True or False, got {value!r}") for value in (None, 1, "yes")),
)
DTYPE = dtype("inexact", good=(jnp.bfloat16, "complex64"), bad=())
REAL_DTYPE = dtype("floating", good=(jnp.float16, "float32"), bad=(jnp.complex64,))
DECAYS = Range(
    ((0.9,), [0.9, 0.5, 0.5], (0.0,) * 5),
    (
        ((), "must contain at least one decay, got ()"),
        (0.9, "got 0.9"),
        *(((0.9, value), message) for value, message in DECAY.bad),
    ),
)
INVERSE_SHARE = Range((schedule,), ((0.5, "got 0.5"), (None, "got None")))
OVERRIDES = Range(
    (None, {}, {"in": {"connections": 3, "depth": 0, "scale": 0.5}}),
    (
        ({"in": {"width": 3}}, "must be one of 'connections', 'depth', 'scale', got 'width'"),
        ({"in": {"connections": -1}}, "['in']['connections'] must be in [0, inf), got -1"),
        ({"in": {"depth": math.nan}}, "['in']['depth'] must be in [0, inf), got nan"),
        ({"in": {"scale": "big"}}, "['in']['scale'] must be a number in [0, inf), got 'big'"),
        ({"in": 2.0}, "got 2.0"),
        (2.0, "got 2.0"),
    ),
)
PARAMS = {"in": {"kernel": jnp.ones((2, 3))}, "out": {"kernel": jnp.ones((3, 3))}}
SHARDED = {
    "kernel": jax.device_put(
        jnp.ones((8, 3)),
        NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")),
    )
}
ARCHITECTURE = Range(
    (
        None,
        optax_ext.architecture(
            lambda params, x: x @ params["in"]["kernel"] @ params["out"]["kernel"],
            PARAMS,
            jnp.ones((1, 2)),
        ),
    ),
    tuple((value, f"got {value!r}") for value in ("deep", {"in/kernel": 3}, 2)),
)

MASK = Range(
    (None, {"in": True, "out": False}, lambda params: params),
    tuple(
        (
            value,
            f"must be None, a function of the parameters or a tree of Python bools, got {got!r}",
        )
        for value, got in (
            ("kernel", "kernel"),
            ({"in": 1}, 1),
            (jnp.ones(2), jnp.ones(2)),
            (True, True),
        )
    ),
)
ADAM = {
    "learning_rate": scheduled(SIZE),
    "b1": DECAY,
    "b2": DECAY,
    "eps": SIZE,
    "weight_decay": scheduled(SIZE),
    "mask": MASK,
    "mu_dtype": DTYPE,
    "nu_dtype": REAL_DTYPE,
}
VELOCITY = {
    "beta3": SIZE,
    "lr_cutoff": SIZE,
    "power": POSITIVE,
    "norm_of": choice("velocity", "corrected_velocity", "gradient"),
    "norm_scope": choice("global", "tensor"),
    "norm_reduction": choice("sum", "mean"),
}
MEMORY = Range(
    (None, "pinned_host"),
    tuple(
        (value, f"must be None or 'pinned_host', got {value!r}")
        for value in ("device", "", True, ["pinned_host"])
    ),
)
LOOKAHEAD = {
    "sync_period": PERIOD,
    "slow_step_size": SHARE,
    "slow_dtype": DTYPE,
    "offload": MEMORY,
}
CONNECTIONS = {
    "scaling": choice("additive", "multiplicative", "signed", "depth"),
    "units": choice("module", "leaf"),
    "overrides": OVERRIDES,
    "architecture": ARCHITECTURE,
}
STRENGTHS = {
    "additive": SHARE,
    "multiplicative": POSITIVE,
    "signed": POSITIVE,
    "depth": SIZE,
}
AVERAGE = {"decay": DECAY, "bias_correction": choice("adam", "none"), "dtype": DTYPE}
CASCADE = {
    "decays": DECAYS,
    "bias_correction": choice("adam", "exact", "none"),
    "dtype": DTYPE,
}
OF_SQUARES = {"dtype": REAL_DTYPE}
INNER = optax.adam(0.1)
TRANSFORMATION = Range(
    (INNER, optax_ext.fame(0.1), optax.MultiSteps(INNER, 2), optax.identity()),
    (
        *(
            (value, f"must be a GradientTransformation, got {value!r}")
            for value in (None, "adam", 0.1, {"init": 1})
        ),
        *(
            (factory, f"got the function {factory.__name__}: call it first")
            for factory in (optax.adam, optax_ext.vradam, optax_ext.ema)
        ),
        (optax.MultiSteps, "got the class MultiSteps: call it first"),
    ),
)
JOIN = Range(
    (optax_ext.ratio(eps=0.1), optax_ext.product(eps=0.1)),
    (
        (None, "must be a Join, got None"),
        (INNER, "must be a Join, got GradientTransformationExtraArgs("),
        (optax_ext.ratio, "must be a Join, got the function ratio: call it first"),
    ),
)


class Row(NamedTuple):
    """A factory, arguments that it takes, and the ranges of some when the others are these."""

    factory: Callable[..., Any]
    arguments: Mapping[str, Any]
    ranges: Mapping[str, Range]


QUANTIZATION = {"formats": FORMATS}
TABLE = [
    Row(
        optax_ext.fame,
        {"learning_rate": 0.1},
        ADAM
        | dict.fromkeys(("b3", "b4", "b5"), DECAY)
        | {
            "second_moment": choice("ema", "tema"),
            "bias_correction": choice("adam", "exact", "none"),
            "amsgrad": FLAG,
        },
    ),
    Row(
        optax_ext.fame,
        {"learning_rate": 0.1, "second_moment": "tema"},
        {"amsgrad": Range((False,), ((True, "must be False for second_moment='tema', got True"),))},
    ),
    Row(optax_ext.vradam, {"learning_rate": 0.1}, ADAM | VELOCITY),
    Row(optax_ext.invadam, {"learning_rate": 0.1}, ADAM | {"scale_free": FLAG}),
    Row(
        optax_ext.dualadam,
        {"learning_rate": 0.1},
        ADAM | {"scale_free": FLAG, "switch_rate": scheduled(SHARE)},
    ),
    Row(
        optax_ext.novak,
        {"learning_rate": 0.1},
        ADAM
        | LOOKAHEAD
        | {
            "b2": TRACTABLE,
            "decay_coupling": choice("base", "effective"),
            "nesterov": choice("none", "nadam", "nadam_scheduled", "classical", "hybrid"),
            "rectify": FLAG,
            "rectify_fallback": choice("adam", "momentum"),
            "trust_ratio": FLAG,
            "autoscale": FLAG,
            "autoscale_decay": DECAY,
            "lookahead": choice("exact", "rotating", "none"),
        },
    ),
    Row(optax_ext.novak, {"learning_rate": 0.1, "rectify": False}, {"b2": DECAY}),
    Row(optax_ext.caadam, {"learning_rate": 0.1}, ADAM | CONNECTIONS | {"amsgrad": FLAG}),
    Row(
        optax_ext.get,
        {"name": "fame", "learning_rate": 0.1},
        {"name": choice(*optax_ext.METHODS), "learning_rate": ADAM["learning_rate"]},
    ),
    Row(optax_ext.ema, {"decay": 0.9}, AVERAGE),
    Row(optax_ext.ema_of_squares, {"decay": 0.9}, AVERAGE | OF_SQUARES),
    Row(optax_ext.max_ema_of_squares, {"decay": 0.9}, AVERAGE | OF_SQUARES),
    Row(optax_ext.triple_ema, {"decays": (0.9,)}, CASCADE),
    Row(optax_ext.triple_ema_of_squares, {"decays": (0.9,)}, CASCADE | OF_SQUARES),
    Row(
        optax_ext.nesterov_ema,
        {"decay": 0.9, "variant": "nadam"},
        {"decay": DECAY, "variant": choice("nadam", "classical", "hybrid"), "dtype": DTYPE},
    ),
    Row(optax_ext.scheduled_nesterov_ema, {"decay": 0.9}, {"decay": DECAY, "dtype": DTYPE}),
    Row(optax_ext.ratio, {"eps": 0.1}, {"eps": SIZE}),
    Row(optax_ext.product, {"eps": 0.1}, {"eps": SIZE, "scale_free": FLAG}),
    Row(
        optax_ext.blend,
        {"inverse_share": schedule, "eps": 0.1},
        {"inverse_share": INVERSE_SHARE, "eps": SIZE, "scale_free": FLAG},
    ),
    Row(optax_ext.linear_inverse_share, {}, {"switch_rate": SHARE}),
    Row(
        optax_ext.ratio_once_tractable,
        {"b2": 0.9, "eps": 0.1},
        {"b2": TRACTABLE, "eps": SIZE},
    ),
    Row(
        optax_ext.scale_by_moments,
        {"first": INNER, "second": INNER, "join": optax_ext.ratio(eps=0.1)},
        {"first": TRANSFORMATION, "second": TRANSFORMATION, "join": JOIN},
    ),
    Row(optax_ext.state_shardings, {"params": SHARDED}, {"tx": TRANSFORMATION}),
    Row(optax_ext.correct_bias, {"b1": 0.9, "b2": 0.9}, {"b1": DECAY, "b2": DECAY}),
    Row(optax_ext.rectify, {}, {"b2": TRACTABLE}),
    Row(
        optax_ext.autoscale,
        {"inner": INNER, "decay": 0.9},
        {"inner": TRANSFORMATION, "decay": DECAY},
    ),
    Row(optax_ext.scale_by_trust_ratio, {}, {"max_ratio": POSITIVE}),
    Row(
        optax_ext.velocity_regularized,
        {"inner": INNER, "beta3": 1.0, "lr_cutoff": 10.0, "b1": 0.9},
        VELOCITY | {"inner": TRANSFORMATION},
    ),
    Row(
        optax_ext.velocity_regularized,
        {"inner": INNER, "beta3": 1.0, "lr_cutoff": 10.0, "norm_of": "corrected_velocity"},
        {"b1": DECAY},
    ),
    Row(
        optax_ext.lookahead,
        {"inner": INNER, "sync_period": 5, "slow_step_size": 0.5},
        LOOKAHEAD | {"inner": TRANSFORMATION, "mode": choice("exact", "rotating")},
    ),
    Row(optax_ext.quantize_state, {"tx": INNER}, {"tx": TRANSFORMATION} | QUANTIZATION),
    Row(optax_ext.quantize_existing_state, {"state": (), "params": ()}, QUANTIZATION),
    Row(optax_ext.quantization_report, {"tx": INNER, "params": PARAMS}, QUANTIZATION),
    Row(
        optax_ext.quantization_report,
        {"params": PARAMS},
        {"tx": Range((INNER,), TRANSFORMATION.bad)},
    ),
    Row(optax_ext.default_formats, {}, {"group_size": COUNT, "min_size": COUNT}),
    Row(optax_ext.master_weights, {"tx": INNER}, {"tx": TRANSFORMATION, "bits": BITS}),
    Row(optax_ext.stochastic_rounding, {"tx": INNER}, {"tx": TRANSFORMATION}),
    Row(optax_ext.scale_by_connections, {"scaling": "additive"}, CONNECTIONS),
    Row(
        optax_ext.connection_table,
        {"params": PARAMS, "scaling": "additive"},
        CONNECTIONS,
    ),
    *(
        Row(factory, arguments | {"scaling": scaling}, {"strength": also(None, strength)})
        for scaling, strength in STRENGTHS.items()
        for factory, arguments in (
            (optax_ext.caadam, {"learning_rate": 0.1}),
            (optax_ext.scale_by_connections, {}),
            (optax_ext.connection_table, {"params": PARAMS}),
        )
    ),
]


def identity(row: Row) -> str:
    options = [str(value) for value in row.arguments.values() if isinstance(value, str | bool)]
    return "-".join([row.factory.__name__, *options])


every_argument = pytest.mark.parametrize(
    ("row", "argument"),
    [
        pytest.param(row, argument, id=f"{identity(row)}-{argument}")
        for row in TABLE
        for argument in row.ranges
    ],
)


@every_argument
def test_refuses(row, argument, subtests):
    for value, fragment in row.ranges[argument].bad:
        with subtests.test(value=repr(value)):
            with pytest.raises(ValueError, match=rf"\b{argument}\b") as error:
                row.factory(**row.arguments | {argument: value})
            assert fragment in str(error.value)


@every_argument
def test_takes(row, argument, subtests):
    for value in row.ranges[argument].good:
        with subtests.test(value=repr(value)):
            row.factory(**row.arguments | {argument: value})


@every_argument
def test_takes_tracers_of_numbers_only(row, argument):
    def build(value):
        row.factory(**row.arguments | {argument: value})
        return value

    if (number := row.ranges[argument].traceable) is not None:
        jax.eval_shape(build, number)
        with pytest.raises(ValueError, match=f"{argument} must be a scalar"):
            jax.eval_shape(build, jnp.full(2, number))


def test_every_argument_is_in_the_table():
    for name in optax_ext.__all__:
        factory = getattr(optax_ext, name)
        if inspect.isfunction(factory):
            checked = {arg for row in TABLE if row.factory is factory for arg in row.ranges}
            assert checked == set(inspect.signature(factory).parameters) - FREE_FORM


def test_rotating_lookahead_refuses_a_traced_period():
    """It decides shapes."""

    def build(period):
        optax_ext.novak(0.1, lookahead="rotating", sync_period=period)

    with pytest.raises(ValueError, match="sync_period must be a Python integer"):
        jax.eval_shape(build, 5)


def test_overridden_unit_must_exist():
    optimizer = optax_ext.caadam(0.1, overrides={"out": {"scale": 2.0}, "uot": {"scale": 1.0}})
    with pytest.raises(ValueError, match=r"overrides names \['uot'\].* 'in', 'out'"):
        optimizer.init(PARAMS)


def test_gate_per_tensor_needs_one_velocity_per_tensor():
    part = optax.masked(optax.adam(0.1), {"in": True, "out": False})
    optimizer = optax_ext.velocity_regularized(part, beta3=1.0, lr_cutoff=10.0, norm_scope="tensor")
    with pytest.raises(ValueError, match="norm_scope must be 'global'"):
        optimizer.init(PARAMS)


NEED_PARAMS = {case.method: case.build() for case in METHODS} | {
    "lookahead": optax_ext.lookahead(optax.sgd(0.1), sync_period=5, slow_step_size=0.5),
    "scale_by_trust_ratio": optax_ext.scale_by_trust_ratio(max_ratio=10.0),
}


@pytest.mark.parametrize("optimizer", NEED_PARAMS.values(), ids=NEED_PARAMS)
def test_missing_params_raise_what_optax_raises(optimizer):
    def message(optimizer):
        with pytest.raises(ValueError, match="params") as error:
            optimizer.update(PARAMS, optimizer.init(PARAMS))
        return str(error.value)

    assert message(optimizer) == message(optax.adamw(0.1))


# `test_connection_units.py` tests what connections say.
BUILT = NEED_PARAMS | {
    row.name: row.factory(**row.arguments) for row in PIECES if row.name != "connections"
}


@pytest.mark.parametrize(
    "leaf",
    [jnp.zeros((), jnp.int32), jnp.ones(3, bool), jax.random.key(0), 3, "relu", jax.nn.relu],
    ids=["int32", "bool", "key", "int", "text", "function"],
)
@pytest.mark.parametrize("optimizer", BUILT.values(), ids=BUILT)
def test_leaves_without_gradients_are_named_with_a_remedy(optimizer, leaf):
    params = PARAMS | {"norm": {"batches": leaf}}
    with pytest.raises(ValueError, match=r"params/norm/batches is .* optax\.masked"):
        optimizer.init(params)
    if hasattr(leaf, "dtype"):
        mask = {"in": True, "out": True, "norm": False}
        optax.masked(optimizer, mask).init(params)


def test_hyperparameters_rounded_to_the_parameters_name_the_remedy():
    params = {"kernel": jnp.ones(3, jnp.bfloat16)}
    injected = optax.inject_hyperparams(optax_ext.fame)
    with pytest.raises(
        ValueError, match=r"b2 must be in \[0, 1\), got 1.* in bfloat16.*hyperparam"
    ):
        injected(1e-3).init(params)
    optax.inject_hyperparams(optax_ext.fame, hyperparam_dtype=jnp.float32)(1e-3).init(params)


@pytest.mark.parametrize(
    "mask",
    [lambda count: count > 1, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)],
    ids=["array", "bool"],
)
def test_an_injected_mask_names_the_remedy(mask):
    """Optax takes a function for a schedule, and passes what it returns."""
    injected = optax.inject_hyperparams(optax_ext.fame)(1e-3, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be None, .* name mask in its static_args"):
        injected.init(PARAMS)
    static = optax.inject_hyperparams(optax_ext.fame, static_args="mask")
    static(1e-3, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)).init(PARAMS)


def test_injected_dtypes_name_the_remedy():
    """Optax takes what is callable, a dtype too, for a schedule."""
    injected = optax.inject_hyperparams(optax_ext.fame)(1e-3, mu_dtype=jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"mu_dtype must be None or .*name mu_dtype in its static_"
    ):
        injected.init(PARAMS)
    static = optax.inject_hyperparams(optax_ext.fame, static_args="mu_dtype")
    static(1e-3, mu_dtype=jnp.bfloat16).init(PARAMS)
