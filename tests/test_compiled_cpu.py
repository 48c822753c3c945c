"""What a step becomes on a CPU: fusions that work in place, and memory for nothing beside them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext

LEAF = jax.ShapeDtypeStruct((512, 512), jnp.float32)
BYTES = 4 * 512 * 512

METHODS = {
    "fame": optax_ext.fame(1e-3),
    # XLA takes out of a sum what its terms have in common: the factor, if the decay is 1/2.
    "fame, halves": optax_ext.fame(1e-3, 0.5, 0.5, 0.5, 0.5, 0.5, second_moment="tema"),
    "fame, paper": optax_ext.fame(
        1e-3, 0.9, 0.999, 0.3, 0.7, 0.8, second_moment="tema", bias_correction="none"
    ),
    "vradam": optax_ext.vradam(1e-3),
    "invadam": optax_ext.invadam(1e-3),
    "dualadam": optax_ext.dualadam(1e-3),
    "novak": optax_ext.novak(1e-3),
    "novak, rotating": optax_ext.novak(1e-3, lookahead="rotating"),
    "caadam": optax_ext.caadam(1e-3),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_leaf_is_copied_or_held_beside_the_state(name):
    tx = METHODS[name]
    params = {"leaf": LEAF}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(tx.init, params), params
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.01 * BYTES
