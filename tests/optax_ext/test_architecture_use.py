"""The uses of an architecture: optimizers, tables, transformations of JAX, mistakes."""

import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import optax_ext

# "first" by name is last in the network, and "side" is beside "last".
SHAPES = {"first": (4, 2), "last": (3, 4), "side": (3, 4), "middle": (4, 4)}
PARAMS = {
    name: {"kernel": jnp.full(shape, 0.1), "bias": jnp.zeros(shape[1:])}
    for name, shape in SHAPES.items()
}
X = jnp.ones((5, 3))


def network(params, x):
    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"][None]

    y = dense("middle", jnp.tanh(dense("last", x))) + dense("side", x)
    return dense("first", jnp.tanh(y))


ARCHITECTURE = optax_ext.architecture(network, PARAMS, X)
DEPTHS = {"first": 2, "last": 0, "side": 0, "middle": 1}
# Three levels: 2^(2/3), 2^(1/3), 1.
BY_DEPTH = {name: 2 ** ((2 - depth) / 3) for name, depth in DEPTHS.items()}


def scales(tx, params):
    vector = optax.tree.get(tx.init(params), "connection_scale")
    return jax.tree.unflatten(jax.tree.structure(params), list(np.asarray(vector)))


def assert_by_depth(tree):
    for name, leaves in tree.items():
        assert list(leaves.values()) == pytest.approx([BY_DEPTH[name]] * len(leaves))


def test_is_a_mapping_that_prints_hashes_and_pickles():
    assert str(ARCHITECTURE).splitlines() == [
        "path           connections  depth  note",
        "first/bias               -      2",
        "first/kernel             8      2",
        "last/bias                -      0",
        "last/kernel             12      0",
        "middle/bias              -      1",
        "middle/kernel           16      1",
        "side/bias                -      0",
        "side/kernel             12      0",
    ]
    assert ARCHITECTURE["middle/kernel"] == ("middle/kernel", 16, 1, "")
    assert list(ARCHITECTURE) == [f"{n}/{k}" for n in sorted(SHAPES) for k in ("bias", "kernel")]
    assert len(ARCHITECTURE) == 8
    assert "middle" not in ARCHITECTURE
    copy = pickle.loads(pickle.dumps(ARCHITECTURE))
    assert len({copy, ARCHITECTURE, optax_ext.architecture(network, PARAMS, X)}) == 1
    assert optax_ext.architecture(lambda p, x: x @ p["last"]["kernel"], PARAMS, X) != ARCHITECTURE


def test_nothing_is_computed():
    params, x = jax.eval_shape(lambda: (PARAMS, X))
    assert optax_ext.architecture(network, params, x) == ARCHITECTURE

    @jax.jit
    def inside(params, x):
        assert optax_ext.architecture(network, params, x) == ARCHITECTURE
        return x

    inside(PARAMS, X)


def test_table_scales_and_overrides():
    options = {"scaling": "depth", "architecture": ARCHITECTURE}
    table = optax_ext.connection_table(PARAMS, **options)
    assert {row.path: row.depth for row in table} == DEPTHS
    assert {row.path: row.scale for row in table} == pytest.approx(BY_DEPTH)
    assert_by_depth(scales(optax_ext.caadam(0.1, **options), PARAMS))
    overrides = {"middle": {"depth": 2}, "last": {"scale": 3.0}}
    table = optax_ext.connection_table(PARAMS, overrides=overrides, **options)
    expected = BY_DEPTH | {"middle": 1.0, "last": 3.0}
    assert {row.path: row.scale for row in table} == pytest.approx(expected)


def test_leaves_as_units():
    """A bias counts no connections, and stands beside its kernel."""
    table = optax_ext.connection_table(
        PARAMS, scaling="depth", units="leaf", architecture=ARCHITECTURE
    )
    assert {row.path: (row.connections, row.depth) for row in table} == {
        f"{name}/{leaf}": (count, DEPTHS[name])
        for name, (n_in, n_out) in SHAPES.items()
        for leaf, count in (("kernel", n_in * n_out), ("bias", 0))
    }


def test_inside_jit_and_eval_shape():
    tx = optax_ext.caadam(0.1, scaling="depth", architecture=ARCHITECTURE)
    assert_by_depth(scales(tx._replace(init=jax.jit(tx.init)), PARAMS))
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert optax.tree.get(shapes, "connection_scale").shape == (8,)

    def build(architecture, params):
        return optax_ext.caadam(0.1, architecture=architecture).init(params)

    jax.jit(build, static_argnums=0)(ARCHITECTURE, PARAMS)


def test_injected_hyperparameters():
    tx = optax.inject_hyperparams(optax_ext.caadam)(0.1, scaling="depth", architecture=ARCHITECTURE)
    state = tx.init(PARAMS)
    assert "architecture" not in state.hyperparams
    assert_by_depth(scales(tx, PARAMS))
    jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_part_of_the_network():
    """Depth is relative to the network's, whatever part of it this chain trains."""
    tx = optax.masked(
        optax_ext.scale_by_connections(scaling="depth", architecture=ARCHITECTURE),
        {name: {"kernel": name in ("last", "middle"), "bias": False} for name in SHAPES},
    )
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    scaled: Any = tx.update(ones, tx.init(PARAMS), PARAMS)[0]
    for name in SHAPES:
        expected = BY_DEPTH[name] if name in ("last", "middle") else 1
        np.testing.assert_allclose(scaled[name]["kernel"], expected, rtol=1e-6)
        np.testing.assert_array_equal(scaled[name]["bias"], 1)


def test_none_and_one_array():
    params = {**PARAMS, "absent": None}
    assert optax_ext.architecture(network, params, X) == ARCHITECTURE
    tx = optax_ext.scale_by_connections(scaling="depth", architecture=ARCHITECTURE)
    scaled: Any = tx.update(params, tx.init(params))[0]
    assert scaled["absent"] is None
    assert optax_ext.architecture(lambda w, x: x @ w, jnp.ones((3, 2)), X)[""] == ("", 6, 0, "")


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
        return linen.Dense(2)(x)


def test_variables_of_linen_serve_their_parameters():
    """Read from `variables`, used for `variables["params"]`: the same modules."""
    variables = Net().init(jax.random.key(0), X)
    whole = optax_ext.architecture(Net().apply, variables, X, False)

    def train(params, x):
        variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
        return Net().apply(variables_, x, train=True, mutable=["batch_stats"])

    params = variables["params"]
    options = {"scaling": "depth"}
    tables = [
        optax_ext.connection_table(params, architecture=architecture, **options)
        for architecture in (whole, optax_ext.architecture(train, params, X), None)
    ]
    assert tables[0] == tables[1] == tables[2]
    tx = optax_ext.caadam(0.1, architecture=whole)
    state = TrainState.create(apply_fn=Net().apply, params=params, tx=tx)
    state.apply_gradients(grads=params)


def test_optimizer_of_nnx():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    architecture = optax_ext.architecture(lambda params, x: nnx.merge(graph, params)(x), params, X)
    assert architecture["layers/1/kernel"].depth == 1
    tx = optax_ext.caadam(0.1, scaling="depth", architecture=architecture)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(X).sum())(model))


def by_keyword(params, x, *, train):
    return network(params, x) if train is False else None


def test_keywords_by_partial():
    assert optax_ext.architecture(partial(by_keyword, train=False), PARAMS, X) == ARCHITECTURE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((by_keyword, PARAMS, X), "apply_fn must take .* raises TypeError: .*missing .* 'train'"),
        ((None, PARAMS, X), "apply_fn must be a function of params and inputs, got None"),
        ((network, {}, X), "params must contain at least one array, got {}"),
        ((network, {"a": None}, X), "params must contain at least one array"),
        ((network, {"a": {"b": "w"}}, X), "params must contain arrays only, got 'w' for a/b"),
        ((network, PARAMS), "example_inputs, got no example_inputs, for which .* missing 1"),
        ((network, PARAMS, X, X), "for which it raises TypeError: .* takes 2 .* 3 were given"),
        (
            (network, PARAMS, jnp.ones((5, 7))),
            r"apply_fn must take params and example_inputs, got example_inputs\[0\] ="
            r" float32\[5, 7\], for which it raises TypeError: dot_general",
        ),
        (
            (lambda params, batch: batch["x"] + batch["y"], PARAMS, {"x": X, "y": "a"}),
            r"example_inputs\[0\]\['x'\] = float32\[5, 3\], example_inputs\[0\]\['y'\] = 'a'",
        ),
        (
            (lambda params, x: network(PARAMS, x), PARAMS, X),
            r"brings no array of params together with example_inputs\[0\] = float32\[5, 3\]",
        ),
        (
            (lambda params: network(params, X), PARAMS),
            "brings no array of params together with no example_inputs",
        ),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        optax_ext.architecture(*arguments)
    failed = "for which it raises TypeError" in str(error.value)
    assert isinstance(error.value.__cause__, TypeError) == failed


def test_architecture_of_another_network():
    tx = optax_ext.caadam(0.1, architecture=ARCHITECTURE)
    with pytest.raises(
        ValueError, match=r"architecture lacks the parameter 'new/kernel'; it has 'fi"
    ):
        tx.init({**PARAMS, "new": {"kernel": X}})
