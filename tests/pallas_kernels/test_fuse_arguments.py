"""Bad arguments of `fuse`, `explain` and a fused step: errors name them and what is expected."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.dtypes import float0

from pallas_kernels import explain, fuse
from support.cases import slow_unless
from support.fused import assert_close, chain_step

PARAMS = {"layer": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)}}
TX = optax.adam(0.1)
STATE = TX.init(PARAMS)
BACKENDS = ["auto", "interpret", "xla"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_and_out_of_jit = pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])


@pytest.mark.parametrize("make", [fuse, partial(explain, params=PARAMS)], ids=["fuse", "explain"])
@pytest.mark.parametrize(
    ("tx", "got"),
    [
        (optax.adam, "the function adam: call it first"),
        (None, "None"),
        ("adam", "'adam'"),
        (optax.contrib.muon, "the function muon: call it first"),
    ],
    ids=["uncalled", "none", "name", "contrib"],
)
def test_what_is_no_transformation(make, tx, got):
    with pytest.raises(ValueError, match=f"^tx must be a GradientTransformation, got {got}$"):
        make(tx)


@pytest.mark.parametrize("strict", ["yes", 1, None, jnp.array(True)], ids=repr)
def test_strict_is_a_flag(strict):
    with pytest.raises(ValueError, match="strict must be True or False"):
        fuse(TX, strict=strict)


def replaced(path: str, leaf):
    return {"layer": PARAMS["layer"] | {path: leaf}}


BAD = {
    "no_params": ((None, STATE, PARAMS), "params must be a tree of arrays, got None"),
    "no_state": (
        (PARAMS, None, PARAMS),
        "state must have the structure of tx.init(params), got None",
    ),
    "no_grads": ((PARAMS, STATE, None), "grads must have the structure of params, got None"),
    "missing_grads": (
        (PARAMS, STATE, {"layer": {"kernel": jnp.ones((2, 4))}}),
        "grads must have the structure of params, but has no grads/layer/bias",
    ),
    "none_among_grads": (
        (PARAMS, STATE, replaced("bias", None)),
        "grads must have the structure of params, but has no grads/layer/bias",
    ),
    "unknown_grads": (
        (PARAMS, STATE, replaced("scale", jnp.ones(4))),
        "grads must have the structure of params, but also has grads/layer/scale",
    ),
    "other_container": (
        ([jnp.ones(3)], TX.init([jnp.ones(3)]), (jnp.ones(3),)),
        "grads must have the structure of params, got PyTreeDef((*,)) instead of PyTreeDef([*])",
    ),
    "shape_of_grads": (
        (PARAMS, STATE, replaced("bias", jnp.ones(3))),
        "grads/layer/bias must have shape (4,), like the parameter, got (3,)",
    ),
    "grads_that_would_be_broadcast": (
        (PARAMS, STATE, replaced("bias", jnp.ones(()))),
        "grads/layer/bias must have shape (4,), like the parameter, got ()",
    ),
    "one_leaf": (
        (jnp.ones(4), TX.init(jnp.ones(4)), jnp.ones(3)),
        "grads must have shape (4,), like the parameter, got (3,)",
    ),
    "state_of_another_optimizer": (
        (PARAMS, optax.sgd(0.1, momentum=0.9).init(PARAMS), PARAMS),
        "state must have the structure of tx.init(params), but has no state/0/count",
    ),
    "state_of_other_parameters": (
        (PARAMS, TX.init(replaced("kernel", jnp.ones((3, 4)))), PARAMS),
        "state/0/mu/layer/kernel must have shape (2, 4), as in tx.init(params), got (3, 4)",
    ),
    "name_among_params": (
        (replaced("bias", "zeros"), STATE, PARAMS),
        "params/layer/bias must be an array or a number, got 'zeros'",
    ),
}


@every_backend
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_step_names_what_is_wrong(arguments, message, backend):
    with pytest.raises(ValueError) as error:  # noqa: PT011, JAX adds a note to the message
        fuse(TX, backend=backend).step(*arguments)
    assert str(error.value) == message


def test_errors_under_jit_are_the_same():
    with pytest.raises(ValueError, match="grads/layer/bias must have shape"):
        jax.jit(fuse(TX).step)(PARAMS, STATE, replaced("bias", jnp.ones(3)))


def test_a_state_that_is_none():
    """Some transformations have no better one."""
    tx = optax.GradientTransformation(lambda params: None, lambda u, s, p=None: (u, s))
    params, state = fuse(tx, backend="interpret").step(PARAMS, None, PARAMS)
    assert state is None
    assert_close(params, jax.tree.map(lambda p: 2 * p, PARAMS), 0)


@every_backend
def test_gradients_of_another_structure_that_the_chain_takes(backend):
    """Optax's lookahead steps pairs of parameters by the gradients of one of them."""
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    ours = fuse(tx, backend=backend).step(params, tx.init(params), PARAMS)
    assert_close(ours, chain_step(tx)(params, tx.init(params), PARAMS), 1e-6)


@pytest.mark.parametrize("make", [fuse, partial(explain, params=PARAMS)], ids=["fuse", "explain"])
def test_multi_steps(make):
    """Optax's class has the functions of a transformation without being one."""
    make(optax.MultiSteps(TX, 2))
    with pytest.raises(ValueError, match="got the class MultiSteps: call it first"):
        make(optax.MultiSteps)


def test_gradients_of_a_batch():
    """One for each example, which the chain averages."""
    mean = optax.stateless(lambda updates, _: jax.tree.map(lambda g: g.mean(0), updates))
    tx = optax.chain(mean, optax.sgd(0.1))
    grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    ours = fuse(tx, backend="interpret").step(PARAMS, tx.init(PARAMS), grads)
    assert_close(ours, chain_step(tx)(PARAMS, tx.init(PARAMS), grads), 1e-6)


@every_backend
def test_gradients_of_a_batch_that_the_chain_does_not_average(backend):
    grads = jax.tree.map(lambda p: jnp.stack([p, p, p]), PARAMS)
    step = fuse(optax.sgd(0.1), backend=backend).step
    with pytest.raises(ValueError, match=r"^updates/layer/bias must have .* \(4,\), .* \(3, 4\)"):
        step(PARAMS, optax.sgd(0.1).init(PARAMS), grads)


@pytest.mark.parametrize("dtype", slow_unless(["int32"], ["int32", "uint8", "bool"]))
@in_and_out_of_jit
@every_backend
def test_leaves_that_are_not_floating_behave_as_in_the_chain(dtype, jit, backend):
    tx = optax.adam(0.6)
    params = PARAMS | {"other": jnp.array([0, 1, 1, 1], dtype)}
    ours = jit(fuse(tx, backend=backend).step)(params, tx.init(params), params)
    assert_close(ours, chain_step(tx)(params, tx.init(params), params), 1e-6)


NO_NUMBERS = {
    "key": (lambda: jax.random.split(jax.random.key(0), 4),) * 2,
    "integers_with_jax_grad": (lambda: jnp.arange(4), lambda: np.zeros(4, float0)),
}


@in_and_out_of_jit
@every_backend
@pytest.mark.parametrize(("leaf", "gradient"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_an_error_of_the_chain_names_the_leaf(leaf, gradient, jit, backend):
    tx = optax.sgd(0.1)
    params, grads = PARAMS | {"other": leaf()}, PARAMS | {"other": gradient()}
    note = f"params/other is {params['other'].dtype}: optax.masked keeps it out of an optimizer"
    with pytest.raises(TypeError) as error:
        jit(fuse(tx, backend=backend).step)(params, tx.init(params), grads)
    assert note in error.value.__notes__
    assert not any("layer" in line for line in error.value.__notes__)


def test_explanation_of_numbers():
    """They are what `jnp.asarray` makes of them."""
    numbers = {"scale": 1.0, "shift": 2, "kernel": jnp.ones((2, 4))}
    arrays = jax.tree.map(jnp.asarray, numbers)
    assert explain(TX, numbers) == explain(TX, arrays)
    assert explain(TX, numbers).parameters == 10


@every_backend
def test_step_of_numbers(backend):
    numbers = {"scale": 1.0, "shift": 2.0}
    ours = fuse(TX, backend=backend).step(numbers, TX.init(numbers), {"scale": 0.5, "shift": 1.0})
    expected = chain_step(TX)(numbers, TX.init(numbers), {"scale": 0.5, "shift": 1.0})
    assert [float(x) for x in jax.tree.leaves(ours[0])] == pytest.approx(
        [float(x) for x in jax.tree.leaves(expected[0])], rel=1e-6
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, "params must be a tree of arrays, got None"),
        ({"a": ["zeros"]}, "params/a/0 must be an array or a number, got 'zeros'"),
        ({"a": object}, "params/a must be an array or a number, got <class 'object'>"),
    ],
    ids=["none", "name", "class"],
)
def test_explain_names_what_is_no_parameter(params, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        explain(TX, params)
