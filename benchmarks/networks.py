"""Two networks that `train` trains on random batches."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Network(NamedTuple):
    """The inputs of a training step.

    Attributes:
      batch_size: words for the size of a batch.
      params: the initial parameters.
      loss: the loss function, `loss(params, batch)`.
      batch: the batch of every step.
    """

    batch_size: str
    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batch: tuple[jax.Array, jax.Array]


class ResidualBlock(nnx.Module):
    """Two normalized convolutions with a shortcut; He et al. (2016)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        # A group norm, because a batch norm would need state in addition to the parameters.
        norm = functools.partial(nnx.GroupNorm, outputs, num_groups=4, rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, outputs, (3, 3), strides=stride), norm()
        self.conv2, self.norm2 = conv(outputs, outputs, (3, 3)), norm()
        self.shortcut = conv(inputs, outputs, (1, 1), strides=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ConvNet(nnx.Module):
    """A residual network. Each stage has two blocks and halves the resolution, except the first."""

    def __init__(self, widths: tuple[int, ...], *, channels: int, classes: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(channels, widths[0], (3, 3), rngs=rngs)
        blocks, inputs = [], widths[0]
        for i, outputs in enumerate(widths):
            blocks.append(ResidualBlock(inputs, outputs, stride=1 if i == 0 else 2, rngs=rngs))
            blocks.append(ResidualBlock(outputs, outputs, stride=1, rngs=rngs))
            inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron with pre-normalization; Radford et al. (2019)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x += nn.MultiHeadDotProductAttention(num_heads=self.heads)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Transformer(nn.Module):
    """A language model whose output layer shares its weights with the embedding."""

    vocabulary: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width)
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width)
        )
        x = embed(tokens) + position
        for _ in range(self.layers):
            x = TransformerBlock(heads=4)(x)
        return embed.attend(nn.LayerNorm()(x))


def convnet(
    widths: tuple[int, ...] = (32, 64, 128), *, batch: int = 8, pixels: int = 32
) -> Network:
    """Return a residual network in Flax nnx, and a batch of images with random pixels."""
    channels, classes, random = 3, 10, np.random.default_rng(0)

    def initialize():
        rngs = nnx.Rngs(_key())
        return nnx.split(ConvNet(widths, channels=channels, classes=classes, rngs=rngs), nnx.Param)

    network, _ = jax.eval_shape(initialize)
    params = jax.jit(lambda: initialize()[1])()
    images = random.standard_normal((batch, pixels, pixels, channels), np.float32)
    labels = random.integers(classes, size=batch)

    def loss(params, batch):
        images, labels = batch
        return _cross_entropy(nnx.merge(network, params)(images), labels)

    return Network(
        f"{batch} images of {pixels} × {pixels}",
        params,
        loss,
        (jnp.asarray(images), jnp.asarray(labels)),
    )


def transformer(
    width: int = 192, *, layers: int = 4, vocabulary: int = 2048, batch: int = 8, length: int = 64
) -> Network:
    """Return a transformer in Flax linen, and a batch of sequences of random tokens."""
    text = np.random.default_rng(0).integers(vocabulary, size=(batch, length + 1))
    inputs, targets = jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])
    model = Transformer(vocabulary, width, layers)
    params = jax.jit(model.init)(_key(), inputs)["params"]

    def loss(params, batch):
        inputs, targets = batch
        return _cross_entropy(model.apply({"params": params}, inputs), targets)

    return Network(f"{batch} sequences of {length} tokens", params, loss, (inputs, targets))


def _key() -> jax.Array:
    # JAX's default generator takes much longer to compile.
    return jax.random.key(0, impl="rbg")


def _cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


NETWORKS: dict[str, Callable[[], Network]] = {
    "convolutional": convnet,
    "transformer": transformer,
}
