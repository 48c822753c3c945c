"""Depth and connections of weights that are sliced, stacked, joined, repeated or used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_ext
from support.networks import depths, places, read, shape, shapes


def over_rows(params, x):
    return lax.scan(lambda x, w: (x @ w, None), x, params["stack"]["kernel"])[0]


def over_slices(params, x):
    for i in range(3):
        x = x @ params["stack"]["kernel"][i]
    return x


def over_indices(params, x):
    return lax.fori_loop(0, 3, lambda i, x: x @ params["stack"]["kernel"][i], x)


def over_splits(params, x):
    for w in jnp.split(params["stack"]["kernel"], 3):
        x = x @ w[0]
    return x


def in_reverse(params, x):
    step = lambda x, w: (x @ w, None)  # noqa: E731
    return lax.scan(step, x, params["stack"]["kernel"], reverse=True)[0]


def over_elements(params, x):
    for w in params["stack"]["kernel"]:
        x = x @ w
    return x


def over_takes(params, x):
    for i in range(3):
        x = x @ jnp.take(params["stack"]["kernel"], i, axis=0)
    return x


def over_prepared(params, x):
    """Cast by a loop of its own, transposed and back."""
    stack = lax.map(lambda w: w.astype(jnp.bfloat16), params["stack"]["kernel"])
    return over_rows({"stack": {"kernel": stack.mT.astype(jnp.float32).mT}}, x)


def over_order(params, x):
    """By numbers that the computation holds."""
    order = np.array([2, 0, 1])
    return lax.scan(lambda x, i: (x @ params["stack"]["kernel"][i], None), x, order)[0]


STACKS = [
    *(over_rows, over_slices, over_indices, over_splits, in_reverse),
    *(over_elements, over_takes, over_prepared, over_order),
]


@pytest.mark.parametrize("stack", STACKS, ids=lambda f: f.__name__)
def test_stacked_layers_however_they_are_written(stack):
    params = shapes(stack=(3, 4, 4), out=(4, 5))
    apply = lambda params, x: stack(params, x) @ params["out"]["kernel"]  # noqa: E731
    assert read(apply, params, shape(2, 4)) == {"stack": (16, 1), "out": (20, 3)}


@pytest.mark.parametrize("loop", ["fori_loop", "scan"])
def test_loops_over_halves_of_a_stack(loop):
    """JAX keeps one body for both loops; the six layers are six all the same."""

    def apply(params, x):
        body = lambda i, x: x @ params["stack"]["kernel"][i]  # noqa: E731
        step = lambda x, i: (body(i, x), None)  # noqa: E731
        for start in (0, 3):
            if loop == "scan":
                x = lax.scan(step, x, jnp.arange(start, start + 3))[0]
            else:
                x = lax.fori_loop(start, start + 3, body, x)
        return x @ params["out"]["kernel"]

    params = shapes(stack=(6, 4, 4), out=(4, 2))
    assert read(apply, params, shape(2, 4)) == {"stack": (16, 2.5), "out": (8, 6)}


@pytest.mark.parametrize("stack", [over_rows, over_slices], ids=lambda f: f.__name__)
def test_layers_that_are_stacked_on_the_way(stack):
    """Each is where its own layer is, whatever is done to the stack."""

    def apply(params, x):
        kernels = jnp.stack([params[name]["kernel"] for name in "abc"])
        return stack({"stack": {"kernel": jnp.tanh(kernels)}}, x) @ params["out"]["kernel"]

    params = shapes(a=(4, 4), b=(4, 4), c=(4, 4), out=(4, 2))
    architecture = optax_ext.architecture(apply, params, shape(2, 4))
    expected = {"a": (16, 0), "b": (16, 1), "c": (16, 2), "out": (8, 3)}
    assert places(architecture, params) == expected
    assert not any(placed.note for placed in architecture.parameters)


def test_stacks_that_are_joined():
    """Two stacks on one another, and a slice across both."""

    def apply(params, x):
        joined = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]])
        middle = jnp.tanh(jnp.einsum("bi,kio->bo", x, joined[1:3]))
        return over_rows({"stack": {"kernel": joined}}, middle)

    params = shapes(a=(2, 4, 4), b=(2, 4, 4))
    # The middle ones at 0 and later no more; the outer ones at 1 and 2.
    found = read(apply, params, shape(2, 4))
    assert found == {"a": (16, 0.5), "b": (16, 1)}


def test_kernels_side_by_side():
    """All of them are kernels, whatever their sizes; a row of biases beside them is not."""

    def apply(params, x):
        joined = jnp.concatenate([params["at"][name] for name in "qkv"], 1)
        x = x @ joined @ params["mid"]["kernel"]
        kernel = jnp.concatenate([params["out"]["kernel"], params["out"]["bias"][None]])
        return jnp.concatenate([x, jnp.ones((5, 1))], 1) @ kernel

    params = {"at": {"q": shape(8, 8), "k": shape(8, 2), "v": shape(8, 2)}}
    params |= shapes(mid=(12, 3), out=(3, 2))
    params["out"]["bias"] = shape(2)
    architecture = optax_ext.architecture(apply, params, shape(5, 8))
    assert places(architecture, params) == {
        "at/q": (64, 0),
        "at/k": (16, 0),
        "at/v": (16, 0),
        "mid": (36, 1),
        "out": (6, 2),
    }
    assert not any(placed.note for placed in architecture.parameters)


def test_every_other_layer():
    """Strides find the layers that stand where they step."""

    def apply(params, x):
        joined = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]])
        for start in (1, 0):
            x = over_rows({"stack": {"kernel": joined[start::2]}}, x)
        return x

    # a[1], b[0], b[2], then a[0], a[2], b[1].
    params = shapes(a=(3, 4, 4), b=(3, 4, 4))
    assert read(apply, params, shape(2, 4)) == {"a": (16, 7 / 3), "b": (16, 8 / 3)}


def test_kernels_side_by_side_and_apart_again():
    def apply(params, x):
        joined = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]], 1)
        return x @ joined[:, :4] @ joined[:, 4:]

    params = shapes(a=(4, 4), b=(4, 2))
    assert read(apply, params, shape(5, 4)) == {"a": (16, 0), "b": (8, 1)}


def test_one_kernel_for_many_layers():
    """Weights that are repeated are whole in every one of them."""

    def repeated(params, x):
        stack = jnp.broadcast_to(params["shared"]["kernel"], (5, 4, 4))
        return over_rows({"stack": {"kernel": stack}}, x) @ params["out"]["kernel"]

    def tiled(params, x):
        stack = jnp.tile(params["shared"]["kernel"][None], (5, 1, 1))
        return over_rows({"stack": {"kernel": stack}}, x) @ params["out"]["kernel"]

    def changed(params, x):
        stack = params["shared"]["kernel"][None] + params["changes"]["kernel"]
        return over_rows({"stack": {"kernel": stack}}, x) @ params["out"]["kernel"]

    params = shapes(shared=(4, 4), out=(4, 2))
    for apply in (repeated, tiled):
        assert read(apply, params, shape(2, 4)) == {"shared": (16, 0), "out": (8, 1)}
    params |= shapes(changes=(3, 4, 4))
    found = read(changed, params, shape(2, 4))
    assert found == {"shared": (16, 0), "changes": (16, 1), "out": (8, 3)}


@pytest.mark.parametrize("length", [5, 50])
def test_recurrent_layers_by_index(length):
    """Known numbers tell layers apart, not the times at which a loop comes by."""

    def apply(params, x):
        into, hidden = params["into"]["kernel"], params["hidden"]["kernel"]

        def step(h, x):
            def layer(i, carry):
                h, x = carry
                x = jnp.tanh(x @ into[i] + h[i] @ hidden[i])
                return h.at[i].set(x), x

            return lax.fori_loop(0, 2, layer, (h, x))

        return lax.scan(step, jnp.zeros((2, 4)), x)[1] @ params["out"]["kernel"]

    params = shapes(into=(2, 4, 4), hidden=(2, 4, 4), out=(4, 2))
    found = read(apply, params, shape(length, 4))
    assert {path: connections for path, (connections, _) in found.items()} == {
        "into": 16,
        "hidden": 16,
        "out": 8,
    }
    assert found == read(apply, params, shape(4, 4))


@pytest.mark.parametrize(
    "group",
    [lambda i: i // 3, lambda i: i % 2, lambda i: jnp.minimum(i, 1)],
    ids=["in_turn", "alternating", "first_and_others"],
)
def test_layers_that_a_loop_repeats(group):
    def apply(params, x):
        step = lambda x, i: (x @ params["stack"]["kernel"][group(i)], None)  # noqa: E731
        return lax.scan(step, x, jnp.arange(6))[0] @ params["out"]["kernel"]

    params = shapes(stack=(2, 4, 4), out=(4, 2))
    assert read(apply, params, shape(2, 4)) == {"stack": (16, 0.5), "out": (8, 2)}


def test_a_layer_taken_twice_in_one_iteration():
    def apply(params, x):
        stack = params["stack"]["kernel"]
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ stack[i]) @ stack[i].T, x)
        return x @ params["out"]["kernel"]

    params = shapes(stack=(3, 4, 4), out=(4, 2))
    assert read(apply, params, shape(2, 4)) == {"stack": (16, 1), "out": (8, 3)}


def test_an_index_that_is_not_known():
    """Whether a loop that waits for data takes one layer or many, nobody can tell."""

    def apply(params, x):
        def step(carry):
            i, x = carry
            return i + 1, x @ params["stack"]["kernel"][i]

        x = lax.while_loop(lambda carry: carry[1].sum() > 1, step, (0, x))[1]
        return x @ params["out"]["kernel"]

    params = shapes(stack=(3, 4, 4), out=(4, 2))
    architecture = optax_ext.architecture(apply, params, shape(2, 4))
    notes = {path: placed.note for path, placed in architecture.items() if placed.note}
    assert notes == {"stack/kernel": "by place: sliced at an index not known"}
    assert architecture["out/kernel"].depth == 1


def test_the_first_iteration_may_be_the_deepest():
    """What a loop hands out is as deep as its deepest iteration, here one that starts deep."""

    def apply(params, x):
        start = x[0] @ params["a"]["kernel"] @ params["b"]["kernel"]
        return lax.scan(lambda carry, x: (x, carry), start, x)[1] @ params["out"]["kernel"]

    params = shapes(a=(4, 4), b=(4, 4), out=(4, 2))
    assert depths(apply, params, shape(9, 4)) == {"a": 0, "b": 1, "out": 2}


def test_a_long_loop_that_cuts_nothing_by_its_counter_is_short():
    def apply(params, x):
        body = lambda i, x: jnp.tanh(x @ params["layer"]["kernel"]) + i  # noqa: E731
        return lax.fori_loop(0, 10**9, body, x) @ params["out"]["kernel"]

    params = shapes(layer=(4, 4), out=(4, 2))
    assert depths(apply, params, shape(2, 4)) == {"layer": 0, "out": 1}


def test_stacked_norms_are_no_kernels():
    """A scale has two axes, one of them the stack's."""

    def apply(params, x):
        for i in range(3):
            x = x * params["norm"]["scale"][i][None] @ params["stack"]["kernel"][i]
        return x

    params = {"norm": {"scale": shape(3, 4)}, **shapes(stack=(3, 4, 4))}
    assert read(apply, params, shape(2, 4)) == {"stack": (16, 1)}


@pytest.mark.parametrize("stack", [over_rows, over_slices], ids=lambda f: f.__name__)
def test_stacked_changes_of_one_kernel(stack):
    """Each layer's weights are a shared kernel and a change as large: both are kernels."""

    def apply(params, x):
        shared, changes = params["shared"]["kernel"], params["changes"]["kernel"]
        if stack is over_rows:
            return lax.scan(lambda x, w: (x @ (shared + w), None), x, changes)[0]
        for i in range(3):
            x = x @ (shared + changes[i])
        return x

    params = shapes(shared=(4, 4), changes=(3, 4, 4))
    architecture = optax_ext.architecture(apply, params, shape(2, 4))
    assert places(architecture, params) == {"shared": (16, 0), "changes": (16, 1)}
    assert not any(placed.note for placed in architecture.parameters)


def flipped(params, x):
    return over_rows({"stack": {"kernel": params["stack"]["kernel"][::-1]}}, x)


@pytest.mark.parametrize("back", [in_reverse, flipped], ids=lambda f: f.__name__)
def test_a_stack_passed_in_both_directions(back):
    """The outer layers are at depth 0 in one of them, the middle one at 1 in both."""

    def apply(params, x):
        return over_rows(params, x) + back(params, x)

    assert read(apply, shapes(stack=(3, 4, 4)), shape(2, 4)) == {"stack": (24, 0.5)}


def test_joined_stacks_in_reverse():
    def apply(params, x):
        joined = jnp.concatenate([params["a"]["kernel"], params["b"]["kernel"]])
        return over_rows({"stack": {"kernel": joined[::-1][1:]}}, x)

    # b[0], a[1], a[0]; b[1] is not used.
    assert depths(apply, shapes(a=(2, 4, 4), b=(2, 4, 4)), shape(2, 4)) == {"a": 1.5, "b": 0}


def test_slices_side_by_side_are_one_kernel():
    """Queries, keys and values from one array."""

    def apply(params, x):
        query, key, value = jnp.split(params["qkv"]["kernel"], 3, axis=1)
        return (jax.nn.softmax(x @ query @ (x @ key).T) @ (x @ value)) @ params["out"]["kernel"]

    assert read(apply, shapes(qkv=(4, 12), out=(4, 4)), shape(5, 4)) == {
        "qkv": (48, 0),
        "out": (16, 1),
    }


def test_layers_that_are_used_again_are_no_deeper():
    """Depth is that of the first use, also of what comes after: loop or no loop."""
    params = shapes(into=(3, 4), layer=(4, 4), out=(4, 2))

    def unrolled(params, x):
        x = x @ params["into"]["kernel"]
        for _ in range(5):
            x = jnp.tanh(x @ params["layer"]["kernel"])
        return x @ params["out"]["kernel"]

    def looped(params, x):
        x = x @ params["into"]["kernel"]
        x = lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ params["layer"]["kernel"]), x)
        return x @ params["out"]["kernel"]

    def until(params, x):
        x = x @ params["into"]["kernel"]
        x = lax.while_loop(
            lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ params["layer"]["kernel"]), x
        )
        return x @ params["out"]["kernel"]

    for apply in (unrolled, looped, until):
        assert depths(apply, params, shape(2, 3)) == {"into": 0, "layer": 1, "out": 2}


def test_parts_that_are_used_again_are_no_deeper():
    params = shapes(stack=(3, 4, 4), out=(4, 2))

    def apply(params, x):
        stack = params["stack"]["kernel"]
        x = lax.map(lambda w: x @ w, stack).sum(0)  # side by side
        x = in_reverse(params, x)  # one after the other
        return x @ params["out"]["kernel"]

    assert read(apply, params, shape(2, 4)) == {"stack": (48, 0), "out": (8, 1)}

    def slice_of_passed(params, x):
        x = x @ params["whole"]["kernel"]
        return x @ params["whole"]["kernel"][:, :2] @ params["out"]["kernel"]

    params = shapes(whole=(4, 4), out=(2, 3))
    assert read(slice_of_passed, params, shape(5, 4)) == {"whole": (16, 0), "out": (6, 1)}
