"""A run resumed from an Orbax checkpoint is, to the bit, the run that was never interrupted."""

from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from support.cases import CASE, METHODS, slow_unless
from support.runs import step
from support.strategies import filled, shape

# With the methods, the options that keep state of a kind of their own.
STATEFUL = [
    CASE["fame-tema_exact"],
    CASE["dualadam-crossing"],
    CASE["novak-nadam_scheduled"],
    CASE["novak-full"],
    CASE["caadam-schedules"],
]
TREE = {"layers": [{"kernel": shape(3, 4), "bias": None}, (shape(4),)], "scale": shape()}


@pytest.mark.parametrize(
    "case", slow_unless([CASE["novak-full"], CASE["caadam-schedules"]], [*METHODS, *STATEFUL])
)
def test_resumed_run_is_the_uninterrupted_run(case, tmp_path):
    optimizer = case.build()
    train_step = jax.jit(partial(step, optimizer))

    def train(carry, grads):
        for gradient in grads:
            carry = train_step(*carry, gradient)
        return carry

    params, *grads = [filled(TREE, seed) for seed in range(8)]
    start = params, optimizer.init(params)
    early, late = grads[:3], grads[3:]  # a lookahead synchronizes late
    abstract = jax.eval_shape(lambda p: (p, optimizer.init(p)), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "early", train(start, early))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "early", abstract)

    resumed, uninterrupted = train(restored, late), train(start, grads)
    assert jax.tree.structure(resumed) == jax.tree.structure(uninterrupted)
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
