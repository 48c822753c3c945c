"""A convolutional network, trained on images with Flax nnx: copy this file and make it yours.

    python train_nnx.py
    python train_nnx.py --optimizer novak --rate 3e-3
    python train_nnx.py --checkpoints run1

It shows gradient clipping, a learning rate for each group of parameters, weight decay on kernels
only, and how to log what an optimizer keeps in its state. On an NVIDIA GPU the optimizer runs as
fused kernels. On other devices the chain itself runs.

After an interruption, the same command resumes bit-exactly from its newest checkpoint: weights,
batch statistics, random numbers, optimizer state and the order of the images.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_ext
from pallas_kernels import fuse
from pallas_kernels.flax import FusedOptimizer

BATCH, WEIGHT_DECAY, HEAD_RATE = 64, 1e-2, 0.5


def load_data() -> list[Any]:
    """Return training images, test images, training labels and test labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    return train_test_split(images, labels, stratify=labels, random_state=0)


def draw_batch(step: int, images: int, seed: int) -> np.ndarray:
    """Return the indices of a step's images, which depend on nothing but the arguments."""
    epoch, i = divmod(step - 1, images // BATCH)
    order = np.random.default_rng([seed, epoch]).permutation(images)
    return order[i * BATCH : (i + 1) * BATCH]


class Convolution(nnx.Module):
    """A convolution, batch normalization and ReLU."""

    def __init__(self, inputs: int, outputs: int, *, strides: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class Network(nnx.Module):
    """Three convolutions, a mean over space, dropout and a dense layer."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.features = nnx.Sequential(
            Convolution(1, 16, strides=1, rngs=rngs),
            Convolution(16, 32, strides=2, rngs=rngs),
            Convolution(32, 32, strides=1, rngs=rngs),
        )
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(self.dropout(self.features(images).mean(axis=(1, 2))))


def make_optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """Return gradient clipping, followed by one optimizer for each group of parameters.

    Each group has its own optimizer state: VRAdam's gate, for instance, follows the group's norm.
    """

    def for_group(peak: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        return optax_ext.get(name, schedule, weight_decay=WEIGHT_DECAY, mask=is_kernel)

    groups = optax.partition(
        {"features": for_group(rate), "head": for_group(rate * HEAD_RATE)}, group_of
    )
    return optax.chain(optax.clip_by_global_norm(1.0), groups)


def is_kernel(params: optax.Params) -> Any:
    """Mark the parameters that decay: neither biases nor the scales of normalizations."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def group_of(params: optax.Params) -> Any:
    """Return each parameter's group, by its path in the model: "features/layers/0/conv/kernel"."""

    def group(path: Any, _: jax.Array) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "head" if name.startswith("head/") else "features"

    return jax.tree.map_with_path(group, params)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Network, optimizer: FusedOptimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Update model and optimizer in place, and return the loss."""

    def loss_of(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def accuracy(model: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of images that the model classifies correctly."""
    model.eval()
    correct = model(images).argmax(axis=-1) == labels
    model.train()  # `train_step` was compiled for this mode
    return correct.mean()


def describe_state(optimizer: FusedOptimizer, fields: Sequence[str]) -> str:
    """Return the mean of each field of the optimizer's state, for each group of parameters."""
    groups = optax.tree.get(nnx.as_pure(optimizer.opt_state), "inner_states")
    return "".join(
        f", {field} of {name} {optax.tree.get(state, field).mean():.3f}"
        for field in fields
        for name, state in groups.items()
    )


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
    """Train, with a report and a checkpoint every few steps."""
    options = parse(argv)
    images, test_images, labels, test_labels = load_data()
    model = Network(rngs=nnx.Rngs(options.seed))
    tx = make_optimizer(options.optimizer, options.rate, options.steps)
    optimizer = FusedOptimizer(model, fuse(tx), wrt=nnx.Param)
    fields = optax_ext.METHODS[options.optimizer].logged

    folder = options.checkpoints or Path(tempfile.mkdtemp())
    settings = {k: v for k, v in vars(options).items() if k not in ("checkpoints", "every")}
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(folder.absolute(), options=keep, metadata=settings) as checkpoints,
        Progress() as bar,
    ):
        done, state = restore(checkpoints, settings, nnx.state((model, optimizer)))
        nnx.update((model, optimizer), state)
        bar.console.print(f"{done} steps done, checkpoints in {folder}")
        for step in bar.track(range(done + 1, options.steps + 1), options.steps, done):
            batch = draw_batch(step, len(images), options.seed)
            loss = train_step(model, optimizer, images[batch], labels[batch])
            if step % options.every == 0 or step == options.steps:
                logged = describe_state(optimizer, fields)
                bar.console.print(f"step {step}: loss {loss:.3f}{logged}")
                state = nnx.state((model, optimizer))
                checkpoints.save(step, args=ocp.args.StandardSave(state))
    print(f"test accuracy {accuracy(model, test_images, test_labels):.1%}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=optax_ext.METHODS, default="vradam")
    parser.add_argument("--rate", type=float, default=1e-2, help="highest learning rate")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and batches")
    parser.add_argument("--every", type=int, default=50, help="steps from report to report")
    parser.add_argument("--checkpoints", type=Path, help="folder (default: a temporary one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
