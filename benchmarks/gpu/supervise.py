"""The supervisor of a job.

Worker processes, which may fail, hang or end, do the work until a deadline.
"""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from benchmarks.gpu.tasks import Began, Case, Found, Job, Message, failure
from benchmarks.gpu.worker import Send, work

# Kernels are skipped after this many crashes or hangs, because each restart takes time.
STRIKES = 2
# A worker that sends no message for this long is considered to hang.
SILENCE_SECONDS = 60.0


class Worker(Protocol):
    """A process that does a job."""

    def receive(self, seconds: float) -> Message | None:
        """Return the next message, or `None` after the time; raise `EOFError` after its end."""
        ...

    def end(self) -> str:
        """End the process, and describe how it ended if it had ended already."""
        ...


class Process:
    """A worker in a separate Python interpreter.

    Args:
      job: the job that it does.
      do: the function that does the job; its second argument sends messages.
    """

    def __init__(self, job: Job, do: Callable[[Job, Send], object] = work):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_do, args=(do, job, theirs), daemon=True)
        self.process.start()
        theirs.close()  # otherwise `receive` would not notice its end

    def receive(self, seconds: float) -> Message | None:
        """Return the next message, or `None` after the time; raise `EOFError` after its end."""
        return self.connection.recv() if self.connection.poll(max(seconds, 0)) else None

    def end(self) -> str:
        """End the process, and describe how it ended if it had ended already."""
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
    """Run a job in worker processes until all tasks are done or the time is over.

    If a process ends or hangs, its current case gets a row with that error. A new process does the
    remaining tasks.

    Args:
      job: the job with all tasks.
      record: receives each case and its row as soon as the row is known.
      deadline: the time on the clock at which the work ends.
      start: starts a worker.
      clock: returns the time in seconds.

    Raises:
      RuntimeError: a process ended before its first case.
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
    """Receive messages until a worker ends; return its current case and how it ended."""
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
    return at, f"its process sent no message for {SILENCE_SECONDS:.0f} s"
