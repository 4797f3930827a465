"""Positions and channels of values: which axes a layer shares its kernel over."""

from __future__ import annotations

import numpy as np

from kfgn.model.flat_model import Var, size
from kfgn.model.graph import Graph
from kfgn.model.parameter_use import Use

# Kinds of layers whose outputs are laid out as what they act on.
ENTRYWISE = ("scale", "shift")


class Layout:
    """Which entries of a value make up its positions and channels, `[T, C]`."""

    def __init__(self, entries: np.ndarray):
        self.entries = entries
        self.positions, self.channels = entries.shape
        self.position_of = np.empty(entries.size, np.int64)
        self.channel_of = np.empty(entries.size, np.int64)
        self.position_of[entries] = np.arange(self.positions)[:, None]
        self.channel_of[entries] = np.arange(self.channels)[None, :]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and np.array_equal(self.entries, other.entries)

    __hash__ = None  # type: ignore[assignment]


def layouts(graph: Graph) -> dict[Var, Layout]:
    """A layout for every value of the walk.

    That of a layer that makes or reads it, where there is one; else that of
    the value it is made from entry by entry; else its last axis is the channels.
    """
    found: dict[Var, Layout] = {}
    mixing = [node for node in graph.nodes if node.use and node.use.form.kind not in ENTRYWISE]
    for node in mixing:
        assert node.use is not None
        found.setdefault(node.outputs[0], _output_layout(node.use))
    for node in mixing:
        assert node.use is not None
        for v in node.inputs:
            found.setdefault(v, _input_layout(node.use, v))
    for node in graph.nodes:
        for o in node.outputs:
            alike = [found[i] for i in node.inputs if i in found and i.aval.shape == o.aval.shape]
            found.setdefault(o, alike[0] if alike else _last_axis(o))
        for i in node.inputs:
            found.setdefault(i, _last_axis(i))
    return found


def _last_axis(v: Var) -> Layout:
    channels = v.aval.shape[-1] if v.aval.shape else 1
    return Layout(np.arange(size(v)).reshape(-1, channels))


def _output_layout(use: Use) -> Layout:
    """Channels are all outputs of all groups."""
    places = use.pre_activations(np.arange(size(use.output)).reshape(use.output.aval.shape))
    return Layout(np.moveaxis(places, 0, 1).reshape(use.form.positions, -1))


def _input_layout(use: Use, v: Var) -> Layout:
    equation = use.equations[0]
    if use.form.kind == "conv":
        axis = equation.params["dimension_numbers"].lhs_spec[1]
        whole = np.moveaxis(np.arange(size(v)).reshape(v.aval.shape), axis, -1)
        return Layout(whole.reshape(-1, v.aval.shape[axis]))
    if use.form.kind == "dense":
        entries = use.form.activations(np.arange(size(v)).reshape(1, *v.aval.shape))[0]
        return Layout(np.moveaxis(entries, 0, 1).reshape(use.form.positions, -1))
    return _last_axis(v)
