"""Training a small network on all of its images at once, measuring its curvature on the way."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

import _smooth as smooth
from _curvature import scale_of_adam, sharpness
from _data import load
from optax_ext import vradam

B1, B2, EPS = 0.9, 0.999, 1e-8
HIDDEN, MEASURED_EVERY = 32, 50


class Run(NamedTuple):
    """A training.

    Attributes:
      loss: before each step.
      rate: of each step, the gate's factor included.
      sharpness: largest eigenvalue of the Hessian, after every `MEASURED_EVERY` steps.
      preconditioned: likewise of P^-1 H.
    """

    loss: Any
    rate: Any
    sharpness: Any
    preconditioned: Any

    @property
    def late_loss(self) -> float:
        """Decimal logarithm; the mean over the last tenth, since a loss at the edge jumps."""
        return float(np.log10(self.loss[-len(self.loss) // 10 :]).mean())


Train = Callable[..., Run]


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum((outputs - jax.nn.one_hot(labels, 10)) ** 2, axis=-1).mean() / 2


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def trainer(error: Callable[[Any, Any], jax.Array], options: argparse.Namespace) -> Train:
    """What trains with AdamW, or VRAdam, at a rate or at one for each step."""
    data = load(None).train
    x, labels = data.images[: options.images].reshape(-1, 64), data.labels[: options.images]

    def loss(params):
        return error(smooth.apply(params, x), labels)

    run = jax.jit(partial(run_training, loss), static_argnames=("gated", "measured"))

    def train(seed: int, rates: ArrayLike, beta3: float | None = None, measured=True) -> Run:
        params = smooth.initialize(jax.random.key(seed), [x.shape[1], HIDDEN, HIDDEN, 10])
        rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (options.steps,))
        gated = beta3 is not None
        found = run(params, rates, beta3 or 0.0, gated=gated, measured=measured)
        return jax.tree.map(np.asarray, found)

    return train


def run_training(loss, params, rates, beta3, *, gated: bool, measured: bool) -> Run:
    make = partial(vradam, beta3=beta3) if gated else optax.adamw
    tx = make(lambda count: rates[count], b1=B1, b2=B2, eps=EPS, weight_decay=0.0)

    def step(run, rate):
        params, state = run
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        gate = optax.tree.get(state, "gate", 1.0)
        return (optax.apply_updates(params, updates), state), (value, gate * rate)

    def interval(run, inputs):
        rates, count = inputs
        run, curves = lax.scan(step, run, rates)
        params, state = run
        if not measured:
            return run, (curves, (jnp.nan, jnp.nan))
        scale = scale_of_adam(optax.tree.get(state, "nu"), count, b1=B1, b2=B2, eps=EPS)
        return run, (curves, (sharpness(loss, params), sharpness(loss, params, scale)))

    counts = jnp.arange(MEASURED_EVERY, len(rates) + 1, MEASURED_EVERY)
    inputs = rates.reshape(-1, MEASURED_EVERY), counts
    _, ((losses, rates), found) = lax.scan(interval, (params, tx.init(params)), inputs)
    return Run(losses.ravel(), rates.ravel(), *found)
