"""The tests' own settings: they don't depend on pytest's plugins that a user may switch off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_tests_are_collected_without_plugins():
    # That file has tests in an `xdist_group`.
    collect = ["--collect-only", "-q", "tests/pallas_kernels/test_fuse.py"]
    collect += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *collect],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout
