"""A fused step inside JAX's transformations, training loops and holders of optimizers."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax import lax
from jax.sharding import PartitionSpec as P

import optax_ext
from pallas_kernels import explain, fuse
from pallas_kernels.flax import FusedOptimizer, FusedTrainState
from support.cases import CASES, PATHS, slow_unless
from support.fused import (
    SMALL,
    SUMMED,
    Race,
    assert_close,
    assert_trained,
    chain_step,
    fused_step,
    in_dtypes_of,
    lowered,
    parameters,
    stream,
)

# A norm of all leaves, norms of each, and slow weights that every other step leaves alone.
TX = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax_ext.novak(0.05, trust_ratio=True, sync_period=2),
)
PARAMS = in_dtypes_of(SMALL, parameters(SMALL))
GRADS = stream(SMALL, 4)
STACKED = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)

# "auto" is what users run: on a CPU it is the chain, behind the same transformation rules.
every_backend = pytest.mark.parametrize(
    "backend", slow_unless(["interpret"], ["auto", "interpret"])
)


def start():
    return PARAMS, TX.init(PARAMS)


def compiled(step):
    def run(params, state):
        for gradient in GRADS:
            params, state = jax.jit(step)(params, state, gradient)
        return params, state

    return run


def scanned(step):
    return jax.jit(lambda p, s: lax.scan(lambda c, g: (step(*c, g), None), (p, s), STACKED)[0])


def looped(step):
    def body(i, carry):
        return step(*carry, jax.tree.map(lambda g: g[i], STACKED))

    return jax.jit(lambda p, s: lax.fori_loop(0, len(GRADS), body, (p, s)))


def conditional(step):
    """Every second gradient is not used."""

    def maybe(carry, given):
        t, gradient = given
        return lax.cond(t % 2 == 0, lambda: step(*carry, gradient), lambda: carry), None

    indices = jnp.arange(len(GRADS))
    return jax.jit(lambda p, s: lax.scan(maybe, (p, s), (indices, STACKED))[0])


def checkpointed(step):
    return scanned(jax.checkpoint(step))


LOOPS = {loop.__name__: loop for loop in (compiled, scanned, looped, conditional, checkpointed)}


@every_backend
@pytest.mark.parametrize("name", slow_unless(["conditional"], LOOPS))
def test_loops(name, backend):
    loop = LOOPS[name]
    ours = loop(fuse(TX, backend=backend).step)(*start())
    assert_close(ours, loop(chain_step(TX))(*start()), SUMMED)
    assert_trained(PARAMS, ours[0])


@every_backend
@pytest.mark.parametrize("shared_gradients", slow_unless([True], [True, False]))
def test_vmap(shared_gradients, backend):
    """An ensemble of seeds, each with its gradients or all with the same."""
    members = [in_dtypes_of(SMALL, parameters(SMALL, seed=seed)) for seed in range(3)]
    ensemble = jax.tree.map(lambda *p: jnp.stack(p), *members)
    grads = GRADS[0] if shared_gradients else ensemble

    def train(step):
        step = jax.jit(jax.vmap(step, in_axes=(0, 0, None if shared_gradients else 0)))
        params, state = ensemble, jax.vmap(TX.init)(ensemble)
        for _ in range(3):
            params, state = step(params, state, grads)
        return params, state

    assert_close(train(fuse(TX, backend=backend).step), train(chain_step(TX)), SUMMED)


def after_three_steps(make_step, params, rate):
    """A loss of the trained parameters, for a rate that may be traced."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.lamb(rate))
    step = make_step(tx)
    state = tx.init(params)
    for gradient in GRADS[:3]:
        params, state = step(params, state, gradient)
    return optax.tree.norm(params, squared=True)


@every_backend
@pytest.mark.parametrize("name", slow_unless(["grad"], ["grad", "jacfwd", "hessian"]))
def test_derivative_by_learning_rate(name, backend):
    differentiate = getattr(jax, name)

    def loss(make_step):
        return jax.jit(differentiate(lambda rate: after_three_steps(make_step, PARAMS, rate)))

    ours = loss(lambda tx: fuse(tx, backend=backend).step)(0.1)
    expected = loss(chain_step)(0.1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert abs(expected) > 1e-3


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_derivative_by_parameters(differentiate, backend):
    def loss(make_step):
        return jax.jit(differentiate(lambda params: after_three_steps(make_step, params, 0.1)))

    ours = loss(lambda tx: fuse(tx, backend=backend).step)(PARAMS)
    assert_close(ours, loss(chain_step)(PARAMS), 1e-5)


@pytest.mark.slow
def test_derivative_by_gradients_through_updates():
    """A meta-learner differentiates through Optax's protocol."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.lamb(0.1))

    def loss(tx):
        def of(grads):
            updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
            return optax.tree.norm(optax.apply_updates(PARAMS, updates), squared=True)

        return jax.jit(jax.grad(of))(GRADS[0])

    assert_close(loss(fuse(tx, backend="interpret")), loss(tx), 1e-5)


def test_injected_hyperparameters_change_during_a_run():
    tx = optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.exponential_decay(0.1, 1, 0.5), weight_decay=0.1
    )

    def train(step):
        step = jax.jit(step)
        params, state = PARAMS, tx.init(PARAMS)
        for t, gradient in enumerate(GRADS):
            state.hyperparams["weight_decay"] = jnp.float32(0.1 * t)
            params, state = step(params, state, gradient)
        return params, state

    assert_close(train(fused_step(tx)), train(chain_step(tx)), SUMMED)


def scale_by_value() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, value, sharpness=1, **extra):
        del params, extra
        return jax.tree.map(lambda g: g * value**sharpness, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.slow
@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.full((), 2.0, np.float32)], ids=repr)
def test_extra_arguments(value):
    """Python's numbers stay what they are, which decides how they promote."""
    tx = optax.chain(scale_by_value(), optax.sgd(0.1))
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    for params in (PARAMS, narrow):
        arguments = tx.init(params), params
        for static in ({}, {"sharpness": 2}):
            ours, expected = (
                jax.jit(partial(update, **static))(params, *arguments, value=value)
                for update in (fuse(tx, backend="interpret").update, tx.update)
            )
            assert_close(ours, expected, SUMMED)


def test_weak_types_of_the_state_last():
    """`jit` compiles the fused step once if the chain's state keeps its types."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -state * g, updates), state * 0.5

    tx = optax.GradientTransformation(lambda params: jax.jit(lambda x: x)(0.1), update)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(narrow)
    assert state.weak_type
    ours, expected = (
        jax.eval_shape(update, narrow, state) for update in (fuse(tx).update, tx.update)
    )
    assert ours == expected


def test_donated_arguments():
    params, state = jax.tree.map(jnp.copy, start())
    step = jax.jit(fuse(TX).step, donate_argnums=(0, 1))
    donated = jax.tree.leaves((params, state))
    for gradient in GRADS:
        params, state = step(params, state, gradient)
    assert all(x.is_deleted() for x in donated if x.size > 1)
    assert_close((params, state), compiled(chain_step(TX))(*start()), SUMMED)


def test_fused_transformation_in_a_chain():
    """It is an Optax transformation like another."""
    parts = optax.clip(0.1), optax.adamw(0.1)
    run = Race(optax.chain(*parts), SMALL)
    tx = optax.chain(parts[0], fuse(parts[1], backend="interpret"))
    ours = Race(tx, SMALL)
    expected = run.run([run.chain], run.grads(5))
    assert_close(ours.run([ours.chain], run.grads(5)), expected, SUMMED)


def test_state_is_mapped_like_the_chains():
    tx = fuse(optax.chain(optax.adamw(0.1), optax.trace(0.9)))
    state = tx.init(PARAMS)
    marked = optax.tree_map_params(
        tx, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    assert sorted(set(jax.tree.leaves(marked))) == ["other", "parameter"]
    assert jax.tree.leaves(marked).count("parameter") == 3 * len(jax.tree.leaves(PARAMS))


class Network(nnx.Module):
    """Parameters, and variables that are none."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(self.norm(x))))


@every_backend
def test_nnx_optimizer(backend):
    x = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)

    def loss(model):
        return jnp.mean((model(x) - 1) ** 2)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    def train(holder, tx):
        model = Network()
        optimizer = holder(model, tx, wrt=nnx.Param)
        for _ in range(5):
            train_step(model, optimizer)
        return jax.tree.map(jnp.asarray, [nnx.as_pure(nnx.state(x)) for x in (model, optimizer)])

    ours = train(FusedOptimizer, fuse(TX, backend=backend))
    assert_close(ours, train(nnx.Optimizer, TX), SUMMED)


def test_nnx_optimizer_passes_arguments_on():
    tx = optax.chain(scale_by_value(), optax.sgd(1.0))

    def train(holder, tx):
        model = Network()
        optimizer = holder(model, tx, wrt=nnx.Param)
        optimizer.update(model, nnx.state(model, nnx.Param), value=jnp.float32(0.25))
        return nnx.as_pure(nnx.state(model))

    ours = train(FusedOptimizer, fuse(tx, backend="interpret"))
    assert_close(ours, train(nnx.Optimizer, tx), SUMMED)


@every_backend
def test_train_state(backend):
    def train(holder, tx):
        state = holder.create(apply_fn=None, params=PARAMS, tx=tx)
        advance = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
        for gradient in GRADS:
            state = advance(state, gradient)
        return state.step, state.params, state.opt_state

    ours = train(FusedTrainState, fuse(TX, backend=backend))
    assert_close(ours, train(train_state.TrainState, TX), SUMMED)


def test_train_state_replaces_fields():
    state = FusedTrainState.create(apply_fn=None, params=PARAMS, tx=fuse(TX))
    assert state.apply_gradients(grads=GRADS[0], apply_fn="other").apply_fn == "other"


def test_train_state_overwrites_with_gradients():
    """Flax's scales of float8 products: their gradients are their next values."""
    params = {"params": PARAMS, "_overwrite_with_gradient": {"scale": jnp.float32(1.0)}}
    grads = {"params": GRADS[0], "_overwrite_with_gradient": {"scale": jnp.float32(3.0)}}

    def advance(holder, tx):
        state = holder.create(apply_fn=None, params=params, tx=tx)
        state = state.apply_gradients(grads=grads)
        return state.params, state.opt_state

    ours = advance(FusedTrainState, fuse(TX, backend="interpret"))
    assert_close(ours, advance(train_state.TrainState, TX), SUMMED)


UNFUSED = {
    "muon": (optax.contrib.muon(0.1), "scan"),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=2), "reduce_sum"),
    "noisy_sgd": (optax.noisy_sgd(0.1, key=0), "random_bits"),
}


@pytest.mark.parametrize(("tx", "primitive"), UNFUSED.values(), ids=UNFUSED)
def test_strict_names_leaf_and_primitive(tx, primitive):
    params = {"layer": {"kernel": jnp.ones((5, 7))}}
    arguments = params, tx.init(params), params
    with pytest.raises(ValueError, match=rf"layer/kernel: {primitive} is not elementwise"):
        fuse(tx, strict=True).step(*arguments)
    assert any(
        f"layer/kernel: {primitive} " in line for line in explain(tx, params).fallback_reasons
    )
    fuse(tx).step(*arguments)


def cuts_leaves(case) -> bool:
    return case.options.get("lookahead") == "rotating"


@pytest.mark.parametrize(
    "case", slow_unless(PATHS, [case for case in CASES if not cuts_leaves(case)])
)
def test_nothing_of_our_methods_is_left_to_xla(case):
    assert explain(case.build(), SMALL).fallback_reasons == ()


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'.* got 'cuda'"):
        fuse(TX, backend="cuda")


def kernels(backend: str, platform: str) -> int:
    """Calls of Triton kernels in the program for a platform, which need not be there."""
    text = lowered(fuse(TX, backend=backend).step, *start(), GRADS[0], platform=platform)
    return len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_run_the_chain(platform):
    assert kernels("auto", platform) == 0


def test_gpus_run_kernels():
    assert kernels("auto", "cuda") == explain(TX, PARAMS).launches > 0
    assert kernels("xla", "cuda") == 0


def test_operations_that_only_have_effects():
    """Such as a print: XLA runs them."""
    seen = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda x: seen.append(float(x)), updates["kernel"][0, 0])
        return updates, state

    tx = optax.chain(optax.GradientTransformation(lambda p: optax.EmptyState(), update), TX)
    state = tx.init(PARAMS)
    ours = fused_step(tx)(PARAMS, state, GRADS[1])
    jax.effects_barrier()
    assert seen == [float(GRADS[1]["kernel"][0, 0])]
    assert_close(ours, chain_step(tx)(PARAMS, state, GRADS[1]), SUMMED)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("backend", ["auto", "interpret"])
def test_inside_of_a_shard_map(backend, check_vma):
    """Kernels don't say how their results vary, so the chain runs where that is checked."""
    mesh = jax.make_mesh((1,), ("device",))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(3)}
    state = tx.init(params)
    specs = {"mesh": mesh, "in_specs": P(), "out_specs": P(), "check_vma": check_vma}
    step = jax.jit(jax.shard_map(fuse(tx, backend=backend).step, **specs))
    expected = fuse(tx, backend="xla").step(params, state, params)
    found = step(params, state, params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
    if check_vma:
        strict = jax.shard_map(fuse(tx, backend=backend, strict=True).step, **specs)
        with pytest.raises(ValueError, match="kernels need a shard_map with check_vma=False"):
            strict(params, state, params)


def test_a_jaxpr_with_a_fused_step_is_short():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.1))
    params = {str(i): jnp.ones((8, 8)) for i in range(20)}
    jaxpr = jax.make_jaxpr(fuse(tx).step)(params, tx.init(params), params)
    assert len(str(jaxpr)) < 20_000


def test_a_branch_with_work_for_xla_stays_a_branch():
    """Otherwise both branches would run at every step."""

    def often(count, g):
        return jax.lax.cond(count > 5, lambda g: jnp.sort(g, axis=0), lambda g: g, g)

    tx = optax.stateless(lambda updates, _: jax.tree.map(partial(often, jnp.array(3)), updates))
    params = jnp.ones((64, 64))
    (reason,) = explain(tx, params).fallback_reasons
    assert "cond" in reason
    halved = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda g: jax.lax.cond(jnp.sum(g) > 5, lambda g: g / 2, jnp.zeros_like, g), updates
        )
    )
    assert not explain(halved, params).fallback_reasons


def test_inner_products_of_two_dtypes_are_float32():
    """As `optax.contrib.momo` has them."""

    def project(updates, params):
        return jax.tree.map(lambda g, p: g * optax.tree.vdot(g, p).astype(g.dtype), updates, params)

    tx = optax.stateless(project)
    params = jnp.linspace(0.0, 1.0, 4096)
    grads = params.astype(jnp.bfloat16)
    found, expected = (
        fuse(tx, backend=backend).update(grads, tx.init(params), params)[0]
        for backend in ("interpret", "xla")
    )
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), rtol=1e-2)


def test_a_key_that_an_inner_function_closes_over():
    key = jax.random.key(0)
    noise = jax.jit(lambda g: g + jax.random.normal(key, g.shape))
    tx = optax.stateless(lambda updates, _: jax.tree.map(noise, updates))
    params = jnp.ones((8, 64))
    found = fuse(tx, backend="interpret").update(params, tx.init(params), params)[0]
    np.testing.assert_allclose(found, noise(params), rtol=1e-6)
