"""Training on scikit-learn's digits: many runs at once, each with its rate and its seed."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from jax import lax
from numpy.typing import ArrayLike
from sklearn.model_selection import train_test_split

from _networks import BATCH, Data, Network, Split, cross_entropy, draw_batches, initialize
from _tuning import Factory


@cache
def load_digits() -> Data:
    """Return 60, 20 and 20 % of the digits, standardized by the training images."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    images, labels = x.reshape(-1, 8, 8, 1), y.astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    x, test_x, y, test_y = map(np.asarray, parts)
    parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    x, held_x, y, held_y = map(np.asarray, parts)
    offset, width = x.mean(), x.std()
    splits = [
        Split(((images - offset) / width).astype(np.float32), labels)
        for images, labels in ((x, y), (held_x, held_y), (test_x, test_y))
    ]
    return jax.device_put(Data(*splits))


class Runs(NamedTuple):
    """The results of many runs: arrays with an entry for each run; accuracies are in per cent.

    Attributes:
      params: the parameters at the end.
      train: cross-entropy on the training images.
      validation: cross-entropy on the images that rates are chosen by.
      test: cross-entropy on the images that rates are judged by.
      train_accuracy: accuracy on the training images.
      accuracy: accuracy on the test images.
    """

    params: Any
    train: Any
    validation: Any
    test: Any
    train_accuracy: Any
    accuracy: Any


def train(
    network: Network,
    factory: Factory,
    rates: ArrayLike,
    seeds: ArrayLike,
    *,
    steps: int,
    batch: int = BATCH,
) -> Runs:
    """Train a run for each pair of a rate and a seed; the results have the shape of both arrays.

    A seed decides the initial weights and the batches, equally for every optimizer. Calls with the
    same optimizer and the same number of runs are compiled once.
    """
    rates, seeds = np.broadcast_arrays(np.asarray(rates, np.float32), np.asarray(seeds))
    images = len(load_digits().train.labels)
    batches = np.stack([draw_batches(seed, steps, images, batch) for seed in seeds.ravel()])
    params = initialize(network.init, seeds.ravel())
    # Made outside of the compiled training: methods that differ only in their initial state then
    # share one entry of the compilation cache.
    states = jax.vmap(lambda rate, params: factory(rate).init(params))(rates.ravel(), params)
    runs = params, states, rates.ravel(), batches
    params = descend(network.apply, factory, *runs, load_digits().train)
    found = evaluate(network.apply, params, load_digits())
    return jax.tree.map(lambda x: np.asarray(x).reshape(*rates.shape, *x.shape[1:]), found)


@partial(jax.jit, static_argnames=("apply", "factory"))
def descend(
    apply: Callable[..., jax.Array],
    factory: Factory,
    params: Any,
    states: Any,
    rates: jax.Array,
    batches: jax.Array,
    data: Split,
) -> Any:
    """Return the parameters after as many steps as there are batches."""

    def run(params: Any, state: Any, rate: jax.Array, batches: jax.Array) -> Any:
        tx = factory(rate)

        def step(run: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = run
            gradient = jax.grad(partial(cross_entropy, apply))(
                params, jax.tree.map(lambda x: x[batch], data)
            )
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, state), batches)[0][0]

    return jax.vmap(run)(params, states, rates, batches)


@partial(jax.jit, static_argnames="apply")
def evaluate(apply: Callable[..., jax.Array], params: Any, data: Data) -> Runs:
    """Return the results of all runs."""

    def accuracy(params: Any, split: Split) -> jax.Array:
        return 100 * jnp.mean(apply(params, split.images).argmax(-1) == split.labels)

    def of_one(params: Any) -> Runs:
        return Runs(
            params,
            *(cross_entropy(apply, params, split) for split in data),
            train_accuracy=accuracy(params, data.train),
            accuracy=accuracy(params, data.test),
        )

    return lax.map(of_one, params)
