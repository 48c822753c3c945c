"""Each error that the FAQ names is raised here, with the words that the FAQ shows."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext
from pallas_kernels import fuse
from pallas_kernels.flax import FusedOptimizer

FAQ = Path(__file__).parents[1] / "docs/faq.md"
ERRORS = re.findall(r"^```text\n(.*)\n```", FAQ.read_text(encoding="utf-8"), re.M)

TX = optax_ext.vradam(1e-3)
BY_DATA = PartitionSpec("data")


def params() -> dict[str, jax.Array]:
    return {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}


def mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def integer_parameter():
    TX.init(params() | {"step": jnp.zeros((), jnp.int32)})


def everything_of_a_module():
    TX.init(nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))


def update_without_parameters():
    TX.update(params(), TX.init(params()))


def use_after_donation():
    weights = jax.tree.map(jnp.copy, params())
    jax.jit(fuse(TX).step, donate_argnums=(0, 1))(weights, TX.init(weights), params())
    jnp.sum(weights["w"])


def one_gate_of_two():
    tx = optax.partition({"w": TX, "b": TX}, {"w": "w", "b": "b"})
    optax.tree.get(tx.init(params()), "gate")


def uncalled_schedule():
    optax_ext.fame(optax.cosine_decay_schedule)


def injected_in_bfloat16():
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    tx = optax.inject_hyperparams(optax_ext.fame)(learning_rate=1e-3)
    tx.update(weights, tx.init(weights), weights)


def injected_dtype():
    fame = optax.inject_hyperparams(optax_ext.fame)
    fame(learning_rate=1e-3, mu_dtype=jnp.bfloat16).init(params())


def small_b2():
    optax_ext.novak(1e-3, b2=0.5)


def no_velocity():
    optax_ext.velocity_regularized(optax.sgd(1e-3), beta3=1.0, lr_cutoff=10.0).init(params())


def one_layer():
    optax_ext.caadam(1e-3).init(params())


def uncalled_factory():
    fuse(optax_ext.fame)


def sums_over_rows():
    weights = {"w": jnp.ones((256, 256))}
    tx = fuse(optax.adafactor(1e-3), strict=True)
    tx.step(weights, tx.init(weights), weights)


def order_of_update():
    fuse(TX).step(params(), params(), TX.init(params()))


def state_without_quantize_state():
    tx = fuse(optax_ext.quantize_state(TX))
    tx.step(params(), TX.init(params()), params())


def optimizer_that_is_not_fused():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx: Any = TX
    FusedOptimizer(model, tx, wrt=nnx.Param).update(model, nnx.state(model))


def parameters_on_no_mesh():
    optax_ext.state_shardings(TX, params())


def spec_without_mesh():
    fuse(TX, shardings=BY_DATA).step(params(), TX.init(params()), params())


def axis_that_is_too_short():
    sharding = NamedSharding(mesh(AxisType.Auto), BY_DATA)
    fuse(TX, shardings=sharding).step(params(), TX.init(params()), params())


def embedding_on_explicit_axes():
    embed, tokens = linen.Embed(16, 8), jnp.zeros((8, 4), jnp.int32)
    variables = embed.init(jax.random.key(0), tokens)
    sharding = NamedSharding(mesh(AxisType.Explicit), BY_DATA)
    jax.jit(embed.apply)(*jax.device_put((variables, tokens), sharding))


# In the order of the page.
CAUSES: tuple[Callable[[], None], ...] = (
    integer_parameter,
    everything_of_a_module,
    update_without_parameters,
    use_after_donation,
    one_gate_of_two,
    uncalled_schedule,
    injected_in_bfloat16,
    injected_dtype,
    small_b2,
    no_velocity,
    one_layer,
    uncalled_factory,
    sums_over_rows,
    order_of_update,
    state_without_quantize_state,
    optimizer_that_is_not_fused,
    parameters_on_no_mesh,
    spec_without_mesh,
    axis_that_is_too_short,
    embedding_on_explicit_axes,
)


@pytest.mark.parametrize(
    ("cause", "words"),
    [pytest.param(*pair, id=pair[0].__name__) for pair in zip(CAUSES, ERRORS, strict=True)],
)
def test_error_of_the_faq(cause, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception) as raised:  # noqa: PT011, its words are compared below
            cause()
    error = raised.value
    assert f"{type(error).__name__}: {error.args[0]}".startswith(words)
