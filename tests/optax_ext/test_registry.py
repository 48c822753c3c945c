"""Methods by name: the rows are complete, and `get` makes what the factory makes."""

import inspect
from functools import partial

import jax
import numpy as np
import optax
import pytest

import optax_ext
from support.cases import METHODS, TREES, gradients, parameters, trajectory

PARAMS = parameters(TREES["network"], dtype=np.float32)
GRADS = gradients(TREES["network"], 3, dtype=np.float32)
every_method = pytest.mark.parametrize("case", METHODS, ids=str)


def assert_equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_every_method_has_a_row():
    """Optimizers are the public functions with a rate and a decay of weights."""
    public = {name: getattr(optax_ext, name) for name in optax_ext.__all__}
    methods = {
        name
        for name, function in public.items()
        if inspect.isfunction(function)
        and {"learning_rate", "weight_decay"} <= inspect.signature(function).parameters.keys()
    }
    assert methods == optax_ext.METHODS.keys()
    assert all(row.factory is public[name] for name, row in optax_ext.METHODS.items())


@every_method
def test_get_makes_what_the_factory_makes(case):
    arguments = case.kwargs | {"weight_decay": 0.3, "mask": partial(jax.tree.map, np.ndim)}
    by_name = optax_ext.get(case.method, **arguments)
    expected = trajectory(case.factory(**arguments), PARAMS, GRADS)
    assert_equal(trajectory(by_name, PARAMS, GRADS), expected)


@every_method
def test_factory_of_a_row_takes_injected_hyperparameters(case):
    row = optax_ext.METHODS[case.method]
    injected = optax.inject_hyperparams(row.factory)(learning_rate=0.01, b1=0.8)
    state = injected.init(PARAMS)
    assert {"learning_rate", "b1", "weight_decay"} <= state.hyperparams.keys()
    expected = trajectory(row.factory(0.01, b1=0.8), PARAMS, GRADS)
    ours = trajectory(injected, PARAMS, GRADS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), ours, expected)


@every_method
def test_state_has_the_values_to_log(case):
    state = case.build().init(PARAMS)
    for field in optax_ext.METHODS[case.method].logged:
        assert np.all(np.isfinite(optax.tree.get(state, field)))


@every_method
def test_title_is_in_the_first_line_of_the_docstring(case):
    first_line = str(inspect.getdoc(case.factory)).partition("\n")[0]
    assert optax_ext.METHODS[case.method].title in first_line


@pytest.mark.parametrize("name", ["fam", "FAME", "fame "])
def test_unknown_name_gets_the_nearest_one(name):
    with pytest.raises(ValueError, match=f"one of 'fame', .* got '{name}'; did you mean 'fame'?"):
        optax_ext.get(name, 1e-3)


def test_name_that_resembles_none_gets_all_of_them():
    listed = ", ".join(map(repr, optax_ext.METHODS))
    with pytest.raises(ValueError, match=f"^name must be one of {listed}, got 'shampoo'$"):
        optax_ext.get("shampoo", 1e-3)


def test_wrong_argument_is_refused_by_the_method():
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), got 1.5"):
        optax_ext.get("fame", 1e-3, b1=1.5)
    with pytest.raises(TypeError, match=r"fame\(\) got an unexpected keyword argument 'beta1'"):
        optax_ext.get("fame", 1e-3, beta1=0.9)
