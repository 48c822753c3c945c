"""`fuse`: runs any Optax chain as a few kernel launches, made from the chain's own code."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import optax
from jax.sharding import NamedSharding

from optax_ext import _checks
from pallas_kernels import backends, primitive
from pallas_kernels.compile import Compiler, whole_step
from pallas_kernels.eager import ClosesOverTracerError, compile_once
from pallas_kernels.shardings import Shardings, in_checked_shard_map, of_parameters


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that has a `step` besides `init` and `update`.

    Attributes:
      chain: the transformation that is fused.
      backend: the argument of `fuse`.
      shardings: the argument of `fuse`.
      step: `step(params, state, grads, **extra_args) -> (params, state)`. It computes the updates
        and applies them.
    """

    chain: optax.GradientTransformation
    backend: str
    shardings: Shardings
    step: Callable[..., tuple[optax.Params, optax.OptState]]
    compiler: Compiler  # what `explain` shares


def fuse(
    tx: optax.GradientTransformation,
    *,
    backend: str = "auto",
    strict: bool = False,
    shardings: Shardings = None,
) -> FusedTransformation:
    r"""Run an optimizer's step over all leaves in a few Pallas launches.

    The step is traced and cut at its reductions. The elementwise operations between two cuts become
    one launch over many leaves, and XLA computes scalars between launches. The state is that of the
    chain. So a run can switch between the chain and the fused step at any step, and both can read
    the same checkpoint.

    The kernels run on NVIDIA GPUs. The chain runs on other platforms, and under `vmap` and
    differentiation. Kernels compute elementwise operations, reductions of a whole leaf, and
    reductions over last axes that have 2, 4, … or 256 elements together. A leaf that needs anything
    else (matrix products, `jax.random`) falls back to XLA. If a leaf falls back on a mesh with
    explicit axes, the chain runs for all leaves. `explain` lists these leaves, with reasons.

    Outside of `jit`, `step` and `update` compile themselves. They compile again if the structure,
    the types or the shardings of the arguments change, or the value of an option such as a flag. As
    under `jit`, the chain's Python code runs only when they compile. A Python number is part of the
    compiled program, so give arrays for values that change. A step that takes a function as an
    argument is compiled at every call.

    `step` moves the fewest bytes, because it writes parameters and state in place. Donate both to
    the `jit` around it, or XLA copies them first. `update` is for loops that need the updates.
    Writing the updates and reading them again costs extra traffic.

    Args:
      tx: the optimizer, including its learning rate.
      backend: "auto" runs kernels on NVIDIA GPUs and the chain elsewhere. "triton" and "mosaic"
        always run these kernels, whatever the platform. "interpret" (Triton) and "interpret-mosaic"
        run them in Pallas' interpreter, for tests. "xla" runs the chain as it is, operation by
        operation outside of `jit`. Inside of a `shard_map` with `check_vma=True`, the chain runs,
        whatever the backend.
      strict: whether to raise an error if a leaf falls back to XLA; nothing falls back from "xla".
      shardings: the shardings of the parameters on a mesh of devices. Give one `NamedSharding` (or,
        under `jax.set_mesh`, one `PartitionSpec`) for all parameters, or a tree of them with the
        structure of the parameters; one sharding may replace a subtree. Kernels then run on each
        device's shards, and norms are summed over the devices. The argument is not needed outside
        of `jit`, where arrays have shardings, or on a mesh with explicit axes, where types have
        them. Inside of `jit` on automatic axes it is needed: otherwise XLA gathers every leaf.

    Raises:
      ValueError: `tx` is not a transformation, `strict` is not a flag, or `backend` is unknown.
        `step` raises it if parameters, state and gradients don't fit each other. `step` and
        `update` raise it if `shardings` does not fit the parameters, and, with `strict`, if a leaf
        can't be fused (the message then has the path and the reason), or inside of a `shard_map`
        with `check_vma=True`.

    >>> import jax, jax.numpy as jnp, optax
    >>> tx = fuse(optax.adamw(1e-3))
    >>> params = {"w": jnp.ones((128, 128))}
    >>> state = tx.init(params)
    >>> step = jax.jit(tx.step, donate_argnums=(0, 1))
    >>> params, state = step(params, state, {"w": jnp.full((128, 128), 0.1)})
    >>> print(f"{params['w'][0, 0]:.4f}")
    0.9990
    """
    _checks.transformation(tx=tx)
    _checks.flag(strict=strict)
    backends.check(backend, or_chain=True)
    tx = optax.with_extra_args_support(tx)

    def chain_update(state: Any, updates: Any, params: Any, extra_args: dict[str, Any]) -> Any:
        if updates is None:
            raise ValueError("updates must be a tree of gradients, got None")
        updates, state = tx.update(updates, state, params, **extra_args)
        return state, updates

    # The leading results reuse the memory of parameters and state, or of the state.
    compile_step = Compiler(whole_step(tx), in_place=2)
    compile_update = Compiler(chain_update, in_place=1)
    run_step = _runner(compile_step, backend, strict)
    run_update = _runner(compile_update, backend, strict)

    def given_for(position: int, params: Any) -> dict[str, NamedSharding]:
        missing = shardings is None or params is None  # `None` has its own error later
        given = {} if missing else of_parameters(params, shardings)
        return {f"{position}/{path}".rstrip("/"): sharding for path, sharding in given.items()}

    def step(params: Any, state: Any, grads: Any, **extra_args: Any) -> Any:
        return run_step((params, state, grads, extra_args), given_for(0, params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        arguments = (state, updates, params, extra_args)
        # A gradient can be `None`; its parameter has a sharding all the same.
        like = updates if params is None else params
        state, updates = run_update(arguments, given_for(1, like))
        return updates, state

    fused = FusedTransformation(tx.init, update)
    fused.chain, fused.backend, fused.shardings = tx, backend, shardings
    fused.step, fused.compiler = step, compile_step
    return fused


def _runner(compiler: Compiler, backend: str, strict: bool) -> Callable[..., Any]:
    """Return a function of arguments, and of the shardings of some of their leaves by path."""
    if backend == backends.CHAIN:
        return lambda arguments, shardings_by_path: compiler.function(*arguments)
    return compile_once(partial(_run, compiler, backend, strict))


def _run(
    compiler: Compiler,
    backend: str,
    strict: bool,
    arguments: tuple[Any, ...],
    shardings_by_path: Mapping[str, NamedSharding],
    *,
    cached: bool = False,
) -> Any:
    compiled, arrays = compiler(arguments, backend, shardings_by_path)
    if cached and compiled.closes_over_tracer:
        raise ClosesOverTracerError
    if strict and compiled.fallback_reasons:
        raise ValueError(f"strict=True, but {'; '.join(compiled.fallback_reasons)}")
    checked = in_checked_shard_map(arrays)
    if strict and checked:
        raise ValueError("strict=True, but kernels need a shard_map with check_vma=False")
    if compiled.runs_chain or checked:
        return compiler.function(*arguments)
    return primitive.call(compiled, arrays)
