"""The methods by name: one row for each, from which examples, pages and tests take their lists."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from optax_ext import _checks
from optax_ext.methods.caadam import caadam
from optax_ext.methods.dualadam import dualadam, invadam
from optax_ext.methods.fame import fame
from optax_ext.methods.novak import novak
from optax_ext.methods.vradam import vradam


class Method(NamedTuple):
    """One row of `METHODS`.

    Attributes:
      factory: the function that makes the optimizer; its docstring has equations and sources.
      title: the name as its paper spells it.
      description: what the method does, in one sentence.
      logged: the values in its state that show what the method does, for `optax.tree.get`. Options
        can add others, which the factory's docstring names.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    title: str
    description: str
    logged: tuple[str, ...] = ()


_ROWS = (
    Method(fame, "FAME", "Adam with a triple moving average as momentum"),
    Method(vradam, "VRAdam", "Adam whose rate falls when its momentum grows", ("gate",)),
    Method(invadam, "InvAdam", "multiplies momentum by the root of the second moment"),
    Method(dualadam, "DualAdam", "InvAdam at first, Adam in the end", ("inverse_share",)),
    Method(
        novak,
        "NOVAK",
        "Adam with rectification and lookahead, and optional Nesterov momentum",
        ("rectification",),
    ),
    Method(
        caadam,
        "CaAdam",
        "Adam with a rate for each layer, from the number of its connections",
        ("connection_scale",),
    ),
)

# Each method, by the name of its function.
METHODS: Mapping[str, Method] = MappingProxyType({row.factory.__name__: row for row in _ROWS})


def get(
    name: str, learning_rate: optax.ScalarOrSchedule, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a name, which a command line or a file of settings can contain.

    `get("vradam", 1e-3, beta3=0.5)` is `optax_ext.vradam(1e-3, beta3=0.5)`. The names are the keys
    of `optax_ext.METHODS`, whose rows also describe the methods.

    `optax.inject_hyperparams` needs the names of all hyperparameters, so it takes the factory of a
    row, and not this function.

    Args:
      name: a key of `METHODS`.
      learning_rate: as in the method.
      **arguments: the method's other arguments.

    Returns:
      The optimizer.

    Raises:
      ValueError: no method has this name, or an argument is out of its range.

    >>> import optax, optax_ext
    >>> list(optax_ext.METHODS)
    ['fame', 'vradam', 'invadam', 'dualadam', 'novak', 'caadam']
    >>> settings = {"name": "vradam", "learning_rate": 1e-3, "weight_decay": 1e-4}
    >>> tx = optax_ext.get(**settings)
    >>> method = optax_ext.METHODS["vradam"]
    >>> method.description
    'Adam whose rate falls when its momentum grows'
    >>> for field in method.logged:
    ...     print(field, optax.tree.get(tx.init({"kernel": 1.0}), field))
    gate 1.0
    >>> tx = optax.inject_hyperparams(method.factory)(learning_rate=1e-3, beta3=0.5)
    """
    _checks.one_of(tuple(METHODS), name=name)
    return METHODS[name].factory(learning_rate, **arguments)
