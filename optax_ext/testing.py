"""A check of the contract of gradient transformations. It needs chex."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    import chex
except ModuleNotFoundError as error:
    if error.name != "chex":
        raise
    raise ModuleNotFoundError("optax_ext.testing needs chex: pip install chex") from error

Step = Callable[[Any, Any, Any], tuple[Any, Any]]

_STEPS = 3
# Compilers fuse products with sums and add in another order, so results differ by a few roundings.
_ROUNDINGS = 16


def check_transformation(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    seed: int = 0,
    absent_gradients: bool = True,
    scales: Sequence[float] = (1e-18, 1e18),
    **extra_args: Any,
) -> None:
    """Check that a transformation does what `optax.chain`, JAX and Flax rely on.

    It runs a few steps on random gradients and checks:

    - The state keeps its structure, shapes, dtypes and weak types from `init` on. The updates have
      those of the gradients. Both are also checked for bfloat16 parameters.
    - Compiled steps trace once, and agree with eager steps.
    - `jax.lax.scan`, `jax.vmap` over two problems, and donated arguments give the same results.
    - Under `optax.masked` the transformation treats its part of the tree as if the rest did not
      exist.
    - A gradient that is `None` gives an update that is `None`.
    - Finite gradients give finite updates, even if they are very small or very large.

    Args:
      tx: the transformation.
      params: a tree of arrays for `tx.init`.
      seed: seed of the random gradients.
      absent_gradients: whether to check `None` gradients, which Optax's own optimizers don't
        accept.
      scales: factors on all gradients for which updates must be finite.
      **extra_args: further arguments of `tx.update`, after gradients and parameters.

    Raises:
      AssertionError: the transformation breaks the contract.

    >>> import jax.numpy as jnp, optax, optax_ext
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> check_transformation(optax_ext.ema(decay=0.9), params)
    >>> check_transformation(optax.trace(decay=0.9), params, absent_gradients=False)
    >>> untyped = optax.stateless(lambda updates, _: optax.tree.cast(updates, jnp.float16))
    >>> check_transformation(untyped, params)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    AssertionError: ...
    """
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.result_type(p)), params)
    grads = [random_like(params, seed + t) for t in range(_STEPS)]
    init, step = tx.init, _step_of(tx, extra_args)

    check_types(init, step, params, grads[0])
    check_types(init, step, *map(_in_bfloat16, (params, grads[0])))
    expected = _run(step, params, init(params), grads)
    check_jit(init, step, params, grads, expected)
    check_scan(init, step, params, grads, expected)
    check_vmap(init, step, params, grads, expected)
    check_donation(init, step, params, grads, expected)
    check_mask(tx, extra_args, params, grads)
    if absent_gradients:
        check_absent_gradients(init, step, params, grads)
    for scale in (1.0, *scales):
        check_finite(init, step, params, [_scaled(scale, gradient) for gradient in grads])


def check_types(init: Callable[..., Any], step: Step, params: Any, gradient: Any) -> None:
    """Check that the state keeps its types, and that the update has the types of the gradient."""
    state = jax.eval_shape(init, params)
    updates, after = jax.eval_shape(step, params, state, gradient)
    _assert_same_types(updates, jax.eval_shape(lambda g: g, gradient))
    _assert_same_types(after, state)


def check_jit(init, step: Step, params: Any, grads: Sequence[Any], expected: Any) -> None:
    """Check that a compiled step traces once and computes the same as an eager step."""
    chex.clear_trace_counter()  # chex counts all functions of one definition together
    traced_once = jax.jit(chex.assert_max_traces(step, n=1))
    _assert_close(_run(traced_once, params, jax.jit(init)(params), grads), expected)


def check_scan(init, step: Step, params: Any, grads: Sequence[Any], expected: Any) -> None:
    """Check that `jax.lax.scan` computes the same as a Python loop."""

    def body(carry, gradient):
        _, state = carry
        return step(params, state, gradient), None

    start = jax.tree.map(jnp.zeros_like, params), init(params)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    result, _ = jax.lax.scan(body, start, stacked, length=len(grads))
    _assert_close(result, expected)


def check_vmap(init, step: Step, params: Any, grads: Sequence[Any], expected: Any) -> None:
    """Check that a problem has the same result under `jax.vmap` as alone."""

    def double(tree):
        return jax.tree.map(lambda x: jnp.stack([x, x + x]), tree)

    states = jax.jit(jax.vmap(init))(double(params))
    both = _run(jax.jit(jax.vmap(step)), double(params), states, [double(g) for g in grads])
    _assert_close(jax.tree.map(lambda x: x[0], both), expected)


def check_donation(init, step: Step, params: Any, grads: Sequence[Any], expected: Any) -> None:
    """Check that the results are the same if the state's buffers are donated."""
    donating = jax.jit(step, donate_argnums=1, keep_unused=True)
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), init(params))
    _assert_close(_run(donating, params, own, grads), expected)


def check_mask(tx: Any, extra_args: Any, params: Any, grads: Sequence[Any]) -> None:
    """Check that a part of the tree is treated as if the rest did not exist."""
    leaves, structure = jax.tree.flatten(params)
    mask = jax.tree.unflatten(structure, [i % 2 == 0 for i in range(len(leaves))])

    def part(tree):
        return jax.tree.map(lambda kept, x: x if kept else None, mask, tree)

    ends = []
    for optimizer, only in ((optax.masked(tx, mask), lambda tree: tree), (tx, part)):
        start = optimizer.init(only(params))
        step = _step_of(optimizer, extra_args)
        updates, _ = _run(step, only(params), start, [only(g) for g in grads])
        ends.append(part(updates))
    _assert_close(*ends)


def check_absent_gradients(init, step: Step, params: Any, grads: Sequence[Any]) -> None:
    """Check that leaves without gradients get no updates, and that the state keeps its types."""
    absent = jax.tree.map(lambda _: None, grads[0])
    state = init(params)
    updates, after = step(params, state, absent)
    assert not jax.tree.leaves(updates), f"None gradients must give None updates, got {updates}"
    _assert_same_types(*(jax.eval_shape(lambda s: s, s) for s in (after, state)))


def check_finite(init, step: Step, params: Any, grads: Sequence[Any]) -> None:
    """Check that all updates of finite gradients are finite."""
    state = init(params)
    for gradient in grads:
        updates, state = step(params, state, gradient)
        chex.assert_tree_all_finite(updates)


def random_like(tree: Any, seed: int) -> Any:
    """Return normally distributed values in the shapes and dtypes of a tree."""
    rng = np.random.default_rng(seed)

    def normal(x):
        values = rng.standard_normal(x.shape)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(x.shape)
        return jnp.asarray(values, x.dtype)

    return jax.tree.map(normal, tree)


def _step_of(tx: optax.GradientTransformation, extra_args: dict[str, Any]) -> Step:
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        return tx.update(gradient, state, params, **extra_args)

    return step


def _run(step: Step, params: Any, state: Any, grads: Sequence[Any]) -> tuple[Any, Any]:
    """Return the last update and the state after it; the parameters do not change."""
    updates = None
    for gradient in grads:
        updates, state = step(params, state, gradient)
    return updates, state


def _scaled(scale: float, tree: Any) -> Any:
    return jax.tree.map(lambda x: (scale * x).astype(x.dtype), tree)


def _in_bfloat16(tree: Any) -> Any:
    def cast(x):
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _assert_same_types(ours: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_structs(ours, expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        assert x == y, f"{jax.tree_util.keystr(path)} must be {y}, got {x}"


def _assert_close(ours: Any, expected: Any) -> None:
    """Compare floats relative to the largest value of their leaf, integers and bools exactly."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        if not y.size:
            continue
        if jnp.issubdtype(y.dtype, jnp.inexact):
            tolerance = _ROUNDINGS * float(jnp.finfo(y.dtype).eps) * float(np.max(np.abs(y)))
        else:
            tolerance = 0
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))
