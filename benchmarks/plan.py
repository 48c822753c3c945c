"""Compiles optimizers' steps for an H200, chain and fused, and tabulates the programs.

`python -m benchmarks plan` writes `results/plan-h200.json` and, from it, `results/plan-h200.md`. A
run replaces the rows that it measures and keeps the others, each with its own date and versions.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks import RESULTS, history
from benchmarks.aot import compile_step
from benchmarks.contenders import CONTENDERS
from benchmarks.leaf_sets import LEAF_SETS, count, leaves
from pallas_kernels import explain, fuse

# The report of a step can't be told of parameters and gradients that differ in structure.
OPTIMIZERS = {name: x.tx for name, x in CONTENDERS.items() if x.floor_of is None}

BACKENDS = {"chain": "xla", "triton": "triton", "mosaic": "mosaic"}
ROUNDS = 2

HEADER = """\
# What a step is on an H200

Compiled for an NVIDIA H200 on a machine without a GPU; nothing here was run, so nothing is said
about time on the GPU. Parameters and state are float32 and donated.

Three ways in each cell: the chain by XLA → the fused step by Triton's kernels / by Mosaic's.

- kernels: all launches of a step; in parentheses those made by Pallas, the others are XLA's, for
  scalars.
- bytes: read and written per parameter, operands and results of all kernels counted once. "Skipped"
  is the part of it that the fused step neither reads nor writes where nothing changes: the slow
  weights, in all steps but every fifth. "Floor" is every array that the step depends on read once
  and every one that changes written once; a norm that must be known first takes more.
- temporary: memory beside arguments and results, relative to the parameters.
- compile: seconds of CPU time in user mode, ptxas included, for tracing, lowering and compiling;
  the smaller of two runs, the three ways by turns in one process.
"""


def measure(name: str, params: Any) -> dict[str, Any]:
    """One optimizer's step on one set of leaves, in all three ways."""
    tx = OPTIMIZERS[name]
    state = jax.eval_shape(tx.init, params)
    parameters = count(params)
    report = explain(tx, params)
    row: dict[str, Any] = {
        "floor": report.floor_per_parameter,
        "skipped": sum(phase.predicated for phase in report.phases) / parameters,
    }
    seconds: dict[str, list[float]] = {way: [] for way in BACKENDS}
    for _ in range(ROUNDS):
        for way, backend in BACKENDS.items():
            program = compile_step(fuse(tx, backend=backend).step, params, state)
            seconds[way].append(round(program.cpu_seconds, 2))
            row[way] = {
                "kernels": len(program.kernels),
                "pallas": len(program.of_kind("pallas")),
                "bytes": program.bytes / parameters,
                "temporary": program.temporary / (4 * parameters),
                "compile": seconds[way],
            }
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows of one set of leaves, in Markdown."""
    lines = [
        "| optimizer | kernels | bytes | skipped | floor | temporary | compile | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """One optimizer's row of the table."""
    chain, *fused = (row[way] for way in BACKENDS)
    slow = min(chain["compile"])

    def cell(before: str, after: str) -> str:
        return f"{before.format(**chain)} → {' / '.join(after.format(**x) for x in fused)}"

    times = (f"{min(x['compile']):.1f} ({min(x['compile']) / slow:.1f} ×)" for x in fused)
    return (
        f"| {row['optimizer']}"
        f" | {cell('{kernels}', '{kernels} ({pallas})')}"
        f" | {cell('{bytes:.1f}', '{bytes:.1f}')}"
        f" | {row['skipped']:.1f} | {row['floor']:.1f}"
        f" | {cell('{temporary:.2%}', '{temporary:.2%}')}"
        f" | {slow:.1f} → {' / '.join(times)}"
        f" | {row['date']}, {row['versions']} |"
    )


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the README: ResNet-50, the chain → Triton's kernels."""
    lines = [
        "| optimizer | kernels | bytes/parameter | skipped between syncs | compile |",
        "|---|---|---|---|---|",
    ]
    for row in in_order(rows, "ResNet-50"):
        chain, fused = row["chain"], row["triton"]
        lines.append(
            f"| {row['optimizer']} | {chain['kernels']} → {fused['kernels']}"
            f" | {chain['bytes']:.1f} → {fused['bytes']:.1f} | {row['skipped']:.0f}"
            f" | {min(fused['compile']) / min(chain['compile']):.1f} × |"
        )
    return "\n".join(lines)


def in_order(rows: Mapping[str, dict[str, Any]], leaf_set: str) -> list[dict[str, Any]]:
    """The rows of one set of leaves, as far as there are any."""
    return [rows[key] for name in OPTIMIZERS if (key := f"{leaf_set} / {name}") in rows]


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Both files, from all rows that there are."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan-h200.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    parts = [HEADER]
    for leaf_set, params in LEAF_SETS.items():
        known = in_order(rows, leaf_set)
        if known:
            millions = f"{count(params) / 1e6:.1f} million parameters"
            title = f"## {leaf_set}: {len(params)} leaves, {millions}"
            parts.append(f"{title}\n\n{table(known)}\n")
    (RESULTS / "plan-h200.md").write_text("\n".join(parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the command line selects; everything by default."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=LEAF_SETS, default=list(LEAF_SETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    options = parser.parse_args(argv)

    file = RESULTS / "plan-h200.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    circumstances = history.circumstances("compiled for an H200", ("jax", "optax"))
    versions = ", ".join(map(" ".join, circumstances.versions.items()))
    stamp = {"date": circumstances.date, "versions": versions}
    warm_up = leaves([(64, 64)])
    for backend in BACKENDS.values():  # the compiler's own start is nobody's cost
        step = fuse(OPTIMIZERS["lamb"], backend=backend).step
        compile_step(step, warm_up, jax.eval_shape(OPTIMIZERS["lamb"].init, warm_up))
    for leaf_set in options.sets:
        for name in options.optimizers:
            row = measure(name, LEAF_SETS[leaf_set])
            rows[f"{leaf_set} / {name}"] = {"optimizer": name, **row, **stamp}
            write(rows)
            print(leaf_set, line(rows[f"{leaf_set} / {name}"]), flush=True)


if __name__ == "__main__":
    main()
