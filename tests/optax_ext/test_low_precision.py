"""State and weights in few bits: their errors, their bits, and what users do with them."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_ext
from optax_ext import formats
from optax_ext.low_precision.bits import join, random_bits, split
from support.cases import CASES, METHODS, slow_unless
from support.strategies import seeds

KERNEL, BIAS = (64, 128), (128,)
# The default formats, for arrays of any size.
SMALL = optax_ext.default_formats(min_size=64)
PARAMS = {"kernel": 0.1 * jnp.ones(KERNEL), "bias": jnp.zeros(BIAS)}


class Inner(NamedTuple):
    mu: Any


class Weights(NamedTuple):
    """Parameters whose names are those of fields of a state."""

    nu: Any
    mu: Any


def gradient(seed: int, tree: Any = PARAMS, scale: float = 1.0) -> Any:
    """Heavy-tailed gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(
            scale * rng.standard_normal(p.shape) * np.exp(rng.standard_normal(p.shape)), p.dtype
        ),
        tree,
    )


@partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(tx, params, state, grads):
    for g in grads:
        params, state = step(tx, params, state, g)
    return params, state


def assert_same_bits(ours: Any, expected: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Gradients are lognormal in groups of neighbors, then half of the columns fall tenfold.
STEADY, AFTER = 1000, 1000


def stress(tx, coded, dtype=jnp.float32):
    """RMS error of the update, relative to float32's, before and after the fall; largest ratio."""
    shape = 16, 256
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(0, 1.5, (shape[0], 1))) * np.exp(rng.normal(0, 1, (1, shape[1])))
    falls = np.where(rng.random(shape[1]) < 0.5, 0.1, 1.0)
    params = jnp.zeros(shape)

    def body(fall, carry, key):
        state, state_coded = carry
        g = jax.random.normal(key, shape) * (1e-4 * size * fall)
        g = g.astype(dtype).astype(jnp.float32)
        exact, state = tx.update(g, state, params)
        ours, state_coded = coded.update(g.astype(dtype), state_coded, params)
        squares = jnp.sum((ours.astype(jnp.float32) - exact) ** 2), jnp.sum(exact**2)
        return (state, state_coded), (*squares, jnp.abs(ours).max(), jnp.abs(exact).max())

    @jax.jit
    def train(key):
        carry, before = jax.lax.scan(
            partial(body, 1.0), (tx.init(params), coded.init(params)), jax.random.split(key, STEADY)
        )
        keys = jax.random.split(jax.random.fold_in(key, 1), AFTER)
        return before, jax.lax.scan(partial(body, falls), carry, keys)[1]

    for squares, energy, ours, exact in train(jax.random.key(0)):
        end = slice(-200, None)  # of the phase, where averages have met the new gradients
        yield float((squares[end].sum() / energy[end].sum()) ** 0.5)
        yield float(ours[end].max() / exact[end].max())


# The largest error of the update, RMS. Lion's update is a sign, which an error of a small momentum
# flips.
LARGEST_ERROR = {"adam": 0.13, "fame": 0.13, "lion": 0.4}
OPTIMIZERS = {
    "adam": optax.adam(1.0),
    "fame": optax_ext.fame(1.0),
    "lion": optax.lion(1.0, weight_decay=0.0),
}
ADAM_FIRST = [
    pytest.param(name, marks=[] if name == "adam" else pytest.mark.slow)
    for name in OPTIMIZERS  # `examples/evidence/low_precision.py` has them all
]


@pytest.mark.parametrize("name", ADAM_FIRST)
def test_stale_and_heavy_tailed_averages(name):
    tx = OPTIMIZERS[name]
    steady, ratio, fallen, ratio_fallen = stress(tx, optax_ext.quantize_state(tx))
    assert steady < LARGEST_ERROR[name]
    assert fallen < LARGEST_ERROR[name] * (1.2 if name == "lion" else 1)
    assert max(ratio, ratio_fallen) < 1.5


@pytest.mark.slow
def test_bfloat16_gradients_have_enough_bits_for_a_dither():
    tx = optax.adam(1.0)
    steady, _, fallen, _ = stress(tx, optax_ext.quantize_state(tx), jnp.bfloat16)
    assert max(steady, fallen) < LARGEST_ERROR["adam"]


@pytest.mark.slow
def test_codes_rounded_to_nearest_freeze_and_linear_codes_explode():
    """The formats that are not offered, in the same stress."""

    def stored(encode):
        adam = optax.scale_by_adam()

        def update(grads, state, params):
            updates, state = adam.update(grads, state, params)
            return updates, state._replace(nu=encode(state.nu))

        return optax.GradientTransformation(adam.init, update)

    def nearest(x):
        return formats.FourthRoot().encode(x).decode()

    def linear(x):
        groups = x.reshape(-1, 64)
        scale = groups.max(1, keepdims=True) / 255
        return (jnp.round(groups / jnp.maximum(scale, 1e-38)) * scale).reshape(x.shape)

    tx = optax.scale_by_adam()
    _, _, frozen, _ = stress(tx, stored(nearest))
    assert frozen > 0.3
    _, ratio, *_ = stress(tx, stored(linear))
    assert ratio > 10


class TestFormats:
    @given(seeds, st.integers(-30, 30))
    def test_errors_are_relative_to_the_group(self, seed, exponent):
        x = gradient(seed, jnp.zeros(KERNEL), 10.0**exponent)
        largest = np.abs(x).reshape(*KERNEL[:1], -1, 64).max(-1).repeat(64).reshape(KERNEL)
        for format_, value in ((formats.SignedRoot(), x), (formats.FourthRoot(), jnp.abs(x))):
            ours = format_.encode(value).decode()
            # In roots, codes are equally far apart.
            power = 0.5 if isinstance(format_, formats.SignedRoot) else 0.25
            error = np.abs(np.abs(ours) ** power - np.abs(value) ** power) / largest**power
            assert error.max() <= 0.51 / 127
            assert (np.sign(ours) * np.sign(value) >= 0).all()

    @pytest.mark.parametrize("format_", [formats.SignedRoot(), formats.FourthRoot()], ids=repr)
    def test_decoded_values_keep_their_codes(self, format_):
        node = format_.encode(jnp.abs(gradient(0, jnp.zeros(KERNEL))))
        np.testing.assert_array_equal(node.encode(node.decode()).codes, node.codes)

    def test_what_is_not_finite_stays_with_its_element(self):
        x = jnp.ones(192).at[jnp.array([3, 70, 130])].set(jnp.array([jnp.nan, jnp.inf, 0]))
        # An infinite first moment may be finite; an infinite divisor must not.
        stored = {formats.SignedRoot(): (jnp.nan, 1), formats.FourthRoot(): (jnp.inf, jnp.inf)}
        for format_, expected in stored.items():
            ours = format_.encode(x).decode()
            np.testing.assert_array_equal(ours[jnp.array([3, 70, 130])], (*expected, 0))
            np.testing.assert_allclose(np.delete(ours, [3, 70, 130]), 1, rtol=1e-6)

    @pytest.mark.parametrize("format_", [formats.SignedRoot(), formats.FourthRoot()], ids=repr)
    def test_zeros_are_encoded_without_a_nan(self, format_):
        """The conversion of a NaN to an integer would depend on the device."""
        with jax.debug_nans(True):
            np.testing.assert_array_equal(format_.encode(jnp.zeros(64)).decode(), 0)

    def test_random_rounding_is_right_on_average(self):
        x = jnp.full((4096, 64), 0.3).at[:, 0].set(1.0)
        for format_ in (formats.FourthRoot(), formats.BFloat16()):
            node = format_.encode(x)
            bits = random_bits(gradient(0, x), step=jnp.int32(1))
            mean = float(node.encode(x, bits).decode()[:, 1:].mean())
            assert abs(mean - 0.3) < 1e-4

    def test_groups(self):
        assert formats.SignedRoot(32).encode(jnp.ones((2, 96))).scales.shape == (2, 3)
        assert formats.SignedRoot(32).encode(jnp.ones((32, 3))).scales.shape == (3,)
        misfit = formats.SignedRoot().misfit
        assert misfit((4, 128), (4, 128)) is None
        assert misfit((4, 128), (4, 32)) == "a shard's last axis, 32, is no multiple of 64"
        assert "and it is sharded" in str(misfit((64, 3), (32, 3)))
        assert misfit((5, 3), (5, 3)) == "its size, 15, is no multiple of 64"
        with pytest.raises(ValueError, match="group_size must divide the array"):
            formats.FourthRoot().encode(jnp.ones(63))


def float32s(bits: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint32), jnp.float32)


class TestSplit:
    # Every exponent and sign, with random digits; zeros, denormals, infinities and NaN among them.
    RAW = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)

    def test_32_bits_are_exact(self):
        x = float32s(self.RAW)
        high, low = split(x, 32)
        raw = np.asarray(jax.lax.bitcast_convert_type(join(high, low), jnp.uint32))
        known = ~np.isnan(np.asarray(x))
        np.testing.assert_array_equal(raw[known], self.RAW[known])
        assert np.isnan(join(high, low)[~known]).all()
        assert np.isnan(np.asarray(high)[~known]).all()
        np.testing.assert_array_equal(high.astype(jnp.bfloat16).astype(jnp.float32), high)

    def test_24_bits_are_close(self):
        x = np.asarray(float32s(self.RAW))
        normal = np.isfinite(x) & (np.abs(x) > 1e-37) & (np.abs(x) < 3e38)
        x = x[normal]
        ours = np.asarray(join(*split(jnp.asarray(x), 24)))
        assert (np.abs(ours - x) / np.abs(x)).max() < 2**-15

    def test_splitting_again_changes_nothing(self):
        high, low = split(float32s(self.RAW), 24)
        assert_same_bits(split(join(high, low), 24)[1], low)


class TestState:
    def test_bytes_of_a_parameter(self):
        large = jax.ShapeDtypeStruct((768, 3072), jnp.float32)
        size = large.shape[0] * large.shape[1]
        for tx, bytes_ in (
            (optax.adamw(1.0), 2.125),
            (optax.lion(1.0), 1.0625),
            (optax_ext.fame(1.0), 4.25),
            (optax_ext.novak(1.0), 5.125),
            (optax_ext.caadam(1.0), 2.125),
        ):
            report = optax_ext.quantization_report(tx, large)
            assert report.bytes / size == pytest.approx(bytes_, abs=1e-4)
            assert report.bytes_before > 1.8 * report.bytes

    @pytest.mark.parametrize(
        ("tx", "fields"),
        [
            (optax_ext.fame(1.0, second_moment="tema"), {"mu", "later"}),
            (optax.rmsprop(1.0, centered=True), set()),
            (optax.contrib.schedule_free_adamw(1.0), {"nu"}),
            (optax.contrib.ademamix(1.0), {"m1", "nu"}),
        ],
        ids=["tema", "centered", "schedule_free", "ademamix"],
    )
    def test_differences_and_slow_averages_stay(self, tx, fields):
        report = optax_ext.quantization_report(tx, jnp.ones(KERNEL))
        words = {w for x in report.leaves if x.format for w in x.path.split("/")}
        assert words & {"mu", "nu", "m1", "m2", "z", "later"} == fields
        assert "second" not in words

    def test_reasons(self):
        params = {
            "small": jnp.ones(64),
            "odd": jnp.ones(4097),
            "half": jnp.ones(4096, jnp.bfloat16),
            "kernel": jnp.ones(KERNEL),
        }
        report = optax_ext.quantization_report(optax.lion(1.0), params)
        reasons = {leaf.path: leaf.reason for leaf in report.leaves}
        assert reasons == {
            "0/count": "int32",
            "0/mu/small": "fewer than 4096 elements",
            "0/mu/odd": "its size, 4097, is no multiple of 64",
            "0/mu/half": "bfloat16",
            "0/mu/kernel": "",
        }
        params["empty"] = jnp.ones((0, 64))
        for choice, expected in (
            (lambda *leaf: None, "no format for this field"),
            (lambda *leaf: "too slow", "too slow"),
        ):
            report = optax_ext.quantization_report(optax.lion(1.0), params, choice)
            reasons = {leaf.path: leaf.reason for leaf in report.leaves}
            assert reasons["0/mu/small"] == reasons["0/mu/kernel"] == expected
            assert reasons["0/mu/empty"] == "no elements"

    def test_formats_decide_by_the_parameter(self):
        def by_parameter(field, parameter, leaf):
            return formats.BFloat16() if parameter[-1].key == "bias" else SMALL(field, (), leaf)

        report = optax_ext.quantization_report(optax.lion(1.0), PARAMS, by_parameter)
        chosen = {leaf.path: leaf.format for leaf in report.leaves if leaf.format}
        assert chosen == {"0/mu/kernel": formats.SignedRoot(), "0/mu/bias": formats.BFloat16()}

    @pytest.mark.parametrize(
        "tx",
        [
            optax.inject_hyperparams(optax.adam)(1.0),
            optax.lookahead(optax.adam(1.0), 5, 0.5),
            optax.GradientTransformation(
                lambda params: params, lambda g, state, params=None: (g, state)
            ),
            optax.GradientTransformation(
                lambda params: 0.5, lambda g, state, params=None: (g, state)
            ),
        ],
        ids=["dictionary", "structure of its own", "parameters", "number"],
    )
    def test_formats_see_fields_of_any_kind(self, tx):
        def narrow_second(field, parameter, leaf):
            del parameter, leaf
            is_second = any(getattr(key, "name", None) == "nu" for key in field)
            return formats.FourthRoot() if is_second else None

        params = jnp.ones((64, 64))
        if "lookahead" in str(tx.init):
            params = optax.LookaheadParams.init_synced(params)
        report = optax_ext.quantization_report(tx, params, narrow_second)
        assert [leaf.format for leaf in report.leaves if leaf.format] == (
            [formats.FourthRoot()] * any("nu" in leaf.path for leaf in report.leaves)
        )

    def test_another_structure_is_an_error(self):
        renamed = optax.GradientTransformation(
            lambda params: {"a": params, "b": params},
            lambda g, state, params=None: (g, {"a": state["a"], "c": state["b"]}),
        )
        tx = optax_ext.quantize_state(renamed)
        params = jnp.ones((64, 64))
        with pytest.raises(ValueError, match="key mismatch"):
            tx.update(params, tx.init(params), params)

    @pytest.mark.parametrize("case", slow_unless(METHODS[:1], METHODS))
    def test_dequantized_state_is_that_of_the_chain(self, case):
        tx = case.build()
        _, state = run(tx, PARAMS, tx.init(PARAMS), [gradient(0)])
        ours = optax_ext.dequantize_state(
            {"opt": optax_ext.quantize_existing_state(state, PARAMS)}
        )["opt"]
        assert jax.tree.structure(ours) == jax.tree.structure(state)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.size > 1:
                np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))

    @pytest.mark.parametrize("case", slow_unless(METHODS[:1], METHODS))
    def test_contract(self, case):
        """Structure, shapes and dtypes are stable; extreme gradients make finite steps."""
        tx = optax_ext.quantize_state(case.build(), SMALL)
        state = tx.init(PARAMS)
        types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
        for scale in (1e-30, 1.0, 1e15, 0.0):
            params, state = step(tx, PARAMS, state, gradient(1, scale=scale))
            assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == types
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))

    @pytest.mark.parametrize(
        ("wrap", "others"),
        [
            (lambda tx: tx, set()),
            (lambda tx: optax.MultiSteps(tx, 2), {("acc_grads", None)}),
            (lambda tx: optax.chain(optax.contrib.dog(), tx), {("init_params", None)}),
            (
                lambda tx: optax.masked(
                    optax.MultiSteps(tx, 2), Weights(True, {"x": Inner(False)})
                ),
                {("acc_grads", None)},
            ),
        ],
        ids=["alone", "MultiSteps", "dog", "masked"],
    )
    def test_names_of_parameters_do_not_decide(self, wrap, others):
        params = Weights(jnp.ones(4096), {"x": Inner(jnp.ones(4096))})
        tx = wrap(optax.adam(1.0))
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
        report = optax_ext.quantization_report(tx, params)
        fields = {
            (re.sub("/(nu|mu/x/mu)$", "", leaf.path).rpartition("/")[2], leaf.format)
            for leaf in report.leaves
            if leaf.shape == (4096,)
        }
        moments = {("mu", formats.SignedRoot()), ("nu", formats.FourthRoot())}
        assert fields - moments == others
        # A state that was initialized before is treated in the same way.
        quantized = optax_ext.quantize_existing_state(tx.init(params), params)
        assert_same_bits(quantized, optax_ext.quantize_state(tx).init(params))

    def test_encoded_state_is_not_encoded_again(self):
        inner = optax_ext.quantize_state(optax.adam(1.0))
        report = optax_ext.quantization_report(inner, jnp.ones((4096, 64)))
        assert report.bytes == report.bytes_before

    def test_a_spike_does_not_make_its_neighbors_explode(self):
        tx = optax.adam(1.0)
        coded = optax_ext.quantize_state(tx, SMALL)
        params = {"kernel": jnp.zeros(KERNEL)}
        state = coded.init(params)
        for t in range(40):
            g = {"kernel": jnp.asarray(np.random.default_rng(t).standard_normal(KERNEL))}
            if t == 5:
                g = {"kernel": g["kernel"].at[:, ::64].set(1e9).at[0, 0].set(jnp.inf)}
            updates, state = coded.update(jax.tree.map(jnp.float32, g), state, params)
            others = np.delete(np.asarray(updates["kernel"]), [0, 64], axis=1)
            assert np.abs(others).max() < 8
            assert np.isfinite(others).all()

    def test_zero_gradients_move_nothing(self):
        tx = optax_ext.quantize_state(optax.adam(1.0), SMALL)
        params, _ = run(tx, PARAMS, tx.init(PARAMS), 3 * [jax.tree.map(jnp.zeros_like, PARAMS)])
        assert_same_bits(params, PARAMS)

    def test_absent_gradients(self):
        tx = optax_ext.quantize_state(optax_ext.fame(0.1), SMALL)
        state = tx.init(PARAMS)
        updates, after = tx.update({"kernel": None, "bias": jnp.ones(BIAS)}, state, PARAMS)
        assert updates["kernel"] is None
        assert jax.tree.structure(after) == jax.tree.structure(state)

    def test_a_run_changes_over_at_a_checkpoint(self):
        tx = optax.adamw(1e-3)
        params, state = run(tx, PARAMS, tx.init(PARAMS), map(gradient, range(3)))
        quantized = optax_ext.quantize_existing_state(state, params)
        ours, quantized = run(
            optax_ext.quantize_state(tx), params, quantized, [gradient(3), gradient(4)]
        )
        back = optax_ext.dequantize_state(quantized)
        ours, _ = run(tx, ours, back, [gradient(5)])
        expected, _ = run(tx, params, state, map(gradient, range(3, 6)))
        for a, b, start in zip(*map(jax.tree.leaves, (ours, expected, params)), strict=True):
            assert np.abs(a - b).mean() < 0.1 * np.abs(b - start).mean()


class TestComposition:
    TX = optax_ext.quantize_state(
        optax.chain(optax.clip(1.0), optax_ext.novak(1e-2, sync_period=2)), SMALL
    )

    def test_scan_jit_and_donation(self):
        grads = [gradient(t) for t in range(4)]
        expected = run(self.TX, PARAMS, self.TX.init(PARAMS), grads)

        @partial(jax.jit, donate_argnums=0)
        def train(carry, grads):
            return jax.lax.scan(lambda c, g: (step(self.TX, *c, g), None), carry, grads)[0]

        carry = jax.tree.map(jnp.copy, (PARAMS, self.TX.init(PARAMS)))
        ours = train(carry, jax.tree.map(lambda *g: jnp.stack(g), *grads))
        assert jax.tree.structure(ours) == jax.tree.structure(expected)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours[0], expected[0]
        )

    def test_vmap_over_seeds(self):
        stacked = jax.tree.map(lambda *g: jnp.stack(g), gradient(0), gradient(1))
        params = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
        states = jax.vmap(self.TX.init)(params)
        both, states = jax.jit(jax.vmap(partial(step, self.TX)))(params, states, stacked)
        alone, state = step(self.TX, PARAMS, self.TX.init(PARAMS), gradient(1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5), both, alone)
        decoded = optax_ext.dequantize_state(states)
        one = optax_ext.dequantize_state(state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1], b, rtol=0.05, atol=1e-3), decoded, one
        )

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 2),
            lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
            lambda tx: optax.partition(
                {"a": tx, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
            ),
            lambda tx: optax.inject_hyperparams(
                lambda learning_rate: optax_ext.quantize_state(optax.adamw(learning_rate))
            )(learning_rate=0.1),
            lambda tx: optax_ext.lookahead(tx, sync_period=2, slow_step_size=0.5),
            lambda tx: optax_ext.master_weights(tx),
        ],
        ids=[
            "MultiSteps",
            "apply_if_finite",
            "masked",
            "partition",
            "inject",
            "lookahead",
            "master",
        ],
    )
    @pytest.mark.parametrize("outside", [True, False])
    def test_wrappers(self, wrap, outside):
        inner = optax.adamw(1e-2)
        quantize = partial(optax_ext.quantize_state, formats=SMALL)
        tx = wrap(quantize(inner)) if outside else quantize(wrap(inner))
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
        params = PARAMS
        if "MasterWeightsState" in str(jax.tree.structure(tx.init(PARAMS))):
            params = optax_ext.bfloat16_weights(PARAMS)
        start: Any = params
        state = tx.init(params)
        structure = jax.tree.structure(state)
        for t in range(4):
            params, state = step(tx, params, state, gradient(t, params))
        assert jax.tree.structure(state) == structure
        assert "int8" in {x.dtype.name for x in jax.tree.leaves(state)}
        moved = np.asarray(params["kernel"], np.float32) - np.asarray(start["kernel"], np.float32)
        assert np.abs(moved).mean() > 1e-3

    def test_checkpoint_also_onto_another_mesh(self, tmp_path):
        """Resumed, and resumed on other devices: the same codes, to the bit."""
        grads = [gradient(t) for t in range(4)]
        tx = optax_ext.master_weights(optax_ext.quantize_state(optax.adamw(1e-2), SMALL))
        params = optax_ext.bfloat16_weights(PARAMS)
        middle = run(tx, params, tx.init(PARAMS), grads[:2])
        expected = run(tx, *middle, grads[2:])

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "2", middle)
            checkpointer.wait_until_finished()
            abstract = jax.eval_shape(lambda: (params, tx.init(params)))
            resumed = checkpointer.restore(tmp_path / "2", abstract)
            assert_same_bits(run(tx, *resumed, grads[2:]), expected)

            mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
            specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec("y")}
            types = {
                name: jax.ShapeDtypeStruct(
                    p.shape, p.dtype, sharding=NamedSharding(mesh, specs[name])
                )
                for name, p in params.items()
            }
            placed = (
                types,
                jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                    abstract[1],
                    optax_ext.state_shardings(tx, types),
                ),
            )
            sharded = checkpointer.restore(tmp_path / "2", placed)
            codes = optax.tree.get(sharded[1], "mu")["kernel"].codes
            assert codes.sharding.spec == specs["kernel"]
            assert_same_bits(run(tx, *sharded, grads[2:]), expected)

    def test_shardings_decide_what_is_encoded(self):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
        shardings = {
            "kernel": NamedSharding(mesh, PartitionSpec(None, "x")),
            "bias": NamedSharding(mesh, PartitionSpec()),
        }
        report = optax_ext.quantization_report(optax.lion(1.0), PARAMS, SMALL, shardings=shardings)
        reasons = {leaf.path: leaf.reason for leaf in report.leaves}
        assert reasons["0/mu/kernel"] == "a shard's last axis, 16, is no multiple of 64"
        assert reasons["0/mu/bias"] == ""

    @pytest.mark.parametrize(
        ("spec", "dtype"), [(("x", "y"), "int8"), ((None, ("x", "y")), "float32")], ids=str
    )
    def test_explicit_axes_are_known(self, spec, dtype):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
        params = jax.device_put(jnp.ones((8, 256)), NamedSharding(mesh, PartitionSpec(*spec)))
        tx = optax_ext.quantize_state(optax.adamw(1e-2), SMALL)
        with jax.set_mesh(mesh):
            state = jax.jit(tx.init)(params)
            _, after = jax.jit(tx.update)(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        largest = max(jax.tree.leaves(state), key=lambda x: x.size)
        assert largest.dtype == dtype
        assert jax.typeof(largest).sharding.spec == PartitionSpec(*spec)


class TestWeights:
    @pytest.mark.parametrize("case", slow_unless(METHODS[:1], METHODS))
    def test_32_bits_are_the_float32_run(self, case):
        """But for parameters that an optimizer reads as bfloat16 gradients."""
        tx = case.build()
        ours = optax_ext.master_weights(tx, bits=32)
        weights = gradient(9)
        params, state = optax_ext.bfloat16_weights(weights), ours.init(weights)
        expected, expected_state = weights, tx.init(weights)
        for t in range(5):
            g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradient(t))
            params, state = step(ours, params, state, g)
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
            expected, expected_state = step(tx, expected, expected_state, wide)
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
        assert_same_bits(optax_ext.float32_weights(params, state), expected)
        assert_same_bits(optax_ext.bfloat16_weights(expected), params)
        assert_same_bits(state.inner_state, expected_state)

    @given(seeds)
    def test_updates_land_on_the_weights_at_every_exponent(self, seed):
        rng = np.random.default_rng(seed)
        sizes = 10.0 ** rng.uniform(-30, 30, 4096) * rng.choice([-1, 1], 4096)
        weights = jnp.asarray(np.append(sizes, [np.inf, -np.inf, 0.0]), jnp.float32)
        moves = sizes * 2.0 ** rng.uniform(-24, 4, 4096) * rng.choice([-1, 0, 1], 4096)
        tx = optax_ext.master_weights(optax.sgd(1.0), bits=32)
        grads = jnp.asarray(np.append(-moves, [1.0, 0.0, 0.0]), jnp.float32)
        params, state = optax_ext.bfloat16_weights(weights), tx.init(weights)
        updates, state = tx.update(grads, state, params)
        assert updates.dtype == jnp.float32
        params = optax.apply_updates(params, updates)
        assert_same_bits(optax_ext.float32_weights(params, state), weights - grads)

    def test_24_bits_stay_close(self):
        weights = gradient(9)
        tx = optax_ext.master_weights(optax.sgd(1e-3))
        params, state = run(
            tx, optax_ext.bfloat16_weights(weights), tx.init(weights), [gradient(0)]
        )
        expected = jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradient(0))
        for a, b in zip(
            *map(jax.tree.leaves, (optax_ext.float32_weights(params, state), expected)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=2**-14, atol=1e-6)

    def test_small_updates_are_not_lost(self):
        """They are a tenth of the last digit that 24 bits have."""
        weights = jnp.ones(KERNEL)
        tx = optax_ext.master_weights(optax.sgd(1.0))
        grads = [1e-6 * (1 + 0.1 * gradient(t, weights)) for t in range(100)]
        params, state = optax_ext.bfloat16_weights(weights), tx.init(weights)
        params, state = run(tx, params, state, grads)
        moved = float(1 - optax_ext.float32_weights(params, state).mean())
        assert moved == pytest.approx(1e-4, rel=0.05)

    def test_a_parameter_that_is_set_to_zero_is_zero(self):
        weights = jnp.array([1.00001, 0.99999, -1.00001])
        for bits in (24, 32):
            tx = optax_ext.master_weights(optax.sgd(0.0), bits=bits)
            state, zeros = tx.init(weights), jnp.zeros(3, jnp.bfloat16)
            ours = optax_ext.float32_weights(zeros, state)
            np.testing.assert_allclose(ours, 0, atol=1e-38)

    def test_masked_parameters_are_exported_as_they_are(self):
        params = optax_ext.bfloat16_weights({**PARAMS, "index": jnp.arange(3)})
        assert params["index"].dtype == jnp.int32
        tx = optax.masked(
            optax_ext.master_weights(optax.sgd(1.0)), {"kernel": True, "bias": True, "index": False}
        )
        ours = optax_ext.float32_weights(params, tx.init(params))
        assert ours["index"] is params["index"]
        assert ours["kernel"].dtype == jnp.float32

    def test_stochastic_rounding_moves_what_nearest_would_lose(self):
        tx = optax_ext.stochastic_rounding(optax.sgd(1e-4))
        params = {"w": optax_ext.bfloat16_weights(1 + jnp.abs(gradient(1, jnp.zeros(KERNEL))))}
        grads = [gradient(t, params) for t in range(50)]
        moved, _ = run(tx, params, tx.init(params), grads)
        start = np.asarray(params["w"], np.float64)
        exact = -1e-4 * sum(np.asarray(g["w"], np.float64) for g in grads)
        error = np.asarray(moved["w"], np.float64) - start - exact
        assert abs(error.mean()) < 4 * error.std() / error.size**0.5
        nearest = optax.sgd(1e-4)
        lost, _ = run(nearest, params, nearest.init(params), grads)
        assert np.abs(np.asarray(lost["w"], np.float64) - start).mean() < 0.2 * np.abs(exact).mean()

    def test_only_bfloat16_parameters(self):
        for tx in (
            optax_ext.master_weights(optax.sgd(1.0)),
            optax_ext.stochastic_rounding(optax.sgd(1.0)),
        ):
            state = tx.init(optax_ext.bfloat16_weights(PARAMS))
            with pytest.raises(ValueError, match="params must be bfloat16, got float32 for bias"):
                tx.update(PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match="got int32 for n"):
            optax_ext.master_weights(optax.sgd(1.0)).init({"n": jnp.arange(3)})
        with pytest.raises(KeyError, match="MasterWeightsState"):
            optax_ext.float32_weights(PARAMS, ())


def test_every_case_is_encoded_or_says_why():
    for case in CASES:
        report = optax_ext.quantization_report(case.build(), jnp.ones(KERNEL))
        assert all((leaf.format is None) == bool(leaf.reason) for leaf in report.leaves)
        assert report.bytes < report.bytes_before


def test_weights_of_a_mask_that_is_a_prefix():
    mask = {"a": True, "b": False}
    tx = optax.masked(optax_ext.master_weights(optax.sgd(1.0)), mask)
    params = {"a": {"w": jnp.ones(2, jnp.bfloat16)}, "b": {"w": jnp.ones(2)}}
    weights = optax_ext.float32_weights(params, tx.init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("wrapper", [optax_ext.master_weights, optax_ext.stochastic_rounding])
def test_float64_updates_are_rounded_to_float32(wrapper, x64):
    params = jnp.ones(4, jnp.bfloat16)
    found, expected = (wrapper(optax.sgd(rate)) for rate in (np.float64(1e-2), 1e-2))
    steps = [tx.update(params, tx.init(params), params)[0] for tx in (found, expected)]
    assert steps[0].dtype == steps[1].dtype
    np.testing.assert_allclose(*steps, rtol=1e-6)
