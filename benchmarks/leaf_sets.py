"""Shapes of the parameters of known networks, derived from their architectures.

Leaves are float32 and numbered in the order of the layers. Kernels have the layouts of Flax:
(height, width, in, out) or (in, out).
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
# The mesh axes that partition each dimension.
Axes = tuple[str | tuple[str, ...] | None, ...]
Leaves = dict[str, jax.ShapeDtypeStruct]


def leaves(shapes: Iterable[Shape]) -> Leaves:
    """Return a tree of float32 leaves, whose names sort in the order of the shapes."""
    return {
        f"leaf{i:04d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)
    }


def count(params: Any) -> int:
    """Return the number of parameters in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def in_words(params: Any) -> str:
    """Describe the number of leaves and of parameters."""
    leaves = len(jax.tree.leaves(params))
    many = "leaf" if leaves == 1 else "leaves"
    return f"{leaves} {many}, {count(params) / 1e6:.1f} million parameters"


def resnet50() -> Iterator[Shape]:
    """Yield the shapes of ResNet-50 for ImageNet (He et al., 2016).

    The network has 53 convolutions, each with a batch norm, and a head.
    """

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
    """Yield the shapes of ViT-B/16 for ImageNet at 224 x 224 (Dosovitskiy et al., 2021)."""
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
    """Yield the shapes of the smallest GPT-2, with 124 million parameters (Radford et al., 2019).

    The output layer shares its weights with the embedding.
    """
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
    """Yield the shapes of LLaMA in the layout (in, out), with mesh axes (Touvron et al., 2023).

    The network has no biases, and its output layer has its own weights. The axis "data" partitions
    the width of the residual stream, as in fully sharded training. The axis "model" partitions the
    other dimension, as in Megatron.
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
    """Return the shapes of a dense layer: kernel and bias."""
    return [(inputs, outputs), (outputs,)]


def layer_norm(width: int) -> list[Shape]:
    """Return the shapes of a layer norm: scale and bias."""
    return [(width,), (width,)]


LEAF_SETS: dict[str, Leaves] = {
    "ResNet-50": leaves(resnet50()),
    "ViT-B/16": leaves(vit_b16()),
    "GPT-2 124M": leaves(gpt2()),
    "one of 4096 × 4096": leaves([(4096, 4096)]),
    "1000 of 64 KB": leaves([(128, 128)] * 1000),
}

# Each kind of leaf that kernels treat differently: whole blocks, partial blocks, one element.
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

# The set "ragged" compiles in a second. It is too small for meaningful times of a step.
COMPILED_SETS: dict[str, Leaves] = {"ragged": RAGGED} | LEAF_SETS
