"""The images: scikit-learn's handwritten digits, or the user's own from an .npz file."""

import argparse
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Three to train on, one to validate and one to test.
FEWEST_PER_CLASS = 5

# What comes of a damaged file, by where the damage is.
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


class DataError(ValueError):
    """The user's file can't be trained on; the message says why in one line."""


class Split(NamedTuple):
    images: Any
    labels: Any


class Dataset(NamedTuple):
    name: str
    classes: int
    train: Split
    validation: Split
    test: Split


def load_data(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Dataset:
    """What `--data` holds; what is wrong with it ends the program."""
    try:
        return load(options.data)
    except (DataError, OSError) as error:
        parser.error(str(error))


def load(path: Path | None) -> Dataset:
    """The dataset at `path`, or the bundled digits, always split alike: 60, 20 and 20 %."""
    if path is None:
        x, y = load_digits(return_X_y=True)
        name, images, labels = "scikit-learn digits", x.reshape(-1, 8, 8), y
    else:
        name, (images, labels) = path.name, read_npz(path)
    check(images, labels)

    classes, labels = np.unique(labels, return_inverse=True)
    if images.ndim == 3:
        images = images[..., None]
    rest, test = _stratified(Split(images, labels.astype(np.int32)), 0.2)
    train, validation = _stratified(rest, 0.25)
    # On the device from here on, so that no step waits for them.
    return Dataset(name, len(classes), *jax.device_put(_rescaled(train, validation, test)))


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The arrays x and y of an .npz file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file, which numpy.savez writes")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"x", "y"} - set(arrays)
            if missing:
                raise DataError(f"{path}: lacks {_names(missing)}, has {_names(set(arrays))}")
            return arrays["x"], arrays["y"]
    except UNREADABLE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: unreadable: {error}") from error


def check(x: NDArray[Any], y: NDArray[Any]) -> None:
    """Raises `DataError` unless x holds images and y a label for each."""
    if x.ndim not in (3, 4):
        raise DataError(f"x must have shape (N, H, W) or (N, H, W, C), got {x.shape}")
    if y.ndim != 1:
        raise DataError(f"y must have shape (N,), got {y.shape}")
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} images, but y has {len(y)} labels")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"y must hold integers, got {y.dtype}")
    if not np.issubdtype(x.dtype, np.integer) and not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"x must hold integers or floats, got {x.dtype}")
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"y must have at least 2 classes, got {len(classes)}")
    if counts.min() < FEWEST_PER_CLASS:
        raise DataError(
            f"each class needs at least {FEWEST_PER_CLASS} images,"
            f" class {classes[counts.argmin()]} has {counts.min()}"
        )
    if not x.size:
        raise DataError(f"the images have no pixels, x has shape {x.shape}")
    if not np.isfinite(x).all():
        raise DataError("x holds NaN or infinite pixels")
    if x.min() == x.max():
        raise DataError("all pixels of x are equal")


def draw(step: int, images: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Which images a step takes; an epoch takes none twice.

    It follows from the arguments alone, so a run that goes on sees what it would have seen.
    """
    size = min(batch, images)
    epoch, i = divmod(step, images // size)
    return _shuffled(images, epoch, seed)[i * size : (i + 1) * size]


@lru_cache(maxsize=256)
def _shuffled(images: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(images)


def _stratified(data: Split, share: float) -> tuple[Split, Split]:
    parts = train_test_split(*data, test_size=share, stratify=data.labels, random_state=0)
    x, x_held, y, y_held = map(np.asarray, parts)
    return Split(x, y), Split(x_held, y_held)


def _rescaled(*splits: Split) -> list[Split]:
    """Bytes to [0, 1]; anything else to mean 0 and deviation 1 over the first split."""
    pixels = splits[0].images
    offset, width = (0.0, 255.0) if pixels.dtype == np.uint8 else (pixels.mean(), pixels.std())
    return [Split(((x - offset) / max(width, 1e-12)).astype(np.float32), y) for x, y in splits]


def _names(keys: set[str]) -> str:
    return " and ".join(sorted(keys)) or "nothing"
