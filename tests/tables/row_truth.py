"""Dense truth of a row of `tests.tables.architectures`, and kfgn's results beside it.

Truth comes from `jax.hessian` and `jax.jacobian` of the user's own functions.
kfgn tells only the order in which a block lists its entries, the data operand
of a use and where its pre-activation is; `test_uses` confirms the latter two by
the Jacobian in the parameters. Each of the two programs of a row, truth and
results, is compiled once for all tests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.base.trees import named_leaves
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph
from kfgn.model.layers.layer import Layer
from tests.tables.architectures import (
    KINDS,
    LOSSES,
    ROWS,
    SAME_EQUATIONS,
    Case,
    Row,
    make_targets,
)
from tests.tables.rows import raveled


def row_of(name: str) -> Row:
    """The row, under its own loss or "... with" another."""
    return ROWS[name.partition(" with ")[0]]


class Setting(NamedTuple):
    """A row with its objective, its batch, and kfgn's reading of the model."""

    case: Case
    objective: kfgn.Objective
    batch: Any
    graph: Graph


class Truth(NamedTuple):
    """N examples, K outputs, P parameters in one vector."""

    outputs: Any  # of the batch
    alone: Any  # of every example in a batch of its own
    losses: np.ndarray  # `[N]`
    gradient: np.ndarray  # of the mean loss, `[P]`
    hessian: np.ndarray  # of the mean loss, `[P, P]`
    output_hessian: np.ndarray  # `[N, K, K]`
    jacobian: np.ndarray  # of the outputs, `[N, K, P]`
    probed: dict[str, np.ndarray]  # the same in the pre-activation of a use, `[N, K, ...]`
    operands: dict[str, np.ndarray]  # the inputs of a use, `[N, s, t, i]`
    places: dict[str, np.ndarray]  # a layer's matrix, of places among all parameters, from 1
    back: dict[str, dict[str, np.ndarray]]  # a layer's matrix back as parameters
    slopes: dict[str, np.ndarray]  # of its entries in those of the parameters, `[s, i, o]`
    routes: dict[str, np.ndarray]  # `[N, s, t]`: ones where data chooses the kernel s

    @property
    def gauss_newton(self) -> np.ndarray:
        """`J'HJ` of each example, `[N, P, P]`."""
        return np.einsum("nkp,nkl,nlq->npq", self.jacobian, self.output_hessian, self.jacobian)


@functools.cache
def setting(name: str) -> Setting:
    """Needs the fixture `x64`, and the promotion of the row."""
    base, _, loss = name.partition(" with ")
    case = setting(base).case if loss else ROWS[base].case()
    objective = kfgn.Objective(case.model, LOSSES[loss or ROWS[base].loss].loss)
    # Definitions are of every use, the truth for what is read with its loops.
    graph = (
        setting(base).graph
        if loss
        else build_graph(objective, case.params, case.inputs, unroll=True)
    )
    targets = make_targets(base, case, loss=loss)
    return Setting(case, objective, (case.inputs, targets), graph)


@functools.cache
def truth(name: str) -> Truth:
    """By the definitions."""
    case, _, (inputs, targets), graph = setting(name)
    base, _, loss = name.partition(" with ")
    reference = LOSSES[loss or ROWS[base].loss].reference
    flat, unravel = raveled(case.params)
    layers = [(n, u) for layer in graph.layers.values() for n, u in layer.uses.items()]
    read = [use.input for _, use in layers]
    chosen = [(n, use) for n, use in layers if use.choice is not None]
    read += [use.choice.index for _, use in chosen]

    def outputs_of(flat, x):
        outputs = case.model(unravel(flat), jax.tree.map(lambda a: a[None], x))
        return jax.tree.map(lambda a: a[0], outputs)

    def probed(probes, x):
        probes, x = jax.tree.map(lambda a: a[None], (probes, x))
        leaves = named_leaves(unravel(flat))
        outputs, values = graph.forward(leaves, x, probes, read)
        return ravel_pytree(outputs)[0], [value[0] for value in values]

    def mean_loss(flat, inputs, targets):
        alone = jax.vmap(outputs_of, (None, 0))(flat, inputs)
        losses = jax.vmap(reference)(alone, targets)
        return jnp.mean(losses), (alone, losses)

    def output_hessian(output, target):
        output, restore = ravel_pytree(output)
        return jax.hessian(lambda o: reference(restore(o), target))(output)

    def of_loss(flat, inputs, targets):
        gradient_at = jax.grad(lambda p: mean_loss(p, inputs, targets), has_aux=True)
        gradient, push, (alone, losses) = jax.linearize(gradient_at, flat, has_aux=True)
        return {
            "alone": alone,
            "losses": losses,
            "gradient": gradient,
            "hessian": jax.vmap(push)(jnp.eye(flat.size, dtype=flat.dtype)),
            "output_hessian": jax.vmap(output_hessian)(alone, targets),
        }

    def of_model(flat, inputs, places):
        jacobian = jax.jacobian(lambda p, x: ravel_pytree(outputs_of(p, x))[0])
        probes = jax.tree.map(lambda a: a[0], graph.probes(1))
        in_probes = jax.jacobian(probed, has_aux=True)
        probed_jacobians, values = jax.vmap(in_probes, (None, 0))(probes, inputs)
        places, leaves = (named_leaves(unravel(vector)) for vector in (places, flat))
        matrices = {n: layer.to_matrix(leaves) for n, layer in graph.layers.items()}
        slopes = graph.slopes(leaves)
        return {
            "outputs": case.model(unravel(flat), inputs),
            "jacobian": jax.vmap(jacobian, (None, 0))(flat, inputs),
            "probed": probed_jacobians,
            "operands": {
                n: u.activations(x, flat.dtype) for (n, u), x in zip(layers, values, strict=False)
            },
            "places": {n: layer.to_matrix(places) for n, layer in graph.layers.items()},
            "back": {n: layer.from_matrix(matrices[n]) for n, layer in graph.layers.items()},
            "slopes": {n: u.slopes(slopes) for n, u in layers},
            "routes": {
                n: u.choice.one_hot(x, u.form.groups, flat.dtype)
                for (n, u), x in zip(chosen, values[len(layers) :], strict=True)
            },
        }

    @jax.jit
    def everything(flat, inputs, targets, places):
        shared = {} if loss else of_model(flat, inputs, places)
        return of_loss(flat, inputs, targets) | shared

    found = everything(flat, inputs, targets, 1 + np.arange(flat.size, dtype=flat.dtype))
    found = jax.tree.map(np.asarray, found)
    return truth(base)._replace(**found) if loss else Truth(**found)


@functools.cache
def results(name: str) -> dict[str, Any]:
    """What kfgn says, by what was asked; "reduce" where a kernel is used at several positions."""
    case, objective, batch, graph = setting(name)
    layers = graph.layers.values()
    shared = any(layer.positions(k) > 1 for layer in layers for k in range(len(layer.slots)))

    @jax.jit
    def everything(params, batch):
        def factors(method, batch, **options):
            function = kfgn.value_grad_and_curvature(
                objective, method, unassigned="diagonal", **options
            )
            return function(params, batch)

        (_, gradient), curvature = factors("kflr", batch)
        first = jax.tree.map(lambda a: a[:1], batch)
        found = {
            "gradient": ravel_pytree(gradient)[0],
            "block_gauss_newton": kfgn.gauss_newton(objective).blocks(params, batch),
            "expand": curvature.factors,
            "kfra_of_one": factors("kfra", first)[1].factors,
        }
        hessian = kfgn.hessian(objective)
        if name not in SAME_EQUATIONS:
            found["block_hessian"] = hessian.blocks(params, batch)
        if name not in ROWS:  # a second loss goes the same ways to these
            return found
        if shared:
            found["reduce"] = factors("kflr", batch, sharing="reduce")[1].factors
        if name in KINDS:
            found["hessian_diagonal"] = hessian.diagonal(params, batch)
        return found

    return jax.tree.map(np.asarray, everything(case.params, batch))


@functools.cache
def entries(name: str) -> dict[str, np.ndarray]:
    """By block, its entries among all parameters, `[slots, n]`; -1 where there is a constant."""
    case, _, _, graph = setting(name)
    found, start = {}, 0
    for parameter, leaf in named_leaves(case.params).items():
        if parameter in graph.reasons:
            found[parameter] = np.arange(start, start + leaf.size).reshape(1, -1)
        start += leaf.size
    for block, layer in graph.layers.items():
        places = truth(name).places[block].astype(int).reshape(len(layer.slots), -1)
        found[block] = places - 1
    return found


def submatrices(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The blocks at `[slots, n]` entries, `[slots, ..., n, n]`, with zeros for constants."""
    matrix = np.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, 1)] * 2)
    return np.stack([matrix[..., r[:, None], r[None, :]] for r in rows])


# Factors, from the inputs a `[N, s, t, i]` and the Jacobians J `[N, K, s, t, o]` of every use.


class Parts(NamedTuple):
    """One slot's uses, as the layer sees the kernel or transposed."""

    inputs: list[np.ndarray]
    jacobians: list[np.ndarray]
    slopes: list[np.ndarray]
    places: list[Any]  # how many there are; of kernels that data chooses `[N, s, 1, 1]`


def slots(name: str, block: str, flipped: bool = False) -> Iterator[Parts]:
    """The uses of every slot of a layer."""
    layer, found = setting(name).graph.layers[block], truth(name)
    names = iter(layer.uses)
    for slot in layer.slots:
        own = [(next(names), use) for use in slot]
        own = [(n, use) for n, use in own if (use in layer.flipped) == flipped]
        parts = Parts([], [], [], [])
        for key, use in own:
            inputs, jacobians = found.operands[key], use.pre_activations(found.probed[key])
            places: Any = use.form.positions
            if key in found.routes:
                route = found.routes[key][..., None]
                inputs, jacobians = inputs * route, jacobians * route[:, None]
                places = route.sum(axis=2, keepdims=True)
            for field, value in zip(parts, (inputs, jacobians, found.slopes[key], places),
                                    strict=True):  # fmt: skip
                field.append(value)
        yield parts


def rank_one(slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[s, 1, i]` and columns `[s, 1, o]` whose product stands for positive slopes.

    Means of squares, of those that are not zero.
    """
    slopes = np.abs(slopes) if slopes[0].size == 1 else slopes
    assert np.all(slopes >= 0)
    squares, there = slopes**2, slopes != 0

    def mean(*axes):
        return squares.sum(axes) / np.maximum(there.sum(axes), 1)

    root = mean(1, 2)[:, None] ** 0.25
    return (mean(2) ** 0.5 / root)[:, None], (mean(1) ** 0.5 / root)[:, None]


def is_one_row(layer: Layer) -> bool:
    """A row that is added everywhere has a constant for its input: "reduce" is exact."""
    return layer.indexed and layer.activation_size == 1 == len(layer.uses)


def factors(name: str, block: str, sharing: str, count: int | None = None) -> tuple[Any, Any]:
    """Q and G by their definitions, of the first examples."""
    layer, hessian = setting(name).graph.layers[block], truth(name).output_hessian[:count]
    if layer.indexed:
        sharing = "reduce" if is_one_row(layer) else "expand"
    if truth(name).routes.keys() & layer.uses.keys():
        sharing = "expand"

    def of(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
        weights = [rank_one(d) for d in parts.slopes]
        inputs = [a[:count] * r for a, (r, _) in zip(parts.inputs, weights, strict=True)]
        jacobians = [j[:count] * c for j, (_, c) in zip(parts.jacobians, weights, strict=True)]
        places = sum(p if isinstance(p, int) else p[:count].mean(axis=0) for p in parts.places)
        places = np.where(places == 0, 1, places)  # nothing is routed there
        if sharing == "reduce":
            inputs = [sum(np.sum(a, axis=2, keepdims=True) for a in inputs) / places]
            jacobians = [sum(np.sum(j, axis=3, keepdims=True) for j in jacobians)]
        q = sum(np.einsum("nsti,nstj->sij", a, a) for a in inputs) / len(hessian)
        g = sum(np.einsum("nksti,nkl,nlstj->sij", j, hessian, j) for j in jacobians)
        return q, g / len(hessian) / (1 if sharing == "reduce" else places)

    qs, gs = zip(*(of(parts) for parts in slots(name, block)), strict=True)
    q, g = np.concatenate(qs), np.concatenate(gs)
    if is_one_row(layer):  # the constant is in G
        q, g = np.ones_like(q), q * g
    if layer.indexed:
        q = np.einsum("sii->si", q)
    if layer.flipped:
        merged = []
        for pair, parts in zip(zip(q, g, strict=True), slots(name, block, True), strict=True):
            pairs = [pair]
            if parts.inputs:
                own, kernel = of(parts)
                bias = layer.activation_size - kernel.shape[-1]
                pairs.append((np.pad(kernel[0], (0, bias)), own[0]))
            traces = [[np.trace(x) for x in p] for p in pairs]
            norm = np.sqrt(sum(a * b for a, b in traces))
            merged.append([sum(p[k] * t[1 - k] for p, t in zip(pairs, traces, strict=True)) / norm
                           for k in (0, 1)])  # fmt: skip
        q, g = map(np.stack, zip(*merged, strict=True))
    return q.reshape(layer.activation_shape), g.reshape(layer.pre_activation_shape)
