"""Nodes of encoded arrays among boxes: variables of Flax nnx, each a node around one array.

`nnx.Optimizer` keeps every array of a state in a variable, and copies new states by the structure
outside of the variables. So the node of an encoded array must be outside of them, too: each of its
arrays is in a variable, and not the node as a whole. The functions here take nodes of arrays and
nodes of boxes alike.
"""

from typing import Any

import jax

from optax_ext.low_precision.formats import is_encoded


def put_nodes_outside(tree: Any) -> Any:
    """Replace each box around a node by a node of boxes."""
    return jax.tree.map(_put_outside, tree, is_leaf=lambda x: is_encoded(x) or is_box(x))


def decode(node: Any) -> Any:
    """Return the decoded array of a node, in a box if the node consists of boxes."""
    return _like(node[0], type(node)(*jax.tree.leaves(node)).decode())


def encode(node: Any, x: Any, bits: jax.Array | None) -> Any:
    """Return the node of a new array or box, in the format and the boxes of an old node."""
    encoded = type(node)(*jax.tree.leaves(node)).encode(unboxed(x), bits)
    return type(node)(*map(_like, node, encoded))


def unboxed(x: Any) -> Any:
    """Return the array in a box, or the array itself."""
    (array,) = jax.tree.leaves(x)
    return array


def is_box(x: Any) -> bool:
    """Return whether `x` is a variable of Flax nnx."""
    return hasattr(type(x), "get_metadata")  # without a dependency on Flax


def _put_outside(x: Any) -> Any:
    if not is_box(x):
        return x
    nodes, box = jax.tree.flatten(x, is_leaf=is_encoded)
    if len(nodes) != 1 or not is_encoded(nodes[0]):
        return x
    return type(nodes[0])(*(box.unflatten([array]) for array in nodes[0]))


def _like(field: Any, array: Any) -> Any:
    """Return the array in a box like that of a node's field, if it is in one."""
    return jax.tree.structure(field).unflatten([array])
