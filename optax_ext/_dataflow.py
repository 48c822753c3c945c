"""Where each parameter meets the data: an abstract run of a computation.

Instead of numbers, the values are what matters of them: `Weights` are made of parameters alone (or
of nothing, then they are constants), `Data` depend on the inputs and know how many operations with
weights lie behind them. Nothing here knows modules or optimizers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal


@dataclass(frozen=True)
class Part:
    """A parameter, or what slicing left of it.

    Attributes:
      leaf: index of the parameter.
      key: the slices that lead to it, from the whole, which is `()`.
      size: number of its elements.
      ndim: number of its axes.
      factor: whether it went into a product with other parameters.
    """

    leaf: int
    key: tuple[Any, ...]
    size: int
    ndim: int
    factor: bool = False


@dataclass(frozen=True)
class Weights:
    """A value that no input has an influence on."""

    parts: frozenset[Part] = frozenset()


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
      ndim: number of axes of the part.
      level: number of operations with weights before it.
      operation: what sums over it or looks it up; empty if it is used elementwise.
      opaque: whether that can't be looked into.
    """

    key: tuple[Any, ...]
    ndim: int
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
# What can't be looked into, as whatever calls and isn't known here. Operands with more than one axis
# are taken for its weights.
_OPAQUE = ("custom_linear_solve", "io_callback", "pure_callback")
# What carries a computation only to join elements by it.
_JOINING = ("reduce", "scatter", "select_and")
_SLICES = ("slice", "dynamic_slice", "split")
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
        Weights(frozenset([Part(i, (), var.aval.size, var.aval.ndim)])) if i < count else Data()
        for i, var in enumerate(jaxpr.invars)
    ]
    run.jaxpr(jaxpr, arguments)
    return run.uses


@dataclass
class _Run:
    """An abstract run: what it has seen so far, and in which calls and iterations it is."""

    uses: list[set[Use]]
    place: tuple[Any, ...] = ()
    bits: dict[tuple[int, tuple[Any, ...]], int] = field(default_factory=dict)

    def jaxpr(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """The results, open jaxpr or closed."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(var: Any) -> Value:
            return CONSTANT if isinstance(var, Literal) else known.get(var, CONSTANT)

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
        return [self.prepare(eqn, values, i) for i in range(len(eqn.outvars))]

    def at(self, place: Any, jaxpr: Any, values: list[Value]) -> list[Value]:
        """The results of a call or an iteration."""
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
        """What depends on data: one level more, if weights take part that are new on its way."""
        data = [value for value in values if isinstance(value, Data)]
        level = max(value.level for value in data)
        passed = 0
        for value in data:
            passed |= value.passed
        kernels: set[Part] = set()
        for i, value in enumerate(values):
            if not isinstance(value, Weights):
                continue
            inside = _kernels(value.parts, opaque) if i in operands else set()
            for part in value.parts:
                # What is added to a result stands beside the operation that made it.
                depth = level if i in operands else max(level - 1, 0)
                operation = name if part in inside else ""
                use = Use(part.key, part.ndim, depth, operation, opaque and part in inside)
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

    def prepare(self, eqn: Any, values: Sequence[Value], output: int) -> Value:
        """What is made of parameters alone."""
        name = eqn.primitive.name
        made_of = [value.parts for value in values if isinstance(value, Weights) and value.parts]
        parts = frozenset[Part]().union(*made_of)
        if name in _OPERATIONS and len(made_of) > 1:
            parts = frozenset(replace(part, factor=True) for part in parts)
        if name in _SLICES and parts:
            before, after = eqn.invars[0].aval.size, eqn.outvars[output].aval.size
            key = self.slice_key(eqn, output)
            parts = frozenset(
                replace(part, key=(*part.key, key), size=part.size * after // max(before, 1))
                for part in parts
            )
        if name == "squeeze":  # of a slice: what remains is one of the stacked
            lost = len(eqn.params["dimensions"])
            parts = frozenset(
                replace(part, ndim=part.ndim - lost) if part.key else part for part in parts
            )
        return Weights(parts)

    def slice_key(self, eqn: Any, output: int) -> tuple[Any, ...]:
        """What tells one slice from another; an index unknown here is another at every place."""
        params = tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
        starts = eqn.invars[1:]
        if all(isinstance(start, Literal) for start in starts):
            return (params, output, tuple(int(start.val) for start in starts))
        return (params, output, id(eqn), self.place)

    def scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        """Iteration by iteration, until they teach nothing new."""
        body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
        # What is sliced or stacked has one axis less inside; JAX's versions name the counts unlike.
        sliced = sum(_loses_axis(*pair) for pair in zip(eqn.invars, body.invars, strict=True))
        stacked = sum(_loses_axis(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True))
        n_carry = len(body.outvars) - stacked
        n_consts = len(values) - n_carry - sliced
        consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
        rows = values[n_consts + n_carry :]
        length = eqn.params["length"]
        results: list[list[Value]] = [[] for _ in range(stacked)]
        for i in range(length):
            known = self.knowledge()
            row = length - 1 - i if eqn.params["reverse"] else i
            inputs = [*consts, *carry, *(_row(value, row, length) for value in rows)]
            outputs = self.at((id(eqn), i), body, inputs)
            for result, output in zip(results, outputs[n_carry:], strict=True):
                result.append(output)
            before, carry = carry, outputs[:n_carry]
            if carry == before and known == self.knowledge():
                break
        return [*carry, *map(self.either, results)]

    def while_loop(self, eqn: Any, values: list[Value]) -> list[Value]:
        """As often as it takes until they teach nothing new: the number is not known."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        of_cond, of_body, carry = values[:n], values[n : n + m], values[n + m :]
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
        return Weights(frozenset[Part]().union(*weights))

    def knowledge(self) -> int:
        return sum(map(len, self.uses))


def _called(eqn: Any) -> Any:
    """The jaxpr that the equation calls with its own arguments: jit, checkpoint, custom_vjp."""
    if eqn.primitive.name in _OPAQUE:
        return None
    counts = len(eqn.invars), len(eqn.outvars)
    return next((j for j in _jaxprs(eqn) if (len(j.invars), len(j.outvars)) == counts), None)


def _is_opaque(eqn: Any) -> bool:
    """Whether it does what isn't known here."""
    name = eqn.primitive.name
    if name.startswith(_JOINING):
        return False
    return name in _OPAQUE or "call" in name or any(True for _ in _jaxprs(eqn))


def _jaxprs(eqn: Any) -> Iterator[Jaxpr]:
    """All that the equation carries, open."""
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if isinstance(inner, Jaxpr):
            yield inner


def _weight_operands(eqn: Any) -> Sequence[int]:
    """The operands that are summed over or looked up."""
    if _is_opaque(eqn):
        return range(len(eqn.invars))
    operands = _OPERATIONS.get(eqn.primitive.name, ())
    if eqn.primitive.name == "dot_general":  # with batch axes only it is an elementwise product
        batch = eqn.params["dimension_numbers"][1]
        return [i for i in operands if len(batch[i]) < eqn.invars[i].aval.ndim]
    return operands


def _kernels(parts: frozenset[Part], opaque: bool) -> set[Part]:
    """The largest of what an operand is made of, not the norms that rescale it; and all factors."""
    if opaque:
        return {part for part in parts if part.ndim > 1}
    largest = max((part.size for part in parts), default=0)
    return {part for part in parts if part.factor or part.size == largest}


def _loses_axis(outer: Any, inner: Any) -> bool:
    return getattr(outer.aval, "ndim", 0) == getattr(inner.aval, "ndim", 0) + 1


def _row(value: Value, i: int, length: int) -> Value:
    """The i-th of the stacked."""
    if isinstance(value, Data):
        return value
    return Weights(
        frozenset(
            replace(part, key=(*part.key, i), size=part.size // length, ndim=part.ndim - 1)
            for part in value.parts
        )
    )
