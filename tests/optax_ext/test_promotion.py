"""No arithmetic leans on implicit promotion of dtypes, so none can change precision by surprise."""

import jax
import jax.numpy as jnp
import pytest

from support.cases import CASES, Case

# A user's schedule may promote; ours don't.
OURS = [case for case in CASES if not any(callable(value) for value in case.options.values())]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", OURS, ids=str)
def test_an_update_promotes_nothing(case: Case, dtype):
    params = {"dense": {"kernel": jnp.ones((3, 2), dtype), "bias": jnp.ones(2, dtype)}}
    optimizer = case.build()
    with jax.numpy_dtype_promotion("strict"):
        state = optimizer.init(params)
        updates, _ = optimizer.update(params, state, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
