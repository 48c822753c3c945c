"""Chains that nobody wrote: random pieces on random trees, fused and not."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_ext
from pallas_kernels import explain
from support.cases import kernels_only
from support.fused import Race, assert_fused_is_chain
from support.strategies import shape

STEPS = 6


def falling(count):
    return 0.1 / (1 + count)


# What comes before a direction, makes it, and comes after it; what is wrapped around all of that.
BEFORE = {
    "clip": optax.clip(0.5),
    "clip_by_global_norm": optax.clip_by_global_norm(0.5),
    "clip_by_block_rms": optax.clip_by_block_rms(0.5),
    "normalize": optax.normalize_by_update_norm(),
    "l2": optax.add_decayed_weights(0.1),
    "trace": optax.trace(0.9, nesterov=True),
}
DIRECTION = {
    "adam": optax.scale_by_adam(),
    "amsgrad": optax.scale_by_amsgrad(),
    "lion": optax.scale_by_lion(),
    "rms": optax.scale_by_rms(),
    "rss": optax.scale_by_rss(),
    "adan": optax.scale_by_adan(),
    "triple": optax_ext.scale_by_moments(
        optax_ext.triple_ema(decays=(0.9, 0.5, 0.5)),
        optax_ext.max_ema_of_squares(decay=0.99),
        optax_ext.ratio(eps=1e-8),
    ),
    "blend": optax_ext.scale_by_moments(
        optax_ext.ema(decay=0.9),
        optax_ext.ema_of_squares(decay=0.99),
        optax_ext.blend(optax_ext.linear_inverse_share(0.2), eps=1e-8, scale_free=True),
    ),
    "gradient": optax.identity(),
}
AFTER = {
    "decay": optax.add_decayed_weights(0.1),
    "masked_decay": optax.add_decayed_weights(0.1, mask=kernels_only),
    "rectify": optax_ext.rectify(b2=0.9),
    "trust_ratio": optax_ext.scale_by_trust_ratio(max_ratio=10.0),
    "optax_trust_ratio": optax.scale_by_trust_ratio(),
    "connections": optax_ext.scale_by_connections(scaling="additive", units="leaf"),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "masked": optax.masked(optax.scale(0.5), kernels_only),
}
RATE = {
    "constant": optax.scale_by_learning_rate(0.05),
    "schedule": optax.scale_by_learning_rate(falling),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=falling),
}
AROUND: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "velocity": lambda tx: optax_ext.velocity_regularized(
        tx, beta3=1.0, lr_cutoff=10.0, norm_of="gradient", norm_scope="tensor"
    ),
    "autoscale": lambda tx: optax_ext.autoscale(tx, decay=0.9),
    "lookahead": lambda tx: optax_ext.lookahead(tx, sync_period=3, slow_step_size=0.5),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@dataclass(frozen=True)
class Words:
    """A chain as the names of its pieces, which is what a failure prints."""

    before: list[str]
    direction: str
    after: list[str]
    rate: str
    around: list[str]

    def build(self) -> optax.GradientTransformation:
        tx = optax.chain(
            *(BEFORE[name] for name in self.before),
            DIRECTION[self.direction],
            *(AFTER[name] for name in self.after),
            RATE[self.rate],
        )
        for name in self.around:
            tx = AROUND[name](tx)
        return tx


def some(table, most):
    return st.lists(st.sampled_from(sorted(table)), max_size=most, unique=True)


def one(table):
    return st.sampled_from(sorted(table))


chains = st.builds(
    Words, some(BEFORE, 2), one(DIRECTION), some(AFTER, 2), one(RATE), some(AROUND, 2)
)
LEAVES = (shape(5, 7), shape(3), shape(), shape(0, 2), shape(1), shape(2, 3, 2), shape(520), None)
# The first leaf is there so that something moves.
trees = st.lists(st.sampled_from(LEAVES), max_size=3).map(lambda leaves: [shape(4, 3), leaves])


def assert_words_fuse(words, tree, bad):
    """Compare fused steps with the chain, also with a gradient that contains `bad`."""
    run = Race(words.build(), tree)
    grads = run.grads(STEPS)
    if bad is not None:
        grads[2][0] = grads[2][0].at[1, 1].set(bad)
    fused = assert_fused_is_chain(run, grads)
    assert np.any(fused[0][0] != run.params[0])


given_chains = given(words=chains, tree=trees, bad=st.sampled_from([None, None, np.nan, np.inf]))


@given_chains
@settings(max_examples=4)
def test_chain(words, tree, bad):
    assert_words_fuse(words, tree, bad)


@pytest.mark.slow
@given_chains
@settings(max_examples=12)
def test_many_chains(words, tree, bad):
    assert_words_fuse(words, tree, bad)


@pytest.mark.parametrize("table", [BEFORE, DIRECTION, AFTER, RATE], ids=len)
def test_pieces_fuse(table):
    """Each of them does, so that what is compared is not twice the chain."""
    for name, piece in table.items():
        report = explain(piece, {"kernel": shape(5, 7), "bias": shape(7)})
        assert report.fallback_reasons == (), name
        assert report.launches > 0, name
