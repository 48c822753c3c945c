"""Slow weights in the host's memory: the numbers are the same, and only they are there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext
from pallas_kernels import explain, fuse
from support.cases import slow_unless
from support.runs import history, step
from support.strategies import MENAGERIE, filled, shape, with_some_missing

P = PartitionSpec
TREE = {"bias": shape(8), "kernel": shape(96, 24), "odd": shape(5, 3), "scale": shape()}
every_way = pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="exact", marks=pytest.mark.slow),
        pytest.param({"mode": "rotating"}, id="rotating", marks=pytest.mark.slow),
        pytest.param({"slow_dtype": jnp.bfloat16}, id="narrow"),
    ],
)


def lookahead(offload: str | None = "pinned_host", **options):
    return optax_ext.lookahead(
        optax_ext.invadam(0.1, scale_free=True),
        sync_period=2,
        slow_step_size=0.5,
        offload=offload,
        **options,
    )


def kinds(tree) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def assert_equal(ours, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@every_way
def test_same_numbers(options):
    """The leaves are of all kinds, and some gradients are missing."""
    params = filled(MENAGERIE, 0)
    grads = [with_some_missing(filled(MENAGERIE, seed), seed) for seed in range(1, 6)]
    away = history(lookahead(**options), params, grads)
    here = history(lookahead(None, **options), params, grads)
    for (ours, state), (expected, other) in zip(away, here, strict=True):
        assert_equal(ours, expected)
        assert_equal(state.slow, other.slow)
        assert kinds(state.slow) == {"pinned_host"}
        assert kinds((ours, state.inner_state, state.count)) == {"device"}


def test_in_a_scan():
    """The types of a carry can't change."""
    params = jax.tree.map(jnp.asarray, filled(TREE, 0))
    grads = jax.tree.map(lambda *xs: np.stack(xs), *(filled(TREE, seed) for seed in range(1, 6)))

    def train(tx):
        def body(carry, gradient):
            params, state = carry
            return step(tx, params, state, gradient), None

        return jax.jit(partial(jax.lax.scan, body))((params, tx.init(params)), grads)[0]

    (ours, state), (expected, _) = train(lookahead()), train(lookahead(None))
    assert kinds(state.slow) == {"pinned_host"}
    # Compiled, the two are fused, and so rounded, otherwise.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), ours, expected)


def test_nothing_moves_between_synchronizations():
    """All that touches the host's memory stands in branches that a synchronization takes."""
    tx, params = lookahead(), filled(TREE, 0)
    state = tx.init(params)
    program = jax.make_jaxpr(partial(step, tx))(params, state, params)

    def away(variables):
        return any(v.aval.memory_space == jax.memory.Space.Host for v in variables)

    touching = [eqn for eqn in program.jaxpr.eqns if away((*eqn.invars, *eqn.outvars))]
    assert {eqn.primitive.name for eqn in touching} == {"cond"}
    for eqn in touching:
        kept, _ = eqn.params["branches"]
        assert away(kept.jaxpr.outvars) == (kept.jaxpr.eqns == [])


@pytest.mark.parametrize(
    "axis_type", slow_unless([AxisType.Explicit], [AxisType.Auto, AxisType.Explicit])
)
@every_way
def test_resumed_on_a_mesh(options, axis_type, tmp_path):
    """A checkpoint is restored into the same memory and onto the same devices."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"bias": P("model"), "kernel": P("data", "model"), "odd": P(), "scale": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = lookahead(**options)
    with jax.set_mesh(mesh):
        params, *grads = (jax.device_put(filled(TREE, seed), shardings) for seed in range(6))
        placed = optax_ext.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=placed)(params)
        *_, uninterrupted = history(tx, params, grads, jit=True)

        train = jax.jit(partial(step, tx))
        for gradient in grads[:3]:
            params, state = train(params, state, gradient)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (params, state),
            (shardings, placed),
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "early", (params, state))
            checkpointer.wait_until_finished()
            params, state = checkpointer.restore(tmp_path / "early", abstract)
        assert kinds(state.slow) == {"pinned_host"}
        for gradient in grads[3:]:
            params, state = train(params, state, gradient)
    assert_equal((params, state), uninterrupted)
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, placed)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)  # memory included


@pytest.mark.slow
def test_a_fused_step_leaves_them_to_xla():
    tx, params = lookahead(), jax.tree.map(jnp.asarray, filled(TREE, 0))
    why = "cond moves it to or from host memory"
    assert [line.split(": ") for line in explain(tx, params).fallback_reasons] == [
        [f"0/{name}", why] for name in ("bias", "kernel", "odd")
    ]
    state, grads = tx.init(params), [filled(TREE, seed) for seed in (1, 2)]
    ours = expected = params, state
    for gradient in grads:
        ours = jax.jit(fuse(tx, backend="interpret").step)(*ours, gradient)
        expected = jax.jit(partial(step, tx))(*expected, gradient)
    assert_equal(ours, expected)
    with pytest.raises(ValueError, match=f"0/kernel: {why}"):
        fuse(tx, strict=True).step(params, state, params)
