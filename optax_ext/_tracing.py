"""An abstract run of a network's computation, which finds where each parameter meets the data.

Every value of the computation is either `Weights`, which are made of parameters alone, or `Data`,
which depend on the inputs. `Data` carry their level: the number of operations with weights on the
longest path from the inputs. Nothing here knows modules or optimizers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, Literal
from numpy.typing import NDArray

# Identifies weights: the index of a parameter, then a token for each scan that takes a layer of it.
Key = tuple[Any, ...]
# One level for each layer of a stack, or for a whole parameter.
Levels = NDArray[np.int64]


class Part(NamedTuple):
    """A parameter, or one of the layers that are stacked in it.

    Attributes:
      key: which parameter and layer.
      long_axes: number of its axes that are longer than 1.
      size: number of its elements, or 0 if it was rearranged. Only an array of the same size is a
        stack of the part's layers.
      sliced: whether only an unknown slice of it is left.
    """

    key: Key
    long_axes: int
    size: int
    sliced: bool = False


@dataclass(frozen=True)
class Weights:
    """A value that is made of these parts alone; a constant if there are none."""

    parts: frozenset[Part] = frozenset()


@dataclass(frozen=True)
class Data:
    """A value that depends on the inputs.

    Attributes:
      level: number of operations with weights on the longest path from an input.
      passed: the weights of the operations on all paths.
    """

    level: int = 0
    passed: frozenset[Key] = frozenset()


Value = Weights | Data
CONSTANT = Weights()


class Use(NamedTuple):
    """One way in which the computation uses a parameter or a layer of it.

    Attributes:
      key: which parameter and layer.
      long_axes: number of its axes that are longer than 1.
      in_operation: whether an operation sums over it or looks it up. Otherwise it is used
        elementwise.
      obstacle: what hides how it is used, such as "sliced" or "in pallas_call"; or empty.
    """

    key: Key
    long_axes: int
    in_operation: bool
    obstacle: str


Uses = dict[Use, Levels]


# The primitives that sum products of two operands or look up rows, and the operands that may be
# weights.
_OPERATIONS = {
    "dot_general": (0, 1),
    "conv_general_dilated": (0, 1),
    "ragged_dot": (0, 1),
    "ragged_dot_general": (0, 1),
    "triangular_solve": (0,),
    "gather": (0,),
    "dynamic_slice": (0,),
}
_SLICES = ("dynamic_slice", "gather", "slice", "split", "unstack")
# After these, the rows of an array are no longer the layers of one parameter.
_REARRANGES = (
    *_SLICES,
    *_OPERATIONS,
    *("concatenate", "dynamic_update_slice", "pad", "rev", "scatter", "stack", "tile"),
)
# Noise tells nothing about the structure: a weight that is dropped at random stays a weight.
_NOISE = ("random_", "rng_", "threefry")


def find_uses(jaxpr: Any, n_params: int) -> list[Uses]:
    """Return the levels at which a jaxpr first uses each of its first `n_params` arguments.

    The other arguments are data.
    """
    arguments: list[Value] = [Data()] * len(_open(jaxpr).invars)
    for i, var in enumerate(_open(jaxpr).invars[:n_params]):
        long_axes = sum(length != 1 for length in var.aval.shape)
        arguments[i] = Weights(frozenset([Part((i,), long_axes, var.aval.size)]))
    run = _Run()
    run.jaxpr(jaxpr, arguments)
    found: list[Uses] = [{} for _ in range(n_params)]
    for use, levels in run.uses.items():
        found[use.key[0]][use] = levels
    return found


@dataclass
class _Run:
    """A run of a jaxpr, and the uses that it has seen so far."""

    uses: Uses = field(default_factory=dict)

    def jaxpr(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """Return the results of a jaxpr, open or closed."""
        jaxpr = _open(jaxpr)
        values: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(var: Any) -> Value:
            return CONSTANT if isinstance(var, Literal) else values.get(var, CONSTANT)

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(var) for var in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Return the results of one equation."""
        name = eqn.primitive.name
        loops = {"scan": self.scan, "while": self.while_loop, "cond": self.cond}
        if name in loops:
            return loops[name](eqn, values)
        called = _called(eqn)
        if called is not None:
            return self.jaxpr(called, values)
        if name == "optimization_barrier":
            return values
        if name.startswith(_NOISE):
            result = CONSTANT
        elif any(isinstance(value, Data) for value in values):
            result = self.meet(values, name, _weight_operands(eqn))
        else:
            result = self.prepare(eqn, values)
        return [result] * len(eqn.outvars)

    def meet(self, values: Sequence[Value], name: str = "", operands: Sequence[int] = ()) -> Data:
        """Return the result for weights and data, and record how the weights are used.

        It is one level deeper than the data if the weights among the `operands` are new.
        """
        data = [value for value in values if isinstance(value, Data)]
        level = max(value.level for value in data)
        passed = frozenset[Key]().union(*(value.passed for value in data))
        opaque, kernels = _is_opaque(name), set[Part]()
        for i, value in enumerate(values):
            if isinstance(value, Data):
                continue
            of_value = _kernels(value.parts, opaque) if i in operands else set[Part]()
            for part in value.parts:
                obstacle = "sliced" if part.sliced else ""
                if opaque and part in of_value:
                    obstacle = f"in {name}"
                # What is added to a result belongs to the operation before.
                depth = level if i in operands else max(level - 1, 0)
                use = Use(part.key, part.long_axes, part in of_value, obstacle)
                self.record(use, np.array([depth]))
            kernels |= of_value
        is_new = not all(_has_passed(part.key, passed) for part in kernels)
        return Data(level + is_new, passed.union(part.key for part in kernels))

    def record(self, use: Use, levels: Levels) -> None:
        """Note the levels of a use, for each layer only if it is the first."""
        known = self.uses.get(use)
        self.uses[use] = levels if known is None else earliest(known, levels)

    def prepare(self, eqn: Any, values: Sequence[Value]) -> Weights:
        """Return what is made of parameters alone."""
        parts, name = _parts(values), eqn.primitive.name
        if name in _SLICES:
            parts = frozenset(part._replace(sliced=True) for part in parts)
        if name in _REARRANGES:
            parts = frozenset(part._replace(size=0) for part in parts)
        return Weights(parts)

    def either(self, values: Sequence[Value]) -> Value:
        """Return a value that stands for any of these."""
        if any(isinstance(value, Data) for value in values):
            return self.meet(values)
        return Weights(_parts(values))

    def cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Return the results of all branches, at the level of the deepest."""
        index, *operands = values
        by = [index] if isinstance(index, Data) else []
        branches = [self.jaxpr(jaxpr, operands) for jaxpr in eqn.params["branches"]]
        return [self.either([*by, *results]) for results in zip(*branches, strict=True)]

    def while_loop(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Iterate until the results no longer change; weights add a level only once."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        of_cond, of_body, carry = values[:n], values[n : n + m], values[n + m :]
        while True:
            self.jaxpr(eqn.params["cond_jaxpr"], [*of_cond, *carry])
            after = self.jaxpr(eqn.params["body_jaxpr"], [*of_body, *carry])
            before, carry = carry, [self.either(pair) for pair in zip(carry, after, strict=True)]
            if carry == before:
                return carry

    def scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Run the body until all levels grow by the same numbers twice, and continue from there.

        Each step takes another layer of the stacked weights. In the steps that are not run, the
        levels are assumed to go on growing like that.
        """
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        n_consts, n_carry = _scan_counts(eqn)
        consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
        if length == 0:
            return [*carry, *[CONSTANT] * (len(eqn.outvars) - n_carry)]
        loop = _Loop(length, eqn.params["reverse"])
        stacked = list(zip(values, eqn.invars, strict=True))[n_consts + n_carry :]
        layers = [loop.layer(value, var.aval.size) for value, var in stacked]
        steps: list[_Step] = []
        outside = self.uses
        while len(steps) < length and _steady_growth(steps) is None:
            self.uses = {}
            outputs = self.jaxpr(body, [*consts, *carry, *layers])
            carry = loop.carried(outputs[:n_carry])
            steps.append(_Step([*carry, *outputs[n_carry:]], self.uses))
        self.uses = outside
        growth, rest = _steady_growth(steps) or {}, length - len(steps)
        for use, levels in loop.uses(steps, growth, rest):
            self.record(use, levels)
        last = [
            replace(x, level=x.level + rest * growth.get(i, 0)) if isinstance(x, Data) else x
            for i, x in enumerate(steps[-1].outputs)
        ]
        results = [loop.after_all(outputs) for outputs in (*(s.outputs for s in steps), last)]
        columns = list(zip(*results, strict=True))
        return [*results[-1][:n_carry], *map(self.either, columns[n_carry:])]


class _Step(NamedTuple):
    """The results of one step of a scan, and the uses in it."""

    outputs: list[Value]
    uses: Uses

    def levels(self) -> dict[Any, Any]:
        """Return the levels of the outputs, by position, and of the uses."""
        outputs = enumerate(self.outputs)
        return {i: x.level for i, x in outputs if isinstance(x, Data)} | self.uses

    def without_levels(self) -> Any:
        """Return the results and the uses without their levels."""
        outputs = [replace(x, level=0) if isinstance(x, Data) else x for x in self.outputs]
        return outputs, self.uses.keys()


def _steady_growth(steps: Sequence[_Step]) -> dict[Any, Any] | None:
    """Return by how much each level grows in a step, or `None` until that was the same twice."""
    last = steps[-3:]
    if len(last) < 3 or any(step.without_levels() != last[0].without_levels() for step in last):
        return None
    a, b, c = (step.levels() for step in last)
    growth = {key: c[key] - b[key] for key in c}
    steady = all(np.array_equal(b[key] - a[key], growth[key]) for key in c)
    return growth if steady else None


class _Loop:
    """The stacked layers of one scan.

    In a key, `now` stands for the layer of the step that runs, `past` for those of earlier steps.
    """

    def __init__(self, length: int, reverse: bool) -> None:
        self.length = length
        self.reverse = reverse
        self.now, self.past = object(), object()

    def layer(self, value: Value, array_size: int) -> Value:
        """Return what a step takes of an array."""
        if isinstance(value, Data):
            return value

        def layer(part: Part) -> Part:
            if part.size == array_size:
                long_axes = part.long_axes - (self.length != 1)
                return Part((*part.key, self.now), long_axes, part.size // self.length)
            is_repeated = 0 < part.size < array_size
            return part if is_repeated else part._replace(sliced=True)

        return Weights(frozenset(map(layer, value.parts)))

    def stack_key(self, key: Key) -> Key:
        """Return the key of the stack that a layer is from, or the key itself."""
        tokens = (i for i, token in enumerate(key) if token in (self.now, self.past))
        return key[: next(tokens, len(key))]

    def stack(self, part: Part) -> Part:
        """Return the stack that a layer is from, or the part itself."""
        key = self.stack_key(part.key)
        if key == part.key:
            return part
        long_axes = part.long_axes + (self.length != 1)
        return part._replace(key=key, long_axes=long_axes, size=part.size * self.length)

    def carried(self, values: Iterable[Value]) -> list[Value]:
        """Return the carried results of a step as the next step sees them: its layer is past."""

        def aged(key: Key) -> Key:
            return tuple(self.past if token is self.now else token for token in key)

        def lost(part: Part) -> Part:
            stack = self.stack(part)
            return part if stack == part else stack._replace(size=0, sliced=True)

        return [_mapped(value, aged, lost) for value in values]

    def after_all(self, values: Iterable[Value]) -> list[Value]:
        """Return the results of a step as they are after the loop: whole stacks, not layers."""
        return [_mapped(value, self.stack_key, self.stack) for value in values]

    def uses(
        self, steps: Sequence[_Step], growth: dict[Any, Any], rest: int
    ) -> Iterator[tuple[Use, Levels]]:
        """Return the uses in all steps; `rest` more steps follow, in which the levels grow."""
        for use in dict.fromkeys(use for step in steps for use in step.uses):
            first = next(step.uses[use] for step in steps if use in step.uses)
            levels = np.stack([step.uses.get(use, first) for step in steps])
            key = self.stack_key(use.key)
            if key == use.key:
                yield use, levels.min(axis=0)
                continue
            more = np.arange(1, rest + 1)[:, None] * growth.get(use, 0)
            levels = np.concatenate([levels, levels[-1] + more])
            yield use._replace(key=key), levels[:: -1 if self.reverse else 1].reshape(-1)


def earliest(a: Levels, b: Levels) -> Levels:
    """Return the smaller level of each layer; those of `a` if `b` has other layers."""
    return np.minimum(a, b) if 1 in (a.size, b.size) or a.size == b.size else a


def _mapped(value: Value, on_key: Callable[[Key], Key], on_part: Callable[[Part], Part]) -> Value:
    """Return the value with other weights in place of its own."""
    if isinstance(value, Data):
        return replace(value, passed=frozenset(map(on_key, value.passed)))
    return Weights(frozenset(map(on_part, value.parts)))


def _parts(values: Iterable[Value]) -> frozenset[Part]:
    """Return the parts of all weights."""
    parts = (value.parts for value in values if isinstance(value, Weights))
    return frozenset[Part]().union(*parts)


def _kernels(parts: Iterable[Part], opaque: bool) -> set[Part]:
    """Return the parts of an operand that an operation sums over; the others only rescale them.

    These are the parts with the most long axes. Of an operation that can't be read, they are all
    parts with more than one.
    """
    least = 2 if opaque else max((part.long_axes for part in parts), default=0)
    return {part for part in parts if part.long_axes >= least}


def _has_passed(key: Key, passed: frozenset[Key]) -> bool:
    """Return whether these weights, or the stack that they are a layer of, are among the passed."""
    return any(key[:n] in passed for n in range(1, len(key) + 1))


def _called(eqn: Any) -> Any:
    """Return the jaxpr that the equation calls with its arguments: jit, checkpoint, custom_vjp."""
    counts = len(eqn.invars), len(eqn.outvars)
    for jaxpr in map(_open, eqn.params.values()):
        if isinstance(jaxpr, Jaxpr) and (len(jaxpr.invars), len(jaxpr.outvars)) == counts:
            return jaxpr
    return None


def _is_opaque(name: str) -> bool:
    """Return whether the primitive calls what can't be read."""
    return "call" in name or name == "custom_linear_solve"


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _weight_operands(eqn: Any) -> Sequence[int]:
    """Return the operands that are summed over or looked up."""
    if _is_opaque(eqn.primitive.name):
        return range(len(eqn.invars))
    operands = _OPERATIONS.get(eqn.primitive.name, ())
    if eqn.primitive.name == "dot_general":  # with batch axes only it is an elementwise product
        batch = eqn.params["dimension_numbers"][1]
        return [i for i in operands if len(batch[i]) < eqn.invars[i].aval.ndim]
    return operands


def _scan_counts(eqn: Any) -> tuple[int, int]:
    """Return the numbers of constants and of carried values; JAX's versions differ in their names.

    All other operands and results have one axis less in the body.
    """
    body = _open(eqn.params["jaxpr"])

    def same(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        shapes = zip(outer, inner, strict=True)
        return sum(getattr(a.aval, "shape", ()) == getattr(b.aval, "shape", ()) for a, b in shapes)

    n_carry = same(eqn.outvars, body.outvars)
    return same(eqn.invars, body.invars) - n_carry, n_carry
