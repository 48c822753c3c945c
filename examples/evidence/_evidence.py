"""The parts that all evidence shares: command lines, training, intervals, verdicts and files."""

import argparse
import errno
import json
import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from jax import lax
from matfree import decomp
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from sklearn.model_selection import train_test_split

RESULTS = Path(__file__).parent / "results"
# The width of a figure in inches; a page shows 96 pixels of an inch.
WIDTH = 8.4
CONFIDENCE = 0.95
VERSIONS = {module.__name__: module.__version__ for module in (jax, optax)}
_BEGIN = time.monotonic()
Contender = TypeVar("Contender")
Judged = TypeVar("Judged")
# From the palette of Okabe and Ito, which is safe for all kinds of colour vision.
ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
CLASSES = 10
BATCH = 64
# Rates are chosen on seeds from this one on, and judged on the seeds 0, 1, ….
SEARCH_SEED = 1000
# Options that decide where results are written, or how many of them are made now.
NOT_DECISIVE = {"out", "workloads", "contenders", "minutes", "report"}
# Returns an optimizer for a learning rate, which is a tracer here.
Factory = Callable[[Any], optax.GradientTransformation]


class Verdict(StrEnum):
    """The verdict on a claim. `judge` returns all but `REFUTED`, which is for other claims."""

    HOLDS = "holds"
    ONLY_UNTUNED = "holds only against an untuned baseline"
    NOT_SEEN = "not seen at this scale"
    OPPOSITE = "the opposite was seen"
    REFUTED = "does not hold"


class Finding(NamedTuple):
    """The finding about a claim.

    Attributes:
      claim: one sentence that begins with the method.
      verdict: the verdict on the claim.
      shown: the numbers that decide, including those of the controls.
      untuned: the difference from an untuned baseline, for the table; empty without one.
      tuned: the difference from the tuned control, likewise.
    """

    claim: str
    verdict: Verdict
    shown: str
    untuned: str = ""
    tuned: str = ""


class Estimate(NamedTuple):
    """A mean or a share, with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.3g}"
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __neg__(self) -> "Estimate":
        return Estimate(-self.mean, -self.high, -self.low)

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the difference, with an interval that excludes 0 where the two are disjoint."""
        ends = self.low - other.high, self.high - other.low
        return Estimate(self.mean - other.mean, *ends)

    @property
    def smallest_seen(self) -> float:
        """The smallest effect that four of five such studies would distinguish from 0.

        It is (t(.975) + t(.8)) / t(.975) half-widths, which is 1.4 for 8 seeds or more.
        """
        return 1.4 * (self.high - self.low) / 2


# The rows of a table by name; the cells of a row by column.
Rows = Mapping[str, Mapping[str, Estimate | float | str]]


def mean(samples: ArrayLike) -> Estimate:
    """Return the mean over seeds, or of differences between paired seeds, with Student's interval.

    Seeds are few here, for which resampling gives intervals that are too narrow.
    """
    samples = np.asarray(samples, np.float64)
    center = samples.mean()
    if len(samples) < 2:
        return Estimate(center, math.nan, math.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(samples) - 1) * stats.sem(samples)
    return Estimate(center, center - half, center + half)


def share(successes: ArrayLike) -> Estimate:
    """Return the share of seeds that succeed, with Wilson's interval."""
    successes = np.asarray(successes, bool)
    found = stats.binomtest(int(successes.sum()), len(successes))
    interval = found.proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(successes.mean()), interval.low, interval.high)


def exact(x: float) -> Estimate:
    """Return a number that was not estimated: its interval is the number itself."""
    return Estimate(x, x, x)


def judge(gains: Sequence[Estimate], untuned: Sequence[Estimate] = ()) -> Verdict:
    """Return the verdict on the claim of a gain, which is positive in the claim's favour.

    Args:
      gains: differences from each tuned control; the claim needs all of them.
      untuned: differences from untuned baselines; none if there is no such comparison.
    """
    if all(x.low > 0 for x in gains):
        return Verdict.HOLDS
    if untuned and all(x.low > 0 for x in untuned):
        return Verdict.ONLY_UNTUNED
    if all(x.high < 0 for x in gains):
        return Verdict.OPPOSITE
    return Verdict.NOT_SEEN


def signed(x: Estimate, digits: int = 3) -> str:
    """Return a difference in words, with its sign."""
    return f"{x.mean:+.{digits}f} [{x.low:+.{digits}f}, {x.high:+.{digits}f}]"


def sensitivity(x: Estimate, unit: str = "", digits: int = 3) -> str:
    """Return a sentence that says how large an effect the comparison can see."""
    return f"The smallest effect that it would see: {x.smallest_seen:.{digits}f}{unit}."


def make_parser(description: str | None, **sizes: tuple[int, str]) -> argparse.ArgumentParser:
    """Return a parser of `--out` and of sizes, each given as its default and its description.

    Parsing makes the folder, so that no training is lost because it is missing.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, what) in sizes.items():
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "--out",
        type=_folder,
        default=RESULTS,
        metavar="FOLDER",
        help="for the figure and its numbers (default: examples/evidence/results)",
    )
    return parser


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    """Make a folder to write files in, and return it."""
    try:
        make_folder(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return Path(text)


def make_folder(folder: Path) -> None:
    """Make a folder if it is missing; raise `OSError` unless files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def progress_bar(total: int) -> Generator[Callable[[str, float], None]]:
    """Show a bar; yield a function that takes a label and how much more work is done."""
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)

        def advance(label: str, share: float) -> None:
            progress.update(task, description=label, advance=share)

        yield advance


def side_by_side(
    judge: Callable[[Contender], Judged], contenders: Mapping[str, Contender]
) -> dict[str, Judged]:
    """Judge each contender, two at a time; a bar shows how many are done.

    One contender can train while another is compiled.
    """
    judged = {}
    with progress_bar(len(contenders)) as on_progress, ThreadPoolExecutor(2) as pool:
        found = pool.map(judge, contenders.values())
        for name, one in zip(contenders, found, strict=True):
            judged[name] = one
            on_progress(name, 1)
    return judged


class Split(NamedTuple):
    """Images of shape (N, 8, 8, 1) and their labels."""

    images: Any
    labels: Any


class Digits(NamedTuple):
    """scikit-learn's digits: 60, 20 and 20 %."""

    train: Split
    validation: Split
    test: Split


@cache
def load_digits() -> Digits:
    """Return the digits on the device, with mean 0 and deviation 1 over the training images."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    images, labels = x.reshape(-1, 8, 8, 1), y.astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    x, test_x, y, test_y = map(np.asarray, parts)
    parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    x, held_x, y, held_y = map(np.asarray, parts)
    offset, width = x.mean(), x.std()
    splits = [
        Split(((images - offset) / width).astype(np.float32), labels)
        for images, labels in ((x, y), (held_x, held_y), (test_x, test_y))
    ]
    return jax.device_put(Digits(*splits))


class Network(NamedTuple):
    """A network: a function of a random key, and one of parameters and images."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


class Runs(NamedTuple):
    """The results of many runs: arrays with an entry for each run; accuracies are in per cent.

    Attributes:
      params: the parameters at the end.
      train: cross-entropy on the training images.
      validation: cross-entropy on the images that rates are chosen by.
      test: cross-entropy on the images that rates are judged by.
      train_accuracy: accuracy on the training images.
      accuracy: accuracy on the test images.
    """

    params: Any
    train: Any
    validation: Any
    test: Any
    train_accuracy: Any
    accuracy: Any


def train(
    network: Network,
    factory: Factory,
    rates: ArrayLike,
    seeds: ArrayLike,
    *,
    steps: int,
    batch: int = BATCH,
) -> Runs:
    """Train a run for each pair of a rate and a seed; the results have the shape of both arrays.

    A seed decides the initial weights and the batches, equally for every optimizer. Calls with the
    same optimizer and the same number of runs are compiled once.
    """
    rates, seeds = np.broadcast_arrays(np.asarray(rates, np.float32), np.asarray(seeds))
    images = len(load_digits().train.labels)
    batches = np.stack([draw_batches(seed, steps, images, batch) for seed in seeds.ravel()])
    params = initialize(network.init, seeds.ravel())
    # Made outside of the compiled training: methods that differ only in their initial state then
    # share one entry of the compilation cache.
    states = jax.vmap(lambda rate, params: factory(rate).init(params))(rates.ravel(), params)
    runs = params, states, rates.ravel(), batches
    params = descend(network.apply, factory, *runs, load_digits().train)
    found = evaluate(network.apply, params, load_digits())
    return jax.tree.map(lambda x: np.asarray(x).reshape(*rates.shape, *x.shape[1:]), found)


def best(search: Runs) -> int:
    """Return the index of the rate with the least mean validation loss, of at most 10 for a run."""
    losses = np.clip(np.nan_to_num(search.validation, nan=np.inf), 0, 10)
    return int(losses.mean(axis=1).argmin())


def best_on_others(runs: Runs) -> np.ndarray:
    """Return for each seed the rate that is best on all other seeds; runs are (rates, seeds).

    So no seed takes part in the choice that it is judged by.
    """
    seeds = runs.validation.shape[1]
    return np.array(
        [best(runs._replace(validation=np.delete(runs.validation, i, 1))) for i in range(seeds)]
    )


def draw_batches(seed: int, steps: int, images: int, batch: int = BATCH) -> np.ndarray:
    """Return indices of images, of shape (steps, batch); an epoch has each image at most once."""
    random = np.random.default_rng(seed)
    epochs = -(-steps // (images // batch))
    used = images // batch * batch
    shuffled = [random.permutation(images)[:used] for _ in range(epochs)]
    return np.concatenate(shuffled).reshape(-1, batch)[:steps]


@partial(jax.jit, static_argnames="init")
def initialize(init: Callable[[jax.Array], Any], seeds: jax.Array) -> Any:
    """Return new parameters for each seed, stacked."""
    # JAX's default generator takes seven times as long to compile.
    return lax.map(lambda seed: init(jax.random.key(seed, impl="rbg")), seeds)


@partial(jax.jit, static_argnames=("apply", "factory"))
def descend(
    apply: Callable[..., jax.Array],
    factory: Factory,
    params: Any,
    states: Any,
    rates: jax.Array,
    batches: jax.Array,
    data: Split,
) -> Any:
    """Return the parameters after as many steps as there are batches."""

    def run(params: Any, state: Any, rate: jax.Array, batches: jax.Array) -> Any:
        tx = factory(rate)

        def step(run: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = run
            gradient = jax.grad(partial(cross_entropy, apply))(
                params, jax.tree.map(lambda x: x[batch], data)
            )
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, state), batches)[0][0]

    return jax.vmap(run)(params, states, rates, batches)


@partial(jax.jit, static_argnames="apply")
def evaluate(apply: Callable[..., jax.Array], params: Any, data: Digits) -> Runs:
    """Return the results of all runs."""

    def accuracy(params: Any, split: Split) -> jax.Array:
        return 100 * jnp.mean(apply(params, split.images).argmax(-1) == split.labels)

    def of_one(params: Any) -> Runs:
        return Runs(
            params,
            *(cross_entropy(apply, params, split) for split in data),
            train_accuracy=accuracy(params, data.train),
            accuracy=accuracy(params, data.test),
        )

    return lax.map(of_one, params)


def cross_entropy(apply: Callable[..., jax.Array], params: Any, split: Split) -> jax.Array:
    logits = apply(params, split.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Compute a convolution as a matrix product: in a scan on CPU, XLA's is ten times slower."""
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    (height, width), outputs = kernel.shape[:2], kernel.shape[-1]
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    patches = [
        images[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, outputs)


def initialize_smooth(key: jax.Array, widths: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) / np.sqrt(m), "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def apply_smooth(params: Any, x: jax.Array) -> jax.Array:
    """Apply dense layers with a hyperbolic tangent, whose loss is smooth: its curvature exists."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


# The largest eigenvalue of a trained network's Hessian is well separated, so this many are enough.
MATVECS = 16


def sharpness(loss: Callable[[Any], jax.Array], params: Any, scale: Any = None) -> jax.Array:
    """Return the largest eigenvalue of the Hessian H, or of D H D with D = diag(`scale`)."""

    def product(v: Any) -> Any:
        if scale is None:
            return jax.jvp(jax.grad(loss), (params,), (v,))[1]
        return _times(scale, jax.jvp(jax.grad(loss), (params,), (_times(scale, v),))[1])

    begin = optax.tree.random_like(jax.random.key(0), params)
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    tridiagonal = decomp.tridiag_sym(min(MATVECS, number))(product, begin).J_small
    return jnp.linalg.eigvalsh(tridiagonal)[-1]


def scale_of_adam(nu: Any, count: jax.Array | int, *, b1: float, b2: float, eps: float) -> Any:
    """Return the D for which D H D has the eigenvalues of P^-1 H, where P divides Adam's momentum.

    D = P^-1/2 and P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps), as in Cohen et al. 2022, arXiv
    2207.14484.
    """
    return jax.tree.map(
        lambda v: ((1 - b1**count) * (jnp.sqrt(v / (1 - b2**count)) + eps)) ** -0.5, nu
    )


def _times(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.multiply, a, b)


def tidy(axes: Axes, grid: Literal["x", "y", "both"] = "both") -> None:
    """Draw small ticks, a faint grid behind the data, and no box."""
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def entitle(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of the axes, with units."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def log_ticks(axis: Axis, at: Sequence[float] = (1, 2, 5), form: str = "{x:g}") -> None:
    """Label these multiples of the powers of ten, and nothing in between."""
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())


def save_png(figure: Figure, path: Path) -> None:
    """Write a small file."""
    figure.savefig(path, dpi=150)
    # A palette makes the file three times smaller.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)


def draw_estimates(
    axes: Axes,
    places: ArrayLike,
    estimates: Sequence[Estimate],
    *,
    across: bool = False,
    **look: Any,
) -> None:
    """Draw dots and intervals at these places along x, or along y if `across`."""
    centers, *ends = np.transpose(estimates)
    spread = abs(centers - ends)
    look = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2} | look
    if across:
        axes.errorbar(centers, places, xerr=spread, **look)
    else:
        axes.errorbar(places, centers, yerr=spread, **look)


def publish(
    name: str,
    options: argparse.Namespace,
    findings: Sequence[Finding],
    tables: Mapping[str, Rows],
    figures: Mapping[str, Figure],
    constants: Mapping[str, ArrayLike],
    ran: Mapping[str, Any] | None = None,
) -> None:
    """Print tables and verdicts, and write them and the figures to files.

    Args:
      name: the script's name, which its file of numbers has too.
      options: the command line; all but `out` decide the results.
      findings: the findings, each a row in the table of claims.
      tables: the tables by their titles.
      figures: the figures by the names of their files.
      constants: the script's numbers that decide the results, as the options do.
      ran: seconds, device and versions, if the results are of earlier runs.
    """
    console = Console()
    for title, rows in tables.items():
        Console(width=200).print(_printable(title, rows))  # rather a broken line than a cut number
    for finding in findings:
        console.print(f"{finding.claim}\n  [bold]{finding.verdict}[/bold]: {finding.shown}")
    document = {
        "findings": [
            {key: value for key, value in finding._asdict().items() if value}
            for finding in findings
        ],
        "tables": {title: _rounded(rows) for title, rows in tables.items()},
        "figures": [f"{figure}.png" for figure in figures],
        "options": sizes(options),
        "constants": {key: np.asarray(value).tolist() for key, value in constants.items()},
        "confidence": CONFIDENCE,
        "seconds": round(time.monotonic() - _BEGIN),
        "device": jax.devices()[0].device_kind,
        "versions": VERSIONS,
    } | dict(ran or {})
    path = options.out / f"{name}.json"
    with writing_to(options.out):
        for figure, drawn in figures.items():
            save_png(drawn, options.out / f"{figure}.png")
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    console.print(f"Wrote {path} and {', '.join(document['figures'])}.", soft_wrap=True)


def sizes(options: argparse.Namespace) -> dict[str, int]:
    """Return the options that decide the results."""
    return {name: value for name, value in vars(options).items() if name not in NOT_DECISIVE}


@contextmanager
def writing_to(path: Path) -> Generator[None]:
    """End the program with one line if results can't be written."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"--out {path}: can't be written to ({error})") from error


def _printable(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        texts = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells.values())
        table.add_row(name, *texts)
    return table


def _rounded(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return rows as in the file: four digits, an estimate as [mean, low, high]."""

    def cell(x: Estimate | float | str) -> Any:
        if isinstance(x, Estimate):
            return [None if math.isnan(number) else float(f"{number:.4g}") for number in x]
        return x if isinstance(x, str) else float(f"{x:.4g}")

    return {name: {column: cell(x) for column, x in cells.items()} for name, cells in rows.items()}
