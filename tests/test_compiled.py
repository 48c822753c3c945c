"""What fused steps become on an H200, compiled without one: kernels, traffic, memory."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import optax
import pytest

import optax_ext
from pallas_kernels import fuse

pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `aot`: XLA's compiler for GPUs")

from benchmarks import aot, timing
from benchmarks.aot import Program, compile_step, ptx
from benchmarks.gpu.times import Lowering
from benchmarks.leaf_sets import LEAF_SETS, Leaves, count, leaves


class Expected(NamedTuple):
    """A row: an optimizer, and the bytes per parameter that its step must move.

    Attributes:
      optimizer: the chain.
      always: moved in every step.
      skipped: moved only in steps that synchronize slow weights.
      launches: kernels of a step on ResNet-50's leaves, XLA's for scalars included, at most.
    """

    optimizer: optax.GradientTransformation
    always: int
    skipped: int = 0
    launches: int = 12


# Reads and writes of float32 by hand: gradient, parameter and each moment in, all but the gradient
# out. A norm of the gradient reads 4 more, of a new moment 8; one of Adam's step and the parameter
# reads the four and writes the moments, so the parameter and both moments are read once more.
ROWS = {
    "adamw": Expected(optax.adamw(1e-3), 28),
    "clip": Expected(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 32, launches=26
    ),
    "lamb": Expected(optax.lamb(1e-3), 40, launches=26),
    "fame": Expected(optax_ext.fame(1e-3), 44),
    "vradam": Expected(optax_ext.vradam(1e-3), 36, launches=26),
    "invadam": Expected(optax_ext.invadam(1e-3), 28),
    "dualadam": Expected(optax_ext.dualadam(1e-3), 28),
    "caadam": Expected(optax_ext.caadam(1e-3), 28),
    "novak": Expected(optax_ext.novak(1e-3), 28, 8),
    "novak_trust": Expected(optax_ext.novak(1e-3, trust_ratio=True), 40, 8, launches=26),
}

_SHAPES = "512,512 1023 3,3,64,64 64 1000,513 7 2048,300 1 129,129 512,1000"
RAGGED = leaves(tuple(map(int, shape.split(","))) for shape in _SHAPES.split())
WHOLE_BLOCKS = leaves([(4096,), (512, 512), (3, 1024)])


@functools.cache
def compiled(name: str, backend: str = "auto") -> Program:
    """A row's step on ragged leaves."""
    return compile_row(name, RAGGED, backend)


def compile_row(name: str, params: Leaves, backend: str = "auto") -> Program:
    tx = ROWS[name].optimizer
    return compile_step(fuse(tx, backend=backend).step, params, jax.eval_shape(tx.init, params))


every_row = pytest.mark.parametrize("name", ROWS)


@every_row
def test_the_bytes_are_those_of_a_calculation_by_hand(name):
    row = ROWS[name]
    expected = row.always + row.skipped
    assert compiled(name).bytes / count(RAGGED) == pytest.approx(expected, rel=0.005)


@every_row
def test_no_more_bytes_than_the_chain(name):
    # Scalars between launches may cost a little.
    assert compiled(name).bytes <= 1.002 * compiled(name, "xla").bytes


@every_row
def test_only_pallas_kernels_touch_leaves(name):
    program = compiled(name)
    assert program.of_kind("pallas")
    scalars = [kernel.bytes for kernel in program.kernels if kernel.kind != "pallas"]
    assert max(scalars) < 4 * 512


@every_row
def test_memory_beside_arguments_and_results(name):
    assert compiled(name).temporary < 0.01 * 4 * count(RAGGED)


@pytest.mark.parametrize("name", ["adamw", "novak", "lamb"])
def test_mosaic_runs_the_same_program(name):
    triton, mosaic = compiled(name), compiled(name, "mosaic")
    assert len(mosaic.of_kind("pallas")) == len(triton.of_kind("pallas"))
    assert mosaic.bytes == pytest.approx(triton.bytes, rel=0.005)
    assert mosaic.temporary < 0.01 * 4 * count(RAGGED)


def accesses(name: str, direction: str, params: Leaves = WHOLE_BLOCKS) -> tuple[int, int]:
    """Vectorized loads ("ld") or stores ("st") of a fused step: all, and the predicated ones."""
    tx = ROWS[name].optimizer
    assembly = ptx(fuse(tx).step, params, jax.eval_shape(tx.init, params))
    found = re.findall(rf"(@%p\d+ +)?{direction}\.global[\w.]*\.v4", assembly)
    return len(found), sum(predicate != "" for predicate in found)


@pytest.mark.parametrize(("direction", "arrays"), [("ld", 5), ("st", 4)])
def test_lookahead_skips_slow_weights_by_a_predicate(direction, arrays):
    everything, predicated = accesses("novak", direction)
    assert predicated > 0
    assert everything == arrays * predicated  # one array of them: the slow weights


@pytest.mark.parametrize("direction", ["ld", "st"])
def test_whole_blocks_have_no_predicate(direction):
    everything, predicated = accesses("adamw", direction)
    assert everything > 0
    assert predicated == 0


@pytest.mark.parametrize("shape", [(1023, 513), (1001, 2)])
def test_only_the_last_block_of_an_odd_leaf_is_masked(shape):
    odd, even = leaves([shape]), leaves([(1024, 512)])
    assert accesses("adamw", "ld", odd) == accesses("adamw", "ld", even)
    assert accesses("adamw", "st", odd) == accesses("adamw", "st", even)


def test_on_cpu_the_chain_runs():
    tx = ROWS["adamw"].optimizer
    lowered = jax.jit(fuse(tx).step).lower(RAGGED, jax.eval_shape(tx.init, RAGGED), RAGGED)
    assert "custom_call" not in lowered.as_text()


def launched(folder: Path, *, graphs: bool, steps: int | None = None) -> str:
    """A line for each kernel and graph that XLA will launch for a step, or a loop of steps."""
    tx = ROWS["clip"].optimizer
    step = fuse(tx, backend="xla").step
    program = timing.in_loop(step, steps) if steps else step
    with aot._compiled_anew():
        lowered = aot._lower(program, WHOLE_BLOCKS, jax.eval_shape(tx.init, WHOLE_BLOCKS))
        Lowering(lowered).compile(graphs=graphs, xla_dump_to=str(folder))
    return "".join(path.read_text() for path in folder.glob("*thunk_sequence*.txt"))


def test_graphs_are_left_out_where_asked(tmp_path):
    with_graphs, without = (
        launched(tmp_path / str(graphs), graphs=graphs) for graphs in (True, False)
    )
    assert "kCommandBuffer" in with_graphs
    assert "kCommandBuffer" not in without
    assert "kCustomKernel" in without


def test_a_loop_launches_all_that_a_step_does(tmp_path):
    once = launched(tmp_path / "once", graphs=False)
    looped = launched(tmp_path / "loop", graphs=False, steps=20)
    before, body = looped.split("body:")
    # One more counts the steps. A number of them that is known takes no test of whether to go on.
    assert body.count("kCustomKernel") == once.count("kCustomKernel") + 1
    assert "kCopy" not in body
    assert before.count(": kCopy") == 1  # of the count


# One row for each structure of phases and scalars; all are in benchmarks/results/plan-h200.md.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "lamb", "novak", "novak_trust"])
def test_a_network_takes_few_launches(name):
    kernels = compile_row(name, LEAF_SETS["ResNet-50"]).kernels
    assert len(kernels) <= ROWS[name].launches
