"""The example for many devices, in two processes that talk over loopback, one killed on the way."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sharded.py"
STEPS, PERIOD = 12, 6
SMALL = ["--cpu-devices=2", "--width=32", "--layers=1", "--batch=8", "--give-up-after=10"]
# Each with the process that is killed: without the first, the other loses its coordinator at once.
LAYOUTS = {
    "replicated": (["--layout=replicated", "--optimizer=fame"], 0),
    "fully sharded, on two axes": (["--model-parallel=2", "--optimizer=novak"], 1),
}

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path):
    """Starts the two processes of a run, which share programs with other runs, and ends them."""
    started = []

    def start(folder: Path, *options: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        run = [f"--coordinator=localhost:{port}", "--processes=2", f"--checkpoints={folder}"]
        run += [f"--steps={STEPS}", f"--every={PERIOD}", *SMALL, *options]
        environment = os.environ | {
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(EXAMPLE), *run, f"--process={i}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for i in range(2)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the first process printed, line by line."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert not any("rematerialization" in output for output in outputs)
    return outputs[0].splitlines()


def kill_after_a_checkpoint(
    processes: list[subprocess.Popen[str]], victim: int, folder: Path
) -> None:
    """The one that is left ends by itself, and says why."""
    end = time.monotonic() + 120
    while not (folder / str(PERIOD)).exists():
        assert time.monotonic() < end, "no checkpoint was written"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[victim].kill()
    left = processes[1 - victim]
    said, _ = left.communicate(timeout=60)
    assert left.returncode not in (0, None)
    assert "another task died" in said or "Connection closed by peer" in said


@pytest.mark.slow
@pytest.mark.parametrize(("options", "victim"), LAYOUTS.values(), ids=LAYOUTS)
def test_one_process_killed_and_both_restarted_end_where_one_run_ends(
    options, victim, start: Start, tmp_path
):
    whole = finish(start(tmp_path / "whole", *options))
    assert any(line.startswith("4 devices") and "processes: 2" in line for line in whole)
    kill_after_a_checkpoint(start(tmp_path / "killed", *options), victim, tmp_path / "killed")
    resumed = finish(start(tmp_path / "killed", *options))
    assert any(line.startswith(f"{PERIOD} steps done") for line in resumed)
    assert resumed[-1].startswith("parameters")
    assert resumed[-1] == whole[-1]
