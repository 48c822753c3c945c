"""How rates are chosen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from numpy.typing import ArrayLike

# Rates are chosen on seeds from this one on, and judged on the seeds 0, 1, ….
SEARCH_SEED = 1000
# Returns an optimizer for a learning rate, which is a tracer here.
Factory = Callable[[Any], optax.GradientTransformation]


def best(losses: ArrayLike) -> int:
    """Return the index of the rate with the least mean loss, where a loss counts for at most 10.

    The losses have the shape (rates, seeds).
    """
    bounded = np.clip(np.nan_to_num(losses, nan=np.inf), 0, 10)
    return int(bounded.mean(axis=1).argmin())


def best_on_others(losses: np.ndarray) -> np.ndarray:
    """Return for each seed the rate that is best on all other seeds; losses are (rates, seeds).

    So no seed takes part in the choice that it is judged by.
    """
    return np.array([best(np.delete(losses, i, axis=1)) for i in range(losses.shape[1])])
