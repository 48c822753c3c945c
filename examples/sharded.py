"""A language model on many devices, with parameters, optimizer state and batches sharded.

It runs on all GPUs or on a TPU slice; without them, on eight virtual devices of the CPU:

    python sharded.py
    python sharded.py --optimizer novak --layout replicated
    python sharded.py --model-parallel 2 --checkpoints run1
    python sharded.py --accumulate 4 --bits 32

In two processes on one machine, and, with one command for all of its machines, on a cluster:

    both="--coordinator localhost:9911 --processes 2 --checkpoints run2"
    python sharded.py $both --process 0 & python sharded.py $both --process 1
    srun python sharded.py --cluster --checkpoints /shared/run3

After an interruption, the same command resumes bit-exactly from its newest checkpoint; on other
devices or in another layout it resumes up to rounding. If process 0 dies, the others end at once.
If another one dies, they end after `--give-up-after` seconds. Start all of them again.

The text is Python's standard library. The optimizer is the one that large trainings use: parameters
in bfloat16, with the missing bits of each weight in the optimizer's state; gradients that are
accumulated over several batches and clipped; a schedule; decay on matrices only. It is fused: on
NVIDIA GPUs its step runs as kernels on each device's shards, elsewhere as the chain itself.
"""

import argparse
import hashlib
import math
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress

import optax_ext
from pallas_kernels import FusedTransformation, fuse

LENGTH, HEADS = 64, 8  # bytes in a sequence, heads of attention
# Each optimizer with its weight decay: FAME adds it to the gradient, so its scale is another one.
# CaAdam is left out: it compares all layers, so it can't be split into groups.
OPTIMIZERS = {"fame": 1e-4, "vradam": 0.1, "dualadam": 0.1, "novak": 0.1}
# A run may resume with other values of all other options.
SETTINGS = "optimizer", "rate", "decay_steps", "accumulate", "bits", "batch", "width", "layers"

Tree = Any


def load_text() -> np.ndarray:
    """Return the bytes of the modules of Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    return np.frombuffer(b"".join(f.read_bytes() for f in sorted(library.glob("*.py"))), np.uint8)


def draw_batch(text: np.ndarray, step: int, batch: int, sharding: NamedSharding) -> jax.Array:
    """Return a step's sequences; each process fills the shards of its own devices."""
    starts = np.random.default_rng(step).integers(len(text) - LENGTH, size=batch)
    sequences = np.stack([text[i : i + LENGTH + 1] for i in starts]).astype(np.int32)
    return jax.make_array_from_callback(sequences.shape, sharding, lambda i: sequences[i])


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
        for i in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, name=f"attention_{i}")
            x += attention(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return embed.attend(nn.LayerNorm()(x))


def start_jax(options: argparse.Namespace) -> None:
    """Connect to the other processes, before JAX is asked for its devices."""
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.coordinator or options.cluster:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.give_up_after,
            shutdown_timeout_seconds=options.give_up_after,
        )


def make_mesh(model_parallel: int, batch: int) -> Mesh:
    """Return a mesh of all devices: along "data" batches differ, along "model" layers are cut."""
    devices = jax.device_count()
    if math.gcd(devices, HEADS) % model_parallel or batch % (devices // model_parallel):
        raise SystemExit(
            f"--model-parallel must divide {devices} devices and {HEADS} heads, and --batch must be"
            " a multiple of devices / model-parallel"
        )
    shape = devices // model_parallel, model_parallel
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def abstract_params(model: Transformer, mesh: Mesh, *, fully_sharded: bool) -> Tree:
    """Return the shapes and shardings of the bfloat16 parameters.

    "model" cuts heads, hidden units and vocabulary, which stay inside of a layer, so that devices
    communicate only what layers pass on. "data" cuts the width, if parameters are `fully_sharded`.
    """
    batch = jnp.zeros((1, LENGTH), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    inside = HEADS, 4 * model.width, 256

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes: list[str | None] = [None] * x.ndim
        if fully_sharded and model.width in x.shape and model.width % mesh.shape["data"] == 0:
            axes[x.shape.index(model.width)] = "data"
        cut = [i for i, size in enumerate(x.shape) if size in inside and axes[i] is None]
        if cut and x.shape[cut[0]] % mesh.shape["model"] == 0:
            axes[cut[0]] = "model"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)

    return jax.tree.map(place, shapes)


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    """Return the optimizer of float32 weights, for bfloat16 parameters.

    `master_weights` comes last, so everything inside sees float32: gradients are accumulated,
    clipped and averaged in float32. The schedule counts optimizer steps, not batches.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.rate, options.decay_steps // 10, options.decay_steps, options.rate / 10
    )
    method, decay = optax_ext.METHODS[options.optimizer].factory, OPTIMIZERS[options.optimizer]
    groups = optax.partition(
        {"matrix": method(schedule, weight_decay=decay), "vector": method(schedule)}, group_of
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), groups)
    if options.accumulate > 1:
        tx = optax.MultiSteps(tx, options.accumulate).gradient_transformation()
    return optax_ext.master_weights(tx, bits=options.bits)


def group_of(params: Tree) -> Tree:
    """Return each parameter's group: vectors are biases and the scales of normalizations."""
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def abstract_state(tx: FusedTransformation, params: Tree) -> Tree:
    """Return shapes and shardings of the optimizer's state."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        optax_ext.state_shardings(tx, params),
    )


def initialize(model: Transformer, tx: FusedTransformation, params: Tree, state: Tree) -> Tree:
    """Return new parameters and optimizer state; no device ever holds more than its shards."""

    def make() -> Tree:
        weights = model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
        weights = jax.lax.with_sharding_constraint(weights, shardings(params))
        return {"params": optax_ext.bfloat16_weights(weights), "state": tx.init(weights)}

    return jax.jit(make, out_shardings=shardings({"params": params, "state": state}))()


def shardings(tree: Tree) -> Tree:
    """Return the sharding of each leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)


def make_step(model: Transformer, tx: FusedTransformation, gathered: Tree) -> Any:
    """Return a training step that updates its arguments in place.

    The forward pass gathers what "data" cuts; without this constraint, XLA may gather activations.
    """

    def loss_of(params: Tree, batch: jax.Array) -> jax.Array:
        params = jax.lax.with_sharding_constraint(params, gathered)
        logits: Any = model.apply(params, batch[:, :-1])
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def step(arrays: Tree, batch: jax.Array) -> tuple[Tree, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(arrays["params"], batch)
        params, state = tx.step(arrays["params"], arrays["state"], gradients)
        return {"params": params, "state": state}, loss

    return jax.jit(step, donate_argnums=0)


def describe(mesh: Mesh, params: Tree, state: Tree) -> str:
    """Return each parameter's sharding, the mesh and the memory on each device."""

    def size(tree: Tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {x.shape} {x.sharding.spec}"
        for path, x in jax.tree.leaves_with_path(params)
    ]
    lines.append(f"{mesh.size} devices, {dict(mesh.shape)}, processes: {jax.process_count()}")
    lines.append(f"on each: {size(params):,} bytes of parameters, {size(state):,} of state")
    return "\n".join(lines)


def fingerprint(arrays: Tree) -> str:
    """Return a hash that is equal only for bit-exactly equal float32 weights."""
    mesh = jax.tree.leaves(arrays["params"])[0].sharding.mesh
    export = jax.jit(optax_ext.float32_weights, out_shardings=NamedSharding(mesh, PartitionSpec()))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(export(arrays["params"], arrays["state"])):
        digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return digest.hexdigest()[:16]


def restore(checkpoints: ocp.CheckpointManager, settings: dict[str, Any], abstract: Tree) -> Any:
    """Return the step and the arrays of the newest checkpoint, or 0 and `None`."""
    saved = checkpoints.metadata().custom_metadata
    if saved != settings:
        raise SystemExit(f"{checkpoints.directory} has checkpoints of {saved}, not of {settings}")
    step = checkpoints.latest_step()
    if step is None:
        return 0, None
    try:
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:
        message = f"step {step} can't be read; move it away to resume from an earlier one"
        raise SystemExit(f"{checkpoints.directory}: {message} ({error!s:.200})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Train, with a checkpoint every few steps, and print a fingerprint of the weights."""
    options = parse(argv)
    start_jax(options)
    mesh = make_mesh(options.model_parallel, options.batch)
    model, text = Transformer(options.width, options.layers), load_text()
    params = abstract_params(model, mesh, fully_sharded=options.layout == "fully-sharded")
    tx = fuse(make_optimizer(options), shardings=shardings(params))
    state = abstract_state(tx, params)
    gathered = shardings(abstract_params(model, mesh, fully_sharded=False))
    train_step, by_data = make_step(model, tx, gathered), NamedSharding(mesh, PartitionSpec("data"))

    console = Console(quiet=jax.process_index() > 0)
    console.print(describe(mesh, params, state), soft_wrap=True)

    folder = options.checkpoints or Path(tempfile.mkdtemp())
    settings = {name: getattr(options, name) for name in SETTINGS}
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        ocp.CheckpointManager(folder.absolute(), options=keep, metadata=settings) as checkpoints,
        Progress(console=console, disable=console.quiet) as bar,
    ):
        done, arrays = restore(checkpoints, settings, {"params": params, "state": state})
        arrays = arrays or initialize(model, tx, params, state)
        console.print(f"{done} steps done, checkpoints in {folder}")
        for step in bar.track(range(done + 1, options.steps + 1), options.steps, done):
            batch = draw_batch(text, step, options.batch, by_data)
            arrays, loss = train_step(arrays, batch)
            if step % options.every == 0 or step == options.steps:
                console.print(f"step {step}: loss {loss:.4f}")
                checkpoints.save(step, args=ocp.args.StandardSave(arrays))
    final = fingerprint(arrays)  # all processes take part
    console.print(f"weights {final}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fame")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument(
        "--decay-steps", type=int, default=50, help="optimizer steps until a tenth of the rate"
    )
    parser.add_argument("--accumulate", type=int, default=2, help="batches in an optimizer step")
    parser.add_argument("--bits", type=int, choices=(24, 32), default=24, help="of a weight")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEADS}")
    parser.add_argument("--layers", type=int, default=2)
    layouts = "fully-sharded", "replicated"
    parser.add_argument("--layout", choices=layouts, default=layouts[0], help='along "data"')
    parser.add_argument("--model-parallel", type=int, default=1, help='devices along "model"')
    parser.add_argument("--every", type=int, default=20, help="steps from report to report")
    parser.add_argument("--checkpoints", type=Path, help="folder (default: a temporary one)")
    parser.add_argument("--cpu-devices", type=int, default=8, help="virtual ones of each process")
    parser.add_argument("--cluster", action="store_true", help="let JAX find the other processes")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int, help="index of this process")
    parser.add_argument("--give-up-after", type=int, default=100, help="seconds of silence")
    options = parser.parse_args(argv)
    if (options.coordinator or options.cluster) and not options.checkpoints:
        parser.error("several processes need --checkpoints, a folder that all of them see")
    return options


if __name__ == "__main__":
    main()
