"""Strict settings for every test: eight virtual CPU devices, and nothing promoted in silence."""

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# Both are read once, when JAX is first imported. Almost every program here runs for less time than
# LLVM would take to optimize it.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept what pyproject.toml tells xdist where that is not loaded."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--dist")


def pytest_configure(config: pytest.Config) -> None:
    """Let workers and runs share what they compile: thousands of small programs, many equal."""
    config.addinivalue_line("markers", "xdist_group(name): runs in one process with its group")
    cache: pytest.Cache | None = getattr(config, "cache", None)  # -p no:cacheprovider
    if cache is not None and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Most trees of the tests are no networks; `test_connection_units.py` tests the warning.
    config.addinivalue_line("filterwarnings", "ignore:.*nothing will be scaled:UserWarning")


def pytest_collection_finish() -> None:
    """Exempt all present objects from garbage collection, because they stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def load_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of the examples, or of the evidence, as the script does: from its folder."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(examples)
    monkeypatch.syspath_prepend(examples / "evidence")
    return importlib.import_module


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test; a library for float32 users must not be tested in x64 alone."""
    with jax.enable_x64(True):
        yield
