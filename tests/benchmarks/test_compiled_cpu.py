"""The bytes that compiled steps move and allocate on a CPU: see docs/performance.md."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext
from benchmarks import summary
from benchmarks.hlo import read_entry, read_kernels
from benchmarks.optimizers import OPTIMIZERS, QUANTIZED, Optimizer, trained
from pallas_kernels import fuse
from tests.support.cases import CASES

pytestmark = pytest.mark.slow

LEAVES = {"leaf": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
PARAMETERS = 512 * 512

PAGE = (summary.DOCS / "low_precision.md").read_text(encoding="utf-8")


class Bytes(NamedTuple):
    """The bytes of a step for each parameter.

    Attributes:
      moved: read and written by all loops.
      temporary: allocated in addition to arguments and results.
    """

    moved: float
    temporary: float


# A loop for every array that is written, by hand: a moment reads itself and the gradient, FAME's
# further averages themselves and the one before; the update reads parameter and moments; slow
# weights read themselves and the new parameter. A norm reads what it is of.
MOMENTS, UPDATE, SLOW, NORM = 2 * 12, 16, 12, 4
BY_HAND = {
    "adamw": Bytes(MOMENTS + UPDATE, 0),
    "fame": Bytes(MOMENTS + 2 * 12 + UPDATE + 2 * 4, 0),
    "vradam": Bytes(MOMENTS + NORM + UPDATE, 0),
    "invadam": Bytes(MOMENTS + UPDATE, 0),
    "dualadam": Bytes(MOMENTS + UPDATE, 0),
    "caadam": Bytes(MOMENTS + UPDATE, 0),
    "lookahead(adamw)": Bytes(MOMENTS + UPDATE + 4 + SLOW, 0),
    "novak": Bytes(MOMENTS + UPDATE + 4 + SLOW, 0),
    # The update is stored between the moments and the parameter, and two norms are taken.
    "novak, trust ratio": Bytes(MOMENTS + 12 + 2 * NORM + UPDATE + SLOW, 4),
}

# With codes, XLA also copies the old ones, because their place is needed before they are last read.
# It stores what is encoded, because a group's scale comes first. And each loop decodes again.
CODED = {
    "adamw, 8 bits": Bytes(68.3125, 9.0625),
    "adamw, 8 bits, bfloat16": Bytes(79.3125, 16.0625),
    "lion, 8 bits": Bytes(34.6875, 5.0625),
    "fame, 8 bits": Bytes(120.0625, 19.1875),
    "vradam, 8 bits": Bytes(80.0625, 17),
    "novak, 8 bits": Bytes(98.3125, 12.0625),
}

# XLA stores an update whose norm a trust ratio takes, and squares relative to their largest.
STORED = dict.fromkeys(
    (
        "invadam-scale_free",
        "dualadam-scale_free",
        "novak-trust",
        "novak-trust_decay",
        "novak-trust_effective",
        "novak-full",
    ),
    4,
)


def compiled(optimizer: Optimizer) -> Bytes:
    params = jax.eval_shape(optimizer.prepare, LEAVES)
    state = jax.eval_shape(optimizer.tx.init, params)
    step = jax.jit(fuse(optimizer.tx, backend="xla").step, donate_argnums=(0, 1))
    program = step.lower(params, state, trained(params)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    moved = sum(kernel.bytes for kernel in read_kernels(read_entry(text), tpu=False))
    return Bytes(moved / PARAMETERS, memory.temp_size_in_bytes / PARAMETERS)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_bytes_are_those_of_a_calculation_by_hand(name):
    assert compiled(OPTIMIZERS[name]) == pytest.approx(BY_HAND[name], abs=0.01)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_stores_no_further_array_of_a_leafs_size(case):
    stored = STORED.get(str(case), 0)
    assert compiled(Optimizer(case.build())).temporary == pytest.approx(stored, abs=0.01)


def test_clipping_by_one_factor_stores_nothing():
    """Optax scales the gradients twice, and XLA stores what is between."""

    def clip(updates, state, params=None):
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < 1.0, 1, 1.0 / norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    by_one_factor = optax.GradientTransformation(lambda params: optax.EmptyState(), clip)
    chain = optax.chain(by_one_factor, optax.adamw(1e-3))
    assert compiled(Optimizer(chain)).temporary == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_cost_what_the_page_says(name):
    found = compiled(OPTIMIZERS[name])
    assert found == pytest.approx(CODED[name], abs=0.01)
    assert f"| {name} | {found.moved:.1f} | {found.temporary:.1f} |" in PAGE


def test_what_optax_stores_before_it_is_measured():
    assert compiled(OPTIMIZERS["clip + adamw"]).temporary == pytest.approx(4, abs=0.01)
    assert compiled(OPTIMIZERS["lamb"]).temporary == pytest.approx(8, abs=0.01)
    assert compiled(OPTIMIZERS["optax.lookahead(adamw)"]).temporary == pytest.approx(8, abs=0.01)


def test_decays_of_one_half_cost_no_copy():
    """XLA would factor out what both terms of a sum have in common."""
    halves = optax_ext.fame(1e-3, 0.5, 0.5, 0.5, 0.5, 0.5, second_moment="tema")
    thirds = optax_ext.fame(1e-3, 0.3, 0.3, 0.3, 0.3, 0.3, second_moment="tema")
    assert compiled(Optimizer(halves)) == pytest.approx(compiled(Optimizer(thirds)), abs=0.01)
    assert compiled(Optimizer(halves)).temporary == pytest.approx(0, abs=0.01)
