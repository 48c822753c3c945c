"""The images: scikit-learn's handwritten digits, or the user's own from an .npz file."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

# Three to train on, one to choose the learning rate by, one to test with.
FEWEST_PER_CLASS = 5

# A damaged file raises one of these, depending on where the damage is.
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


class DataError(ValueError):
    """An error in the user's file, which the message describes in one line."""


class Split(NamedTuple):
    images: Any
    labels: Any


class Dataset(NamedTuple):
    name: str
    classes: int
    train: Split
    validation: Split
    test: Split


def load(path: Path | None) -> Dataset:
    """Return the dataset at `path`, or the bundled digits, split into 60, 20 and 20 %."""
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
    # They stay on the device, so that no step waits for them.
    return Dataset(name, len(classes), *jax.device_put(_rescaled(train, validation, test)))


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the arrays x and y of an .npz file."""
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
    """Raise `DataError` unless x holds images and y a label for each."""
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


def _stratified(data: Split, share: float) -> tuple[Split, Split]:
    parts = train_test_split(*data, test_size=share, stratify=data.labels, random_state=0)
    x, x_held, y, y_held = map(np.asarray, parts)
    return Split(x, y), Split(x_held, y_held)


def _rescaled(*splits: Split) -> list[Split]:
    """Scale bytes to [0, 1], anything else to mean 0 and deviation 1 over the first split."""
    pixels = splits[0].images
    offset, width = (0.0, 255.0) if pixels.dtype == np.uint8 else (pixels.mean(), pixels.std())
    return [Split(((x - offset) / max(width, 1e-12)).astype(np.float32), y) for x, y in splits]


def _names(keys: set[str]) -> str:
    return " and ".join(sorted(keys)) or "nothing"
