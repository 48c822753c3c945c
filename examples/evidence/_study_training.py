"""The training of one run of the study, and the record of its results."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import _networks as networks
from _networks import Data
from _results import VERSIONS
from _study_protocol import SEARCH_SEED, Factory, Run, Setting
from _study_workloads import Workload


def make_schedule(setting: Setting, steps: int) -> optax.Schedule:
    """Return a linear warm-up and a cosine to 0; the setting may consist of tracers."""

    def schedule(count: Any) -> jax.Array:
        warm_up = setting.warm_up * steps
        rising = (count + 1) / jnp.maximum(warm_up, 1)
        share = (count + 1 - warm_up) / (steps - warm_up)
        falling = (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1))) / 2
        return setting.rate * jnp.where(rising < 1, rising, falling)

    return schedule


class Trainer:
    """Trains many runs of one contender at one workload, and compiles once for each number of runs.

    Rate, decay and warm-up are arguments of the compiled program.
    """

    def __init__(self, workload: Workload, factory: Factory) -> None:
        """Load the data; nothing is compiled yet."""
        self.workload = workload
        self.factory = factory
        self.data = workload.load()
        self.compiled: dict[int, Callable[..., Any]] = {}

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Train the runs, and return the record of each."""
        arguments = self._arguments(runs)
        if len(runs) not in self.compiled:
            self.compiled[len(runs)] = jax.jit(self._descend).lower(*arguments).compile()
        begin = time.perf_counter()
        found = jax.device_get(self.compiled[len(runs)](*arguments))
        seconds = (time.perf_counter() - begin) / len(runs)
        of_all = {
            "step_ms": float(f"{1e3 * seconds / self.workload.steps:.4g}"),
            "bytes": self.bytes_of_state(),
        }
        return [
            {key: _number(x[i]) for key, x in found.items() if _seen(key, run)} | of_all
            for i, run in enumerate(runs)
        ]

    def bytes_of_state(self) -> float:
        """Return the bytes of the state for each parameter."""
        params = parameters(self.workload)
        tx = self._optimizer(Setting(1e-3, 0.0, 0.0))
        state = jax.eval_shape(tx.init, params)
        bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return float(f"{bytes_ / number_of(params):.4g}")

    def _optimizer(self, setting: Setting) -> optax.GradientTransformation:
        return self.factory(make_schedule(setting, self.workload.steps), setting.decay)

    def _arguments(self, runs: Sequence[Run]) -> tuple[Any, ...]:
        """Return parameters, settings and batches, stacked; a seed decides all but the settings."""
        seeds = np.array([run.seed for run in runs])
        images = len(self.data.train.labels)
        batches = [
            networks.draw_batches(seed, self.workload.steps, images, self.workload.batch)
            for seed in seeds
        ]
        columns = np.array([run.setting for run in runs], np.float32).T
        params = networks.initialize(self.workload.network.init, seeds)
        return (params, Setting(*columns), np.stack(batches).astype(np.int32)), self.data

    def _descend(self, runs: Any, data: Data) -> dict[str, jax.Array]:
        # One after the other: on a CPU that takes a quarter of the time of all side by side.
        return lax.map(lambda run: self._descend_one(run, data), runs)

    def _descend_one(self, run: tuple[Any, Setting, jax.Array], data: Data) -> dict[str, jax.Array]:
        params, setting, batches = run
        apply = self.workload.network.apply
        tx = self._optimizer(setting)

        def step(run: Any, batch: jax.Array) -> tuple[Any, None]:
            params, state = run
            drawn = jax.tree.map(lambda x: x[batch], data.train)
            gradient = jax.grad(partial(networks.cross_entropy, apply))(params, drawn)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = lax.scan(step, (params, tx.init(params)), batches)[0][0]
        logits = apply(params, data.test.images)
        right = logits.argmax(-1) == data.test.labels
        return {
            "validation": networks.cross_entropy(apply, params, data.validation),
            "test": networks.cross_entropy(apply, params, data.test),
            "accuracy": 100 * jnp.mean(right),
        }


def _seen(key: str, run: Run) -> bool:
    """Return whether a number may be recorded: trials don't see the test set."""
    return key == "validation" or run.seed < SEARCH_SEED


def _number(x: Any) -> float | None:
    """Return a number with seven digits, or `None` if the training diverged."""
    return float(f"{x:.7g}") if math.isfinite(x) else None


def parameters(workload: Workload) -> Any:
    """Return the shapes of the parameters."""
    key = jax.eval_shape(partial(jax.random.key, impl="rbg"), 0)
    return jax.eval_shape(workload.network.init, key)


def number_of(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@cache
def describe(workload: Workload) -> dict[str, Any]:
    """Return a workload's data and sizes; the text depends on Python's version and build."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(workload.load())):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "parameters": number_of(parameters(workload)),
        "steps": workload.steps,
        "batch": workload.batch,
        "data": digest.hexdigest()[:16],
    }


def definition(workload: Workload) -> str:
    """Return a short name of a workload's data and sizes; results of another do not count.

    The code of networks and optimizers is no part of it: whoever changes these starts a new file.
    """
    text = json.dumps(describe(workload), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def environment() -> dict[str, str]:
    """Return what the results may depend on besides."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": f"{_cores()} × {_processor()}",
        "python": platform.python_version(),
        **VERSIONS,
    }


def _cores() -> int | None:
    """Return how many cores this process may use, or how many there are where only Linux tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    """Return the processor's name, or its architecture where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
