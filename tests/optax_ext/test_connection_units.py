"""The units of CaAdam: which leaves are kernels, and which kernel the other leaves go with."""

import warnings
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import optax_ext
from support.networks import shape
from support.strategies import filled


def scales(params, **options):
    """The scale of every leaf, in the params' place."""
    tx = optax_ext.scale_by_connections(**{"scaling": "additive", "strength": 0.5} | options)
    vector = tx.init(filled(params, 0)).connection_scale
    return jax.tree.unflatten(jax.tree.structure(params), list(map(float, vector)))


def units(params):
    """Connections of every unit that has any."""
    table = optax_ext.connection_table(params, scaling="depth")
    return {row.path: row.connections for row in table if row.connections is not None}


# Kernel and bias of three layers. Two of the biases fit two of the kernels.
LAYERS = [((3, 8), (8,)), ((8, 8), (8,)), ((8, 2), (2,))]
SCALES = [1.0, 0.5, 1.5]  # of 24, 64 and 16 connections


def flat(kernel, bias):
    """Stores layers in one dictionary, under names that the layer's number completes."""

    def store(layers):
        named = enumerate(layers, 1)
        return dict(chain(*[((kernel.format(i), w), (bias.format(i), b)) for i, (w, b) in named]))

    return store


LAYOUTS = {
    "modules": lambda layers: [{"kernel": w, "bias": b} for w, b in layers],
    "pairs": list,
    "list": lambda layers: list(chain(*layers)),
    "tuple": lambda layers: tuple(chain(*layers)),
    "letters": flat("w{}", "b{}"),
    "capitals": flat("W{}", "b{}"),
    "two digits": flat("w1{}", "b1{}"),
    "suffixes": flat("layer{}_w", "layer{}_b"),
    "words": flat("kernel_{}", "bias_{}"),
    "slashes": flat("dense{}/kernel", "dense{}/bias"),
    "dots": flat("dense{}.weight", "dense{}.bias"),
    "haiku": lambda layers: {f"~/linear_{i}": {"w": w, "b": b} for i, (w, b) in enumerate(layers)},
    "in a module": lambda layers: {"mlp": flat("w{}", "b{}")(layers)},
}
STORED = {
    "last axis": lambda w, b: (shape(*w), shape(*b)),
    "first axis": lambda w, b: (shape(*w[::-1]), shape(*b)),
    "rows": lambda w, b: (shape(*w), shape(1, *b)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_layers_are_units_however_they_are_stored(layout, stored):
    params = layout([stored(*layer) for layer in LAYERS])
    assert scales(params) == layout([(scale, scale) for scale in SCALES])


def test_matrices_of_attention_in_one_module():
    """Each is a unit; a normalization's vectors go with one that they fit."""
    matrices = {f"w{name}": shape(4, 4) for name in "qkv"} | {"wo": shape(4, 8)}
    biases = {f"b{name}": shape(4) for name in "qkv"} | {"bo": shape(8)}
    params = {"attend": matrices | biases, "up": {"kernel": shape(8, 16)}}
    assert units(params) == {
        **{f"attend/w{name}": 16 for name in "kqv"},
        "attend/wo": 32,
        "up": 128,
    }
    found = scales(params, overrides={"attend/wk": {"scale": 3.0}, "attend/wq": {"scale": 4.0}})
    assert (found["attend"]["bk"], found["attend"]["bq"]) == (3.0, 4.0)


NAMED = flat("w{}", "b{}")([STORED["last axis"](*layer) for layer in LAYERS])


def test_vectors_that_fit_no_kernel_are_not_scaled():
    params = {**NAMED, "positions": shape(5), "temperature": shape()}
    found = scales(params)
    assert (found["positions"], found["temperature"]) == (1.0, 1.0)
    table = optax_ext.connection_table(params, scaling="depth")
    assert [row[:3] for row in table] == [
        ("", 6, None),
        ("w1", 32, 24),
        ("w2", 72, 64),
        ("w3", 18, 16),
    ]


def test_a_list_of_a_network_with_normalizations():
    """Keras lists every vector after the kernel that it belongs to."""
    convolutions = [[shape(3, 3, 4, 4), *[shape(4)] * 3], [shape(3, 3, 4, 4), *[shape(4)] * 3]]
    params = [*chain(*convolutions), shape(4, 2), shape(2)]
    found = scales(params, overrides={"0": {"scale": 2.0}, "4": {"scale": 3.0}})
    assert found == [2.0] * 4 + [3.0] * 4 + [1.5] * 2


def normalized(vector):
    """Three layers and a normalization, whose vectors have this shape."""
    return {
        "conv": {"w": shape(3, 3, 4, 16), "b": shape(*vector)},
        "norm": {"scale": shape(*vector), "offset": shape(*vector)},
        "pointwise": {"w": shape(1, 1, 16, 16)},
        "out": {"w": shape(16, 3)},
    }


@pytest.mark.parametrize("vector", [(1, 16), (16, 1, 1), (1, 16, 1, 1), (1, 1, 1, 16)], ids=str)
def test_vectors_are_the_same_however_many_axes_they_have(vector):
    """The vectors are normalizations in their own modules, and biases in modules with kernels."""
    assert scales(normalized(vector)) == scales(normalized((16,)))


@pytest.mark.parametrize("vector", [(1, 16), (16, 1), (16, 1, 1), (1, 1, 1, 16)], ids=str)
def test_vectors_are_the_same_to_an_architecture(vector):
    """Known to be used elementwise they are no layers, also one that is alone in its module."""

    def apply(params, x):
        x = x @ params["first"]["w"] * params["norm"]["scale"].reshape(1, 16)
        x = x + params["norm"]["offset"].reshape(1, 16)
        return x @ params["out"]["w"] * params["gain"]["g"].reshape(1, 16)

    def read_both(vector):
        params = {
            "first": {"w": shape(4, 16)},
            "norm": {"scale": shape(*vector), "offset": shape(*vector)},
            "out": {"w": shape(16, 16)},
            "gain": {"g": shape(*vector)},
        }
        architecture = optax_ext.architecture(apply, params, shape(2, 4))
        options = {"scaling": "depth", "architecture": architecture}
        return architecture, optax_ext.connection_table(params, **options)

    assert read_both(vector) == read_both((16,))


def resnet50(broadcast):
    """Haiku's: 53 convolutions, a `BatchNorm` for each of them, and a head.

    `broadcast` is the shape of its vectors but for the channels, which are last.
    """

    def convolution(module, norm, window, inputs, outputs):
        vector = shape(*broadcast, outputs)
        kernel = shape(window, window, inputs, outputs)
        return {module: {"w": kernel}, norm: {"offset": vector, "scale": vector}}

    params = convolution("initial_conv", "initial_batchnorm", 7, 3, 64)
    inputs = 64
    for group, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            path = f"block_group_{group}/~/block_{block}/~/"
            sizes = (1, inputs, width), (3, width, width), (1, width, 4 * width)
            for i, size in enumerate(sizes):
                params |= convolution(f"{path}conv_{i}", f"{path}batchnorm_{i}", *size)
            if block == 0:
                names = f"{path}shortcut_conv", f"{path}shortcut_batchnorm"
                params |= convolution(*names, 1, inputs, 4 * width)
            inputs = 4 * width
    return params | {"logits": {"w": shape(2048, 1000), "b": shape(1000)}}


@pytest.mark.parametrize("scaling", ["additive", "multiplicative", "signed", "depth"])
def test_normalizations_of_a_resnet_are_no_layers(scaling):
    params = resnet50((1, 1, 1))
    assert len(jax.tree.leaves(params)) == 161
    table = optax_ext.connection_table(params, scaling=scaling)
    assert table == optax_ext.connection_table(resnet50(()), scaling=scaling)
    assert sum(row.connections is not None for row in table) == 54


def test_weight_normalization():
    """Equinox': the norms are (out, 1), which is a kernel's shape, so the computation must tell."""
    params = [
        {"layer": {"weight": shape(8, 4), "bias": shape(8)}, "g": shape(8, 1)},
        {"layer": {"weight": shape(3, 8), "bias": shape(3)}, "g": shape(3, 1)},
    ]

    def apply(params, x):
        for wrapped in params:
            v = wrapped["layer"]["weight"]
            w = wrapped["g"] * v / jnp.linalg.norm(v, axis=1, keepdims=True)
            x = w @ x + wrapped["layer"]["bias"]
        return x

    architecture = optax_ext.architecture(apply, params, shape(4))
    table = optax_ext.connection_table(params, scaling="depth", architecture=architecture)
    assert [row[1:4] for row in table] == [
        (8, None, None),
        (40, 32, 0),
        (3, None, None),
        (27, 24, 1),
    ]
    convolution = {"layer": {"weight": shape(8, 2, 3, 3), "bias": shape(8, 1, 1)}}
    assert units({**convolution, "g": shape(8, 1, 1, 1)}) == {"layer": 144}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"a": {"w": shape(1, 16), "b": shape(16)}}, {"a": 16}),
        ({"a": {"w": shape(16, 1), "b": shape(1)}}, {"a": 16}),
        ({"a": {"w": shape(16, 1)}}, {"a": 16}),
        ({"a": {"w": shape(1, 1), "b": shape(1)}}, {"a": 1}),
        ({"a": {"w": shape(1, 1, 16, 1), "b": shape(1)}}, {"a": 16}),
        ({"a": {"weight": shape(1, 16, 1, 1), "bias": shape(1, 1, 1)}}, {"a": 16}),
        ({"a": {"w": shape(1, 1, 4, 16), "b": shape(1, 1, 1, 16)}}, {"a": 64}),
        # A flat one from one number to one.
        (
            [shape(1, 16), shape(16), shape(16, 16), shape(16), shape(16, 1), shape(1)],
            {"0": 16, "2": 256, "4": 16},
        ),
    ],
    ids=lambda x: str(jax.tree.map(lambda x: getattr(x, "shape", x), x)),
)
def test_kernels_of_one_input_or_output(params, expected):
    assert units(params) == expected


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [((8, 2, 4), (2, 4)), ((8, 1, 4), (1, 4)), ((3, 8, 16), (3, 16)), ((3, 2, 4, 8), (3, 8))],
)
def test_biases_of_several_axes(kernel, bias):
    """The biases of attention's heads and of stacked layers are no kernels."""
    size = np.prod(kernel)
    assert units({"a": {"bias": shape(*bias), "kernel": shape(*kernel)}}) == {"a": size}
    assert units({"a": [shape(*kernel), shape(*bias), shape(4, 4)]}) == {"a/0": size, "a/2": 16}


def test_leaves_stay_as_the_authors_count_them():
    table = optax_ext.connection_table(
        {"norm": shape(1, 1, 1, 8), "w": shape(4, 8)}, scaling="additive", units="leaf"
    )
    assert [row.connections for row in table] == [8, 32]


def mlp(params, x):
    for i in (1, 2, 3):
        x = x @ params[f"w{i}"] + params[f"b{i}"][None]
    return x


def test_architecture_of_a_flat_tree():
    """Biases go with the kernel that they stand beside, whatever their names."""
    crossed = {**NAMED, "b1": NAMED["b2"], "b2": NAMED["b1"], "scale": shape(8)}

    def apply(params, x):
        x = x @ params["w1"] + params["b2"][None]
        x = (x @ params["w2"] + params["b1"][None]) * params["scale"][None]
        return x @ params["w3"] + params["b3"][None]

    for function, params, order in (
        (mlp, NAMED, ("b1", "b2", "b3")),
        (apply, crossed, ("b2", "b1", "b3")),
    ):
        architecture = optax_ext.architecture(function, params, shape(5, 3))
        found: Any = scales(params, architecture=architecture)
        assert [found[f"w{i}"] for i in (1, 2, 3)] == SCALES
        assert [found[name] for name in order] == SCALES
        by_depth: Any = scales(params, scaling="depth", strength=7.0, architecture=architecture)
        assert [by_depth[name] for name in order] == pytest.approx([4.0, 2.0, 1.0])
    assert found["scale"] == SCALES[1]


def test_tables_of_a_flat_tree_count_as_in_a_module_of_their_own():
    """An added array is no kernel's bias if it has another shape."""
    sizes = {"embed": (20, 8), "positions": (5, 8), "up": (8, 16), "out": (16, 3)}

    def apply(params, tokens):
        x = params["embed"][tokens] + params["positions"][None]
        return x @ params["up"] @ params["out"]

    flat_params = {name: shape(*size) for name, size in sizes.items()}
    architecture = optax_ext.architecture(apply, flat_params, shape(2, 5, dtype=jnp.int32))
    placed = {name: (x.connections, x.depth) for name, x in architecture.items()}
    assert placed == {
        "embed": (160, 0),
        "positions": (40, 0),
        "up": (128, 1),
        "out": (48, 2),
    }


def test_vectors_that_are_not_used_are_no_layers():
    params = {"a": {"w": shape(3, 4)}, "norm": {k: shape(1, 1, 4) for k in ("scale", "offset")}}
    architecture = optax_ext.architecture(lambda p, x: x @ p["a"]["w"], params, shape(2, 3))
    assert architecture["norm/scale"][1:] == (None, 0, "by shape and path: not used")


def test_sliced_vectors_are_vectors():
    """Stacked normalizations keep their axes."""
    params = {"norms": {"scale": shape(3, 1, 1, 8)}, "out": {"w": shape(8, 2)}}

    def apply(params, x):
        x, _ = jax.lax.scan(lambda x, s: (x * s, None), x, params["norms"]["scale"])
        return x[0] @ params["out"]["w"]

    architecture = optax_ext.architecture(apply, params, shape(1, 5, 8))
    assert architecture["norms/scale"].connections is None


ALONE = {
    "one layer": ({"out": {"kernel": shape(4, 3), "bias": shape(3)}}, "only the unit 'out' has"),
    "one array": (shape(4, 3), "only the unit '' has"),
    "vectors": ({"a": shape(3), "b": shape(2)}, "no unit has"),
}


@pytest.mark.parametrize(("params", "which"), ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("scaling", ["additive", "multiplicative", "signed", "depth"])
def test_warns_where_nothing_is_scaled(params, which, scaling):
    params = filled(params, 0)
    for tx in (
        optax_ext.caadam(0.1, scaling=scaling),
        optax_ext.scale_by_connections(scaling=scaling),
    ):
        with pytest.warns(UserWarning, match=f"{which} connections, so nothing will be sc") as said:
            tx.init(params)
        assert len(said) == 1
        assert "architecture=" in str(said[0].message)
        assert "units='leaf'" in str(said[0].message)
    with warnings.catch_warnings(action="error"):
        table = optax_ext.connection_table(params, scaling=scaling)
    assert str(table).endswith("\nFewer than two units have connections: nothing is scaled.")


QUIET = {
    "layers": (NAMED, {}),
    "equal layers": ([shape(4, 4)] * 3, {}),
    "leaves": ({"b": shape(3), "w": shape(4, 3)}, {"scaling": "depth", "units": "leaf"}),
    "overridden": ({"a": {"w": shape(4, 3)}}, {"overrides": {"a": {"scale": 2.0}}}),
    "nothing": ({}, {}),
    "part of a network": (
        {"w1": shape(3, 8), "w2": None},
        {
            "scaling": "depth",
            "architecture": optax_ext.architecture(
                lambda p, x: x @ p["w1"] @ p["w2"],
                {"w1": shape(3, 8), "w2": shape(8, 2)},
                shape(1, 3),
            ),
        },
    ),
}


@pytest.mark.parametrize(("params", "options"), QUIET.values(), ids=QUIET)
def test_does_not_warn_elsewhere(params, options):
    tx = optax_ext.caadam(0.1, **options)
    with warnings.catch_warnings(action="error"):
        tx.init(filled(params, 0))
        table = optax_ext.connection_table(params, **{"scaling": "additive"} | options)
    assert "nothing is scaled" not in str(table)


@pytest.mark.parametrize("leaf", ["kernel", len, object(), jnp.ones], ids=["str", "f", "o", "g"])
def test_params_must_be_arrays(leaf):
    tx = optax_ext.scale_by_connections(scaling="depth")
    for read in (lambda p: optax_ext.connection_table(p, scaling="depth"), tx.init):
        with pytest.raises(ValueError, match=r"^params must contain arrays only, got .* for a/b$"):
            read({"a": {"b": leaf, "c": shape(2)}})
        with pytest.raises(ValueError, match=r"^params must contain arrays only, got .*[^/]$"):
            read(leaf)


def test_params_must_be_a_tree():
    with pytest.raises(ValueError, match="params must be a tree of arrays, got None"):
        optax_ext.connection_table(None, scaling="depth")
    with pytest.raises(ValueError, match="params must be a tree of arrays, got None"):
        optax_ext.scale_by_connections(scaling="depth").init(None)


@pytest.mark.parametrize(
    "leaf", [jnp.ones((3, 4), jnp.int32), jnp.ones(3, bool), jax.random.key(0)]
)
def test_params_must_be_floats(leaf):
    params = {"a": {"w": jnp.ones((2, 3)), "ids": leaf}, "b": {"w": jnp.ones((3, 2))}}
    tx = optax_ext.scale_by_connections(scaling="depth")
    for read in (lambda p: optax_ext.connection_table(p, scaling="depth"), tx.init):
        with pytest.raises(ValueError, match=r"params/a/ids is .*optax\.masked"):
            read(params)
    part = optax.masked(tx, {"a": {"w": True, "ids": False}, "b": {"w": True}})
    part.init(params)


def test_a_smaller_convolution_is_no_bias_of_its_neighbour():
    """Whatever the leaves are called: as many axes as a kernel's are a kernel's."""
    large, small = jnp.ones((3, 3, 64, 64)), jnp.ones((1, 1, 64, 64))
    for names in (("a", "b"), ("b", "a")):
        table = optax_ext.connection_table(
            dict(zip(names, (large, small), strict=True)), scaling="additive"
        )
        assert {row.connections for row in table} == {36864, 4096}


@struct.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


def test_an_attribute_named_value():
    """Together with others it is a leaf; alone, as in Flax's variables, it is no level."""
    leaf = shape(4, 4)
    boxed = nnx.State({"kernel": nnx.Param(jnp.ones((4, 2)))})
    params = {"layer": Attention(leaf, leaf, leaf), "out": boxed}
    rows = [
        (row.path, row.connections) for row in optax_ext.connection_table(params, scaling="depth")
    ]
    names = [f"layer/{name}" for name in ("query", "key", "value")]
    assert rows == [*((path, 16) for path in sorted(names)), ("out", 8)]

    def apply(params, x):
        layer = params["layer"]
        return (x @ layer.query) * (x @ layer.key) @ layer.value @ params["out"]["kernel"][...]

    architecture = optax_ext.architecture(apply, params, shape(5, 4))
    assert {path: placed.depth for path, placed in architecture.items()} == {
        **dict(zip(names, (0, 0, 1), strict=True)),
        "out/kernel": 2,
    }


def test_two_leaves_of_one_path():
    params = {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones((2, 2))}}
    message = r"path of its own for every leaf, got 'a/b' for \['a'\]\['b'\] and \['a/b'\]"
    with pytest.raises(ValueError, match=message):
        optax_ext.architecture(lambda p, x: x @ p["a/b"] @ p["a"]["b"], params, shape(5, 3))
    with pytest.raises(ValueError, match=message):
        optax_ext.connection_table(params, scaling="depth")
