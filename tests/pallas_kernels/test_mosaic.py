"""The Mosaic GPU backend: interpreted, against the chain; lowered, for a GPU not there."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import optax_ext
from pallas_kernels import arithmetic, fuse
from pallas_kernels.layout import Form, Layout
from pallas_kernels.program import Body
from support.cases import slow_unless
from support.fused import lowered

INTERPRETS = hasattr(plgpu, "InterpretGPUParams")
needs_interpreter = pytest.mark.skipif(
    not INTERPRETS, reason=f"jax {jax.__version__} has no public interpreter for Mosaic GPU"
)

# Below, at and above the widths of blocks: single elements only, 128 and 2, 512 and 1, 512 and 3.
SHAPES = [(), (3,), (130,), (512,), (9, 57), (5, 103)]


def tree(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        f"{i}": jax.random.normal(key, shape).astype(dtype)
        for i, (key, shape) in enumerate(zip(keys, SHAPES, strict=True))
    }


def by_extremes():
    """Largest and smallest element of each leaf: the reductions that no optimizer here has."""

    def scaled(g):
        return g / (jnp.max(g) - jnp.min(g) + 1)

    return optax.stateless(lambda updates, _: jax.tree.map(scaled, updates))


CHAINS = {
    "adamw": optax.adamw(1e-2),
    "clip+adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "lamb": optax.lamb(1e-2),
    "extremes": by_extremes(),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), 2),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(1e-2, 0.9), 2),
    "fame": optax_ext.fame(1e-2),
    "vradam": optax_ext.vradam(1e-2),
    "novak": optax_ext.novak(1e-2, sync_period=2),
}


def run(step, tx, dtype, steps=2, gradients=tree):
    params = tree(0, dtype)
    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, gradients(i + 1, dtype))
    return params, state


def both(tx, dtype, **how):
    def chain(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fused = fuse(tx, backend="interpret-mosaic", strict=True)
    # Else XLA leaves out roundings to bfloat16, other ones in a chain than in a kernel.
    # Without LLVM's optimizations products and sums are contracted in one of them only.
    options = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 3}
    jit = partial(jax.jit, compiler_options=options)
    return run(jit(chain), tx, dtype, **how), run(jit(fused.step), tx, dtype, **how)


def assert_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@needs_interpreter
@pytest.mark.parametrize("name", slow_unless(["lamb"], CHAINS))
def test_kernels_compute_what_the_chain_does(name):
    expected, actual = both(CHAINS[name], jnp.float32)
    assert_close(actual, expected, 1e-6)
    for before, after in zip(tree(0).values(), actual[0].values(), strict=True):
        assert np.isfinite(after).all()
        assert (after != before).any()


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "clip+adamw", "novak"])
def test_bfloat16_is_exact(name):
    expected, actual = both(CHAINS[name], jnp.bfloat16)
    assert_close(actual, expected, 0)


@pytest.mark.slow
@needs_interpreter
def test_a_step_that_is_refused_writes_nothing():
    def gradients(seed, dtype):
        return tree(seed, dtype) | {"2": jnp.full((130,), jnp.nan, dtype)}

    expected, actual = both(CHAINS["apply_if_finite"], jnp.float32, steps=1, gradients=gradients)
    assert_close(actual, expected, 0)
    assert_close(actual[0], tree(0), 0)


@pytest.mark.skipif(INTERPRETS, reason=f"jax {jax.__version__} can interpret Mosaic GPU kernels")
def test_without_an_interpreter_an_error_says_so():
    with pytest.raises(NotImplementedError, match="can't interpret"):
        both(CHAINS["adamw"], jnp.float32)


@pytest.mark.parametrize("name", slow_unless(["clip+adamw", "novak"], CHAINS))
def test_chains_lower_for_a_gpu(name):
    tx = fuse(CHAINS[name], backend="mosaic", strict=True)
    params = jax.eval_shape(lambda: tree(0))
    text = lowered(tx.step, params, jax.eval_shape(tx.init, params), params)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("widths", [(512, 128, 1), (512,)])
def test_a_layout_covers_every_element_once(widths):
    sizes = [1, 127, 128, 511, 512, 1024, 1153]
    bodies = [Body(dtypes, (1,), (None,), (), (), ()) for dtypes in (("float32",), ("bfloat16",))]
    forms = [Form(body, tuple(sizes[i::2]), ()) for i, body in enumerate(bodies)]
    layout = Layout(tuple(forms), widths)
    assert hash(layout) == hash(Layout(tuple(forms), widths))
    spans = [(group.width, span) for group in layout.groups for span in group.spans]
    covered = {size: [] for size in sizes}
    for (width, span), (start, end) in zip(spans, pairwise(layout.starts), strict=True):
        assert end - start == span.blocks > 0
        covered[layout.leaves[span.leaf].size] += range(
            span.first, span.first + span.blocks * width
        )
    for size, elements in covered.items():
        assert elements == list(range(len(elements)))
        assert 0 <= len(elements) - size < widths[-1]


SPECIAL = np.array([0.0, -0.0, 1e-30, 0.25, 2.0, 3e38, np.inf, np.nan, -1.0], np.float32)


def test_square_roots_at_the_edges():
    with np.errstate(invalid="ignore"):
        expected = np.sqrt(SPECIAL)
    np.testing.assert_allclose(arithmetic.sqrt_by_rsqrt(jnp.asarray(SPECIAL)), expected, rtol=3e-7)
