"""The memory of optimizers in steps compiled for a TPU, and the compiler's use of host memory."""

import optax
import pytest

import optax_ext
from benchmarks import RESULTS, memory, results
from benchmarks.aot import V5E
from benchmarks.leaf_sets import LEAF_SETS
from benchmarks.optimizers import OPTIMIZERS, QUANTIZED, RATE
from benchmarks.shapes import count, leaves, prepared, size, state_of

compiled = pytest.mark.skipif(V5E.missing(), reason="needs the extra `aot`: XLA's compiler")

# Neither is padded. Of four leaves no more than two are ever fetched at once.
LEAVES = leaves([(512, 1024)] * 4)
LEAF = 4 / 4
RECORDED = results.load(results.path(RESULTS, "memory", "tpu-aot"))

# Bytes for a parameter: two moments of 4, and slow weights. A fifth of an axis of 512 takes 7 of
# every 32 groups of rows.
FIFTH = 7 / 32
BYTES = {
    "": (8 + 4, 0),
    "slow_dtype=bfloat16": (8 + 2, 0),
    'offload="pinned_host"': (8, 4),
    'lookahead="rotating"': (8 + 4 * FIFTH, 0),
    'lookahead="rotating", slow_dtype=bfloat16': (8 + 2 * FIFTH, 0),
    'lookahead="rotating", offload="pinned_host"': (8, 4 * FIFTH),
    'lookahead="none"': (8, 0),
}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("options", BYTES)
def test_slow_weights_are_where_they_are_said_to_be(options):
    row = memory.measure(memory.make("novak", memory.OPTIONS["novak"][options]), LEAVES)
    device, host = BYTES[options]
    assert row["on_device"] == pytest.approx(device, abs=0.01)
    assert row["on_host"] == pytest.approx(host, abs=0.01)
    assert row["temporary"] <= (2 * LEAF if host else 0.01)


def saved_by_hand(name: str, words: str) -> float:
    """Return the bytes that an option saves."""
    if words in BYTES:
        return BYTES[""][0] - BYTES[words][0]
    first_moments = 3 if name == "fame" else 1
    return {"mu_dtype=bfloat16": 2 * first_moments, "amsgrad=True": -4}.get(words, 0)


def test_every_option_is_recorded_and_saves_what_it_promises():
    assert list(RECORDED) == list(memory.cases())
    for name, several in memory.OPTIONS.items():
        for words in several:
            saved = RECORDED[f"{name}()"]["on_device"] - RECORDED[f"{name}({words})"]["on_device"]
            # A fifth of GPT-2's axes is more or less than that of the leaves above.
            assert saved == pytest.approx(saved_by_hand(name, words), abs=0.1)


# Bytes for a parameter by hand: 8 bits and a scale of 4 bytes for 64 for each moment; 3 bytes of
# slow weights; 1 byte of a weight's low bits.
MOMENT = 1 + 4 / 64
BY_HAND = {
    "adamw, 8 bits": 2 * MOMENT,
    "adamw, 8 bits, bfloat16": 2 * MOMENT + 1,
    "lion, 8 bits": MOMENT,
    "fame, 8 bits": 4 * MOMENT,
    "vradam, 8 bits": 2 * MOMENT,
    "novak, 8 bits": 2 * MOMENT + 3,
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_state_takes_what_is_recorded(name):
    params, recorded = LEAF_SETS[memory.LEAF_SET], RECORDED[name]
    optimizer = OPTIMIZERS[name]
    arrays = size(state_of(optimizer.tx, prepared(optimizer.prepare, params))) / count(params)
    assert arrays == pytest.approx(recorded["arrays"], abs=1e-6)
    # Small leaves stay float32. They are .1 % of the parameters.
    assert BY_HAND[name] <= arrays <= 1.003 * BY_HAND[name]
    # The TPU pads scales.
    assert arrays <= recorded["on_device"] <= 1.02 * arrays


@pytest.mark.parametrize("leaf_set", ["ResNet-50", "GPT-2 124M"])
def test_a_network_keeps_its_small_leaves_only_in_float32(leaf_set):
    params = LEAF_SETS[leaf_set]
    report = optax_ext.quantization_report(optax.adamw(RATE), params)
    reasons = {leaf.reason for leaf in report.leaves if leaf.shape and leaf.format is None}
    assert reasons == {"fewer than 4096 elements"}
    assert report.bytes <= 2.14 * count(params)
