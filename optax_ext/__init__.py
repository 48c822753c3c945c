"""Six optimizers from five recent papers for Optax, and the pieces that they are built from."""

import importlib
from typing import Any

from optax_ext.architecture import Architecture, architecture
from optax_ext.low_precision import formats
from optax_ext.low_precision.choices import default_formats
from optax_ext.low_precision.quantized_state import (
    dequantize_state,
    quantize_existing_state,
    quantize_state,
)
from optax_ext.low_precision.report import quantization_report
from optax_ext.low_precision.weights import (
    bfloat16_weights,
    float32_weights,
    master_weights,
    stochastic_rounding,
)
from optax_ext.methods.caadam import caadam
from optax_ext.methods.dualadam import dualadam, invadam
from optax_ext.methods.fame import fame
from optax_ext.methods.novak import novak
from optax_ext.methods.vradam import vradam
from optax_ext.registry import METHODS, get
from optax_ext.shardings import state_shardings
from optax_ext.transforms.autoscaling import autoscale
from optax_ext.transforms.bias_correction import correct_bias
from optax_ext.transforms.cascades import triple_ema, triple_ema_of_squares
from optax_ext.transforms.connections import connection_table, scale_by_connections
from optax_ext.transforms.joins import (
    Join,
    blend,
    linear_inverse_share,
    product,
    ratio,
    ratio_once_tractable,
    scale_by_moments,
)
from optax_ext.transforms.lookahead import lookahead
from optax_ext.transforms.moments import ema, ema_of_squares, max_ema_of_squares
from optax_ext.transforms.nesterov import nesterov_ema, scheduled_nesterov_ema
from optax_ext.transforms.rectification import rectify
from optax_ext.transforms.trust_ratio import scale_by_trust_ratio
from optax_ext.transforms.velocity import velocity_regularized

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `optax_ext.testing` when it is first used, because it needs chex."""
    if name == "testing":
        return importlib.import_module("optax_ext.testing")
    raise AttributeError(f"module 'optax_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, without the modules that define them."""
    return [*__all__, "__version__", "testing"]


__all__ = [
    "METHODS",
    "Architecture",
    "Join",
    "architecture",
    "autoscale",
    "bfloat16_weights",
    "blend",
    "caadam",
    "connection_table",
    "correct_bias",
    "default_formats",
    "dequantize_state",
    "dualadam",
    "ema",
    "ema_of_squares",
    "fame",
    "float32_weights",
    "formats",
    "get",
    "invadam",
    "linear_inverse_share",
    "lookahead",
    "master_weights",
    "max_ema_of_squares",
    "nesterov_ema",
    "novak",
    "product",
    "quantization_report",
    "quantize_existing_state",
    "quantize_state",
    "ratio",
    "ratio_once_tractable",
    "rectify",
    "scale_by_connections",
    "scale_by_moments",
    "scale_by_trust_ratio",
    "scheduled_nesterov_ema",
    "state_shardings",
    "stochastic_rounding",
    "triple_ema",
    "triple_ema_of_squares",
    "velocity_regularized",
    "vradam",
]
