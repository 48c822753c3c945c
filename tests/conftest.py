"""Strict settings for every test: eight virtual CPU devices, and nothing promoted in silence."""

import os
from collections.abc import Iterator

# Both are read once, when JAX is first imported.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test; a library for float32 users must not be tested in x64 alone."""
    with jax.enable_x64(True):
        yield
