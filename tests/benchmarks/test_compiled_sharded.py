"""Steps compiled for eight chips of a TPU: memory and communication per device."""

import functools

import optax
import pytest

from benchmarks import compiled
from benchmarks.aot import V5E
from benchmarks.compiled_figures import changes
from benchmarks.leaf_sets import SHARDED_SETS
from benchmarks.optimizers import EXPLAINED
from benchmarks.results import Row
from benchmarks.shapes import Leaves, prepared, shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(V5E.missing(), reason="needs the extra `aot`: XLA's compiler for TPUs"),
]

CHIPS = V5E.on("v5e:2x4")
SQUARE, FULL = "small LLaMA", "small LLaMA, fully sharded"
LEAVES = 21

# Numbers that a step needs to know of all shards: one of all leaves, or some of each.
NUMBERS = {
    "clip + adamw": 1,
    "vradam": 1,
    "lamb": 4 * LEAVES,
    "novak, trust ratio": 2 * LEAVES,
}
# Optax's lamb finds each norm twice, to see whether it is 0, and XLA doesn't merge them.
SUMS = {"lamb": 2}


def leaves_on(leaf_set: str) -> Leaves:
    return SHARDED_SETS[leaf_set].on(CHIPS.devices())


@functools.cache
def measured(name: str, leaf_set: str) -> Row:
    params = prepared(EXPLAINED[name].prepare, leaves_on(leaf_set))
    return compiled.measure(EXPLAINED[name].tx, params, CHIPS, ["xla"])


def excess(row: Row) -> float:
    """Return the memory of a chip above the ideal, relative to the ideal."""
    return (row["xla"]["memory"] - row["gradients"]) / row["ideal"] - 1


# Rotating lookahead takes its chunk along an axis that may be cut. Codes are computed in place,
# whatever the chain: one of the chains in 8 bits shows it.
CODED = {name for name in EXPLAINED if "8 bits" in name} - {"lion, 8 bits"}


@pytest.mark.parametrize("name", sorted(EXPLAINED.keys() - CODED - {"novak, rotating"}))
def test_a_step_has_its_share_and_receives_norms_only(name):
    row = measured(name, SQUARE)
    assert abs(excess(row)) < 0.02
    # Leaves that are cut by the same axes in another order have all-reduces of their own.
    assert row["xla"]["collectives"] in (0, 2 * SUMS.get(name, 1))
    numbers = sum(numbers for _, numbers in row["xla"]["kinds"].values())
    assert numbers <= LEAVES * NUMBERS.get(name, 0)
    assert row["xla"]["kinds"].keys() <= {"all-reduce"}


@pytest.mark.parametrize("name", NUMBERS)
def test_norms_of_fully_sharded_leaves_take_one_all_reduce(name):
    row = measured(name, FULL)
    assert abs(excess(row)) < 0.02
    assert row["xla"]["kinds"] == {"all-reduce": [SUMS.get(name, 1), NUMBERS[name]]}


def test_more_communication_is_reported():
    params = leaves_on(FULL)
    tx = optax.chain(optax.centralize(), EXPLAINED["adamw"].tx)  # means of columns, which are cut
    row = compiled.measure(tx, params, CHIPS, ["xla"])
    found = changes(measured("adamw", FULL), row, shards(params))
    assert {change.figure.key for change in found if change.worse} >= {
        "collectives",
        "communication",
    }


def test_more_memory_is_reported():
    params = leaves_on(FULL)
    tx = optax.chain(EXPLAINED["adamw"].tx, optax.trace(0.9))
    row = compiled.measure(tx, params, CHIPS, ["xla"])
    found = changes(measured("adamw", FULL), row, shards(params))
    assert {change.figure.key for change in found if change.worse} == {"memory", "bytes"}
