"""Arrays that wait in the host's memory and come to the device when they are needed.

JAX's types say in which memory an array lies, so arithmetic on one that is away is an error, and
what goes between the memories stands in the code.
"""

from typing import Any

import jax
from jax import lax


def away(x: jax.Array) -> jax.Array:
    """`x` in host memory, cut over devices as before."""
    return jax.device_put(x, jax.memory.Space.Host)


def fetched(x: jax.Array, when: jax.Array) -> jax.Array:
    """`x` on the device where `when` is true, else zeros, and nothing is moved."""
    return lax.cond(when, _here, lambda x: lax.full_like(_here(x), 0), x)


def sent(x: jax.Array, old: jax.Array, when: jax.Array) -> jax.Array:
    """`x` in host memory where `when` is true, else `old`, which is there, and nothing is moved."""
    return lax.cond(when, lambda x, _: away(x), lambda _, old: old, x, old)


def types(function: Any, *arguments: Any) -> Any:
    """What `function` returns, as types: like `jax.eval_shape`, but they know their memory."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


def kind(type_: Any) -> str | None:
    """JAX's name of the memory in which an array of this type lies; `None` is the device's own."""
    return "pinned_host" if type_.memory_space == jax.memory.Space.Host else None


def _here(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)
