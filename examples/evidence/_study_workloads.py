"""The workloads of the study: what is trained, on which data, and for how long. None downloads.

A byte-level transformer reads Python's standard library, which every installation has. A convnet
and a perceptron classify MNIST-1D (Greydanus and Kobak, arXiv 2011.14439), which is generated.
"""

import math
import sysconfig
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

import _networks as networks
from _networks import CLASSES, Data, Network, Split
from _study_contenders import RADAM
from _study_protocol import Rules

BYTES = 256
# Folders that are not in every installation, and those with tables that resemble one another, so
# that files that are held out would be known.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} | {
    "encodings",
    "pydoc_data",
}
# Of twenty files one is for validation and one for testing.
FILES, VALIDATION_FILE, TEST_FILE = 20, 7, 17
# The size of the held-out text.
HELD_OUT_BYTES = 2**15
# Of MNIST-1D, as it is published, and as a test set of other examples.
PUBLISHED_SEED = 42
NEW = {"seed": 43, "num_samples": 5000, "train_split": 0.0}


class Workload(NamedTuple):
    """A network, its data, how long it trains, and the protocol's numbers.

    Attributes:
      title: for tables and figures.
      network: a function of a random key, and one of parameters and inputs, which returns logits.
      load: returns the data.
      batch: examples in a step.
      steps: of a training.
      step_ms: milliseconds of AdamW's step on two idle cores or on a GPU, to estimate times by.
      rules: the protocol's numbers.
      together: how many trainings run in one call.
    """

    title: str
    network: Network
    load: Callable[[], Data]
    batch: int
    steps: int
    step_ms: float
    rules: Rules
    together: int = 1


class Size(NamedTuple):
    """The size of a transformer, and the type that it computes with."""

    width: int
    layers: int
    heads: int
    length: int
    dtype: DTypeLike = jnp.float32


def library_files() -> list[Path]:
    """Return the modules of Python's standard library, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / name for name in names if not LEFT_OUT.intersection(name.parts)]


@cache
def load_text(length: int) -> Data:
    """Return sequences of bytes, in which each file is either in the training set or held out."""
    files = [np.frombuffer(path.read_bytes(), np.uint8) for path in library_files()]
    groups: list[list[np.ndarray]] = [[], [], []]
    for i, file in enumerate(files):
        groups[{VALIDATION_FILE: 1, TEST_FILE: 2}.get(i % FILES, 0)].append(file)
    train, *held_out = (_cut(np.concatenate(group), length) for group in groups)
    return jax.device_put(Data(train, *(_spread(split, length) for split in held_out)))


def _cut(text: np.ndarray, length: int) -> Split:
    """Return sequences, and for each byte the one that follows it."""
    end = (len(text) - 1) // length * length
    return Split(*(text[begin : begin + end].reshape(-1, length) for begin in (0, 1)))


def _spread(split: Split, length: int) -> Split:
    """Return sequences from everywhere in the text."""
    number = min(HELD_OUT_BYTES // length, len(split.labels))
    chosen = np.linspace(0, len(split.labels) - 1, number).astype(int)
    return jax.tree.map(lambda x: x[chosen], split)


def make_transformer(size: Size) -> Network:
    """Return a pre-norm transformer that predicts each byte from those before it."""
    return Network(partial(init_transformer, size), partial(apply_transformer, size))


def init_transformer(size: Size, key: jax.Array) -> Any:
    embedding, positions, logits, *keys = jax.random.split(key, 3 + size.layers)
    return {
        "bytes": {"embedding": jax.random.normal(embedding, (BYTES, size.width))},
        "positions": {"embedding": 0.02 * jax.random.normal(positions, (size.length, size.width))},
        "layers": [_init_layer(key, size) for key in keys],
        "logits": {"kernel": _lecun(logits, size.width, BYTES)},
    }


def _init_layer(key: jax.Array, size: Size) -> Any:
    """Return the weights of a layer; those that add to the residual stream are small."""
    shapes = {
        "query, key, value": (size.width, 3 * size.width),
        "out": (size.width, size.width),
        "up": (size.width, 4 * size.width),
        "down": (4 * size.width, size.width),
    }
    keys = jax.random.split(key, len(shapes))
    residual = 1 / math.sqrt(2 * size.layers)
    return {
        name: {"kernel": _lecun(k, *shape) * (residual if name in ("out", "down") else 1)}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _lecun(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    return jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)


def apply_transformer(size: Size, params: Any, tokens: jax.Array) -> jax.Array:
    """Return logits of the next byte at each place of sequences of shape (N, length)."""
    params = jax.tree.map(lambda x: x.astype(size.dtype), params)
    x = params["bytes"]["embedding"][tokens] + params["positions"]["embedding"][None]
    for layer in params["layers"]:
        projected = _normalize(x) @ layer["query, key, value"]["kernel"]
        heads = projected.reshape(*x.shape[:2], 3 * size.heads, -1)
        attended = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=True)
        x = x + attended.reshape(x.shape) @ layer["out"]["kernel"]
        x = x + jax.nn.gelu(_normalize(x) @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return (_normalize(x) @ params["logits"]["kernel"]).astype(jnp.float32)


def _normalize(x: jax.Array) -> jax.Array:
    """Divide by the root mean square over the last axis."""
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


@cache
def load_mnist1d() -> Data:
    """Return the published training set, its test set for validation, and a new, larger test set.

    The data are generated, so another seed gives new examples of the same distribution.
    """
    # Not needed by other scripts; it takes a second to import.
    from mnist1d.data import get_dataset_args, make_dataset

    found: list[Any] = []
    for changes in ({"seed": PUBLISHED_SEED}, NEW):
        args: Any = get_dataset_args()
        vars(args).update(changes)
        found.append(make_dataset(args))
    parts = ((found[0], ""), (found[0], "_test"), (found[1], "_test"))
    splits = (
        Split(made[f"x{part}"].astype(np.float32), made[f"y{part}"].astype(np.int32))
        for made, part in parts
    )
    return jax.device_put(Data(*splits))


def init_perceptron(key: jax.Array) -> Any:
    """Return weights of layers of 128; the published 100 can't be stored in 8 bits."""
    return _init_dense(key, (40, 128, 128, CLASSES))


def apply_perceptron(params: Any, x: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ last["kernel"] + last["bias"][None]


def _init_dense(key: jax.Array, widths: tuple[int, ...]) -> Any:
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": he(k, shape), "bias": jnp.zeros(shape[-1])}
        for k, shape in zip(keys, pairwise(widths), strict=True)
    ]


# Window, inputs and outputs of each convolution, as in the published convnet.
CONVOLUTIONS = (5, 1, 25), (3, 25, 25), (3, 25, 25)
STRIDE = 2


def init_convnet(key: jax.Array) -> Any:
    he = jax.nn.initializers.he_normal()
    head, *keys = jax.random.split(key, 1 + len(CONVOLUTIONS))
    features = math.ceil(40 / STRIDE ** len(CONVOLUTIONS)) * CONVOLUTIONS[-1][-1]
    convolutions = [
        {"kernel": he(k, (window, 1, *channels)), "bias": jnp.zeros(channels[-1])}
        for k, (window, *channels) in zip(keys, CONVOLUTIONS, strict=True)
    ]
    return [*convolutions, *_init_dense(head, (features, CLASSES))]


def apply_convnet(params: Any, x: jax.Array) -> jax.Array:
    *convolutions, head = params
    x = x[:, :, None, None]
    for layer in convolutions:
        side = layer["kernel"].shape[0] // 2
        x = networks.convolve(x, layer["kernel"], (STRIDE, 1), ((side, side), (0, 0)))
        x = jax.nn.relu(x + layer["bias"][None, None, None])
    return x.reshape(len(x), -1) @ head["kernel"] + head["bias"][None]


SIZES = {
    "0.23M": Size(width=64, layers=4, heads=4, length=64),
    "10M": Size(width=384, layers=6, heads=6, length=256, dtype=jnp.bfloat16),
    "124M": Size(width=832, layers=15, heads=13, length=512, dtype=jnp.bfloat16),
}


def make_text_workload(size: str, **numbers: Any) -> Workload:
    load = partial(load_text, SIZES[size].length)
    return Workload(f"Text, {size}", make_transformer(SIZES[size]), load, **numbers)


# Small networks need larger rates than the published ones.
SMALL = 10.0
TEXT, IMAGES = Rules(math.log(BYTES)), Rules(math.log(CLASSES), center=SMALL, trials=16)


def make_mnist1d_workload(
    title: str, network: Network, *, step_ms: float, rules: Rules = IMAGES
) -> Workload:
    return Workload(
        f"MNIST-1D, {title}",
        network,
        load_mnist1d,
        batch=64,
        steps=1000,
        step_ms=step_ms,
        rules=rules,
        together=8,
    )


def with_horizons(**workloads: Workload) -> dict[str, Workload]:
    """Return each workload, and one of four times as many steps at the same settings."""
    found = {}
    for name, workload in workloads.items():
        rules = workload.rules
        longer = rules._replace(settings_from=rules.settings_from or name)
        found[name] = workload._replace(title=f"{workload.title}, 1×")
        found[f"{name}-4x"] = workload._replace(
            title=f"{workload.title}, 4×", steps=4 * workload.steps, rules=longer
        )
    return found


ON_CPU = with_horizons(
    mlp=make_mnist1d_workload(
        "perceptron", Network(init_perceptron, apply_perceptron), step_ms=0.15
    ),
    convnet=make_mnist1d_workload(
        "convnet",
        Network(init_convnet, apply_convnet),
        step_ms=0.5,
        # Its tensors are too small to be stored in 8 bits.
        rules=IMAGES._replace(forms=False, moved=(RADAM, "NOVAK", "CaAdam")),
    ),
    text=make_text_workload(
        "0.23M",
        batch=16,
        steps=160,
        step_ms=27,
        rules=TEXT._replace(center=SMALL, moved=(RADAM,)),
    ),
)
# Times of steps are guesses.
ON_GPU = with_horizons(
    **{
        "text-10M": make_text_workload("10M", batch=64, steps=500, step_ms=20, rules=TEXT),
        "text-124M": make_text_workload(
            "124M",
            batch=64,
            steps=500,
            step_ms=150,
            rules=TEXT._replace(settings_from="text-10M"),
        ),
    }
)
