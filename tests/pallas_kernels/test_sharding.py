"""Steps on eight virtual devices: the same chains, kernels on each device's shards."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext
from benchmarks.hlo import read_collectives
from pallas_kernels import explain, fuse
from support.cases import METHODS, slow_unless
from support.fused import SUMMED, chain_step
from support.runs import build
from support.strategies import filled, shape

P = PartitionSpec
# Where XLA makes one operation of two, a quotient into a product or a product and a sum into one
# with one rounding, it rounds otherwise; and it looks at shapes before it does.
EXACT = {"xla_disable_hlo_passes": "algsimp,fusion"}
# Long enough for every device to hold whole blocks of what is cut into chunks.
TREE = {"bias": shape(768), "kernel": shape(768, 64), "odd": shape(5, 3), "out": shape(8, 192)}


class Layout(NamedTuple):
    """A mesh, and how parameters lie on it."""

    axes: dict[str, int]
    axis_type: AxisType
    specs: dict[str, PartitionSpec]

    @property
    def mesh(self) -> Any:
        types = (self.axis_type,) * len(self.axes)
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=types)

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {name: NamedSharding(self.mesh, spec) for name, spec in self.specs.items()}


FULLY = {"bias": P("data"), "kernel": P(None, "data"), "odd": P(), "out": P("data")}
BOTH = {"bias": P("model"), "kernel": P("data", "model"), "odd": P(), "out": P(None, "model")}
AXES = {"data": 4, "model": 2}
LAYOUTS = {
    "fully sharded": Layout({"data": 8}, AxisType.Auto, FULLY),
    "replicated": Layout({"data": 8}, AxisType.Auto, dict.fromkeys(TREE, P())),
    "fully and by tensor": Layout(AXES, AxisType.Auto, BOTH),
    "explicit": Layout(AXES, AxisType.Explicit, BOTH),
}
# The two that hold all others: along two axes, known from the arrays, and from types.
BROADEST = ("fully and by tensor", "explicit")

OPTIMIZERS = {
    **{case.method: build(case) for case in METHODS},
    "novak, norms": optax_ext.novak(0.01, sync_period=2, trust_ratio=True, autoscale=True),
}
# Their leaves are left to XLA.
UNFUSED = {
    "novak, offloaded": optax_ext.novak(0.01, sync_period=2, offload="pinned_host"),
    "novak, rotating": optax_ext.novak(0.01, sync_period=2, lookahead="rotating"),
}
OPTAXES = {
    "adamw": optax.adamw(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
    "lamb": optax.lamb(0.1),
}
# Of all tensors in one vector, where all are cut along the same axes.
SUMS = {"vradam": 1, "novak, norms": 1}


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(x.shape, np.float32) for name, x in TREE.items()}


def train(make_step: Callable[..., Any], tx, params, state, place=lambda tree: tree):
    """Parameters and state after four steps, and the compiled step."""
    compiled: Any = None
    for seed in range(1, 5):
        grads = place(arrays(seed))
        if compiled is None:
            lowered = jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(params, state, grads)
            compiled = lowered.compile(EXACT)
        params, state = compiled(params, state, grads)
    return params, state, compiled


def alone(tx):
    params = jax.tree.map(jnp.asarray, arrays(0))
    return train(chain_step, tx, params, tx.init(params))[0]


def on_mesh(layout: Layout, make_step, tx):
    place = partial(jax.device_put, device=layout.shardings)
    with jax.set_mesh(layout.mesh):
        params = place(arrays(0))
        placed = optax_ext.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=placed)(params)
        params, state, compiled = train(make_step, tx, params, state, place)
    assert_beside(layout, params, state)
    return params, compiled.as_text()


def assert_beside(layout: Layout, params, state) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
        name = getattr(path[-1], "key", None)
        if name in TREE and leaf.shape == TREE[name].shape:
            expected = layout.shardings[name].with_memory_kind(leaf.sharding.memory_kind)
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path


def assert_scalar_sums(program: str) -> None:
    for collective in read_collectives(program):
        assert collective.kind == "all-reduce"
        assert collective.elements <= 3 * len(TREE)  # at most three norms of a tensor


def largest_error(ours, expected) -> float:
    errors = jax.tree.map(
        lambda x, y: np.max(np.abs(x - y)) / np.max(np.abs(y)), *jax.device_get((ours, expected))
    )
    return max(jax.tree.leaves(errors))


# One phase, two with one norm of all leaves, and two with norms of each.
PATHS = ("fame", "vradam", "lamb")
EXPLICIT = ("novak, rotating", "explicit")
QUICK = {("vradam", "fully and by tensor"), ("lamb", "explicit")}


def quick_where_broad(name: str, where: str) -> Any:
    """A case that is slow unless it shows what others would show too."""
    return pytest.param(name, where, marks=[] if (name, where) in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize(
    ("name", "where"),
    [
        quick_where_broad(name, where)
        for name, where in itertools.product(OPTIMIZERS | UNFUSED, LAYOUTS)
        if name in PATHS or where == "fully sharded" or (name, where) == EXPLICIT
    ],
)
def test_a_chain(name, where):
    """The same numbers, beside the parameters, and nothing said between devices but norms."""
    tx, layout = (OPTIMIZERS | UNFUSED)[name], LAYOUTS[where]
    params, program = on_mesh(layout, chain_step, tx)
    assert largest_error(params, alone(tx)) <= (1e-6 if name in SUMS else 0)
    if layout is LAYOUTS["fully sharded"]:
        assert len(read_collectives(program)) == SUMS.get(name, 0)
    assert_scalar_sums(program)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        quick_where_broad(name, where)
        for name, where in itertools.product(OPTIMIZERS | OPTAXES, LAYOUTS)
        if name in PATHS or where == "explicit"
    ],
)
def test_a_fused_step(name, where):
    tx, layout = (OPTIMIZERS | OPTAXES)[name], LAYOUTS[where]
    told = None if layout.axis_type == AxisType.Explicit else layout.shardings

    def make_step(tx):
        return fuse(tx, backend="interpret", strict=True, shardings=told).step

    params, program = on_mesh(layout, make_step, tx)
    assert largest_error(params, alone(tx)) <= SUMMED
    assert_scalar_sums(program)


@pytest.mark.slow
def test_what_is_left_to_xla():
    """Means along an axis that is cut have a shape that is not."""
    layout = LAYOUTS["fully sharded"]
    tx = optax.chain(optax.centralize(), optax.sgd(0.1))

    def make_step(tx):
        return fuse(tx, backend="interpret", shardings=layout.shardings).step

    params, _ = on_mesh(layout, make_step, tx)
    assert largest_error(params, alone(tx)) <= SUMMED


@pytest.mark.parametrize("name", slow_unless(["novak, offloaded"], UNFUSED))
def test_explicit_axes_and_leaves_left_to_xla(name):
    """The chain runs."""
    layout, tx = LAYOUTS["explicit"], UNFUSED[name]
    params, _ = on_mesh(layout, lambda tx: fuse(tx, backend="interpret").step, tx)
    assert largest_error(params, alone(tx)) == 0
    report = explain(tx, jax.device_put(arrays(0), layout.shardings))
    assert report.fallback_reasons
    assert report.launches == 0


CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
FORMS = {
    "three axes, two on one of an array": Layout(
        {"data": 2, "model": 2, "more": 2},
        AxisType.Auto,
        BOTH | {"bias": P(("data", "model")), "kernel": P("model", ("more", "data"))},
    ),
    "an axis of one": Layout(
        {"data": 8, "model": 1}, AxisType.Auto, BOTH | {"kernel": P("data", "model")}
    ),
    "one device": Layout({"data": 1, "model": 1}, AxisType.Auto, BOTH),
    "one device, explicit": Layout({"data": 1, "model": 1}, AxisType.Explicit, BOTH),
}


@pytest.mark.parametrize("name", slow_unless(list(FORMS)[:1], FORMS))
def test_meshes_of_any_form(name):
    tx, layout = CLIPPED, FORMS[name]
    told = None if layout.axis_type == AxisType.Explicit else layout.shardings

    def make_step(tx):
        return fuse(tx, backend="interpret", strict=True, shardings=told).step

    params, _ = on_mesh(layout, make_step, tx)
    assert largest_error(params, alone(tx)) <= SUMMED


@pytest.mark.parametrize(
    "axis_type", slow_unless([AxisType.Auto], [AxisType.Auto, AxisType.Explicit])
)
def test_arrays_that_lie_elsewhere_are_brought(axis_type):
    """Parameters of the host, gradients whole on every device."""
    layout, tx = Layout(AXES, axis_type, BOTH), CLIPPED
    step = fuse(tx, backend="interpret", strict=True, shardings=layout.shardings).step
    grads = jax.device_put(arrays(1), NamedSharding(layout.mesh, P()))
    params, _ = jax.jit(step)(arrays(0), tx.init(arrays(0)), grads)
    assert_beside(layout, params, ())
    here = jax.tree.map(jnp.asarray, arrays(0))
    expected, _ = chain_step(tx)(here, tx.init(here), arrays(1))
    assert largest_error(params, expected) <= SUMMED


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [optax.adafactor(0.1, min_dim_size_to_factor=4), optax.contrib.muon(0.1)],
    ids=["adafactor", "muon"],
)
def test_leaves_that_are_not_fused_where_they_are_cut(tx):
    """They hold arrays of other shapes, which are cut otherwise or not at all."""
    layout = LAYOUTS["fully and by tensor"]
    params, grads = (jax.device_put(arrays(seed), layout.shardings) for seed in (0, 1))
    step = fuse(tx, backend="interpret", shardings=layout.shardings).step
    params, _ = jax.jit(step)(params, tx.init(params), grads)
    here = jax.tree.map(jnp.asarray, arrays(0))
    expected, _ = chain_step(tx)(here, tx.init(here), arrays(1))
    assert largest_error(params, expected) <= SUMMED


def test_leaves_without_elements_and_none():
    mesh = LAYOUTS["fully and by tensor"].mesh
    tree = {"w": shape(8, 6), "empty": shape(0, 8), "scalar": shape(), "none": None}
    specs = {"w": P("data"), "empty": P("data", "model"), "scalar": P(), "none": None}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    here = filled(tree, 0)
    params = jax.device_put(here, shardings)
    tx = optax_ext.vradam(0.1)
    state = jax.jit(tx.init, out_shardings=optax_ext.state_shardings(tx, params))(params)
    step = jax.jit(fuse(tx, backend="interpret", shardings=shardings).step)
    params, _ = step(params, state, filled(tree, 1))
    expected, _ = chain_step(tx)(here, tx.init(here), filled(tree, 1))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_sharding_in_place_of_a_subtree():
    """`jit` has the same rule; Flax's boxed parameters have shardings one level above arrays."""
    mesh = LAYOUTS["fully sharded"].mesh
    shardings = {"layers": NamedSharding(mesh, P("data")), "odd": NamedSharding(mesh, P())}
    tree = {"layers": {"bias": shape(8), "kernel": shape(16, 24)}, "odd": shape(5, 3)}
    params = filled(tree, 0)
    tx = optax.sgd(0.1)
    step = fuse(tx, backend="interpret", strict=True, shardings=shardings).step
    params, _ = step(params, tx.init(params), params)
    cut = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    assert cut[(8,)][0] == cut[(16, 24)][0] == "data"
    assert not any(cut[(5, 3)])


@pytest.mark.slow
def test_a_checkpoint_from_eight_devices_on_four(tmp_path):
    layout, tx = LAYOUTS["fully and by tensor"], optax_ext.novak(0.1, trust_ratio=True)
    params = jax.device_put(arrays(0), layout.shardings)
    params, state = jax.jit(chain_step(tx))(params, tx.init(params), arrays(1))
    four = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    fewer = {name: of_shape(x, NamedSharding(four, FULLY[name])) for name, x in TREE.items()}
    places = optax_ext.state_shardings(tx, fewer)
    target = fewer, jax.tree.map(of_shape, jax.eval_shape(tx.init, fewer), places)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "eight", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "eight", target)
    jax.tree.map(np.testing.assert_array_equal, restored, (params, state))
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(str(y)), restored, target)


SPECS: dict[str, Any] = {
    "specs": FULLY,
    "shardings": LAYOUTS["fully sharded"].shardings,
    "the arrays themselves": None,
}


@pytest.mark.parametrize("name", slow_unless(["the arrays themselves"], SPECS))
def test_how_a_fused_step_is_told(name):
    told, layout, tx = SPECS[name], LAYOUTS["fully sharded"], optax.lamb(0.1)
    place = partial(jax.device_put, device=layout.shardings)
    step = fuse(tx, backend="interpret", shardings=told).step
    with jax.set_mesh(layout.mesh):
        params, grads = place(arrays(0)), place(arrays(1))
        state = tx.init(params)
        # `jit` hides where arrays lie.
        params, _ = (step if told is None else jax.jit(step))(params, state, grads)
    alone = jax.tree.map(jnp.asarray, arrays(0))
    expected, _ = chain_step(tx)(alone, tx.init(alone), arrays(1))
    assert_beside(layout, params, ())
    assert largest_error(params, expected) <= SUMMED


def test_updates_of_a_fused_chain():
    layout, tx = LAYOUTS["fully and by tensor"], optax_ext.vradam(0.1)
    fused = fuse(tx, backend="interpret", strict=True, shardings=layout.shardings)
    grads = jax.device_put(arrays(1), layout.shardings)
    params = jax.device_put(arrays(0), layout.shardings)
    updates, _ = jax.jit(fused.update)(grads, tx.init(params), params)
    alone = jax.tree.map(jnp.asarray, arrays(0))
    expected, _ = tx.update(arrays(1), tx.init(alone), alone)
    assert_beside(layout, updates, ())
    assert largest_error(updates, expected) <= SUMMED


def test_a_parameter_without_a_gradient_has_a_sharding():
    layout, tx = LAYOUTS["fully and by tensor"], optax.sgd(0.1)
    fused = fuse(tx, backend="interpret", shardings=layout.shardings)
    params = jax.device_put(arrays(0), layout.shardings)
    absent = sorted(params)[0]
    grads = params | {absent: None}
    updates, _ = jax.jit(fused.update)(grads, tx.init(params), params)
    assert updates[absent] is None


def test_arrays_that_a_chain_closes_over():
    """They know their devices, where the types of arguments know the mesh's axes only."""
    layout = LAYOUTS["explicit"]
    with jax.set_mesh(layout.mesh):
        anchor = jax.device_put(arrays(7), layout.shardings)

        def pulled(updates, params):
            return jax.tree.map(lambda g, p, a: g + 0.1 * (p - a), updates, params, anchor)

        tx = optax.chain(optax.stateless(pulled), optax.sgd(0.1))
        params, grads = (jax.device_put(arrays(seed), layout.shardings) for seed in (0, 1))
        step = jax.jit(fuse(tx, backend="interpret", strict=True).step)
        params, _ = step(params, tx.init(params), grads)
    assert_beside(layout, params, ())
    expected = jax.tree.map(
        lambda p, g, a: p - 0.1 * (g + 0.1 * (p - a)), arrays(0), arrays(1), arrays(7)
    )
    assert largest_error(params, expected) <= SUMMED


def test_nothing_to_do():
    fused = fuse(optax.sgd(0.1), backend="interpret", shardings=P())
    assert fused.step({}, fused.init({}), {}) == ({}, fused.init({}))


def test_explain_shows_what_each_device_does():
    shardings = LAYOUTS["fully sharded"].shardings
    params = {name: of_shape(x, shardings[name]) for name, x in TREE.items()}
    whole, shards = (explain(optax.lamb(0.1), tree) for tree in (TREE, params))
    cut = sum(math.prod(TREE[name].shape) for name in ("bias", "kernel", "out"))
    assert (whole.parameters, shards.parameters) == (cut + 5 * 3, cut // 8 + 5 * 3)
    fused = fuse(optax.lamb(0.1), shardings=shardings)
    assert explain(fused, TREE) == shards
    assert shards.bytes_per_parameter == pytest.approx(whole.bytes_per_parameter, rel=0.1)
    assert [phase.all_reduces for phase in whole.phases] == [0, 0]
    assert [phase.all_reduces for phase in shards.phases] == [1, 0]
    assert "8 devices" in str(shards)


def test_one_vector_tells_of_all_leaves_cut_along_the_same_axes():
    """Whichever dimension each axis cuts."""
    mesh = LAYOUTS["fully and by tensor"].mesh
    specs = P("data", "model"), P("model", "data"), P(None, ("model", "data"))
    params = [of_shape(shape(16, 24), NamedSharding(mesh, spec)) for spec in specs]
    assert [phase.all_reduces for phase in explain(optax.lamb(0.1), params).phases] == [1, 0]


def of_shape(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def other_mesh() -> Any:
    return jax.make_mesh((2,), ("other",), devices=jax.devices()[:2])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda given: {k: v for k, v in given.items() if k != "odd"}, "none for odd"),
    "unknown": (lambda given: given | {"od": given["odd"]}, "one for od, which is no parameter"),
    "no sharding": (lambda given: given | {"odd": "data"}, "got 'data' for odd"),
    "no mesh": (lambda given: given | {"odd": P()}, r"needs jax.set_mesh .* for odd"),
    "indivisible": (
        lambda given: given | {"odd": NamedSharding(given["odd"].mesh, P("data"))},
        r"odd of shape \(5, 3\) can't be sharded",
    ),
    "too many axes": (
        lambda given: given | {"bias": NamedSharding(given["odd"].mesh, P(None, "data"))},
        r"bias of shape \(768,\) can't be sharded",
    ),
    "of no axis": (
        lambda given: given | {"scalar": given["bias"]},
        r"scalar of shape \(\) can't be sharded",
    ),
    "two meshes": (
        lambda given: given | {"odd": NamedSharding(other_mesh(), P())},
        r"on one mesh, but 0/bias lies on .*, 0/odd on",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shardings_name_the_leaf(change, message):
    given = change(LAYOUTS["fully sharded"].shardings)
    step = fuse(optax.sgd(0.1), backend="interpret", shardings=given).step
    params = jax.tree.map(jnp.asarray, arrays(0))
    if "scalar" in given:
        params["scalar"] = jnp.ones(())
    with pytest.raises(ValueError, match=message):
        step(params, optax.sgd(0.1).init(params), params)


def test_a_spec_with_an_axis_that_the_mesh_has_not_names_the_leaf():
    params = jax.tree.map(jnp.asarray, arrays(0))
    step = fuse(optax.sgd(0.1), backend="interpret", shardings=FULLY | {"odd": P("x")}).step
    with (
        jax.set_mesh(LAYOUTS["fully sharded"].mesh),
        pytest.raises(ValueError, match=r"odd can't be sharded by .*'x'"),
    ):
        step(params, optax.sgd(0.1).init(params), params)


def test_a_state_needs_to_know_where_parameters_lie():
    shardings = LAYOUTS["fully sharded"].shardings
    params = {name: of_shape(x, shardings[name]) for name, x in TREE.items()}
    with pytest.raises(ValueError, match="got None for odd"):
        optax_ext.state_shardings(optax.sgd(0.1), params | {"odd": TREE["odd"]})
    elsewhere = of_shape(TREE["odd"], NamedSharding(other_mesh(), P()))
    with pytest.raises(ValueError, match=r"on one mesh, got .* for odd and"):
        optax_ext.state_shardings(optax.sgd(0.1), params | {"odd": elsewhere})
    with pytest.raises(ValueError, match="at least one array"):
        optax_ext.state_shardings(optax.sgd(0.1), {})


@pytest.mark.parametrize(
    "tx",
    [
        optax_ext.novak(0.1, lookahead="rotating"),
        optax_ext.fame(0.1, weight_decay=0.1, mask=dict.fromkeys(TREE, True) | {"odd": False}),
        optax.inject_hyperparams(optax_ext.caadam)(0.1),
        optax.multi_transform(
            {"ours": optax_ext.vradam(0.1), "sgd": optax.sgd(0.1)},
            dict.fromkeys(TREE, "ours") | {"odd": "sgd"},
        ),
        optax.MultiSteps(optax_ext.invadam(0.1), 2).gradient_transformation(),
        optax.contrib.schedule_free(optax_ext.invadam(0.1), 0.1),
    ],
    ids=["rotating", "masked", "injected", "groups", "accumulated", "schedule-free"],
)
def test_shardings_of_any_state(tx):
    """They fit: a state that is made with them is the state."""
    shardings = LAYOUTS["fully and by tensor"].shardings
    params = jax.device_put(arrays(0), shardings)
    placed = optax_ext.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
    cut = [
        leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.shape == TREE["kernel"].shape
    ]
    assert cut
    assert set(cut) == {P("data", "model")}


def test_shardings_of_a_state_beside_a_pair_of_weights():
    shardings = LAYOUTS["fully and by tensor"].shardings
    weights = jax.device_put(arrays(0), shardings)
    params, tx = optax.LookaheadParams(weights, weights), optax.lookahead(optax.adam(0.1), 2, 0.5)
    placed = optax_ext.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    assert optax.tree.get(state, "mu")["kernel"].sharding.spec == P("data", "model")
