"""`fuse`: runs any Optax chain as a few kernel launches, made from the chain's own code."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from optax_ext import _checks
from pallas_kernels import launch
from pallas_kernels.arguments import (
    check_gradients,
    check_parameters,
    check_structures,
    check_updates,
    leaves_without_gradients,
)
from pallas_kernels.eager import ClosesOverTracerError, compile_once
from pallas_kernels.grouping import launches
from pallas_kernels.placement import Placement, infer_placement
from pallas_kernels.plan import Plan, plan
from pallas_kernels.shardings import Shardings, of_parameters
from pallas_kernels.trace import Graph, Kind, Node, Traced, is_array, paths, trace


class FusedTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that has a `step` besides `init` and `update`.

    Attributes:
      chain: the transformation that is fused.
      step: `step(params, state, grads, **extra_args) -> (params, state)`. It computes the updates
        and applies them.
    """

    chain: optax.GradientTransformation
    step: Callable[..., tuple[optax.Params, optax.OptState]]


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
    differentiation. A leaf falls back to XLA if its step is not elementwise (matrix products,
    statistics of single rows, random bits). On a mesh with explicit axes, the whole chain then
    runs instead. `explain` lists these leaves, with reasons.

    Derivatives are those of the chain, with one limit. Forward mode differentiates through every
    array of the state, even if only a learning rate varies. The square root of a second moment
    that is exactly 0 then makes the derivative NaN. Reverse mode and `backend="xla"` don't have
    this limit.

    A step is also compiled outside of `jit`: once for each structure, types and shardings of the
    arguments, and for each value of options such as a flag. As under `jit`, the chain's Python code
    does not run again after that. A step that takes a function as an argument is not compiled: the
    function runs at every call.

    `step` moves the fewest bytes, because it writes parameters and state in place. Donate both to
    the `jit` around it, or XLA copies them first. `update` is for loops that need the updates.
    Writing the updates and reading them again costs extra traffic.

    Args:
      tx: the optimizer, including its learning rate.
      backend: "auto" runs kernels on NVIDIA GPUs and the chain elsewhere. "triton" and "mosaic"
        always run these kernels, whatever the platform. "interpret" (Triton) and "interpret-mosaic"
        run them in Pallas' interpreter, for tests. "xla" runs the chain.
      strict: whether to raise an error if a leaf falls back to XLA.
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
        can't be fused; the message then has the path and the reason.

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
    launch.check(backend, or_chain=True)
    tx = optax.with_extra_args_support(tx)

    def chain_update(state, updates, params, extra_args):
        if updates is None:
            raise ValueError("updates must be a tree of gradients, got None")
        updates, state = tx.update(updates, state, params, **extra_args)
        return state, updates

    def run_fused(function, written):
        if backend == launch.CHAIN:
            return lambda arguments, placed: function(*arguments)
        return compile_once(partial(_execute, function, backend, strict, written))

    run_step, run_update = run_fused(whole_step(tx), 2), run_fused(chain_update, 1)

    def given_for(position, params):
        given = {} if shardings is None else of_parameters(params, shardings)
        return {f"{position}/{path}".rstrip("/"): sharding for path, sharding in given.items()}

    def step(params, state, grads, **extra_args):
        return run_step((params, state, grads, extra_args), given_for(0, params))

    def update(updates, state, params=None, **extra_args):
        arguments = (state, updates, params, extra_args)
        state, updates = run_update(arguments, given_for(1, updates))
        return updates, state

    fused = FusedTransformation(tx.init, update)
    fused.chain, fused.step = tx, step
    return fused


def whole_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Return one function that computes the updates and applies them, for `trace_step`."""
    tx = optax.with_extra_args_support(tx)

    def chain_step(params, state, grads, extra_args):
        check_parameters(params)
        check_gradients(params, grads)
        try:
            updates, new_state = tx.update(grads, state, params, **extra_args)
            check_updates(params, updates)
            return optax.apply_updates(params, updates), new_state
        except Exception as error:
            check_structures(tx, params, state, grads)
            for line in leaves_without_gradients(params):
                error.add_note(line)
            raise

    return chain_step


def _execute(function, backend, strict, written, arguments, placed, *, kept=False):
    """Run `function(*arguments)`, fused.

    Args:
      function: a function of arrays. Its first results may reuse the memory of its first arguments.
      backend: one of `launch.BACKENDS`.
      strict: whether to raise an error if a leaf can't be fused.
      written: number of first arguments whose memory may be reused.
      arguments: a tuple of trees.
      placed: shardings by the paths of the arguments' leaves.
      kept: whether later calls reuse what is traced now.
    """
    traced, in_place, values = trace_step(function, arguments, written)
    if kept and any(isinstance(x, Tracer) for x in traced.constants):
        raise ClosesOverTracerError
    flat = (*traced.constants, *values)
    placement = infer_placement(traced.graph, flat, placed)
    planned = plan(traced.graph, in_place, launch.operations(backend), placement)
    left = fallback_reasons(traced.graph, planned)
    if strict and left:
        raise ValueError(f"strict=True, but {'; '.join(left)}")
    if left and placement.explicit:
        return function(*arguments)

    structure = jax.tree.structure(traced.result)

    @custom_vmap
    def by_kernels(*flat):
        results = run(traced.graph, planned, placement, flat, backend)
        return jax.tree.unflatten(structure, results)

    @by_kernels.def_vmap
    def batched(axis_size, in_batched, *flat):
        axes = tuple(0 if batched else None for batched in in_batched)
        results = jax.vmap(traced.by_xla, in_axes=axes, axis_size=axis_size)(*flat)
        return results, jax.tree.map(lambda _: True, results)

    differentiable = jax.custom_jvp(by_kernels)

    @differentiable.defjvp
    def differentiated(primals, tangents):
        return jax.jvp(traced.by_xla, primals, tangents)

    if backend == "auto":
        results = lax.platform_dependent(*flat, cuda=differentiable, default=traced.by_xla)
    else:
        results = differentiable(*flat)
    typed = map(_as_weak_as, jax.tree.leaves(results), traced.closed.out_avals)
    return jax.tree.unflatten(structure, typed)


def trace_step(function, arguments, written) -> tuple[Traced, dict[int, int], list[Any]]:
    """Trace a step for `_execute` and `explain`.

    Returns:
      The traced step; for each result that may reuse an input's memory, the indices of both; and
      the arrays among the arguments.
    """
    leaves, structure = jax.tree.flatten(arguments)
    arrays = [is_array(x) for x in leaves]
    values = [*itertools.compress(leaves, arrays)]
    names = [*itertools.compress(paths(arguments), arrays)]

    def step(*given):
        rest = iter(given)
        filled = [next(rest) if array else x for x, array in zip(leaves, arrays, strict=True)]
        return function(*jax.tree.unflatten(structure, filled))

    traced = trace(step, values, names)
    count = len(jax.tree.leaves(arguments[:written]))
    if len(jax.tree.leaves(traced.result[:written])) != count or not all(arrays[:count]):
        return traced, {}, values
    first = len(traced.constants)
    return traced, {i: first + i for i in range(count)}, values


def fallback_reasons(graph: Graph, planned: Plan) -> list[str]:
    """Return a line with name and reason for each leaf that needs XLA.

    XLA computes such a leaf itself, or an array that the leaf's kernel reads.
    """
    names: dict[Node, str] = {}
    for node in graph.inputs:
        if node.on_leaf:
            names.setdefault(graph.component(node), graph.names[node])
    reasons = {c: reason for c, reason in planned.reasons.items() if c in names}
    for program in itertools.chain(*planned.phases):
        for node in program.inputs:
            if node.kind is Kind.XLA and graph.component(node) in names:
                reasons.setdefault(graph.component(node), f"{_origin(node)} is not elementwise")
    return [f"{names[component]}: {reason}" for component, reason in reasons.items()]


def _origin(node: Node) -> str:
    """Return the name of the operation that first made the array, such as random bits."""
    while sources := [a for a in node.args if a.size > 1 and a.kind is not Kind.BROADCAST]:
        node = sources[0]
    return "an input" if node.primitive is None else node.primitive.name


def run(
    graph: Graph,
    planned: Plan,
    placement: Placement,
    arguments: Sequence[jax.Array],
    backend: str,
) -> list[jax.Array]:
    """Compute the step's results: kernels in launches, everything else by XLA between them."""
    values: dict[Node, Any] = dict(zip(graph.inputs, arguments, strict=False))

    def value(node: Node) -> Any:
        # No recursion: a global norm is a chain of as many additions as there are leaves.
        pending = [node]
        while pending:
            missing = [a for a in pending[-1].args if a not in values]
            if missing and pending[-1] not in values:
                pending += missing
            else:
                top = pending.pop()
                if top not in values:
                    values[top] = _by_xla(top, values)
        return values[node]

    kernel_cache: dict[Any, Callable[..., Any]] = {}
    for phase in planned.phases:
        values |= placement.run(graph, backend, launches(phase), value, kernel_cache)
    for effect in graph.effects:
        _bind(effect, [value(a) for a in effect.args])
    return [value(node) for node in graph.outputs]


def _as_weak_as(x: jax.Array, result: Any) -> jax.Array:
    """Make `x` weakly typed if `result` is: otherwise the next call of `jit` compiles again."""
    if not getattr(result, "weak_type", False):
        return x
    return lax.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=True, sharding=None)


def _by_xla(node: Node, values: Mapping[Node, Any]) -> Any:
    if node.kind is Kind.LITERAL:
        return jnp.asarray(node.params["value"], node.dtype)
    if node.kind is Kind.INPUT:
        return node.params["value"]
    if node.kind is Kind.BROADCAST:
        return jnp.broadcast_to(values[node.args[0]], node.shape)
    result = _bind(node, [values[a] for a in node.args])
    return result[node.output] if isinstance(result, list | tuple) else result


def _bind(node: Node, operands: Sequence[Any]) -> Any:
    assert node.primitive is not None
    return node.primitive.bind(*operands, **node.primitive.get_bind_params(node.params))
