"""Encoded arrays in variables of Flax nnx, each of which is a node around one array.

`nnx.Optimizer` keeps every array of a state in a variable, and copies new states by the structure
outside of the variables. So the node of an encoded array must be outside of them, too: each of its
arrays is in a variable, and not the node as a whole. The functions here take nodes of arrays and
nodes of variables alike.
"""

from typing import Any

import jax

from optax_ext.low_precision.formats import is_encoded


def put_nodes_outside(tree: Any) -> Any:
    """Replace each variable of a node by a node of variables."""
    return jax.tree.map(_put_outside, tree, is_leaf=lambda x: is_encoded(x) or is_variable(x))


def decode(node: Any) -> Any:
    """Return the decoded array of a node, in a variable if the node consists of variables."""
    return _in_variable_like(node[0], type(node)(*jax.tree.leaves(node)).decode())


def encode(node: Any, x: Any, bits: jax.Array | None) -> Any:
    """Return the node of a new array or variable, with the format and variables of an old node."""
    encoded = type(node)(*jax.tree.leaves(node)).encode(array_of(x), bits)
    return type(node)(*map(_in_variable_like, node, encoded))


def array_of(x: Any) -> Any:
    """Return the array in a variable, or the array itself."""
    (array,) = jax.tree.leaves(x)
    return array


def is_variable(x: Any) -> bool:
    """Return whether `x` is a variable of Flax nnx."""
    return hasattr(type(x), "get_metadata")  # without a dependency on Flax


def _put_outside(x: Any) -> Any:
    if not is_variable(x):
        return x
    nodes, variable = jax.tree.flatten(x, is_leaf=is_encoded)
    if len(nodes) != 1 or not is_encoded(nodes[0]):
        return x
    (node,) = nodes
    # A sharding of the whole array does not fit scales, which have another shape.
    metadata = {key: value for key, value in x.get_metadata().items() if "sharding" not in key}
    return type(node)(
        *(
            variable.unflatten([array])
            if array.shape == node[0].shape
            else type(x)(array, **metadata)
            for array in node
        )
    )


def _in_variable_like(field: Any, array: Any) -> Any:
    """Return the array in a variable like that of a node's field, if the field is a variable."""
    return jax.tree.structure(field).unflatten([array])
