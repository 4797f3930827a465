"""Several models of the same parameters, read together: the layers of a sum of objectives."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kfgn.base.devices import AxisName
from kfgn.base.types import Batch, Number, PyTree, Scalar
from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph
from kfgn.model.layers.factor_size import limited
from kfgn.model.layers.find_layers import UNMET, named_layers
from kfgn.model.layers.layer import Layer
from kfgn.model.trial.carried import carry
from kfgn.objective.objective import Objective, examples_of, read_batch
from kfgn.objective.sum_of import AnyObjective, SumOfObjectives, named_term


class Term(NamedTuple):
    """One objective of a sum, with its batch."""

    objective: Objective
    weight: Number
    inputs: PyTree
    targets: PyTree
    graph: Graph
    names: dict[str, str]  # of its layers in the sum
    turned: frozenset[str]  # of those, the layers whose matrix is the transpose of the sum's
    examples: Scalar | int  # what its mean is over: how many there are, or the sum of `|w|`
    read: Objective  # with what its model makes for the batch, and
    data: PyTree  # inputs, as data


class United(NamedTuple):
    """An objective's terms, and the layers of their sum; of a plain one, itself alone."""

    terms: dict[str, Term]
    layers: dict[str, Layer]
    reasons: dict[str, str]  # parameters in no layer, and why

    @property
    def model(self) -> FlatModel:
        return next(iter(self.terms.values())).graph.model

    def without_block(self, unassigned: str) -> dict[str, str]:
        """Parameters without a block in all terms, as `Graph.without_block` says."""
        found = [term.graph.without_block(unassigned) for term in self.terms.values()]
        lacking = [n for n in self.reasons if all(n in own for own in found)]
        return {n: min((own[n] for own in found), key=lambda r: UNMET in r) for n in lacking}


def unite(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    axis_name: AxisName | None = None,
    large_factors: str = "whole",
    factor_limit: int | None = None,
    unroll: bool = False,
) -> United:
    """Reads the models and batches of all terms of an objective; `unroll` as in `build_graph`."""
    if isinstance(objective, SumOfObjectives):
        batches, wholes, weights = objective.batches(batch), objective.terms, objective.weights
    else:
        batches, wholes, weights = {"": batch}, {"": objective}, {"": 1.0}
    read, carried = {}, {}
    for name, own in batches.items():
        with named_term(name):
            read[name] = read_batch(wholes[name], own, axis_name)
            carried[name] = carry(wholes[name], params, read[name][0])
    build = {
        n: partial(build_graph, o, params, data, unroll=unroll) for n, (o, data) in carried.items()
    }
    graphs = _alike_graphs(build)
    layers, keys = _layers_of_all(graphs)
    within = limited(layers, large_factors, factor_limit)
    terms = {}
    for name, (inputs, targets) in read.items():
        graph, whole = graphs[name], wholes[name]
        names = {own: keys[layer.parameters] for own, layer in graph.layers.items()}
        turned = frozenset(n for n, u in names.items() if _is_turned(graph.layers[n], layers[u]))
        cut = {n: _cut(x, within[names[n]], n in turned) for n, x in graph.layers.items()}
        graph = dataclasses.replace(graph, layers=cut)
        examples = examples_of(whole, batches[name], axis_name)
        sources = (inputs, targets, graph, names, turned, examples, *carried[name])
        terms[name] = Term(whole, weights[name], *sources)
    inside = {p for layer in layers.values() for p in layer.parameters}
    reasons: dict[str, str] = {}
    for graph in graphs.values():
        for n, reason in graph.reasons.items():
            if n not in inside and (n not in reasons or UNMET not in reason):
                reasons[n] = reason
    return United(terms, within, reasons)


def _cut(own: Layer, whole: Layer, turned: bool) -> Layer:
    """A term's layer with factors in blocks as the sum's has them, unless its Q is a diagonal."""
    if own.indexed != whole.indexed:
        return own
    return dataclasses.replace(own, splits=whole.splits[::-1] if turned else whole.splits)


def _alike_graphs(build: Mapping[str, Any]) -> dict[str, Graph]:
    """The graphs, where what is a layer in one term is a layer alike in all that have it.

    A bias joins its kernel in all terms that have either, or in none; what is a layer
    in one term, and met by data in another way in another, is a layer in none.
    """
    apart, barred = frozenset[str](), frozenset[str]()
    while True:
        graphs = {}
        for name, of in build.items():
            with named_term(name):
                graphs[name] = of(apart=apart, barred=barred)
        layers = [layer for graph in graphs.values() for layer in graph.layers.values()]
        known, more, bad = dict[tuple[str, ...], Layer](), set[str](), set[str]()
        for layer in layers:
            first = known.setdefault(layer.parameters, layer)
            if not (_alike(first, layer) or _is_turned(layer, first)):
                bad.update(layer.parameters)
        for s in known:
            for t in known:
                if s != t and set(s) & set(t):
                    more.update(s[1:], t[1:])
        inside = {p for s in known for p in s}
        for graph in graphs.values():
            bad.update(n for n, r in graph.reasons.items() if n in inside and UNMET not in r)
        if more <= apart and bad <= barred:
            return graphs
        apart, barred = apart | more, barred | bad


def _layers_of_all(
    graphs: Mapping[str, Graph],
) -> tuple[dict[str, Layer], dict[tuple[str, ...], str]]:
    """The layers by name, and the name by parameters."""
    found: dict[tuple[str, ...], Layer] = {}
    for graph in graphs.values():
        for layer in graph.layers.values():
            if found.setdefault(layer.parameters, layer).indexed and not layer.indexed:
                found[layer.parameters] = layer
    layers = named_layers(list(found.values()))
    return layers, {layer.parameters: name for name, layer in layers.items()}


def _labels(layer: Layer) -> np.ndarray:
    labels = np.concatenate([slot[0].labels() for slot in layer.slots])
    return labels if layer.order is None else labels[list(layer.order)]


def _alike(a: Layer, b: Layer) -> bool:
    """Whether the matrices of two layers of the same parameters have the same entries."""
    return a.slots is b.slots or (
        a.matrix_shape == b.matrix_shape and np.array_equal(_labels(a), _labels(b))
    )


def _is_turned(a: Layer, b: Layer) -> bool:
    """Whether the matrix of one layer is the transpose of the other's."""
    if _alike(a, b) or not a.stack == b.stack == 1 or len(a.parameters) > 1:
        return False
    return np.array_equal(_labels(a)[0], _labels(b)[0].T)
