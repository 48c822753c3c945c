"""Tables of compiled steps, for the terminal, for Markdown files and for the pages in `docs/`."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks import report
from benchmarks.leaf_sets import COMPILED_SETS, SHARDED_SETS
from benchmarks.optimizers import BACKENDS, OPTIMIZERS, QUANTIZED, REFERENCE, TRITON, XLA
from benchmarks.results import Row
from benchmarks.shapes import in_words, leaves

TITLES = {"h200-aot": "one or more NVIDIA H200", "tpu-aot": "one or more chips of a TPU v5e"}

NOTES = """\
- Cells with an arrow: the chain, compiled by XLA → the fused step with Triton kernels / with Mosaic
  kernels. On a TPU, the fused step is the chain.
- kernels: all launches of a step; in parentheses those of Pallas kernels. XLA's other kernels
  compute scalars. On a TPU, scalar arithmetic and transfers between memories do not count.
- bytes: the bytes per parameter that all kernels read and write, if each operand and result counts
  once. On a TPU, only HBM counts, without padding.
- skipped: the part of these bytes that the fused step neither reads nor writes in most steps: the
  slow weights, which change in every fifth step.
- floor: the bytes per parameter of all arrays that a step reads and writes. A norm that the step
  needs first takes more.
- temporary: the memory in addition to arguments and results, relative to the parameters.
- compile: the CPU time in seconds to trace, lower and compile, ptxas included; the shorter of two
  runs.
"""
SHARDED_NOTES = """\
- All figures are per device. Parameters are sharded over a mesh, the state by
  `optax_ext.state_shardings`. "Fully sharded": the mesh has one axis, along the width of the
  residual stream. Otherwise it is as square as possible, and both dimensions are sharded.
- ideal: millions of bytes of parameters and state, divided by the number of devices.
- memory: the same with temporary memory and padding, without gradients. reserved: what libtpu's
  allocator reserves for it. program: the size of the code.
- communication: the collectives of a step, with the number of elements in their results.
"""


def title(leaf_set: str) -> str:
    """Return the title of a set of leaves: its name and size."""
    if leaf_set in SHARDED_SETS:
        shapes = (shape for shape, _ in SHARDED_SETS[leaf_set].leaves)
        return f"{leaf_set}: {in_words(leaves(shapes))}"
    return f"{leaf_set}: {in_words(COMPILED_SETS[leaf_set])}"


def in_order(rows: Mapping[str, Row], leaf_set: str) -> list[Row]:
    """Return the known rows of one set of leaves, in the order of the optimizers."""
    return [rows[key] for name in OPTIMIZERS if (key := f"{leaf_set} / {name}") in rows]


def table(rows: Iterable[Row]) -> str:
    """Return the table of one set of leaves."""
    return report.table(list(map(_cells, rows)))


def markdown(device: str, rows: Mapping[str, Row], topology: str | None = None) -> str:
    """Return the whole report, with a table for each set of leaves.

    Args:
      device: the device's name on the command line.
      rows: the rows by case.
      topology: the topology of several devices; `None` for one device.
    """
    where = f", topology {topology}" if topology else ""
    parts = [
        f"# Compiled steps: {TITLES[device]}{where}",
        "Compiled on a machine without the device. Nothing was run, so there are no times of steps."
        " Parameters and state are float32 and donated.",
        NOTES + (SHARDED_NOTES if topology else ""),
    ]
    for leaf_set in (*COMPILED_SETS, *SHARDED_SETS):
        known = in_order(rows, leaf_set)
        if known:
            parts.append(f"## {title(leaf_set)}\n\n{table(known)}\n")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(rows: Mapping[str, Row]) -> str:
    """Return the table of ResNet-50 in `docs/`: the chain → the fused step by Triton."""
    return report.table(
        [
            {
                "optimizer": row["optimizer"],
                "kernels": f"{row[XLA]['kernels']} → {row[TRITON]['kernels']}",
                "bytes/parameter": f"{row[XLA]['bytes']:.1f} → {row[TRITON]['bytes']:.1f}",
                "skipped between syncs": f"{row['skipped']:.0f}",
                "compile": f"{min(row[TRITON]['compile']) / min(row[XLA]['compile']):.1f} ×",
            }
            for row in in_order(rows, "ResNet-50")
        ]
    )


def quantized_summary(rows: Mapping[str, Row]) -> str:
    """Return the table of quantized states: the chain → the fused step by Triton."""
    lines = []
    for name in (REFERENCE, *QUANTIZED):
        line = {"optimizer": name}
        for leaf_set in ("ResNet-50", "one of 4096 × 4096"):
            row = rows[f"{leaf_set} / {name}"]
            for figure, digits in (("kernels", "d"), ("bytes", ".1f"), ("temporary", ".0%")):
                before, after = (format(row[x][figure], digits) for x in (XLA, TRITON))
                line[f"{leaf_set}: {figure}"] = f"{before} → {after}"
        lines.append(line)
    return report.table(lines)


def pod_summary(rows: Mapping[str, Row]) -> str:
    """Return the table of a pod in `docs/`: memory and communication per chip on two meshes."""
    meshes = {"16 × 16": "LLaMA-7B", "256": "LLaMA-7B, fully sharded"}
    lines = []
    for name in OPTIMIZERS:
        found = {mesh: rows.get(f"{leaf_set} / {name}") for mesh, leaf_set in meshes.items()}
        ideal = next((f"{row['ideal'] / 1e6:.1f} MB" for row in found.values() if row), None)
        if ideal is None:
            continue
        line = {"optimizer": name, "ideal": ideal}
        for mesh, row in found.items():
            line[f"{mesh}: memory"] = _percent_more(row, row[XLA]["memory"]) if row else "–"
            line[f"{mesh}: communication"] = _collectives(row[XLA]["kinds"]) if row else "–"
        lines.append(line)
    return report.table(lines)


def _cells(row: Row) -> dict[str, str]:
    """Return the cells of one optimizer by column: the chain → the fused steps, if any."""

    def cell(text: Callable[[Row], str]) -> str:
        cells = {backend: text(row[backend]) for backend in BACKENDS if backend in row}
        chain = cells.pop(XLA, None)
        return " → ".join(filter(None, [chain, " / ".join(cells.values())]))

    found = {
        "optimizer": row["optimizer"],
        "kernels": cell(lambda x: f"{x['kernels']} ({x['pallas']})".removesuffix(" (0)")),
        "bytes": cell(lambda x: f"{x['bytes']:.1f}"),
        "skipped": f"{row.get('skipped', 0):.1f}",
        "floor": f"{row['floor']:.1f}",
        "temporary": cell(lambda x: f"{x['temporary']:.2%}"),
    }
    if "ideal" in row:
        found["ideal"] = f"{row['ideal'] / 1e6:.2f}"
        found["memory"] = cell(lambda x: _millions(row, x["memory"]))
        if "reserved" in row.get(XLA, {}):
            found["reserved"] = _millions(row, row[XLA]["reserved"])
            found["program"] = f"{row[XLA]['code'] / 1e6:.1f}"
        found["communication"] = cell(lambda x: _collectives(x["kinds"]))
    else:
        found["compile"] = cell(lambda x: f"{min(x['compile']):.1f}")
    return found | ({"measured": f"{row['date']}, {row['versions']}"} if "date" in row else {})


def _collectives(kinds: Mapping[str, Sequence[int]]) -> str:
    """Format the number of collectives of each kind, and of elements in their results."""
    return ", ".join(f"{n} {kind} ({total:,})" for kind, (n, total) in kinds.items()) or "none"


def _percent_more(row: Row, memory: int) -> str:
    """Format the per-device memory without gradients, relative to the ideal."""
    return f"{(memory - row['gradients']) / row['ideal'] - 1:+.2%}"


def _millions(row: Row, memory: int) -> str:
    return f"{(memory - row['gradients']) / 1e6:.2f} ({_percent_more(row, memory)})"
