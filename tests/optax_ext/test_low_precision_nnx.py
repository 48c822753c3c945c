"""State in few bits in the loops of Flax nnx, whose variables are boxes around arrays."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_ext
from pallas_kernels import fuse
from pallas_kernels.flax import FusedOptimizer

STEPS = 4
NOVAK = optax_ext.novak(1e-2, weight_decay=1e-3, sync_period=2)
TX = optax_ext.quantize_state(NOVAK)


def make_model() -> nnx.Linear:
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    model.kernel.set_metadata(role="kernel")
    return model


def parameters(model: nnx.Linear) -> dict[str, Any]:
    assert model.bias is not None
    return {"kernel": model.kernel[...], "bias": model.bias[...]}


def gradients(t: int) -> dict[str, jax.Array]:
    return {name: jax.random.normal(jax.random.key(t), x.shape) for name, x in FIRST.items()}


def in_variables(grads: dict[str, jax.Array], params: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))


FIRST = parameters(make_model())


def train_plain_arrays() -> Any:
    params, state = FIRST, TX.init(FIRST)
    for t in range(STEPS):
        updates, state = TX.update(gradients(t), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nnx_optimizer_trains_as_plain_arrays_do(jit, fused):
    model = make_model()
    make = FusedOptimizer if fused else nnx.Optimizer
    optimizer = make(model, fuse(TX) if fused else TX, wrt=nnx.Param)

    def train_step(model, optimizer, grads):
        optimizer.update(model, grads)

    train_step = nnx.jit(train_step) if jit else train_step
    before = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    for t in range(STEPS):
        train_step(model, optimizer, in_variables(gradients(t), nnx.state(model)))
    state = nnx.as_pure(optimizer.opt_state)
    assert jax.tree.structure(state) == before
    assert optax.tree.get(state, "mu")["kernel"].codes.dtype == jnp.int8
    chex.assert_trees_all_close(parameters(model), train_plain_arrays(), atol=1e-6)


def test_variables_of_the_state_keep_the_metadata_of_parameters():
    optimizer = nnx.Optimizer(make_model(), TX, wrt=nnx.Param)
    codes = optax.tree.get(optimizer.opt_state, "mu")["kernel"]
    assert [array.get_metadata("role") for array in codes] == ["kernel"] * len(codes)


@pytest.mark.parametrize("width", [128, 100])
def test_sharded_variables(width):
    """Scales have another shape than the parameter, so its sharding does not fit them."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    names = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, width, kernel_init=names, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
        kernel = model.kernel[...]
        codes, *_ = optax.tree.get(optimizer.opt_state, "mu")["kernel"]
        assert codes[...].sharding.spec == kernel.sharding.spec
        for _ in range(2):
            optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    assert jnp.all(model.kernel[...] < kernel)


def test_parameters_in_variables_train_as_plain_arrays_do():
    graph, params = nnx.split(make_model(), nnx.Param)
    state = TX.init(params)
    structure = jax.tree.structure(state)
    for t in range(STEPS):
        updates, state = TX.update(in_variables(gradients(t), params), state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.structure(state) == structure
    # The random bits come from the gradients, which are found by their paths.
    chex.assert_trees_all_equal(parameters(nnx.merge(graph, params)), train_plain_arrays())
    decoded = optax_ext.dequantize_state(state)
    assert jax.tree.structure(decoded) == jax.tree.structure(NOVAK.init(params))
