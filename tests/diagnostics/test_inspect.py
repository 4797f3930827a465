"""`kfgn.inspect`: every column of the table beside numbers worked out by hand."""

from __future__ import annotations

import io
import json

import jax
import jax.numpy as jnp
import pytest

import kfgn
from kfgn.curvature import recursion as walk
from kfgn.diagnostics.inspect import Row
from tests.tables.architectures import LOSSES, ROWS, make_targets
from tests.tables.training_models import TRAINING


def _objective(name):
    """A row's objective with parameters and a batch of N = 3 examples."""
    case = ROWS[name].case()
    batch = (case.inputs, make_targets(name, case))
    return kfgn.Objective(case.model, LOSSES[ROWS[name].loss].loss), case.params, batch


def _two_layers(width=3):
    """A plain model in float32, `tanh(x W) V + b`, its parameters and a batch of 5."""

    def model(p, x):
        return jnp.tanh(x @ p["first"]) @ p["out"]["w"] + p["out"]["b"]

    params = {
        "first": jnp.ones((4, width)),
        "out": {"w": jnp.ones((width, 2)), "b": jnp.ones(2)},
    }
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    return objective, params, (jnp.ones((5, 4)), jnp.zeros((5, 2)))


# Costs are written as: activation factor + columns * (moment + way back) or + congruence.
def flops(kfra, kflr, kfac):
    """By method; "empirical" goes the way of one sample."""
    return {"kfra": kfra, "kflr": kflr, "kfac": kfac, "empirical": kfac}


ONCE = {"positions": 1, "uses": 1, "slots": 1, "groups": 1, "transposed": False}
OUT = Row(
    "out", ("out/w", "out/b"), "dense", (3, 3), (2, 2), **ONCE, bytes=(9 + 4) * 8,
    flops=flops(kfra=2 * 3 * 9 + 8 * (2 + 2),
    kflr=2 * 3 * 9 + 2 * (2 * 3 * 4 + 3 * 8),
    kfac=2 * 3 * 9 + 2 * 3 * 4 + 3 * 8),
    inversion=27 + 8,
)  # fmt: skip
EXPECTED = {
    "matmul": Row(
        "first", ("first/w", "first/b"), "dense", (4, 4), (2, 2), **ONCE, bytes=(16 + 4) * 8,
        flops=flops(kfra=2 * 3 * 16,
        kflr=2 * 3 * 16 + 2 * (2 * 3 * 4),
        kfac=2 * 3 * 16 + 2 * 3 * 4),
        inversion=64 + 8,
    ),
    "conv_1d_groups": Row(
        "params/layers_0", ("params/layers_0/kernel", "params/layers_0/bias"), "conv",
        (2, 5, 5), (2, 1, 1), **(ONCE | {"positions": 4, "groups": 2}), bytes=2 * (25 + 1) * 8,
        flops=flops(kfra=2 * 3 * 2 * 4 * 25,
        kflr=2 * 3 * 2 * 4 * 25 + 2 * (2 * 3 * 2 * 4),
        kfac=2 * 3 * 2 * 4 * 25 + 2 * 3 * 2 * 4),
        inversion=2 * (125 + 1),
    ),
    "embed": Row(  # two classes: one column
        "params/layers_0", ("params/layers_0/embedding",), "embedding",
        (5,), (2, 2), **(ONCE | {"positions": 3}), bytes=(5 + 4) * 8,
        flops=flops(kfra=3 * 3,
        kflr=3 * 3 + 2 * 3 * 3 * 4,
        kfac=3 * 3 + 2 * 3 * 3 * 4),
        inversion=5 + 8,
    ),
    "embed_tied": Row(  # looked up, and as the last layer, transposed; 2 * 3 columns
        "params/embed", ("params/embed/embedding",), "embedding", (4, 4), (2, 2),
        **(ONCE | {"positions": 4, "uses": 2, "transposed": True}), bytes=(16 + 4) * 8,
        flops=flops(kfra=(2 * 3 * 2 * 16 + 2 * 3 * 2 * 4) + 2 * 2 * 2 * 4 * (4 + 8),
        kflr=(2 * 3 * 2 * 16 + 2 * 3 * 2 * 4)
        + 6 * (2 * 3 * 2 * 4 + 2 * 3 * 2 * 16 + 3 * (2 * 2 * 2 * 4)),
        kfac=(2 * 3 * 2 * 16 + 2 * 3 * 2 * 4)
        + (2 * 3 * 2 * 4 + 2 * 3 * 2 * 16 + 3 * (2 * 2 * 2 * 4))),
        inversion=64 + 8,
    ),
    "tied": Row(
        "w", ("w",), "dense", (2, 2), (2, 2), **(ONCE | {"positions": 2, "uses": 2}),
        bytes=(4 + 4) * 8,
        flops=flops(kfra=2 * (2 * 3 * 4) + 8 * (2 + 2),
        kflr=2 * (2 * 3 * 4) + 2 * (2 * (2 * 3 * 4) + 3 * 8),
        kfac=2 * (2 * 3 * 4) + 2 * (2 * 3 * 4) + 3 * 8),
        inversion=8 + 8,
    ),
    "scan_layers": Row(  # the way back goes through both layers: a loop does in each what it does
        "layers", ("layers/w", "layers/b"), "dense", (2, 3, 3), (2, 2, 2),
        **(ONCE | {"slots": 2}), bytes=2 * (9 + 4) * 8,
        flops=flops(kfra=2 * (2 * 3 * 9) + 2 * 8 * (2 + 2),
        kflr=2 * (2 * 3 * 9) + 2 * (2 * (2 * 3 * 4) + 2 * 3 * 8),
        kfac=2 * (2 * 3 * 9) + 2 * (2 * 3 * 4) + 2 * 3 * 8),
        inversion=2 * (27 + 8),
    ),
    "layer_norm": Row(
        "params/layers_1", ("params/layers_1/scale", "params/layers_1/bias"), "scale",
        (3, 2, 2), (3, 1, 1), **(ONCE | {"groups": 3}), bytes=3 * (4 + 1) * 8,
        flops=flops(kfra=2 * 3 * 3 * 4 + 6 * (3 + 3),
        kflr=2 * 3 * 3 * 4 + 2 * (2 * 3 * 3 + 3 * 6),
        kfac=2 * 3 * 3 * 4 + 2 * 3 * 3 + 3 * 6),
        inversion=3 * (8 + 1),
    ),
    "token_added": Row(  # one row, whose three places are summed
        "token", ("token",), "shift", (1,), (2, 2), **(ONCE | {"positions": 3}),
        bytes=(1 + 4) * 8,
        flops=flops(kfra=3 * 3,
        kflr=3 * 3 + 2 * (2 * 3 * 4),
        kfac=3 * 3 + 2 * 3 * 4),
        inversion=1 + 8,
    ),
    "scalar_shift": Row(
        "shift", ("shift",), "shift", (1,), (1, 1), **(ONCE | {"positions": 2}),
        bytes=(1 + 1) * 8,
        flops=flops(kfra=3 * 2 + 2 * (2 + 2),
        kflr=3 * 2 + 2 * (2 * 3 * 1 + 3 * 2),
        kfac=3 * 2 + 2 * 3 * 1 + 3 * 2),
        inversion=1 + 1,
    ),
    "weight_norm": OUT,
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", EXPECTED)
def test_row(name, capsys):
    """Every value of a block, and its place in what is printed."""
    found = kfgn.inspect(*_objective(name))
    expected = EXPECTED[name]
    assert [row for row in found.rows if row.name == expected.name] == [expected]
    assert capsys.readouterr().out == f"{found}\n"
    assert {row.name: row.parameters for row in found.rows} == ROWS[name].expected
    assert all(f"\n{row.name} " in str(found) for row in found.rows)
    json.dumps(found.rows)  # plain values


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", [n for n in EXPECTED if n != "weight_norm"] + ["bf16_by_hand", "linen_gru"]
)
def test_bytes(name):
    """Those of the factors that are really made."""
    objective, params, batch = _objective(name)
    function = kfgn.value_grad_and_curvature(objective, "kflr")
    factors = jax.jit(lambda p, b: function(p, b)[1].factors)(params, batch)
    found = kfgn.inspect(objective, params, batch, file=io.StringIO())
    assert {row.name: row.bytes for row in found.rows} == {
        block: sum(leaf.nbytes for leaf in leaves) for block, leaves in factors.items()
    }
    assert found.totals.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(factors))
    for row in found.rows:
        assert (row.activation, row.pre_activation) == tuple(x.shape for x in factors[row.name])


@pytest.mark.usefixtures("x64")
def test_unassigned():
    """They have lines of their own, with the reason, and raise nothing."""
    objective, params, batch = _objective("weight_norm")
    found = kfgn.inspect(objective, params, batch, file=io.StringIO())
    assert set(found.unassigned) == {"g", "v"}
    assert found.shapes == {"g": (2,), "v": (3, 2), "out/w": (2, 2), "out/b": (2,)}
    assert "`dot_general` together with 'v'" in found.unassigned["g"]
    table = str(found).splitlines()
    (line,) = [x for x in table if x.startswith("v ")]
    assert line.split(maxsplit=1)[1] == (
        "(3, 2)  meets data in `dot_general` together with 'g', in a way that is no layer"
    )
    assert "14 parameters, 8 in no block" in str(found)
    with pytest.raises(kfgn.errors.LayerError, match="'g' "):
        kfgn.layers.find_blocks(objective, params, batch, unassigned="raise")


def test_totals():
    """Sums, and what belongs to no block: the elementwise function and the largest matrix."""
    found = kfgn.inspect(*_two_layers(), file=io.StringIO())
    first, out = found.rows
    total = found.totals
    assert total.between == {"kfra": 2 * 5 * 3 * 3, "kflr": 0, "kfac": 0, "empirical": 0}
    for method, between in total.between.items():
        assert total.flops[method] == first.flops[method] + out.flops[method] + between
    assert total.bytes == (16 + 9 + 16 + 4) * 4
    assert total.inversion == first.inversion + out.inversion == 64 + 27 + 64 + 8
    forward = 2 * 4 * 3 + 3 + 2 * 3 * 2
    assert total.gradient == 3 * 5 * forward
    assert total.linear == 4 * 5 * forward  # two directions, each through inputs and kernels
    assert total.solve == 2 * 4 * 3 * (4 + 3) + 2 * 4 * 2 * (4 + 2)
    for n, factors in total.flops.items():
        refreshed = (factors + 4 * total.inversion) / total.gradient
        own = 1 + 1 / 15 + (total.solve + total.linear) / total.gradient
        assert total.update[n] == pytest.approx(own + refreshed / 5)
        assert total.update_auto[n] == pytest.approx(own + refreshed / total.periods[n])
        assert refreshed / total.periods[n] <= 0.6 < refreshed / (total.periods[n] - 1)
    assert (total.parameters, total.columns) == (12 + 6 + 2, 2)
    assert (total.largest, total.matrix_bytes, total.feasible) == (3, 9 * 4, True)


def test_per_device():
    """Of two devices: half of the work on examples, and no half of a single block."""
    mesh = jax.sharding.AbstractMesh((2,), ("d",))
    found = kfgn.inspect(*_two_layers(), mesh=mesh, file=io.StringIO())
    costs, total = found.per_device, found.totals
    assert costs.flops["kflr"] == -(-(total.gradient + total.flops["kflr"]) // 2)
    assert (costs.inversion, costs.inversion_of_share) == (total.inversion,) * 2
    assert (costs.gradient_bytes, costs.direction_bytes) == (20 * 4,) * 2
    assert (costs.factor_bytes, costs.state_bytes_of_share) == (total.bytes, 2 * total.bytes)
    text = str(found).splitlines()
    assert text[text.index("", 7) - 3 : text.index("", 7)] == [
        "of 2 devices each, gradient and factors: kfra 528, kflr 643, kfac 548, empirical 548",
        "all-reduced: 80 B of gradient at every update, 180 B of factors where they are observed",
        "inversion 163, state 360 B; with factor_sharding 163, 360 B, and 80 B of directions "
        "gathered",
    ]


def test_plan():
    """Seconds of two devices, by rates that leave one part after the other to be seen."""
    rates = {"products": 10.0, "factors": 5.0, "inversions": 2.0, "decompositions": 0.5}
    slow = kfgn.diagnostics.Machine(**rates, memory=1e9, link=4.0, launch=0.0)
    mesh = jax.sharding.AbstractMesh((2,), ("d",))
    found = kfgn.inspect(*_two_layers(), mesh=mesh, machine=slow, file=io.StringIO())
    total, plan = found.totals, {(p.method, p.inverse, p.shares): p for p in found.plan}
    assert len(plan) == 4 * 3
    for (method, inverse, shares), p in plan.items():
        ekfac = inverse == "ekfac"
        assert p.gradient == pytest.approx(total.gradient / 2 / 10)
        flops = total.flops[method] + ekfac * total.moments[method]
        assert p.factors == pytest.approx(flops / 2 / 5 + total.bytes / 4)
        assert p.inversion == pytest.approx(total.inversion / (0.5 if ekfac else 2.0))
        # The gradient is all-reduced, and of all directions each device has the half.
        assert p.sent == pytest.approx(80 / 4 + shares * 40 / 4)
        solve = total.solve / (2 if shares else 1) / 5
        assert p.rest == pytest.approx(solve + total.linear / 2 / 10 + p.gradient / 15, rel=1e-5)
        dear = p.factors + p.inversion
        assert p.longest == pytest.approx(p.gradient + p.rest + p.sent + dear)
        assert p.update == pytest.approx(p.longest - dear + dear / 5)
        assert p.update_auto == pytest.approx(p.longest - dear + dear / p.every)
        assert dear / p.every <= 0.6 * p.gradient or p.every == 50
    # Rates that no part waits for, but for the memory: values of 5 examples and parameters.
    fast = kfgn.diagnostics.Machine(*[1e30] * 4, memory=8.0, link=1e30, launch=0.0)
    alone = kfgn.inspect(*_two_layers(), machine=fast, file=io.StringIO())
    assert alone.per_device is None and len(alone.plan) == 4 * 2
    assert alone.totals.values == 4 * 5 * (3 + 3 + 2 + 2)  # the bias is added
    assert alone.plan[0].gradient == pytest.approx(3 * (alone.totals.values + 80) / 8)
    starts = kfgn.inspect(*_two_layers(), machine=fast._replace(launch=1.0), file=io.StringIO())
    assert starts.plan[0].rest - alone.plan[0].rest == pytest.approx(200 + 2 * 40)
    lines = str(alone).splitlines()[-9:]
    assert lines[0].split()[-1] == "every" and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("method, columns", [("kfra", 2), ("kflr", 2), ("kfac", 1)])
def test_moments_of_ekfac(method, columns):
    """A way back, rows in the basis, and products of their squares, for every column."""
    total = kfgn.inspect(*_two_layers(), file=io.StringIO()).totals
    first = 5 * 2 * (4 * 4 + 3 * 3 + 4 * 3) + 5 * 2 * 4 * 3
    out = 5 * 2 * (4 * 4 + 2 * 2 + 4 * 2) + 5 * 2 * 3 * 2
    assert total.moments[method] == columns * (first + out)
    refreshed = (total.flops[method] + total.moments[method] + 4 * 7 * total.inversion) / 5
    others = total.gradient * (1 + 1 / 15) + total.solve + total.linear
    assert total.update_ekfac[method] == pytest.approx((others + refreshed) / total.gradient)


def test_text(monkeypatch):
    """The whole of a small table, and its alignment."""
    monkeypatch.setattr(walk, "MATRIX_BYTES", 2**32)
    lines = str(kfgn.inspect(*_two_layers(), file=io.StringIO())).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "block parameters kind Q G sharing factors kfra kflr kfac empirical inversion",
        "first first dense 4x4 3x3 - 100 B 160 340 250 250 91",
        "out w, b dense 4x4 2x2 - 80 B 220 360 260 260 72",
        "(between layers) 90",
        "total 180 B 470 700 510 510 163",
        "",
        "20 parameters, 0 in no block; costs in FLOPs per batch",
        "kflr: 2 column(s) of the output Hessian's root, a backward pass for each",
        "kfra: matrices of up to 3 x 3 (36 B), within the limit of 4 GiB",
        "an update, in gradients: kfra 3.2, kflr 3.3, kfac 3.2, empirical 3.2",
        'by periods "auto": kfra 3.3, every 4, kflr 3.4, every 4, kfac 3.3, every 4, '
        "empirical 3.3, every 4",
        'by inverse="ekfac", in gradients: kfra 5.1, kflr 5.2, kfac 4.9, empirical 4.9',
    ]
    header, first, out, between, total = lines[:5]
    assert len({len(line) for line in (header, first, out, total)}) == 1
    assert len({line.index("dense") for line in (first, out)} | {header.index("kind")}) == 1
    assert len(between) == header.index("kfra") + len("kfra")


def test_shapes_alone(monkeypatch):
    """Shapes give the same table as arrays, also for sizes that nothing could compute."""
    monkeypatch.setattr(walk, "MATRIX_BYTES", 2**32)
    objective, params, batch = _two_layers()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, batch))
    file = io.StringIO()
    assert kfgn.inspect(objective, *shapes, file=file) == kfgn.inspect(
        objective, params, batch, file=file
    )
    width = 2**17
    large = {
        "first": jax.ShapeDtypeStruct((4, width), jnp.float32),
        "out": {**shapes[0]["out"], "w": jax.ShapeDtypeStruct((width, 2), jnp.float32)},
    }
    found = kfgn.inspect(objective, large, shapes[1], file=file)
    assert (found.totals.matrix_bytes, found.totals.feasible) == (2**36, False)
    assert "131,072 x 131,072 (64 GiB), BEYOND the limit of 4 GiB" in str(found)
    assert f" {width}x{width} " in str(found)
    assert found.rows[0].inversion == 4**3 + width**3
    assert " 2.25P\n" in file.getvalue()


def test_feasible(monkeypatch):
    """It says whether "kfra" refuses to form its matrices."""
    objective, params, batch = _two_layers(width=6)
    needed = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.matrix_bytes
    monkeypatch.setattr(walk, "MATRIX_BYTES", needed)
    assert kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.feasible
    jax.eval_shape(kfgn.value_grad_and_curvature(objective, "kfra"), params, batch)
    monkeypatch.setattr(walk, "MATRIX_BYTES", needed - 1)
    assert not kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.feasible
    with pytest.raises(kfgn.errors.ModelError, match="the recursion's matrix over a value"):
        jax.eval_shape(kfgn.value_grad_and_curvature(objective, "kfra"), params, batch)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", ["transformer", "resnet"])
@pytest.mark.parametrize("method", ["kfra", "kfac"])
def test_costs_beside_the_compiler(name, method):
    """Up to a factor of two what the compiler counts, less the forward pass."""
    model, params, batch, loss = TRAINING[name]()
    objective = kfgn.Objective(model, loss)
    curvature = kfgn.value_grad_and_curvature(objective, method)
    options = {"key": jax.random.key(0)} if method == "kfac" else {}
    whole = _counted(lambda p, b: curvature(p, b, **options)[1].factors, params, batch)
    forward = _counted(lambda p, b: model(p, b[0]), params, batch)
    found = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals
    assert 0.5 < found.flops[method] / (whole - forward) < 2


def _counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_long_parameters_are_shortened():
    """In the text; the rows have them whole."""
    objective, params, batch = _two_layers()
    name = "a" * 30
    renamed = {"first": params["first"], name: {"w": params["out"]["w"]}, "b": params["out"]["b"]}
    again = kfgn.Objective(
        lambda p, x: objective.model({"first": p["first"], "out": {**p[name], "b": p["b"]}}, x),
        objective.loss,
    )
    deep = {"model": {name: renamed}}
    deeper = kfgn.Objective(lambda p, x: again.model(p["model"][name], x), objective.loss)
    found = kfgn.inspect(deeper, deep, batch, file=io.StringIO())
    row = found.rows[1]
    assert row.parameters == (f"model/{name}/{name}/w", f"model/{name}/b")
    line = str(found).splitlines()[2]
    assert line.startswith(f"{row.name}  w, model/{'a' * 9}...") and f"{'a' * 16}/b  dense" in line
    assert len(line) < 200


def test_representation():
    """Short, so that a session that shows results does not show the table twice."""
    objective, params, batch = _two_layers()
    found = kfgn.inspect(objective, params, batch, file=io.StringIO())
    assert repr(found) == "<Inspection of 2 blocks, 0 parameters in none>"


BAD = {
    "no pair": (kfgn.errors.BatchError, lambda o, p, b: (o, p, b[0])),
    "lengths": (kfgn.errors.BatchError, lambda o, p, b: (o, p, (b[0][:2], b[1]))),
    "objective": (kfgn.errors.OptionError, lambda o, p, b: (o.model, p, b)),
    "integers": (
        kfgn.errors.ParameterError,
        lambda o, p, b: (o, {**p, "first": jnp.ones((4, 3), jnp.int32)}, b),
    ),
    "no parameters": (kfgn.errors.ParameterError, lambda o, p, b: (o, {}, b)),
    "parameters": (
        kfgn.errors.ModelError,
        lambda o, p, b: (o, {**p, "first": jnp.ones((7, 3))}, b),
    ),
    "targets": (kfgn.errors.LossError, lambda o, p, b: (o, p, (b[0], b[1][:, :1]))),
    "labels": (
        kfgn.errors.LossError,
        lambda o, p, b: (
            kfgn.Objective(o.model, kfgn.losses.softmax_cross_entropy_with_integer_labels),
            p,
            (b[0], jnp.full(5, 2)),
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys):
    """The errors of every other function of kfgn, and nothing printed."""
    error, change = BAD[name]
    with pytest.raises(error):
        kfgn.inspect(*change(*_two_layers()))
    assert not capsys.readouterr().out
