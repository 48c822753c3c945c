"""Has a job done by processes that may fail, hang or end, within a time that is given."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.gpu.tasks import Began, Case, Found, Job, Message, failure
from benchmarks.gpu.worker import Send, work

# Of kernels whose cases ended so many processes, no more are tried: each costs a start.
STRIKES = 2
# Nothing takes longer without a word, unless it hangs.
SILENCE_SECONDS = 60.0


class Worker(Protocol):
    """A process that does a job."""

    def receive(self, seconds: float) -> Message | None:
        """What it says next, `None` if that takes longer; `EOFError` once it has ended."""
        ...

    def end(self) -> str:
        """Ends it, and says how it ended if it had."""
        ...


class Process:
    """A worker in an interpreter of its own.

    Args:
      job: what it does.
      do: does a job, given what sends messages.
    """

    def __init__(self, job: Job, do: Callable[[Job, Send], object] = work):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_do, args=(do, job, theirs), daemon=True)
        self.process.start()
        theirs.close()  # else its end would not be seen

    def receive(self, seconds: float) -> Message | None:
        """What it says next, `None` if that takes longer; `EOFError` once it has ended."""
        return self.connection.recv() if self.connection.poll(max(seconds, 0)) else None

    def end(self) -> str:
        """Ends it, and says how it ended if it had."""
        self.process.join(timeout=1)
        self.process.kill()
        self.process.join()
        return f"its process ended with exit code {self.process.exitcode}"


def _do(do: Callable[[Job, Send], object], job: Job, connection: Connection) -> None:
    do(job, connection.send)


def supervise(
    job: Job,
    record: Callable[[Case, Mapping[str, Any]], object],
    *,
    deadline: float,
    start: Callable[[Job], Worker] = Process,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Has tasks done until all are, or the time is over.

    Where a process ends or hangs, the case that it was at has that for a row, and the next process
    does the rest.

    Args:
      job: all tasks.
      record: takes a case and its row, as soon as it is known.
      deadline: on the clock.
      start: makes a worker.
      clock: seconds since some time.

    Raises:
      RuntimeError: no process can begin.
    """
    missing = {case for task in job.tasks for case in task.cases}
    strikes: Counter[str] = Counter()

    def note(case: Case, row: Mapping[str, Any]) -> None:
        missing.discard(case)
        record(case, row)

    while missing and clock() < deadline:
        tasks = (task.only(missing) for task in job.tasks)
        worker = start(replace(job, tasks=tuple(task for task in tasks if task.cases)))
        at, reason = _attend(worker, note, deadline, clock)
        if clock() >= deadline:
            break
        if at is None:
            raise RuntimeError(f"nothing can be measured: {reason}")
        if at in missing:
            note(at, failure(reason))
        strikes[at.kernels] += 1
        if strikes[at.kernels] == STRIKES:
            missing -= {case for case in missing if case.kernels == at.kernels}


def _attend(
    worker: Worker,
    note: Callable[[Case, Mapping[str, Any]], None],
    deadline: float,
    clock: Callable[[], float],
) -> tuple[Case | None, str]:
    """Listens until a worker has ended: at which case, and how."""
    at = None
    try:
        while message := worker.receive(min(SILENCE_SECONDS, deadline - clock())):
            if isinstance(message, Began):
                at = message.case
            elif isinstance(message, Found):
                note(message.case, message.row)
    except (EOFError, OSError):
        return at, worker.end()
    worker.end()
    return at, f"nothing was heard of it for {SILENCE_SECONDS:.0f} s"
