"""The parts of the evidence: estimates, curvatures, tuning, networks and controls."""

from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

import optax_ext


def test_intervals(load_module):
    estimates = load_module("_estimates")
    # Student's quantile for one degree of freedom is 12.706, the standard error here 1/2.
    assert estimates.mean([0, 1]) == pytest.approx((0.5, 0.5 - 6.353, 0.5 + 6.353), abs=1e-3)
    assert np.isnan(estimates.mean([3.0])[1:]).all()
    # Wilson's: z² / (n + z²) is the upper end where none succeeds.
    assert estimates.share([False] * 10) == pytest.approx((0, 0, 0.27753), abs=1e-4)


def test_estimates_of_the_other_sign(load_module):
    estimates = load_module("_estimates")
    gain = estimates.Estimate(1.0, -1.0, 3.0)
    assert -gain == (-1.0, -3.0, 1.0)
    assert gain.smallest_seen == pytest.approx(2.8)
    assert estimates.signed(-gain, 1) == "-1.0 [-3.0, +1.0]"
    assert estimates.exact(2.0) == (2.0, 2.0, 2.0)


def test_smallest_effect_is_seen_in_four_of_five_studies(load_module):
    estimates = load_module("_estimates")
    random = np.random.default_rng(0)
    samples = random.normal(size=(2000, 10))
    # Seen by an average study; each study has its own interval.
    effect = np.mean([estimates.mean(x).smallest_seen for x in samples[:200]])
    seen = np.mean([estimates.mean(x + effect).low > 0 for x in samples])
    assert seen == pytest.approx(0.8, abs=0.04)


def test_minima_of_the_landscapes(load_module):
    for name, landscape in load_module("landscapes").LANDSCAPES.items():
        value, slope = jax.value_and_grad(landscape.loss)(jnp.array(landscape.minimum, float))
        assert value == 0, name
        np.testing.assert_allclose(slope, 0, atol=1e-4)
    valley = jax.hessian(load_module("landscapes").valley)(jnp.zeros(2))
    np.testing.assert_allclose(np.linalg.eigvalsh(valley), [1, 1000], rtol=1e-5)


def test_rates_are_chosen_and_judged_by_other_starts(load_module):
    landscapes = load_module("landscapes")

    def run(trials, starts):
        rates, cosine = trials
        # The second rate with a cosine is best where rates are chosen, and worst elsewhere.
        best = (rates == 2.0) & cosine
        to_choose = jnp.arange(len(starts)) <= (len(starts) - 1) // 2
        losses = jnp.where(best[:, None] == to_choose[None], 1e-3, 10.0)
        return losses, starts[None, :1] * rates[:, None, None]

    landscape = landscapes.LANDSCAPES["valley"]
    found = landscapes.tune_and_run(run, landscape, jnp.array([1.0, 2.0, 3.0]), starts=5)
    assert (found.rate, found.cosine, found.at_edge) == (2.0, True, False)
    np.testing.assert_allclose(found.losses, 10.0)
    np.testing.assert_allclose(found.path, [landscape.shown, 2 * np.array(landscape.shown)])


def test_curvatures_are_those_of_the_whole_hessian(load_module):
    curvature = load_module("_curvature")
    params = curvature.initialize_smooth(jax.random.key(0), [3, 4, 2])
    x, y = jax.random.normal(jax.random.key(1), (2, 5, 3)), jnp.ones((5, 2))

    def loss(params):
        return jnp.mean((curvature.apply_smooth(params, x[0]) - y) ** 2)

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    whole = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    whole = np.asarray(whole, np.float64)
    found = jax.jit(partial(curvature.sharpness, loss))(params)
    assert found == pytest.approx(np.linalg.eigvalsh(whole)[-1], rel=1e-4)

    nu = jax.random.uniform(jax.random.key(2), flat.shape, minval=0.1)
    scale = curvature.scale_of_adam(unravel(nu), 3, b1=0.9, b2=0.99, eps=1e-3)
    p = (1 - 0.9**3) * (np.sqrt(np.asarray(nu, np.float64) / (1 - 0.99**3)) + 1e-3)
    found = jax.jit(partial(curvature.sharpness, loss))(params, scale)
    assert found == pytest.approx(np.linalg.eigvals(whole / p[:, None]).real.max(), rel=1e-4)


def test_published_formats_have_the_codes_of_their_papers(load_module):
    script = load_module("low_precision")
    unsigned, signed = script.dynamic_map(signed=False), script.dynamic_map(signed=True)
    for numbers in (unsigned, signed):
        assert len(np.unique(numbers)) == 256
        assert numbers.max() == 1
    # The smallest are the centers of a decade's halves, or of the whole decade.
    np.testing.assert_allclose(unsigned[:3], [0, 0.325e-6, 0.775e-6], rtol=1e-6)
    np.testing.assert_allclose(np.abs(signed[126:129]), [0.55e-6, 0, 0.55e-6], rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (4, 256))
    for function, codes in ((script.linear_codes, 256), (script.softsign_codes, 255)):
        y = jnp.linspace(0 if codes == 256 else -1, 1, 100_000)
        assert len(np.unique(np.asarray(function(y)).round(6))) == codes
    for ours in (script.flash_first(x), script.dynamic(x, signed=True)):
        assert float(jnp.abs(ours - x).max() / jnp.abs(x).max()) < 0.02
    for ours in (script.flash_second(x**2), script.dynamic(x**2, signed=False)):
        assert float(jnp.abs(ours - x**2).max() / (x**2).max()) < 0.02


@pytest.mark.parametrize(("times_edge", "stable"), [(0.99, True), (1.01, False)])
def test_edge_of_adam(load_module, times_edge, stable):
    # What Adam becomes where P has settled, on a parabola: momentum, and a rate.
    rate = times_edge * load_module("_full_batch").OF_ADAM
    tx = optax.chain(optax_ext.ema(decay=0.9, bias_correction="none"), optax.scale(-rate))

    def step(run, _):
        x, state = run
        update, state = tx.update(x, state)
        return (x + update, state), None

    (x, _), _ = jax.lax.scan(step, (jnp.ones(()), tx.init(jnp.ones(()))), length=3000)
    assert (abs(x) < 1e-2) == stable


def test_batches_of_an_epoch_are_disjoint(load_module):
    networks = load_module("_networks")
    batches = networks.draw_batches(0, steps=5, images=130)
    assert batches.shape == (5, networks.BATCH)
    assert len(np.unique(batches[:2])) == len(np.unique(batches[2:4])) == 2 * networks.BATCH
    assert (batches != networks.draw_batches(1, steps=5, images=130)).any()


# Of peaks and of the loss's logarithm: AdamW's, the gate's, and a slow AdamW's.
@pytest.mark.parametrize(
    ("adamw", "gated", "slow", "verdict"),
    [
        ((0.8, -3.5), (0.1, -3.2), (0.3, -3.0), "HOLDS"),
        ((0.8, -3.5), (0.1, -3.2), (0.3, -3.4), "ONLY_UNTUNED"),
        ((0.8, -3.5), (0.1, -3.2), (0.0, -3.0), "ONLY_UNTUNED"),
        ((0.1, -3.5), (0.1, -3.2), (0.3, -3.0), "NOT_SEEN"),
    ],
)
def test_slow_controls_can_explain_steadiness_away(load_module, adamw, gated, slow, verdict):
    script = load_module("edge_of_stability")
    seeds = np.linspace(-0.01, 0.01, 8)

    def measured(peaks, loss):
        found = dict.fromkeys((*script.CURVATURES, script.MEAN_OF_RATES), 1 + seeds)
        return found | {script.PEAKS: peaks + seeds**2, script.LOSS: loss + seeds**3}

    edge = {name: measured(*adamw) for name in script.STYLES}
    edge |= dict.fromkeys(script.SLOW, measured(0.3, -3.0)) | {script.STRONGER: measured(*gated)}
    edge[script.COSINE] = measured(*slow)
    assert script.judge_steadiness(edge).verdict == load_module("_verdicts").Verdict[verdict]


@pytest.mark.parametrize(
    ("at", "low", "high", "verdict"),
    [
        (1.0, 0.95, 1.05, "HOLDS"),
        (1.0, 0.85, 1.15, "NOT_SEEN"),
        (0.5, 0.4, 0.6, "REFUTED"),
        (1.3, 1.2, 1.4, "REFUTED"),
        (1.0, np.nan, np.nan, "NOT_SEEN"),
    ],
)
def test_at_the_edge(load_module, at, low, high, verdict):
    found = load_module("edge_of_stability").judge_edge(
        load_module("_estimates").Estimate(at, low, high)
    )
    assert found == load_module("_verdicts").Verdict[verdict]


def test_curvatures_are_compared_at_equal_losses(load_module):
    script, edges = load_module("curvature_and_loss"), load_module("_full_batch")

    def run(loss: list[float], curvature: list[float]) -> Any:
        steps = np.repeat(np.array(loss), edges.MEASURED_EVERY)
        return edges.Run(steps, steps, np.array(curvature), 10 * np.array(curvature))

    # The slower one ends at a loss of 2, which the other has at its second measurement.
    slow, fast = run([4, 3, 2], [1, 10, 1000]), run([4, 2, 1], [1, 10, 1e9])
    found = script.where_losses_are_equal([slow] * 8, [fast] * 8)
    assert found == dict.fromkeys((script.OF_H, script.OF_BOTH), pytest.approx((2, 2, 2)))


def test_what_diverges_is_not_best(load_module):
    losses = np.array([[np.nan, 0.1], [1e9, 0.1], [5.0, 5.0], [6.0, 5.0]])
    assert load_module("_tuning").best(losses) == 2


def test_no_seed_chooses_its_own_rate(load_module):
    # The second rate is so much better for the first seed that all others take it.
    losses = np.array([[1.0, 0.1, 0.1], [0.0, 0.2, 0.2]])
    assert load_module("_tuning").best_on_others(losses).tolist() == [0, 1, 1]


def test_trainings_side_by_side_are_those_alone(load_module):
    digits, plain_depth = load_module("_digits"), load_module("plain_depth")
    network = plain_depth.make_network(2)
    train = partial(digits.train, network, plain_depth.radam, steps=3, batch=8)
    both = train([[1e-3], [1e-2]], [0, 1])
    assert both.test.shape == both.accuracy.shape == (2, 2)
    assert both.params["hidden"]["kernel"].shape == (2, 2, 1, 3, 3, 4, 4)
    alone = train([1e-2], [1])
    among = jax.tree.map(lambda x: x[1, [1]], both)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), alone, among)


@pytest.mark.parametrize(
    ("layer", "side", "strides", "padding", "kernel"),
    [("convolve", 4, (1, 1), "SAME", (3, 3, 4, 4)), ("embed", 8, (2, 2), "VALID", (2, 2, 1, 4))],
)
def test_convolutions_as_products(load_module, layer, side, strides, padding, kernel):
    convnet = load_module("plain_depth")
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=kernel), "bias": random.normal(size=4)}
    x = random.normal(size=(2, side, side, kernel[2]))
    named = "NHWC", "HWIO", "NHWC"
    expected = jax.lax.conv_general_dilated(
        x, params["kernel"], strides, padding, dimension_numbers=named
    )
    found = getattr(convnet, layer)(params, jnp.reshape(x, (2, -1, kernel[2])))
    expected = np.asarray(expected).reshape(found.shape) + params["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_radam_decays_like_novak(load_module):
    plain_depth = load_module("plain_depth")
    as_radam = plain_depth.novak_with(lookahead="none", rectify_fallback="momentum")

    def descend(factory):
        tx, x = factory(0.1), jnp.array([1.0, -2.0])
        state = tx.init(x)
        for _ in range(8):
            updates, state = tx.update(2 * x, state, x)
            x = x + updates
        return x

    # Optax has the rectification in float32, which is 4e-4 off where it begins.
    np.testing.assert_allclose(descend(plain_depth.radam), descend(as_radam), rtol=1e-3)


@pytest.mark.parametrize("barrier", [1.5, 5.5])
def test_barriers_of_escape_times(load_module, barrier):
    wells = load_module("escapes")

    def density(z, y):
        return np.exp((np.cos(z) - np.cos(y)) * barrier / 2) * barrier / 2

    time = integrate.dblquad(density, 0, wells.PASSED, 0, lambda y: y)[0]
    assert wells.barrier_of(time) == pytest.approx(barrier, rel=2e-3)
