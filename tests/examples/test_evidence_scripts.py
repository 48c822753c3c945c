"""Each script of the evidence runs in small, and finds what is known beforehand.

A new script is a row of `SMOKE`.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # the scripts are no part of the product


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
            losses = [cells["test loss"][0] for cells in rows.values()]
            assert all(1.5 < loss <= 1.0001 * guess for loss in losses)
            # Losses above that of a guess are alike.
            assert max(losses) >= 0.999 * guess or rows["CaAdam"]["smallest visible"] > 1e-6
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
