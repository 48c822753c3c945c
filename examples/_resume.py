"""Trainings that Ctrl-C ends in order, and that go on from a folder."""

import hashlib
import signal
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_manager import METADATA_ITEM_NAME
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from _command_line import make_folder

# All others must stay what they were: a run that changed on the way could not be repeated.
MAY_CHANGE = {"checkpoints", "save_every", "log_every", "write", "temperature"}


class Checkpoints:
    """The checkpoints of one training, in a folder: the two newest are kept.

    Of several processes, each opens, restores and saves.

    Attributes:
      folder: where they are.
      done: steps that the run goes on after; 0 for a new run.
    """

    def __init__(self, folder: Path, manager: ocp.CheckpointManager):
        self.folder = folder
        self.done = 0
        self._manager = manager

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        # What ended the run is what the user must read, and not what follows from it.
        with suppress(SystemExit) if error else nullcontext():
            self.close()

    def restore(self, target: Any) -> Any:
        """Return the arrays of the newest checkpoint that can be read, or `None` without any.

        One that can't be read is deleted, but only once an older one was read: then its files are
        at fault and not the target, and the run writes it again. Several processes would have to
        agree on the older one, so they end instead.

        Args:
          target: arrays of the same shapes, dtypes and shardings.
        """
        unreadable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arrays = self._read(step, target)
            except Exception as error:  # of files, of parsers, of TensorStore: no common type
                unreadable[step] = f"step {step} can't be read ({in_one_line(error)})"
                if jax.process_count() > 1:
                    break
                continue
            for newer, problem in unreadable.items():
                self._manager.delete(newer)
                print(f"{problem} and was deleted")
            self.done = step
            return arrays
        if unreadable:
            problems = "; ".join(unreadable.values())
            raise SystemExit(f"{self.folder} can't be gone on from: {problems}")
        return None

    def _read(self, step: int, target: Any) -> Any:
        if jax.process_count() == 1:
            read_through(self.folder / str(step) / "default")
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def save(self, step: int, arrays: Any, *, force: bool) -> None:
        """Save the arrays after every `--save-every` steps, or in any case, by `force`.

        Files are written while the training goes on, so an error may come with a later step.
        """
        with self._writing():
            self._manager.save(step, args=ocp.args.StandardSave(arrays), force=force)

    def close(self) -> None:
        """Wait until all files are written."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of files and of other processes, in many types
            written = max(ocp.utils.checkpoint_steps(self.folder), default="none")
            raise SystemExit(
                f"--checkpoints {self.folder}: can't be written to ({in_one_line(error)});"
                f" the last checkpoint: {written}"
            ) from error


def open_checkpoints(
    program: str, options: Namespace, *, may_change: Set[str] = frozenset()
) -> Checkpoints:
    """Open the folder `options.checkpoints`, by default a new temporary one.

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
    try:
        manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=options.save_every, max_to_keep=2
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
            metadata=chosen,  # written by the run that begins the folder, and never again
        )
        begun = manager.metadata().custom_metadata or {}
    except Exception as error:
        raise SystemExit(
            f"{folder} can't be gone on from: no options can be read ({in_one_line(error)})"
        ) from error
    if begun != chosen:
        manager.close()
        raise SystemExit(f"{folder} can't be gone on from: {difference(begun, chosen)}")
    return Checkpoints(folder, manager)


def read_through(folder: Path) -> None:
    """Read what Orbax wrote for all arrays, one after the other, and raise where that fails.

    Orbax reads all at once: where one read fails, each of the others prints a traceback of its own.
    """
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if not keys:
        raise FileNotFoundError(f"no arrays in {folder}")
    for key in keys:
        store.read(key).result()


def in_one_line(error: Exception) -> str:
    """The type and the beginning of the message, which may have many lines."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")


def prepare(folder: Path) -> None:
    """Make the folder, and end the program unless checkpoints of ours can be written there."""
    try:
        make_folder(folder)
    except OSError as error:
        raise SystemExit(f"--checkpoints {folder}: {error.strerror}") from error
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
def steps_to(last: int, checkpoints: Checkpoints) -> Iterator[Steps]:
    """The steps after the checkpoint that was restored, with a progress bar.

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
        steps = Steps(checkpoints.done, last, bar)
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
            f" the same line with --checkpoints {checkpoints.folder} goes on"
        )
