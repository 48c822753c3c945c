"""A convnet without skip connections, many of which train fast side by side on a CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from _digits import CLASSES, Network

# The first layer makes so many channels of every 2 × 2 pixels; the others keep them and the size.
CHANNELS, STEM, SIDE = 4, 2, 4
FEATURES = SIDE * SIDE * CHANNELS


def make_network(depth: int) -> Network:
    """So many convolutions, ReLU after each, no normalization, and a dense layer."""
    return Network(partial(initialize, depth), apply)


def initialize(depth: int, key: jax.Array) -> Any:
    """He's weights; all 3 × 3 kernels are one leaf."""
    first, hidden, last = jax.random.split(key, 3)
    he = jax.nn.initializers.he_normal()
    kernels = [he(k, (3, 3, CHANNELS, CHANNELS)) for k in jax.random.split(hidden, depth - 1)]
    return {
        "first": {"kernel": he(first, (STEM, STEM, 1, CHANNELS)), "bias": jnp.zeros(CHANNELS)},
        "hidden": {"kernel": jnp.stack(kernels), "bias": jnp.zeros((depth - 1, CHANNELS))},
        "last": {"kernel": he(last, (FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


def apply(params: Any, images: jax.Array) -> jax.Array:
    """Logits of images of shape (N, 8, 8, 1)."""
    x = jax.nn.relu(embed(params["first"], images))
    x, _ = lax.scan(lambda x, layer: (jax.nn.relu(convolve(layer, x)), None), x, params["hidden"])
    return x.reshape(len(x), -1) @ params["last"]["kernel"] + params["last"]["bias"][None]


def embed(params: Any, images: jax.Array) -> jax.Array:
    """A convolution whose stride is its kernel's side; of shape (N, pixels, channels)."""
    patches = images.reshape(-1, SIDE, STEM, SIDE, STEM).swapaxes(2, 3)
    kernel = params["kernel"].reshape(STEM * STEM, CHANNELS)
    return patches.reshape(-1, SIDE * SIDE, STEM * STEM) @ kernel + params["bias"][None, None]


def convolve(params: Any, x: jax.Array) -> jax.Array:
    """With a 3 × 3 kernel, beside zeros, by the matrix between all pixels of all channels.

    XLA's convolutions, of many networks with a kernel each, take a CPU ten times as long.
    """
    kernel = params["kernel"].reshape(9, CHANNELS, CHANNELS)
    matrix = jnp.einsum("kpq,kio->piqo", TAPS, kernel).reshape(FEATURES, FEATURES)
    return (x.reshape(-1, FEATURES) @ matrix).reshape(x.shape) + params["bias"][None, None]


def find_taps() -> np.ndarray:
    """1 where a tap of the kernel takes pixel p for pixel q; of shape (9, pixels, pixels)."""
    shifts = [np.eye(SIDE, k=-offset, dtype=np.float32) for offset in (-1, 0, 1)]
    return np.stack([np.kron(down, across) for down in shifts for across in shifts])


TAPS = find_taps()
