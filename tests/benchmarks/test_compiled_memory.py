"""The memory of optimizers in steps compiled for a TPU, and the compiler's use of host memory."""

import pytest

from benchmarks import RESULTS, latest, memory
from benchmarks.aot import V5E
from benchmarks.leaf_sets import leaves

compiled = pytest.mark.skipif(V5E.missing(), reason="needs the extra `aot`: XLA's compiler")

# Neither is padded. Of four leaves no more than two are ever fetched at once.
LEAVES = leaves([(512, 1024)] * 4)
LEAF = 4 / 4

# Bytes for a parameter: two moments of 4, and slow weights. A fifth of an axis of 512 takes 7 of
# every 32 groups of rows.
FIFTH = 7 / 32
HELD = {
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
@pytest.mark.parametrize("options", HELD)
def test_slow_weights_are_where_they_are_said_to_be(options):
    tx = memory.make("novak", memory.OPTIONS["novak"][options])
    row = memory.measure(tx, LEAVES)
    device, host = HELD[options]
    assert row["on_device"] == pytest.approx(device, abs=0.01)
    assert row["on_host"] == pytest.approx(host, abs=0.01)
    assert row["beside"] <= (2 * LEAF if host else 0.01)


def saved_by_hand(name: str, words: str) -> float:
    """Bytes that an option takes off what the optimizer holds by itself."""
    if words in HELD:
        return HELD[""][0] - HELD[words][0]
    first_moments = 3 if name == "fame" else 1
    return {"mu_dtype=bfloat16": 2 * first_moments, "amsgrad=True": -4}.get(words, 0)


def test_every_option_is_recorded_and_saves_what_it_promises():
    rows = latest.load(latest.path(RESULTS, "memory", "tpu-aot"))
    cases = [(name, words) for name, several in memory.OPTIONS.items() for words in several]
    assert list(rows) == [f"{name}({words})" for name, words in cases]
    for name, words in cases:
        saved = rows[f"{name}()"]["on_device"] - rows[f"{name}({words})"]["on_device"]
        # A fifth of GPT-2's axes is more or less than that of the leaves above.
        assert saved == pytest.approx(saved_by_hand(name, words), abs=0.1)
