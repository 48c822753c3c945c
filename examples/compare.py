"""A comparison of six methods with AdamW, SGD and two controls, on real images.

    python examples/compare.py
    python examples/compare.py --methods fame,novak,adamw --seeds 10 --epochs 50
    python examples/compare.py --data mine.npz --out results/
    python examples/compare.py --fused

Every optimizer trains the same small convolutional network without skip connections, from the same
initial weights and on the same batches. Each first tries the same number of learning rates on two
other seeds; the rate with the best validation accuracy then runs on all seeds.
"""

import argparse
import errno
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import optax_ext
from _data import DataError, Dataset, load
from _plot import save_figure
from _report import Result, print_header, print_table, save_json
from _training import Curves, Factory, Plan, make_network, time_steps, train
from pallas_kernels import fuse


def adam_with_warm_up(learning_rate: Any) -> optax.GradientTransformation:
    """Return Adam, with a rate that grows like DualAdam's share of Adam: linearly, in 100 steps."""
    return optax.adam(optax.linear_schedule(0.01 * learning_rate, learning_rate, 99))


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare, with its default arguments.

    Attributes:
      label: its name in the table and the figure.
      factory: makes the optimizer for a learning rate.
      middle: the middle of the rates to try; `None` means CaAdam's rate times its mean scale.
      controls: the method that it is a control of, and is trained with.
    """

    label: str
    factory: Factory
    middle: float | None
    controls: str | None = None

    def fused(self) -> "Contender":
        """Return the contender with its whole step fused into kernels."""
        return replace(self, factory=lambda rate: fuse(self.factory(rate)))


BASELINES = {
    "adamw": Contender("AdamW", optax.adamw, 5e-3),
    "sgd": Contender("SGD, momentum .9", lambda rate: optax.sgd(rate, momentum=0.9), 3e-2),
}
CONTROLS = {
    "warm_up": Contender("Adam, linear warm-up", adam_with_warm_up, 5e-3, controls="dualadam"),
    "mean_scale": Contender("Adam, mean scale", optax.adam, None, controls="caadam"),
}
# The middle of the rates, of the methods whose rate is not that of AdamW.
MIDDLES = {"invadam": 1.0, "novak": 1e-2}

CONTENDERS = dict(BASELINES)
for method, row in optax_ext.METHODS.items():
    CONTENDERS[method] = Contender(row.title, row.factory, MIDDLES.get(method, 5e-3))
    CONTENDERS.update({name: x for name, x in CONTROLS.items() if x.controls == method})
METHODS = [name for name, contender in CONTENDERS.items() if contender.controls is None]

# Ratio between neighbouring rates.
GRID_RATIO = 3.0
# Results are from seeds 0, 1, …, so that no rate is chosen for its luck on one of these.
SEARCH_SEEDS = (1000, 1001)


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
        if (contender.controls or name) in arguments.methods
    }

    plan = Plan(arguments.epochs, arguments.trials, arguments.seeds, arguments.fused)

    print_header(data, plan)
    results = compare(contenders, data, plan)
    print_table(results, data)
    try:
        save_json(results, data, plan, figure.with_suffix(".json"))
        save_figure(results, data, figure)
    except OSError as error:
        raise SystemExit(f"--out {arguments.out}: can't be written to ({error})") from error
    print(f"Wrote {figure} and {figure.with_suffix('.json').name}.")


def compare(contenders: Mapping[str, Contender], data: Dataset, plan: Plan) -> dict[str, Result]:
    """Search a rate for each contender, then train at it with every seed."""
    _, params = make_network(data)
    mean_scale = optax_ext.connection_table(params, scaling="additive").mean_scale
    results: dict[str, Result] = {}
    searches = sum(contender.middle is not None for contender in contenders.values())
    with progress_bar(len(contenders) + len(SEARCH_SEEDS) * searches + 1) as on_progress:
        for name, contender in contenders.items():
            run = partial(
                train,
                contender.factory,
                data=data,
                epochs=plan.epochs,
                on_progress=partial(on_progress, contender.label),
            )
            if contender.middle is None:
                rate, scores = mean_scale * results["caadam"].rate, {}
            else:
                rate, scores = search(run, contender.middle, plan.trials)
            curves = run([rate] * plan.seeds, range(plan.seeds))
            results[name] = Result(contender.label, contender.controls, rate, scores, curves)

        seconds = time_steps(
            {name: (contenders[name].factory, result.rate) for name, result in results.items()},
            plan.seeds,
            data=data,
            on_progress=partial(on_progress, "time per step"),
        )
    return {name: results[name]._replace(seconds_per_step=seconds[name]) for name in results}


def search(
    run: Callable[[Sequence[float], Sequence[int]], Curves], middle: float, trials: int
) -> tuple[float, dict[float, float]]:
    """Return the best of a logarithmic grid of rates, and the score of each."""
    rates = [middle * GRID_RATIO ** (i - (trials - 1) / 2) for i in range(trials)]
    late = [run(rates, [seed] * trials).late_validation for seed in SEARCH_SEEDS]
    scores = dict(zip(rates, np.mean(late, axis=0).tolist(), strict=True))
    return max(rates, key=scores.__getitem__), scores


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
        help=f"what to compare, of {', '.join(METHODS)}; controls come along (default: all)",
    )
    numbers = {
        "--seeds": (5, "runs of each method at its best rate"),
        "--trials": (5, "learning rates that each method tries"),
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
