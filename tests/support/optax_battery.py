"""Optax's own test modules, run over other optimizers than Optax's.

The wheel ships its tests, but they fix the optimizers that they visit. `load` executes such a
module up to its test class, exchanges some of the names defined there (the parameter lists, the
namespaces that factories are looked up in) and then executes the class. The test bodies are never
touched.
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import operator
import os
import pathlib
import types
import unittest
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import optax
from absl.testing import parameterized
from optax._src.utils import x64_precision

Factory = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Row:
    """A factory and the arguments that the tests call it with."""

    name: str
    factory: Factory
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One test body of Optax with one set of its arguments."""

    owner: type[unittest.TestCase]
    body: types.FunctionType
    row: str
    axes: tuple[str, ...]
    arguments: Mapping[str, Any]

    @property
    def test(self) -> str:
        return self.body.__name__

    def __str__(self) -> str:
        return "-".join((self.test.removeprefix("test_"), self.row, *self.axes))

    def run(self) -> None:
        try:
            with x64_precision(False):  # float64_test does not clean up where it fails
                self.body(self.owner(), **self.arguments)
        except unittest.SkipTest as skip:
            raise AssertionError(f"Optax refused to run {self}: {skip}") from skip


def contrib_tests(rows: Sequence[Row]) -> list[Case]:
    table = _optimizers(rows, wrapper_name=None, wrapper_kwargs=None)
    return load(
        "optax.contrib._common_test",
        "ContribTest",
        _MAIN_OPTIMIZERS_UNDER_TEST=table,
        _ALL_OPTIMIZERS_UNDER_TEST=table,
        contrib=_namespace(rows),
    )


def alias_tests(rows: Sequence[Row]) -> list[Case]:
    return load(
        "optax._src.alias_test",
        "AliasTest",
        _OPTIMIZERS_UNDER_TEST=_optimizers(rows),
        alias=_namespace(rows),
    )


def sharding_tests(rows: Sequence[Row]) -> list[Case]:
    return load(
        "optax._src.sharding_test",
        "ShardingTest",
        OPTIMIZERS={row.name: row.factory(**row.arguments) for row in rows},
    )


def float64_tests(rows: Sequence[Row]) -> list[Case]:
    return load(
        "optax._src.float64_test",
        "Float64Test",
        ALL_MODULES=[(row.name, row.factory, row.arguments) for row in rows],
    )


def load(module: str, test_case: str, **replacements: Any) -> list[Case]:
    """Lists the cases of one Optax test class after exchanging names of its module.

    Raises `LookupError` where this version of Optax lacks the module, the class or a name: an
    exchange that nobody reads would leave the battery testing nothing of ours.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"the installed Optax has no module {module}")
    tree = ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8"), spec.origin)
    lines = (i for i, node in enumerate(tree.body) if _defines(node, test_case))
    start = next(lines, None)
    if start is None:
        raise LookupError(f"{module} defines no class {test_case}")

    namespace: dict[str, Any] = {"__name__": module, "__file__": spec.origin}
    # Optax's own tables warn as they are built, and sharding_test overwrites XLA_FLAGS.
    with warnings.catch_warnings(action="ignore"), mock.patch.dict(os.environ):
        _execute(tree.body[:start], namespace)
    recorder = _Recorder()
    replacements |= {"parameterized": recorder, "jax": _Jax("jax")}
    if missing := replacements.keys() - namespace.keys():
        raise LookupError(f"{module} defines no {', '.join(sorted(missing))} before {test_case}")
    namespace.update(replacements)
    _execute(tree.body[start : start + 1], namespace)
    return [Case(namespace[test_case], *record) for record in recorder.records]


def _optimizers(rows: Sequence[Row], **common: Any) -> list[dict[str, Any]]:
    return [{"opt_name": row.name, "opt_kwargs": row.arguments, **common} for row in rows]


def _namespace(rows: Sequence[Row]) -> types.SimpleNamespace:
    """Return a stand-in for the module in which Optax's tests look up a factory by its name."""
    return types.SimpleNamespace(**{row.name: row.factory for row in rows})


def _defines(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and node.name == name


def _execute(statements: list[ast.stmt], namespace: dict[str, Any]) -> None:
    exec(compile(ast.Module(statements, []), namespace["__file__"], "exec"), namespace)


class _Recorder:
    """Stands in for absl's `parameterized`: lists the cases that it would make into methods."""

    TestCase = parameterized.TestCase

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []

    def product(
        self, *rows: Iterable[Mapping[str, Any]], **axes: Iterable[Any]
    ) -> Callable[..., Any]:
        factors = (*rows, *([{name: value} for value in axes[name]] for name in axes))

        def record(body: types.FunctionType) -> types.FunctionType:
            for parts in itertools.product(*factors):
                arguments = functools.reduce(operator.or_, parts)
                labels = tuple(_label(arguments[name]) for name in axes if name != "opt_name")
                self.records.append((body, arguments["opt_name"], labels, arguments))
            return body

        return record

    def named_parameters(self, *rows: Any) -> Callable[..., Any]:
        named = rows[0] if len(rows) == 1 else rows

        def record(body: types.FunctionType) -> types.FunctionType:
            _, *names = inspect.signature(body).parameters
            for row, *values in named:
                self.records.append((body, row, (), dict(zip(names, values, strict=True))))
            return body

        return record


def _label(value: Any) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("_setup_")


class _Version(str):
    """jax's version, compared by number: as text "0.10" < "0.7.2", which skips sharding tests."""

    def __lt__(self, other: str) -> bool:
        return jax.__version_info__ < tuple(map(int, other.split(".")))


class _Jax(types.ModuleType):
    """jax, as Optax's tests see it."""

    __version__ = _Version(jax.__version__)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)
