"""Text and columns that the reports of sharded steps add to those of one device."""

from collections.abc import Callable, Mapping, Sequence

from benchmarks.contenders import WAYS
from benchmarks.latest import Row

_HEADER = """
All devices of the topology {topology} share the leaves, and the state by
`optax_ext.state_shardings`; all figures are one device's. "Fully sharded" cuts every leaf along the
width of the residual stream only; the others are cut along both dimensions, by a mesh as square as
can be, which is fully sharded parameters and Megatron's tensors together.

- held: millions of bytes of parameters, state and temporary memory, with the padding of layouts,
  beside the ideal, parameters and state divided by the devices. The gradients, which a step is
  given, are held too, and count on neither side.
- told: what devices tell each other in a step: how many collectives, and in parentheses how many
  numbers their results have.
"""
_RESERVED = """\
- reserved: what is held as libtpu's allocator has it. There every array, a norm's one number and a
  tuple's table too, begins at a multiple of 16 KB, and few take another's place; compiled with
  `xla_jf_program_hbm_alignment_in_kib=1`, at one of 1 KB. Program: its code, held there too.
"""


def header(device: str, topology: str) -> str:
    """Return the text above the tables."""
    return _HEADER.format(topology=topology) + (_RESERVED if device == "tpu-aot" else "")


def cells(row: Row) -> dict[str, str]:
    """Return the per-device memory and communication by column: the chain → the fused steps."""
    chain, *fused = (row[way] for way in WAYS if way in row)

    def cell(of: Callable[[Row], str]) -> str:
        return " → ".join(filter(None, [of(chain), " / ".join(map(of, fused))]))

    found = {
        "ideal": f"{row['ideal'] / 1e6:.2f}",
        "held": cell(lambda x: _millions(row, x["held"])),
    }
    if "reserved" in chain:
        found["reserved"] = _millions(row, chain["reserved"])
        found["program"] = f"{chain['code'] / 1e6:.1f}"
    return found | {"told": cell(lambda x: told(x["kinds"]))}


def told(kinds: Mapping[str, Sequence[int]]) -> str:
    """Format the number of collectives of each kind, and of elements in their results."""
    return ", ".join(f"{n} {kind} ({total:,})" for kind, (n, total) in kinds.items()) or "nothing"


def percent_more(row: Row, memory: int) -> str:
    """Format the per-device memory without gradients, relative to the ideal."""
    return f"{(memory - row['gradients']) / row['ideal'] - 1:+.2%}"


def _millions(row: Row, memory: int) -> str:
    return f"{(memory - row['gradients']) / 1e6:.2f} ({percent_more(row, memory)})"
