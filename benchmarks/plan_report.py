"""Tables of compiled steps for the terminal, for Markdown files and for the pages in `docs/`."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from benchmarks import shared_report
from benchmarks.command_line import make_table
from benchmarks.contenders import CONTENDERS, QUANTIZED, REFERENCE, WAYS
from benchmarks.latest import Row
from benchmarks.layouts import SHARDED_SETS
from benchmarks.leaf_sets import COMPILED_SETS, in_words, leaves
from benchmarks.plan_figures import (
    BYTES,
    COLLECTIVES,
    HELD,
    KERNELS,
    TEMPORARY,
    TOLD,
    Change,
    Figure,
)
from benchmarks.shared_report import percent_more, told

HEADERS = {
    "h200-aot": """\
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
""",
    "tpu-aot": """\
# What a step is on a TPU

Compiled for one chip of a TPU v5e on a machine without one; nothing here was run, so nothing is
said about time on the TPU. Parameters and state are float32 and donated. There the fused step is
the chain: XLA compiles it.

- kernels: what takes its turn on the vector unit, fusions for the most part. Arithmetic of the
  scalar unit is not counted, nor are arrays on their way between the chip's memory and the large
  one.
- bytes: read from the large memory and written to it, per parameter, without the padding of
  layouts; read off the program, for the compiler's own estimate counts what stays on the chip too.
  "Floor" is every array that the step depends on read once and every one that changes written once;
  small networks stay on the chip between a norm and its use, large ones are read again.
- temporary: what lives in the large memory at any time beside arguments and results, relative to
  the parameters; read off the program, for the compiler reserves more where it then needs none.
- compile: seconds of CPU time in user mode, for tracing, lowering and compiling; the smaller of two
  runs.
""",
}


def title(leaf_set: str) -> str:
    """Return the title of a set of leaves: its name and size."""
    if leaf_set in SHARDED_SETS:
        shapes = (shape for shape, _ in SHARDED_SETS[leaf_set].leaves)
        return f"{leaf_set}: {in_words(leaves(shapes))}"
    return f"{leaf_set}: {in_words(COMPILED_SETS[leaf_set])}"


def in_order(rows: Mapping[str, Row], leaf_set: str) -> list[Row]:
    """Return the known rows of one set of leaves, in the order of the optimizers."""
    return [rows[key] for name in CONTENDERS if (key := f"{leaf_set} / {name}") in rows]


def markdown(device: str, rows: Mapping[str, Row], topology: str | None = None) -> str:
    """Return the report in Markdown, with a table for each set of leaves.

    Args:
      device: the device's name on the command line.
      rows: the rows by case.
      topology: the topology of several devices; `None` for one device.
    """
    header = HEADERS[device]
    if topology:  # sharded steps are not timed
        header = header[: header.index("- compile:")] + shared_report.header(device, topology)
    parts = [header]
    for leaf_set in (*COMPILED_SETS, *SHARDED_SETS):
        known = in_order(rows, leaf_set)
        if known:
            parts.append(f"## {title(leaf_set)}\n\n{_table(list(map(_cells, known)))}\n")
    return "\n".join(parts)


def summary(rows: Mapping[str, Row]) -> str:
    """Return the table of ResNet-50 in `docs/`: the chain → the fused step by Triton."""
    lines = []
    for row in in_order(rows, "ResNet-50"):
        chain, fused = row["chain"], row["triton"]
        lines.append(
            {
                "optimizer": row["optimizer"],
                "kernels": f"{chain['kernels']} → {fused['kernels']}",
                "bytes/parameter": f"{chain['bytes']:.1f} → {fused['bytes']:.1f}",
                "skipped between syncs": f"{row['skipped']:.0f}",
                "compile": f"{min(fused['compile']) / min(chain['compile']):.1f} ×",
            }
        )
    return _table(lines)


def quantized_summary(rows: Mapping[str, Row]) -> str:
    """Return the table of quantized states: the chain → the fused step by Triton."""
    lines = []
    for name in (REFERENCE, *QUANTIZED):
        line = {"optimizer": name}
        for leaf_set in ("ResNet-50", "one of 4096 × 4096"):
            row = rows[f"{leaf_set} / {name}"]
            for figure, digits in (("kernels", "d"), ("bytes", ".1f"), ("temporary", ".0%")):
                before, after = (format(row[way][figure], digits) for way in ("chain", "triton"))
                line[f"{leaf_set}: {figure}"] = f"{before} → {after}"
        lines.append(line)
    return _table(lines)


def pod_summary(rows: Mapping[str, Row]) -> str:
    """Return the table of a pod in `docs/`: memory and communication per chip in two layouts."""
    layouts = {"16 × 16": "LLaMA-7B", "256": "LLaMA-7B, fully sharded"}
    lines = []
    for name in CONTENDERS:
        found = {x: rows.get(f"{leaf_set} / {name}") for x, leaf_set in layouts.items()}
        ideal = next((f"{row['ideal'] / 1e6:.1f} MB" for row in found.values() if row), None)
        if ideal is None:
            continue
        cells = {"optimizer": name, "ideal": ideal}
        for layout, row in found.items():
            cells[f"{layout}: memory"] = percent_more(row, row["chain"]["held"]) if row else "–"
            cells[f"{layout}: communication"] = told(row["chain"]["kinds"]) if row else "–"
        lines.append(cells)
    return _table(lines)


def _table(lines: Sequence[Mapping[str, str]]) -> str:
    """Format a table in Markdown from lines, each a mapping from columns to cells."""
    rows = [list(lines[0]), *(line.values() for line in lines)]
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|" + "---|" * len(lines[0]), *body])


def _cells(row: Row) -> dict[str, str]:
    """Return the cells of one optimizer by column: the chain → the fused steps, if any."""
    chain, *fused = (row[way] for way in WAYS if way in row)

    def cell(before: str, after: str) -> str:
        parts = [before.format(**chain), " / ".join(after.format(**x) for x in fused)]
        return " → ".join(filter(None, parts))

    return {
        "optimizer": row["optimizer"],
        "kernels": cell("{kernels}", "{kernels} ({pallas})"),
        "bytes": cell("{bytes:.1f}", "{bytes:.1f}"),
        **({"skipped": f"{row['skipped']:.1f}"} if fused else {}),
        "floor": f"{row['floor']:.1f}",
        "temporary": cell("{temporary:.2%}", "{temporary:.2%}"),
        **(shared_report.cells(row) if "ideal" in row else _times(chain, fused)),
        "measured": f"{row['date']}, {row['versions']}",
    }


def _times(chain: Row, fused: Sequence[Row]) -> dict[str, str]:
    slow = min(chain["compile"])
    times = (f"{min(x['compile']):.1f} ({min(x['compile']) / slow:.1f} ×)" for x in fused)
    return {"compile": " → ".join(filter(None, [f"{slow:.1f}", " / ".join(times)]))}


def terminal(leaf_set: str, measured: Iterable[tuple[Row, Sequence[Change]]]) -> Table:
    """Return a table of one set of leaves, a line for each way, with colours for changes.

    Args:
      leaf_set: the name of the set.
      measured: the rows, each with its changes from the recorded row.
    """
    shared = leaf_set in SHARDED_SETS
    columns = ("memory", "communication") if shared else ("floor", "temporary", "compile")
    drawn = make_table(title(leaf_set), ["optimizer", "way"], ("kernels", "bytes", *columns))
    for row, changed in measured:
        for way in (way for way in WAYS if way in row):
            colors = {x.figure: "red" if x.worse else "green" for x in changed if x.way == way}
            found = row[way]
            drawn.add_row(
                row["optimizer"],
                way,
                Text(f"{found['kernels']}", colors.get(KERNELS, "")),
                Text(f"{found['bytes']:.2f}", colors.get(BYTES, "")),
                *(_shared_rest(row, found, colors) if shared else _rest(row, found, colors)),
            )
    return drawn


def _rest(row: Row, found: Row, colors: Mapping[Figure, str]) -> list[str | Text]:
    return [
        f"{row['floor']:.2f}",
        Text(f"{found['temporary']:.2%}", colors.get(TEMPORARY, "")),
        f"{min(found['compile']):.1f} s",
    ]


def _shared_rest(row: Row, found: Row, colors: Mapping[Figure, str]) -> list[str | Text]:
    return [
        Text(percent_more(row, found["held"]), colors.get(HELD, colors.get(TEMPORARY, ""))),
        Text(told(found["kinds"]), colors.get(COLLECTIVES, colors.get(TOLD, ""))),
    ]
