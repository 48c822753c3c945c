"""The optimizers to measure: the methods of `optax_ext`, and optimizers of Optax."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_ext
from benchmarks import timing
from benchmarks.leaf_sets import LEAF_SETS
from pallas_kernels import Report, explain, fuse

# The learning rate of all optimizers. It does not affect the time of a step.
RATE = 1e-3

# The backends of `fuse`. By "xla", a step is the chain itself.
XLA, TRITON, MOSAIC = BACKENDS = ("xla", "triton", "mosaic")

# The baseline of all other optimizers.
REFERENCE = "adamw"

# The period of all optimizers with slow weights; it is also the default of `novak`.
SYNC_PERIOD = 5


def _synced_pair(params: optax.Params) -> optax.LookaheadParams:
    """Return the parameters of `optax.lookahead`; as both are donated, the slow ones are a copy."""
    return optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))


def trained(params: Any) -> optax.Params:
    """Return the parameters that gradients are taken at, from the result of `prepare`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


@dataclass(frozen=True)
class Optimizer:
    """An optimizer to measure.

    Attributes:
      tx: the optimizer, with the defaults of its method.
      package: the package that it comes from.
      same_bytes: the name of another optimizer whose step must move the same number of bytes;
        `None` if `explain` counts the bytes of this one.
      prepare: converts the parameters to the form that the optimizer's step takes.
    """

    tx: optax.GradientTransformation
    package: str = "optax_ext"
    same_bytes: str | None = None
    prepare: Callable[[optax.Params], Any] = lambda params: params

    def begin(self, params: optax.Params) -> tuple[Any, Any]:
        """Return the parameters and the state of the first step; both are copies."""
        params = self.prepare(jax.tree.map(jnp.array, params))
        return params, self.tx.init(params)

    def run(self, params: optax.Params, grads: optax.Updates, backend: str = XLA) -> timing.Run:
        """Return a function that runs steps in place, always with the same gradients."""
        step = fuse(self.tx, backend=backend).step
        return timing.donated(step, *self.begin(params), grads)


OPTIMIZERS: dict[str, Optimizer] = {
    REFERENCE: Optimizer(optax.adamw(RATE), "optax"),
    "clip + adamw": Optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), "optax"
    ),
    "lamb": Optimizer(optax.lamb(RATE), "optax"),
    "lookahead(adamw)": Optimizer(
        optax_ext.lookahead(optax.adamw(RATE), sync_period=SYNC_PERIOD, slow_step_size=0.5)
    ),
    # Its gradients and its parameters differ in structure, which `explain` does not support.
    "optax.lookahead(adamw)": Optimizer(
        optax.lookahead(optax.adamw(RATE), sync_period=SYNC_PERIOD, slow_step_size=0.5),
        "optax",
        same_bytes="lookahead(adamw)",
        prepare=_synced_pair,
    ),
    **{name: Optimizer(optax_ext.get(name, RATE)) for name in optax_ext.METHODS},
    "novak, rotating": Optimizer(optax_ext.novak(RATE, lookahead="rotating")),
    "novak, trust ratio": Optimizer(optax_ext.novak(RATE, trust_ratio=True)),
    "adamw, 8 bits": Optimizer(optax_ext.quantize_state(optax.adamw(RATE))),
    "adamw, 8 bits, bfloat16": Optimizer(
        optax_ext.master_weights(optax_ext.quantize_state(optax.adamw(RATE))),
        prepare=optax_ext.bfloat16_weights,
    ),
    "lion, 8 bits": Optimizer(optax_ext.quantize_state(optax.lion(RATE))),
    **{
        f"{name}, 8 bits": Optimizer(optax_ext.quantize_state(optax_ext.get(name, RATE)))
        for name in ("fame", "vradam", "novak")
    },
}

# The optimizers with quantized state.
QUANTIZED = [name for name in OPTIMIZERS if "8 bits" in name]

# The optimizers that `explain` supports.
EXPLAINED = {name: x for name, x in OPTIMIZERS.items() if x.same_bytes is None}


def least_bytes(name: str, leaf_set: str) -> float:
    """Return the least number of bytes per parameter that an optimizer's step must move.

    A step moves every array once. It reads some arrays again after it has computed a norm, as the
    fused step does.
    """
    report = _report(name, leaf_set)
    return max(report.floor_per_parameter, report.bytes_per_parameter)


def skipped_bytes(name: str, leaf_set: str) -> float:
    """Return the average bytes per parameter that a fused step skips between synchronizations."""
    if name not in EXPLAINED:
        return 0.0
    report = _report(name, leaf_set)
    skipped_at_most = sum(phase.skipped for phase in report.phases)
    return (1 - 1 / SYNC_PERIOD) * skipped_at_most / report.parameters


@functools.cache
def _report(name: str, leaf_set: str) -> Report:
    optimizer = OPTIMIZERS[OPTIMIZERS[name].same_bytes or name]
    return explain(optimizer.tx, jax.eval_shape(optimizer.prepare, LEAF_SETS[leaf_set]))
