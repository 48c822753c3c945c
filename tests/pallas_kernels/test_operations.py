"""The primitives of kernels: each is lowered or left to XLA, and computes what XLA does."""

import itertools
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core.primitives import add_jaxvals_p

from pallas_kernels import arithmetic, explain, fuse, ops
from pallas_kernels.backends import evaluate
from pallas_kernels.ops import DTYPES
from support.cases import METHODS
from support.fused import INTERPRETERS, lowered


def partner(x: jax.Array) -> jax.Array:
    """A second operand, made of the first: a kernel sees one leaf."""
    if x.dtype == bool:
        return ~x
    return lax.select(x > 1, lax.full_like(x, 3), x)


def of_two(function: Callable[..., jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: function(x, partner(x))


def as_index(x: jax.Array) -> jax.Array:
    return lax.convert_element_type(x != partner(x), jnp.int32)


def flip_a_bit(x: jax.Array, dtype: str) -> jax.Array:
    """The number with another first digit: of 4 bytes, for other widths change the shape."""
    if x.dtype.itemsize != 4:
        raise TypeError
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, dtype) ^ (1 << 22), x.dtype)


UNARY = """abs cbrt ceil cos erf exp exp2 expm1 floor is_finite log log1p logistic neg rsqrt sign
    sin sqrt square stop_gradient tan tanh"""
BINARY = "add atan2 div eq ge gt le lt max min mul ne nextafter pow rem sub"
# For every primitive, functions of one leaf that use it.
OPERATIONS: dict[str, list[Callable[[jax.Array], jax.Array]]] = {
    **{name: [getattr(lax, name)] for name in UNARY.split()},
    **{name: [of_two(getattr(lax, name))] for name in BINARY.split()},
    "add_any": [lambda x: add_jaxvals_p.bind(x, x)],
    "and": [of_two(lax.bitwise_and)],
    "bitcast_convert_type": [partial(flip_a_bit, dtype=d) for d in ("int32", "uint32")],
    "clamp": [lambda x: lax.clamp(lax.full_like(x, 0), x, lax.full_like(x, 1))],
    "convert_element_type": [
        lambda x, dtype=dtype: lax.convert_element_type(x, dtype) for dtype in sorted(DTYPES)
    ],
    "copy": [lax.copy_p.bind],
    "integer_pow": [lambda x, y=y: lax.integer_pow(x, y) for y in (-3, -1, 0, 1, 2, 7)],
    "log2": [jnp.log2],  # a primitive in newer versions of JAX
    "not": [lax.bitwise_not],
    "or": [of_two(lax.bitwise_or)],
    "pow": [
        of_two(lax.pow),
        lambda x: lax.pow(x, as_index(x)),
        lambda x: lax.pow(x, as_index(x).astype(jnp.int8)),
        lambda x: lax.pow(x, as_index(x).astype(jnp.uint8)),
    ],
    "reduce_precision": [lambda x: lax.reduce_precision(x, 5, 7)],
    "round": [lambda x, method=method: lax.round(x, method) for method in lax.RoundingMethod],
    "select_n": [
        lambda x: lax.select_n(x != partner(x), x, partner(x)),
        lambda x: lax.select_n(as_index(x), x, partner(x), x),
    ],
    **{
        shift.__name__: [lambda x, shift=shift: shift(x, lax.full_like(x, 3))]
        for shift in (lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)
    },
    "xor": [of_two(lax.bitwise_xor)],
    "reduce_and": [lambda x: x ^ jnp.all(x)],
    "reduce_max": [lambda x: x == jnp.max(x)],
    "reduce_min": [lambda x: x == jnp.min(x)],
    "reduce_or": [lambda x: x ^ jnp.any(x)],
    "reduce_sum": [lambda x: x > jnp.sum(x).astype(x.dtype)],
}
REWRITTEN = {"reduce_max", "reduce_min"} | {
    name for name, row in ops.TABLE.items() if row.triton.rewrite or row.mosaic.rewrite
}


def each(names) -> pytest.MarkDecorator:
    """A test of every operation, which is slow but for these."""
    rows = [
        pytest.param(
            name,
            function,
            id=f"{name}{i or ''}",
            marks=[] if name in names else pytest.mark.slow,
        )
        for name, functions in OPERATIONS.items()
        for i, function in enumerate(functions)
    ]
    return pytest.mark.parametrize(("name", "function"), rows)


def test_every_primitive_is_tested():
    assert OPERATIONS.keys() == ops.ELEMENTWISE | ops.REDUCTIONS.keys()


def leaf_by_leaf(function) -> optax.GradientTransformation:
    """The function as an optimizer; booleans are made and used inside of its kernels."""

    def on_leaf(name, leaf):
        result = function(leaf > 0 if name == "bool" else leaf)
        return lax.select(result, leaf, -leaf) if result.dtype == bool else result

    def update(updates, _):
        return {name: on_leaf(name, leaf) for name, leaf in updates.items()}

    return optax.stateless(update)


def leaves(function, values: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """A leaf of each dtype of which the function is defined, by the dtype's name."""
    defined = {}
    for dtype in sorted(DTYPES):
        try:
            jax.eval_shape(function, jax.ShapeDtypeStruct((3,), dtype))
        except TypeError:
            continue
        defined[dtype] = values("float32" if dtype == "bool" else dtype)
    return defined


def ones(dtype: str) -> np.ndarray:
    return np.ones(515, dtype)  # blocks of vectors, and single elements


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@each(REWRITTEN)
def test_each_lowers_for_a_gpu_or_is_left_to_xla(name, function, backend):
    del name
    tx = leaf_by_leaf(function)
    params = leaves(function, ones)
    left = explain(tx, params, backend=backend).fallback_reasons
    assert all(": no kernel for " in line for line in left)
    text = lowered(lambda p: fuse(tx, backend=backend).update(p, tx.init(p)), params)
    assert (f"{backend}" in text) == (len(left) < len(params))


def choose_by_a_constant(g, m):
    return jnp.where(jnp.ones(m.shape, bool), 0.9 * m + g, m)


def choose_by_a_converted_number(g, m):
    def choose(number):
        return lax.select_n(jnp.broadcast_to(number.astype(bool), m.shape), m, 0.9 * m + g)

    return jax.jit(choose)(jnp.float32(1))


def clip_beyond_the_dtype(g, m):
    return jnp.clip(g.astype(jnp.float16), -1e30, 1e30).astype(jnp.float32) + m


@pytest.mark.parametrize(
    "average", [choose_by_a_constant, choose_by_a_converted_number, clip_beyond_the_dtype]
)
def test_numbers_that_are_known_while_tracing(average):
    """A kernel has no scalar for such a predicate, and a number may not fit into a dtype."""

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(average, updates, state)
        return state, state

    tx = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    params = {"kernel": jnp.linspace(-1, 1, 2048)}
    expected = tx.update(params, params)
    ours = fuse(tx, backend="interpret", strict=True).update(params, params)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("name", ["ceil", "div", "floor", "max", "round", "select_n", "sign"])
def test_what_optimizers_use_has_kernels(name, backend):
    for function in OPERATIONS[name]:
        floats = {dtype: ones(dtype) for dtype in ops.FLOATS}
        assert explain(leaf_by_leaf(function), floats, backend=backend).fallback_reasons == ()


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_methods_lower_for_narrow_parameters(case, backend):
    tx = case.build()
    params = jax.eval_shape(lambda: {"kernel": jnp.ones((5, 103), jnp.bfloat16)})
    fused = fuse(tx, backend=backend, strict=True)
    assert backend in lowered(fused.step, params, jax.eval_shape(tx.init, params), params)


def edges(dtype: str) -> np.ndarray:
    """Numbers where roundings, signs and ranges change."""
    if dtype in ops.INTEGERS | ops.BITS:
        limits = np.iinfo(dtype)
        return np.array([limits.min, limits.min + 1, 0, 1, 2, 3, 100, limits.max], dtype)
    limits = jnp.finfo(dtype)
    exact = 2.0 ** (limits.nmant - 1)  # half of the last number with digits behind the point
    ties = np.arange(0.5, 5)
    around = [np.nextafter(np.float32(0.5), np.float32(side)) for side in (0, 1)]
    large = [exact - 0.5, exact, exact + 0.5, 2 * exact - 0.5, 2 * exact, 2 * exact + 1]
    ends = [0, float(limits.tiny), 0.3, 1, 2, 3, 100, float(limits.max), np.inf]
    sizes = np.array([*ties, *around, *large, *ends], np.float32)
    return np.array([*sizes, *-sizes, np.nan]).astype(dtype)


def test_edges_hold_what_they_should():
    for dtype in ops.FLOATS:
        x = edges(dtype).astype(np.float64)
        assert np.isnan(x).sum() == 1
        assert {0.5, 1.5, 2.5, -0.5} <= {*x}
        assert (np.signbit(x) & (x == 0)).sum() == 1


# XLA approximates these, on a CPU in the narrow dtype itself; a kernel rounds what float32 gives.
_APPROXIMATE = """atan2 cbrt cos erf exp exp2 expm1 integer_pow log log1p log2 logistic pow rsqrt
    sin sqrt tan tanh"""
APPROXIMATE = frozenset(_APPROXIMATE.split())


def in_float32(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: (
        function(x.astype(jnp.float32)).astype(x.dtype)
        if x.dtype.name in ("bfloat16", "float16")
        else function(x)
    )


def assert_same(ours: np.ndarray, expected: np.ndarray, roundings: int) -> None:
    """Numbers that differ by a few roundings at most; equal zeros have equal signs."""
    assert ours.dtype == expected.dtype
    a, b = (np.asarray(x, np.float64) for x in (ours, expected))
    error = roundings * float(jnp.finfo(ours.dtype).eps) if ours.dtype.name in ops.FLOATS else 0
    np.testing.assert_allclose(a, b, rtol=error, atol=error)
    zeros = (a == 0) & (b == 0)
    np.testing.assert_array_equal(np.signbit(a[zeros]), np.signbit(b[zeros]))


@each({"round", "max", "reduce_max", "select_n"})
def test_kernels_compute_what_xla_does(name, function):
    params = leaves(function, edges)
    tx = leaf_by_leaf(function)
    plain = leaf_by_leaf(in_float32(function)) if name in APPROXIMATE else tx
    # Else XLA leaves out roundings to narrow dtypes, and divides by multiplying.
    options = {"xla_allow_excess_precision": False, "xla_disable_hlo_passes": "algsimp"}
    row = ops.TABLE[name]
    # What both backends compute alike is interpreted alike.
    interpreters = INTERPRETERS if row.triton != row.mosaic else INTERPRETERS[:1]
    expected, *fused = (
        jax.jit(lambda p, update=update: update(p, tx.init(p))[0], compiler_options=options)(params)
        for update in (plain.update, *(fuse(tx, backend=b).update for b in interpreters))
    )
    roundings = 8 if name in APPROXIMATE else 0
    for ours, dtype in itertools.product(fused, params):
        assert_same(np.asarray(ours[dtype]), np.asarray(expected[dtype]), roundings)


def test_maxima_keep_nan_where_a_backend_drops_it(monkeypatch):
    """Triton's do, on a GPU only."""
    x, y = jnp.array([1.0, jnp.nan, 2.0]), jnp.array([jnp.nan, 1.0, 3.0])
    monkeypatch.setattr(lax, "max", jnp.fmax)
    monkeypatch.setattr(lax, "min", jnp.fmin)
    np.testing.assert_array_equal(arithmetic.maximum(x, y), [np.nan, np.nan, 3.0])
    np.testing.assert_array_equal(arithmetic.minimum(x, y), [np.nan, np.nan, 2.0])
    assert np.isnan(evaluate.or_nan(jnp.nanmax)(x))
    assert evaluate.or_nan(jnp.nanmin)(x[::2]) == 1
