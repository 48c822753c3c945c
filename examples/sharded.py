"""A language model on many devices: parameters, optimizer state and batches all sharded.

On all GPUs or on a TPU slice; without them, on eight virtual devices of the CPU:

    python examples/sharded.py
    python examples/sharded.py --optimizer novak --model-parallel 2

Interrupted, the same line goes on where it was:

    python examples/sharded.py --checkpoints run1/

In two processes, here on one machine (a cluster's scheduler knows them: `--cluster` will do):

    both="--coordinator localhost:9911 --processes 2 --checkpoints run2/"
    python examples/sharded.py $both --process 0 & python examples/sharded.py $both --process 1

The text is Python's own standard library. The optimizer is fused: on NVIDIA GPUs its step runs as
kernels on each device's shards, elsewhere as the chain.
"""

import argparse
import hashlib
import math
import sysconfig
import time
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
from rich.progress import Progress, TextColumn, TimeRemainingColumn

import optax_ext
from pallas_kernels import FusedTransformation, fuse

VIRTUAL_CPU_DEVICES = 8
LENGTH = 64  # of a sequence, in bytes

OPTIMIZERS = {
    "fame": optax_ext.fame,
    "vradam": optax_ext.vradam,
    "dualadam": optax_ext.dualadam,
    "novak": optax_ext.novak,
    "caadam": optax_ext.caadam,
    "adamw": optax.adamw,
}

Tree = Any


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    start_jax(options)
    mesh = make_mesh(options.model_parallel)
    model = Transformer(options.width, options.layers)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, place(x.shape, mesh)), shapes)
    tx = fuse(OPTIMIZERS[options.optimizer](options.rate), shardings=shardings)

    manager = open_checkpoints(options.checkpoints, options.save_every)
    first, params, state = begin(model, tx, shapes, shardings, manager)
    if jax.process_index() == 0:
        print(f"resumed after step {first}" if first else placement(params, state))
    train_step = make_step(model, tx)
    text, batches = read_text(), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    loss = math.nan
    with progress_bar() as progress:
        task = progress.add_task("training", total=options.steps, completed=first, note="")
        begun = time.perf_counter()
        for step in range(first, options.steps):
            batch = draw(text, step, options.batch, batches)
            params, state, loss = train_step(params, state, batch)
            if step % 10 == 9:
                done = (step + 1 - first) * options.batch * LENGTH
                speed = done / (time.perf_counter() - begun)
                note = f"loss {loss:.3f}, {speed:,.0f} bytes/s"
                progress.update(task, completed=step + 1, note=note)
            if manager is not None:
                items = ocp.args.StandardSave({"params": params, "state": state})
                manager.save(step + 1, args=items)
    if manager is not None:
        manager.close()
    final = fingerprint(params)  # by all processes together
    if jax.process_index() == 0:
        print(f"step {options.steps}: loss {loss:.4f}, parameters {final}")


def start_jax(options: argparse.Namespace) -> None:
    """This process's devices, and the other processes; before JAX is asked for anything."""
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    elif options.cluster:
        jax.distributed.initialize()


def make_mesh(model_parallel: int) -> Mesh:
    """All devices of all processes, in rows of those that share a layer."""
    devices = jax.device_count()
    if model_parallel < 1 or devices % model_parallel:
        raise SystemExit(f"--model-parallel must divide {devices} devices, got {model_parallel}")
    shape = devices // model_parallel, model_parallel
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def place(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The last axis by "model", the longest other one by "data", where they can be cut."""
    spec: list[str | None] = [None] * len(shape)
    if len(shape) > 1 and shape[-1] % mesh.shape["model"] == 0:
        spec[-1] = "model"
    rest = [i for i in range(len(shape)) if spec[i] is None and shape[i] % mesh.shape["data"] == 0]
    if rest:
        spec[max(rest, key=shape.__getitem__)] = "data"
    return PartitionSpec(*spec)


class Transformer(nn.Module):
    """A causal model of bytes, its output tied to the embedding."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(256, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, self.width))
        x = embed(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attend = nn.MultiHeadDotProductAttention(num_heads=4)
            x += attend(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def make_step(model: Transformer, tx: FusedTransformation) -> Any:
    """A training step in place; XLA sees to what the devices tell each other."""

    def loss_of(params: Tree, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply(params, batch[:, :-1])
        targets = batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        params, state = tx.step(params, state, gradients)
        return params, state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def begin(
    model: Transformer,
    tx: FusedTransformation,
    shapes: Tree,
    shardings: Tree,
    manager: ocp.CheckpointManager | None,
) -> tuple[int, Tree, Tree]:
    """Steps done, parameters and state: the latest checkpoint's, or new ones.

    Both are made where they will lie: no device ever holds a whole parameter that is sharded.
    """
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    places = optax_ext.state_shardings(tx, params)
    latest = None if manager is None else manager.latest_step()
    if manager is not None and latest is not None:
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            places,
        )
        target = ocp.args.StandardRestore({"params": params, "state": state})
        restored = manager.restore(latest, args=target)
        return latest, restored["params"], restored["state"]

    example = jnp.zeros((1, LENGTH), jnp.int32)
    new = jax.jit(lambda: model.init(jax.random.key(0), example), out_shardings=shardings)()
    return 0, new, jax.jit(tx.init, out_shardings=places)(new)


def open_checkpoints(folder: Path | None, period: int) -> ocp.CheckpointManager | None:
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(save_interval_steps=period, max_to_keep=2)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def read_text() -> np.ndarray:
    """Bytes of the modules at the top of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return np.frombuffer(b"".join(f.read_bytes() for f in sorted(folder.glob("*.py"))), np.uint8)


def draw(text: np.ndarray, step: int, batch: int, sharding: NamedSharding) -> jax.Array:
    """The batch of a step: the same for a run that was interrupted, on any number of processes."""
    starts = np.random.default_rng(step).integers(len(text) - LENGTH - 1, size=batch)
    whole = np.stack([text[i : i + LENGTH + 1] for i in starts]).astype(np.int32)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def placement(params: Tree, state: Tree) -> str:
    """Where each array lies."""
    lines = [f"{jax.device_count()} devices in {jax.process_count()} processes; a device holds of"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        where = f"{leaf.shape!s:<14} {leaf.sharding.spec!s:<26} {held([leaf]):>8,} bytes"
        lines.append(f"  {name:<60} {where}")
    return "\n".join([*lines, f"and of the state, which lies beside them, {held(state):,} bytes"])


def held(tree: Tree) -> int:
    """Bytes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def fingerprint(params: Tree) -> str:
    """Equal for parameters that are equal to the bit."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(gather(params)):
        digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return digest.hexdigest()[:16]


def progress_bar() -> Progress:
    """Of the first process only."""
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, disable=jax.process_index() > 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fame")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--steps", type=int, default=100, help="in all, resumed ones included")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="save, and go on from")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument(
        "--cpu-devices",
        type=int,
        default=VIRTUAL_CPU_DEVICES,
        metavar="N",
        help="virtual ones of each process, where there is no accelerator",
    )
    parser.add_argument("--cluster", action="store_true", help="find the other processes by itself")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, metavar="N")
    parser.add_argument("--process", type=int, metavar="I", help="this one's number, from 0")
    options = parser.parse_args(argv)
    if options.coordinator and None in (options.processes, options.process):
        parser.error("--coordinator needs --processes and --process")
    return options


if __name__ == "__main__":
    main()
