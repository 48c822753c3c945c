"""The network, and many trainings of it in parallel: one run for each seed and rate."""

import math
import time
from collections.abc import Callable, Sequence
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

# A loss above this counts as this, and so does NaN. Means stay finite.
HIGHEST_LOSS = 10.0

# Returns an optimizer for a schedule of the learning rate.
Factory = Callable[[optax.Schedule], optax.GradientTransformation]


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


def halve(images):
    """Return the maxima of squares of 2 × 2; XLA's pooling makes a step on CPU 1.6 times as slow.

    Pixels must not be negative, since an odd side is padded with zeros.
    """
    runs, height, width, channels = images.shape
    images = jnp.pad(images, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    shape = runs, -(-height // 2), 2, -(-width // 2), 2, channels
    return images.reshape(shape).max(axis=(2, 4))


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
        x = halve(nnx.relu(self.conv1(images)))
        x = nnx.relu(self.conv2(x))
        x = halve(nnx.relu(self.conv3(x)))
        x = nnx.relu(self.conv4(x))
        return self.head(x.mean(axis=(1, 2)))


class Plan(NamedTuple):
    """The number of runs of each contender, and their length.

    Attributes:
      epochs: passes over the training images in a run.
      trials: learning rates that each contender tries.
      tuning_seeds: runs at each of these rates.
      seeds: runs at the best rate, with other seeds.
      fused: whether optimizers run as kernels, where there are kernels.
    """

    epochs: int
    trials: int
    tuning_seeds: int
    seeds: int
    fused: bool


class Runs(NamedTuple):
    """Parallel runs; the first axis of each array is the run. A loss is the mean cross-entropy.

    Attributes:
      steps: number of updates at each evaluation.
      validation_loss: at each evaluation.
      test_loss: at the end.
      test_accuracy: share of the test images that are right at the end.
      seconds_per_step: shortest time of a step of all runs, divided by their number.
    """

    steps: NDArray[np.int64]
    validation_loss: NDArray[np.floating]
    test_loss: NDArray[np.floating]
    test_accuracy: NDArray[np.floating]
    seconds_per_step: float


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
    curves: bool = True,
) -> Runs:
    """Train one run for each pair of a rate and a seed, all in parallel.

    A seed decides the initial weights and the batches, equally for every optimizer. `on_progress`
    is called with each share of the work that is done. Without `curves`, the only evaluation is at
    the end.
    """
    network, _ = make_network(data)
    drawn = {seed: draw_batches(seed, len(data.train.labels), epochs) for seed in set(seeds)}
    batches = np.stack([drawn[seed] for seed in seeds], axis=1)
    evaluations, _, interval, _ = batches.shape
    last = evaluations * interval
    traced_rates = jnp.asarray(rates, jnp.float32)
    params = initialize(data.train.images.shape[-1], data.classes, jnp.asarray(seeds))
    states = jax.vmap(lambda rate, params: make_optimizer(factory, rate, last).init(params))(
        traced_rates, params
    )
    go_on = partial(advance, network, factory, last, rates=traced_rates, data=data.train)

    steps, losses, seconds = [], [], []
    for i, chunk in enumerate(batches, start=1):
        begin = time.perf_counter()
        params, states = jax.block_until_ready(go_on(params, states, batches=chunk))
        seconds.append(time.perf_counter() - begin)
        if curves or i == evaluations:
            steps.append(i * interval)
            losses.append(evaluate(network, params, data.validation)[0])
        on_progress(1 / evaluations)
    # Other load only makes a time longer, so the shortest counts.
    seconds_per_step = min(seconds) / interval / len(seeds)
    test = evaluate(network, params, data.test)
    return Runs(np.asarray(steps, np.int64), np.stack(losses, axis=1), *test, seconds_per_step)


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


def make_optimizer(factory: Factory, rate: jax.Array, steps: int) -> optax.GradientTransformation:
    """Return the optimizer for a rate that falls to 0, along a cosine, in so many steps."""
    return factory(optax.cosine_decay_schedule(rate, steps))


@partial(jax.jit, static_argnames=("network", "factory", "steps"))
def advance(
    network: nnx.GraphDef[Any],
    factory: Factory,
    steps: int,
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
        optimizer = make_optimizer(factory, rate, steps)

        def step(run, batch):
            params, state = run
            return apply_gradients(optimizer, params, state, jax.grad(loss)(params, batch)), None

        return lax.scan(step, (params, state), batches)[0]

    runs = params, states, rates, jnp.asarray(batches)
    if isinstance(make_optimizer(factory, rates[0], steps), FusedTransformation):
        return lax.map(lambda run: advance_one(*run), runs)  # under `vmap` it would run its chain
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


def evaluate(
    network: nnx.GraphDef[Any], params: optax.Params, data: Split
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the loss of each run, and its share of images that are right."""
    losses, right = map(np.asarray, score(network, params, data))
    return np.fmin(losses, HIGHEST_LOSS), right


@partial(jax.jit, static_argnames="network")
def score(
    network: nnx.GraphDef[Any], params: optax.Params, data: Split
) -> tuple[jax.Array, jax.Array]:
    def score_one(params):
        def score_image(example: Split) -> tuple[jax.Array, jax.Array]:
            (logits,) = nnx.merge(network, params)(example.images[None])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, example.labels)
            return loss, logits.argmax() == example.labels

        losses, right = lax.map(score_image, data, batch_size=BATCH_SIZE)
        return losses.mean(), right.mean()

    return jax.vmap(score_one)(params)
