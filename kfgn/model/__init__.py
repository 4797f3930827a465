"""How a model is read: flatten, annotate, find layers, cluster, and the graph of it all.

`build_graph` runs the stages one after the other:

1. *try*: do the examples of a batch act alone? (`carried`, `ahead`, `statistics`, `independence`,
   what tells by its operations, `separate`, and the values and programs that others are tried with:
   `made_up`, `batch_program`, `bounded`, `batch_noise`)
2. *flatten* the jaxpr of one example (`flat_model`): calls are inlined, loops unrolled or kept with
   flat bodies (`inline`, `loops`, `iterations`, `numbered`, `complex_parts`, `custom_vjp`),
   products take another order (`reassociate`), branches lose their guards (`guards`).
3. *annotate* each value once: what it depends on, and what depends on it (`roles`, `dependence`,
   by the table `primitives`).
4. *find layers*: where parameters go (`sources`, `find_sources`), the equations that read them as
   kernels (`find_uses`, `layer_kinds`, `readers`, `routed`, `loop_uses`, as `parameter_use`
   describes them), and which of these share a block (`find_layers`, `layer`, `factor_size`).
5. *check* that what is between has derivatives (`differentiability`).

The result is a `graph.Graph`, which is kept (`remembered`). It runs the model (`thin`,
`auxiliary`), and clusters the equations between layers for methods that walk backwards
(`clusters`, `nodes`).
`unite` reads the terms of a sum of objectives together.

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

from kfgn.model.build_graph import build_graph
from kfgn.model.graph import Graph
from kfgn.model.layer import Layer, require_blocks
from kfgn.model.layer_kinds import register_layer
from kfgn.model.nodes import Node
from kfgn.model.parameter_use import Bias, ChannelRule, Form, Use
from kfgn.model.primitives import register_primitive

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
