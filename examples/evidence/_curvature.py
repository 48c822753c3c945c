"""The largest curvature of a loss, and a network whose curvature exists."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matfree import decomp


def initialize_smooth(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) / np.sqrt(m), "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def apply_smooth(params: Any, x: jax.Array) -> jax.Array:
    """Apply dense layers with a hyperbolic tangent, whose loss is smooth: its curvature exists."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


# The largest eigenvalue of a trained network's Hessian is well separated, so this many are enough.
MATVECS = 16


def sharpness(loss: Callable[[Any], jax.Array], params: Any, scale: Any = None) -> jax.Array:
    """Return the largest eigenvalue of the Hessian H, or of D H D with D = diag(`scale`)."""

    def product(v: Any) -> Any:
        if scale is None:
            return jax.jvp(jax.grad(loss), (params,), (v,))[1]
        return _times(scale, jax.jvp(jax.grad(loss), (params,), (_times(scale, v),))[1])

    begin = optax.tree.random_like(jax.random.key(0), params)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    tridiagonal = decomp.tridiag_sym(min(MATVECS, number))(product, begin).J_small
    return jnp.linalg.eigvalsh(tridiagonal)[-1]


def scale_of_adam(nu: Any, count: jax.Array | int, *, b1: float, b2: float, eps: float) -> Any:
    """Return the D for which D H D has the eigenvalues of P^-1 H, where P divides Adam's momentum.

    D = P^-1/2 and P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps), as in Cohen et al. 2022, arXiv
    2207.14484.
    """
    return jax.tree.map(
        lambda v: ((1 - b1**count) * (jnp.sqrt(v / (1 - b2**count)) + eps)) ** -0.5, nu
    )


def _times(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.multiply, a, b)
