"""A bar that shows progress, and jobs that run two at a time."""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Job = TypeVar("Job")
Result = TypeVar("Result")


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


def two_at_a_time(run: Callable[[Job], Result], jobs: Mapping[str, Job]) -> dict[str, Result]:
    """Run each job, two at a time, and return the results; a bar shows how many are done.

    One job can train while another is compiled.
    """
    results = {}
    with progress_bar(len(jobs)) as on_progress, ThreadPoolExecutor(2) as pool:
        for name, found in zip(jobs, pool.map(run, jobs.values()), strict=True):
            results[name] = found
            on_progress(name, 1)
    return results
