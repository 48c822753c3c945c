"""The state of any optimizer in few bits: see `quantize_state`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ext import _checks
from optax_ext._numerics import first_count, next_count
from optax_ext.low_precision import nnx_variables
from optax_ext.low_precision.bits import random_bits
from optax_ext.low_precision.choices import ByPath, Choose, Formats, Path, chooser, leaves
from optax_ext.low_precision.formats import is_encoded


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      step: number of updates done.
      inner_state: the state of the wrapped transformation, with nodes in place of encoded arrays.
    """

    step: jax.Array
    inner_state: optax.OptState


def quantize_state(
    tx: optax.GradientTransformation,
    formats: Formats | None = None,
    *,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Store the state of `tx` in few bits between the steps.

    Each update decodes the state, runs `tx`, and encodes the new state. By default, first moments
    take 8 bits (`SignedRoot`), second moments 8 bits (`FourthRoot`), and lookahead's slow weights
    24 bits (`Split`), so Adam's state takes 2.125 bytes a parameter in place of 8. The name of a
    field of the state decides the format of its arrays. Other fields, and leaves that are small,
    don't fit or are not float32, stay as they are; `quantization_report` says why. With bfloat16
    parameters, wrap the result in `master_weights` or `stochastic_rounding`. They pass float32
    parameters to `tx`, so its state is float32 and can be encoded.

    The random bits that round second moments come from the bits of the gradient that arrives here.
    So wrap a whole optimizer, clipping included: then equal gradients get equal random bits on any
    mesh, compiled or fused. AdEMAMix' `m2`, sums of errors and schedule-free's `z` need float32.
    They are recognized by their names, and stay as they are. Decays are not checked: if `b1` is
    larger than .9, read `SignedRoot`, or pass `formats` that leave the first moment as it is.

    A value that is not finite does not affect its neighbors. An infinite first moment becomes the
    largest finite number of its group, and a second moment that is NaN becomes infinite. So without
    a first moment (RMSProp), the later updates of such an element are 0, not NaN.

    Source: ours. `formats.py` compares it with published formats.

    Args:
      tx: an optimizer.
      formats: a function that returns the format of an array of the state. To leave the array as it
        is, it returns `None` or a string with the reason. It takes the path of the field, the path
        of the parameter inside of the field, and the array. The keys of paths are those of JAX, but
        `optax.tree_utils.NamedTupleKey` for a `NamedTuple`. A field can have any keys, or none:
        look for a name by `any(getattr(key, "name", None) == "mu" for key in field)`.
        The default is `default_formats()`, which has options.
      shardings: a tree like the parameters with their `NamedSharding`, if parameters are sharded. A
        leaf whose groups would cross shards then stays as it is. Shardings along explicit axes of a
        mesh are known without it.

    Raises:
      ValueError: `tx` is not a transformation, or `formats` is not a function.

    >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}
    >>> tx = quantize_state(optax.adamw(1e-3))
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> mu = optax.tree.get(state, "mu")
    >>> print(mu["kernel"].codes.dtype, mu["kernel"].scales.shape, mu["bias"].dtype)
    int8 (64, 2) float32
    >>> print(f"{optax.tree.get(dequantize_state(state), 'nu')['kernel'][0, 0]:.5f}")
    0.00100
    """
    _checks.transformation(tx=tx)
    choose = chooser(formats, shardings)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> QuantizedState:
        return QuantizedState(first_count(), _encode(tx.init(params), params, choose))

    def update(updates, state, params=None, **extra_args):
        step = next_count(state.step)
        old = state.inner_state
        decoded = jax.tree.map(_decode, old, is_leaf=is_whole)
        result, new = tx.update(updates, decoded, params, **extra_args)
        gradient_of = ByPath(updates)

        def encode(path: Path, node: Any, x: Any) -> Any:
            if not is_encoded(node):
                return x
            (inside, _), *_ = leaves(node[0])
            path, array = (*path, *inside), nnx_variables.array_of(x)
            bits = _random_bits(path, array, gradient_of, step) if node.is_dithered else None
            return nnx_variables.encode(node, x, bits)

        structure = jax.tree.structure(old, is_leaf=is_whole)
        pairs = zip(leaves(old, is_whole), structure.flatten_up_to(new), strict=True)
        encoded = structure.unflatten(encode(path, node, x) for (path, node), x in pairs)
        return result, QuantizedState(step, encoded)

    return optax.GradientTransformationExtraArgs(init, update)


def dequantize_state(state: Any) -> Any:
    """Return a state in which every encoded array is decoded.

    It is the state of the optimizer that `quantize_state` wrapped, at any depth of `state`.

    >>> tx = optax.adam(1e-3)
    >>> params = jnp.ones(4096)
    >>> same = jax.tree.structure(dequantize_state(quantize_state(tx).init(params)))
    >>> print(same == jax.tree.structure(tx.init(params)))
    True
    """
    return jax.tree.map(
        lambda x: dequantize_state(x.inner_state) if isinstance(x, QuantizedState) else _decode(x),
        state,
        is_leaf=is_whole,
    )


def quantize_existing_state(
    state: optax.OptState,
    params: optax.Params,
    formats: Formats | None = None,
    *,
    shardings: Any = None,
) -> QuantizedState:
    """Return a state for `quantize_state(tx, ...)` that continues from a state of `tx`.

    Args:
      state: the state of `tx`.
      params: its parameters, or their shapes.
      formats: see `quantize_state`.
      shardings: see `quantize_state`.

    Raises:
      ValueError: `formats` is not a function.

    >>> tx, params = optax.lion(1e-3), jnp.ones(4096)
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> quantized = quantize_existing_state(state, params)
    >>> updates, quantized = quantize_state(tx).update(params, quantized, params)
    """
    choose = chooser(formats, shardings)
    return QuantizedState(first_count(), _encode(state, params, choose))


def _encode(state: Any, params: optax.Params, choose: Choose) -> Any:
    choices = choose(leaves(state, is_whole), params)
    encoded = [c.leaf if c.format is None else c.format.encode(c.leaf) for c in choices]
    structure = jax.tree.structure(state, is_leaf=is_whole)
    return nnx_variables.put_nodes_outside(structure.unflatten(encoded))


def _decode(x: Any) -> Any:
    return nnx_variables.decode(x) if is_encoded(x) else x


def is_whole(x: Any) -> bool:
    """Return whether `x` is one leaf here: encoded, or the state of an inner `quantize_state`."""
    return is_encoded(x) or isinstance(x, QuantizedState)


def _random_bits(path: Path, x: jax.Array, gradient_of: ByPath, step: jax.Array) -> jax.Array:
    """Return random bits for each element of a leaf of the state.

    All elements share the same bits if the leaf has no gradient of its shape.
    """
    source = gradient_of(path, lambda g: g.shape == x.shape and jnp.isrealobj(g))
    source = jnp.zeros((), jnp.float32) if source is None else source
    return jnp.broadcast_to(random_bits(source, step=step), x.shape)
