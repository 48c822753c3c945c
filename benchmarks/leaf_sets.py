"""Sets of leaves: the shapes of the parameters of known networks, also sharded on a mesh.

Leaves are float32 and numbered in the order of the layers. Kernels have the layouts of Flax:
(height, width, in, out) or (in, out).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.shapes import Leaves, Shape, leaves

# The mesh axes that partition each dimension.
Axes = tuple[str | tuple[str, ...] | None, ...]


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


@dataclass(frozen=True)
class ShardedSet:
    """A set of leaves that is sharded across devices.

    Attributes:
      leaves: shapes, each with the mesh axes that partition its dimensions.
      along_model: returns the size of the mesh axis "model" for a number of devices. The axis
        "data" has the other factor.
    """

    leaves: tuple[tuple[Shape, Axes], ...]
    along_model: Callable[[int], int]

    def on(self, devices: Sequence[Any]) -> Leaves:
        """Return the leaves with their shardings on a mesh of these devices."""
        mesh = Mesh(
            np.array(devices).reshape(-1, self.along_model(len(devices))), ("data", "model")
        )
        return {
            f"leaf{i:04d}": jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
            )
            for i, (shape, axes) in enumerate(self.leaves)
        }


def squarest(devices: int) -> int:
    """Return the shorter side of the most square mesh of this number of devices."""
    return next(side for side in range(math.isqrt(devices), 0, -1) if devices % side == 0)


def none_along_model(devices: int) -> int:
    """Return 1, so that the axis "data" contains all devices."""
    del devices
    return 1


_LLAMA_7B = tuple(llama(4096, layers=32, mlp=11008, vocabulary=32000))
_SMALL = tuple(llama(512, layers=2, mlp=1536, vocabulary=1024))

SHARDED_SETS = {
    "LLaMA-7B": ShardedSet(_LLAMA_7B, squarest),
    "LLaMA-7B, fully sharded": ShardedSet(_LLAMA_7B, none_along_model),
    # The small sets compile in a second, for a few devices. A TPU pads no shape of any sharded set.
    "small LLaMA": ShardedSet(_SMALL, squarest),
    "small LLaMA, fully sharded": ShardedSet(_SMALL, none_along_model),
}
