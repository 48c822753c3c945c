"""The network, and many trainings of it in parallel: one run for each seed and rate."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.typing import ArrayLike
from numpy.typing import NDArray

from _data import Dataset, Split
from pallas_kernels import FusedTransformation

BATCH_SIZE = 64
# Evaluations are a multiple of this many steps apart. NOVAK's lookahead synchronizes every 5 steps,
# so it is always evaluated right after that. A figure can't show more than this many evaluations.
STEPS_PER_EVALUATION = 5
MOST_EVALUATIONS = 200
# Number of times, of which the shortest counts.
TIMINGS = 40

# Returns an optimizer for a learning rate, which is a tracer here.
Factory = Callable[[Any], optax.GradientTransformation]


def convolve(images, kernel, strides, padding, **_):
    """Compute a convolution as a matrix product: in a scan on CPU, XLA's is ten times slower."""
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    (height, width), outputs = kernel.shape[:2], kernel.shape[-1]
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    patches = [
        images[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, outputs)


class ConvNet(nnx.Module):
    """Four convolutions, a mean over space and a dense layer: no normalization, no skips."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        conv = partial(
            nnx.Conv,
            kernel_size=(3, 3),
            padding=1,
            kernel_init=nnx.initializers.he_normal(),
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.conv1 = conv(channels, 16)
        self.conv2 = conv(16, 16)
        self.conv3 = conv(16, 16)
        self.conv4 = conv(16, 32)
        self.head = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        halve = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2), padding="SAME")
        x = halve(nnx.relu(self.conv1(images)))
        x = nnx.relu(self.conv2(x))
        x = halve(nnx.relu(self.conv3(x)))
        x = nnx.relu(self.conv4(x))
        return self.head(x.mean(axis=(1, 2)))


class Plan(NamedTuple):
    """The number of runs of each contender, and their length.

    Attributes:
      epochs: passes over the training images in a run.
      trials: learning rates tried.
      seeds: runs at the best rate.
      fused: whether optimizers run as kernels, where there are kernels.
    """

    epochs: int
    trials: int
    seeds: int
    fused: bool


class Curves(NamedTuple):
    """The learning curves of parallel runs; the first axis of each array is the run.

    Attributes:
      steps: number of updates at each evaluation.
      validation: accuracy at each evaluation.
      test: accuracy at the end.
    """

    steps: NDArray[np.int64]
    validation: NDArray[np.float64]
    test: NDArray[np.float64]

    @property
    def late_validation(self) -> NDArray[np.float64]:
        """Mean validation accuracy of the second half of training; a single one is coarse."""
        return self.validation[:, self.validation.shape[1] // 2 :].mean(axis=1)

    def steps_to(self, accuracy: float) -> list[int | None]:
        """Return the step at which each run first reached this validation accuracy, or `None`."""
        reached = self.validation >= accuracy
        return [int(self.steps[run.argmax()]) if run.any() else None for run in reached]


def make_network(data: Dataset) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """Return the network's structure and the shapes of its parameters."""
    channels = data.train.images.shape[-1]
    return nnx.split(nnx.eval_shape(lambda: ConvNet(channels, data.classes, rngs=nnx.Rngs(0))))


def train(
    factory: Factory,
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    data: Dataset,
    epochs: int,
    on_progress: Callable[[float], object],
) -> Curves:
    """Train one run for each pair of a rate and a seed, all in parallel.

    A seed decides the initial weights and the batches, equally for every optimizer. `on_progress`
    is called with each share of the work that is done.
    """
    go_on, params, states = prepare(factory, rates, seeds, data)
    batches = np.stack([draw_batches(seed, len(data.train.labels), epochs) for seed in seeds], 1)
    network, _ = make_network(data)
    validation = []
    for interval in batches:
        params, states = go_on(params, states, batches=interval)
        validation.append(accuracy(network, params, data.validation))
        on_progress(1 / len(batches))
    return Curves(
        steps=batches.shape[2] * np.arange(1, len(batches) + 1),
        validation=np.stack(validation, axis=1),
        test=np.asarray(accuracy(network, params, data.test)),
    )


def time_steps(
    contenders: Mapping[str, tuple[Factory, float]],
    runs: int,
    *,
    data: Dataset,
    on_progress: Callable[[float], object],
) -> dict[str, float]:
    """Return the seconds of a step for each contender, divided by the number of parallel runs.

    It is the shortest of several times, since other load only makes them longer. The contenders
    take turns, so that such load affects all of them.
    """
    prepared = {
        name: prepare(factory, [rate] * runs, range(runs), data)
        for name, (factory, rate) in contenders.items()
    }
    batches = np.stack([draw_batches(0, len(data.train.labels), epochs=1)[0]] * runs)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TIMINGS):
        for name, (go_on, params, states) in prepared.items():
            begin = time.perf_counter()
            jax.block_until_ready(go_on(params, states, batches=batches))
            seconds[name].append(time.perf_counter() - begin)
        on_progress(1 / TIMINGS)
    return {name: min(times) / batches.shape[1] / runs for name, times in seconds.items()}


def prepare(
    factory: Factory, rates: Sequence[float], seeds: Sequence[int], data: Dataset
) -> tuple[Callable[..., Any], optax.Params, optax.OptState]:
    """Return a function that trains on some batches, initial parameters and optimizer states."""
    network, _ = make_network(data)
    traced_rates = jnp.asarray(rates, jnp.float32)
    params = initialize(data.train.images.shape[-1], data.classes, jnp.asarray(seeds))
    states = jax.vmap(lambda rate, params: factory(rate).init(params))(traced_rates, params)
    go_on = partial(advance, network, factory, rates=traced_rates, data=data.train)
    return go_on, params, states


def draw_batches(seed: int, images: int, epochs: int) -> NDArray[np.int64]:
    """Return indices of images, of shape (evaluations, steps between them, images in a batch)."""
    size = min(BATCH_SIZE, images)
    per_epoch = images // size
    steps = epochs * per_epoch
    interval = STEPS_PER_EVALUATION * math.ceil(steps / STEPS_PER_EVALUATION / MOST_EVALUATIONS)
    evaluations = max(1, round(steps / interval))

    random = np.random.default_rng(seed)
    shuffled = [
        random.permutation(images)[: per_epoch * size]
        for _ in range(math.ceil(evaluations * interval / per_epoch))
    ]
    used = np.concatenate(shuffled)[: evaluations * interval * size]
    return used.reshape(evaluations, interval, size)


@partial(jax.jit, static_argnames=("channels", "classes"))
def initialize(channels: int, classes: int, seeds: jax.Array) -> nnx.State[Any, Any]:
    """Return new parameters for each seed, stacked."""

    def initialize_one(seed):
        # JAX's default generator takes seven times as long to compile.
        key = jax.random.key(seed, impl="rbg")
        return nnx.state(ConvNet(channels, classes, rngs=nnx.Rngs(key)))

    return lax.map(initialize_one, seeds)


@partial(jax.jit, static_argnames=("network", "factory"))
def advance(
    network: nnx.GraphDef[Any],
    factory: Factory,
    params: optax.Params,
    states: optax.OptState,
    *,
    rates: jax.Array,
    batches: ArrayLike,
    data: Split,
) -> tuple[optax.Params, optax.OptState]:
    """Train each run for as many steps as there are batches."""

    def loss(params, batch):
        logits = nnx.merge(network, params)(data.images[batch])
        labels = data.labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def advance_one(params, state, rate, batches):
        optimizer = factory(rate)

        def step(run, batch):
            params, state = run
            return apply_gradients(optimizer, params, state, jax.grad(loss)(params, batch)), None

        return lax.scan(step, (params, state), batches)[0]

    runs = params, states, rates, jnp.asarray(batches)
    if isinstance(factory(1.0), FusedTransformation):  # under `vmap` it would run its chain
        return lax.map(lambda run: advance_one(*run), runs)
    return jax.vmap(advance_one)(*runs)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    gradients: optax.Updates,
) -> tuple[optax.Params, optax.OptState]:
    """Return parameters and state after one step of the optimizer."""
    if isinstance(optimizer, FusedTransformation):
        return optimizer.step(params, state, gradients)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@partial(jax.jit, static_argnames="network")
def accuracy(network: nnx.GraphDef[Any], params: optax.Params, data: Split) -> jax.Array:
    """Return the share of images that each run classifies correctly."""

    def accuracy_one(params):
        def is_right(example: Split) -> jax.Array:
            logits = nnx.merge(network, params)(example.images[None])
            return logits.argmax() == example.labels

        return lax.map(is_right, data, batch_size=BATCH_SIZE).mean()

    return jax.vmap(accuracy_one)(params)
