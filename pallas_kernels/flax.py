"""Flax's two optimizer classes, each with a fused step as its update."""

from typing import Any

from flax import nnx
from flax.training import train_state

from pallas_kernels.fuse import FusedTransformation


class FusedOptimizer(nnx.Optimizer[Any]):
    """`nnx.Optimizer` for a transformation made by `fuse`.

    `update` writes parameters and state in place and returns nothing. The base class returns
    updates, but a fused step never stores them.

    >>> import jax.numpy as jnp, optax
    >>> from pallas_kernels import fuse
    >>> model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    >>> optimizer = FusedOptimizer(model, fuse(optax.adamw(1e-3)), wrt=nnx.Param)
    >>> gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8))) ** 2))(model)
    >>> optimizer.update(model, gradients)
    >>> print(optimizer.step[...])
    1
    """

    tx: FusedTransformation

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> None:
        """Update the model's parameters; pass `kwargs` to the transformation."""
        params, gradients = (
            nnx.as_pure(nnx.state(tree, self.wrt, graph=self.graph)) for tree in (model, grads)
        )
        state = nnx.as_pure(self.opt_state)
        params, state = self.tx.step(params, state, gradients, **nnx.as_pure(kwargs))
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state, graph=self.graph))
        self.step[...] += 1


class FusedTrainState(train_state.TrainState):
    """Linen's `TrainState` for a transformation made by `fuse`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from pallas_kernels import fuse
    >>> state = FusedTrainState.create(
    ...     apply_fn=None, params={"w": jnp.ones((8, 8))}, tx=fuse(optax.sgd(0.5))
    ... )
    >>> state = state.apply_gradients(grads={"w": jnp.ones((8, 8))})
    >>> print(state.step, state.params["w"][0, 0])
    1 0.5
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "FusedTrainState":
        """Return the state after one step; `kwargs` replace other fields of it."""
        if "_overwrite_with_gradient" in grads:  # leaves of float8 training: no optimizer step
            return super().apply_gradients(grads=grads, **kwargs)
        tx: Any = self.tx
        params, opt_state = tx.step(self.params, self.opt_state, grads)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
