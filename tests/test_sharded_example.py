"""The example for many devices, in two processes that talk over loopback, one killed on the way."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded.py"
STEPS, PERIOD = 24, 8
SMALL = ["--cpu-devices=2", "--width=16", "--layers=1", "--batch=8"]


def start(folder: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = [f"--coordinator=localhost:{port}", "--processes=2", f"--checkpoints={folder}"]
    run += [f"--steps={STEPS}", f"--save-every={PERIOD}", *SMALL, *options]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, str(EXAMPLE), *run, f"--process={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What the first process printed, line by line."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs[0].splitlines()


def kill_after_a_checkpoint(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    end = time.monotonic() + 120
    while not (folder / str(PERIOD)).exists():
        assert time.monotonic() < end, "no checkpoint was written"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in reversed(processes):
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_two_processes_killed_and_restarted_end_where_one_run_ends(tmp_path):
    options = ["--optimizer=novak", "--model-parallel=2"]
    whole = finish(start(tmp_path / "whole", *options))
    assert any(line.startswith("4 devices in 2 processes") for line in whole)
    kill_after_a_checkpoint(start(tmp_path / "killed", *options), tmp_path / "killed")
    resumed = finish(start(tmp_path / "killed", *options))
    assert any(line.startswith("resumed after step") for line in resumed)
    assert resumed[-1].startswith(f"step {STEPS}: loss")
    assert resumed[-1] == whole[-1]
