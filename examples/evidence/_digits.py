"""Training small networks on the digits, many side by side."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from _data import Split, load

CLASSES = 10
BATCH = 64
# Rates are chosen on seeds from here on, and judged on the seeds 0, 1, ….
SEARCH_SEED = 1000
# Makes an optimizer for a learning rate, which is a tracer here.
Factory = Callable[[Any], optax.GradientTransformation]
# A script trains on them many times.
load_once = cache(partial(load, None))


class Network(NamedTuple):
    """Functions of a key, and of parameters and images."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


class Runs(NamedTuple):
    """What became of trainings, an entry each; accuracies are in per cent.

    Attributes:
      params: at the end.
      train: cross-entropy on what was trained on.
      validation: on what rates are chosen by.
      test: on what they are judged by.
      train_accuracy: on what was trained on.
      accuracy: on the test images.
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
    """Trains for each rate and its seed, arrays of one shape, which is the results' too.

    A seed decides the initial weights and the batches, for every optimizer alike. As many runs as
    before with the same optimizer are not compiled again.
    """
    rates, seeds = np.broadcast_arrays(np.asarray(rates, np.float32), np.asarray(seeds))
    images = len(load_once().train.labels)
    batches = np.stack([draw_batches(seed, steps, images, batch) for seed in seeds.ravel()])
    params = initialize(network.init, seeds.ravel())
    # States are made apart: methods that differ in nothing else then share what is compiled, where
    # JAX keeps it.
    states = jax.vmap(lambda rate, params: factory(rate).init(params))(rates.ravel(), params)
    runs = params, states, rates.ravel(), batches
    params = descend(network.apply, factory, *runs, load_once().train)
    found = evaluate(network.apply, params, load_once()[2:])
    return jax.tree.map(lambda x: np.asarray(x).reshape(*rates.shape, *x.shape[1:]), found)


def best(search: Runs) -> int:
    """The rate, by its index, with the least mean validation loss; 10 is as bad as diverged."""
    losses = np.clip(np.nan_to_num(search.validation, nan=np.inf), 0, 10)
    return int(losses.mean(axis=1).argmin())


def best_on_others(runs: Runs) -> np.ndarray:
    """For each seed of runs of shape (rates, seeds), the rate that is best on all other seeds.

    So no seed takes part in the choice that it is judged by, and each takes part in all others.
    """
    seeds = runs.validation.shape[1]
    return np.array(
        [best(runs._replace(validation=np.delete(runs.validation, i, 1))) for i in range(seeds)]
    )


def draw_batches(seed: int, steps: int, images: int, batch: int = BATCH) -> np.ndarray:
    """Indices of images, of shape (steps, batch); every image at most once in each epoch."""
    random = np.random.default_rng(seed)
    epochs = -(-steps // (images // batch))
    used = images // batch * batch
    shuffled = [random.permutation(images)[:used] for _ in range(epochs)]
    return np.concatenate(shuffled).reshape(-1, batch)[:steps]


@partial(jax.jit, static_argnames="init")
def initialize(init: Callable[[jax.Array], Any], seeds: jax.Array) -> Any:
    """Fresh parameters for each seed, stacked."""
    # JAX's default generator takes seven times as long to compile.
    return lax.map(lambda seed: init(jax.random.key(seed, impl="rbg")), seeds)


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
    """The parameters after as many steps as there are batches."""

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
def evaluate(
    apply: Callable[..., jax.Array], params: Any, data: tuple[Split, Split, Split]
) -> Runs:
    """What every run has come to."""

    def accuracy(params: Any, split: Split) -> jax.Array:
        return 100 * jnp.mean(apply(params, split.images).argmax(-1) == split.labels)

    def of_one(params: Any) -> Runs:
        return Runs(
            params,
            *(cross_entropy(apply, params, split) for split in data),
            train_accuracy=accuracy(params, data[0]),
            accuracy=accuracy(params, data[2]),
        )

    return lax.map(of_one, params)


def cross_entropy(apply: Callable[..., jax.Array], params: Any, split: Split) -> jax.Array:
    logits = apply(params, split.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
