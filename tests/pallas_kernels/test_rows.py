"""Kernels that compute rows: statistics along the last axis, and state in few bits."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext
from pallas_kernels import explain, fuse
from support.cases import slow_unless
from support.fused import INTERPRETERS, chain_step, lowered
from support.strategies import shape, streams

# Whole blocks, a ragged last block, groups over the flattened array, and what stays float32.
SHAPES = {"kernel": (8, 192), "ragged": (9, 64), "conv": (3, 3, 64, 5), "bias": (60,)}
ROWS = partial(optax_ext.quantize_state, formats=optax_ext.default_formats(min_size=64))


def arrays(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape) * np.exp(rng.standard_normal(shape)), dtype)
        for name, shape in SHAPES.items()
    }


def per_leaf(function):
    return optax.stateless(lambda updates, _: jax.tree.map(function, updates))


def race(tx, params, step, steps=4, **options):
    """Parameters and states after some steps, of the chain and fused."""
    chain, ours = jax.jit(chain_step(tx)), jax.jit(fuse(tx, **options).step)
    start = jax.jit(tx.init)(params)
    results = []
    for function in (chain, ours):
        carry = params, start
        for t in range(steps):
            carry = function(*carry, jax.tree.map(lambda g, p: g.astype(p.dtype), step(t), params))
        results.append(carry)
    return results


def assert_same_codes(expected, ours):
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jnp.integer) and a.dtype != jnp.int16:
            np.testing.assert_array_equal(a, b)
        else:
            wide = (np.asarray(x, np.float64) for x in (a, b))
            np.testing.assert_allclose(*wide, rtol=1e-5, atol=1e-6)


CHAINS = {
    "adamw": ROWS(optax.adamw(1e-2)),
    "lion": ROWS(optax.lion(1e-2)),
    "fame": ROWS(optax_ext.fame(1e-2)),
    "novak": ROWS(optax_ext.novak(1e-2, sync_period=2)),
    "bfloat16 moments": ROWS(optax.adamw(1e-2), formats=lambda *leaf: optax_ext.formats.BFloat16()),
}
# Of bfloat16 parameters.
WEIGHTS = {
    "24 bits": optax_ext.master_weights(CHAINS["adamw"]),
    "32 bits": optax_ext.master_weights(optax.adamw(1e-2), bits=32),
    "stochastic": optax_ext.stochastic_rounding(CHAINS["lion"]),
}


@cache
def compiled(name):
    """Return the steps of the chain and of the kernels, compiled as written; see `Race`."""
    tx = CHAINS[name]
    fused = fuse(tx, backend="interpret", strict=True).step
    options = {"xla_allow_excess_precision": False, "xla_disable_hlo_passes": "algsimp"}
    return [jax.jit(each, compiler_options=options) for each in (chain_step(tx), fused)]


@pytest.mark.parametrize("name", slow_unless(["adamw"], CHAINS))
@given(grads=streams({k: shape(*v) for k, v in SHAPES.items()}, steps=3))
@settings(max_examples=10)
def test_fused_state_is_that_of_the_chain(name, grads):
    """States are equal to the bit unless a compiler fuses a product and a sum in one of them."""
    start = arrays(0), jax.jit(CHAINS[name].init)(arrays(0))
    expected, ours = start, start
    chain, fused = compiled(name)
    for g in grads:
        expected, ours = chain(*expected, g), fused(*ours, g)
    assert_same_codes(expected, ours)
    if name in ("adamw", "lion"):
        for a, b in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(ours[1]), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", [name for name in INTERPRETERS if "mosaic" in name])
@pytest.mark.parametrize("name", slow_unless(["adamw"], CHAINS))
def test_mosaics_codes_are_those_of_the_chain(name, backend):
    assert_same_codes(
        *race(CHAINS[name], arrays(0), lambda t: arrays(t + 1), backend=backend, strict=True)
    )


@pytest.mark.parametrize("backend", INTERPRETERS)
@pytest.mark.parametrize("name", slow_unless(["24 bits"], WEIGHTS))
def test_fused_weights_are_those_of_the_chain(name, backend):
    tx = WEIGHTS[name]
    expected, ours = race(
        tx,
        optax_ext.bfloat16_weights(arrays(0)),
        lambda t: arrays(t + 1),
        steps=1,
        backend=backend,
        strict=True,
    )
    if "bits" in name:
        # A product and a sum may be one operation in one of the programs, so compare weights.
        digits = 2**-15 if name == "24 bits" else 2**-22
        expected, ours = (optax_ext.float32_weights(*each) for each in (expected, ours))
    else:
        digits = 2**-7
        expected, ours = expected[0], ours[0]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        wide = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(*wide, rtol=2 * digits, atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("name", slow_unless(["adamw", "24 bits"], [*CHAINS, *WEIGHTS]))
def test_one_launch_at_the_floor(name, backend):
    tx = (CHAINS | WEIGHTS)[name]
    large = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    if name in WEIGHTS:
        large = jax.eval_shape(optax_ext.bfloat16_weights, large)
    report = explain(tx, large, backend=backend)
    assert report.fallback_reasons == ()
    assert report.launches == 1
    assert report.bytes_per_parameter == pytest.approx(report.floor_per_parameter, abs=1e-3)


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
@pytest.mark.parametrize("name", slow_unless(["adamw", "24 bits"], [*CHAINS, *WEIGHTS]))
def test_chains_lower_for_a_gpu(name, backend):
    tx = (CHAINS | WEIGHTS)[name]
    params = arrays(0)
    if name in WEIGHTS:
        params = optax_ext.bfloat16_weights(params)
    state = jax.eval_shape(tx.init, params)
    assert backend in lowered(fuse(tx, backend=backend, strict=True).step, params, state, params)


STATISTICS = {
    "largest": lambda x: x / (1 + jnp.max(jnp.abs(x), axis=-1, keepdims=True)),
    "smallest": lambda x: x - jnp.min(x, axis=-1, keepdims=True),
    "mean": lambda x: x - jnp.mean(x, axis=-1, keepdims=True),
    "norm": lambda x: x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1),
    "deviation": lambda x: (
        x + jnp.max(jnp.abs(x - jnp.mean(x, axis=-1, keepdims=True)), axis=-1)[..., None]
    ),
    "of all rows": lambda x: x * jnp.sum(jnp.max(x, axis=-1)),
}


@pytest.mark.parametrize("backend", INTERPRETERS)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_rows(name, backend):
    params = {"kernel": arrays(0)["kernel"].reshape(24, 64), "ragged": arrays(0)["ragged"]}
    params["ragged"] = params["ragged"].at[1, 3].set(jnp.nan)
    tx = per_leaf(STATISTICS[name])
    update = fuse(tx, backend=backend, strict=True).update
    ours, _ = jax.jit(lambda p: update(p, tx.init(p)))(params)
    expected, _ = jax.jit(lambda p: tx.update(p, tx.init(p)))(params)
    for leaf in params:
        np.testing.assert_allclose(ours[leaf], expected[leaf], rtol=1e-5, atol=1e-5)


def of_rows(lengths, x):
    """Compute statistics of rows of several lengths, one after the other, and of all of them."""
    total = jnp.sum(x)
    for length in lengths:
        rows = x.reshape(-1, length)
        largest = jnp.max(jnp.abs(rows), axis=-1)
        x = jnp.where((largest > 1)[:, None], rows / largest[:, None], rows - 1).reshape(x.shape)
        total += jnp.sum(largest)
    return x * total


LENGTHS = [(2,), (32,), (64,), (128,), (256,), (256, 64), (8, 64), (128, 2)]


@pytest.mark.parametrize("lengths", slow_unless([(32,), (256, 64)], LENGTHS), ids=str)
def test_rows_of_every_length(lengths):
    """The leaf has two wide blocks and a rest, which Mosaic cuts into single rows."""
    longest = max(lengths)
    size = (1024 + 128) // longest * longest + 3 * longest
    tx = per_leaf(partial(of_rows, lengths))
    params = {"vector": jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32)}
    expected, _ = jax.jit(lambda p: tx.update(p, tx.init(p)))(params)
    for backend in INTERPRETERS:
        update = fuse(tx, backend=backend, strict=True).update
        ours, _ = jax.jit(lambda p, update=update: update(p, tx.init(p)))(params)
        np.testing.assert_allclose(ours["vector"], expected["vector"], rtol=1e-4, atol=1e-4)
    for backend in ("triton", "mosaic"):
        update = fuse(tx, backend=backend, strict=True).update
        assert backend in lowered(lambda p, update=update: update(p, tx.init(p)), params)


@pytest.mark.parametrize(("last", "why"), [(3, "rows of 3"), (512, "rows of 512")])
def test_rows_that_do_not_fit_fall_back(last, why):
    tx = per_leaf(STATISTICS["norm"])
    params = {"kernel": jnp.ones((8, last))}
    (line,) = explain(tx, params).fallback_reasons
    assert line.startswith("0/kernel: ")
    assert f"no kernel for {why}" in line
    update = fuse(tx, backend="interpret").update
    ours, _ = jax.jit(lambda p: update(p, tx.init(p)))(params)
    np.testing.assert_allclose(ours["kernel"], tx.update(params, ())[0]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("last", [48, 1024])
def test_rows_of_an_input_that_do_not_fit_fall_back(last):
    """A vector that is repeated along a new axis."""

    def update(updates, _):
        wide = jax.lax.broadcast_in_dim(updates["row"], (24, last), (0,))
        return {"row": updates["row"], "kernel": updates["kernel"] + wide}

    tx = optax.stateless(update)
    params = {"row": jnp.arange(24.0), "kernel": jnp.ones((24, last))}
    assert "no kernel for rows of" in explain(tx, params).fallback_reasons[0]
    fused = fuse(tx, backend="interpret").update
    ours, _ = jax.jit(lambda p: fused(p, tx.init(p)))(params)
    np.testing.assert_array_equal(ours["kernel"], update(params, None)["kernel"])


@pytest.mark.parametrize(
    ("spec", "fits"), [(("x", "y"), True), (("x", None), True), ((None, ("x", "y")), False)]
)
def test_rows_on_shards(spec, fits):
    """Rows lie on one device, or XLA computes them: with the same codes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = {"kernel": NamedSharding(mesh, PartitionSpec(*spec))}
    tx = CHAINS["adamw"]

    def placed(t):
        values = np.random.default_rng(t).standard_normal((8, 256))
        return jax.device_put({"kernel": jnp.asarray(values, jnp.float32)}, sharding)

    params = placed(0)
    reasons = explain(tx, params).fallback_reasons
    assert (reasons == ()) == fits
    expected, ours = race(tx, params, placed, backend="interpret", shardings=sharding)
    assert_same_codes(expected, ours)


def test_leaves_with_other_numbers_of_rows_share_a_body():
    params = {name: shape(rows, 256) for name, rows in (("a", 64), ("b", 128))}
    report = explain(optax_ext.quantize_state(optax.adamw(1e-2)), params)
    assert [phase.bodies for phase in report.phases] == [1]
