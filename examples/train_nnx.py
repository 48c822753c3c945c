"""A convolutional network on images with Flax nnx, to copy and make your own.

    python examples/train_nnx.py
    python examples/train_nnx.py --optimizer novak --rate 3e-3 --data mine.npz
    python examples/train_nnx.py --checkpoints run1

After Ctrl-C, the same line goes on from its `--checkpoints`, and ends with what it would have ended
with, to the bit: weights, statistics of the batches, random numbers, state of the optimizer. On an
NVIDIA GPU the optimizer runs as kernels, elsewhere as the chain that it is.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import optax_ext
from _command_line import (
    above_zero,
    add_data,
    add_numbers,
    make_parser,
    natural,
    not_negative,
    positive,
)
from _data import Dataset, Split, draw, load_data
from _resume import open_checkpoints, steps_to
from pallas_kernels import fuse
from pallas_kernels.flax import FusedOptimizer

# Each with the name of what to watch in its state.
METHODS = {"vradam": (optax_ext.vradam, "gate"), "novak": (optax_ext.novak, "rectification")}


def main(argv: Sequence[str] | None = None) -> None:
    options, data = parse(argv)
    model = Network(data.train.images.shape[-1], data.classes, rngs=nnx.Rngs(options.seed))
    optimizer = FusedOptimizer(model, fuse(make_optimizer(options)), wrt=nnx.Param)

    with open_checkpoints("train_nnx", options) as checkpoints:
        if restored := checkpoints.restore(nnx.state((model, optimizer))):
            nnx.update((model, optimizer), restored)
        with steps_to(options.steps, checkpoints) as steps:
            for step in steps:
                batch = draw(step, len(data.train.labels), options.batch, options.seed)
                loss = train_step(model, optimizer, data.train, batch)
                if (step + 1) % options.log_every == 0:
                    steps.note(f"loss {loss:.3f}")
                    steps.log(report(step + 1, model, optimizer, data.validation, options))
                checkpoints.save(step + 1, nnx.state((model, optimizer)), force=steps.ending)
    print(f"test accuracy {accuracy(model, data.test):.1%}")


class Network(nnx.Module):
    """Three convolutions, each normalized, and a dense layer on their mean over space."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        self.features = nnx.Sequential(
            Convolution(channels, 16, strides=1, rngs=rngs),
            Convolution(16, 32, strides=2, rngs=rngs),
            Convolution(32, 32, strides=1, rngs=rngs),
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.features(images).mean(axis=(1, 2))
        return self.head(self.dropout(x))


class Convolution(nnx.Module):
    def __init__(self, inputs: int, outputs: int, *, strides: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    """Clipping, then one optimizer for each group of parameters.

    A group has a state of its own: a gate of VRAdam's, say, is of the group's velocity.
    """
    method, _ = METHODS[options.optimizer]

    def of_group(relative_rate: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=options.rate * relative_rate,
            warmup_steps=options.steps // 10,
            decay_steps=options.steps,
        )
        return method(schedule, weight_decay=options.decay, mask=is_kernel)

    groups = optax.partition(
        {"features": of_group(1.0), "head": of_group(options.head_rate)}, group_of
    )
    return optax.chain(optax.clip_by_global_norm(1.0), groups)


def is_kernel(params: optax.Params) -> Any:
    """Which parameters decay: no biases, and no scales of normalizations."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def group_of(params: optax.Params) -> Any:
    """The group of each parameter, by where the model keeps it: "features/layers/0/conv/kernel"."""

    def group(path: Any, _: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "head" if name.startswith("head/") else "features"

    return jax.tree.map_with_path(group, params)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Network, optimizer: FusedOptimizer, data: Split, batch: np.ndarray
) -> jax.Array:
    def loss_of(model: Network) -> jax.Array:
        logits = model(data.images[batch])
        labels = data.labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Network, data: Split) -> jax.Array:
    model.eval()
    right = model(data.images).argmax(axis=-1) == data.labels
    model.train()  # as it was, for `train_step` is compiled for that
    return right.mean()


def report(
    step: int, model: Network, optimizer: FusedOptimizer, data: Split, options: argparse.Namespace
) -> str:
    """How well the model does, and what its optimizer is doing in each group."""
    _, watched = METHODS[options.optimizer]
    groups = optax.tree.get(nnx.as_pure(optimizer.opt_state), "inner_states")
    values = [f"{name} {optax.tree.get(state, watched):.3f}" for name, state in groups.items()]
    validation = f"{accuracy(model, data):.1%}"
    return f"step {step:>4}: validation accuracy {validation:>6}, {watched} {', '.join(values)}"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Dataset]:
    parser = make_parser(__doc__)
    add_data(parser)
    parser.add_argument("--optimizer", choices=METHODS, default="vradam")
    add_numbers(
        parser,
        ("--rate", above_zero, 1e-2, "learning rate, at its peak"),
        ("--head-rate", not_negative, 0.5, "that of the head, relative to it"),
        ("--decay", not_negative, 1e-2, "of kernels"),
        ("--steps", positive, 300, "in all"),
        ("--batch", positive, 64, "images in a step"),
        ("--seed", natural, 0, "of weights, order and dropout"),
        ("--log-every", positive, 50, "steps between reports"),
    )
    options = parser.parse_args(argv)
    return options, load_data(parser, options)


if __name__ == "__main__":
    main()
