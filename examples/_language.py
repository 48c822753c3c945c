"""What is learned on many devices: a small causal transformer, and the bytes that it reads."""

import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

LENGTH = 64  # of a sequence, in bytes
HEADS = 8
BYTES = 256


class Transformer(nn.Module):
    """A causal model of bytes, its output tied to the embedding."""

    width: int
    layers: int

    @property
    def inside(self) -> tuple[int, ...]:
        """How long those axes are that no layer hands on: heads, hidden units, and the bytes."""
        return HEADS, 4 * self.width, BYTES

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(BYTES, self.width, name="bytes")
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            x = Layer(name=f"layer_{i}")(x, mask)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Layer(nn.Module):
    """Attention, then two dense layers, each beside a path past it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        attend = nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")
        x += attend(nn.LayerNorm(name="norm_1")(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(width, name="down")(hidden)


def read_text() -> np.ndarray:
    """Bytes of the modules at the top of Python's standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return np.frombuffer(b"".join(f.read_bytes() for f in sorted(folder.glob("*.py"))), np.uint8)


def draw(text: np.ndarray, step: int, batch: int) -> np.ndarray:
    """The sequences of a step, and a byte more of each: the same for a run that was interrupted."""
    starts = np.random.default_rng(step).integers(len(text) - LENGTH - 1, size=batch)
    return np.stack([text[i : i + LENGTH + 1] for i in starts]).astype(np.int32)
