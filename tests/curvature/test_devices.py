"""A batch spread over four devices gives the curvature and the steps of one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEFORE = """
import io
import re
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import kfgn
from tests.tables.comparison import setting

jax.config.update("jax_enable_x64", True)
# Two programs at once on more devices than cores may each wait for the other's threads.
jax.config.update("jax_cpu_enable_async_dispatch", False)
net = sys.argv[1]
case, objective, batch = setting(net, count=8)
mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
METHODS = ("kfra", "kflr", "kfac", "empirical")


def close(one, many, message):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        # Sums over the batch in another order: roundoff, a little more after two steps.
        tolerance = 1e-9 * max(np.max(np.abs(a), initial=0), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=message)


def curvature_of(method, axis_name=None, **options):
    function = kfgn.value_grad_and_curvature(objective, method, axis_name=axis_name, **options)
    key = {"key": jax.random.key(0)} if method == "kfac" else {}
    return lambda params, batch: function(params, batch, **key)


def over_axis(function, check_vma):
    specs = {"in_specs": (P(), P("batch")), "out_specs": P(), "check_vma": check_vma}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))
"""

SHARDED = """
rows, copies = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
optimizer = kfgn.kfra(objective, case.params, batch)


@jax.jit
def step(params, state, batch):
    results = {}
    for method in METHODS:
        (value, grads), curvature = curvature_of(method)(params, batch)
        results[method] = value, grads, curvature.factors
        if method == "kfra":
            updates, state = optimizer.update(grads, state, params, curvature=curvature)
    hessian = kfgn.hessian(objective).pre_activation(params, batch, reduce="mean")
    return results, hessian, optax.apply_updates(params, updates), state


def run(params, batch):
    results = []
    state = optimizer.init(params)
    for _ in range(2):
        *found, params, state = step(params, state, batch)
        results.append((found, params))
    return results


spread = jax.device_put(batch, rows)
assert len(spread[0].sharding.device_set) == 4 and not spread[0].is_fully_replicated
close(run(case.params, batch), run(jax.device_put(case.params, copies), spread), "sharded")


# What one device has is never sent to others: only sums over examples are.
def of_all(params, batch):
    found = [curvature_of(method)(params, batch) for method in METHODS]
    return [(first, curvature.factors) for first, curvature in found]


text = jax.jit(of_all).lower(jax.device_put(case.params, copies), spread).compile().as_text()
sent = set(re.findall("all-reduce|all-gather|all-to-all|collective-permute", text))
assert sent == {"all-reduce"}, sent
"""

NAMED = """
def measured(method, axis_name, **options):
    every = {"refresh_factors_every": 2}  # the sums over devices are in a loop then
    optimizer = None
    if method == "kfra":
        every["inverse"] = options.get("inverse", "factored")
        optimizer = kfgn.kfra(objective, case.params, batch, **every)

    def of(params, batch):
        (value, grads), curvature = curvature_of(method, axis_name, **options)(params, batch)
        moved = curvature.linearized(curvature.gradient)
        product = curvature.output_product(moved, moved)
        found = value, grads, curvature.factors, product, curvature.displaced(curvature.gradient)
        if optimizer is None:
            return found

        def update(state, _):
            return optimizer.update(grads, state, params, curvature=curvature)[::-1]

        return found, jax.lax.scan(update, optimizer.init(params), length=2)

    return of


RUNS = [(method, {}) for method in METHODS]
if net == "residual":  # options know no net
    RUNS += [("kfra", {"spatial": "homogeneous"}), ("kfra", {"inverse": "ekfac"})]
    RUNS += [("kflr", {"unassigned": "diagonal"})]
    RUNS += [("kfac", {"model_examples": 4, "samples": 2, "sharing": "reduce"})]
for method, options in RUNS:
    one = jax.jit(measured(method, None, **options))(case.params, batch)
    named = measured(method, "batch", **options)
    # How a sum over devices is lowered depends on no net, method or option.
    all_ways = method == "kfra" and net == "residual" and not options
    for way in (True, False, "pmap") if all_ways else (True,):
        if way != "pmap":
            many = over_axis(named, way)(case.params, batch)
            close(one, many, f"{method} {options} {way}")
            continue
        split = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)
        many = jax.pmap(named, axis_name="batch", in_axes=(None, 0))(case.params, split)
        for device in range(4):
            close(one, jax.tree.map(lambda a: a[device], many), f"pmap {method} {options}")
"""

OWN = """
# Without a name, each device has the curvature of its own examples.
ALONE = {method: jax.jit(curvature_of(method)) for method in METHODS}
for method, check_vma in [*((method, True) for method in METHODS), ("kfra", False)]:
    def of(params, batch):
        first, curvature = curvature_of(method)(params, batch)
        return jax.tree.map(lambda x: x[None], (first, curvature.factors))

    specs = {"in_specs": (P(), P("batch")), "out_specs": P("batch"), "check_vma": check_vma}
    many = jax.jit(jax.shard_map(of, mesh=mesh, **specs))(case.params, batch)
    for device in range(4):
        part = jax.tree.map(lambda a: a[2 * device : 2 * device + 2], batch)
        (first, curvature) = ALONE[method](case.params, part)
        found = jax.tree.map(lambda a: a[device], many)
        close((first, curvature.factors), found, f"{method} {check_vma}")
"""


STATISTICS = """
# Of a device's examples, or of all of them: as the model names the axes.
def model_with(axis):
    def model(p, x):
        h = x @ p["a"]
        mean, square = (jax.lax.pmean(jax.numpy.mean(s, 0), axis) for s in (h, h**2))
        return jax.numpy.tanh((h - mean) * jax.lax.rsqrt(square - mean**2 + 1e-3)) @ p["b"], mean

    return model


keys = jax.random.split(jax.random.key(0), 4)
shapes = (4, 5), (5, 3), (8, 4), (8, 3)
a, b, *batch = [jax.random.normal(k, s) for k, s in zip(keys, shapes)]
params, batch = {"a": a, "b": b}, tuple(batch)
loss = kfgn.losses.half_squared_error
split = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)


def of(axis, method, axis_name):
    objective = kfgn.Objective(model_with(axis), loss, axis_name="examples", has_aux=True)
    function = kfgn.value_grad_and_curvature(objective, method, axis_name=axis_name)

    def found(params, batch):
        key = {"key": jax.random.key(0)} if method == "kfac" else {}
        ((value, mean), grads), curvature = function(params, batch, **key)
        moved = curvature.linearized(curvature.gradient)
        product = curvature.output_product(moved, moved)
        displaced = curvature.displaced(curvature.gradient)
        return value, grads, curvature.factors, product, displaced, mean

    return found


both = ("examples", "batch")
for method in ("kfra", "kfac"):  # the recursion, and what goes back by transposition
    one = jax.jit(of("examples", method, None))(params, batch)
    close(one, over_axis(of(both, method, "batch"), False)(params, batch), f"all {method}")
# A device's own: the mean over devices of what each has alone.
alone = jax.jit(of("examples", "kflr", None))
parts = [alone(params, jax.tree.map(lambda a: a[d], split)) for d in range(4)]
mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
step = over_axis(lambda *x: of("examples", "kflr", "batch")(*x)[:3], False)
close(mean[:3], step(params, batch), "own")
try:  # JAX has no named vmap there
    over_axis(of("examples", "kflr", "batch"), True)(params, batch)
except kfgn.errors.BatchError as error:
    assert "needs check_vma=False" in str(error), error
else:
    raise AssertionError("not refused")
"""

PRODUCTS = """
# Exact matrices inside shard_map are of a device's own examples; their mean is the batch's.
def exact(params, batch):
    found = []
    for operator in (kfgn.hessian, kfgn.gauss_newton, kfgn.empirical_fisher):
        of = operator(objective)
        found.append(of.matvec(params, batch, params))
        found.append(of.diagonal(params, batch))
        found.append(of.pre_activation(params, batch, reduce="mean"))
    return found


def mean(params, batch):
    return jax.lax.pmean(exact(params, batch), "batch")


close(jax.jit(exact)(case.params, batch), over_axis(mean, True)(case.params, batch), "exact")

# Hessian-free, with an axis named.
blocks = kfgn.layers.find_blocks(objective, case.params, batch)
solver = kfgn.transforms.scale_by_conjugate_gradient(
    objective, preconditioner="kronecker", blocks=blocks, max_iterations=5
)


def steps(axis_name):
    def of(params, batch):
        state, found = solver.init(params), []
        for _ in range(2):
            (value, grads), curvature = curvature_of("kflr", axis_name)(params, batch)
            updates, state = solver.update(grads, state, params, curvature=curvature)
            params = jax.tree.map(lambda p, u: p - u, params, updates)
            found.append((value, params))
        return found

    return of


one = jax.jit(steps(None))(case.params, batch)
for check_vma in (True, False):
    close(one, over_axis(steps("batch"), check_vma)(case.params, batch), f"free {check_vma}")
"""

EXPLICIT = """
# What jax.make_mesh makes by default: nothing is to be done, with or without jit and set_mesh.
mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
optimizer = kfgn.kfra(objective, case.params, batch)


def step(params, state, batch):
    found = []
    for method in ("kfra", "kfac"):  # the recursion, and what goes back by transposition
        (value, grads), curvature = curvature_of(method)(params, batch)
        found.append((value, grads, curvature.factors, curvature.displaced(curvature.gradient)))
        if method == "kfra":
            updates, state = optimizer.update(grads, state, params, curvature=curvature)
    hessian = kfgn.hessian(objective)
    exact = hessian.matvec(params, batch, params), hessian.diagonal(params, batch)
    return found, exact, optax.apply_updates(params, updates), state


def two(step, params, batch):
    state, results = optimizer.init(params), []
    for _ in range(2):
        *found, params, state = step(params, state, batch)
        results.append((found, params))
    return results


one = two(jax.jit(step), case.params, batch)
spread = jax.device_put(batch, NamedSharding(mesh, P("batch")))
params = jax.device_put(case.params, NamedSharding(mesh, P()))
assert jax.typeof(spread[0]).sharding.spec[0] == "batch"
close(one, two(jax.jit(step), params, spread), "explicit")
with jax.set_mesh(mesh):
    assert kfgn.kfra(objective, params, spread)
    kfgn.inspect(objective, params, spread, file=io.StringIO())
    close(one, two(jax.jit(step), params, spread), "explicit mesh")
    close(objective(params, spread), objective(case.params, batch), "objective")
    first, _ = curvature_of("kflr")(params, spread)
    close(first, curvature_of("kflr")(case.params, batch)[0], "without jit")
"""


NUMBERED = """
import jax.numpy as jnp

keys = jax.random.split(jax.random.key(0), 4)
params = {"w": jax.random.normal(keys[0], (3, 4, 4)) / 2, "o": jax.random.normal(keys[1], (4, 2))}
batch = jax.random.normal(keys[2], (8, 4)), jax.random.normal(keys[3], (8, 2))
loss = kfgn.losses.half_squared_error


def objective_of(key):
    def model(p, x):
        def layer(t, h):
            h = jnp.tanh(h @ p["w"][t])
            if key is None:
                return h
            return h + jax.random.normal(jax.random.fold_in(key, t), h.shape, h.dtype)

        return jax.lax.fori_loop(0, 3, layer, x) @ p["o"]

    return kfgn.Objective(model, loss)


def factors_of(key, axis_name=None):
    def of(params, batch):
        function = kfgn.value_grad_and_curvature(objective_of(key), "kflr", axis_name=axis_name)
        found, curvature = function(params, batch)
        return found, curvature.factors

    return of


def by_hand(params, batch):
    varying = jax.tree.map(lambda x: jax.lax.pcast(x, "batch", to="varying"), params)
    found = jax.value_and_grad(objective_of(jax.random.key(7)))(varying, batch)
    return jax.tree.map(lambda x: jax.lax.pmean(x, "batch"), found)


one = jax.jit(factors_of(None))(params, batch)
for check_vma in (True, False):
    close(one, over_axis(factors_of(None, "batch"), check_vma)(params, batch), "numbered")
    noisy = over_axis(factors_of(jax.random.key(7), "batch"), check_vma)(params, batch)
    close(over_axis(by_hand, True)(params, batch), noisy[0], "noise in a loop")
    assert noisy[1]["w"].activation.shape == (3, 4, 4)

# Of the examples that count, of which one device has none.
label = kfgn.losses.softmax_cross_entropy_with_integer_labels.with_options(ignore_index=-1)
objective = kfgn.Objective(objective_of(None).model, label)
some = batch[0], jnp.array([0, 1, -1, -1, 1, -1, 0, 0])
for method in ("kfra", "empirical"):
    def of(params, batch, axis_name="batch"):
        return curvature_of(method, axis_name)(params, batch)[1].factors

    one = jax.jit(lambda p, b: of(p, b, None))(params, some)
    close(one, over_axis(of, True)(params, some), f"{method} ignored")
"""


def on_four_devices(script: str, *arguments: str) -> None:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "NPROC": "16",  # threads: with fewer, programs in flight can wait for each other's devices
        "PYTHONPATH": str(root),
    }
    code = BEFORE + script + 'print("equal")\n'
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"


def test_sharded_batch_under_jit():
    """Equal results, and nothing of one example sent between devices."""
    on_four_devices(SHARDED, "residual")


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_named_axis(net):
    """In shard_map and pmap, the curvature, the steps and what they measure are the batch's."""
    on_four_devices(NAMED, net)


def test_without_a_name_each_device_has_its_own():
    """Nothing is summed over devices behind the user's back."""
    on_four_devices(OWN, "residual")


def test_exact_products_and_hessian_free():
    """Operators inside shard_map, and a solver under a named axis."""
    on_four_devices(PRODUCTS, "residual")


def test_batch_statistics():
    """Statistics over the examples of a device, or over those of all, with exact gradients."""
    on_four_devices(STATISTICS, "residual")


def test_explicit_axes():
    """The curvature, steps and products of one device, as users write them."""
    on_four_devices(EXPLICIT, "residual")


def test_numbered_loops_with_noise():
    """A loop over slices by their number, its noise, and labels that are ignored, in shard_map."""
    on_four_devices(NUMBERED, "residual")
