"""Wells of one depth and several widths, and how long methods stay in them under noise.

The theory that this is measured against stands in `flat_minima.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from _digits import Factory
from _figures import BLUE, GREEN, ORANGE
from optax_ext import dualadam, invadam

# Depth of all wells, their curvatures, and B.
BARRIER, CURVATURES, BATCH = 0.02, np.geomspace(1, 2.5, 6), 1.0
# ΔL / T in the widest well.
LONGEST = 5.5
# The walls are passed for good half a hill's width behind the top.
PASSED = 1.5 * np.pi


class Escaping(NamedTuple):
    """A method in a well.

    Attributes:
      factory: makes it for a rate.
      gain: α' / α, for the noise's deviation.
      power: the theory's p in ΔL / T ~ H^-p; `None` for a blend, which has no single one.
      colour: of its curve.
    """

    factory: Factory
    gain: Callable[[Any], Any]
    power: float | None
    colour: str


def half_dualadam(rate: Any) -> optax.GradientTransformation:
    """DualAdam in the middle of its first phase, for good."""
    return dualadam(rate, switch_rate=lambda count: jnp.full_like(count, 0.5, jnp.float32))


ESCAPING = {
    "SGD": Escaping(optax.sgd, np.ones_like, 1.0, "0.2"),
    "Adam": Escaping(optax.adam, lambda s: 1 / s, 0.5, BLUE),
    "InvAdam": Escaping(invadam, lambda s: s, 1.5, ORANGE),
    "DualAdam, half and half": Escaping(half_dualadam, lambda s: (s + 1 / s) / 2, None, GREEN),
}


class Escape(NamedTuple):
    """Of one method, for each well (and each group of trajectories).

    Attributes:
      times: mean steps until they have left.
      barriers: ΔL / T that the times tell.
      theory: ΔL / T by the closed form.
      powers: p of each group.
    """

    times: Any
    barriers: Any
    theory: Any
    powers: Any


def escape(method: Escaping, groups: int, trajectories: int, steps: int) -> Escape:
    deviation = np.sqrt(CURVATURES / BATCH)
    gains = method.gain(deviation)
    rate = 2 * BATCH * BARRIER / (LONGEST * CURVATURES[0] * gains[0])
    theory = 2 * BATCH * BARRIER / (rate * gains * CURVATURES)
    left, time = leave(method.factory, rate, groups * trajectories, steps)
    # The mean of exponential times, of which the long ones are cut off.
    total, count = (np.reshape(x, (-1, groups, trajectories)).sum(-1) for x in (time, left))
    times = total / np.maximum(count, 1)
    barriers = barrier_of(times * (rate * gains * CURVATURES)[:, None])
    powers = -np.polyfit(np.log(CURVATURES), np.log(barriers), 1)[0]
    return Escape(times, barriers, theory, powers)


@partial(jax.jit, static_argnames=("factory", "number", "steps"))
def leave(factory: Factory, rate: Any, number: int, steps: int) -> tuple[Any, Any]:
    """Whether each trajectory leaves its well, and its steps until then, or the end.

    The wells are those of ΔL (1 - cos(x / w)) / 2, of curvature ΔL / 2 w² at their bottom; all
    methods here are elementwise, so that all trajectories are one vector of parameters.
    """
    tx = factory(rate)
    curvatures = jnp.asarray(CURVATURES, jnp.float32)[:, None]
    width = jnp.sqrt(BARRIER / 2 / curvatures)
    deviation = jnp.sqrt(curvatures / BATCH)

    def step(run: Any, t: Any) -> tuple[Any, None]:
        x, state, inside, time = run
        noise = deviation * jax.random.normal(jax.random.fold_in(key, t), x.shape)
        gradient = BARRIER / 2 / width * jnp.sin(x / width) + noise
        updates, state = tx.update(gradient, state, x)
        x = x + updates
        return (x, state, inside & (abs(x / width) < PASSED), time + inside), None

    key = jax.random.key(0, impl="rbg")
    x = jnp.zeros((len(CURVATURES), number))
    begin = x, tx.init(x), jnp.ones(x.shape, bool), jnp.zeros(x.shape)
    (_, _, inside, time), _ = lax.scan(step, begin, jnp.arange(steps))
    return ~inside, time


def barrier_of(times: Any) -> Any:
    """ΔL / T from mean first passages, in units of the time 1 / (α' H) in which a well relaxes.

    Of y = x / w, whose diffusion D is 2 T / ΔL, it is the integral over 0 < z < y < `PASSED` of
    exp((U(y) - U(z)) / D) / D, with U = 1 - cos; exact also where the barrier is low.
    """
    y = np.linspace(0, PASSED, 2001)
    exponents = np.linspace(0.05, 12, 400)

    def passage(exponent: float) -> float:
        weight = np.exp((1 - np.cos(y)) * exponent / 2)
        inner = np.cumsum(1 / weight) * (y[1] - y[0])
        return float(np.sum(weight * inner) * (y[1] - y[0]) * exponent / 2)

    passages = [passage(exponent) for exponent in exponents]
    return np.exp(np.interp(np.log(times), np.log(passages), np.log(exponents)))
