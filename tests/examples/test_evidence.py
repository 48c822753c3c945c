"""The evidence in small: each script runs, and finds what is known beforehand; pages show it.

A new script is a row of `SMOKE`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

import optax_ext

pytestmark = pytest.mark.slow  # the scripts are no part of the product
FOLDER = Path(__file__).parents[2] / "examples" / "evidence"


def check_lag(tables: dict[str, Any]) -> None:
    (rows,) = tables.values()
    for name, cells in rows.items():
        assert cells["lag"] == pytest.approx(cells["by formula"], abs=1e-3), name
        assert cells["noise"][0] == pytest.approx(cells["noise, by formula"], rel=0.15), name
    assert rows["EMA .9 (Adam)"]["by formula"] == pytest.approx(9)
    # 9 - 2 · 3/7 + 7/3.
    assert rows["TEMA .9 .3 .7 (configurations)"]["by formula"] == pytest.approx(10.476, abs=5e-3)
    assert rows["TEMA .9 .9 .9 (equal)"]["noise, by formula"] == pytest.approx(0.199, abs=5e-4)


def check_landscapes(tables: dict[str, Any]) -> None:
    assert [title.partition(",")[0] for title in tables] == ["Rosenbrock", "Rastrigin", "valley"]
    for rows in tables.values():
        assert rows["adamw"]["difference from AdamW"] == [0, 0, 0]
        # All have found a rate that leads down; the starts' mean is about 100, 40, 300.
        assert all(cells["log10 of the loss"][0] < 1.4 for cells in rows.values())
        # On one tensor CaAdam is Adam, but for the place of its epsilon.
        difference = rows["caadam"]["difference from AdamW"]
        assert difference == pytest.approx([0, 0, 0], abs=1e-2)


def check_edge_of_stability(tables: dict[str, Any]) -> None:
    curvature, loss = tables.values()
    adamw, gated, strong, slower, replayed, cosine, quarter, eighth, _ = curvature.values()
    rate, of_edge, of_own = "mean rate / α", "curvature / edge", "curvature / own edge"
    assert adamw[rate] == [1, 1, 1]
    assert 1 / 11 <= strong[rate][0] < gated[rate][0] < 1
    # Two seeds follow each the other's gate.
    assert slower[rate] == pytest.approx(strong[rate], rel=1e-3)
    assert replayed[rate] == pytest.approx(strong[rate], rel=1e-3)
    # A cosine over 100 steps that begins at 1 and would be 0 after them.
    assert cosine[rate] == pytest.approx([0.505] * 3, rel=1e-3)
    assert all(0 < cells[of_edge][0] <= cells["highest / edge"][0] for cells in curvature.values())
    assert strong[of_own][0] < strong[of_edge][0]
    assert adamw[of_own] == adamw[of_edge]
    for cells, share in ((quarter, 1 / 4), (eighth, 1 / 8)):
        assert cells[rate] == pytest.approx([share] * 3)
        assert cells[of_own][0] == pytest.approx(share * cells[of_edge][0], rel=1e-3)
    assert all(cells["peaks, decades"][0] >= 0 for cells in loss.values())


def check_curvature_and_loss(tables: dict[str, Any]) -> None:
    figure, settings = tables.values()
    adam, same_rate, gated = figure
    assert figure[adam]["mean rate"] == pytest.approx([1e-3] * 3)
    assert figure[same_rate]["mean rate"] == pytest.approx([2e-3] * 3)
    # A cutoff of 19.
    assert 2e-3 / 20 <= figure[gated]["mean rate"][0] < 2e-3
    baseline, best = settings[adam], settings["AdamW, best trial"]
    assert baseline["from AdamW at 0.001"] == best["from AdamW at its best"] == [0, 0, 0]
    reverse = best["from AdamW at 0.001"]
    assert baseline["from AdamW at its best"] == pytest.approx(
        [-x for x in reverse[:1] + reverse[:0:-1]]
    )
    published = settings["VRAdam, setting for CIFAR-10"]
    assert (published["rate"], published["beta3"]) == ("0.0846", "1.015")


def check_connections(tables: dict[str, Any]) -> None:
    tuned, untuned = tables.values()
    # Weights of the kernels in order of depth, and biases: 1 for each of a layer's outputs.
    sizes = {0: 72 + 8, 1: 576 + 8, 2: 576 + 8, 3: 1152 + 16 + 128 + 16, 4: 2304 + 16, 5: 160 + 10}
    by_depth = sum(n * 2 ** ((5 - d) / 6) for d, n in sizes.items()) / sum(sizes.values())
    assert tuned["depth, by computation"]["mean scale"] == pytest.approx(by_depth, abs=1e-3)
    # One scale for all kernels and one for all biases, as in the authors' network.
    kernels, biases = np.array([4968, 82]) / 5050
    for name, scales in {
        "additive, as it ran, CIFAR-10": (1.92, 2.0),
        "additive, as it ran, CIFAR-100": (1.18, 2.0),
        "multiplicative, as it ran, CIFAR-10": (4.75, 5.6),
        "multiplicative, as it ran, CIFAR-100": (1.36, 5.5),
    }.items():
        mean = kernels * scales[0] + biases * scales[1]
        assert tuned[name]["mean scale"] == pytest.approx(mean, abs=1e-3)
    for rows in (tuned, untuned):
        assert rows["Adam"]["difference from Adam"] == rows["Adam"]["from control"] == [0, 0, 0]
        # Almost one scale for all: little but a rate.
        for name in ("additive", "multiplicative"):
            assert abs(rows[f"{name}, as it ran, CIFAR-10"]["from control"][0]) < 0.02


def check_escapes(tables: dict[str, Any]) -> None:
    (rows,) = tables.values()
    for name, cells in rows.items():
        # By H^-p from 5.5 in the widest well, 2.5 times as wide; DualAdam's is between them.
        p = cells["p, theory"]
        theory = 5.5 * (2.5**-p if p != "-" else 2 / (2.5**1.5 + 2.5**0.5))
        assert cells["sharpest, theory"] == pytest.approx(theory, rel=1e-3), name
        assert cells["sharpest"][0] == pytest.approx(theory, rel=0.2), name


def check_flat_minima(tables: dict[str, Any]) -> None:
    sharpness, generalization = tables.values()
    assert sharpness.keys() == generalization.keys()
    for length in (100, 500):
        # The inverse term is a thousandth of a step, or a large part of it.
        plain = sharpness[f"DualAdam {length}"]
        assert abs(plain["difference in decades"][0]) < 0.01
        assert float(plain["inverse term"]) < 0.1
        shares = [
            float(cells["inverse term"])
            for name, cells in sharpness.items()
            if name.startswith(f"DualAdam {length},")
        ]
        assert len(shares) == 3
        assert min(shares) > 0.3
        assert sharpness[f"Adam, warm-up {length}"]["inverse term"] == "-"


def check_plain_depth(tables: dict[str, Any]) -> None:
    (rows,) = tables.values()
    assert len(rows) == 12
    assert rows["NOVAK"]["from NOVAK"] == [0, 0, 0]
    # After one step nothing is learnt.
    assert all(5 < cells["accuracy, %"][0] < 30 for cells in rows.values())
    assert all(cells["trained"][0] == 0 for cells in rows.values())


def check_low_precision(tables: dict[str, Any]) -> None:
    of_adam, of_all = tables.values()
    for column in ("error, steady", "error, fallen"):
        errors = {name: cells[column][0] for name, cells in of_adam.items()}
        # A bfloat16 is within 2^-9 of v, and the root halves that; 8 bits are coarser.
        assert 0 < errors["v in bfloat16, nearest"] < 0.02
        assert errors["v in bfloat16, nearest"] < errors["ours"] < 0.2
        assert errors["v in linear uint8"] > 1
        # The same update.
        for name in ("AdamW", "CaAdam"):
            assert of_all[name][column][0] == pytest.approx(errors["ours"], rel=0.15), name
        assert of_all["InvAdam"][column][0] < errors["ours"]
        # Weighted otherwise, since its steps grow until they are Adam's.
        assert 0 < of_all["DualAdam"][column][0] < 0.13
    # The elements of a sign are all 1.
    assert of_all["Lion"]["largest, steady"] == [1, 1, 1]


def check_low_precision_training(tables: dict[str, Any]) -> None:
    text = tables.pop("Text")
    assert len(tables) >= 2  # more if a difference is too large for few seeds
    for rows in tables.values():
        for cells in rows.values():
            # Few steps, so codes are all that differs; whole groups of 64 have a float32 scale.
            assert cells["loss, stored"][0] == pytest.approx(cells["loss, float32"][0], rel=0.02)
        if "AdamW" in rows:
            assert rows["AdamW"]["bytes of state, float32"] == pytest.approx(8, abs=0.01)
            assert 2 + 8 / 64 < rows["AdamW"]["stored"] < 2.3
    assert text["Python's standard library"]["bytes"] > 1e6


def check_study(tables: dict[str, Any]) -> None:
    sizes = tables.pop("Workloads")
    # Layers of 40 × 128, 128 × 128 and 128 × 10 with biases.
    assert sizes["MNIST-1D, perceptron, 1×"]["parameters"] == f"{5248 + 16512 + 1290:,}"
    assert sizes["MNIST-1D, perceptron, 4×"]["steps"] == "20"
    # Two tables for each workload, and one where settings are chosen.
    assert len(tables) == 2 * len(sizes) + 2
    for title, rows in tables.items():
        if "at the end" in title:
            assert list(rows) == ["AdamW", "CaAdam"]
            # Hardly more is known than by a guess, because nothing is learnt yet.
            guess = sizes[title.partition(", 8 seeds")[0]]["loss of a guess"]
            shares = [cells["test loss"][0] / guess for cells in rows.values()]
            assert all(0.7 < share <= 1.0001 for share in shares)
            # Losses above that of a guess are alike.
            assert max(shares) >= 1 or rows["CaAdam"]["smallest visible"] > 1e-6
        elif "8-bit" in title:
            (cells,) = rows.values()
            assert abs(cells["difference"][0]) < 0.05 * cells["spread of searches and seeds"] + 1e-3
            assert cells["bytes a parameter"] < 3
            assert cells["of float32 state"] == pytest.approx(8, abs=0.01)
        else:
            assert {cells["trials"] for cells in rows.values()} == {"8 × 2"}
            assert rows["AdamW"]["bytes a parameter"] == pytest.approx(8, abs=0.01)


class Smoke(NamedTuple):
    """A script in small.

    Attributes:
      options: that make it quick.
      check: raises unless its tables are right.
      contenders: the only ones to judge; all if there are none.
    """

    options: list[str]
    check: Callable[[dict[str, Any]], None]
    contenders: tuple[str, ...] = ()


SMOKE = {
    # As many runs to search as to judge, so that each optimizer is compiled once.
    "connections": Smoke(["--seeds=4", "--trials=1", "--steps=3"], check_connections),
    "curvature_and_loss": Smoke(
        ["--seeds=2", "--trials=1", "--steps=100", "--images=32", "--rates=2"],
        check_curvature_and_loss,
    ),
    "edge_of_stability": Smoke(
        ["--seeds=2", "--steps=100", "--images=32"], check_edge_of_stability
    ),
    "escapes": Smoke(["--groups=2", "--trajectories=100", "--patience=8000"], check_escapes),
    "flat_minima": Smoke(["--seeds=4", "--trials=1", "--steps=20"], check_flat_minima),
    "lag": Smoke(["--seeds=8", "--steps=1000"], check_lag),
    "landscapes": Smoke(["--starts=8", "--steps=60", "--rates=12"], check_landscapes),
    "low_precision": Smoke(["--seeds=2", "--steps=50"], check_low_precision),
    "low_precision_training": Smoke(
        ["--seeds=2", "--steps=10"], check_low_precision_training, ("AdamW", "NOVAK")
    ),
    "plain_depth": Smoke(["--depths=1", "--seeds=2", "--steps=1"], check_plain_depth),
    "study": Smoke(["--smoke"], check_study),
}


@pytest.mark.parametrize("name", SMOKE)
def test_script(load_module, tmp_path, capsys, monkeypatch, name):
    options, check, contenders = SMOKE[name]
    script = load_module(name)
    if contenders:
        chosen = {contender: script.CONTENDERS[contender] for contender in contenders}
        monkeypatch.setattr(script, "CONTENDERS", chosen)
    script.main([*options, f"--out={tmp_path}"])
    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    check(found["tables"])
    printed = " ".join(capsys.readouterr().out.split())
    for finding in found["findings"]:
        assert finding["claim"] in printed
        assert f"{finding['verdict']}: {finding['shown']}" in printed
    for figure in found["figures"]:
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_every_script_is_tested_and_has_results(load_module):
    scripts = {path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_")}
    assert scripts - {"summary"} == SMOKE.keys() == set(load_module("summary").SCRIPTS)
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} == SMOKE.keys()


@pytest.mark.parametrize("name", SMOKE)
def test_results_are_of_a_whole_run(load_module, name):
    found = json.loads((FOLDER / f"results/{name}.json").read_text(encoding="utf-8"))
    assert all((FOLDER / "results" / figure).is_file() for figure in found["figures"])
    results, script = load_module("_results"), load_module(name)
    options = script.make_parser().parse_args([])
    assert found["options"] == results.decisive(options, getattr(script, "NOT_DECISIVE", ()))
    assert found["constants"].keys() == script.CONSTANTS.keys()
    for constant, value in script.CONSTANTS.items():
        np.testing.assert_allclose(found["constants"][constant], value, err_msg=constant)


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


def test_pages_show_the_results(load_module):
    summary = load_module("summary")
    for path, text in summary.pages(summary.load(FOLDER / "results")).items():
        assert path.read_text(encoding="utf-8") == text, path
