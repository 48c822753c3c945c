"""A language model in bfloat16, trained with Flax linen: copy this file and make it yours.

    python language_model.py
    python language_model.py --text mine.txt --steps 2000
    python language_model.py --checkpoints run1

A small transformer learns a text byte by byte, by default Python's standard library, and writes
some text of its own at the end. After an interruption, the same command resumes bit-exactly from
its newest checkpoint.

Parameters are in bfloat16, which has 8 significant bits: an update below 1/512 of a parameter is
lost when the sum is rounded, and late in training most updates are that small. So the optimizer
keeps 8 more bits of each weight (`--bits 24`), or all that float32 has (`--bits 32`). `--bits 16`
keeps none, and rounds at random. The averages of the optimizer have 8 bits; `--float32-state` shows
what that costs. On an NVIDIA GPU the whole optimizer runs as fused kernels, elsewhere as the chain
itself.
"""

import argparse
import hashlib
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.progress import Progress

import optax_ext
from pallas_kernels import fuse
from pallas_kernels.flax import FusedTrainState

BATCH, LENGTH, HEADS = 32, 64, 8  # sequences in a step, bytes in a sequence, heads of attention
HELD_OUT = 0.05  # share of the text, at its end
TEMPERATURE = 0.7


def load_text(path: Path | None) -> np.ndarray:
    """Return the bytes of a file, by default of the modules of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path] if path else sorted(library.glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def draw_batch(text: np.ndarray, step: int) -> np.ndarray:
    """Return a step's sequences, which depend on nothing but the arguments."""
    starts = np.random.default_rng(step).integers(len(text) - LENGTH, size=BATCH)
    return np.stack([text[i : i + LENGTH + 1] for i in starts]).astype(np.int32)


class Transformer(nn.Module):
    """A causal transformer on bytes, whose output layer shares the embedding's weights."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(256, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(num_heads=HEADS)
            x += attention(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return embed.attend(nn.LayerNorm()(x))


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    """Return FAME with gradient clipping and a schedule, for bfloat16 parameters."""
    warm_up, rate = options.steps // 10, options.rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, options.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax_ext.fame(schedule))
    if not options.float32_state:
        tx = optax_ext.quantize_state(tx)
    if options.bits == 16:
        return optax_ext.stochastic_rounding(tx)
    return optax_ext.master_weights(tx, bits=options.bits)


def make_state(options: argparse.Namespace) -> FusedTrainState:
    """Return new parameters in bfloat16, and the state of their optimizer."""
    model = Transformer(options.width, options.layers)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    return FusedTrainState.create(
        apply_fn=model.apply,
        params=optax_ext.bfloat16_weights(variables["params"]),
        tx=fuse(make_optimizer(options)),
    )


def loss_of(params: optax.Params, state: FusedTrainState, batch: jax.Array) -> jax.Array:
    """Return the cross-entropy in nats per byte, computed in float32."""
    logits = state.apply_fn({"params": params}, batch[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@partial(jax.jit, donate_argnames="state")
def train_step(state: FusedTrainState, batch: jax.Array) -> FusedTrainState:
    """Return the state after one step."""
    return state.apply_gradients(grads=jax.grad(loss_of)(state.params, state, batch))


@jax.jit
def bits_per_byte(state: FusedTrainState, batch: jax.Array) -> jax.Array:
    """Return the loss in bits per byte."""
    return loss_of(state.params, state, batch) / jnp.log(2)


@partial(jax.jit, static_argnames="length")
def write(state: FusedTrainState, prompt: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """Sample bytes one by one, each given the `LENGTH` bytes before it."""

    def write_byte(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": state.params}, window[None])[0, -1]
        byte = jax.random.categorical(key, logits.astype(jnp.float32) / TEMPERATURE)
        return jnp.append(window[1:], byte), byte

    return jax.lax.scan(write_byte, prompt.astype(jnp.int32), jax.random.split(key, length))[1]


def restore(checkpoints: ocp.CheckpointManager, settings: dict[str, Any], new: Any) -> Any:
    """Return the step and the state of the newest checkpoint, or 0 and the new state."""
    saved = checkpoints.metadata().custom_metadata
    if saved != settings:
        raise SystemExit(f"{checkpoints.directory} has checkpoints of {saved}, not of {settings}")
    step = checkpoints.latest_step()
    if step is None:
        return 0, new
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, new)
    try:
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        message = f"step {step} can't be read; move it away to resume from an earlier one"
        raise SystemExit(f"{checkpoints.directory}: {message} ({error!s:.200})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Train, with a report and a checkpoint every few steps, then write."""
    options = parse(argv)
    text = load_text(options.text)
    train, held_out = np.split(text, [int((1 - HELD_OUT) * len(text))])
    if len(held_out) <= LENGTH:
        raise SystemExit(f"{len(text)} bytes of text are too few")

    folder = options.checkpoints or Path(tempfile.mkdtemp())
    settings = {k: v for k, v in vars(options).items() if k not in ("checkpoints", "every")}
    settings["text"] = hashlib.sha256(text).hexdigest()
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(folder.absolute(), options=keep, metadata=settings) as checkpoints,
        Progress() as bar,
    ):
        done, state = restore(checkpoints, settings, make_state(options))
        bar.console.print(f"{done} steps done, checkpoints in {folder}")
        for step in bar.track(range(done + 1, options.steps + 1), options.steps, done):
            state = train_step(state, draw_batch(train, step))
            if step % options.every == 0 or step == options.steps:
                score = bits_per_byte(state, draw_batch(held_out, 0))
                bar.console.print(f"step {step}: {score:.3f} bits per held-out byte")
                checkpoints.save(step, args=ocp.args.StandardSave(state))

    prompt = held_out[:LENGTH]
    written = np.asarray(write(state, prompt, jax.random.key(0), length=400), np.uint8)
    print(prompt.tobytes().decode(errors="replace"), written.tobytes().decode(errors="replace"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="file (default: Python's standard library)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEADS}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bits", type=int, choices=(16, 24, 32), default=24, help="of a weight")
    parser.add_argument("--float32-state", action="store_true", help="keep averages in float32")
    parser.add_argument("--every", type=int, default=50, help="steps from report to report")
    parser.add_argument("--checkpoints", type=Path, help="folder (default: a temporary one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
