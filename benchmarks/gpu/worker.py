"""The process that uses the GPU: it does the tasks of a job and sends each row at once."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu.numerics import Numerics
from benchmarks.gpu.tasks import NUMERICS, Alive, Began, Case, Found, Job, Message, Task, failure
from benchmarks.gpu.times import Times
from benchmarks.history import cores

# These tasks compile together on all cores while nothing is timed. A larger number keeps more cores
# busy, but delays the first results.
TASKS_AT_ONCE = 5
SECONDS_BETWEEN_SIGNS = 10.0

Send = Callable[[Message], object]


def work(job: Job, send: Send) -> None:
    """Do all tasks, or as many as possible before the device stops working."""
    with ThreadPoolExecutor(cores()) as pool:
        numerics, times = Numerics(job, pool.submit), Times(job, pool.submit)
        by_kind = itertools.groupby(job.tasks, lambda task: task.leaf_set == NUMERICS)
        for is_numerics, alike in by_kind:
            bench = numerics if is_numerics else times
            remaining = iter(alike)
            while tasks := [*itertools.islice(remaining, TASKS_AT_ONCE)]:
                programs = compile_all(tasks, bench, send)
                for task in tasks:
                    measure(task.only(programs.keys()), programs, bench, send)
                    if not device_works():
                        return


def compile_all(tasks: Sequence[Task], bench: Numerics | Times, send: Send) -> dict[Case, Any]:
    """Return the cases' programs; send an error as the row of a case that can't be compiled."""
    futures: dict[Case, Future[Any]] = {}
    for case in itertools.chain(*(task.cases for task in tasks)):
        send(Began(case))
        try:
            futures[case] = bench.prepare(case)
        except Exception as error:
            send(Found(case, failure(error)))
    programs = {}
    for case, future in futures.items():
        while not wait([future], SECONDS_BETWEEN_SIGNS).done:
            send(Alive())
        if error := future.exception():
            send(Found(case, failure(error)))
        else:
            programs[case] = future.result()
    return programs


def measure(task: Task, programs: dict[Case, Any], bench: Numerics | Times, send: Send) -> None:
    """Send the rows of the compiled cases; after an error, continue with the other cases."""
    while task.cases:
        at, found = task.cases[0], set()
        try:
            for message in bench.measure(task, programs):
                at = message.case if isinstance(message, Began) else at
                found |= {message.case} if isinstance(message, Found) else set()
                send(message)
            return
        except Exception as error:
            send(Found(at, failure(error)))
            if not device_works():
                return
        task = task.only([case for case in task.cases if case not in found and case != at])


def device_works() -> bool:
    """Return whether the device still computes; some errors break CUDA for the whole process."""
    try:
        return float(jnp.ones(2).sum()) == 2
    except Exception:
        return False
