"""The recorded figures of compiled steps, compared with calculations and new figures."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from benchmarks import RESULTS, results
from benchmarks.compiled_figures import BYTES, KERNELS, TEMPORARY, changes
from benchmarks.compiled_report import markdown
from benchmarks.leaf_sets import COMPILED_SETS, RAGGED
from benchmarks.results import Row
from benchmarks.shapes import count

RECORDED = {
    where: results.load(RESULTS / f"compiled-{where}.json")
    for where in ("h200-aot", "tpu-aot", "h200-aot-1x1x8", "tpu-aot-v5e-16x16")
}
TOPOLOGIES = {"h200-aot-1x1x8": "1x1x8", "tpu-aot-v5e-16x16": "v5e:16x16"}
LARGE = "one of 4096 × 4096"


class Expected(NamedTuple):
    """The expected figures of an optimizer's fused step.

    Attributes:
      bytes: moved for each parameter, slow weights included.
      launches: kernels on ResNet-50's leaves, XLA's for scalars included, at most.
    """

    bytes: float
    launches: int = 12


# Reads and writes of float32 by hand: gradient, parameter and each moment in, all but the gradient
# out; slow weights in and out. A norm of the gradient reads 4 more, of a new moment 8; one of
# Adam's step and the parameter reads the four and writes the moments, so the parameter and both
# moments are read once more.
BY_HAND = {
    "adamw": Expected(28),
    "clip + adamw": Expected(28 + 4, launches=26),
    "lamb": Expected(28 + 12, launches=26),
    "lookahead(adamw)": Expected(28 + 8),
    "fame": Expected(28 + 2 * 8),
    "vradam": Expected(28 + 8, launches=26),
    "invadam": Expected(28),
    "dualadam": Expected(28),
    "novak": Expected(28 + 8),
    "novak, trust ratio": Expected(28 + 8 + 12, launches=26),
    "caadam": Expected(28),
}

# Codes take 1 byte and 1/16 for scales, slow weights 3; both are read and written.
CODES = 2 * (1 + 1 / 16)
QUANTIZED = {
    "adamw, 8 bits": Expected(12 + 2 * CODES),
    # Parameters and gradients take 2 bytes, and the state has the weights' third byte.
    "adamw, 8 bits, bfloat16": Expected(6 + 2 + 2 * CODES),
    "lion, 8 bits": Expected(12 + CODES),
    "fame, 8 bits": Expected(12 + 4 * CODES),
    # The norm reads the gradient and the codes of a moment.
    "vradam, 8 bits": Expected(12 + 2 * CODES + 4 + CODES / 2, launches=26),
    "novak, 8 bits": Expected(12 + 2 * CODES + 6, launches=14),
}

# A TPU keeps one array of the large leaf on the chip, and so need not read it again.
KEPT_ON_TPU = {"lamb": 4, "novak, trust ratio": 4}


def steps(name: str) -> Iterator[tuple[str, Row]]:
    """An optimizer's rows of the H200, by sets of leaves."""
    for leaf_set in COMPILED_SETS:
        case = f"{leaf_set} / {name}"
        if case in RECORDED["h200-aot"]:
            yield leaf_set, RECORDED["h200-aot"][case]


every_optimizer = pytest.mark.parametrize("name", BY_HAND)
every_chain = pytest.mark.parametrize("name", BY_HAND | QUANTIZED)


@every_chain
def test_what_every_change_is_judged_by_is_there(name):
    assert f"ragged / {name}" in RECORDED["h200-aot"]
    assert f"{LARGE} / {name}" in RECORDED["tpu-aot"]


@every_optimizer
def test_the_bytes_are_those_of_a_calculation_by_hand(name):
    for _, row in steps(name):
        for way in ("triton", "mosaic"):
            assert row[way]["bytes"] == pytest.approx(BY_HAND[name].bytes, rel=0.005)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_bytes_of_codes_are_those_of_a_calculation_by_hand(name):
    recorded = dict(steps(name))
    assert recorded.keys() >= {"ResNet-50", "GPT-2 124M", LARGE}
    # Small leaves stay float32, and the ragged leaves are small.
    for leaf_set in recorded.keys() - {"ragged"}:
        found = recorded[leaf_set]["triton"]["bytes"]
        assert found == pytest.approx(QUANTIZED[name].bytes, rel=0.005)


@every_optimizer
def test_the_bytes_are_those_of_a_calculation_for_a_tpu(name):
    expected = BY_HAND[name].bytes - KEPT_ON_TPU.get(name, 0)
    row = RECORDED["tpu-aot"][f"{LARGE} / {name}"]
    assert row["xla"]["bytes"] == pytest.approx(expected, rel=0.005)


@every_chain
def test_fused_steps_move_no_more_than_the_chain(name):
    for _, row in steps(name):
        # Scalars between launches may cost a little.
        assert row["triton"]["bytes"] <= 1.002 * row["xla"]["bytes"]


@every_chain
def test_fused_steps_need_no_temporary_memory(name):
    for _, row in steps(name):
        assert max(row["triton"]["temporary"], row["mosaic"]["temporary"]) < 0.01


@every_chain
def test_mosaic_runs_the_same_program(name):
    for _, row in steps(name):
        assert 0 < row["triton"]["pallas"] == row["mosaic"]["pallas"]
        assert row["mosaic"]["bytes"] == pytest.approx(row["triton"]["bytes"], rel=0.005)


@every_chain
def test_a_network_takes_few_launches(name):
    for leaf_set, row in steps(name):
        if leaf_set == "ResNet-50":
            assert row["triton"]["kernels"] <= (BY_HAND | QUANTIZED)[name].launches


@pytest.mark.parametrize("where", RECORDED)
def test_tables_show_the_rows(where):
    text = (RESULTS / f"compiled-{where}.md").read_text(encoding="utf-8")
    topology = TOPOLOGIES.get(where)
    device = where.removesuffix(f"-{topology}".replace(":", "-"))
    assert text == markdown(device, RECORDED[where], topology)


# Of a pod's chips: all-reduces, and the numbers that they must exchange for each leaf, or for all.
ONE_OF_ALL, OF_EACH = 1, 291
NORMS = {
    "clip + adamw": ONE_OF_ALL,
    "vradam": ONE_OF_ALL,
    # Optax finds each norm twice, to see whether it is 0.
    "lamb": 4 * OF_EACH,
    "novak, trust ratio": 2 * OF_EACH,
}


@every_optimizer
@pytest.mark.parametrize("leaf_set", ["LLaMA-7B", "LLaMA-7B, fully sharded"])
def test_a_chip_of_a_pod_has_its_share(name, leaf_set):
    row = RECORDED["tpu-aot-v5e-16x16"][f"{leaf_set} / {name}"]
    assert row["gradients"] == 4 * 6_738_415_616 / 256
    assert row["ideal"] == pytest.approx(IDEAL.get(name, 3) * row["gradients"], rel=1e-6)
    assert row["xla"]["memory"] - row["gradients"] == pytest.approx(row["ideal"], rel=0.02)


# Arrays as large as the parameters: these and the state.
IDEAL = {"fame": 5, "lookahead(adamw)": 4, "novak": 4, "novak, trust ratio": 4}


@every_optimizer
def test_the_chips_of_a_pod_exchange_norms(name):
    recorded = RECORDED["tpu-aot-v5e-16x16"]
    full, square = (
        recorded[f"{leaf_set} / {name}"]["xla"]["kinds"]
        for leaf_set in ("LLaMA-7B, fully sharded", "LLaMA-7B")
    )
    assert full.keys() == square.keys() == ({"all-reduce"} if name in NORMS else set())
    for kinds in (full, square):
        assert sum(numbers for _, numbers in kinds.values()) <= 4 * OF_EACH
    assert sum(numbers for _, numbers in full.values()) == NORMS.get(name, 0)


@pytest.mark.parametrize("case", RECORDED["h200-aot-1x1x8"])
def test_kernels_on_shards_are_those_on_whole_leaves(case):
    row, name = RECORDED["h200-aot-1x1x8"][case], case.partition(" / ")[2]
    for way in ("triton", "mosaic"):
        assert row[way]["bytes"] == pytest.approx(BY_HAND[name].bytes, rel=0.005)
        assert row[way]["kernels"] <= BY_HAND[name].launches
        assert row[way]["memory"] - row["gradients"] == pytest.approx(row["ideal"], rel=0.02)
        # One vector of all leaves.
        assert row[way]["kinds"].keys() <= {"all-reduce"}
        assert row[way]["collectives"] == (name in NORMS)


@pytest.mark.parametrize("figure", [KERNELS, BYTES, TEMPORARY], ids=lambda figure: figure.key)
@pytest.mark.parametrize("way", ["xla", "triton"])
@pytest.mark.parametrize(
    ("slacks", "worse"), [(0, []), (0.9, []), (-0.9, []), (1.1, [True]), (-1.1, [False])]
)
def test_each_figure_of_each_way_is_judged(figure, way, slacks, worse):
    recorded = RECORDED["h200-aot"]["ragged / adamw"]
    measured: Any = copy.deepcopy(recorded)
    measured[way][figure.key] += slacks * figure.slack(RAGGED)
    found = list(changes(recorded, measured, RAGGED))
    assert [change.worse for change in found] == worse
    assert all((change.backend, change.figure) == (way, figure) for change in found)


@pytest.mark.parametrize("leaf_set", COMPILED_SETS)
def test_the_copy_of_an_average_leaf_is_more_than_the_slack(leaf_set):
    leaves = COMPILED_SETS[leaf_set]
    read_and_written = 2 * 4 / len(leaves)
    assert read_and_written > BYTES.slack(leaves)
    assert count(leaves) * BYTES.slack(leaves) < 100_000
