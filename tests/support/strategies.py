"""Random parameter trees for Hypothesis: nested containers, odd shapes, mixed dtypes, `None`.

Arrays are NumPy, as in `cases.py`: the test that receives them chooses the precision.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

# Compilation takes what time there is: few examples, and the same in every run.
settings.register_profile(
    "optimizers", max_examples=5, deadline=None, derandomize=True, database=None
)
settings.load_profile("optimizers")

# Few, since JAX compiles every operation once for each shape and dtype.
SHAPES = ((), (3,), (2, 3), (0, 3))
SINGLE = (jnp.float32,)
NARROW = (jnp.float32, jnp.bfloat16, jnp.float16)
WIDE = (jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


# One tree with everything that is odd.
MENAGERIE = {
    "blocks": [{"kernel": shape(2, 3), "bias": shape(3, dtype=jnp.bfloat16)}, (), None],
    "half": (shape(2, 3, dtype=jnp.float16), shape()),
    "nothing": {"none": None, "empty": {}, "zero_size": shape(0, 3)},
}


# In groups of 4: along the last axis, over the flattened array, a single one, and none.
GROUPED = {
    "last": shape(3, 8),
    "flattened": [shape(4, 3), None],
    "group": (shape(4),),
    "element": shape(1),
    "scalar": shape(),
}


def trees(
    dtypes: Sequence[Any], shapes: Sequence[tuple[int, ...]] = SHAPES
) -> st.SearchStrategy[Any]:
    """Nested containers of shapes and `None`, the empty tree and the single leaf among them."""
    leaves = st.builds(jax.ShapeDtypeStruct, st.sampled_from(shapes), st.sampled_from(dtypes))
    names = st.sampled_from(["bias", "conv2", "conv10", "kernel"])

    def containers(inside):
        return (
            st.dictionaries(names, inside, max_size=3)
            | st.lists(inside, max_size=2)
            | st.tuples(inside, inside)
        )

    # The root is never `None`: to Optax that means no parameters at all.
    return leaves | containers(st.recursive(leaves | st.none(), containers, max_leaves=6))


def normal(rng: np.random.Generator, x: jax.ShapeDtypeStruct) -> np.ndarray:
    values = rng.standard_normal(x.shape)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        values = values + 1j * rng.standard_normal(x.shape)
    return np.asarray(values).astype(x.dtype)


def filled(tree: Any, seed: int) -> Any:
    """Normal values for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: normal(rng, x), tree)


def with_some_missing(tree: Any, seed: int) -> Any:
    """The tree with every third leaf or so replaced by `None`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: None if rng.random() < 1 / 3 else x, tree)


seeds = st.integers(0, 2**16)


def _powers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers of either sign, from 1e-30 to 1e30."""
    return rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-30, 30, shape)


def _with_an_infinity(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape)
    values.flat[rng.integers(values.size)] = rng.choice([-np.inf, np.inf])
    return values


# Functions that draw a gradient in a shape.
FINITE = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "tiny": lambda rng, shape: np.full(shape, 1e-30),
    "huge": lambda rng, shape: np.full(shape, -1e30),
    "powers": _powers,
    "powers, most are 0": lambda rng, shape: _powers(rng, shape) * (rng.random(shape) < 0.2),
}
WITH_INFINITIES = FINITE | {"infinity": _with_an_infinity}


def streams(tree: Any, steps: int, kinds: Mapping[str, Any] = FINITE) -> st.SearchStrategy[Any]:
    """Return gradients for a tree of shapes; each leaf of each step draws its own kind."""
    leaves, structure = jax.tree.flatten(tree)
    count = steps * len(leaves)

    def draw(names: Sequence[str], seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        values = [
            np.asarray(kinds[name](rng, x.shape)).astype(x.dtype)
            for name, x in zip(names, steps * leaves, strict=True)
        ]
        size = len(leaves)
        return [structure.unflatten(values[t * size :][:size]) for t in range(steps)]

    names = st.lists(st.sampled_from(sorted(kinds)), min_size=count, max_size=count)
    return st.builds(draw, names, seeds)
