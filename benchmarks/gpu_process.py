"""One process of `python -m benchmarks gpu`: measures some cases, and appends a row for each."""

import contextlib
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command_line, timing
from benchmarks.leaf_sets import LEAF_SETS, RAGGED
from benchmarks.optimizers import (
    OPTIMIZERS,
    RATE,
    REFERENCE,
    SYNC_PERIOD,
    XLA,
    least_bytes,
    skipped_bytes,
    trained,
)
from benchmarks.results import Row, cores, describe
from benchmarks.shapes import Leaves, count, leaves
from optax_ext.low_precision.formats import is_encoded
from optax_ext.low_precision.weights import MasterWeightsState, float32_weights
from pallas_kernels import explain, fuse

Measure = Callable[[], Row]
Submit = Callable[[Callable[[], Any]], Future[Any]]

# The kinds of numerics, in place of a set of leaves.
NUMERICS, NARROW = "numerics", "numerics, bfloat16 parameters"
TORCH, INTERPRETED = "torch", "interpret"
# The exit code of a process that ends after an error, because the device may not work any more.
BROKEN = 3

# The programs of these cases compile together on all cores while nothing is timed. With more cases,
# the first rows would come later.
CASES_AT_ONCE = 4
# This forbids CUDA graphs. Otherwise XLA uses them for five launches or more.
NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
# A call of a program takes CPU time for each leaf, during which the GPU must not wait.
SECONDS_PER_CALL, LEAVES_PER_CALL, TURNS = 0.005, 160, 5
# Parameters are about as large as updates. In larger ones, an error would be lost in rounding.
SIZE, STEPS, REPEATS = 0.01, 6, 20

# Limits of differences, relative to the largest value of an array: from the chain, and from float64
# in excess of twice the chain's own error.
FROM_CHAIN, FROM_FLOAT64 = 1e-5, 1e-6
# In fewer bits than float32, a rounding error may change a value to the next one. These limit that
# difference, and the share of such values.
NEXT_VALUE, CHANGED = 0.02, 0.01
# The limit of the parameters' difference from the chain's after a call, relative to their movement.
DRIFT = 0.01


class Case(NamedTuple):
    """A row of the results.

    Attributes:
      leaf_set: the set of leaves, or the kind of numerics.
      optimizer: the name of the optimizer.
      backend: the backend of the fused step, or `TORCH`.
      graphs: whether XLA may launch kernels by CUDA graphs, which it calls command buffers.
    """

    leaf_set: str
    optimizer: str
    backend: str
    graphs: bool = True

    def __str__(self) -> str:
        """Return the name of the row."""
        graphs = "" if self.graphs else ", no graphs"
        return f"{self.leaf_set} / {self.optimizer} / {self.backend}{graphs}"


def work(job: Mapping[str, Any]) -> None:
    """Measure the cases of a job, and append each row to its file."""
    cases = [Case(*case) for case in job["cases"]]
    leaf_set, _, backend, _ = cases[0]
    prepare = prepare_numerics
    if leaf_set in LEAF_SETS:
        prepare = Times(leaf_set, backend, job["bandwidth"]).prepare
    for begin in range(0, len(cases), CASES_AT_ONCE):
        batch = cases[begin : begin + CASES_AT_ONCE]
        with ThreadPoolExecutor(cores()) as pool:  # waits for all programs at its end
            prepared = [attempt(functools.partial(prepare, case, pool.submit)) for case in batch]
        for case, measure in zip(batch, prepared, strict=True):
            row = measure if isinstance(measure, dict) else attempt(measure)
            append(Path(job["path"]), case, row, job["environment"])
            if "error" in row and row is not measure:
                sys.exit(BROKEN)  # after some errors, CUDA fails in the whole process


def attempt(function: Callable[[], Any]) -> Any:
    """Return the result of a function, or a row with its error."""
    try:
        return function()
    except Exception as error:
        return failure(f"{type(error).__name__}: {error}")


def failure(reason: str) -> Row:
    """Return the row of a failed case; XLA's errors may contain whole programs."""
    return {"passed": False, "error": " ".join(reason.split())[:300]}


def append(path: Path, case: Case, row: Row, environment: Mapping[str, Any]) -> None:
    """Append a row to the file and print it; numbers that are not finite become `None`."""
    row = {key: _short(x) if isinstance(x, float) else x for key, x in row.items()}
    line = {"case": str(case), **case._asdict(), **row, **environment}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{case}: {', '.join(f'{key} {x}' for key, x in row.items())}", flush=True)


def _short(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


def leaves_of(leaf_set: str, backend: str) -> Leaves:
    """Return the leaves of a set, with each axis cut to about 64 if kernels are interpreted."""
    found = LEAF_SETS.get(leaf_set, RAGGED)
    if backend != INTERPRETED:
        return found
    return leaves(tuple(min(n, 64 + n % 64) for n in leaf.shape) for leaf in found.values())


def normal(shapes: Leaves, seed: int, size: float) -> dict[str, np.ndarray]:
    """Return random arrays of these shapes."""
    random = np.random.default_rng(seed)
    return {
        name: np.float32(size) * random.standard_normal(leaf.shape, np.float32)
        for name, leaf in shapes.items()
    }


def like(params: Any, grads: Any) -> Any:
    """Return gradients on the device, in the dtypes of their parameters."""
    return jax.tree.map(lambda p, g: jnp.asarray(g, p.dtype), trained(params), grads)


def nodes(tree: Any) -> list[Any]:
    """Return the leaves of a tree, in which an encoded array is one leaf."""
    return jax.tree.leaves(tree, is_leaf=is_encoded)


def is_narrow(x: Any) -> bool:
    """Return whether an array is encoded, or its floats have fewer than 32 bits."""
    return is_encoded(x) or (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4)


def weights(params: Any, state: Any) -> Any:
    """Return the parameters, with the bits that `master_weights` has in the state."""
    has_bits = isinstance(state, MasterWeightsState)
    return float32_weights(params, state) if has_bits else trained(params)


def prepare_numerics(case: Case, submit: Submit) -> Measure:
    """Begin to compile the fused step, the chain, and its step in float64; return the comparison.

    Each comparison begins at the chain's state, so differences don't add up. Arrays that begin off
    a multiple of 16 bytes are not tested, because XLA rejects them.
    """
    optimizer, shapes = OPTIMIZERS[case.optimizer], leaves_of(NUMERICS, case.backend)
    chain, fused = (fuse(optimizer.tx, backend=name) for name in (XLA, case.backend))
    params = optimizer.prepare(jax.tree.map(jnp.asarray, normal(shapes, 0, SIZE)))
    if case.leaf_set == NARROW:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    sizes = np.geomspace(0.03, 1, STEPS)
    grads = [like(params, normal(shapes, 1 + t, size)) for t, size in enumerate(sizes)]
    start = params, chain.init(params)

    def compiled(step: Callable[..., Any], arguments: Any, donated: Any = ()) -> Future[Any]:
        lowered = jax.jit(step, donate_argnums=donated).lower(*arguments)
        options: dict[str, str | bool] = {"xla_allow_excess_precision": False}
        return submit(lambda: lowered.compile(compiler_options=options))

    by_kernels = compiled(fused.step, (*start, grads[0]), donated=(0, 1))
    by_chain, in_double = compiled(chain.step, (*start, grads[0])), None
    if not any(map(is_narrow, nodes(start))):
        with in_float64():
            in_double = compiled(chain.step, to_float64((*start, grads[0])))

    def run(inputs: Any, grad: Any) -> Any:
        return by_kernels.result()(*jax.tree.map(jnp.copy, inputs), grad)  # copies are donated

    def measure() -> Row:
        before, inputs, rows = start, start, []
        for grad in grads:
            before, inputs = inputs, by_chain.result()(*inputs, grad)
            with in_float64():
                exact = in_double and in_double.result()(*to_float64((*before, grad)))
            rows.append(compare(run(before, grad), inputs, exact))
        row = {key: max(row[key] for row in rows) for key in rows[0]}
        bits = [jax.tree.map(_bits, run(before, grads[-1])) for _ in range(REPEATS)]
        row["other_bits"] = sum(each != bits[0] for each in bits)
        row["passed"] = all(row["passed"] for row in rows) and not row["other_bits"]
        if optimizer.same_bytes is None:  # `explain` supports no others
            row["by_xla"] = len(explain(fused, params).fallback_reasons)
        return row

    return measure


@contextlib.contextmanager
def in_float64() -> Generator[None]:
    """Trace and run everything inside of this context in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def to_float64(tree: Any) -> Any:
    """Copy a tree to host memory, with float32 as float64."""
    wide = {np.dtype(np.float32): np.float64}
    return jax.tree.map(lambda x: np.asarray(x, wide.get(x.dtype, x.dtype)), tree)


def _bits(x: jax.Array) -> bytes:
    return np.asarray(x).tobytes()


def compare(ours: Any, chain: Any, exact: Any = None) -> Row:
    """Return the differences between results of one step, and whether they pass.

    Each result consists of parameters and state. `exact` is in float64, or `None`.
    """
    from_chain = differences(ours, chain)
    narrow = [x for x, is_narrow in from_chain if is_narrow]
    row = {
        "to_chain": max(x.max() for x, is_narrow in from_chain if not is_narrow),
        "to_chain_narrow": max((x.max() for x in narrow), default=0.0),
        "changed": max((np.mean(x > FROM_CHAIN) for x in narrow), default=0.0),
    }
    limits = {"to_chain": FROM_CHAIN, "to_chain_narrow": NEXT_VALUE, "changed": CHANGED}
    if exact is not None:
        row["to_float64"], row["chain_to_float64"] = (
            max(x.max() for x, _ in differences(result, exact)) for result in (ours, chain)
        )
        limits["to_float64"] = 2 * row["chain_to_float64"] + FROM_FLOAT64
    passed = all(row[key] <= limit for key, limit in limits.items())
    return {key: float(x) for key, x in row.items()} | {"passed": passed}


def differences(ours: Any, expected: Any) -> list[tuple[np.ndarray, bool]]:
    """Return the differences of each array, and whether it has fewer bits than float32.

    They are relative to the largest expected value, and infinite if a value is not finite or an
    integer is not equal.
    """

    def of_array(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            return np.where(x == y, 0.0, np.inf)
        wide = y.astype(np.float64)
        error = np.abs(x.astype(np.float64) - wide)
        return np.where(np.isfinite(error), error, np.inf) / (np.abs(wide).max() or 1e-300)

    pairs = zip(values(*ours), values(*expected), strict=True)
    return [(of_array(x, y), is_narrow) for (x, is_narrow), (y, _) in pairs]


def values(params: Any, state: Any) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield all arrays, decoded, and whether each has fewer bits than float32."""
    if isinstance(state, MasterWeightsState):
        yield from ((np.asarray(x), True) for x in jax.tree.leaves(weights(params, state)))
        params, state = (), state.inner_state
    for x in nodes((params, state)):
        yield np.asarray(x.decode() if is_encoded(x) else x), is_narrow(x)


class Times:
    """Times of the chain, the fused step, adamw and a copy, which take turns on a set of leaves.

    Each program is a loop of steps with donated parameters and state.
    """

    def __init__(self, leaf_set: str, backend: str, bandwidth: float):
        self.leaf_set, self.leaves = leaf_set, leaves_of(leaf_set, backend)
        seconds = SECONDS_PER_CALL * (1 + len(self.leaves) / LEAVES_PER_CALL)
        self.per_call = bandwidth * (seconds / 10 if backend == INTERPRETED else seconds)
        self.adamw = least_bytes(REFERENCE, leaf_set) * count(self.leaves)
        # Whole periods of lookahead, whose synchronizations move more bytes.
        period = SYNC_PERIOD
        self.steps = period * math.ceil(self.per_call / (period * self.adamw))
        self.arrays = normal(self.leaves, 0, SIZE), normal(self.leaves, 1, SIZE)
        self.programs: dict[tuple[str, str], Future[Any]] = {}
        self.references: dict[str, timing.Turn] = {}

    def prepare(self, case: Case, submit: Submit) -> Measure:
        """Begin to compile the programs of a case, and return its measurement."""
        names = {(REFERENCE, XLA), (case.optimizer, XLA), (case.optimizer, case.backend)}
        for name in names - self.programs.keys() - {(REFERENCE, TORCH)}:
            self.programs[name] = submit(self.lower(*name))
        least_bytes(case.optimizer, self.leaf_set)  # not between turns, because it traces
        return functools.partial(self.measure, case)

    def lower(self, optimizer: str, backend: str) -> Callable[[], dict[bool, Any]]:
        """Lower a program, and return a function that compiles it with and without graphs."""
        program = timing.in_loop(fuse(OPTIMIZERS[optimizer].tx, backend=backend).step, self.steps)
        arguments = jax.eval_shape(functools.partial(self.begin, optimizer), *self.arrays)
        lowered = jax.jit(program, donate_argnums=(0, 1)).lower(*arguments)
        options: dict[bool, Any] = {True: {}, False: NO_GRAPHS}
        return lambda: {key: lowered.compile(compiler_options=x) for key, x in options.items()}

    def begin(self, optimizer: str, params: Any, grads: Any) -> tuple[Any, Any, Any]:
        """Return parameters, state and gradients of the first step."""
        params, state = OPTIMIZERS[optimizer].begin(params)
        return params, state, like(params, grads)

    def loop(self, optimizer: str, backend: str, *, graphs: bool = True) -> timing.InPlace:
        """Return a run of a program with its own arrays."""
        program = self.programs[optimizer, backend].result()[graphs]
        return timing.InPlace(program, *self.begin(optimizer, *self.arrays))

    def measure(self, case: Case) -> Row:
        """Measure a case by turns with the chain, adamw and a copy."""
        if not self.references:
            copies = math.ceil(self.per_call / timing.copied_bytes())
            adamw = timing.per_step(self.loop(REFERENCE, XLA), self.steps)
            self.references = {"copy": copy_turn(copies), REFERENCE: adamw}
        row: Row = {"passed": True}
        if case.backend == TORCH:
            turns = {"fused": torch_turn(*self.arrays, self.steps)}
        else:
            chain, fused = (
                self.loop(case.optimizer, x, graphs=case.graphs) for x in (XLA, case.backend)
            )
            row["drift"] = drift(fused, chain)
            row["passed"] = row["drift"] <= DRIFT
            runs = {"chain": chain, "fused": fused}
            turns = {name: timing.per_step(run, self.steps) for name, run in runs.items()}
        times = timing.by_turns({**self.references, **turns}, repeats=TURNS, dropped=1)
        return row | self.figures(case, times)

    def figures(self, case: Case, times: Mapping[str, timing.Times]) -> Row:
        """Return times, bandwidth and ratios; only fused steps skip bytes that do not change."""
        fused, chain = times["fused"], times.get("chain", times[REFERENCE])
        skipped = skipped_bytes(case.optimizer, self.leaf_set)
        per_parameter = least_bytes(case.optimizer, self.leaf_set) - skipped
        moved = per_parameter * count(self.leaves)
        bandwidth = timing.copied_bytes() / times["copy"].median
        return {
            "chain_ms": 1e3 * chain.median,
            "median_ms": 1e3 * fused.median,
            "spread_ms": 1e3 * fused.spread,
            "copy_gb_per_s": bandwidth / 1e9,
            "speed_up": chain.median / fused.median,
            "of_copy": moved / fused.median / bandwidth,
            "to_adamw_per_byte": fused.median / moved * self.adamw / times[REFERENCE].median,
        }


def drift(fused: timing.InPlace, chain: timing.InPlace) -> float:
    """Return the largest difference of parameters after a call, relative to their movement.

    One changed code may change the update of its element, so states in codes have a norm instead.
    """
    which = int(any(map(is_encoded, nodes(chain.state))))
    start = jax.tree.map(jnp.copy, weights(chain.params, chain.state))
    chain(1)
    fused(1)
    after = (weights(run.params, run.state) for run in (fused, chain))
    relative = jax.tree.map(lambda x, y, z: _norms(x, y) / _norms(y, z), *after, start)
    return float(np.max([x[which] for x in jax.tree.leaves(relative)]))  # or NaN


@jax.jit
def _norms(x: jax.Array, y: jax.Array) -> jax.Array:
    difference = jnp.ravel(x - y)
    return jnp.stack([jnp.max(jnp.abs(difference)), jnp.linalg.norm(difference)])


def copy_turn(copies: int) -> timing.Turn:
    """Return a turn of copies of a large array."""
    program = jax.jit(timing.in_loop(timing.copy_step, copies), donate_argnums=(0, 1))
    array = jnp.ones(timing.COPIED_PARAMETERS)
    return timing.per_step(timing.InPlace(program, array, (), ()), copies)


def torch_turn(params: Any, grads: Any, steps: int) -> timing.Turn:
    """Return a turn of PyTorch's fused AdamW in a CUDA graph, which takes no time in Python."""
    torch = importlib.import_module("torch")
    leaves = [torch.nn.Parameter(torch.tensor(x, device="cuda")) for x in params.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = torch.tensor(grad, device="cuda")
    optimizer = torch.optim.AdamW(leaves, RATE, fused=True, capturable=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer.step()  # allocates the state, which a graph must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def run(calls: int) -> None:
        for _ in range(calls * steps):
            graph.replay()
        torch.cuda.synchronize()

    return timing.per_step(run, steps)


def probe(platform: str) -> Row:
    """Return the device, and the bandwidth of a copy."""
    device, turns = (
        command_line.find_device(platform),
        {"copy": copy_turn(4 if platform == "cpu" else 40)},
    )
    copy = timing.by_turns(turns, repeats=TURNS, dropped=1)["copy"]
    found = {"kind": device.device_kind, "device": describe(device)}
    return found | {"bandwidth": timing.copied_bytes() / copy.median}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(probe(job["probe"]))) if "probe" in job else work(job)
