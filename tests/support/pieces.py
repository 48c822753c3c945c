"""The table of pieces, each with arguments that it is tested with."""

import optax_ext
from support.optax_battery import Row

MOMENTS = {"first": optax_ext.ema(decay=0.9), "second": optax_ext.ema_of_squares(decay=0.999)}
ADAM = {"inner": optax_ext.scale_by_moments(**MOMENTS, join=optax_ext.ratio(eps=1e-8))}
JOINS = {
    "ratio": optax_ext.ratio(eps=1e-8),
    "product": optax_ext.product(eps=1e-8, scale_free=True),
    "blend": optax_ext.blend(optax_ext.linear_inverse_share(0.01), eps=1e-8),
    "ratio_once_tractable": optax_ext.ratio_once_tractable(b2=0.999, eps=1e-8),
}
CASCADE = {"decays": (0.9, 0.7, 0.5), "bias_correction": "exact"}
VELOCITY = {"beta3": 1.0, "lr_cutoff": 10.0, "norm_of": "corrected_velocity", "b1": 0.9}
LOOKAHEAD = {"sync_period": 2, "slow_step_size": 0.5}
FORMATS = optax_ext.default_formats(min_size=1)
PIECES = tuple(
    Row(name, factory, arguments)
    for name, factory, arguments in (
        ("ema", optax_ext.ema, {"decay": 0.9}),
        ("nesterov_ema", optax_ext.nesterov_ema, {"decay": 0.9, "variant": "hybrid"}),
        ("scheduled_nesterov_ema", optax_ext.scheduled_nesterov_ema, {"decay": 0.9}),
        ("triple_ema", optax_ext.triple_ema, CASCADE),
        ("ema_of_squares", optax_ext.ema_of_squares, {"decay": 0.999}),
        ("max_ema_of_squares", optax_ext.max_ema_of_squares, {"decay": 0.999}),
        ("triple_ema_of_squares", optax_ext.triple_ema_of_squares, CASCADE),
        *((n, optax_ext.scale_by_moments, {**MOMENTS, "join": j}) for n, j in JOINS.items()),
        ("correct_bias", optax_ext.correct_bias, {"b1": 0.9, "b2": 0.999}),
        ("velocity_regularized", optax_ext.velocity_regularized, ADAM | VELOCITY),
        ("rectify", optax_ext.rectify, {"b2": 0.999}),
        ("autoscale", optax_ext.autoscale, {**ADAM, "decay": 0.99}),
        ("trust_ratio", optax_ext.scale_by_trust_ratio, {"max_ratio": 10.0}),
        ("lookahead_exact", optax_ext.lookahead, ADAM | LOOKAHEAD),
        ("lookahead_rotating", optax_ext.lookahead, ADAM | LOOKAHEAD | {"mode": "rotating"}),
        ("quantize_state", optax_ext.quantize_state, {"tx": ADAM["inner"], "formats": FORMATS}),
        ("connections", optax_ext.scale_by_connections, {"scaling": "additive"}),
    )
)
