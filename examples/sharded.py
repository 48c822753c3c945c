"""A language model on many devices: parameters, optimizer state and batches all sharded.

On all GPUs or on a TPU slice; without them, on eight virtual devices of the CPU:

    python examples/sharded.py
    python examples/sharded.py --optimizer novak --layout replicated
    python examples/sharded.py --model-parallel 2

Interrupted, the same line goes on from the last checkpoint, be it on other devices:

    python examples/sharded.py --checkpoints run1

In two processes on one machine, and, with the same line on each of its machines, on a cluster:

    both="--coordinator localhost:9911 --processes 2 --checkpoints run2"
    python examples/sharded.py $both --process 0 & python examples/sharded.py $both --process 1
    srun python examples/sharded.py --cluster --checkpoints /shared/run3

If one process dies, the others end with an error within `--give-up-after` seconds: start all again.

The text is Python's own standard library. The optimizer is fused: on NVIDIA GPUs its step runs as
kernels on each device's shards, elsewhere as the chain.
"""

import argparse
import hashlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import optax_ext
from _command_line import above_zero, natural, positive
from _language import HEADS, LENGTH, Transformer, draw, read_text
from _resume import Checkpoints, open_checkpoints
from pallas_kernels import FusedTransformation, fuse

VIRTUAL_CPU_DEVICES = 8

OPTIMIZERS = {
    "fame": optax_ext.fame,
    "vradam": optax_ext.vradam,
    "dualadam": optax_ext.dualadam,
    "novak": optax_ext.novak,
    "caadam": optax_ext.caadam,
    "adamw": optax.adamw,
}

# What a run may go on with: on other devices it is the same up to rounding.
MAY_CHANGE = {
    "steps",
    "layout",
    "model_parallel",
    "cpu_devices",
    "cluster",
    "coordinator",
    "processes",
    "process",
    "give_up_after",
}

Tree = Any


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    start_jax(options)
    mesh = make_mesh(options.model_parallel, options.batch)
    model = Transformer(options.width, options.layers)
    params = lay_out(model, mesh, by_data=options.layout == "fully-sharded")
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = fuse(OPTIMIZERS[options.optimizer](options.rate), shardings=shardings)

    checkpoints = None
    if options.checkpoints:
        checkpoints = open_checkpoints("sharded", options, may_change=MAY_CHANGE)
    first, params, state = begin(model, tx, params, checkpoints)
    console = Console(quiet=jax.process_index() > 0)
    console.print(placement(params, state, mesh))
    if first:
        console.print(f"resumed after step {first}")

    train_step = make_step(model, tx, in_use=lay_out(model, mesh, by_data=False))
    text, batches = read_text(), NamedSharding(mesh, PartitionSpec("data"))
    loss = None
    with progress_bar(console, first, options.steps, options.batch * LENGTH) as advance:
        for step in range(first, options.steps):
            batch = spread(draw(text, step, options.batch), batches)
            params, state, loss = train_step(params, state, batch)
            advance(step + 1, loss)
            if checkpoints is not None:
                arrays = {"params": params, "state": state}
                checkpoints.save(step + 1, arrays, force=step + 1 == options.steps)
    if checkpoints is not None:
        checkpoints.close()
    final = fingerprint(params)  # by all processes together
    last = "" if loss is None else f"loss {loss:.4f}, "  # nothing was left to do
    console.print(f"step {max(first, options.steps)}: {last}parameters {final}")


def start_jax(options: argparse.Namespace) -> None:
    """This process's devices, and the other processes; before JAX is asked for anything."""
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
    """All devices of all processes, in rows of those that share a layer and a part of the batch."""
    devices = jax.device_count()
    if math.gcd(devices, HEADS) % model_parallel:
        raise SystemExit(
            f"--model-parallel must divide {devices} devices and {HEADS} heads,"
            f" got {model_parallel}"
        )
    parts = devices // model_parallel
    if batch % parts:
        raise SystemExit(
            f"--batch must be a multiple of {parts}, the devices that have different data,"
            f" got {batch}"
        )
    return jax.make_mesh(
        (parts, model_parallel), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def lay_out(model: Transformer, mesh: Mesh, *, by_data: bool) -> Tree:
    """The parameters' shapes, and how each is cut.

    "model" cuts what is inside of layers, so that their devices need to add up only what they hand
    on to each other; `by_data`, "data" cuts the parameters along that.
    """
    batch = jnp.zeros((1, LENGTH), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec: list[str | None] = [None] * len(x.shape)
        if by_data and model.width % mesh.shape["data"] == 0 and model.width in x.shape:
            spec[x.shape.index(model.width)] = "data"
        inside = [i for i, size in enumerate(x.shape) if size in model.inside and spec[i] is None]
        if inside and x.shape[inside[0]] % mesh.shape["model"] == 0:
            spec[inside[0]] = "model"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def begin(
    model: Transformer,
    tx: FusedTransformation,
    params: Tree,
    checkpoints: Checkpoints | None,
) -> tuple[int, Tree, Tree]:
    """Steps done, parameters and state: the newest checkpoint's that can be read, or new ones.

    Both are made where they will lie: no device ever holds a whole parameter that is sharded.
    """
    places = optax_ext.state_shardings(tx, params)
    if checkpoints is not None:
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            places,
        )
        if restored := checkpoints.restore({"params": params, "state": state}):
            return checkpoints.done, restored["params"], restored["state"]

    batch = jnp.zeros((1, LENGTH), jnp.int32)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    new = jax.jit(lambda: model.init(jax.random.key(0), batch), out_shardings=shardings)()
    return 0, new, jax.jit(tx.init, out_shardings=places)(new)


def spread(batch: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of all processes, of which each puts in its devices' share."""
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])


def make_step(model: Transformer, tx: FusedTransformation, in_use: Tree) -> Any:
    """A training step in place; XLA sees to what the devices tell each other.

    What "data" cuts is whole while it is `in_use`; left alone, XLA may gather activations instead.
    """
    whole = jax.tree.map(lambda x: x.sharding, in_use)

    def loss_of(params: Tree, batch: jax.Array) -> jax.Array:
        params = jax.lax.with_sharding_constraint(params, whole)
        logits: Any = model.apply(params, batch[:, :-1])
        targets = batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        params, state = tx.step(params, state, gradients)
        return params, state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def placement(params: Tree, state: Tree, mesh: Mesh) -> Table:
    """Where each array lies."""
    arrays = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    beside, rest = defaultdict(list), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = next((x for x in arrays if name(path).endswith(x)), None)
        alike = owner is not None and leaf.sharding == arrays[owner].sharding
        (beside[owner] if alike else rest).append(leaf)

    processes = jax.process_count()
    table = Table(
        title=f"{mesh.size} devices ({mesh.shape['data']} data × {mesh.shape['model']} model) in"
        f" {processes} process{'es' if processes > 1 else ''}; a device holds of",
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        show_footer=True,
    )
    table.add_column("array", "all", no_wrap=True)
    table.add_column("shape, cut along", no_wrap=True)
    table.add_column("bytes", f"{held(params):,}", justify="right")
    table.add_column("of state", f"{held(state):,}", justify="right")
    for key, x in arrays.items():
        row = key.removeprefix("params/"), describe(x), f"{held(x):,}", f"{held(beside[key]):,}"
        table.add_row(*row)
    table.add_row("rest of state", f"{len(rest)} arrays", "", f"{held(rest):,}")
    return table


def describe(x: Any) -> str:
    """Its shape, and the axes of the mesh that it is cut along."""
    sizes = x.sharding.mesh.shape
    return " × ".join(
        f"{size}/{axis}" if sizes.get(axis, 1) > 1 else f"{size}"
        for size, axis in itertools.zip_longest(x.shape, x.sharding.spec)
    )


def name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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


@contextmanager
def progress_bar(
    console: Console, first: int, steps: int, size: int
) -> Iterator[Callable[[int, jax.Array], None]]:
    """A bar; what it yields takes the steps done and the loss. Compiling counts as no time."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet or first >= steps) as progress:
        task = progress.add_task("", total=steps, completed=first, note="compiling")
        begun = time.perf_counter()

        def advance(done: int, loss: jax.Array) -> None:
            nonlocal begun
            if done == first + 1:
                jax.block_until_ready(loss)
                begun = time.perf_counter()
                progress.update(task, completed=done, note=f"loss {loss:.3f}")
            elif done % 10 == 0 or done == steps:
                note = f"loss {loss:.3f}"  # waits for the step
                speed = (done - first - 1) * size / (time.perf_counter() - begun)
                progress.update(task, completed=done, note=f"{note}, {speed:,.0f} bytes/s")

        yield advance


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fame")
    parser.add_argument(
        "--rate", type=above_zero, default=1e-3, help="learning rate (default: 1e-3)"
    )
    parser.add_argument("--steps", type=positive, default=100, help="in all, resumed ones included")
    parser.add_argument("--batch", type=positive, default=32, help="sequences in a step")
    parser.add_argument("--width", type=positive, default=128)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument(
        "--layout",
        choices=("fully-sharded", "replicated"),
        default="fully-sharded",
        help="of parameters and state, on devices that have different data",
    )
    parser.add_argument(
        "--model-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="devices that share the heads, the hidden units and the same data",
    )
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="save, and go on from")
    parser.add_argument("--save-every", type=positive, default=20, metavar="STEPS")
    parser.add_argument(
        "--cpu-devices",
        type=positive,
        default=VIRTUAL_CPU_DEVICES,
        metavar="N",
        help="virtual ones of each process, where there is no accelerator",
    )
    parser.add_argument("--cluster", action="store_true", help="find the other processes by itself")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=positive, metavar="N")
    parser.add_argument("--process", type=natural, metavar="I", help="this one's number, from 0")
    parser.add_argument(
        "--give-up-after",
        type=positive,
        default=100,
        metavar="SECONDS",
        help="how long a process that died may be silent before the others end (default: 100)",
    )
    options = parser.parse_args(argv)
    number, of = options.process, options.processes
    if options.coordinator and None in (number, of):
        parser.error("--coordinator needs --processes and --process")
    if not options.coordinator and not options.cluster and (number, of) != (None, None):
        parser.error("--processes and --process need --coordinator")
    if number is not None and of is not None and number >= of:
        parser.error(f"--process must be below {of}, got {number}")
    if options.width % HEADS:
        parser.error(f"--width must be a multiple of {HEADS}, got {options.width}")
    return options


if __name__ == "__main__":
    main()
