"""Training of a small network on all of its images at once, with its loss and its curvatures."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from _curvature import MATVECS, apply_smooth, initialize_smooth, scale_of_adam, sharpness
from _digits import load_digits
from optax_ext import vradam

B1, B2, EPS = 0.9, 0.999, 1e-8
HIDDEN, MEASURED_EVERY = 32, 50
# The largest curvature at which Adam's steps of 1 are stable.
OF_ADAM = (2 + 2 * B1) / (1 - B1)
# Seeds that judge, and that chose no rate and no strength.
FIRST_SEED = 200
# Columns of the tables that findings read.
OF_OWN_EDGE, LOSS = "curvature / own edge", "log10 of loss"
CONSTANTS = {
    "B1": B1,
    "B2": B2,
    "EPS": EPS,
    "HIDDEN": HIDDEN,
    "MATVECS": MATVECS,
    "MEASURED_EVERY": MEASURED_EVERY,
    "OF_ADAM": OF_ADAM,
    "FIRST_SEED": FIRST_SEED,
}
SIZES = {
    "seeds": (10, "initial weights"),
    "steps": (2000, "steps of each training"),
    "images": (256, "images to train on"),
}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, of which the steps can be divided into intervals to measure after."""
    options = parser.parse_args(argv)
    if options.steps % MEASURED_EVERY:
        parser.error(f"--steps must be a multiple of {MEASURED_EVERY}, got {options.steps}")
    return options


class Gate(NamedTuple):
    """The arguments of VRAdam's gate."""

    beta3: float
    cutoff: float = 10.0
    norm_of: str = "velocity"


class Setting(NamedTuple):
    """A rate, and a gate for VRAdam; without one it is AdamW."""

    rate: float
    gate: Gate | None = None


class Run(NamedTuple):
    """The curves of one run.

    Attributes:
      loss: the loss before each step.
      rate: the rate of each step, the gate's factor included.
      sharpness: the largest eigenvalue of the Hessian, after every `MEASURED_EVERY` steps.
      preconditioned: the largest eigenvalue of P^-1 H, likewise.
    """

    loss: Any
    rate: Any
    sharpness: Any
    preconditioned: Any

    @property
    def late_loss(self) -> float:
        """Mean logarithm of the loss over the last tenth, because a loss at the edge jumps."""
        return float(np.log10(self.loss[-len(self.loss) // 10 :]).mean())


Train = Callable[..., Run]


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum((outputs - jax.nn.one_hot(labels, 10)) ** 2, axis=-1).mean() / 2


def trainer(error: Callable[[Any, Any], jax.Array], options: argparse.Namespace) -> Train:
    """Return a function that trains with AdamW or VRAdam, at one rate or at one for each step."""
    data = load_digits().train
    x, labels = data.images[: options.images].reshape(-1, 64), data.labels[: options.images]

    def loss(params):
        return error(apply_smooth(params, x), labels)

    run = jax.jit(partial(run_training, loss), static_argnames=("norm_of", "measured"))

    def train(seed: int, rates: ArrayLike, gate: Gate | None = None, measured=True) -> Run:
        params = initialize_smooth(jax.random.key(seed), [x.shape[1], HIDDEN, HIDDEN, 10])
        rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), (options.steps,))
        beta3, cutoff, norm_of = gate or (0.0, 0.0, None)
        found = run(params, rates, beta3, cutoff, norm_of=norm_of, measured=measured)
        return jax.tree.map(np.asarray, found)

    return train


def run_training(loss, params, rates, beta3, cutoff, *, norm_of: str | None, measured: bool) -> Run:
    make = optax.adamw
    if norm_of:
        make = partial(vradam, beta3=beta3, lr_cutoff=cutoff, norm_of=norm_of)
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


def thin(curve: Any) -> Any:
    """Return means over the steps between two measurements."""
    return curve.reshape(*curve.shape[:-1], -1, MEASURED_EVERY).mean(axis=-1)
