"""Steps compiled for eight chips of a TPU: memory and communication per device."""

import functools

import optax
import pytest

from benchmarks import plan
from benchmarks.aot import V5E
from benchmarks.contenders import CONTENDERS
from benchmarks.latest import Row
from benchmarks.layouts import SHARDED_SETS, held, shards
from benchmarks.leaf_sets import Leaves
from benchmarks.plan import OPTIMIZERS
from benchmarks.plan_figures import changes

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
    params = held(CONTENDERS[name].hold, leaves_on(leaf_set))
    return plan.measure(OPTIMIZERS[name], params, CHIPS, ["chain"])


def excess(row: Row) -> float:
    """Return the memory of a chip above the ideal, relative to the ideal."""
    return (row["chain"]["held"] - row["gradients"]) / row["ideal"] - 1


# Rotating lookahead takes its chunk along an axis that may be cut. Codes are computed in place,
# whatever the chain: one of the chains in 8 bits shows it.
CODED = {name for name in OPTIMIZERS if "8 bits" in name} - {"lion, 8 bits"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - CODED - {"novak, rotating"}))
def test_a_step_holds_its_share_and_is_told_norms_only(name):
    row = measured(name, SQUARE)
    assert abs(excess(row)) < 0.02
    # Leaves that are cut by the same axes in another order have all-reduces of their own.
    assert row["chain"]["collectives"] in (0, 2 * SUMS.get(name, 1))
    numbers = sum(numbers for _, numbers in row["chain"]["kinds"].values())
    assert numbers <= LEAVES * NUMBERS.get(name, 0)
    assert row["chain"]["kinds"].keys() <= {"all-reduce"}


@pytest.mark.parametrize("name", NUMBERS)
def test_norms_of_fully_sharded_leaves_are_told_at_once(name):
    row = measured(name, FULL)
    assert abs(excess(row)) < 0.02
    assert row["chain"]["kinds"] == {"all-reduce": [SUMS.get(name, 1), NUMBERS[name]]}


def test_more_talk_is_told():
    params = leaves_on(FULL)
    tx = optax.chain(optax.centralize(), OPTIMIZERS["adamw"])  # means of columns, which are cut
    row = plan.measure(tx, params, CHIPS, ["chain"])
    found = changes(measured("adamw", FULL), row, shards(params))
    assert {change.figure.key for change in found if change.worse} >= {"collectives", "told"}


def test_a_chip_that_holds_more_is_told():
    params = leaves_on(FULL)
    tx = optax.chain(OPTIMIZERS["adamw"], optax.trace(0.9))
    row = plan.measure(tx, params, CHIPS, ["chain"])
    found = changes(measured("adamw", FULL), row, shards(params))
    assert {change.figure.key for change in found if change.worse} == {"held", "bytes"}
