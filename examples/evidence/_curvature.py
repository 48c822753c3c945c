"""The largest curvature of a loss, by Lanczos' method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from matfree import decomp

# The largest eigenvalue of a trained network's Hessian stands apart: so few products find it.
MATVECS = 16


def sharpness(loss: Callable[[Any], jax.Array], params: Any, scale: Any = None) -> jax.Array:
    """The largest eigenvalue of the Hessian H, or of D H D for a tree `scale` of D's diagonal."""

    def product(v: Any) -> Any:
        if scale is None:
            return jax.jvp(jax.grad(loss), (params,), (v,))[1]
        return _times(scale, jax.jvp(jax.grad(loss), (params,), (_times(scale, v),))[1])

    begin = optax.tree.random_like(jax.random.key(0), params)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    tridiagonal = decomp.tridiag_sym(min(MATVECS, number))(product, begin).J_small
    return jnp.linalg.eigvalsh(tridiagonal)[-1]


def scale_of_adam(nu: Any, count: ArrayLike, *, b1: float, b2: float, eps: float) -> Any:
    """P^-1/2, so that D H D has the eigenvalues of P^-1 H, for P that divides Adam's momentum.

    P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps), as in Cohen et al. 2022, arXiv 2207.14484.
    """
    return jax.tree.map(
        lambda v: ((1 - b1**count) * (jnp.sqrt(v / (1 - b2**count)) + eps)) ** -0.5, nu
    )


def _times(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.multiply, a, b)
