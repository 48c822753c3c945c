"""A network whose loss has a curvature everywhere: dense layers with a hyperbolic tangent."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def initialize(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) / np.sqrt(m), "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Smooth, as a curvature must be to mean anything."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]
