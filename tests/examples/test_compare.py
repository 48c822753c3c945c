"""The main job, `examples/compare.py`, in small: command line, data, results."""

import json
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--epochs=1", "--trials=2", "--seeds=2"]


@pytest.fixture
def compare(load_module) -> ModuleType:
    return load_module("compare")


def some_images(**changes):
    """Arrays as a user's file would hold them: 3 classes of 10 coloured images each."""
    rng = np.random.default_rng(0)
    y = np.repeat([3, 5, 40], 10)
    x = rng.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
    return {"x": x, "y": y} | changes


def write(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_own_images_with_a_control_as_chain_and_fused(compare, tmp_path, capsys):
    data = write(tmp_path / "own.npz", **some_images())
    arguments = [f"--data={data}", "--methods=dualadam", *SMALL]
    compare.main([*arguments, f"--out={tmp_path / 'new'}"])
    printed = capsys.readouterr().out
    assert "own.npz, 30 of 6 × 5 × 3 in 3 classes" in printed
    assert "(Adam, warm-up)" in printed
    assert not re.search(r"…\s", printed)  # no cell is cut
    assert max(map(len, printed.splitlines()[:-1])) <= 100  # the last has the path
    assert "Fused:" not in printed
    assert (tmp_path / "new/compare.png").read_bytes().startswith(b"\x89PNG")

    results = json.loads((tmp_path / "new/compare.json").read_text())["results"]
    assert list(results) == ["adamw", "dualadam", "warm_up"]
    for result in results.values():
        losses = {
            float(rate): np.median(runs["validation_loss"])
            for rate, runs in result["tuning"].items()
        }
        assert list(losses) == [5e-3, 1e-2]
        assert losses[result["learning_rate"]] == min(losses.values())
        assert len(result["test_accuracy"]) == len(result["test_loss"]) == 2

    compare.main([*arguments, f"--out={tmp_path / 'fused.png'}", "--fused"])
    assert "which on this cpu runs the chains themselves" in " ".join(
        capsys.readouterr().out.split()
    )
    fused = json.loads((tmp_path / "fused.json").read_text())["results"]
    for result in (*results.values(), *fused.values()):
        assert result.pop("ms_per_step") > 0
    assert fused == results


@pytest.mark.slow
def test_one_run_of_a_baseline(compare, tmp_path, capsys):
    data = write(tmp_path / "own.npz", **some_images())
    options = ["--methods=adamw", "--epochs=1", "--trials=1", "--seeds=1"]
    compare.main([f"--data={data}", f"--out={tmp_path}", *options])
    assert (tmp_path / "compare.png").exists()
    assert "control" not in capsys.readouterr().out


def test_rates_are_round_and_around_the_middle(compare):
    adamw = compare.CONTENDERS["adamw"]
    assert adamw.rates(8) == [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    assert compare.CONTENDERS["invadam"].rates(1) == [1]


def test_no_contender_decays_weights(compare):
    params = {"kernel": jnp.ones((2, 2))}
    for contender in compare.CONTENDERS.values():
        tx = contender.factory(optax.constant_schedule(1.0))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        np.testing.assert_array_equal(updates["kernel"], 0)


def test_table_of_a_made_up_comparison(load_module):
    def result(label, rate, losses, control_of=None):
        tuning = {"0.01": {"test_loss": [0.1, 0.1, 0.4]}, "0.02": {"test_loss": [0.3, 0.3, 0.1]}}
        return {
            "label": label,
            "control_of": control_of,
            "learning_rate": rate,
            "tuning": {"0.005": {"test_loss": [0.2, 0.2, 0.2]}, **tuning},
            "test_loss": losses,
            "test_accuracy": [0.9, 0.97, 0.98],
            "ms_per_step": 1.26,
        }

    results = {
        "adamw": result("AdamW", 0.01, [0.1, 0.2, 0.4]),
        "warm_up": result("Adam, warm-up", 0.005, [0.05, 0.3, 0.1], control_of="dualadam"),
    }
    plan = {"trials": 3, "tuning_seeds": 3, "seeds": 3}
    comparison = load_module("_comparison")
    adamw, control = comparison.cells({"plan": plan, "results": results})
    assert adamw == {
        "optimizer": "AdamW",
        "best rate": "0.01",
        "usable rates": "0.005–0.01",
        "test loss": "0.20 (0.10–0.40)",
        "minus AdamW's": "–",
        "test accuracy": "97 %",
        "ms per step": "1.3",
    }
    assert control["optimizer"] == "(Adam, warm-up)"
    assert control["best rate"] == "0.005*"
    assert control["minus AdamW's"] == "−0.05 (−0.30…+0.10)"
    explained = " ".join(comparison.notes({"plan": plan, "results": results}))
    assert all(column in explained for column in list(adamw)[1:5])
    assert "75 % confidence" in explained


BAD_ARRAYS = {
    "no y": ({"y": None}, "lacks y, has x"),
    "flat images": ({"x": np.zeros((30, 64))}, r"x must have shape .* got \(30, 64\)"),
    "one-hot labels": ({"y": np.eye(30, dtype=int)}, r"y must have shape \(N,\), got \(30, 30\)"),
    "lengths": ({"y": np.arange(29)}, "x has 30 images, but y has 29 labels"),
    "float labels": ({"y": np.ones(30)}, "y must hold integers, got float64"),
    "text": ({"x": np.full((30, 2, 2), "a")}, "x must hold integers or floats, got <U1"),
    "pickled": ({"x": np.full((30, 2, 2), None)}, "unreadable: .*allow_pickle"),
    "one class": ({"y": np.zeros(30, int)}, "at least 2 classes, got 1"),
    "no images": ({"x": np.zeros((0, 2, 2)), "y": np.zeros(0, int)}, "at least 2 classes, got 0"),
    "rare class": ({"y": np.repeat([0, 7], [26, 4])}, "at least 5 images, class 7 has 4"),
    "no pixels": ({"x": np.zeros((30, 0, 2))}, "no pixels"),
    "NaN": ({"x": np.full((30, 2, 2), np.nan)}, "NaN or infinite"),
    "blank": ({"x": np.ones((30, 2, 2))}, "all pixels of x are equal"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ARRAYS.values(), ids=list(BAD_ARRAYS))
def test_bad_arrays(compare, tmp_path, capsys, changes, message):
    arrays = {key: array for key, array in some_images(**changes).items() if array is not None}
    path = write(tmp_path / "own.npz", **arrays)
    expect_exit(compare, capsys, [f"--data={path}"], message)


def test_bad_files(compare, tmp_path, capsys):
    expect_exit(compare, capsys, [f"--data={tmp_path / 'none.npz'}"], "none.npz: no such file")
    path = tmp_path / "own.npz"
    path.write_text("x, y")
    expect_exit(compare, capsys, [f"--data={path}"], "own.npz: not an .npz file")
    np.savez_compressed(path, **some_images())
    damaged = bytearray(path.read_bytes())
    damaged[100:110] = bytes(range(246, 256))
    path.write_bytes(damaged)
    expect_exit(compare, capsys, [f"--data={path}"], "own.npz: unreadable: .*decompressing")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--methods=fame,adamz", "unknown method 'adamz', choose from adamw, sgd, fame"),
        ("--seeds=0", "must be a whole number above 0, got '0'"),
        ("--epochs=2.5", "must be a whole number above 0, got '2.5'"),
        (f"--out={__file__}", "exists"),
    ],
)
def test_bad_options(compare, capsys, argument, message):
    expect_exit(compare, capsys, [argument], message)


def expect_exit(compare, capsys, argv, message):
    """The program ends with argparse's code and one line that says why."""
    with pytest.raises(SystemExit) as exit_:
        compare.main(argv)
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f": error: .*{message}", last), last


def test_splits_are_disjoint_stratified_and_rescaled(load_module, tmp_path):
    # Each image is known by its only bright pixel.
    y = np.repeat([2, 9], [100, 20])
    bright = 255 * np.eye(120, dtype=np.uint8).reshape(120, 10, 12)
    load = load_module("_data").load
    data = load(write(tmp_path / "own.npz", x=bright, y=y))
    parts = data.train, data.validation, data.test
    found = [part.images.reshape(-1, 120).argmax(axis=1) for part in parts]
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(120))
    for part, at in zip(parts, found, strict=True):
        np.testing.assert_array_equal(part.labels, y[at] == 9)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[60, 12], [20, 4], [20, 4]]
    assert [float(part.images.max()) for part in parts] == [1, 1, 1]

    data = load(write(tmp_path / "own.npz", x=bright.astype(np.int64) - 1000, y=y))
    assert data.train.images.mean() == pytest.approx(0, abs=1e-5)
    assert data.train.images.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_convolution_is_that_of_lax(load_module, strides):
    images = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 3, 4))
    padding = [(1, 1), (0, 1)]
    expected = jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = load_module("_training").convolve(images, kernel, strides, padding)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_warm_up_is_the_adam_share_of_dualadam(compare):
    # DualAdam's share of the inverse step is 1 - t s, with s = .01 by default.
    tx = compare.adam_with_warm_up(optax.constant_schedule(2.0))
    params = jnp.zeros(())
    state = tx.init(params)
    for step in range(1, 121):
        update, state = tx.update(jnp.ones(()), state, params)
        assert -float(update) == pytest.approx(2.0 * min(1, 0.01 * step), rel=1e-4)


@pytest.mark.slow
def test_runs_side_by_side_keep_to_themselves(load_module):
    data = load_module("_data").load(None)
    train = partial(
        load_module("_training").train,
        optax.adam,
        data=data,
        epochs=1,
        on_progress=lambda share: None,
    )
    runs, swapped = train([1e-2, 1e-3], [4, 5]), train([1e-3, 1e-2], [5, 4], curves=False)
    assert runs.steps.tolist() == [5, 10, 15]
    assert swapped.steps.tolist() == [15]
    np.testing.assert_allclose(
        runs.validation_loss[:, -1:], swapped.validation_loss[::-1], rtol=1e-4
    )
    np.testing.assert_allclose(runs.test_loss, swapped.test_loss[::-1], rtol=1e-4)
    # One image may change sides with the order of a sum.
    np.testing.assert_allclose(runs.test_accuracy, swapped.test_accuracy[::-1], atol=1.5 / 360)
    assert runs.test_loss[1] - runs.test_loss[0] > 0.1


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 3, 2)])
def test_halving_is_max_pooling(load_module, shape):
    images = jnp.abs(jax.random.normal(jax.random.key(0), shape))
    expected = nnx.max_pool(images, (2, 2), strides=(2, 2), padding="SAME")
    np.testing.assert_array_equal(load_module("_training").halve(images), expected)


def test_a_diverged_run_has_the_highest_loss(load_module):
    training, data = load_module("_training"), load_module("_data").load(None)
    network, _ = training.make_network(data)
    params = training.initialize(1, 10, jnp.array([0, 1]))
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), params)
    losses, _ = training.evaluate(network, params, data.test)
    assert losses[0] < 4
    assert losses[1] == training.HIGHEST_LOSS


def test_an_epoch_shows_no_image_twice(load_module):
    batches = load_module("_training").draw_batches(seed=0, images=200, epochs=5)
    assert batches.shape == (3, 5, 64)
    epochs = batches.reshape(5, 3 * 64)
    assert all(len(set(epoch.tolist())) == 192 for epoch in epochs)
    assert epochs.min() >= 0
    assert epochs.max() < 200
