"""Depth and connections of networks with known answers, read from their traced computations."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

import optax_ext
from optax_ext import _tracing
from support.networks import depths, linen_parts, nnx_parts, notes, places, read, shape, shapes

IMAGES, ROWS = shape(2, 8, 8, 3), shape(2, 4)
TOKENS = shape(2, 6, dtype=jnp.int32)


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attend")(y)
        y = linen.Dense(16, name="up")(linen.LayerNorm()(x))
        return x + linen.Dense(8, name="down")(linen.gelu(y))


# Queries, keys and values are one step of depth.
ATTENTION = {"query": (64, 0), "key": (64, 0), "value": (64, 0), "out": (64, 1)}
BLOCK = {
    **{f"block/attend/{name}": (count, 1 + depth) for name, (count, depth) in ATTENTION.items()},
    "block/up": (8 * 16, 3),
    "block/down": (16 * 8, 4),
}


class Transformer(linen.Module):
    """The embedding is also the head; a table of positions is added."""

    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(50, 8, name="tokens")
        positions = self.param("positions", linen.initializers.zeros, (1, 6, 8))
        x = Encoder(name="block")(embed(tokens) + positions)
        return embed.attend(linen.LayerNorm()(x))


class Convolutions(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(12, (3, 3), feature_group_count=3, name="depthwise")(x)
        x = linen.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
        return linen.ConvTranspose(2, (2, 2), strides=(2, 2), name="upsample")(x)


CONVOLUTIONS = {
    "depthwise": (3 * 3 * 12, 0),
    "grouped": (3 * 3 * 3 * 8, 1),
    "upsample": (2 * 2 * 8 * 2, 2),
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


# Three layers of two steps each, from depth 1 on: 1, 3, 5 and 2, 4, 6.
SCANNED = {
    "in": (32, 0),
    "stack/up": (8 * 16, 3),
    "stack/down": (16 * 8, 4),
    "out": (16, 7),
}


class Recurrent(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.RNN(linen.OptimizedLSTMCell(4, name="cell"), name="rnn")(x)
        return linen.Dense(2, name="out")(jnp.asarray(x)[:, -1])


RECURRENT = {
    **{f"cell/i{gate}": (12, 0) for gate in "ifgo"},
    **{f"cell/h{gate}": (16, 1) for gate in "ifgo"},
    "out": (8, 2),
}


def test_tables_that_are_added():
    """A table of positions has the depth of the embedding that it is added to."""
    apply, params = linen_parts(Transformer(), TOKENS)
    architecture = optax_ext.architecture(apply, params, TOKENS)
    assert notes(architecture) == {"positions": "by shape: used elementwise"}
    assert places(architecture, params) == {"": (6 * 8, 0), "tokens": (50 * 8, 0), **BLOCK}
    assert architecture["block/attend/query/bias"].connections is None  # though it has two axes
    assert architecture.max_depth == 4


def attention_nnx(rngs):
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)


class ScannedNnx(nnx.Module):
    def __init__(self, rngs):
        create = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
        self.stack = nnx.split_rngs(splits=3)(create)(rngs)
        self.out = nnx.LoRALinear(4, 2, lora_rank=3, lora_param_type=nnx.Param, rngs=rngs)

    def __call__(self, x):
        step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.out(step(x, self.stack))


ADAPTED = {
    "stack": (16, 1),
    "out": (8, 3),
    "out/lora/lora_a": (12, 3),
    "out/lora/lora_b": (6, 4),  # the adapter's second product is a step of its own
}


def haiku_parts():
    """Return a `layer_stack`: modules are keys with slashes, and a scan takes all of them."""

    def layer(x, params):
        norm, linear = params["stack/norm"], params["stack/linear"]
        x = x / x.std() * norm["scale"][None] + norm["offset"][None]
        return jnp.tanh(x @ linear["w"] + linear["b"][None]), None

    norm, linear = dict.fromkeys(("scale", "offset"), shape(5, 4)), {"w": shape(5, 4, 4)}
    params = {"stack/norm": norm, "stack/linear": {**linear, "b": shape(5, 4)}}
    return lambda params, x: lax.scan(layer, x, params)[0], params


NETWORKS = {
    "convolutions": (partial(linen_parts, Convolutions()), IMAGES, CONVOLUTIONS),
    "scanned": (partial(linen_parts, Scanned()), ROWS, SCANNED),
    "scanned, remat": (partial(linen_parts, Scanned(remat=True)), ROWS, SCANNED),
    # As deep in few steps as in many.
    "recurrent, 4 steps": (partial(linen_parts, Recurrent()), shape(2, 4, 3), RECURRENT),
    "recurrent, 50 steps": (partial(linen_parts, Recurrent()), shape(2, 50, 3), RECURRENT),
    "nnx, attention": (lambda _: nnx_parts(attention_nnx), shape(2, 5, 8), ATTENTION),
    "nnx, stack and adapter": (lambda _: nnx_parts(ScannedNnx), ROWS, ADAPTED),
    "haiku": (lambda _: haiku_parts(), ROWS, {"stack/linear": (16, 2)}),
}


@pytest.mark.parametrize(("build", "inputs", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_networks(build, inputs, expected):
    assert read(*build(inputs), inputs) == expected


@jax.custom_vjp
def matmul(x, w):
    return x @ w


matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def activated(x, w):
    return jax.nn.relu(x @ w)


activated.defjvp(lambda primals, tangents: (activated(*primals), tangents[0] @ primals[1]))


def by_kernel(x, w, b):
    """Multiply and add in a kernel that can't be looked into."""

    def kernel(x_ref, w_ref, b_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...] + b_ref[...][None]

    return pl.pallas_call(kernel, jax.eval_shape(jnp.matmul, x, w), interpret=True)(x, w, b)


def dropped(x, w):
    """Drop weights at random, by a key that is an input."""
    return x @ (w * jax.random.bernoulli(jax.random.key(x[0, 0].astype(int)), 0.5, w.shape))


OPERATIONS = {
    "dot": lambda x, w: x @ w,
    "jit": jax.jit(lambda x, w: x @ w),
    "checkpoint": jax.checkpoint(lambda x, w: x @ w),
    "custom_vjp": matmul,
    "custom_jvp": activated,
    "nested": jax.jit(jax.checkpoint(jax.jit(matmul))),
    "equinox": jax.vmap(lambda x, w: w @ x, (0, None)),
    "map": lambda x, w: lax.map(lambda row: row @ w, x),
    "einsum": lambda x, w: jnp.einsum("bi,eio->bo", x, w[None]),
    "ragged_dot": lambda x, w: lax.ragged_dot(x, w[None], jnp.array([2])),
    "bfloat16": lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "masked": lambda x, w: x @ jnp.where(jnp.tri(*w.shape, dtype=bool), w, 0),
    "dropped": dropped,
    "standardized": lambda x, w: x @ ((w - w.mean()) / w.std()),
    "transposed": lambda x, w: (w.T @ x.T).T,
    "cond": lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x),
    "switch": lambda x, w: lax.switch(1, [lambda: x, lambda: x @ w]),
    "barrier": lambda x, w: jnp.matmul(*lax.optimization_barrier((x, w))),
    "shard_map": jax.shard_map(
        lambda x, w: lax.psum((x @ w, w), "data")[0],
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(None, "data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    ),
    "lookup": lambda x, w: w[x.argmax(1)],
    "one_row": lambda x, w: w[x.argmax() % 4][None] + x,
    "pallas": lambda x, w: by_kernel(x, w, jnp.zeros(4)),
    "solve": lambda x, w: jnp.linalg.solve(w, x.T).T,
}
OPAQUE = {"pallas": "by shape: in pallas_call", "solve": "by shape: in custom_linear_solve"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    """Apply each operation three times in a row, and once on a side path."""
    operation = OPERATIONS[name]

    def apply(params, x):
        x = operation(x, params["a"]["kernel"])
        y = operation(x, params["b"]["kernel"])
        return operation(y, params["c"]["kernel"]) + operation(x, params["side"]["kernel"])

    params = shapes(a=(4, 4), b=(4, 4), c=(4, 4), side=(4, 4))
    architecture = optax_ext.architecture(apply, params, ROWS)
    expected = {"a": (16, 0), "b": (16, 1), "c": (16, 2), "side": (16, 1)}
    assert places(architecture, params) == expected
    assert {placed.note for placed in architecture.parameters} == {OPAQUE.get(name, "")}


def test_vectors_in_a_kernel_that_can_not_be_read():
    params = {"w": shape(4, 4), "b": shape(4)}
    architecture = optax_ext.architecture(lambda p, x: by_kernel(x, p["w"], p["b"]), params, ROWS)
    assert architecture["b"].connections is None
    assert notes(architecture) == {"w": OPAQUE["pallas"]}


@st.composite
def graphs(draw):
    """Return for each node what it sums, where -1 is the input, and how it is computed."""
    kinds = st.sampled_from(["sum", "dot", "jit", "checkpoint", "custom_vjp"])
    sources = [st.lists(st.integers(-1, i - 1), min_size=1, max_size=3) for i in range(8)]
    return [(draw(source), draw(kinds)) for source in sources[: draw(st.integers(1, 8))]]


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from([lambda f: f, jax.jit, jax.checkpoint]))
def test_depth_is_the_longest_path(graph, wrap):
    def apply(params, x):
        values = {-1: x @ params["first"]["kernel"]}
        for i, (sources, kind) in enumerate(graph):
            value = sum(values[source] for source in sources)
            kernel = params[f"n{i}"]["kernel"]
            values[i] = jnp.tanh(value) if kind == "sum" else OPERATIONS[kind](value, kernel)
        return values

    def length(node):
        """Count the kernels on the longest path from the input to the node."""
        if node < 0:
            return 1
        sources, kind = graph[node]
        return max(map(length, sources)) + (kind != "sum")

    params = shapes(first=(2, 2), **{f"n{i}": (2, 2) for i in range(len(graph))})
    architecture = optax_ext.architecture(wrap(apply), params, shape(1, 2))
    used = [i for i, (_, kind) in enumerate(graph) if kind != "sum"]
    found = {i: architecture[f"n{i}/kernel"].depth for i in used}
    assert found == {i: length(i) - 1 for i in used}


def in_turn(names, x, params):
    for name in names:
        x = jnp.tanh(x @ params[name]["kernel"])
    return x


def chosen(params, x):
    """Choose a branch by data, for which it waits."""
    waits = in_turn("ab", x, params).sum() > 0
    return lax.cond(waits, lambda: x, lambda: -x) @ params["out"]["kernel"]


def skipped(params, x):
    """Take the result of a loop that may not run at all."""
    body = lambda _: in_turn("a", x, params)  # noqa: E731
    y = lax.while_loop(lambda y: y.sum() > 1, body, in_turn("bc", x, params))
    return y @ params["out"]["kernel"]


def first_use(params, x):
    """Use b nearer to the input than it first comes in the program."""
    return (in_turn("ab", x, params) + in_turn("b", x, params)) @ params["out"]["kernel"]


def repeated(params, x):
    return in_turn(["a", "b", "b", "b", "out"], x, params)


def looped(params, x):
    body = lambda _, x: in_turn("b", x, params)  # noqa: E731
    return in_turn(["out"], lax.fori_loop(0, 10**9, body, in_turn("a", x, params)), params)


def until(params, x):
    body = lambda x: in_turn("b", x, params)  # noqa: E731
    x = lax.while_loop(lambda x: x.sum() > 1, body, in_turn("a", x, params))
    return in_turn(["out"], x, params)


def deep_start(params, x):
    """Start a loop deeper than it goes on: the first step is the deepest, others use c first."""
    start = in_turn("ab", x[:1], params)
    _, collected = lax.scan(lambda y, x: (x[None], in_turn("c", y, params)), start, x)
    return collected @ params["out"]["kernel"]


def joined(params, x):
    """Join kernels side by side, and a row of biases to a kernel."""
    kernels = [params[name]["kernel"] for name in "ab"]
    kernel = jnp.concatenate([params["out"]["kernel"], jnp.sum(kernels[0], 0)[None]])
    x = (x @ jnp.concatenate(kernels, 1)).reshape(4, 4)
    return jnp.concatenate([x, jnp.ones((4, 1))], 1) @ kernel


def merged(params, x):
    """Multiply parameters before they meet data: all factors are kernels of one operation."""
    product = params["a"]["kernel"] @ params["b"]["kernel"]
    return x @ (params["c"]["kernel"] + product) @ params["out"]["kernel"]


PATHS = {
    chosen: {"a": 0, "b": 1, "out": 2},
    skipped: {"a": 0, "b": 0, "c": 1, "out": 2},
    first_use: {"a": 0, "b": 0, "out": 2},
    repeated: {"a": 0, "b": 1, "out": 2},
    looped: {"a": 0, "b": 1, "out": 2},
    until: {"a": 0, "b": 1, "out": 2},
    deep_start: {"a": 0, "b": 1, "c": 0, "out": 3},
    joined: {"a": 0, "b": 0, "out": 1},
    merged: {"a": 0, "b": 0, "c": 0, "out": 1},
}


@pytest.mark.parametrize("apply", PATHS, ids=lambda apply: apply.__name__)
def test_paths(apply):
    params = shapes(**dict.fromkeys(PATHS[apply], (4, 4)))
    assert depths(apply, params, ROWS) == PATHS[apply]


def test_inputs_at_different_distances():
    params = shapes(image=(6, 4), deeper=(4, 4), text=(9, 4), joint=(8, 2))

    def apply(params, image, batch, train):
        assert train is True  # not traced
        x = in_turn(["image", "deeper"], image, params)
        y = params["text"]["kernel"][batch["tokens"]].mean(1)
        return {"logits": jnp.concatenate([x, y], 1) @ params["joint"]["kernel"], "name": "two"}

    found = depths(apply, params, shape(2, 6), {"tokens": TOKENS}, True)
    assert found == {"image": 0, "deeper": 1, "text": 0, "joint": 2}


def test_elementwise_products_are_no_operations():
    def apply(params, x):
        x = jnp.einsum("bi,i->bi", x, params["scale"]["scale"]) + params["scale"]["bias"][None]
        return jax.nn.softplus(params["beta"]["beta"]) * x @ params["out"]["kernel"]

    params = {"scale": {"scale": shape(3), "bias": shape(3)}, "beta": {"beta": shape()}}
    assert read(apply, params | shapes(out=(3, 2)), shape(5, 3)) == {"out": (6, 0)}


MODULATED = {
    "where": lambda x, a, b: jnp.where(x.sum() > 0, a, b),
    "cond": lambda x, a, b: lax.cond(x.sum() > 0, lambda: a, lambda: b),
    "product": lambda x, a, b: a * jnp.tanh(x.sum()) + b,
    "scatter": lambda x, a, b: (x.T @ x).at[jnp.arange(4)].add(a) * b,
}


@pytest.mark.parametrize("modulated", MODULATED.values(), ids=MODULATED)
def test_weights_that_data_modulate_are_data(modulated):
    def apply(params, x):
        w = modulated(x, params["a"]["kernel"], params["b"]["kernel"])
        return x @ w @ params["out"]["kernel"]

    params = shapes(a=(4, 4), b=(4, 4), out=(4, 2))
    architecture = optax_ext.architecture(apply, params, ROWS)
    assert places(architecture, params) == {"a": (16, 0), "b": (16, 0), "out": (8, 0)}
    noted = dict.fromkeys(["a/kernel", "b/kernel"], "by shape: used elementwise")
    assert notes(architecture) == noted


def test_unused_weights_are_where_their_module_is():
    params = shapes(a1=(4, 4), a2=(4, 4), a3=(4, 5), a10=(4, 2))
    params["a2"]["mask"] = shape(4, 4)
    params["a1"]["count"] = shape(dtype=jnp.int32)
    apply = lambda params, x: in_turn(["a1", "a2", "a10"], x, params)  # noqa: E731
    architecture = optax_ext.architecture(apply, params, ROWS)
    found = {path: (placed.connections, placed.depth) for path, placed in architecture.items()}
    assert found == {
        "a1/count": (None, 0),
        "a1/kernel": (16, 0),
        "a10/kernel": (8, 2),
        "a2/kernel": (16, 1),
        "a2/mask": (None, 1),
        "a3/kernel": (20, 1),
    }
    unused = dict.fromkeys(["a1/count", "a2/mask", "a3/kernel"], "by shape and path: not used")
    assert notes(architecture) == unused


def scanned(stack, x, **options):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack, **options)[0]


def two_values(stack, x):
    """Change one of two values in each step, as reversible networks do."""
    step = lambda carry, w: ((carry[1], carry[0] + carry[1] @ w), None)  # noqa: E731
    return sum(lax.scan(step, (x, x), stack)[0])


def three_values(stack, x):
    """Change one of three values in turn: no level grows by the same number in each step."""
    step = lambda carry, w: ((*carry[1:], carry[0] @ w), None)  # noqa: E731
    return sum(lax.scan(step, (x, x, x), stack)[0])


def nested(stack, x):
    step = lambda x, w: (scanned(w, x), None)  # noqa: E731
    return lax.scan(step, x, stack.reshape(3, 2, 4, 4))[0]


# The depths that six layers have, and the depth after them.
STACKS = {
    "scan": (scanned, range(6), 6),
    "reverse": (partial(scanned, reverse=True), range(6), 6),
    "unroll": (partial(scanned, unroll=2), range(6), 6),
    "checkpoint": (jax.checkpoint(scanned), range(6), 6),
    "vmap": (lambda w, x: jax.vmap(scanned, (None, 0))(w, x[None])[0], range(6), 6),
    "prepared": (lambda w, x: scanned(lax.map(jnp.tanh, w).mT.mT, x), range(6), 6),
    "two values": (two_values, range(6), 6),
    "three values": (three_values, range(2), 2),
    "nested": (nested, range(6), 6),
    "side by side": (lambda w, x: lax.map(lambda w: x @ w, w).sum(0), [0], 1),
    "again": (lambda w, x: scanned(w, scanned(w, x)), range(6), 6),
    "and whole": (lambda w, x: scanned(w, x) + jnp.einsum("bi,kio->bo", x, w), [0], 6),
    "and rows": (
        lambda w, x: scanned(w, x) + lax.map(lambda row: (row @ x.T).sum(), w.swapaxes(0, 1)).sum(),
        range(6),
        6,
    ),
    "both ways": (lambda w, x: scanned(w, x) + scanned(w, x, reverse=True), range(3), 6),
}


@pytest.mark.parametrize(("stack", "levels", "after"), STACKS.values(), ids=STACKS)
def test_stacked_layers(stack, levels, after):
    """A stack has the connections of a layer, and the mean of all depths that layers have."""
    apply = lambda params, x: stack(params["stack"]["w"], x) @ params["out"]["w"]  # noqa: E731
    params = {"stack": {"w": shape(6, 4, 4)}, "out": {"w": shape(4, 2)}}
    architecture = optax_ext.architecture(apply, params, ROWS)
    connections = 6 * 16 / len(levels)
    expected = {"stack": (connections, sum(levels) / len(levels)), "out": (8, after)}
    assert places(architecture, params) == expected
    assert architecture.max_depth == after
    assert not notes(architecture)


@st.composite
def bodies(draw):
    """Return the operations of a step, which values it carries on, and how they start."""
    carried, count = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kinds = st.sampled_from(["a", "b", "c", "shared", "add"])
    index = [st.integers(0, carried + i) for i in range(count + 1)]
    operations = [(draw(kinds), draw(index[i]), draw(index[i])) for i in range(count)]
    starts = st.sampled_from(["input", "zeros", "deep"])
    return operations, [(draw(index[-1]), draw(starts)) for _ in range(carried)]


@settings(max_examples=30, deadline=None)
@given(bodies(), st.sampled_from([1, 2, 3, 8]))
def test_scans_are_as_deep_as_the_same_steps_one_by_one(body, length):
    operations, carried = body

    def step(params, carry, x, weights):
        values = [x, *carry]
        for kind, i, j in operations:
            kernel = {"shared": params["shared"], **weights}.get(kind)
            values.append(values[i] + values[j] if kernel is None else values[i] @ kernel)
        return [values[i] for i, _ in carried], None

    def apply(params, x):
        x = x @ params["in"]
        starts = {"input": x, "zeros": jnp.zeros_like(x), "deep": x @ params["deep"]}
        carry = [starts[start] for _, start in carried]
        if "a" in params:
            stacks = {name: params[name] for name in "abc"}
            carry, _ = lax.scan(lambda carry, w: step(params, carry, x, w), carry, stacks)
        else:
            for i in range(length):
                carry, _ = step(params, carry, x, {name: params[f"{name}{i}"] for name in "abc"})
        return sum(carry, x) @ params["out"]

    plain = {name: shape(4, 4) for name in ("in", "deep", "shared", "out")}
    layers = {f"{name}{i}": shape(4, 4) for name in "abc" for i in range(length)}
    stacks = {name: shape(length, 4, 4) for name in "abc"}
    one_by_one = optax_ext.architecture(apply, plain | layers, ROWS)
    scanned = optax_ext.architecture(apply, plain | stacks, ROWS)
    assert [scanned[name].depth for name in plain] == [one_by_one[name].depth for name in plain]
    for name in "abc":
        alone = [one_by_one[f"{name}{i}"] for i in range(length)]
        levels = {placed.depth for placed in alone if not placed.note}
        assert not levels or scanned[name].depth == pytest.approx(sum(levels) / len(levels))


def test_time_does_not_depend_on_the_length(monkeypatch):
    """The body is read as often for 10,000 layers as for 10."""

    def apply(params, x):
        def step(x, w):
            x = x + jnp.tanh(x @ w["a"]["kernel"]) @ w["b"]["kernel"]
            return x @ w["c"]["kernel"], x

        _, collected = lax.scan(step, x, {name: params[name] for name in "abc"})
        return collected[-1] @ params["out"]["kernel"]

    run = _tracing._Run
    equation = mock.Mock(side_effect=run.equation)
    monkeypatch.setattr(run, "equation", lambda *arguments: equation(*arguments))
    counts = []
    for n in (10, 10_000):
        equation.reset_mock()
        params = shapes(a=(n, 4, 4), b=(n, 4, 4), c=(n, 4, 4), out=(4, 2))
        first = 3 * (n - 1) / 2  # the mean of 0, 3, 6, ...
        stacks = {"a": (16, first), "b": (16, first + 1), "c": (16, first + 2)}
        assert read(apply, params, ROWS) == {**stacks, "out": (8, 3 * n - 1)}
        counts.append(equation.call_count)
    assert counts[0] == counts[1] < 100


def prefetched(stack, x):
    """Multiply in each step by the layer of the step before."""
    step = lambda carry, w: ((carry[0] @ carry[1], w), None)  # noqa: E731
    return lax.scan(step, (x, jnp.eye(4)), stack)[0][0]


SLICED = {
    "index": lambda w, x: x @ w[0] @ w[1] @ w[2],
    "elements": lambda w, x: sum(x @ layer for layer in w),
    "split": lambda w, x: x @ jnp.split(w, 3)[1][0],
    "take": lambda w, x: x @ jnp.take(w, 2, axis=0),
    "counter": lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x),
    "prefetched": prefetched,
    "flipped": lambda w, x: scanned(w[::-1], x),
    "part": lambda w, x: scanned(w[1:], x),
    "joined": lambda w, x: scanned(jnp.concatenate([w, w]), x),
}


@pytest.mark.parametrize("sliced", SLICED.values(), ids=SLICED)
def test_other_slices_are_read_by_shape(sliced):
    apply = lambda params, x: sliced(params["stack"]["w"], x) @ params["out"]["w"]  # noqa: E731
    params = {"stack": {"w": shape(3, 4, 4)}, "out": {"w": shape(4, 2)}}
    architecture = optax_ext.architecture(apply, params, ROWS)
    assert places(architecture, params) == {"stack": (48, 0), "out": (8, 1)}
    assert notes(architecture) == {"stack/w": "by shape: sliced"}


CHANGED = {
    "inside": lambda w, changes, x: lax.scan(lambda x, c: (x @ (w + c), None), x, changes)[0],
    "before": lambda w, changes, x: scanned(w[None] + changes, x),
    "by map": lambda w, changes, x: scanned(lax.map(lambda change: w + change, changes), x),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_one_kernel_with_a_change_in_each_layer(changed):
    """A repeated kernel is whole in every layer."""
    apply = lambda params, x: changed(params["w"], params["changes"], x)  # noqa: E731
    params = {"w": shape(4, 4), "changes": shape(3, 4, 4)}
    assert read(apply, params, ROWS) == {"w": (16, 0), "changes": (16, 1)}
