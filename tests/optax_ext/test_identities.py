"""Facts that hold whatever the code: special cases that are known methods, and known numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext
from support import oracles
from support.cases import TREES, gradients, parameters, relative_errors, slow_unless, trajectory

RATE = 0.01
STEPS = 32
TREE = TREES["containers"]

Optimizer = optax.GradientTransformation


def novak(**options: Any) -> Optimizer:
    """NOVAK without its outer loop."""
    return optax_ext.novak(RATE, lookahead="none", **options)


# name: ours, and what it must be.
IDENTITIES: dict[str, tuple[Callable[[], Optimizer], Callable[[], Optimizer]]] = {
    "novak is radam": (
        lambda: novak(rectify_fallback="momentum", weight_decay=0.0),
        lambda: optax.radam(RATE),
    ),
    "novak is nesterov radam": (
        lambda: novak(rectify_fallback="momentum", nesterov="nadam", weight_decay=0.0),
        lambda: optax.radam(RATE, nesterov=True),
    ),
    "novak is adamw": (
        lambda: novak(rectify=False, weight_decay=0.1),
        lambda: optax.adamw(RATE, weight_decay=0.1),
    ),
    "novak is nadamw": (
        lambda: novak(rectify=False, nesterov="nadam", weight_decay=0.1),
        lambda: optax.nadamw(RATE, weight_decay=0.1),
    ),
    "effective decay is base decay while nothing scales the step": (
        lambda: novak(rectify=False, decay_coupling="effective", weight_decay=0.1),
        lambda: optax.adamw(RATE, weight_decay=0.1),
    ),
    "lookahead that goes all the way never looks back": (
        lambda: optax_ext.lookahead(optax.sgd(RATE, 0.9), sync_period=3, slow_step_size=1.0),
        lambda: optax.sgd(RATE, 0.9),
    ),
    "rotating is exact for a period of 1": (
        lambda: optax_ext.novak(RATE, weight_decay=0.0, lookahead="rotating", sync_period=1),
        lambda: optax_ext.novak(RATE, weight_decay=0.0, lookahead="exact", sync_period=1),
    ),
    "vradam without penalty is adamw": (
        lambda: optax_ext.vradam(RATE, beta3=0.0, weight_decay=0.1),
        lambda: optax.adamw(RATE, weight_decay=0.1),
    ),
    "saturated vradam is adamw at a smaller rate": (
        lambda: optax_ext.vradam(RATE, beta3=1e9, lr_cutoff=4.0, weight_decay=0.1),
        lambda: optax.adamw(RATE / 5, weight_decay=0.1),
    ),
    "dualadam that switches at once is adam": (
        lambda: optax_ext.dualadam(RATE, switch_rate=1.0),
        lambda: optax.adam(RATE),
    ),
    "dualadam that never switches is invadam": (
        lambda: optax_ext.dualadam(RATE, switch_rate=0.0, weight_decay=0.1),
        lambda: optax_ext.invadam(RATE, weight_decay=0.1),
    ),
    "fame without a cascade is adam": (
        lambda: optax_ext.fame(RATE, b3=0.0, b5=0.0),
        lambda: optax.adam(RATE),
    ),
}


@pytest.mark.parametrize("name", slow_unless(list(IDENTITIES)[::2], IDENTITIES))
def test_identity(name):
    """The identity holds in both precisions; the other side is always in float64.

    In float32 Optax's own `1 - b**t` costs up to 6e-5, RAdam's rho more.
    """
    ours, other = IDENTITIES[name]
    problem = parameters(TREE), gradients(TREE, STEPS)
    with jax.enable_x64(True):
        expected = trajectory(other(), *problem)
        wide = trajectory(ours(), *problem)
    assert max(relative_errors(wide, expected)) <= 1e-12
    assert max(relative_errors(wide, expected, start=problem[0])) <= 1e-10
    narrow = trajectory(ours(), *jax.tree.map(np.float32, problem))
    assert max(relative_errors(narrow, expected)) <= 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("fast", [optax.sgd(RATE, 0.9), optax.adamw(RATE)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("period", [1, 5])
def test_lookahead_is_optax_lookahead(fast, period):
    params, grads = parameters(TREE), gradients(TREE, STEPS)
    arguments = {"sync_period": period, "slow_step_size": 0.3}
    ours = trajectory(optax_ext.lookahead(fast, **arguments), params, grads)
    pairs = optax.LookaheadParams.init_synced(params)
    theirs = trajectory(optax.lookahead(fast, **arguments), pairs, grads)
    assert max(relative_errors(ours, theirs.fast)) <= 1e-12


def history(optimizer: Optimizer, params: Any, grads: Any) -> tuple[Any, Any]:
    """Updates and states of all steps, with the parameters held where they are."""

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, (updates, state)

    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    return jax.jit(lambda state: jax.lax.scan(step, state, grads)[1])(optimizer.init(params))


def test_full_path_is_fast_path_while_nothing_scales():
    """Parameters at zero have no trust ratio, and small gradients need no autoscale."""
    params = jax.tree.map(np.zeros_like, parameters(TREE, dtype=np.float32))
    grads = jax.tree.map(lambda g: 0.01 * g, gradients(TREE, STEPS, dtype=np.float32))
    fast, _ = history(novak(), params, grads)
    full, states = history(novak(trust_ratio=True, autoscale=True), params, grads)
    assert max(relative_errors(full, fast)) <= 1e-6
    assert np.all(optax.tree.get(states, "autoscale") == 1)
    assert np.all(optax.tree.get(states, "trust_ratio") == 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("switch_rate", "last"), [(0.05, 18), (0.3, 2)])
def test_dualadam_past_the_switch_is_adam(switch_rate, last):
    params, grads = parameters(TREE), gradients(TREE, STEPS)
    ours, _ = history(optax_ext.dualadam(RATE, switch_rate=switch_rate), params, grads)
    adam, _ = history(optax.adam(RATE), params, grads)
    for dual, plain in zip(jax.tree.leaves(ours), jax.tree.leaves(adam), strict=True):
        np.testing.assert_allclose(dual[last:], plain[last:], rtol=1e-12)
        assert np.max(np.abs(dual[last - 1] - plain[last - 1])) > 1e-3 * RATE


def test_dualadam_past_the_switch_survives_an_inverse_step_that_overflows():
    grads = np.array([1.0, 1.0, 1e25, 1.0], np.float32)
    ours, _ = history(optax_ext.dualadam(RATE, switch_rate=0.5), np.float32(1.0), grads)
    adam, _ = history(optax.adam(RATE), np.float32(1.0), grads)
    np.testing.assert_allclose(ours[1:], adam[1:], rtol=1e-4)


@pytest.mark.parametrize("switch_rate", [0.0, 1e-4, 0.01, 0.05, 0.1, 0.3, 1 / 3, 0.5, 1.0])
def test_inverse_share(switch_rate):
    optimizer = optax_ext.dualadam(RATE, switch_rate=switch_rate)
    _, states = history(optimizer, np.float32(1.0), np.ones(110, np.float32))
    expected = np.array([oracles.inverse_share(switch_rate, t) for t in range(1, 111)])
    share = np.asarray(optax.tree.get(states, "inverse_share"))
    np.testing.assert_array_equal(share > 0, expected > 0)
    np.testing.assert_allclose(share, expected, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scaling", ["additive", "multiplicative", "signed"])
@pytest.mark.parametrize("units", ["module", "leaf"])
def test_caadam_on_a_uniform_net_is_adam(scaling, units):
    layer = {"kernel": TREES["array"], "bias": TREES["scalar"]}
    tree = {"in": layer, "mid": layer, "out": layer} if units == "module" else [TREES["array"]] * 3
    params, grads = parameters(tree), gradients(tree, STEPS)
    # Beside a root corrected or not, an eps this small is the same.
    ours = optax_ext.caadam(RATE, eps=1e-30, scaling=scaling, units=units)
    after = trajectory(ours, params, grads)
    expected = trajectory(optax.adam(RATE, eps=1e-30), params, grads)
    assert max(relative_errors(after, expected)) <= 1e-12


def impulse_response(decays: tuple[float, ...], steps: int = 500) -> np.ndarray:
    """The weights that a triple EMA gives to the gradient 0, 1, 2, … steps ago."""
    estimator = optax_ext.triple_ema(decays=decays, bias_correction="none")
    weights, _ = history(estimator, np.float64(0), np.eye(1, steps)[0])
    return np.asarray(weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("decays", "lag"),
    [((0.9,), 9.0), ((0.9, 0.3, 0.8), 12.1), ((0.9, 0.5, 0.5), 8.0), ((0.9, 0.9, 0.9), 0.0)],
)
def test_mean_lag(decays, lag):
    weights = impulse_response(decays)
    assert np.sum(weights) == pytest.approx(1, abs=1e-12)
    assert np.arange(len(weights)) @ weights == pytest.approx(lag, abs=0.05)

    ramp = np.arange(500.0)
    estimator = optax_ext.triple_ema(decays=decays, bias_correction="none")
    followed, _ = history(estimator, np.float64(0), ramp)
    assert ramp[-1] - followed[-1] == pytest.approx(lag, abs=0.05)


@pytest.mark.usefixtures("x64")
def test_equal_decays_follow_a_ramp_exactly_at_the_price_of_noise():
    plain, triple = impulse_response((0.9,)), impulse_response((0.9, 0.9, 0.9))
    assert np.arange(len(triple)) @ triple == pytest.approx(0, abs=1e-9)
    assert np.sum(plain**2) == pytest.approx(0.053, abs=5e-4)
    assert np.sum(triple**2) == pytest.approx(0.199, abs=5e-4)


DECAYS = [(0.9, 0.5, 0.5), (0.9, 0.3, 0.8), (0.999, 0.7, 0.5), (0.9, 0.9, 0.9), (0.99, 0.9)]


@pytest.mark.parametrize("decays", DECAYS, ids=str)
def test_exact_debias_reproduces_a_constant(x64, decays):
    constant = np.full(60, 3.0)
    first = optax_ext.triple_ema(decays=decays, bias_correction="exact")
    second = optax_ext.triple_ema_of_squares(decays=decays, bias_correction="exact")
    np.testing.assert_allclose(history(first, np.float64(0), constant)[0], 3.0, rtol=1e-14)
    np.testing.assert_allclose(history(second, np.float64(0), constant)[0], 9.0, rtol=1e-14)


def test_triple_ema_of_squares_is_clamped():
    impulse = np.eye(1, 60, dtype=np.float32)[0]
    decays = (0.9, 0.9, 0.9)
    raw, _ = history(
        optax_ext.triple_ema(decays=decays, bias_correction="none"), np.float32(0), impulse
    )
    second = optax_ext.triple_ema_of_squares(decays=decays, bias_correction="none")
    clamped, _ = history(second, np.float32(0), impulse)
    assert np.min(raw) < -0.01
    np.testing.assert_allclose(clamped, np.maximum(raw, 0), atol=1e-8)


@pytest.mark.parametrize("bias_correction", ["adam", "exact", "none"])
def test_fame_stays_finite_where_its_second_moment_vanishes(bias_correction):
    decays = dict.fromkeys(("b1", "b2", "b3", "b4", "b5"), 0.9)
    optimizer = optax_ext.fame(
        RATE, **decays, second_moment="tema", bias_correction=bias_correction
    )
    updates, _ = history(optimizer, np.float32(0), np.eye(1, 60, dtype=np.float32)[0])
    assert np.all(np.isfinite(updates))


def test_uncorrected_fame_overshoots_on_a_constant():
    paper = optax_ext.fame(
        1.0, b3=0.3, b4=0.7, b5=0.8, second_moment="tema", bias_correction="none"
    )
    steps, _ = history(paper, np.float32(0), np.ones(60, np.float32))
    assert steps[0] == pytest.approx(-2.2, abs=0.05)
    assert np.argmin(steps) + 1 == 22
    assert np.min(steps) == pytest.approx(-5.4, abs=0.05)


def test_rectification_numbers():
    """The numbers are right in float32 too, where the plain formula gives rho_6 = 6.00049."""
    optimizer = novak(rectify_fallback="momentum")
    _, states = history(optimizer, np.float32(1), np.ones(10, np.float32))
    rho = optax.tree.get(states, "sma_length")
    np.testing.assert_allclose(rho[4:6], [4.995998, 5.994164], rtol=1e-6)
    r = optax.tree.get(states, "rectification")
    np.testing.assert_array_equal(r[:5], 1)
    published = [0.025821, 0.032739, 0.038738, 0.044105, 0.048998]
    np.testing.assert_allclose(r[5:10], published, atol=5e-7)


@pytest.mark.parametrize("b2", [0.7, 0.9, 0.99, 0.999, 0.9999])
def test_rectification_keeps_float32_precision(b2):
    steps, states = history(optax_ext.rectify(b2=b2), np.float32(0), np.ones(3000, np.float32))
    expected = [oracles.rectification(b2, t) for t in range(1, 3001)]
    np.testing.assert_allclose(optax.tree.get(states, "rectification"), expected, rtol=1e-6)
    np.testing.assert_allclose(steps, expected, rtol=1e-6)
