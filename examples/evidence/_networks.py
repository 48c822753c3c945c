"""Networks, the examples that they learn, and their loss."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

CLASSES = 10
BATCH = 64


class Split(NamedTuple):
    """Images, or other inputs, and their labels."""

    images: Any
    labels: Any


class Data(NamedTuple):
    """The examples to train on, to choose settings by, and to judge them by."""

    train: Split
    validation: Split
    test: Split


class Network(NamedTuple):
    """A network: a function of a random key, and one of parameters and images."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


@partial(jax.jit, static_argnames="init")
def initialize(init: Callable[[jax.Array], Any], seeds: jax.Array) -> Any:
    """Return new parameters for each seed, stacked."""
    # JAX's default generator takes seven times as long to compile.
    return lax.map(lambda seed: init(jax.random.key(seed, impl="rbg")), seeds)


def draw_batches(seed: int, steps: int, images: int, batch: int = BATCH) -> np.ndarray:
    """Return indices of images, of shape (steps, batch); an epoch has each image at most once."""
    random = np.random.default_rng(seed)
    epochs = -(-steps // (images // batch))
    used = images // batch * batch
    shuffled = [random.permutation(images)[:used] for _ in range(epochs)]
    return np.concatenate(shuffled).reshape(-1, batch)[:steps]


def cross_entropy(apply: Callable[..., jax.Array], params: Any, split: Split) -> jax.Array:
    logits = apply(params, split.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
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
