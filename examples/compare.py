"""A comparison of six methods with AdamW, SGD and a control, on real images.

    python examples/compare.py
    python examples/compare.py --methods fame,novak --seeds 10 --epochs 50
    python examples/compare.py --data mine.npz --out results/
    python examples/compare.py --fused

Every optimizer trains the same small convolutional network without skip connections, from the same
initial weights and on the same batches. The rate falls along a cosine, and no optimizer decays
weights. Each tries the same number of rates, on seeds of their own. The rate with the lowest
validation loss then runs on all other seeds. AdamW is always trained, to compare with.
"""

import argparse
import errno
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import optax_ext
from _data import DataError, Dataset, load
from _plot import save_figure
from _report import Result, document, print_header, print_table, save_json
from _training import Factory, Plan, train
from pallas_kernels import fuse


def adam_with_warm_up(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Adam, with a rate that grows like DualAdam's share of Adam: linearly, in 100 steps."""
    return optax.adam(lambda step: jnp.minimum(0.01 * (step + 1), 1) * schedule(step))


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare, with its default arguments but for weight decay, which is 0.

    Attributes:
      label: its name in the table and the figure.
      factory: makes the optimizer for a schedule of the rate.
      middle: the middle of the rates to try, a power of ten.
      controls: the method that it is a control of, and is trained with.
    """

    label: str
    factory: Factory
    middle: float = 1e-2
    controls: str | None = None

    def fused(self) -> "Contender":
        """Return the contender with its whole step fused into kernels."""
        return replace(self, factory=lambda schedule: fuse(self.factory(schedule)))

    def rates(self, trials: int) -> list[float]:
        """Return 1, 2 and 5 times powers of ten around the middle."""
        powers = np.arange(trials) - trials // 2
        return [float(f"{self.middle * 10 ** (power / 3):.0e}") for power in powers]


# Without decay AdamW is Adam, and so the control of CaAdam too.
BASELINES = {
    "adamw": Contender("AdamW", partial(optax.adamw, weight_decay=0.0)),
    "sgd": Contender("SGD, momentum .9", partial(optax.sgd, momentum=0.9), 1e-1),
}
CONTROLS = {"warm_up": Contender("Adam, warm-up", adam_with_warm_up, controls="dualadam")}
# The middle of the rates, of the methods whose rate is not like that of AdamW.
MIDDLES = {"invadam": 1.0}

CONTENDERS = dict(BASELINES)
for method, row in optax_ext.METHODS.items():
    factory = partial(row.factory, weight_decay=0.0)
    CONTENDERS[method] = Contender(row.title, factory, MIDDLES.get(method, 1e-2))
    CONTENDERS.update({name: x for name, x in CONTROLS.items() if x.controls == method})
METHODS = [name for name, contender in CONTENDERS.items() if contender.controls is None]

# Results are from seeds 0, 1, …, so that no rate is chosen for its luck on one of these.
TUNING_SEEDS = range(1000, 1004)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        data = load(arguments.data)
        figure = prepare_output(arguments.out)
    except (DataError, OSError) as error:
        parser.error(str(error))
    contenders = {
        name: contender.fused() if arguments.fused else contender
        for name, contender in CONTENDERS.items()
        if (contender.controls or name) in ("adamw", *arguments.methods)
    }

    counts = arguments.epochs, arguments.trials, len(TUNING_SEEDS), arguments.seeds
    plan = Plan(*counts, arguments.fused)
    print_header(data, plan)
    results = compare(contenders, data, plan)
    found = document(results, data, plan)
    print_table(found)
    try:
        save_json(found, figure.with_suffix(".json"))
        save_figure(results, figure)
    except OSError as error:
        raise SystemExit(f"--out {arguments.out}: can't be written to ({error})") from error
    print(f"Wrote {figure} and {figure.with_suffix('.json').name}.")


def compare(contenders: Mapping[str, Contender], data: Dataset, plan: Plan) -> dict[str, Result]:
    """Search a rate for each contender, then train at it with every seed."""
    results: dict[str, Result] = {}
    with progress_bar(len(contenders) * (len(TUNING_SEEDS) + 1)) as on_progress:
        for name, contender in contenders.items():
            run = partial(
                train,
                contender.factory,
                data=data,
                epochs=plan.epochs,
                on_progress=partial(on_progress, contender.label),
            )
            rates = contender.rates(plan.trials)
            search = [run(rates, [seed] * len(rates), curves=False) for seed in TUNING_SEEDS]
            validation = np.concatenate([runs.validation_loss for runs in search], axis=1)
            test = np.stack([runs.test_loss for runs in search], axis=1)
            rate = rates[np.median(validation, axis=1).argmin()]
            runs = run([rate] * plan.seeds, range(plan.seeds))
            results[name] = Result(
                contender.label, contender.controls, rates, validation, test, rate, runs
            )
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="images x of shape (N, H, W) or (N, H, W, C) and integer labels y of shape (N,);"
        " bytes are divided by 255, anything else is standardized (default: the bundled digits)",
    )
    parser.add_argument(
        "--methods",
        type=method_names,
        default=METHODS,
        metavar="NAME,…",
        help=f"what to compare with AdamW, of {', '.join(METHODS)}; controls come along"
        " (default: all)",
    )
    # Equal numbers of runs in parallel are compiled once.
    numbers = {
        "--seeds": (8, "runs of each method at its best rate"),
        "--trials": (8, "learning rates that each method tries"),
        "--epochs": (20, "passes over the training images in each run"),
    }
    for name, (default, what) in numbers.items():
        help_ = f"{what} (default: {default})"
        parser.add_argument(name, type=positive, default=default, metavar="N", help=help_)
    parser.add_argument(
        "--fused",
        action="store_true",
        help="run each step as kernels of an NVIDIA GPU; elsewhere it stays the chain",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("compare.png"),
        metavar="PATH",
        help="the figure, or a directory for it; the table goes beside it as .json"
        " (default: compare.png)",
    )
    return parser


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def method_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown method {unknown[0]!r}, choose from {', '.join(METHODS)}"
        )
    return names


def prepare_output(path: Path) -> Path:
    """Return the figure's path, and make its folder before minutes of training."""
    if path.suffix != ".png" or path.is_dir():
        path = path / "compare.png"
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return path


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


if __name__ == "__main__":
    main()
