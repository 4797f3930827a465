"""How a model is read: flatten, annotate, find layers, cluster, and the graph of it all.

Each folder imports from those before it:

1. `program`: the equations of a traced model, and a table of what is known of their primitives.
2. `flatten`: the jaxpr of one example, flat, each value annotated once.
3. `trial`: do the examples of a batch act alone?
4. `layers`: where parameters meet data, and which of them share a block.
5. `graph`: all of it, kept, with the nodes between layers. `graph.build_graph` is the way in.

A glossary:

- *role*: what a value depends on: nothing, parameters, data, or both ("active").
- *source*: parameters, and where their entries stand in a value that an equation reads.
- *slope*: the derivative of an entry of such a value in the parameter's entry there.
- *use*: an equation where a kernel meets data, with the bias that is added to it.
- *form*: how a use reads as `h[s, t, o] = sum_i a[s, t, i] W[s, i, o] + b[s, o]`.
- *group*: a part s of a kernel that does not mix with others.
- *position*: one of the places t of an example at which a use applies its kernel.
- *slot*: one kernel of several that are stacked in one parameter.
- *layer*: the parameters that share a block of the curvature, and all their uses.
- *node*: a use, or equations between layers that are differentiated as one function.
- *entry*: one number of an array.
"""

from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph
from kfgn.model.graph.nodes import Node
from kfgn.model.layers.layer import Layer, require_blocks
from kfgn.model.layers.layer_kinds import register_layer
from kfgn.model.layers.parameter_use import Bias, ChannelRule, Form, Use
from kfgn.model.program.primitives import register_primitive

__all__ = [
    "Bias",
    "ChannelRule",
    "Form",
    "Graph",
    "Layer",
    "Node",
    "Use",
    "build_graph",
    "register_layer",
    "register_primitive",
    "require_blocks",
]
