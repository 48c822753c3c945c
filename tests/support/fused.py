"""One optimizer run twice, by its own chain and by the kernels made from it, and compared."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import pallas_kernels
from support.cases import gradients, parameters
from support.strategies import shape

Step = Callable[..., tuple[Any, Any]]

# The backends whose kernels can be interpreted here.
INTERPRETERS = ["interpret"]
if hasattr(plgpu, "InterpretGPUParams"):
    INTERPRETERS.append("interpret-mosaic")

# Some blocks with a rest, less than a block, four axes, and what no kernel takes: one element, no
# axis, nothing, `None`.
RAGGED = {
    "blocks": [{"kernel": shape(33, 65), "bias": shape(7)}, None],
    "conv": {"kernel": shape(2, 3, 1, 2)},
    "empty": shape(0, 3),
    "one": shape(1),
    "temperature": shape(),
}
SMALL = {"kernel": shape(5, 7), "bias": shape(7), "temperature": shape()}

# Errors in float32, relative to the largest value: where kernels add up, and where they don't.
SUMMED = 1e-6
ELEMENTWISE = 2e-7


def chain_step(tx: optax.GradientTransformation) -> Step:
    """Update and application, as a training loop writes them."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads, **extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def fused_step(tx: optax.GradientTransformation) -> Step:
    """The kernels, interpreted."""
    return pallas_kernels.fuse(tx, backend="interpret").step


@dataclass(frozen=True)
class Race:
    """Two compiled steps of one optimizer, and what to feed them.

    Attributes:
      tx: the optimizer.
      tree: shapes of its parameters.
      extra: arguments of its updates, the same at every step.
    """

    tx: optax.GradientTransformation
    tree: Any
    extra: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fused(self) -> Step:
        return self._compiled(fused_step(self.tx))

    @cached_property
    def chain(self) -> Step:
        return self._compiled(chain_step(self.tx))

    @cached_property
    def params(self) -> Any:
        return in_dtypes_of(self.tree, parameters(self.tree))

    def grads(self, steps: int = 20) -> list[Any]:
        return stream(self.tree, steps)

    def run(self, steps: Sequence[Step], grads: Sequence[Any]) -> tuple[Any, Any]:
        """Parameters and state after all gradients, `steps` taking turns."""
        params, state = self.params, self.tx.init(self.params)
        for t, gradient in enumerate(grads):
            params, state = steps[t % len(steps)](params, state, gradient)
        return params, state

    @cached_property
    def tolerance(self) -> float:
        """Only what is added up may be added up in another order.

        XLA's roots and powers differ by a rounding between whole vectors of a loop and its rest,
        and a kernel's blocks end elsewhere than the chain's arrays.
        """
        return SUMMED if self._adds_up or self._takes_powers else ELEMENTWISE

    @cached_property
    def _takes_powers(self) -> bool:
        step = partial(chain_step(self.tx), **self.extra)
        program = jax.make_jaxpr(step)(self.params, self.tx.init(self.params), self.params)
        return any(
            equation.primitive.name in ("cbrt", "pow") and equation.outvars[0].aval.size > 1
            for equation in equations(program.jaxpr)
        )

    @cached_property
    def _adds_up(self) -> bool:
        report = pallas_kernels.explain(self.tx, self.params, **self.extra)
        return bool(report.fallback_reasons) or any(p.work == "statistics" for p in report.phases)

    def _compiled(self, step: Step) -> Step:
        """Compile the step as written if this decides the last bit.

        XLA's simplifier turns quotients into products, with a rounding of its own, wherever it sees
        both sides: in a chain, and not across the border of a kernel. XLA also leaves out roundings
        to narrow dtypes; a kernel does them all.
        """
        options: dict[str, bool | str] = {"xla_allow_excess_precision": False}
        narrow = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(self.tree))
        if narrow or not self._adds_up:
            options["xla_disable_hlo_passes"] = "algsimp"
        return jax.jit(partial(step, **self.extra), compiler_options=options)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of the programs inside included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def stream(tree: Any, steps: int) -> list[Any]:
    """A list of gradients for a tree of shapes."""
    grads = in_dtypes_of(tree, gradients(tree, steps))
    return [jax.tree.map(lambda g, t=t: g[t], grads) for t in range(steps)]


def in_dtypes_of(tree: Any, values: Any) -> Any:
    return jax.tree.map(lambda x, v: jnp.asarray(v, x.dtype), tree, values)


def assert_close(ours: Any, expected: Any, error: float) -> None:
    """Trees of one structure and of equal types, floats within `error` of their leaf's largest.

    Where one is not finite, the other is the same. In less than float32 an error above 0 may flip
    a rounding, so it is at least that of one.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, ours) == jax.tree.map(jax.typeof, expected)
    expected_leaves = jax.tree.leaves(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(ours), expected_leaves, strict=True):
        exact = error == 0 or not jnp.issubdtype(y.dtype, jnp.floating)
        relative = 0 if exact else max(error, _rounding(y.dtype))
        x, y = _as_numpy(x), _as_numpy(y)
        tolerance = relative * np.max(np.abs(y), initial=0, where=np.isfinite(y))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=name)


def assert_fused_is_chain(run: Race, grads: Sequence[Any] | None = None) -> tuple[Any, Any]:
    """Both end alike after all gradients; returns where the kernels end."""
    grads = run.grads() if grads is None else grads
    fused = run.run([run.fused], grads)
    assert_close(fused, run.run([run.chain], grads), run.tolerance)
    return fused


def _rounding(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).eps) if dtype.itemsize < 4 else 0.0


def _as_numpy(x: jax.Array) -> np.ndarray:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x, np.float64)


def lowered(function: Callable[..., Any], *arguments: Any, platform: str = "cuda") -> str:
    """The program's text; newer versions of JAX must be told which GPU it is for."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def assert_trained(before: Any, after: Any) -> None:
    """All parameters are finite, and every leaf was moved but for those of a single number.

    `cases.gradients` leaves the first coordinate of a vector alone.
    """
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.all(np.isfinite(_as_numpy(y)))
        assert y.size <= 1 or np.any(_as_numpy(x) != _as_numpy(y))
