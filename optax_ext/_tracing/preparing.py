"""What an equation makes of parameters alone: what is in the result, and where."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from optax_ext._tracing import parts as _parts
from optax_ext._tracing.numbers import Number
from optax_ext._tracing.parts import Parts, Unknown

# What computes every element from those at its place.
_ELEMENTWISE = frozenset(
    [
        *("abs", "add", "add_any", "and", "clamp", "convert_element_type", "copy", "copy_p", "cos"),
        *("div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "le"),
        *("log", "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "not", "or"),
        *("pow", "pvary", "reduce_precision", "rem", "round", "rsqrt", "select_n"),
        *("sharding_constraint", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor"),
    ]
)


# What puts all its operands side by side.
_JOINING = ("concatenate", "stack")


class _Operand(NamedTuple):
    parts: Parts
    shape: tuple[int, ...]
    number: Number | None


def prepared(
    eqn: Any,
    values: Sequence[Parts],
    numbers: Sequence[Number | None],
    output: int,
    place: tuple[Any, ...],
) -> Parts:
    """Return the parts in one of the results; `place` tells slices at unknown indices apart."""
    operands = [
        _Operand(parts, tuple(getattr(var.aval, "shape", ())), number)
        for parts, var, number in zip(values, eqn.invars, numbers, strict=True)
    ]
    if not any(values):
        return frozenset()
    shape = tuple(getattr(eqn.outvars[output].aval, "shape", ()))
    if eqn.primitive.name in _ELEMENTWISE:
        return frozenset[_parts.Part]().union(*(_as_shaped(operand, shape) for operand in operands))
    rule = _RULES.get(eqn.primitive.name)
    found = None
    if rule is not None and (values[0] or eqn.primitive.name in _JOINING):
        found = rule(eqn.params, operands, shape, output, Unknown(id(eqn), place))
    if found is None:
        return _anywhere(frozenset[_parts.Part]().union(*values))
    return found


def _anywhere(parts: Parts) -> Parts:
    """With nothing known of where they stand: all fill the whole."""
    return _parts.moved(parts, {})


def _as_shaped(operand: _Operand, shape: tuple[int, ...]) -> Parts:
    """As it is, or a scalar for all."""
    if operand.shape == shape:
        return operand.parts
    return _parts.moved(operand.parts, {}, new=range(len(shape)))


def _cut(
    parts: Parts, shape: Sequence[int], indices: Sequence[range | Unknown], sizes: Any
) -> Parts:
    """Return a slice along every axis that isn't taken whole."""
    for axis, (length, index, size) in enumerate(zip(shape, indices, sizes, strict=True)):
        if size != length or index != range(length):
            parts = frozenset(_parts.sliced(parts, axis, length, index, size))
    return parts


def _from(start: Any, size: int, length: int, unknown: Unknown) -> range | Unknown:
    """Return the indices from a start, which JAX moves to where the slice fits."""
    if size == length:
        return range(length)
    if start is None:
        return unknown
    first = min(max(int(start), 0), length - size)
    return range(first, first + size)


def _slice(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    parts, shape, _number = operands[0]
    strides = params["strides"] or [1] * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    indices = [range(*bound) for bound in bounds]
    return _cut(parts, shape, indices, [len(index) for index in indices])


def _split(params: Any, operands: Sequence[_Operand], _: Any, output: int, *_more: Any) -> Parts:
    parts, shape, _number = operands[0]
    start = sum(params["sizes"][:output])
    index = range(start, start + params["sizes"][output])
    return frozenset(
        _parts.sliced(parts, params["axis"], shape[params["axis"]], index, len(index))
        if len(index) != shape[params["axis"]]
        else parts
    )


def _dynamic_slice(
    params: Any, operands: Sequence[_Operand], _: Any, _output: int, unknown: Unknown
) -> Parts:
    (parts, shape, _number), *starts = operands
    sizes = params["slice_sizes"]
    indices = [
        _from(None if start.number is None else start.number.value, size, length, unknown)
        for start, size, length in zip(starts, sizes, shape, strict=True)
    ]
    return _cut(parts, shape, indices, sizes)


def _gather(
    params: Any, operands: Sequence[_Operand], _: Any, _output: int, unknown: Unknown
) -> Parts | None:
    """One slice; many at once are a table that is looked up."""
    (parts, shape, _number), index = operands
    if len(index.shape) != 1:
        return None
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    starts: dict[int, Any] = dict.fromkeys(range(len(shape)), 0)
    for i, axis in enumerate(numbers.start_index_map):
        starts[axis] = None if index.number is None else index.number.value[i]
    indices = [
        _from(starts[axis], size, length, unknown)
        for axis, (size, length) in enumerate(zip(sizes, shape, strict=True))
    ]
    found = _cut(parts, shape, indices, sizes)
    return _parts.squeezed(found, len(shape), numbers.collapsed_slice_dims)


def _squeeze(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    parts, shape, _number = operands[0]
    return _parts.squeezed(parts, len(shape), params["dimensions"])


def _reshape(
    _: Any, operands: Sequence[_Operand], shape: tuple[int, ...], *_more: Any
) -> Parts | None:
    """Axes of one element come and go; what merges or splits others loses its places."""
    parts, before, _number = operands[0]
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(shape) if size != 1]
    if [before[axis] for axis in old] != [shape[axis] for axis in new]:
        return None
    parts = _parts.squeezed(parts, len(before), [a for a in range(len(before)) if a not in old])
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    return _parts.moved(parts, dict(enumerate(new)), new=ones)


def _rev(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    parts, shape, _number = operands[0]
    for axis in params["dimensions"]:
        parts = _parts.flipped(parts, axis, shape[axis])
    return parts


def _transpose(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    return _parts.moved(
        operands[0].parts, {axis: i for i, axis in enumerate(params["permutation"])}
    )


def _broadcast(params: Any, operands: Sequence[_Operand], shape: tuple[int, ...], *_: Any) -> Parts:
    parts, before, _number = operands[0]
    to = params["broadcast_dimensions"]
    own = {axis for axis, length in zip(to, before, strict=True) if length == shape[axis]}
    repeated = [axis for axis in range(len(shape)) if axis not in own]
    return _parts.moved(parts, dict(enumerate(to)), new=repeated)


def _concatenate(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    axis = params["dimension"]
    lengths = [operand.shape[axis] for operand in operands]
    return _parts.beside([operand.parts for operand in operands], lengths, axis)


def _stack(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts:
    arrays = [operand.parts for operand in operands]
    return _parts.stacked(arrays, len(operands[0].shape), params["axis"])


def _unstack(params: Any, operands: Sequence[_Operand], _: Any, output: int, *_more: Any) -> Parts:
    parts, shape, _number = operands[0]
    axis = params["axis"]
    index = range(output, output + 1)
    found = frozenset(_parts.sliced(parts, axis, shape[axis], index, 1))
    return _parts.squeezed(found, len(shape), [axis], stacked=True)


def _tile(params: Any, operands: Sequence[_Operand], *_: Any) -> Parts | None:
    """Along axes of one element it is broadcasting."""
    parts, shape, _number = operands[0]
    repeated = [axis for axis, times in enumerate(params["reps"]) if times > 1]
    if any(shape[axis] > 1 for axis in repeated):
        return None
    return _parts.moved(parts, {axis: axis for axis in range(len(shape))}, new=repeated)


def _product(_: Any, operands: Sequence[_Operand], *_more: Any) -> Parts | None:
    """All that is multiplied is kernel."""
    if sum(bool(operand.parts) for operand in operands) < 2:
        return None
    parts = frozenset[_parts.Part]().union(*(operand.parts for operand in operands))
    return _anywhere(frozenset(replace(part, factor=True) for part in parts))


_RULES: dict[str, Callable[..., Parts | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _product,
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "ragged_dot": _product,
    "ragged_dot_general": _product,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "triangular_solve": _product,
    "unstack": _unstack,
}
