"""The plan of a step: phases, bodies, predicates, bytes, and fallbacks."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext
import pallas_kernels
from pallas_kernels import explain, fuse, launches
from pallas_kernels.compile import Compiler, whole_step
from pallas_kernels.program import Input, Number, Result, Scalar
from support.fused import RAGGED, SMALL, lowered
from support.strategies import shape

# Of float32: a parameter, its gradient and two moments are read, all but the gradient written.
ADAM_BYTES = 4 * (4 + 3)
LEAF = {"kernel": shape(64, 64)}


def planned(tx, params):
    state = jax.eval_shape(tx.init, params)
    compile_step = Compiler(whole_step(tx), in_place=2)
    compiled, _ = compile_step((params, state, params, {}), "triton", {})
    return compiled.traced.graph, compiled.plan


def work(tx, params=SMALL):
    return [phase.work for phase in explain(tx, params).phases]


@pytest.mark.parametrize(
    ("tx", "phases"),
    [
        (optax.adamw(0.1), 0),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), 1),
        (optax.lamb(0.1), 1),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.1)), 2),
        (optax_ext.vradam(0.1), 1),
        (optax_ext.novak(0.1, trust_ratio=True), 1),
        (optax_ext.novak(0.1, trust_ratio=True, autoscale=True), 1),
    ],
    ids=["adamw", "clip", "lamb", "clip_lamb", "vradam", "trust", "autoscale_trust"],
)
def test_phases_are_cut_at_reductions(tx, phases):
    """Norms that do not wait for each other share a phase."""
    assert work(tx) == ["statistics"] * phases + ["update"]


def test_equal_leaves_have_one_body_in_memory():
    """Bodies are compared often, and the same object is compared at once."""
    _, plan = planned(optax.adamw(0.1), {name: shape(64) for name in "abc"})
    bodies = [program.body for phase in plan.phases for program in phase.programs]
    assert len(bodies) == 3
    assert all(body is bodies[0] for body in bodies)


def test_values_of_different_sources_differ():
    assert len({Input(0), Scalar(0), Result(0), Number(b"", "float32")}) == 4


def test_only_a_large_statistic_among_few_is_cut_into_tiles():
    large = 8 * launches.TILE
    assert launches.tile_length([large]) == launches.TILE
    assert launches.tile_length([1] * 1000 + [launches.TILE]) == launches.TILE
    assert launches.tile_length([large] * 226) == large
    assert launches.tile_length([large + 1] * launches.EXTRA_TILES) == large
    cut = launches.tile_length([75_400] + [4608] * 50)  # GPT-2's
    assert cut == 2 * launches.TILE


def test_tiles_contain_each_part_once(monkeypatch):
    monkeypatch.setattr(launches, "TILE", 3)
    params = {"long": shape(7 * 512 + 1), "short": shape(512), "middle": shape(6 * 512)}
    _, plan = planned(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), params)
    reduction, statistics = plan.phases[0].reduction, plan.phases[0].statistics
    assert reduction is not None
    tiles = sorted(reduction.table, key=lambda tile: tile[3])
    assert [t[3] for t in tiles] == [*range(len(tiles))]
    counts = {node.args[0].size: n for node, n in zip(statistics, reduction.tiles, strict=True)}
    assert counts == {7 * 512 + 1: 3, 512: 1, 6 * 512: 2}
    parts = [first + i for first, count, _, _ in reduction.table for i in range(count)]
    assert sorted(parts) == [*range(8 + 1 + 6)]
    assert reduction.rows == (0, len(tiles))


def test_leaves_of_one_form_share_a_body():
    params = {name: shape(n + 2) for n, name in enumerate("abcde")} | {"kernel": shape(3, 4)}
    (phase,) = explain(optax.adamw(0.1), params).phases
    assert (phase.leaves, phase.bodies, phase.launches) == (6, 1, 1)

    def matrices(p):
        return jax.tree.map(lambda x: x.ndim > 1, p)

    (phase,) = explain(optax.adamw(0.1, mask=matrices), params).phases
    assert (phase.leaves, phase.bodies, phase.launches) == (6, 2, 1)


def test_many_leaves_take_several_launches():
    params = {f"layer{n}": shape(4) for n in range(161)}
    report = explain(optax.adamw(0.1), params)
    assert 1 < report.launches < 12
    assert report.phases[0].leaves == 161


@pytest.mark.parametrize(
    ("tx", "bytes_per_parameter"),
    [
        (optax.sgd(0.1), 12),
        (optax.sgd(0.1, momentum=0.9), 20),
        (optax.adamw(0.1), ADAM_BYTES),
        (optax.adamw(0.1, mu_dtype=jnp.bfloat16), ADAM_BYTES - 4),
        # The clipped gradient is read once more, for its norm.
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), ADAM_BYTES + 4),
        # Three first moments in place of one.
        (optax_ext.fame(0.1), ADAM_BYTES + 2 * 8),
        # The first moment, and the gradient that it is made of, once more for the norm.
        (optax_ext.vradam(0.1), ADAM_BYTES + 8),
        (optax_ext.invadam(0.1), ADAM_BYTES),
        (optax_ext.dualadam(0.1), ADAM_BYTES),
        (optax_ext.caadam(0.1), ADAM_BYTES),
    ],
    ids=["sgd", "momentum", "adamw", "narrow", "clip", "fame", "vradam", "inv", "dual", "caadam"],
)
def test_bytes(tx, bytes_per_parameter):
    report = explain(tx, LEAF)
    assert report.bytes_per_parameter == bytes_per_parameter
    assert report.parameters == 64 * 64


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1), optax_ext.fame(0.1), optax_ext.novak(0.1)],
    ids=["adamw", "fame", "novak"],
)
def test_one_phase_is_at_the_floor(tx):
    report = explain(tx, LEAF)
    # Beside leaves the floor counts a few scalars, such as counts.
    assert 0 <= report.floor - report.bytes_per_parameter * report.parameters < 100


def predicated_names(tx, params):
    """Arguments that are not always read, and results that are not always written."""
    graph, parts = planned(tx, params)
    loads, stores = [], []
    for program in parts.phases[-1].programs:
        body, names = program.body, [graph.names[node] for node in program.inputs]
        loads += [n for n, when in zip(names, body.loads, strict=True) if when is not None]
        stores += [names[r.in_place or 0] for r in body.roots if r.needed is not None]
    return loads, stores


def test_slow_weights_are_read_and_written_when_they_synchronize():
    tx = optax_ext.novak(0.1, lookahead="exact", sync_period=5)
    loads, stores = predicated_names(tx, LEAF)
    assert loads == stores == ["1/slow/kernel"]
    report = explain(tx, LEAF)
    assert report.bytes_per_parameter == ADAM_BYTES + 8
    assert report.phases[-1].skipped == 8 * report.parameters
    assert f"{8:.2f}" in str(report).splitlines()[1]


def test_predicates_of_load_and_store_are_one_scalar():
    """The slow weights are needed for the same value of it for which they change."""
    _, parts = planned(optax_ext.novak(0.1, lookahead="exact"), LEAF)
    (program,) = parts.phases[-1].programs
    (load,) = [when for when in program.body.loads if when is not None]
    (store,) = [root.needed for root in program.body.roots if root.needed is not None]
    assert load == store
    assert program.body.scalars[load.scalar.index] == "bool"


def test_steps_that_are_not_finite_store_nothing():
    """A step that `apply_if_finite` refuses leaves the moments alone."""
    _, stores = predicated_names(optax.apply_if_finite(optax.adam(0.1), 3), LEAF)
    assert sorted(name.split("/")[-2] for name in stores) == ["mu", "nu"]


def test_one_launch_adds_up_all_statistics():
    """Several launches compute statistics of gradients; the list of the results needs none."""
    params = {f"layer{n}": shape(n + 2) for n in range(80)}
    finite = optax.apply_if_finite(optax.adam(0.1), 3)
    statistics, update = explain(finite, params).phases
    assert statistics.launches == update.launches + 1 > 2


def test_moments_are_written_with_the_norms_made_of_them():
    """The update reads the new moments once more, in place of their old values and the gradient."""
    for tx in (optax.lamb(0.1), optax_ext.novak(0.1, trust_ratio=True, lookahead="none")):
        statistics, update = explain(tx, LEAF).phases
        assert statistics.bytes == 4 * (4 + 2) * 64 * 64
        assert update.bytes == 4 * (3 + 1) * 64 * 64


def test_moments_stored_in_less_than_was_computed_are_written_last():
    """Otherwise the step would be computed from the rounded moments."""
    statistics, _ = explain(
        optax_ext.novak(0.1, trust_ratio=True, mu_dtype=jnp.bfloat16), LEAF
    ).phases
    assert statistics.bytes == (3 * 4 + 2) * 64 * 64


def test_extra_arguments_are_explained():
    with pytest.raises(TypeError, match="value"):
        explain(optax.polyak_sgd(), LEAF)
    assert explain(optax.polyak_sgd(), LEAF, value=2.0).phases[-1].work == "update"


@pytest.mark.parametrize("backend", ["xla", "cuda"])
def test_only_kernels_are_explained(backend):
    with pytest.raises(ValueError, match=f"backend must be one of .* got '{backend}'"):
        explain(optax.sgd(0.1), LEAF, backend=backend)


def test_accumulated_steps_leave_moments_alone():
    """`MultiSteps` touches the moments at every third step only."""
    tx = optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation()
    loads, stores = predicated_names(tx, LEAF)
    assert {name.split("/")[-2] for name in stores} >= {"mu", "nu"}
    assert {name.split("/")[-2] for name in loads} >= {"mu", "nu"}


def test_each_result_takes_the_memory_of_its_argument():
    graph, parts = planned(optax.adamw(0.1), LEAF)
    (program,) = parts.phases[-1].programs
    taken = [root.in_place for root in program.body.roots]
    assert None not in taken
    places = [graph.names[program.inputs[place or 0]] for place in taken]
    assert sorted(places) == ["0/kernel", "1/0/mu/kernel", "1/0/nu/kernel"]


def test_neighbours_of_what_is_left_out_stay_fused():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=8)
    report = explain(tx, {"small": shape(5, 7), "large": shape(16, 16)})
    assert [line.split(":")[0].split("/")[-1] for line in report.fallback_reasons] == ["large"]
    assert report.phases[-1].leaves == 1


def test_dtypes_without_kernels_are_left_out():
    with jax.enable_x64(True):
        wide = {"wide": shape(5, 7, dtype=jnp.float64), "narrow": shape(5, 7)}
        (line,) = explain(optax.sgd(0.1), wide).fallback_reasons
    assert line == "0/wide: no kernel for float64"
    (line,) = explain(optax.sgd(0.1), {"w": shape(5, 7, dtype=jnp.complex64)}).fallback_reasons
    assert line == "0/w: no kernel for complex64"


def test_statistics_of_dtypes_without_kernels_are_left_out():
    """This holds even if nothing else is computed on the leaf."""

    def update(updates, state, params=None):
        del params
        largest = jnp.max(updates["narrow"]).astype(jnp.float32)
        still = jnp.zeros_like(updates["narrow"])
        return {"narrow": still, "wide": updates["wide"] * largest}, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    leaves = {"narrow": shape(5, 7, dtype=jnp.float8_e4m3fn), "wide": shape(5, 7)}
    left = [line for line in explain(tx, leaves).fallback_reasons if line.startswith("2/narrow")]
    assert left == ["2/narrow: no kernel for float8_e4m3fn"]


def test_arrays_that_a_backend_can_not_store_are_left_out():
    def flip(updates, state, params=None):
        del params
        return updates, jax.tree.map(jnp.logical_not, state)

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)

    tx = optax.GradientTransformation(init, flip)
    (line,) = explain(tx, LEAF, backend="mosaic").fallback_reasons
    assert line == "1/kernel: no kernel reads or writes bool"
    assert explain(tx, LEAF, backend="triton").fallback_reasons == ()
    # A fused optimizer's own backend is the default.
    assert explain(fuse(tx, backend="mosaic"), LEAF).fallback_reasons == (line,)


def test_leaves_past_32_bit_indices_are_left_out():
    (line,) = explain(optax.adamw(0.1), {"w": shape(2**16, 2**16)}).fallback_reasons
    assert line.startswith("0/w: 4294967296 elements")
    assert not explain(optax.adamw(0.1), {"w": shape(2**16, 2**15 - 1)}).fallback_reasons


def test_nothing_is_computed_to_explain():
    """Shapes of a model that would not fit are enough."""
    report = explain(optax_ext.novak(0.1), {"w": shape(2**15, 2**15)})
    assert report.parameters == 2**30
    assert report.launches == 1


def test_explanation_of_a_fused_optimizer_is_the_chains():
    tx = optax_ext.vradam(0.1)
    assert explain(fuse(tx), RAGGED) == explain(tx, RAGGED)

    with pytest.raises(ValueError, match=r"tx must be fused with a backend .* got 'xla'"):
        explain(fuse(tx, backend="xla"), RAGGED)


def test_printed_report_names_what_is_left_out():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=8)
    report = explain(tx, {"large": shape(16, 16)})
    assert str(report).endswith(f"left to XLA: {report.fallback_reasons[0]}")


def test_empty_tree():
    report = explain(optax.adamw(0.1), {})
    assert report.phases == ()
    assert (report.parameters, report.launches, report.bytes_per_parameter) == (0, 0, 0)
    assert isinstance(report, pallas_kernels.Report)


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_equal_launches_are_lowered_once(backend):
    params = {f"{i:03}": shape(512) for i in range(2 * launches.LEAVES_PER_LAUNCH)}
    tx = fuse(optax.sgd(0.1), backend=backend)
    (phase,) = explain(tx, params).phases
    text = lowered(tx.step, params, jax.eval_shape(tx.init, params), params)
    assert (phase.launches, text.count("stablehlo.custom_call")) == (2, 1)
