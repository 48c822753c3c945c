"""The contenders of the study, with the centers of their learning rates."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from _study_protocol import Contender, Factory
from optax_ext import (
    caadam,
    dualadam,
    fame,
    invadam,
    lookahead,
    novak,
    quantize_state,
    vradam,
)

# The share of InvAdam falls by this much in a step of DualAdam, so Adam's share warms up by it.
SWITCH_RATE = 0.01
SYNC_PERIOD, SLOW_STEP_SIZE = 5, 0.5


def _decay_by_keyword(method: Any, **options: Any) -> Factory:
    return lambda schedule, decay: method(schedule, weight_decay=decay, **options)


def _decay_added(method: Any, **options: Any) -> Factory:
    """Return a factory of a method without decoupled decay of its own, with that of AdamW."""
    return lambda schedule, decay: optax.chain(
        method(1.0, **options), optax.add_decayed_weights(-decay), optax.scale_by_schedule(schedule)
    )


def _warmed_up(schedule: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    """Return AdamW with the additional warm-up that Adam's share has in DualAdam."""
    return optax.adamw(
        lambda count: schedule(count) * jnp.minimum(1, (count + 1) * SWITCH_RATE),
        weight_decay=decay,
    )


def _radam_with_lookahead(schedule: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    radam = _decay_added(optax.radam)(schedule, decay)
    return lookahead(radam, sync_period=SYNC_PERIOD, slow_step_size=SLOW_STEP_SIZE)


def _stored(factory: Factory, schedule: optax.Schedule, decay: Any) -> Any:
    return quantize_state(factory(schedule, decay))


WARMED_UP = "AdamW, DualAdam's warm-up"
RADAM = "RAdam, lookahead"
NADAMW = "NAdamW"

# All but two have Adam's default. InvAdam's rate is per unit of squared gradient, so it has another
# size: the authors publish none for InvAdam alone, and this is a round one that trains.
RATE, RATE_OF_LION, RATE_OF_INVADAM = 1e-3, 1e-4, 1.0
FLOAT32 = {
    "AdamW": Contender(_decay_by_keyword(optax.adamw), RATE),
    NADAMW: Contender(_decay_by_keyword(optax.nadamw), RATE),
    RADAM: Contender(_radam_with_lookahead, RATE),
    "Lion": Contender(_decay_by_keyword(optax.lion), RATE_OF_LION),
    # The released FAME has L2 decay, with which it would be compared for its decay.
    "FAME": Contender(_decay_added(fame), RATE, control=NADAMW),
    "FAME .9 .3 .7": Contender(_decay_added(fame, b3=0.3, b5=0.7), RATE),
    "VRAdam": Contender(_decay_by_keyword(vradam), RATE),
    "InvAdam": Contender(_decay_by_keyword(invadam), RATE_OF_INVADAM),
    "DualAdam": Contender(
        _decay_by_keyword(dualadam, switch_rate=SWITCH_RATE), RATE, control=WARMED_UP
    ),
    WARMED_UP: Contender(_warmed_up, RATE),
    "NOVAK": Contender(_decay_by_keyword(novak), RATE, control=RADAM),
    "CaAdam": Contender(_decay_by_keyword(caadam), RATE),
}
# The methods of the papers.
METHODS = "FAME", "VRAdam", "InvAdam", "DualAdam", "NOVAK", "CaAdam"


def eight_bit(name: str) -> str:
    return f"{name}, 8-bit"


CONTENDERS = FLOAT32 | {
    eight_bit(name): Contender(
        partial(_stored, FLOAT32[name].factory), FLOAT32[name].rate, form_of=name
    )
    for name in ("AdamW", *METHODS)
}
