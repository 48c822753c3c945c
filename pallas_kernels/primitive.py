"""The primitive of a fused step, with the rules for its types, derivatives, batches and lowering.

A primitive is one operation in the user's jaxpr, and only the code of the platform is lowered. The
chain runs where there is no kernel: on other platforms, under `vmap` and differentiation, and if
`jit` is disabled.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh

from pallas_kernels.backends import BACKENDS
from pallas_kernels.compile import Compiled
from pallas_kernels.execute import run
from pallas_kernels.graph import Graph

# Pallas' Triton backend warns of its deprecation each time a kernel is lowered. Users can't act on
# the warning, and a library should not set a filter for the whole process.
_DEPRECATED = "The Pallas Triton backend is deprecated"
# Steps compiled for calls that are not under `jit`.
_KEPT = 32

_step_p = Primitive("fused_step")
_step_p.multiple_results = True


def call(compiled: Compiled, arrays: Sequence[Any]) -> Any:
    """Run a compiled step, under any of JAX's transformations; return its result as a tree."""
    flat = _place(compiled, (*arrays, *compiled.traced.constants))
    results = _step_p.bind(*flat, compiled=compiled)
    return jax.tree.unflatten(compiled.traced.structure, results)


def _place(compiled: Compiled, flat: Sequence[Any]) -> Sequence[Any]:
    """Constrain the kernels' inputs to their shardings.

    The mesh is known only inside of the primitive, so `jit` needs the constraints to find it.
    """
    graph, placement = compiled.traced.graph, compiled.placement
    if not isinstance(placement.mesh, Mesh) or placement.explicit:
        return flat
    read = {
        n for phase in compiled.plan.phases for program in phase.programs for n in program.inputs
    }
    shardings = [
        placement.shardings.get(graph.component(n)) if n in read else None for n in graph.inputs
    ]
    return [
        x if sharding is None else lax.with_sharding_constraint(x, sharding)
        for x, sharding in zip(flat, shardings, strict=True)
    ]


@_step_p.def_impl
def _call_eagerly(*flat: Any, compiled: Compiled) -> Any:
    if jax.config.jax_disable_jit:
        return compiled.traced.by_xla(*flat)
    return _jitted(compiled)(*flat)


@functools.lru_cache(_KEPT)
def _jitted(compiled: Compiled) -> Any:
    return jax.jit(functools.partial(_step_p.bind, compiled=compiled))


@_step_p.def_effectful_abstract_eval
def _types(*avals: Any, compiled: Compiled) -> Any:
    closed = compiled.traced.closed
    is_plain = all(aval.sharding.mesh.empty for aval in avals)
    if is_plain and not BACKENDS[compiled.backend].interpret:
        return closed.out_avals, closed.effects
    # On a mesh, types contain shardings or the axes of a `shard_map`, and an interpreter may have
    # effects. Only a trace of the kernels tells both.
    kernels = jax.make_jaxpr(functools.partial(run, compiled))(*avals)
    types = closed.out_avals if is_plain else kernels.out_avals
    return types, closed.effects | kernels.effects


def _differentiate(primals: Any, tangents: Any, *, compiled: Compiled) -> Any:
    """Differentiate the chain by those inputs that vary, and by no others."""
    varies = [not isinstance(t, ad.Zero) for t in tangents]
    given = [x for x, v in zip(primals, varies, strict=True) if v]

    def chain(*varying: Any) -> Any:
        rest = iter(varying)
        flat = [next(rest) if v else x for x, v in zip(primals, varies, strict=True)]
        return compiled.traced.by_xla(*flat)

    results, derivatives = jax.jvp(
        chain, given, [t for t in tangents if not isinstance(t, ad.Zero)]
    )
    # A tangent that is known to be 0 stays so: 0 times the slope of a root at 0 would be NaN.
    depends = _results_that_depend_on(compiled.traced.graph, varies)
    return results, [
        d if depend else ad.Zero(jax.typeof(x).to_tangent_aval())
        for x, d, depend in zip(results, derivatives, depends, strict=True)
    ]


def _results_that_depend_on(graph: Graph, chosen: Sequence[bool]) -> list[bool]:
    depends = dict(zip(graph.inputs, chosen, strict=True))
    for node in graph.reachable():
        if node not in depends:
            depends[node] = any(depends[a] for a in node.args)
    return [depends[node] for node in graph.outputs]


def _batch(args: Any, axes: Any, *, compiled: Compiled) -> Any:
    results = jax.vmap(compiled.traced.by_xla, in_axes=tuple(axes))(*args)
    return results, [0] * len(results)


def _lower_chain(ctx: Any, *flat: Any, compiled: Compiled) -> Any:
    return mlir.lower_fun(compiled.traced.by_xla, multiple_results=True)(ctx, *flat)


def _lower_kernels(ctx: Any, *flat: Any, compiled: Compiled) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _DEPRECATED, DeprecationWarning)
        kernels = functools.partial(run, compiled)
        return mlir.lower_fun(kernels, multiple_results=True)(ctx, *flat)


def _lower(ctx: Any, *flat: Any, compiled: Compiled) -> Any:
    lower = _lower_chain if compiled.backend == "auto" else _lower_kernels
    return lower(ctx, *flat, compiled=compiled)


ad.primitive_jvps[_step_p] = _differentiate
batching.primitive_batchers[_step_p] = _batch
mlir.register_lowering(_step_p, _lower)
mlir.register_lowering(_step_p, _lower_kernels, platform="cuda")
