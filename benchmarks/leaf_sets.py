"""Shapes of the parameters of known networks, read off their architectures.

Leaves are numbered in the order of the layers, float32, in the layouts of Flax: kernels are
(height, width, in, out) or (in, out).
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
# For each dimension, those of a mesh that cut it.
Axes = tuple[str | tuple[str, ...] | None, ...]
Leaves = dict[str, jax.ShapeDtypeStruct]


def leaves(shapes: Iterable[Shape]) -> Leaves:
    """A tree of float32 leaves; the names keep their order."""
    return {
        f"leaf{i:04d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)
    }


def count(params: Any) -> int:
    """Number of parameters of a tree of leaves, or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def in_words(params: Any) -> str:
    """How many leaves, and parameters."""
    leaves = len(jax.tree.leaves(params))
    many = "leaf" if leaves == 1 else "leaves"
    return f"{leaves} {many}, {count(params) / 1e6:.1f} million parameters"


def resnet50() -> Iterator[Shape]:
    """He et al. (2016) for ImageNet: 53 convolutions with batch norms, and a head."""

    def normalized(height: int, width: int, inputs: int, outputs: int) -> list[Shape]:
        return [(height, width, inputs, outputs), (outputs,), (outputs,)]

    yield from normalized(7, 7, 3, 64)
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            yield from normalized(1, 1, inputs, width)
            yield from normalized(3, 3, width, width)
            yield from normalized(1, 1, width, 4 * width)
            if block == 0:
                yield from normalized(1, 1, inputs, 4 * width)
            inputs = 4 * width
    yield from dense(2048, 1000)


def vit_b16() -> Iterator[Shape]:
    """Dosovitskiy et al. (2021), ViT-B/16 for ImageNet at 224 x 224."""
    width, patches = 768, 14 * 14
    yield from ((1, 1, width), (16, 16, 3, width), (width,))  # class token, patch embedding
    yield (1, patches + 1, width)
    for _ in range(12):
        yield from layer_norm(width)
        for _ in ("query", "key", "value", "output"):
            yield from dense(width, width)
        yield from layer_norm(width)
        yield from dense(width, 4 * width)
        yield from dense(4 * width, width)
    yield from layer_norm(width)
    yield from dense(width, 1000)


def gpt2() -> Iterator[Shape]:
    """Radford et al. (2019), the smallest: 124 million, the output tied to the embedding."""
    width = 768
    yield from ((50257, width), (1024, width))
    for _ in range(12):
        yield from layer_norm(width)
        yield from dense(width, 3 * width)
        yield from dense(width, width)
        yield from layer_norm(width)
        yield from dense(width, 4 * width)
        yield from dense(4 * width, width)
    yield from layer_norm(width)


def llama(width: int, layers: int, mlp: int, vocabulary: int) -> Iterator[tuple[Shape, Axes]]:
    """Touvron et al. (2023): no biases, a head of its own; the layouts are (in, out).

    Each shape comes with the axes of a mesh that cut it: "data" cuts the width of the residual
    stream, as fully sharded parameters are, "model" the other dimension, as Megatron's are.
    """
    into, out_of, vector = ("data", "model"), ("model", "data"), (("data", "model"),)
    yield (vocabulary, width), out_of
    for _ in range(layers):
        yield (width,), vector
        for _ in ("query", "key", "value"):
            yield (width, width), into
        yield (width, width), out_of
        yield (width,), vector
        for _ in ("gate", "up"):
            yield (width, mlp), into
        yield (mlp, width), out_of
    yield (width,), vector
    yield (width, vocabulary), into


def dense(inputs: int, outputs: int) -> list[Shape]:
    """Kernel and bias."""
    return [(inputs, outputs), (outputs,)]


def layer_norm(width: int) -> list[Shape]:
    """Scale and bias."""
    return [(width,), (width,)]


LEAF_SETS: dict[str, Leaves] = {
    "ResNet-50": leaves(resnet50()),
    "ViT-B/16": leaves(vit_b16()),
    "GPT-2 124M": leaves(gpt2()),
    "one of 4096 × 4096": leaves([(4096, 4096)]),
    "1000 of 64 KB": leaves([(128, 128)] * 1000),
}

# Of every kind that kernels tell apart: whole blocks, odd ones, single elements.
RAGGED = leaves(
    [
        (512, 512),
        (1023,),
        (3, 3, 64, 64),
        (64,),
        (1000, 513),
        (7,),
        (2048, 300),
        (1,),
        (129, 129),
        (512, 1000),
    ]
)

# The first one is to be compiled in a second. A time of it would say nothing.
COMPILED_SETS: dict[str, Leaves] = {"ragged": RAGGED} | LEAF_SETS
