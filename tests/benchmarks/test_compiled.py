"""Steps compiled for an H200 and a TPU that are not there; the command reports worse programs."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext
from pallas_kernels import fuse

pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `aot`: XLA's compiler for GPUs")

from benchmarks import compiled
from benchmarks.aot import H200, V5E, Target, compile_step, ptx
from benchmarks.compiled_figures import changes
from benchmarks.leaf_sets import COMPILED_SETS, RAGGED
from benchmarks.results import Row
from benchmarks.shapes import Leaves, leaves

needs_libtpu = pytest.mark.skipif(
    V5E.missing(), reason="needs the extra `aot`: XLA's compiler for TPUs"
)

ADAMW = optax.adamw(1e-3)
NOVAK = optax_ext.novak(1e-3)

SMALL = leaves([(512, 96), (64, 40), (200, 33), (100, 10)])
# Less than this a TPU keeps on the chip, where copies and passes move nothing.
LARGE = leaves([(4096, 4096)])
WHOLE_BLOCKS = leaves([(4096,), (512, 512), (3, 1024)])


def on_updates(function: Callable[[Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(function, updates))


def last_parameters() -> optax.GradientTransformation:
    """Keeps them, so that the new ones can't be written in their place."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, _, params: (updates, params),
    )


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), ADAMW)
REMEMBERED = optax.chain(ADAMW, last_parameters())
SPLIT = optax.chain(
    optax.scale_by_adam(),
    on_updates(jax.lax.optimization_barrier),
    optax.add_decayed_weights(1e-4),
    optax.scale_by_learning_rate(1e-3),
)


def measure(tx: optax.GradientTransformation, target: Target, backend: str) -> Row:
    return compiled.measure(tx, params_of(target), target, [backend])


def params_of(target: Target) -> Leaves:
    return LARGE if target is V5E else SMALL


@functools.cache
def sound(target: Target, backend: str) -> Row:
    return measure(ADAMW, target, backend)


def worse(recorded: Row, measured: Row, params: Leaves) -> set[str]:
    """Return the figures for which the command would fail."""
    return {change.figure.key for change in changes(recorded, measured, params) if change.worse}


@pytest.mark.parametrize(
    ("figure", "tx", "target", "backend"),
    [
        pytest.param("temporary", optax.flatten(ADAMW), H200, "xla", id="copy_into_one"),
        pytest.param("temporary", REMEMBERED, H200, "xla", id="copy"),
        pytest.param("temporary", REMEMBERED, V5E, "xla", id="copy_tpu", marks=needs_libtpu),
        pytest.param("bytes", SPLIT, H200, "xla", id="pass_between"),
        pytest.param("bytes", CLIPPED, H200, "xla", id="pass_for_norm"),
        pytest.param("bytes", CLIPPED, H200, "triton", id="pass_for_norm_fused"),
        pytest.param("bytes", CLIPPED, V5E, "xla", id="pass_for_norm_tpu", marks=needs_libtpu),
        pytest.param(
            "kernels", optax.chain(optax.centralize(), ADAMW), H200, "triton", id="kernel_for_each"
        ),
    ],
)
def test_a_chain_made_worse_is_reported(figure, tx, target, backend):
    measured = measure(tx, target, backend)
    assert figure in worse(sound(target, backend), measured, params_of(target))


def test_leaves_that_are_not_fused_are_reported():
    """They move no more bytes and take no memory, so a kernel for each is all that shows."""
    fallback_reasons = {"triton": sound(H200, "xla")["xla"]}
    assert worse(sound(H200, "triton"), fallback_reasons, SMALL) == {"kernels"}


def test_branches_are_refused():
    """XLA's copies for branches are in kernels that are not counted."""
    branching = optax.conditionally_transform(ADAMW, lambda step: jnp.asarray(step) % 5 == 0)
    with pytest.raises(NotImplementedError, match="conditional"):
        measure(branching, H200, "xla")


@pytest.fixture(params=["h200-aot", pytest.param("tpu-aot", marks=needs_libtpu)])
def command(request, monkeypatch, tmp_path) -> Callable[..., None]:
    """The command, of one optimizer on a set of leaves that takes no time."""
    monkeypatch.setitem(COMPILED_SETS, "tiny", leaves([(64, 64)]))
    monkeypatch.setattr(compiled.Run, "warm_up", lambda _: None)
    case = ["--device", request.param, "--sets=tiny", "--optimizers=adamw", f"--out={tmp_path}"]
    return lambda *options: compiled.main([*case, *options])


def figures(folder: Path) -> tuple[Path, Row]:
    """The recorded ones: their file, and all that is in it."""
    (path,) = folder.glob("compiled-*.json")
    return path, json.loads(path.read_text(encoding="utf-8"))


def test_the_command_fails_for_more_than_is_recorded(command, tmp_path, capsys):
    command("--record")
    path, rows = figures(tmp_path)
    command("--backends=xla")
    assert figures(tmp_path) == (path, rows)

    rows["tiny / adamw"]["xla"]["bytes"] -= 4
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        command("--backends=xla")
    assert exit_.value.code == 1
    message = "tiny / adamw, xla, bytes/parameter: recorded 24."
    assert message in capsys.readouterr().out
    assert figures(tmp_path) == (path, rows)

    command("--record")
    command("--backends=xla")


def test_what_is_not_recorded_is_an_error(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command()
    assert exit_.value.code == 2
    assert "benchmarks compiled --record --device" in capsys.readouterr().err


def test_mosaic_runs_what_is_recorded():
    selected = ["--sets=ragged", "--optimizers", "adamw", "novak", "lamb", "adamw, 8 bits"]
    compiled.main([*selected, "--backends=mosaic"])


def test_devices_that_share_leaves_run_what_is_recorded():
    selected = ["--topology=1x1x8", "--sets=small LLaMA", "--optimizers", "lamb", "novak"]
    compiled.main([*selected, "--backends", "triton", "mosaic"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=many"], "--topology many: "),
        (["--topology=1x1x8", "--sets=ragged"], "the sets for a --topology are LLaMA-7B"),
        (["--sets=small LLaMA"], "the sets for one device are ragged"),
        (["--topology=1x1x8", "--record"], "--record with a --topology needs --sets"),
        (
            ["--topology=1x1x2"],
            "--record --device h200-aot --topology 1x1x2 --sets LLaMA-7B",
        ),
    ],
)
def test_topologies_that_can_not_be_compiled_for(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        compiled.main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# One for each structure of phases and scalars.
@pytest.mark.slow
def test_a_network_runs_what_is_recorded():
    selected = ["--sets=ResNet-50", "--optimizers", "adamw", "novak", "lamb", "adamw, 8 bits"]
    compiled.main([*selected, "--backends=triton"])


@pytest.mark.parametrize("tx", [ADAMW, optax_ext.novak(1e-3, trust_ratio=True)])
def test_only_pallas_kernels_touch_leaves(tx):
    step = fuse(tx).step
    program = compile_step(step, RAGGED, jax.eval_shape(tx.init, RAGGED))
    assert program.of_kind("pallas")
    scalars = [kernel.bytes for kernel in program.kernels if kernel.kind != "pallas"]
    assert max(scalars) < 4 * 512


def accesses(
    tx: optax.GradientTransformation, direction: str, params: Leaves = WHOLE_BLOCKS
) -> tuple[int, int]:
    """Vectorized loads ("ld") or stores ("st") of a fused step: all, and the predicated ones."""
    assembly = ptx(fuse(tx).step, params, jax.eval_shape(tx.init, params))
    found = re.findall(rf"(@%p\d+ +)?{direction}\.global[\w.]*\.v4", assembly)
    return len(found), sum(predicate != "" for predicate in found)


@pytest.mark.parametrize(("direction", "arrays"), [("ld", 5), ("st", 4)])
def test_lookahead_skips_slow_weights_by_a_predicate(direction, arrays):
    everything, predicated = accesses(NOVAK, direction)
    assert predicated > 0
    assert everything == arrays * predicated  # one array of them: the slow weights


@pytest.mark.parametrize("direction", ["ld", "st"])
def test_whole_blocks_have_no_predicate(direction):
    everything, predicated = accesses(ADAMW, direction)
    assert everything > 0
    assert predicated == 0


@pytest.mark.parametrize("shape", [(1023, 513), (1001, 2)])
def test_only_the_last_block_of_an_odd_leaf_is_masked(shape):
    odd, even = leaves([shape]), leaves([(1024, 512)])
    assert accesses(ADAMW, "ld", odd) == accesses(ADAMW, "ld", even)
    assert accesses(ADAMW, "st", odd) == accesses(ADAMW, "st", even)


def test_on_cpu_the_chain_runs():
    lowered = jax.jit(fuse(ADAMW).step).lower(RAGGED, jax.eval_shape(ADAMW.init, RAGGED), RAGGED)
    assert "custom_call" not in lowered.as_text()
