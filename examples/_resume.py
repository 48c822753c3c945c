"""Trainings that Ctrl-C ends in order, and that go on from a folder."""

import hashlib
import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_manager import METADATA_ITEM_NAME
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# All others must stay what they were: a run that changed on the way could not be repeated.
MAY_CHANGE = {"checkpoints", "save_every", "log_every", "write", "temperature"}


def open_checkpoints(
    program: str, options: Namespace, *, may_change: Set[str] = frozenset()
) -> ocp.CheckpointManager:
    """The checkpoints in the folder `options.checkpoints`, by default a new temporary one.

    Of several processes, each opens it.

    Args:
      program: whose options these are; a folder is of one program.
      options: what the folder must have begun with, but for those that may change.
      may_change: names of such options beside `MAY_CHANGE`.
    """
    folder = options.checkpoints or Path(tempfile.mkdtemp(prefix="training-"))
    prepare(folder)
    kept = vars(options).keys() - MAY_CHANGE - may_change
    chosen = {name: describe(getattr(options, name)) for name in sorted(kept)}
    chosen["program"] = program
    manager = ocp.CheckpointManager(
        folder.resolve(),
        options=ocp.CheckpointManagerOptions(save_interval_steps=options.save_every, max_to_keep=2),
        metadata=chosen,  # written by the run that begins the folder, and never again
    )
    begun = manager.metadata().custom_metadata or {}
    if begun != chosen:
        manager.close()
        raise SystemExit(f"{folder} can't be gone on from: {difference(begun, chosen)}")
    return manager


def prepare(folder: Path) -> None:
    """Makes the folder, and ends the program unless checkpoints of ours can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--checkpoints {folder}: {error.strerror}") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise SystemExit(f"--checkpoints {folder}: can't be written to")
    # Ours lie there from before the first step on.
    has_options = (folder / METADATA_ITEM_NAME).exists()
    if not has_options and ocp.utils.checkpoint_steps(folder):
        raise SystemExit(f"{folder} can't be gone on from: another program wrote it")


def describe(value: Any) -> str:
    """An option's value, a file by what it holds: it may move, but not change."""
    if not isinstance(value, Path):
        return str(value)
    with value.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"a file of {value.stat().st_size} bytes, SHA-256 {digest[:16]}"


def difference(begun: Mapping[str, str], chosen: Mapping[str, str]) -> str:
    """In what the options of a folder are others than those chosen now."""
    if begun.get("program") != chosen["program"]:
        return "another program wrote it"
    if begun.keys() != chosen.keys():
        return "another version of the program wrote it"
    name = next(name for name in chosen if begun[name] != chosen[name])
    return f"it began with --{name.replace('_', '-')} {begun[name]}, got {chosen[name]}"


class Steps:
    """The numbers of the steps to take, for a `for` loop.

    Attributes:
      done: steps taken so far, in all.
      ending: whether the current step is the last one, by its number or by Ctrl-C.
    """

    def __init__(self, first: int, last: int, bar: Progress):
        self.done = first
        self.ending = False
        self._last = last
        self._interrupted = False
        self._bar = bar
        self._task = bar.add_task("", total=last, completed=first, note="")

    def __iter__(self) -> Iterator[int]:
        while self.done < self._last and not self.ending:
            # Decided before the step, so that it is one answer however often it is asked for.
            self.ending = self._interrupted or self.done + 1 == self._last
            yield self.done
            self.done += 1
            self._bar.update(self._task, completed=self.done)

    def interrupt(self) -> None:
        """Makes the step after the current one the last."""
        self._interrupted = True

    def note(self, text: str) -> None:
        """Shows a text beside the bar."""
        self._bar.update(self._task, note=text)

    def log(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, highlight=False)


@contextmanager
def steps_to(last: int, checkpoints: ocp.CheckpointManager) -> Iterator[Steps]:
    """The steps from the latest checkpoint on, with a progress bar.

    Ctrl-C ends them in order, with a step that knows to be the last and can be saved, and then the
    program. Pressed again, it ends it at once.
    """
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )

    def on_interrupt(*_) -> None:
        signal.signal(signal.SIGINT, before)
        steps.interrupt()

    with Progress(*columns) as bar:
        steps = Steps(checkpoints.latest_step() or 0, last, bar)
        if steps.done:
            steps.log(f"goes on after step {steps.done}")
        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield steps
        finally:
            signal.signal(signal.SIGINT, before)
    if steps.done < last:
        raise SystemExit(
            f"stopped after step {steps.done} of {last};"
            f" the same line with --checkpoints {checkpoints.directory} goes on"
        )
