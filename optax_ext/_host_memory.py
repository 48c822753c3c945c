"""Arrays that are stored in the host's memory and moved to the device when they are needed.

JAX's types say in which memory an array is. So arithmetic on an array in the host's memory is an
error, and every move between the memories is explicit in the code.
"""

from typing import Any

import jax
from jax import lax


def to_host(x: jax.Array) -> jax.Array:
    """Move `x` to the host's memory, with the same sharding."""
    return jax.device_put(x, jax.memory.Space.Host)


def load_if(x: jax.Array, when: jax.Array) -> jax.Array:
    """Move `x` to the device if `when` is true, else return zeros and move nothing."""
    return lax.cond(when, _here, lambda x: lax.full_like(_here(x), 0), x)


def store_if(x: jax.Array, old: jax.Array, when: jax.Array) -> jax.Array:
    """Move `x` to the host's memory if `when` is true, else return `old`, which is there."""
    return lax.cond(when, lambda x, _: to_host(x), lambda _, old: old, x, old)


def types(function: Any, *arguments: Any) -> Any:
    """Return the types of a result, like `jax.eval_shape`, but with their memory spaces."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def kind(type_: Any) -> str | None:
    """Return JAX's name for the memory of a type; `None` is the device's memory."""
    return "pinned_host" if type_.memory_space == jax.memory.Space.Host else None


def _here(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)
