"""The methods in plain float64 NumPy, written from their equations alone.

Every oracle takes the initial parameters (a dict of named arrays in the order of the tree's
leaves, names like "conv1/kernel"), a list of gradient dicts and the method's own keyword
arguments, and returns the parameters after each step. `mask` maps names to booleans.
Nothing of the judged package, Optax or JAX is imported here.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Schedule = float | Callable[[int], float]
Mask = Mapping[str, bool] | None


def fame(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.5,
    b4: float = 0.7,
    b5: float = 0.5,
    eps: float = 1e-8,
    second_moment: str = "ema",
    bias_correction: str = "adam",
    amsgrad: bool = False,
    weight_decay: Schedule = 0.0,
    mask: Mask = None,
) -> list[Tensors]:
    theta = _copy(params)
    m, d, e = (_zeros(params) for _ in range(3))
    v, v_d, v_e, v_max = (_zeros(params) for _ in range(4))
    c1 = c3 = c5 = 0.0  # the first moment's cascade on a constant 1
    k2 = k4 = k5 = 0.0  # the second moment's
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        c1 = b1 * c1 + (1 - b1)
        c3 = b3 * c3 + (1 - b3) * c1
        c5 = b5 * c5 + (1 - b5) * c3
        k2 = b2 * k2 + (1 - b2)
        k4 = b4 * k4 + (1 - b4) * k2
        k5 = b4 * k5 + (1 - b4) * k4
        for p in theta:
            grad = g[p] + wd * _decays(mask, p) * theta[p]
            m[p] = b1 * m[p] + (1 - b1) * grad
            d[p] = b3 * d[p] + (1 - b3) * m[p]
            e[p] = b5 * e[p] + (1 - b5) * d[p]
            first = 3 * m[p] - 3 * d[p] + e[p]
            v[p] = b2 * v[p] + (1 - b2) * grad**2
            v_d[p] = b4 * v_d[p] + (1 - b4) * v[p]
            v_e[p] = b4 * v_e[p] + (1 - b4) * v_d[p]
            v_max[p] = np.maximum(v_max[p], v[p])
            if second_moment == "tema":
                second = 3 * v[p] - 3 * v_d[p] + v_e[p]
            else:
                second = v_max[p] if amsgrad else v[p]

            if bias_correction == "adam":
                first = first / (1 - b1**t)
                second = second / (1 - b2**t)
            elif bias_correction == "exact":
                first = first / (3 * c1 - 3 * c3 + c5)
                second = second / (3 * k2 - 3 * k4 + k5 if second_moment == "tema" else 1 - b2**t)
            second = np.maximum(second, 0.0)
            theta[p] = theta[p] - lr * first / (np.sqrt(second) + eps)
        trajectory.append(_copy(theta))
    return trajectory


def vradam(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    beta3: float = 1.0,
    lr_cutoff: float = 10.0,
    eps: float = 1e-8,
    power: float = 2.0,
    norm_of: str = "velocity",
    norm_scope: str = "global",
    norm_reduction: str = "sum",
    weight_decay: Schedule = 1e-5,
    mask: Mask = None,
) -> list[Tensors]:
    theta, u, v = _copy(params), _zeros(params), _zeros(params)
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        sums, sizes = {}, {}
        for p in theta:
            u[p] = b1 * u[p] + (1 - b1) * g[p]
            v[p] = b2 * v[p] + (1 - b2) * g[p] ** 2
            measured = {
                "velocity": u[p],
                "corrected_velocity": u[p] / (1 - b1**t),
                "gradient": g[p],
            }[norm_of]
            sums[p] = np.sum(np.abs(measured) ** power)
            sizes[p] = measured.size
        for p in theta:
            scope = list(theta) if norm_scope == "global" else [p]
            penalty = sum(sums[q] for q in scope)
            if norm_reduction == "mean":
                penalty = penalty / max(1, sum(sizes[q] for q in scope))
            gate = 1 / (1 + min(beta3 * penalty, lr_cutoff))
            step = u[p] / (1 - b1**t) / (np.sqrt(v[p] / (1 - b2**t)) + eps)
            theta[p] = theta[p] - gate * lr * (step + wd * _decays(mask, p) * theta[p])
        trajectory.append(_copy(theta))
    return trajectory


def invadam(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    scale_free: bool = False,
    weight_decay: Schedule = 0.0,
    mask: Mask = None,
) -> list[Tensors]:
    theta, m, v = _copy(params), _zeros(params), _zeros(params)
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        for p in theta:
            m[p] = b1 * m[p] + (1 - b1) * g[p]
            v[p] = b2 * v[p] + (1 - b2) * g[p] ** 2
            mhat, root = m[p] / (1 - b1**t), np.sqrt(v[p] / (1 - b2**t))
            step = mhat * (_over_rms(root, scale_free) + eps)
            theta[p] = theta[p] - lr * (step + wd * _decays(mask, p) * theta[p])
        trajectory.append(_copy(theta))
    return trajectory


def dualadam(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    switch_rate: Schedule = 0.01,
    scale_free: bool = False,
    weight_decay: Schedule = 0.0,
    mask: Mask = None,
) -> list[Tensors]:
    theta, m, v = _copy(params), _zeros(params), _zeros(params)
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        r = switch_rate(t - 1) if callable(switch_rate) else inverse_share(switch_rate, t)
        for p in theta:
            m[p] = b1 * m[p] + (1 - b1) * g[p]
            v[p] = b2 * v[p] + (1 - b2) * g[p] ** 2
            mhat, root = m[p] / (1 - b1**t), np.sqrt(v[p] / (1 - b2**t))
            adam = mhat / (root + eps)
            inverse = mhat * (_over_rms(root, scale_free) + eps)
            step = (1 - r) * adam + r * inverse
            theta[p] = theta[p] - lr * (step + wd * _decays(mask, p) * theta[p])
        trajectory.append(_copy(theta))
    return trajectory


def inverse_share(switch_rate: float, t: int) -> float:
    """The inverse phase lasts while r = max(0, 1 - t s) >= s; plain Adam afterwards."""
    r = max(0.0, 1 - t * switch_rate)
    return r if r >= switch_rate else 0.0


def novak(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Schedule = 1e-4,
    decay_coupling: str = "base",
    nesterov: str = "none",
    rectify: bool = True,
    rectify_fallback: str = "adam",
    trust_ratio: bool = False,
    autoscale: bool = False,
    autoscale_decay: float = 0.99,
    lookahead: str = "exact",
    sync_period: int = 5,
    slow_step_size: float = 0.5,
    mask: Mask = None,
) -> list[Tensors]:
    theta, m, v = _copy(params), _zeros(params), _zeros(params)
    slow = _copy(params)
    norm_average, momentum_product = 0.0, 1.0
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        r = rectification(b2, t) if rectify else 1.0
        bare = rectify and rectify_fallback == "momentum" and variance_length(b2, t) < 5

        norm_average = autoscale_decay * norm_average + (1 - autoscale_decay) * _norm(*g.values())
        n = norm_average / (1 - autoscale_decay**t)
        auto = 1 / (1 + max(0.0, math.log(n))) if autoscale and n > 0 else 1.0

        mu_t, mu_next = scheduled_momentum(b1, t), scheduled_momentum(b1, t + 1)
        momentum_product *= mu_t

        for p in theta:
            m[p] = b1 * m[p] + (1 - b1) * g[p]
            v[p] = b2 * v[p] + (1 - b2) * g[p] ** 2
            mhat = m[p] / (1 - b1**t)
            nadam = b1 * m[p] / (1 - b1 ** (t + 1)) + (1 - b1) * g[p] / (1 - b1**t)
            direction = {
                "none": mhat,
                "nadam": nadam,
                "nadam_scheduled": mu_next * m[p] / (1 - momentum_product * mu_next)
                + (1 - mu_t) * g[p] / (1 - momentum_product),
                "classical": (b1 * m[p] + (1 - b1) * g[p]) / (1 - b1 ** (t + 1)),
                "hybrid": (mhat + nadam) / 2,
            }[nesterov]
            d = direction if bare else direction / (np.sqrt(v[p] / (1 - b2**t)) + eps)

            decay = wd * _decays(mask, p) * theta[p]
            if decay_coupling == "effective":
                d = d + decay
            trust = _trust(theta[p], d) if trust_ratio else 1.0
            step = r * auto * trust * d
            if decay_coupling == "base":
                step = step + decay
            theta[p] = theta[p] - lr * step

        if lookahead == "exact":
            synchronize(theta, slow, t, sync_period, slow_step_size)
        elif lookahead == "rotating":
            synchronize_chunk(theta, slow, t, sync_period, slow_step_size)
        trajectory.append(_copy(theta))
    return trajectory


def variance_length(b2: float, t: int) -> float:
    """rho_t, the length of the simple moving average that the second moment amounts to."""
    return 2 / (1 - b2) - 1 - 2 * t * b2**t / (1 - b2**t)


def rectification(b2: float, t: int) -> float:
    """r_t, or 1 while rho_t < 5 leaves the variance of the step undefined."""
    rho_inf, rho = 2 / (1 - b2) - 1, variance_length(b2, t)
    if rho < 5:
        return 1.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def scheduled_momentum(b1: float, t: int) -> float:
    """mu_t of NAdam's schedule."""
    return b1 * (1 - 0.5 * 0.96 ** (0.004 * t))


def synchronize(theta: Tensors, slow: Tensors, t: int, k: int, a: float) -> None:
    """Exact lookahead: every k steps the slow weights move towards the fast and replace them."""
    if t % k == 0:
        for p in theta:
            slow[p] = slow[p] + a * (theta[p] - slow[p])
            theta[p] = slow[p].copy()


def synchronize_chunk(theta: Tensors, slow: Tensors, t: int, k: int, a: float) -> None:
    """Rotating lookahead: as above, for the one chunk whose slow weights are held.

    `slow` has full size for simplicity; only the chunk of the running segment has a meaning.
    """
    if t % k != 0:
        return
    segment = (t - 1) // k
    for p in theta:
        shape = theta[p].shape
        fast, held = np.atleast_1d(theta[p].copy()), np.atleast_1d(slow[p].copy())
        ours, following = chunk(fast.shape, segment % k, k), chunk(fast.shape, (segment + 1) % k, k)
        held[ours] += a * (fast[ours] - held[ours])
        fast[ours] = held[ours]
        held[following] = fast[following]
        theta[p], slow[p] = fast.reshape(shape), held.reshape(shape)


def chunk(shape: tuple[int, ...], j: int, k: int) -> tuple[Any, ...]:
    """Every k-th group of indices, from the j-th on, in each block of one axis.

    The axis is the first of the longest but the last, if it has 6 k indices, else of all. Of groups
    of 8, 4 or 2 and then of blocks there are at least 6 k to share out, or they are not made; in
    the other case groups are single indices, 3 k of them at least.
    """
    longest, least, sizes = max(shape[:-1], default=0), 6 * k, (8, 4, 2, 1)
    axis = shape[:-1].index(longest) if longest else 0
    if longest < least:
        axis, least, sizes = shape.index(max(shape)), 3 * k, (1,)
    n = shape[axis]
    size = next((s for s in sizes if n and n % s == 0 and n // s >= least), 1)
    groups = n // size
    while groups and groups % 2 == 0 and groups // 2 >= least:
        groups //= 2
    mine = [i for i in range(n) if i // size % groups % k == j]
    return (slice(None),) * axis + (mine,)


def caadam(
    params: Tensors,
    grads: Iterable[Tensors],
    *,
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-7,
    scaling: str = "additive",
    strength: float | None = None,
    units: str = "module",
    overrides: Mapping[str, Mapping[str, float]] | None = None,
    amsgrad: bool = False,
    weight_decay: Schedule = 0.0,
    mask: Mask = None,
) -> list[Tensors]:
    shapes = {p: np.shape(x) for p, x in params.items()}
    scale = connection_scales(
        shapes, scaling=scaling, strength=strength, units=units, overrides=overrides
    )
    theta, m, v, v_max = _copy(params), _zeros(params), _zeros(params), _zeros(params)
    trajectory = []
    for t, g in enumerate(grads, start=1):
        lr, wd = _at(learning_rate, t - 1), _at(weight_decay, t - 1)
        correction = math.sqrt(1 - b2**t) / (1 - b1**t)
        for p in theta:
            m[p] = b1 * m[p] + (1 - b1) * g[p]
            v[p] = b2 * v[p] + (1 - b2) * g[p] ** 2
            v_max[p] = np.maximum(v_max[p], v[p])
            root = np.sqrt(v_max[p] if amsgrad else v[p])
            step = scale[p] * correction * m[p] / (root + eps)
            theta[p] = theta[p] - lr * (step + wd * _decays(mask, p) * theta[p])
        trajectory.append(_copy(theta))
    return trajectory


def connection_scales(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scaling: str,
    strength: float | None = None,
    units: str = "module",
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """The multiplier S of every leaf."""
    overrides = overrides or {}
    unit_of = {p: p if units == "leaf" else _unit_of(p, shapes) for p in shapes}
    connections: dict[str, float] = {}
    counted = []  # the units with connections: median and extremes are taken over them
    for unit in dict.fromkeys(unit_of.values()):
        kernels = [
            math.prod(shapes[p]) for p in shapes if unit_of[p] == unit and len(shapes[p]) > 1
        ]
        if kernels:
            counted.append(unit)
        if kernels or units == "leaf":
            connections[unit] = sum(kernels)
    for unit, override in overrides.items():
        if "connections" in override:
            connections[unit] = override["connections"]
            counted += [] if unit in counted else [unit]
    order = list(connections) if units == "leaf" else sorted(connections, key=_natural)

    sizes = [connections[unit] for unit in counted]
    scale = {}
    depths = {unit: overrides.get(unit, {}).get("depth", i) for i, unit in enumerate(order)}
    levels = 1 + max(depths.values(), default=0)
    for unit, depth in depths.items():
        if scaling == "depth":
            s = 1.0 if strength is None else strength
            scale[unit] = (1 + s) ** ((levels - (1 + depth)) / levels)
            continue
        x = _deviation(connections[unit], sizes)
        if scaling == "additive":
            scale[unit] = 1 + (0.95 if strength is None else strength) * x
        else:
            s = 5.0 if strength is None else strength
            scale[unit] = s ** abs(x) if scaling == "multiplicative" else s**x
    scale |= {unit: o["scale"] for unit, o in overrides.items() if "scale" in o}
    return {p: scale.get(unit_of[p], 1.0) for p in shapes}


def _unit_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The module; of several kernels in it, the one with the last character of the name."""
    module = name.split("/")[:-1]
    kernels = [p for p in shapes if p.split("/")[:-1] == module and len(shapes[p]) > 1]
    if len(kernels) < 2:
        return "/".join(module)
    (kernel,) = [p for p in kernels if p[-1] == name[-1]]
    return kernel


def _deviation(c: float, sizes: list[float]) -> float:
    """Return 1 at the fewest connections, 0 at the median, -1 at the most, and values between."""
    if not sizes:
        return 0.0
    median, low, high = float(np.median(sizes)), min(sizes), max(sizes)
    if c <= median:
        return (median - c) / (median - low) if median > low else 0.0
    return -(c - median) / (high - median)


def _natural(path: str) -> list[list[tuple[int, int | str]]]:
    """Sorts conv2 before conv10: runs of digits compare as numbers."""
    return [
        [(0, int(run)) if run.isdigit() else (1, run) for run in re.findall(r"\d+|\D+", part)]
        for part in path.split("/")
    ]


def _copy(tensors: Mapping[str, Any]) -> Tensors:
    return {name: np.array(x, np.float64) for name, x in tensors.items()}


def _zeros(tensors: Mapping[str, Any]) -> Tensors:
    return {name: np.zeros(np.shape(x)) for name, x in tensors.items()}


def _at(value: Schedule, count: int) -> float:
    return value(count) if callable(value) else value


def _decays(mask: Mask, name: str) -> bool:
    return mask is None or mask[name]


def _norm(*tensors: np.ndarray) -> float:
    return math.sqrt(sum(np.sum(x**2) for x in tensors))


def _trust(theta: np.ndarray, step: np.ndarray) -> float:
    if _norm(theta) == 0 or _norm(step) == 0:
        return 1.0
    return min(_norm(theta) / _norm(step), 10.0)


def _over_rms(root: np.ndarray, scale_free: bool) -> np.ndarray:
    """sqrt(vhat) for the inverse step, over its tensor's sqrt(mean(vhat)) when `scale_free`."""
    if not scale_free:
        return root
    rms = math.sqrt(np.mean(root**2)) if root.size else 0.0
    return root / rms if rms > 0 else np.zeros_like(root)
