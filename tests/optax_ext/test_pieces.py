"""The pieces around optimizers that are not ours, and what they leave in the state to be read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext
from support.runs import history
from support.strategies import filled, shape

TREE = {"in": {"bias": shape(3), "kernel": shape(2, 3)}, "out": {"kernel": shape(3, 4)}}
PARAMS, *GRADS = [filled(TREE, seed) for seed in range(7)]


def logged(optimizer, name, params=PARAMS, grads=GRADS):
    """Return what `optax.tree.get` reads after each step."""
    steps = history(optimizer, params, grads)
    return [np.asarray(optax.tree.get(state, name)) for _, state in steps]


def norm(tree):
    return math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))


def assert_close(ours, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), ours, expected
    )


def regularized(inner, **options):
    return optax_ext.velocity_regularized(inner, **{"beta3": 0.3, "lr_cutoff": 0.5} | options)


ADAMW = optax.adamw(0.1, b1=0.8, weight_decay=0.1)
LION = optax.lion(0.1, b2=0.7)
PARTS = optax.partition({"adamw": ADAMW, "lion": LION}, {"in": "adamw", "out": "lion"})


@pytest.mark.parametrize(
    ("inner", "decay_in", "decay_out"),
    [(ADAMW, 0.8, 0.8), (LION, 0.7, 0.7), (PARTS, 0.8, 0.7)],
    ids=["adamw", "lion", "partition"],
)
def test_gate_of_any_velocity(inner, decay_in, decay_out):
    """One gate on all of the update, weight decay included, from all velocities together."""
    decays = {"in": {"bias": decay_in, "kernel": decay_in}, "out": {"kernel": decay_out}}
    optimizer = regularized(inner)
    velocity = jax.tree.map(np.zeros_like, PARAMS)
    params, state, inner_state = PARAMS, optimizer.init(PARAMS), inner.init(PARAMS)
    gates = []
    for gradient in GRADS:
        velocity = jax.tree.map(lambda b, u, g: b * u + (1 - b) * g, decays, velocity, gradient)
        gate = 1 / (1 + min(0.3 * norm(velocity) ** 2, 0.5))
        step, inner_state = inner.update(gradient, inner_state, params)
        updates, state = optimizer.update(gradient, state, params)
        assert_close(optax.tree.get(state, "gate"), gate)
        assert_close(updates, jax.tree.map(lambda u, gate=gate: gate * u, step))
        params = optax.apply_updates(params, updates)
        gates.append(gate)
    assert min(gates) == 1 / 1.5 < max(gates)


def test_gate_of_each_tensor():
    """A vector in the order of `jax.tree.leaves(params)`."""
    optimizer = regularized(ADAMW, norm_scope="tensor", norm_of="gradient", lr_cutoff=100.0)
    updates, state = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    step, _ = ADAMW.update(GRADS[0], ADAMW.init(PARAMS), PARAMS)
    gates = jax.tree.map(lambda g: 1 / (1 + 0.3 * norm(g) ** 2), GRADS[0])
    assert_close(optax.tree.get(state, "gate"), jnp.stack(jax.tree.leaves(gates)))
    assert_close(updates, jax.tree.map(lambda gate, u: gate * u, gates, step))


def test_gate_is_in_the_state_of_vradam():
    first, *later = logged(optax_ext.vradam(0.1, lr_cutoff=0.5), "gate")
    assert_close(first, 1 / (1 + norm(GRADS[0]) ** 2 / 100))
    assert_close(min(later), 1 / 1.5)


def test_gate_whatever_the_parameters_are_called():
    """A model may well have a mean called mu."""
    plain, fields = ({name: PARAMS["in"]["kernel"]} for name in ("kernel", "mu"))
    (gate,) = logged(optax_ext.vradam(0.1), "gate", params=plain, grads=[plain])
    (ours,) = logged(optax_ext.vradam(0.1), "gate", params=fields, grads=[fields])
    assert ours == gate


def test_velocity_is_a_field_of_the_state_not_a_parameter():
    optimizer = regularized(optax.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="inner must keep a velocity"):
        optimizer.init({"mu": PARAMS["in"]["kernel"]})


def test_scheduled_inverse_share_starts_at_count_0():
    schedule = optax.linear_schedule(1.0, 0.0, transition_steps=4)
    shares = logged(optax_ext.dualadam(0.1, switch_rate=schedule), "inverse_share")
    np.testing.assert_array_equal(shares, [1, 0.75, 0.5, 0.25, 0, 0])


def test_autoscale_is_in_the_state():
    sizes = [0.01, 1.0, 100.0]
    grads = [jax.tree.map(lambda g, s=s: np.float32(s) * g, GRADS[0]) for s in sizes]
    factors = logged(
        optax_ext.novak(0.1, autoscale=True, autoscale_decay=0.7), "autoscale", grads=grads
    )
    weights = [[1], [0.7, 1], [0.49, 0.7, 1]]  # of the norms so far, in an average of decay 0.7
    means = [np.average(sizes[: len(w)], weights=w) * norm(GRADS[0]) for w in weights]
    assert means[0] < 1 < means[1]
    assert_close(factors, [1, *(1 / (1 + np.log(means[1:])))])


def test_trust_ratio_is_in_the_state():
    """Adam's first step has size 1 in every coordinate."""
    params = {
        "far": np.full((4, 4), 100, np.float32),
        "near": np.full(9, 3, np.float32),
        "origin": np.zeros(2, np.float32),
    }
    grads = jax.tree.map(np.ones_like, params)
    optimizer = optax_ext.novak(0.1, trust_ratio=True)
    (ratios,) = logged(optimizer, "trust_ratio", params=params, grads=[grads])
    assert_close(ratios, np.array([10, 3, 1]))


def test_slow_weights_are_in_the_state():
    """They are the parameters of the last synchronization."""
    steps = list(history(optax_ext.novak(0.1, sync_period=2), PARAMS, GRADS))
    after = [PARAMS, *(params for params, _ in steps)]
    for t, (_, state) in enumerate(steps, 1):
        assert_close(optax.tree.get(state, "slow"), after[t - t % 2])


def scaled_by_extra_arg():
    def update(updates, state, params=None, *, factor, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: factor * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax_ext.lookahead(inner, sync_period=2, slow_step_size=0.5),
        lambda inner: optax_ext.autoscale(inner, decay=0.0),
        lambda inner: regularized(inner, beta3=0.0, norm_of="gradient"),
        lambda inner: optax_ext.scale_by_moments(
            inner, optax_ext.ema_of_squares(decay=0.9), optax_ext.product(eps=1.0)
        ),
    ],
    ids=["lookahead", "autoscale", "velocity_regularized", "scale_by_moments"],
)
def test_extra_arguments_reach_the_inner_transformation(wrap):
    optimizer = wrap(scaled_by_extra_arg())
    state = optimizer.init(PARAMS)
    once, _ = optimizer.update(GRADS[0], state, PARAMS, factor=1.0, unknown="ignored")
    twice, _ = optimizer.update(GRADS[0], state, PARAMS, factor=2.0, unknown="ignored")
    assert_close(twice, jax.tree.map(lambda u: 2 * u, once))


NETWORK = {
    "conv10": {"bias": shape(6), "kernel": shape(3, 6)},
    "conv2": {"bias": shape(3), "kernel": shape(4, 3)},
    "head": {"kernel": shape(6, 4)},
    "norm": {"scale": shape(6)},
}


def scales_by_unit(optimizer):
    """The scale of every leaf, from the state."""
    vector = optax.tree.get(optimizer.init(filled(NETWORK, 0)), "connection_scale")
    return jax.tree.unflatten(jax.tree.structure(NETWORK), list(vector))


def test_connection_table_is_in_natural_order_and_prints():
    table = optax_ext.connection_table(NETWORK, scaling="additive", strength=0.5)
    assert list(table) == [
        ("conv2", 15, 12, 0, 1.5),
        ("conv10", 24, 18, 1, 1.0),
        ("head", 24, 24, 2, 0.5),
        ("norm", 6, None, None, 1.0),
    ]
    assert str(table).splitlines() == [
        "path    parameters  connections  depth  scale",
        "conv2           15           12      0  1.500",
        "conv10          24           18      1  1.000",
        "head            24           24      2  0.500",
        "norm             6            -      -  1.000",
    ]
    assert table.mean_scale == pytest.approx((15 * 1.5 + 24 * 1.0 + 24 * 0.5 + 6 * 1.0) / 69)


def test_scale_is_in_the_state():
    scales = scales_by_unit(optax_ext.caadam(0.1, strength=0.5))
    expected = {"conv10": 1.0, "conv2": 1.5, "head": 0.5, "norm": 1.0}
    for unit, scale in expected.items():
        assert set(map(float, scales[unit].values())) == {scale}


def test_overrides_act_on_table_and_scale_alike():
    overrides = {
        "conv2": {"connections": 30},  # now the most connected
        "head": {"scale": 7.0},
        "norm": {"connections": 18},  # counts from now on
    }
    options = {"scaling": "additive", "strength": 0.5, "overrides": overrides}
    table = optax_ext.connection_table(NETWORK, **options)
    # Connections 30, 18, 24, 18: the median is 21.
    expected = {"conv2": 0.5, "conv10": 1.5, "head": 7.0, "norm": 1.5}
    assert {row.path: row.scale for row in table} == expected
    scales = scales_by_unit(optax_ext.scale_by_connections(**options))
    assert {unit: float(leaves.popitem()[1]) for unit, leaves in scales.items()} == expected


def test_overridden_depth():
    options = {"scaling": "depth", "strength": 3.0, "overrides": {"head": {"depth": 0}}}
    table = optax_ext.connection_table(NETWORK, **options)
    assert [row.scale for row in table] == pytest.approx([2.0, 1.0, 2.0, 1.0])


def test_connection_table_of_nothing():
    table = optax_ext.connection_table({}, scaling="depth")
    assert list(table) == []
    assert len(str(table).splitlines()) == 1
    assert table.mean_scale == 1


LAST_COUNT = 2**31 - 1
INVADAM = optax_ext.invadam(0.1)  # Optax's own optimizers take no `None`


@pytest.mark.parametrize("nesterov", ["nadam", "nadam_scheduled", "classical", "hybrid"])
def test_the_last_counts_are_like_those_before(nesterov):
    """An int32 that wraps would turn all powers of the decay around."""
    tx = optax_ext.novak(0.1, nesterov=nesterov, lookahead="none")
    state = tx.init(PARAMS)
    for gradient in GRADS:
        _, state = tx.update(gradient, state, PARAMS)
    ends = []
    for count in (LAST_COUNT - 1000, LAST_COUNT - 1, LAST_COUNT):
        late = optax.tree.set(state, count=jnp.int32(count))
        ends.append(tx.update(GRADS[0], late, PARAMS)[0])
    assert_close(ends[1], ends[0])
    assert_close(ends[2], ends[0])


@pytest.mark.parametrize("norm_of", ["velocity", "corrected_velocity", "gradient"])
@pytest.mark.parametrize("norm_reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "wrap", [lambda inner: inner, lambda inner: optax.masked(inner, True)], ids=["bare", "masked"]
)
def test_a_tensor_without_gradient_does_not_weigh_in_the_gate(norm_of, norm_reduction, wrap):
    """The authors' code does the same; the tensor's velocity waits."""
    options = {"norm_of": norm_of, "norm_reduction": norm_reduction, "b1": 0.9, "lr_cutoff": 100.0}
    whole, alone = regularized(wrap(INVADAM), **options), regularized(INVADAM, **options)
    part = {"in": PARAMS["in"]}
    state, expected_state = whole.init(PARAMS), alone.init(part)
    for t, gradient in enumerate(GRADS):
        absent = t >= 2
        present = gradient | {"out": {"kernel": None}} if absent else gradient
        updates, state = whole.update(present, state, PARAMS)
        assert (len(jax.tree.leaves(updates)) == 2) == absent
        _, expected_state = alone.update({"in": gradient["in"]}, expected_state, part)
        assert np.allclose(state.gate, expected_state.gate, rtol=1e-6) == absent


def test_gates_of_tensors_keep_their_places_without_gradient():
    tx = regularized(INVADAM, norm_scope="tensor")
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    gradient = GRADS[1] | {"in": {"bias": None, "kernel": GRADS[1]["in"]["kernel"]}}
    _, with_all = tx.update(GRADS[1], state, PARAMS)
    _, without = tx.update(gradient, state, PARAMS)
    assert without.gate[0] == 1
    assert_close(without.gate[1:], with_all.gate[1:])


@pytest.mark.parametrize("norm_scope", ["global", "tensor"])
def test_means_of_more_elements_than_int32_counts(norm_scope):
    leaf = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    for tx in (
        optax_ext.vradam(1e-3, norm_reduction="mean", norm_scope=norm_scope),
        optax_ext.dualadam(1e-3, scale_free=True),
    ):
        jax.eval_shape(tx.update, leaf, jax.eval_shape(tx.init, leaf), leaf)


def test_velocity_in_codes_is_refused():
    inner = optax_ext.quantize_state(optax.adamw(0.1))
    tx = optax_ext.velocity_regularized(inner, beta3=1.0, lr_cutoff=10.0)
    with pytest.raises(ValueError, match="wrap velocity_regularized in quantize_state"):
        tx.init(jnp.ones((64, 64)))


@pytest.mark.parametrize("name", optax_ext.METHODS)
def test_python_floats_are_parameters(name):
    tx, params = optax_ext.get(name, 1e-2), {"kernel": 1.0, "bias": 2.0}
    grads = jax.tree.map(jnp.float32, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    arrays = jax.tree.map(jnp.float32, params)
    expected, _ = tx.update(grads, tx.init(arrays), arrays)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_numpy_scalars_do_not_promote(x64):
    tx = optax_ext.fame(1e-2, b1=np.float64(0.9))
    params = jnp.ones(3, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float32
    python, _ = optax_ext.fame(1e-2, b1=0.9).update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates, python)


def test_later_stages_of_both_moments_have_their_names():
    state = optax_ext.fame(1e-3, second_moment="tema").init(jnp.ones(2))
    assert len(optax.tree.get(state, "later")) == len(optax.tree.get(state, "nu_later")) == 2


def test_a_tiny_switch_rate_never_switches():
    share = optax_ext.dualadam(1e-2, switch_rate=1e-310)
    state = share.init(jnp.ones(2))
    _, state = share.update(jnp.ones(2), state, jnp.ones(2))
    assert optax.tree.get(state, "inverse_share") == 1


def test_testing_is_an_attribute():
    assert callable(optax_ext.testing.check_transformation)
    with pytest.raises(AttributeError, match="no attribute 'tests'"):
        _ = optax_ext.tests
