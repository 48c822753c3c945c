"""The programs of `python -m benchmarks gpu`: with and without graphs, and loops."""

from pathlib import Path

import jax
import optax
import pytest

from pallas_kernels import fuse

pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `aot`: XLA's compiler for GPUs")

from benchmarks import timing
from benchmarks.aot import H200, compiled_anew, lower
from benchmarks.gpu_process import NO_GRAPHS
from benchmarks.shapes import leaves

LEAVES = leaves([(4096,), (512, 512), (3, 1024)])
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def launched(folder: Path, *, graphs: bool, steps: int | None = None) -> str:
    """A line for each kernel and graph that XLA will launch for a step, or a loop of steps."""
    step = fuse(CLIPPED, backend="xla").step
    program = timing.in_loop(step, steps) if steps else step
    with compiled_anew():
        lowered = lower(program, LEAVES, jax.eval_shape(CLIPPED.init, LEAVES), H200)
        options = {"xla_dump_to": str(folder)} | ({} if graphs else NO_GRAPHS)
        lowered.compile(compiler_options=options)
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
