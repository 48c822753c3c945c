"""Depth and connections of known networks, derived by hand, from their traced computations."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, PartitionSpec

import optax_ext
from support.networks import KEY, depths, linen_parts, nnx_parts, places, read, shape, shapes


class Plain(linen.Module):
    """A convolutional network, one layer after the other."""

    @linen.compact
    def __call__(self, x):
        for features in (4, 6, 8):
            x = linen.Conv(features, (3, 3))(x)
            x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = linen.LayerNorm()(linen.Dense(5)(x))
        return linen.Dense(3)(x)


class PlainNnx(nnx.Module):
    def __init__(self, rngs):
        self.a_conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.b_conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.b_norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.c_out = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.b_norm(self.b_conv(nnx.relu(self.a_conv(x)))))
        return self.c_out(x.mean((1, 2)))


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        for features in (8, 6, 4):
            x = linen.gelu(linen.Dense(features)(x))
        return linen.Dense(2)(x)


IMAGES = shape(2, 8, 8, 3)


@pytest.mark.parametrize(
    ("apply", "params", "inputs"),
    [
        pytest.param(*linen_parts(Mlp(), shape(2, 3)), shape(2, 3), id="linen-mlp"),
        pytest.param(*linen_parts(Plain(), IMAGES), IMAGES, id="linen-convnet"),
        pytest.param(*nnx_parts(PlainNnx), IMAGES, id="nnx-convnet"),
    ],
)
@pytest.mark.parametrize("scaling", ["additive", "multiplicative", "signed", "depth"])
def test_plain_networks_are_what_names_and_shapes_tell(apply, params, inputs, scaling):
    architecture = optax_ext.architecture(apply, params, inputs)
    table = optax_ext.connection_table(params, scaling=scaling, architecture=architecture)
    assert table == optax_ext.connection_table(params, scaling=scaling)
    assert not any(placed.note for placed in architecture.parameters)


class Residual(linen.Module):
    """Two convolutions, or three with a bottleneck, beside a projection where sizes change."""

    features: int
    bottleneck: bool = False

    @linen.compact
    def __call__(self, x):
        windows = [(1, 1), (3, 3), (1, 1)] if self.bottleneck else [(3, 3), (3, 3)]
        y = x
        for i, window in enumerate(windows):
            y = linen.relu(y)
            y = linen.Conv(self.features, window, use_bias=False, name=f"conv{i}")(y)
            y = linen.BatchNorm(use_running_average=True)(y)
        if x.shape != y.shape:
            x = linen.Conv(self.features, (1, 1), name="project")(x)
        return x + y


class ResNet(linen.Module):
    bottleneck: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (7, 7), name="stem")(x)
        for i, features in enumerate((4, 8)):
            x = Residual(features, self.bottleneck, name=f"block{i}")(x)
        return linen.Dense(10, name="head")(x.mean((1, 2)))


def test_resnet():
    """The projection starts where the block does; the block is as deep as its longer branch."""
    assert read(*linen_parts(ResNet(), IMAGES), IMAGES) == {
        "stem": (7 * 7 * 3 * 4, 0),
        "block0/conv0": (3 * 3 * 4 * 4, 1),
        "block0/conv1": (3 * 3 * 4 * 4, 2),
        "block1/conv0": (3 * 3 * 4 * 8, 3),
        "block1/conv1": (3 * 3 * 8 * 8, 4),
        "block1/project": (4 * 8, 3),
        "head": (80, 5),
    }


def test_bottleneck_resnet():
    assert depths(*linen_parts(ResNet(bottleneck=True), IMAGES), IMAGES) == {
        "stem": 0,
        **{f"block0/conv{i}": 1 + i for i in range(3)},
        **{f"block1/conv{i}": 4 + i for i in range(3)},
        "block1/project": 4,
        "head": 7,
    }


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attend")(y)
        y = linen.Dense(16, name="up")(linen.LayerNorm()(x))
        return x + linen.Dense(8, name="down")(linen.gelu(y))


ENCODER = {
    **{f"attend/{name}": (8 * 2 * 4, 0) for name in ("query", "key", "value")},
    "attend/out": (2 * 4 * 8, 1),
    "up": (8 * 16, 2),
    "down": (16 * 8, 3),
}


def deeper(places, prefix, depth):
    return {f"{prefix}{path}": (count, depth + d) for path, (count, d) in places.items()}


class Vit(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (4, 4), strides=(4, 4), name="patches")(x).reshape(x.shape[0], 4, 8)
        x = x + self.param("positions", linen.initializers.zeros, (1, 4, 8))
        for i in range(2):
            x = Encoder(name=f"block{i}")(x)
        return linen.Dense(5, name="head")(x.mean(1))


def test_vit():
    """Queries, keys and values are one step of depth; a table that is added stands beside it."""
    apply, params = linen_parts(Vit(), IMAGES)
    architecture = optax_ext.architecture(apply, params, IMAGES)
    assert places(architecture, params) == {
        "": (4 * 8, 0),
        "patches": (4 * 4 * 3 * 8, 0),
        **deeper(ENCODER, "block0/", 1),
        **deeper(ENCODER, "block1/", 5),
        "head": (40, 9),
    }
    notes = {path: placed.note for path, placed in architecture.items() if placed.note}
    assert notes == {"positions": "by shape: used elementwise"}
    assert architecture["block0/attend/query/bias"].connections is None  # though it has two axes
    assert architecture.max_depth == 9


class EncoderNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def test_attention_of_nnx():
    assert read(*nnx_parts(EncoderNnx), shape(2, 5, 8)) == ENCODER


class TiedTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(50, 8, name="tokens")
        x = embed(tokens)
        x = x + linen.Embed(10, 8, name="positions")(jnp.arange(tokens.shape[1])[None])
        for i in range(2):
            x = Encoder(name=f"block{i}")(x)
        return embed.attend(linen.LayerNorm()(x))


def test_tied_embedding_counts_where_it_is_first_used():
    tokens = shape(2, 6, dtype=jnp.int32)
    assert read(*linen_parts(TiedTransformer(), tokens), tokens) == {
        "tokens": (50 * 8, 0),
        "positions": (10 * 8, 0),
        **deeper(ENCODER, "block0/", 1),
        **deeper(ENCODER, "block1/", 5),
    }


def test_grouped_convolutions_have_connections_within_groups_only():
    class Separable(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(12, (1, 1), name="expand")(x)
            x = linen.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(x)
            x = linen.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
            return linen.ConvTranspose(2, (2, 2), strides=(2, 2), name="upsample")(x)

    assert read(*linen_parts(Separable(), IMAGES), IMAGES) == {
        "expand": (3 * 12, 0),
        "depthwise": (3 * 3 * 12, 1),
        "grouped": (3 * 3 * 3 * 8, 2),
        "upsample": (2 * 2 * 8 * 2, 3),
    }


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.Dense(16, name="up")(linen.LayerNorm(name="norm")(x))
        return x + linen.Dense(8, name="down")(linen.gelu(y)), None


class Scanned(linen.Module):
    remat: bool = False

    @linen.compact
    def __call__(self, x):
        layer = linen.remat(Layer) if self.remat else Layer
        stack = linen.scan(layer, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="stack")(linen.Dense(8, name="in")(x), None)
        return linen.Dense(2, name="out")(x)


@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_have_the_connections_of_one_and_their_mean_depth(remat):
    """Three layers of two steps, from depth 1 on: 1, 3, 5 and 2, 4, 6."""
    apply, params = linen_parts(Scanned(remat), shape(2, 3))
    architecture = optax_ext.architecture(apply, params, shape(2, 3))
    assert places(architecture, params) == {
        "in": (24, 0),
        "stack/up": (8 * 16, 3),
        "stack/down": (16 * 8, 4),
        "out": (16, 7),
    }
    assert architecture.max_depth == 7
    assert architecture["stack/norm/scale"].connections is None  # two axes, but one is the stack's


def test_stacked_layers_of_nnx():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            create = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
            self.stack = nnx.split_rngs(splits=3)(create)(rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.out(step(x, self.stack))

    assert read(*nnx_parts(Stack), shape(2, 4)) == {"stack": (16, 1), "out": (8, 3)}


def test_control_by_data():
    """A branch waits for what chooses it, and a loop may not run at all."""

    def chosen(params, x):
        waits = (x @ params["a"]["kernel"] @ params["b"]["kernel"]).sum() > 0
        return lax.cond(waits, lambda: x, lambda: -x) @ params["out"]["kernel"]

    def skipped(params, x):
        y = x @ params["a"]["kernel"] @ params["b"]["kernel"]
        y = lax.while_loop(lambda y: y.sum() > 1, lambda _: x @ params["c"]["kernel"], y)
        return y @ params["out"]["kernel"]

    params = shapes(a=(4, 4), b=(4, 4), out=(4, 4))
    assert depths(chosen, params, shape(2, 4)) == {"a": 0, "b": 1, "out": 2}
    params = params | shapes(c=(4, 4))
    assert depths(skipped, params, shape(2, 4)) == {"a": 0, "b": 1, "c": 0, "out": 2}


def test_shared_weights_on_branches():
    """The first use is the nearest to the input, whichever comes first in the program."""
    params = shapes(deep=(4, 4), head=(4, 4), out=(4, 4))

    def pyramid(params, x):
        deep = x @ params["deep"]["kernel"] @ params["head"]["kernel"]
        return (deep + x @ params["head"]["kernel"]) @ params["out"]["kernel"]

    assert depths(pyramid, params, shape(2, 4)) == {"deep": 0, "head": 0, "out": 2}


@pytest.mark.parametrize("length", [4, 50])
def test_recurrent_network_is_as_deep_in_one_step_as_in_many(length):
    class Recurrent(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.RNN(linen.OptimizedLSTMCell(4), name="rnn")(x)
            return linen.Dense(2, name="out")(jnp.asarray(x)[:, -1])

    inputs = shape(2, length, 3)
    found = read(*linen_parts(Recurrent(), inputs), inputs)
    cell = {path.rsplit("/", 1)[-1]: place for path, place in found.items()}
    into = {f"i{gate}": (12, 0) for gate in "ifgo"}
    assert cell == {**into, **{f"h{gate}": (16, 1) for gate in "ifgo"}, "out": (8, 2)}


def test_recurrent_network_of_nnx():
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(3, 4, rngs=rngs), rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.asarray(self.rnn(x))[:, -1])

    found = depths(*nnx_parts(Recurrent), shape(2, 5, 3))
    assert found == {"rnn/cell/dense_i": 0, "rnn/cell/dense_h": 1, "out": 2}


@jax.custom_vjp
def matmul(x, w):
    return x @ w


matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def activated(x, w):
    return jax.nn.relu(x @ w)


activated.defjvp(lambda primals, tangents: (activated(*primals), tangents[0] @ primals[1]))


def by_kernel(x, w):
    """A kernel that nothing can be seen of."""

    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out, interpret=True)(x, w)


batched = custom_vmap(lambda x, w: x @ w)
batched.def_vmap(lambda size, is_batched, x, w: (x @ w, True))
partitioned = custom_partitioning(lambda x, w: x @ w)
partitioned.def_partition(
    infer_sharding_from_operands=None,
    partition=lambda *_: None,
    sharding_rule="i j, j k -> i k",
)


def by_root(x, w):
    """The fixed point of something that has weights."""
    return lax.custom_root(lambda y: y - jnp.tanh(x @ w), x, lambda f, y: y - f(y), lambda _, y: y)


OPERATIONS = {
    "dot": lambda x, w: x @ w,
    "jit": jax.jit(lambda x, w: x @ w),
    "checkpoint": jax.checkpoint(lambda x, w: x @ w),
    "custom_vjp": matmul,
    "custom_jvp": activated,
    "nested": jax.jit(jax.checkpoint(jax.jit(matmul))),
    "vmap": jax.vmap(lambda x, w: x @ w, (0, None)),
    "map": lambda x, w: lax.map(lambda row: row @ w, x),
    "einsum": partial(jnp.einsum, "bi,io->bo"),
    "bfloat16": lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "masked": lambda x, w: x @ jnp.where(jnp.tri(*w.shape, dtype=bool), w, 0),
    "standardized": lambda x, w: x @ ((w - w.mean()) / w.std()),
    "transposed": lambda x, w: (w.T @ x.T).T,
    "cond": lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x),
    "switch": lambda x, w: lax.switch(1, [lambda: x, lambda: x @ w]),
    "custom_vmap": batched,
    "custom_partitioning": partitioned,
    "linear_call": lambda x, w: linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, w, x),
    "custom_root": by_root,
    "barrier": lambda x, w: jnp.matmul(*lax.optimization_barrier((x, w))),
    "shard_map": jax.shard_map(
        lambda x, w: lax.psum((x @ w, w), "data")[0],
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(None, "data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    ),
    "pallas": by_kernel,
    "solve": lambda x, w: jnp.linalg.solve(w, x.T).T,
    "lookup": lambda x, w: w[x.argmax(1)],
    "one_row": lambda x, w: w[x.argmax() % 4][None] + x,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(operation):
    """Three in a row, on the side one after the first."""

    def apply(params, x):
        x = operation(x, params["a"]["kernel"])
        y = operation(x, params["b"]["kernel"])
        return operation(y, params["c"]["kernel"]) + operation(x, params["side"]["kernel"])

    names = "a", "b", "c", "side"
    params = shapes(**dict.fromkeys(names, (4, 4)))
    architecture = optax_ext.architecture(apply, params, shape(2, 4))
    expected = dict(zip(names, [(16, 0), (16, 1), (16, 2), (16, 1)], strict=True))
    assert places(architecture, params) == expected
    notes = {placed.note for placed in architecture.parameters}
    assert notes in {
        by_kernel: [{"by shape: in pallas_call"}],
        OPERATIONS["solve"]: [{"by shape: in custom_linear_solve"}],
        by_root: [{""}, {"by shape: in call_hi_primitive"}],  # older JAX can be looked into
    }.get(operation, [{""}])


def test_what_is_not_an_operation():
    """Elementwise products, also by `einsum`, and sums keep their modules out of the statistics."""

    def apply(params, x):
        x = jnp.einsum("bi,i->bi", x, params["scale"]["scale"]) + params["scale"]["bias"][None]
        return jax.nn.softplus(params["beta"]["beta"]) * x @ params["out"]["kernel"]

    params = {
        "scale": {"scale": shape(3), "bias": shape(3)},
        "beta": {"beta": shape()},
        "out": {"kernel": shape(3, 2)},
    }
    assert read(apply, params, shape(5, 3)) == {"out": (6, 0)}


MODULATED = {
    "where": lambda x, a, b: jnp.where(x.sum() > 0, a, b),
    "cond": lambda x, a, b: lax.cond(x.sum() > 0, lambda: a, lambda: b),
    "product": lambda x, a, b: a * jnp.tanh(x.sum()) + b,
}


@pytest.mark.parametrize("modulated", MODULATED.values(), ids=MODULATED)
def test_weights_that_data_modulate_are_data(modulated):
    """A product with them is no operation; the note says what is known of them."""

    def apply(params, x):
        return x @ modulated(x, params["a"]["kernel"], params["b"]["kernel"]) @ params["out"]["w"]

    params = shapes(a=(4, 4), b=(4, 4)) | {"out": {"w": shape(4, 2)}}
    architecture = optax_ext.architecture(apply, params, shape(2, 4))
    assert places(architecture, params) == {"a": (16, 0), "b": (16, 0), "out": (8, 0)}
    notes = {path: placed.note for path, placed in architecture.items() if placed.note}
    assert notes == dict.fromkeys(["a/kernel", "b/kernel"], "by shape: used elementwise")


def test_weight_normalization():
    """Norms that rescale a kernel are no connections, wherever they stand."""

    class Normalized(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.WeightNorm(linen.Dense(4, name="first"), name="norm")(x)
            return linen.Dense(2, name="out")(x)

    apply, params = linen_parts(Normalized(), shape(2, 3))
    assert read(apply, params, shape(2, 3)) == {"first": (12, 0), "out": (8, 1)}


def test_spectral_normalization():
    class Normalized(linen.Module):
        @linen.compact
        def __call__(self, x):
            dense = linen.Dense(4, name="first")
            x = linen.SpectralNorm(dense, name="norm")(x, update_stats=False)
            return linen.Dense(2, name="out")(x)

    apply, params = linen_parts(Normalized(), shape(2, 3))
    assert read(apply, params, shape(2, 3)) == {"first": (12, 0), "out": (8, 1)}


def test_low_rank_adaptation():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(4, 6, lora_rank=2, lora_param_type=nnx.Param, rngs=rngs)
            self.out = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.first(x))

    # The adapter's second product is a step of its own.
    assert read(*nnx_parts(Adapted), shape(2, 4)) == {
        "first": (24, 0),
        "first/lora/lora_a": (4 * 2, 0),
        "first/lora/lora_b": (2 * 6, 1),
        "out": (18, 2),
    }


def test_merged_adaptation():
    """All factors of a product of parameters are kernels of the one operation that it reaches."""

    def apply(params, x):
        product = params["lora"]["a"] @ params["lora"]["b"]
        x = x @ (params["first"]["kernel"] + 0.5 * product) + params["first"]["bias"]
        return x @ params["out"]["kernel"]

    params = shapes(first=(4, 6), out=(6, 3))
    params["first"]["bias"] = shape(1, 6)
    params["lora"] = {"a": shape(4, 2), "b": shape(2, 6)}
    architecture = optax_ext.architecture(apply, params, shape(5, 4))
    assert not any(placed.note for placed in architecture.parameters)
    assert places(architecture, params) == {
        "first": (24, 0),
        "lora/a": (8, 0),
        "lora/b": (12, 0),
        "out": (18, 1),
    }


def by_einsum(x, gates, up, down):
    hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, up))
    return jnp.einsum("beh,ehi,be->bi", hidden, down, gates)


def by_ragged_dot(x, gates, up, down):
    sizes = jnp.bincount(gates.argmax(1), length=3)
    return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, up, sizes)), down, sizes)


@pytest.mark.parametrize("experts", [by_einsum, by_ragged_dot])
def test_mixture_of_experts(experts):
    def apply(params, x):
        gates = jax.nn.softmax(x @ params["router"]["kernel"])
        x = x + experts(x, gates, params["up"]["kernel"], params["down"]["kernel"])
        return x @ params["out"]["kernel"]

    params = shapes(router=(4, 3), up=(3, 4, 8), down=(3, 8, 4), out=(4, 2))
    found = read(apply, params, shape(6, 4))
    # Which rows go to which expert waits for the router; the experts' gates only weigh.
    after = experts is by_ragged_dot
    assert found == {
        "router": (12, 0),
        "up": (96, 0 + after),
        "down": (96, 1 + after),
        "out": (8, 2 + after),
    }


def test_inputs_of_different_distance():
    params = shapes(image=(6, 4), deeper=(4, 4), text=(9, 4), joint=(8, 2))

    def apply(params, image, batch, train):
        assert train is True  # not traced
        x = jnp.tanh(image @ params["image"]["kernel"]) @ params["deeper"]["kernel"]
        y = params["text"]["kernel"][batch["tokens"]].mean(1)
        return {"logits": jnp.concatenate([x, y], 1) @ params["joint"]["kernel"], "name": "two"}

    batch = {"tokens": shape(2, 7, dtype=jnp.int32)}
    assert depths(apply, params, shape(2, 6), batch, True) == {
        "image": 0,
        "deeper": 1,
        "text": 0,
        "joint": 2,
    }


class Noisy(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dropout(0.5, deterministic=False)(linen.Dense(4, name="first")(x))
        return linen.Dense(2, name="out")(x)


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)], ids=["typed", "raw"])
def test_noise_is_no_input(key):
    """Dropped weights are still weights, though their mask comes from a key that is an input."""
    params = jax.eval_shape(Noisy().init, {"params": KEY, "dropout": KEY}, shape(2, 3))

    def apply(params, x, key):
        keep = jax.random.bernoulli(key, 0.5, (3, 4))
        kernel = params["params"]["first"]["kernel"] * keep
        dropped = {"params": {**params["params"], "first": {"kernel": kernel, "bias": jnp.ones(4)}}}
        return Noisy().apply(dropped, x, rngs={"dropout": key})

    expected = {"params/first": (12, 0), "params/out": (8, 1)}
    assert read(apply, params, shape(2, 3), key) == expected


def test_noise_of_every_distribution():
    def apply(params, x, key):
        kernel = params["first"]["kernel"] * jax.random.gamma(key, 2.0, (3, 4))
        return x @ kernel @ params["out"]["kernel"]

    params = shapes(first=(3, 4), out=(4, 2))
    assert read(apply, params, shape(2, 3), KEY) == {"first": (12, 0), "out": (8, 1)}


def test_what_is_not_used_goes_where_its_module_stands():
    params = shapes(a1=(3, 4), a2=(4, 4), a3=(4, 5), a10=(4, 2))
    params["a2"]["mask"] = shape(4, 4)

    def apply(params, x):
        x = x @ params["a1"]["kernel"] @ params["a2"]["kernel"]
        return x @ params["a10"]["kernel"]

    architecture = optax_ext.architecture(apply, params, shape(2, 3))
    assert places(architecture, params) == {
        "a1": (12, 0),
        "a2": (16, 1),
        "a3": (20, 1),
        "a10": (8, 2),
    }
    notes = {path: placed.note for path, placed in architecture.items() if placed.note}
    assert notes == dict.fromkeys(["a2/mask", "a3/kernel"], "by shape and path: not used")


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.vmap], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("module", "inputs"),
    [(ResNet(), IMAGES), (Vit(), IMAGES), (Scanned(), shape(2, 3))],
    ids=["resnet", "vit", "scanned"],
)
def test_wrapped_networks_are_the_same(wrap, module, inputs):
    apply, params = linen_parts(module, inputs)
    plain = optax_ext.architecture(apply, params, inputs)
    if wrap is jax.vmap:
        inputs = shape(3, *inputs.shape)
        wrapped = jax.vmap(apply, (None, 0))
    else:
        wrapped = wrap(apply)
    assert optax_ext.architecture(wrapped, params, inputs) == plain


@st.composite
def graphs(draw):
    """For each node: what it sums, where -1 is the input, and how it is computed."""
    size = draw(st.integers(1, 8))
    return [
        (
            draw(st.lists(st.integers(-1, i - 1), min_size=1, max_size=3)),
            draw(st.sampled_from(["sum", "dot", "jit", "checkpoint", "custom_vjp"])),
        )
        for i in range(size)
    ]


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from([jax.jit, jax.checkpoint]))
def test_depth_is_the_longest_path(graph, wrap):
    def apply(params, x):
        values = {-1: x}
        for i, (sources, kind) in enumerate(graph):
            value = sum(values[source] for source in sources)
            kernel = params[f"n{i}"]["kernel"]
            values[i] = jnp.tanh(value) if kind == "sum" else OPERATIONS[kind](value, kernel)
        return values

    def length(node):
        """Of the longest path from the input, counting nodes that have a kernel."""
        if node < 0:
            return 0
        sources, kind = graph[node]
        return max(map(length, sources)) + (kind != "sum")

    expected = {f"n{i}": length(i) - 1 for i, (_, kind) in enumerate(graph) if kind != "sum"}
    params = shapes(**{f"n{i}": (2, 2) for i in range(len(graph))})
    if not expected:
        with pytest.raises(ValueError, match="brings no array of params together"):
            optax_ext.architecture(apply, params, shape(1, 2))
        return
    for function in (apply, wrap(apply)):
        architecture = optax_ext.architecture(function, params, shape(1, 2))
        used = {f"n{i}" for i, (_, kind) in enumerate(graph) if kind != "sum"}
        assert {n: architecture[f"{n}/kernel"].depth for n in used} == expected
