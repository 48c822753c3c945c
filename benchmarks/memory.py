"""Memory of optimizers, with and without the options that save it, from compiled steps.

The steps are compiled for one chip of a TPU v5e; no TPU is needed. The TPU compiler reports device
memory and host memory separately.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import optax_ext
from benchmarks import command_line, report, results
from benchmarks.aot import V5E, compiled_anew, lower
from benchmarks.hlo import live_bytes, read_entry
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import OPTIMIZERS, QUANTIZED, RATE, Optimizer
from benchmarks.results import Environment, Row
from benchmarks.shapes import Leaves, count, in_words, prepared, size, state_of
from pallas_kernels.compile import whole_step

LEAF_SET = "GPT-2 124M"
PACKAGES = ("jax", "libtpu", "optax")

MOMENTS = {"": {}, "mu_dtype=bfloat16": {"mu_dtype": jnp.bfloat16}}
NARROW, OFFLOADED = {"slow_dtype": jnp.bfloat16}, {"offload": "pinned_host"}
ROTATING = {"lookahead": "rotating"}
# The options of each optimizer, by the words in the table.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": MOMENTS,
    "fame": MOMENTS,
    "vradam": MOMENTS,
    "invadam": MOMENTS,
    "dualadam": MOMENTS,
    "caadam": MOMENTS | {"amsgrad=True": {"amsgrad": True}},
    "novak": MOMENTS
    | {
        "slow_dtype=bfloat16": NARROW,
        'offload="pinned_host"': OFFLOADED,
        'lookahead="rotating"': ROTATING,
        'lookahead="rotating", slow_dtype=bfloat16': ROTATING | NARROW,
        'lookahead="rotating", offload="pinned_host"': ROTATING | OFFLOADED,
        'lookahead="none"': {"lookahead": "none"},
        "trust_ratio=True": {"trust_ratio": True},
    },
}

# The keys of a row, each with its column in the table. On the device, arrays are padded.
COLUMNS = {
    "arrays": "its arrays",
    "on_device": "on the device",
    "on_host": "in host memory",
    "temporary": "temporary",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compile the steps, print their memory, and write it to a file."""
    options = make_parser().parse_args(argv)
    if V5E.missing():
        raise SystemExit("memory needs the extra `aot`, which is not installed")
    command_line.find_device("cpu")  # compilation needs no other device
    params = LEAF_SETS[LEAF_SET]
    environment = Environment.of(f"compiled for {V5E.name}", PACKAGES)
    rows = {
        case: measure(optimizer, params) | asdict(environment)
        for case, optimizer in track(cases().items(), LEAF_SET, transient=True)
    }
    print(f"{LEAF_SET}: {in_words(params)}, bytes per parameter\n\n{_table(rows)}")
    results.write(results.path(options.out, "memory", "tpu-aot"), rows)


def cases() -> dict[str, Optimizer]:
    """Return each optimizer with each of its options, and all optimizers with quantized state."""
    found = {
        f"{name}({words})": make(name, arguments)
        for name, several in OPTIONS.items()
        for words, arguments in several.items()
    }
    return found | {name: OPTIMIZERS[name] for name in QUANTIZED}


def make(name: str, arguments: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer of `optax_ext` or of Optax."""
    return Optimizer(getattr(optax if name == "adamw" else optax_ext, name)(RATE, **arguments))


def measure(optimizer: Optimizer, params: Leaves) -> Row:
    """Measure the bytes per parameter of a step's memory, without parameters and gradients."""
    tx, sharding = optimizer.tx, V5E.sharding()
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in prepared(optimizer.prepare, params).items()
    }
    state, chain = state_of(tx, params), whole_step(tx)

    def step(params: Any, state: Any, grads: Any) -> Any:
        return chain(params, state, grads, {})

    with compiled_anew():
        compiled = lower(step, params, state, V5E).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    not_aliased = memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = {
        "arrays": size(state),
        "on_device": memory.argument_size_in_bytes - 2 * size(params),
        "on_host": memory.host_argument_size_in_bytes,
        "temporary": live_bytes(read_entry(text)) + not_aliased,
    }
    return {key: value / count(params) for key, value in found.items()}


def summary(rows: Mapping[str, Row]) -> str:
    """Return the table of `docs/`: the options of each optimizer."""
    return _table({case: row for case, row in rows.items() if case not in QUANTIZED})


def quantized_summary(rows: Mapping[str, Row]) -> str:
    """Return the table of quantized states of `docs/`."""
    return _table({case: rows[case] for case in QUANTIZED})


def _table(rows: Mapping[str, Row]) -> str:
    lines = [
        {"state of": f"`{case.removesuffix('()')}`"}
        | {column: f"{row[key]:.2f}" for key, column in COLUMNS.items()}
        for case, row in rows.items()
    ]
    last = [*rows.values()][-1]
    versions = ", ".join(map(" ".join, last["versions"].items()))
    return f"{report.table(lines)}\n\nCompiled with {versions}, {last['date']}."


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return command_line.make_parser("memory", __doc__)
