"""A language model in bfloat16 with Flax linen, to copy and make your own.

    python examples/language_model.py
    python examples/language_model.py --text mine.txt --steps 2000
    python examples/language_model.py --checkpoints run1

It learns a text byte by byte, by default Python's own standard library, and writes some of its own
at the end. After Ctrl-C, the same line goes on from its `--checkpoints`, to the bit.

Parameters are in bfloat16, which has 8 significant bits: a step of less than 1/512 of a parameter
is lost when the sum is rounded, and at the low rates of late training most are. So the optimizer
keeps master weights in float32, which the parameters are rounded from. `--no-master-weights` saves
their 4 bytes per parameter, and the loss shows what they are for. On an NVIDIA GPU all this is one
pass over memory by kernels, elsewhere the chain that it is.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ext
from _command_line import above_zero, add_numbers, make_parser, not_negative, positive
from _language import HEADS, LENGTH, Transformer, draw, read_text
from _resume import open_checkpoints, steps_to
from pallas_kernels import fuse
from pallas_kernels.flax import FusedTrainState

HELD_OUT = 0.05  # of the text, at its end


def main(argv: Sequence[str] | None = None) -> None:
    options, text = parse(argv)
    training, held_out = np.split(text, [int((1 - HELD_OUT) * len(text))])
    state = begin(options)

    with open_checkpoints("language_model", options) as checkpoints:
        state = checkpoints.restore(state) or state
        with steps_to(options.steps, checkpoints) as steps:
            for step in steps:
                state, loss = train_step(state, draw(training, step, options.batch))
                if (step + 1) % options.log_every == 0:
                    steps.note(f"loss {loss:.3f}")
                    score = bits_per_byte(state, draw(held_out, step=0, batch=128))
                    steps.log(f"step {step + 1:>4}: {score:.3f} bits per held-out byte")
                checkpoints.save(step + 1, state, force=steps.ending)

    prompt = held_out[:LENGTH]
    written = write(state, prompt, jax.random.key(0), options.temperature, options.write)
    print(f"{decode(prompt)}▸{decode(written)}")


def begin(options: argparse.Namespace) -> FusedTrainState:
    """A new model, and the state of its optimizer."""
    model = Transformer(options.width, options.layers)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    return FusedTrainState.create(
        apply_fn=model.apply,
        params=optax.tree.cast(variables["params"], jnp.bfloat16),
        tx=fuse(make_optimizer(options)),
    )


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.rate,
        warmup_steps=options.steps // 10,
        decay_steps=options.steps,
    )
    # Averages of bfloat16 would soon stand still: 0.999 v + 0.001 g² is rounded to v.
    method = optax_ext.fame(schedule, mu_dtype=jnp.float32, nu_dtype=jnp.float32)
    tx = optax.chain(optax.clip_by_global_norm(1.0), method)
    return with_master_weights(tx) if options.master_weights else tx


class MasterWeightsState(NamedTuple):
    master: optax.Params
    inner_state: optax.OptState


def with_master_weights(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets `tx` move weights in float32, and the parameters follow, each rounded to its dtype."""

    def init(params):
        master = optax.tree.cast(params, jnp.float32)
        return MasterWeightsState(master, tx.init(master))

    def update(updates, state, params=None):
        gradients = optax.tree.cast(updates, jnp.float32)
        updates, inner_state = tx.update(gradients, state.inner_state, state.master)
        master = optax.apply_updates(state.master, updates)
        # In float32, in which `optax.apply_updates` adds and rounds the sum.
        return optax.tree.sub(master, params), MasterWeightsState(master, inner_state)

    return optax.GradientTransformation(init, update)


def loss_of(params: optax.Params, state: FusedTrainState, batch: jax.Array) -> jax.Array:
    """In nats per byte; the network is in bfloat16, its loss in float32."""
    logits = state.apply_fn({"params": params}, batch[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@partial(jax.jit, donate_argnames="state")
def train_step(state: FusedTrainState, batch: jax.Array) -> tuple[FusedTrainState, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_of)(state.params, state, batch)
    return state.apply_gradients(grads=gradients), loss


@jax.jit
def bits_per_byte(state: FusedTrainState, batch: jax.Array) -> jax.Array:
    return loss_of(state.params, state, batch) / jnp.log(2)


@partial(jax.jit, static_argnames="length")
def write(
    state: FusedTrainState, prompt: jax.Array, key: jax.Array, temperature: float, length: int
) -> jax.Array:
    """Draws bytes one by one, each from what the model makes of the last `LENGTH`.

    The logit that is highest with noise of Gumbel's is a draw; without any, the likeliest byte.
    """

    def write_byte(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": state.params}, window[None])[0, -1]
        noise = temperature * jax.random.gumbel(key, logits.shape)
        byte = jnp.argmax(logits.astype(jnp.float32) + noise)
        return jnp.append(window[1:], byte), byte

    window = jnp.asarray(prompt, jnp.int32)
    return jax.lax.scan(write_byte, window, jax.random.split(key, length))[1]


def decode(text: Any) -> str:
    return bytes(np.asarray(text, np.uint8)).decode(errors="replace")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, np.ndarray]:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="to learn from (default: Python's library)"
    )
    parser.add_argument(
        "--master-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in float32 (default: yes)",
    )
    add_numbers(
        parser,
        ("--rate", above_zero, 3e-3, "learning rate, at its peak"),
        ("--steps", positive, 300, "in all"),
        ("--batch", positive, 32, "sequences in a step"),
        ("--width", positive, 128, "of the model"),
        ("--layers", positive, 2, "of the model"),
        ("--log-every", positive, 50, "steps between reports"),
        ("--write", positive, 400, "bytes, at the end"),
        ("--temperature", not_negative, 0.7, "of what is written; at 0, the likeliest bytes"),
    )
    options = parser.parse_args(argv)
    if options.width % HEADS:
        parser.error(f"--width must be a multiple of {HEADS}, got {options.width}")
    try:
        text = np.frombuffer(options.text.read_bytes(), np.uint8) if options.text else read_text()
    except OSError as error:
        parser.error(f"--text {options.text}: {error.strerror}")
    if HELD_OUT * len(text) < LENGTH + 2:
        parser.error(f"--text {options.text}: {len(text)} bytes are too few to hold some out")
    return options, text


if __name__ == "__main__":
    main()
