"""Where each parameter meets the data: an abstract run of a computation.

Instead of numbers, the values are what matters of them: `Weights` are made of parameters alone (or
of nothing, then they are constants), `Data` depend on the inputs and know how many operations with
weights lie behind them. Nothing here knows modules or optimizers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal

from optax_ext._tracing import numbers as _numbers
from optax_ext._tracing import parts as _parts
from optax_ext._tracing.numbers import Number
from optax_ext._tracing.parts import Part, Parts
from optax_ext._tracing.preparing import prepared


@dataclass(frozen=True)
class Weights:
    """A value that no input has an influence on: of these parts, or a number that is known."""

    parts: Parts = frozenset()
    number: Number | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Data:
    """A value that depends on the inputs.

    Attributes:
      level: number of operations with weights on the longest path from an input.
      passed: the weights of these operations, one bit each.
    """

    level: int = 0
    passed: int = 0


Value = Weights | Data
CONSTANT = Weights()


class Use(NamedTuple):
    """One meeting of a part with data.

    Attributes:
      key: which part of the parameter.
      long_axes: number of axes of the part that aren't of length 1.
      level: number of operations with weights before it.
      operation: what sums over it or looks it up; empty if it is used elementwise.
      opaque: whether that can't be looked into.
    """

    key: tuple[Any, ...]
    long_axes: int
    level: int
    operation: str
    opaque: bool = False


# What sums products of two operands, or looks up rows of one; and which operands may be weights.
_OPERATIONS = {
    "dot_general": (0, 1),
    "conv_general_dilated": (0, 1),
    "ragged_dot": (0, 1),
    "ragged_dot_general": (0, 1),
    "triangular_solve": (0,),
    "gather": (0,),
    "dynamic_slice": (0,),
}
# What can't be looked into, as whatever calls and isn't known here. Operands with more than one
# axis are taken for its weights.
_OPAQUE = ("custom_linear_solve", "io_callback", "pure_callback")
# What carries a computation only to join elements by it.
_JOINING = ("reduce", "scatter", "select_and")
# What cuts its first operand where the others say.
_INDEXED = ("dynamic_slice", "gather")
# Noise has no part in the structure: a weight that is dropped at random stays a weight.
_NOISE = (
    "random_bits",
    "random_gamma",
    "random_unwrap",
    "random_wrap",
    "rng_bit_generator",
    "rng_uniform",
    "threefry2x32",
)


def uses_of_parameters(jaxpr: Any, count: int) -> list[set[Use]]:
    """All meetings of each of the first `count` arguments with what depends on the others."""
    run = _Run(uses=[set() for _ in range(count)])
    arguments: list[Value] = [
        Weights(frozenset([_whole(i, var.aval)])) if i < count else Data()
        for i, var in enumerate(_open(jaxpr).invars)
    ]
    run.jaxpr(jaxpr, arguments)
    return run.uses


def _whole(leaf: int, aval: Any) -> Part:
    long_axes = sum(length != 1 for length in aval.shape)
    return Part(leaf, (), aval.size, aval.ndim, long_axes, total=aval.size)


@dataclass
class _Run:
    """An abstract run: what it has seen so far, and in which calls and iterations it is."""

    uses: list[set[Use]]
    place: tuple[Any, ...] = ()
    counting: set[Any] = field(default_factory=set)  # loops whose counters have cut weights
    bits: dict[tuple[int, tuple[Any, ...]], int] = field(default_factory=dict)

    def jaxpr(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """Return the results of a jaxpr, open or closed."""
        constants = list(getattr(jaxpr, "consts", ()))
        jaxpr = _open(jaxpr)
        known: dict[Any, Value] = {}
        if constants:
            numbers = [Weights(number=_numbers.known(constant)) for constant in constants]
            known.update(zip(jaxpr.constvars, numbers, strict=True))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(var: Any) -> Value:
            if isinstance(var, Literal):
                return Weights(number=_numbers.known(var.val))
            return known.get(var, CONSTANT)

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(var) for var in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        control: Callable[..., list[Value]] | None = {
            "scan": self.scan,
            "while": self.while_loop,
            "cond": self.cond,
        }.get(name)
        if control is not None:
            return control(eqn, values)
        inner = _called(eqn)
        if inner is not None:
            return self.at(id(eqn), inner, values)
        if name in _NOISE:
            return [CONSTANT] * len(eqn.outvars)
        if name == "optimization_barrier":
            return values
        if any(isinstance(value, Data) for value in values):
            met = self.meet(values, name, _weight_operands(eqn), _is_opaque(eqn))
            return [met] * len(eqn.outvars)
        return self.prepare(eqn, [value for value in values if isinstance(value, Weights)])

    def at(self, place: Any, jaxpr: Any, values: list[Value]) -> list[Value]:
        """Return the results of a call or an iteration."""
        outside, self.place = self.place, (*self.place, place)
        results = self.jaxpr(jaxpr, values)
        self.place = outside
        return results

    def meet(
        self,
        values: Sequence[Value],
        name: str = "",
        operands: Sequence[int] = (),
        opaque: bool = False,
    ) -> Value:
        """Return what depends on data: one level more, if weights are new on its way."""
        data = [value for value in values if isinstance(value, Data)]
        level = max(value.level for value in data)
        passed = 0
        for value in data:
            passed |= value.passed
        kernels: set[Part] = set()
        for i, value in enumerate(values):
            if not isinstance(value, Weights):
                continue
            inside = set[Part]()
            if i in operands and opaque:
                inside = {part for part in value.parts if part.ndim > 1}
            elif i in operands:
                inside = _parts.kernels(value.parts)
            for part in value.parts:
                # What is added to a result stands beside the operation that made it.
                depth = level if i in operands else max(level - 1, 0)
                operation = name if part in inside else ""
                use = Use(part.key, part.long_axes, depth, operation, opaque and part in inside)
                self.uses[part.leaf].add(use)
            kernels |= inside
        is_new = not all(self.has_passed(part, passed) for part in kernels)
        for part in kernels:
            passed |= self.bit(part.leaf, part.key)
        return Data(level + is_new, passed)

    def bit(self, leaf: int, key: tuple[Any, ...]) -> int:
        return 1 << self.bits.setdefault((leaf, key), len(self.bits))

    def has_passed(self, part: Part, passed: int) -> bool:
        """Whether this part, or one that holds it, is on the way."""
        return any(
            passed & self.bit(part.leaf, part.key[:n])
            for n in range(len(part.key) + 1)
            if (part.leaf, part.key[:n]) in self.bits
        )

    def prepare(self, eqn: Any, values: Sequence[Weights]) -> list[Value]:
        """Return what is made of parameters alone, or of nothing."""
        numbers = [value.number for value in values]
        if not any(value.parts for value in values):
            results = [Weights(number=_numbers.computed(eqn, numbers))]
            return [*results, *[CONSTANT] * (len(eqn.outvars) - 1)]
        if eqn.primitive.name in _INDEXED:
            self.counting.update(*(number.loops for number in numbers if number is not None))
        parts = [value.parts for value in values]
        return [
            Weights(prepared(eqn, parts, numbers, i, self.place)) for i in range(len(eqn.outvars))
        ]

    def scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Run iteration by iteration, until they teach nothing new."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        inner, outer = _open(body).invars, _open(body).outvars
        # What is sliced or stacked has one axis less inside; JAX's versions name the counts unlike.
        sliced = sum(_loses_axis(*pair) for pair in zip(eqn.invars, inner, strict=True))
        stacked = sum(_loses_axis(*pair) for pair in zip(eqn.outvars, outer, strict=True))
        n_carry = len(outer) - stacked
        n_consts = len(values) - n_carry - sliced
        loop = (id(eqn), self.place)
        consts, rows = values[:n_consts], values[n_consts + n_carry :]
        carry = [_carried(value, loop) for value in values[n_consts : n_consts + n_carry]]
        of_weights = any(isinstance(value, Weights) and value.parts for value in rows)
        shapes = [var.aval for var in eqn.invars[n_consts + n_carry :]]
        results: list[list[Value]] = []
        for i in range(length):
            known = self.knowledge()
            at = length - 1 - i if eqn.params["reverse"] else i
            now = [_row(*pair, at, loop) for pair in zip(rows, shapes, strict=True)]
            outputs = self.at((id(eqn), i), body, [*consts, *carry, *now])
            results.append(outputs[n_carry:])
            before, carry = carry, [_carried(value, loop) for value in outputs[:n_carry]]
            same = carry == before and known == self.knowledge()
            if same and not of_weights and loop not in self.counting:
                carry = [_forgotten(value) for value in carry]  # they may have counted on
                break
        if eqn.params["reverse"]:
            results.reverse()
        ndims = [var.aval.ndim for var in outer[n_carry:]]
        columns = zip(zip(*results, strict=True), ndims, strict=True) if results else ()
        return [
            *(_after(value, loop) for value in carry),
            *(self.stack(column, ndim, length) for column, ndim in columns),
            *[CONSTANT] * (0 if results else stacked),
        ]

    def stack(self, rows: Sequence[Value], ndim: int, length: int) -> Value:
        """Return the results of all iterations; if they are fewer, the others are the same."""
        weights = [value.parts for value in rows if isinstance(value, Weights)]
        if len(weights) < len(rows):
            return self.meet(rows)
        if len(weights) < length:
            weights = [frozenset[Part]().union(*weights)]
        return Weights(_parts.stacked(weights, ndim))

    def while_loop(self, eqn: Any, values: list[Value]) -> list[Value]:
        """As often as it takes until they teach nothing new: the number is not known."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        of_cond, of_body = values[:n], values[n : n + m]
        carry = [_forgotten(value) for value in values[n + m :]]
        for _ in range(len(carry) + len(self.uses) + 1):
            self.at(id(eqn), eqn.params["cond_jaxpr"], [*of_cond, *carry])
            after = self.at(id(eqn), eqn.params["body_jaxpr"], [*of_body, *carry])
            before = carry
            carry = [self.either(pair) for pair in zip(before, after, strict=True)]
            if carry == before:
                break
        return carry

    def cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Every branch, and the longest."""
        chosen, *operands = values
        by = [chosen] if isinstance(chosen, Data) else []
        branches = [self.at(id(eqn), jaxpr, operands) for jaxpr in eqn.params["branches"]]
        return [self.either([*by, *results]) for results in zip(*branches, strict=True)]

    def either(self, values: Sequence[Value]) -> Value:
        """One of several values, or all of them side by side."""
        weights = [value.parts for value in values if isinstance(value, Weights)]
        if len(weights) < len(values):
            return self.meet(values)
        numbers = [value.number for value in values if isinstance(value, Weights)]
        same = len(set(map(id, numbers))) == 1
        return Weights(frozenset[Part]().union(*weights), numbers[0] if same else None)

    def knowledge(self) -> int:
        return sum(map(len, self.uses))


def _called(eqn: Any) -> Any:
    """Return the jaxpr that the equation calls with its arguments: jit, checkpoint, custom_vjp."""
    if eqn.primitive.name in _OPAQUE:
        return None
    counts = len(eqn.invars), len(eqn.outvars)
    for jaxpr in _jaxprs(eqn):
        if (len(_open(jaxpr).invars), len(_open(jaxpr).outvars)) == counts:
            return jaxpr
    return None


def _is_opaque(eqn: Any) -> bool:
    """Whether it does what isn't known here."""
    name = eqn.primitive.name
    if name.startswith(_JOINING):
        return False
    return name in _OPAQUE or "call" in name or any(True for _ in _jaxprs(eqn))


def _jaxprs(eqn: Any) -> Iterator[Any]:
    """All that the equation carries, open or closed."""
    return (value for value in eqn.params.values() if isinstance(_open(value), Jaxpr))


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _weight_operands(eqn: Any) -> Sequence[int]:
    """Return the operands that are summed over or looked up."""
    if _is_opaque(eqn):
        return range(len(eqn.invars))
    operands = _OPERATIONS.get(eqn.primitive.name, ())
    if eqn.primitive.name == "dot_general":  # with batch axes only it is an elementwise product
        batch = eqn.params["dimension_numbers"][1]
        return [i for i in operands if len(batch[i]) < eqn.invars[i].aval.ndim]
    return operands


def _loses_axis(outer: Any, inner: Any) -> bool:
    return getattr(outer.aval, "ndim", 0) == getattr(inner.aval, "ndim", 0) + 1


def _row(value: Value, aval: Any, i: int, loop: Any) -> Value:
    """Return the i-th of the stacked values."""
    if isinstance(value, Data):
        return value
    number = None if value.number is None else value.number.at(i, loop)
    return Weights(_parts.row(value.parts, aval.ndim, i, aval.shape[0]), number)


def _carried(value: Value, loop: Any) -> Value:
    """From one iteration to the next."""
    if isinstance(value, Data) or value.number is None:
        return value
    return Weights(value.parts, value.number.within(loop))


def _after(value: Value, loop: Any) -> Value:
    """Once the loop is over."""
    if isinstance(value, Data) or value.number is None:
        return value
    return Weights(value.parts, value.number.after(loop))


def _forgotten(value: Value) -> Value:
    """Without the number, which may be another."""
    return value if isinstance(value, Data) else Weights(value.parts)
