"""`examples/sharded.py` in two processes on one machine, of which one is killed."""

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
SMALL = ["--cpu-devices=2", "--model-parallel=2", "--width=32", "--layers=1", "--batch=8"]
OPTIONS = ["--optimizer=novak", f"--steps={STEPS}", f"--every={PERIOD}", "--give-up-after=10"]

Start = Callable[[Path], list[subprocess.Popen[str]]]


@pytest.fixture
def start(tmp_path):
    """Return a function that starts both processes with a checkpoint folder; end them at last."""
    started: list[subprocess.Popen[str]] = []
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }

    def start(folder: Path) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        both = [f"--coordinator=localhost:{port}", "--processes=2", f"--checkpoints={folder}"]
        processes = [
            subprocess.Popen(
                [sys.executable, EXAMPLE, *SMALL, *OPTIONS, *both, f"--process={i}"],
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
    """Return the lines that the first process printed, after both succeeded."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert not any("rematerialization" in output for output in outputs)
    return outputs[0].splitlines()


def kill_one_after_a_checkpoint(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    """Kill the second process; the first then ends by itself and says why."""
    deadline = time.monotonic() + 120
    while not (folder / str(PERIOD)).exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].kill()
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode not in (0, None)
    assert "another task died" in output or "Connection closed by peer" in output


@pytest.mark.slow
def test_a_process_is_killed_and_the_restarted_run_is_bit_exact(start: Start, tmp_path):
    whole = finish(start(tmp_path / "whole"))
    assert any(line.startswith("4 devices") and "processes: 2" in line for line in whole)
    kill_one_after_a_checkpoint(start(tmp_path / "killed"), tmp_path / "killed")
    resumed = finish(start(tmp_path / "killed"))
    assert any(line.startswith(f"{PERIOD} steps done") for line in resumed)
    assert resumed[-1].startswith("weights")
    assert resumed[-1] == whole[-1]
