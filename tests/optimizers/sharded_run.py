"""What `test_sharding.py` runs on eight host devices: factors spread over an axis of a mesh."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kfgn
from kfgn.optimizers import staggered
from tests.tables import small

jax.config.update("jax_enable_x64", True)
# Two programs at once on more devices than cores may each wait for the other's threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
PROCESSES = 2 if sys.argv[1] == "two" else 1
LAYERS, WIDTH, OUTPUTS, DEVICES, EXAMPLES = 8 // PROCESSES**2, 20, 3, 8, 48
if PROCESSES > 1:  # before anything is computed
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[2], PROCESSES, int(sys.argv[3]))
get = optax.tree_utils.tree_get


def model(params, inputs):
    h = inputs
    for k in range(LAYERS):
        h = h + jnp.tanh(h @ params[f"{k}"]["w"] + params[f"{k}"]["b"])
    return h @ params["out"] + params["out bias"]


def problem():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 5)

    params = {f"{k}": {"w": normal(WIDTH, WIDTH), "b": normal(WIDTH)} for k in range(LAYERS)}
    params |= {"out": normal(WIDTH, OUTPUTS), "out bias": normal(OUTPUTS)}
    return params, (normal(EXAMPLES, WIDTH), normal(EXAMPLES, OUTPUTS))


OBJECTIVE = kfgn.Objective(model, kfgn.losses.half_squared_error)
params, batch = problem()
count = sum(leaf.size for leaf in jax.tree.leaves(params))
OF_FACTORS = LAYERS * ((WIDTH + 1) ** 2 + WIDTH**2) + (WIDTH + 1) ** 2 + OUTPUTS**2


def step_of(tx, axis_name=None):
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", axis_name=axis_name)

    def step(params, state, batch):
        (_, grads), curvature = curvature_fn(params, batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    return step


def made(name, sharding):
    if name == "kronecker":
        blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
        tx = kfgn.transforms.scale_by_kronecker(
            blocks, 0.1, refresh_inverse_every=2, inverse="eigen", factor_sharding=sharding
        )
        return optax.chain(tx, optax.scale(-0.1))
    options = {"recipe": {}, "search": {"factor_damping": 1.0}, "stagger": {"stagger": True}}[name]
    shapes = {"refresh_inverse_every": 2, "factor_sharding": sharding}
    return kfgn.kflr(OBJECTIVE, params, batch, **shapes, **options)


def mesh_of(devices=DEVICES, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("data",), (kind,), devices=jax.devices()[:devices])


def run(step, params, state, batch, updates=4):
    for _ in range(updates):
        params, state = step(params, state, batch)
    return params, state


def close(many, one):
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        # Sums over the batch in another order, through a few inversions.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


def check_shares(state):
    """Each device has an eighth of the factors and inverses, and a layer in it."""
    leaves = jax.tree.leaves((get(state, "factors"), get(state, "inverses")))
    for leaf in leaves:
        assert {s.data.nbytes for s in leaf.addressable_shards} == {leaf.nbytes // DEVICES}
        if LAYERS == DEVICES and leaf.shape[-2] >= WIDTH == leaf.shape[-1]:
            assert all(np.any(s.data) for s in leaf.addressable_shards)


def sent(program):
    """How many numbers each kind of collective in a compiled program gives."""
    found = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text()):
        sizes = re.findall(r"\w\d+\[([\d,]*)\]", shapes)
        numbers = [math.prod(int(n) for n in s.split(",") if n) for s in sizes]
        found.setdefault(kind, []).extend(numbers)
    return found


def check_sent(program):
    """Sums of gradient and factors, directions, also of the search; never an example."""
    found = sent(program)
    assert set(found) <= {"all-reduce", "all-gather"}, found
    stack = LAYERS * (WIDTH + 1) * WIDTH
    assert found["all-gather"] and set(found["all-gather"]) == {stack}, found
    reduced = sum(found["all-reduce"])
    one = (WIDTH + 1) * OUTPUTS  # a direction that is summed
    assert count + OF_FACTORS <= reduced <= count + OF_FACTORS + 3 * one + 200, found


def check_predicted(mesh, params, batch, state):
    """Beside what `kfgn.inspect` says of this mesh."""
    costs = kfgn.inspect(OBJECTIVE, params, batch, mesh=mesh, file=io.StringIO()).per_device
    assert (costs.gradient_bytes, costs.factor_bytes) == (8 * count, 8 * OF_FACTORS)
    leaves = jax.tree.leaves((get(state, "factors"), get(state, "inverses")))
    assert costs.state_bytes_of_share == sum(x.addressable_shards[0].data.nbytes for x in leaves)
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE, "empirical")

    def both(params, batch):
        (_, grads), curvature = curvature_fn(params, batch)
        return grads, curvature.factors

    counted = jax.jit(both).lower(params, batch).compile().cost_analysis()["flops"]
    assert 0.5 < costs.flops["empirical"] / counted < 2


def one_process(folder):
    """Under jit; from a checkpoint on four devices; inside shard_map, types checked or not."""
    alone = run_alone("search")
    spread, same = placed(mesh := mesh_of())
    tx = made("search", NamedSharding(mesh, P("data")))
    step = jax.jit(step_of(tx))
    saved = run(step, same, tx.init(same), spread, 2)
    many, state = run(step, *saved, spread, 2)
    close(many, alone[0])
    close(kfgn.diagnostics.record(state), kfgn.diagnostics.record(alone[1]))
    check_shares(state)
    check_sent(step.lower(same, state, spread).compile())
    check_predicted(mesh, same, spread, state)
    check_resumed(folder, saved, many)
    close(inside("search", True), alone[0])
    check_turns(spread, same, mesh)
    close(inside("kronecker", False), run_alone("kronecker")[0])
    for kind in (AxisType.Auto, AxisType.Explicit):
        check_parameters_in_shares(kind)


def check_turns(spread, same, mesh):
    """All devices invert their part of one stack, and at the next update of the other."""
    tx = made("stagger", NamedSharding(mesh, P("data")))
    step, state, many = jax.jit(step_of(tx)), tx.init(same), same
    for k in range(4):
        before = get(state, "inverses").stacks
        many, state = step(many, state, spread)
        after = get(state, "inverses").stacks
        new = {n: np.any(after[n].right != before[n].right, axis=(1, 2)) for n in after}
        # The stack of layers has more to invert, and so the last turn.
        turns = {n: k < 2 or k % 2 != (n.startswith(f"{WIDTH + 1}x{OUTPUTS}")) for n in after}
        assert {n: bool(np.any(x)) for n, x in new.items()} == turns
    staggered.in_turns = lambda blocks, _: [["out"], [n for n in blocks if n != "out"]]
    close(many, run_alone("stagger")[0])


def check_parameters_in_shares(kind):
    """Each device has half of the kernels, and a quarter of the batch."""
    params, batch = small.make_params(jnp.float64), small.make_batch(jnp.float64)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    optimizer = kfgn.kfra(small.OBJECTIVE, params, batch)
    step = jax.jit(small.make_step(optimizer))

    def two(params, batch):
        state = optimizer.init(params)
        for _ in range(2):
            params, state, _ = step(params, state, batch)
        return params, state

    def half(leaf):
        columns = P(*(None,) * (leaf.ndim - 1), "model") if leaf.shape[-1] % 2 == 0 else P()
        return jax.device_put(leaf, NamedSharding(mesh, columns))

    halves = jax.tree.map(half, params)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(halves))
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    close(two(halves, spread), two(params, batch))


def run_alone(name):
    tx = made(name, None)
    return run(jax.jit(step_of(tx)), params, tx.init(params), batch)


def check_resumed(folder, saved, expected):
    spread, same = placed(mesh := mesh_of(4))
    tx = made("search", NamedSharding(mesh, P("data")))
    like = jax.tree.map(on(mesh), (same, tx.init(same)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "eight", saved)
        checkpointer.wait_until_finished()
        # Not strict: stacks are padded with zeros up to a multiple of the devices.
        restored = checkpointer.restore(Path(folder) / "eight", like, strict=False)
    close(run(jax.jit(step_of(tx)), *restored, spread, 2)[0], expected)


def placed(mesh):
    spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
    return spread, jax.device_put(params, NamedSharding(mesh, P()))


def inside(name, check_vma):
    """The run inside shard_map, with the state's own shardings as its specs."""
    spread, same = placed(mesh := mesh_of())
    tx = made(name, NamedSharding(mesh, P("data")))
    specs = jax.tree.map(lambda x: getattr(x.sharding, "spec", P()), tx.init(same))
    step = jax.shard_map(
        step_of(tx, "data"),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
        check_vma=check_vma,
    )
    program = jax.jit(step).lower(same, tx.init(same), spread).compile()
    many, state = run(program, same, tx.init(same), spread)
    check_shares(state)
    check_sent(program)
    return many


def on(mesh):
    """A leaf's shape with its sharding on a mesh, replicated where it has none there."""

    def shape(x):
        own = x.sharding if isinstance(x.sharding, NamedSharding) else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    return shape


def two_processes(_, number):
    """One of two processes, each with half of the devices and of the batch."""
    mesh = mesh_of()
    half = np.arange(EXAMPLES).reshape(PROCESSES, -1)[int(number)]
    rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    make = jax.make_array_from_process_local_data
    spread = jax.tree.map(lambda x: make(rows, np.asarray(x[half])), batch)
    same = jax.tree.map(lambda x: make(copies, np.asarray(x)), params)
    tx = made("recipe", rows)
    many, state = run(jax.jit(step_of(tx)), same, jax.jit(tx.init)(same), spread)
    check_shares(state)
    one = run_alone("recipe")[0]
    close(jax.tree.map(lambda x: x.addressable_data(0), many), one)


if __name__ == "__main__":
    {"one": one_process, "two": two_processes}[sys.argv[1]](*sys.argv[2:])
    print("done")
