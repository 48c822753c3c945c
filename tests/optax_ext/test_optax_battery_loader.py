"""The battery must not pass because it found nothing to test, or tests nothing of what it found."""

import jax
import jax.numpy as jnp
import optax
import pytest

from support.optax_battery import (
    Row,
    alias_tests,
    contrib_tests,
    float64_tests,
    load,
    sharding_tests,
)


@pytest.mark.parametrize(
    ("module", "test_case", "names", "message"),
    [
        ("optax._src.gone_test", "AliasTest", {}, "no module optax._src.gone_test"),
        ("optax._src.alias_test", "GoneTest", {}, "no class GoneTest"),
        ("optax._src.alias_test", "AliasTest", {"_GONE": ()}, "no _GONE before AliasTest"),
    ],
)
def test_names_that_optax_lacks_are_reported(module, test_case, names, message):
    with pytest.raises(LookupError, match=message):
        load(module, test_case, **names)


def ascent(learning_rate):
    return optax.sgd(-learning_rate)


def without_extra_args(learning_rate):
    def update(updates, state, params=None):
        return optax.sgd(learning_rate).update(updates, state, params)

    return optax.GradientTransformation(optax.sgd(learning_rate).init, update)


def promoting(learning_rate):
    return optax.stateless_with_tree_map(lambda g, _: -learning_rate * jnp.asarray(g, float))


def with_state(before, after):
    """Descent whose state is `before(params)` and then, for good, `after(gradient)`."""

    def factory(learning_rate):
        def update(updates, state, params=None, **extra_args):
            del state, params, extra_args
            return jax.tree.map(lambda g: -learning_rate * g, updates), after(updates)

        return optax.GradientTransformationExtraArgs(before, update)

    return factory


changing_dtype = with_state(lambda _: jnp.zeros((), jnp.int32), lambda _: jnp.zeros(()))
gaining_sharding = with_state(lambda p: jnp.zeros(p.shape, p.dtype), lambda g: g)


@pytest.mark.parametrize(
    ("factory", "tests", "test", "complaint"),
    [
        (ascent, contrib_tests, "test_optimizers", "Not equal to tolerance"),
        (ascent, alias_tests, "test_optimization", "Not equal to tolerance"),
        (changing_dtype, alias_tests, "test_optimization", "recompiles on second call"),
        (
            without_extra_args,
            contrib_tests,
            "test_optimizers_accept_extra_args",
            "unexpected",
        ),
        (promoting, contrib_tests, "test_preserve_dtype", "float32.* != .*bfloat16"),
        (changing_dtype, float64_tests, "test_mixed_dtype_input_outputs", "int32.* != .*float64"),
        (
            gaining_sharding,
            sharding_tests,
            "test_state_sharding_type_init_match_update",
            r"\[2,8@x,4\]",
        ),
    ],
)
def test_a_broken_optimizer_fails(factory, tests, test, complaint):
    row = Row("broken", factory, {"learning_rate": 0.1})
    case = next(case for case in tests([row]) if case.test == test)
    with pytest.raises((AssertionError, TypeError), match=complaint):
        case.run()
    assert not jax.config.read("jax_enable_x64")


def test_a_skipped_test_fails():
    """Optax skips the factories whose rate is not annotated as one that may be a schedule."""
    test = "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such"
    cases = contrib_tests([Row("unannotated", ascent, {"learning_rate": 0.1})])
    with pytest.raises(AssertionError, match="doesn't accept a learning schedule"):
        next(case for case in cases if case.test == test).run()
