"""A forward pass of a batch, kept with its derivative: what all curvature of it shares."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.devices import in_auto_axes, vary, vary_like, varying_axes
from kfgn.base.linalg import count_of, factor_dtype, row_products, weighed
from kfgn.base.trees import check_direction, named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree
from kfgn.curvature.linear_pass import backward_pass
from kfgn.curvature.recursion import needed_values, used_values
from kfgn.curvature.weights import Weights, weights_of
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph
from kfgn.model.program.equations import is_variable
from kfgn.model.trial.carried import carry
from kfgn.objective.loss import Loss, flatten_batch
from kfgn.objective.objective import Objective, check_outputs, read_batch, require_batch
from kfgn.objective.weights import loss_of, spread


class Linearized(NamedTuple):
    """A forward pass of a batch, kept with its derivative."""

    graph: Graph
    params: dict[str, Array]
    values: dict[Any, Array]
    outputs: PyTree
    targets: PyTree
    loss: Loss
    push: Callable | None  # (param tangents, probe tangents) -> output tangents
    back: Callable  # its transpose; all there is of a model that only goes backwards
    probes: dict[str, Array]
    weights: dict[str, Weights]  # of uses whose kernels are functions of their parameters' entries
    inputs: PyTree
    statistics: list[Array]  # of the batch, as in `Graph.forward`
    products: list[Array]  # likewise
    aux: PyTree
    alone: dict[str, Array] | None = None  # derivatives of an only output at every probe

    @property
    def examples(self) -> int:
        return count_of(self.outputs)

    @property
    def dtype(self) -> Any:
        leaves = jax.tree.leaves((self.outputs, self.params))
        return factor_dtype(*(leaf.dtype for leaf in leaves))

    def pull(self, cotangent: Float[Array, "N K"]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Gradients at parameters and at probes from one at the outputs.

        Examples with one output each have one derivative, which all gradients scale.
        """
        if self.alone is not None:
            gradients = {n: weighed(cotangent[:, 0], x) for n, x in self.alone.items()}
            return _in_parameters(self, gradients), gradients
        return self.back(as_outputs(cotangent, self.outputs))

    def gradient(self, cotangent: Float[Array, "N K"]) -> dict[str, Array]:
        """The gradient at parameters, that through statistics of the batch included."""
        if not self.statistics:
            return self.pull(cotangent)[0]
        # The same forward pass: nothing of it is computed twice, once it is compiled.
        _, pull = jax.vjp(lambda p: self.graph.forward(p, self.inputs, exact=True)[0], self.params)
        return pull(as_outputs(cotangent, self.outputs))[0]

    def quadratic(
        self, objective: Objective, params: PyTree, examples: int | None
    ) -> tuple[Partial, PyTree, PyTree]:
        """The linear pass of some examples, spread over the batch, their outputs and targets."""
        shapes = tuple((n, x.shape, x.dtype) for n, x in self.params.items())
        axes = varying_axes(self.params)
        whole = examples is None or self.examples < 2 * examples  # else they are not spread
        known = self.inputs, self.statistics, self.products, self.outputs
        targets = self.targets
        if examples is not None and not whole:
            known, targets = spread(known, targets, examples)
        chosen, held, products, outputs = known
        if self.push is None:
            if held:
                objective = held_objective(objective, self.graph)
                chosen = chosen, held
            return Partial(_TransposedPass(objective), params, chosen), outputs, targets
        if whole:
            probes = tuple((n, x.shape, x.dtype) for n, x in self.probes.items())
            return Partial(_LinearPass(shapes, probes, axes), self.push), outputs, targets
        outputs, push = jax.linearize(
            lambda p, z: self.graph.forward(p, chosen, z, statistics=held, products=products)[0],
            *(self.params, {}),
        )
        return Partial(_LinearPass(shapes, (), axes), push), outputs, targets


def linearize(
    graph: Graph,
    objective: Objective,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    with_probes: bool,
    with_values: bool = False,
) -> Linearized:
    """Runs the model on a batch, and keeps what methods read.

    `with_probes` makes gradients at pre-activations available, `with_values` what walks read.
    """
    leaves = vary_like(jax.tree.map(jnp.asarray, named_leaves(params)), inputs)
    count = count_of(inputs)
    probes = vary_like(graph.probes(count), leaves) if with_probes else {}
    read = graph.model
    # What walks backwards goes through every value; else only a layer's inputs are looked at.
    looked_at = needed_values(graph) if with_values else []
    looked_at = list(dict.fromkeys([*looked_at, *used_values(graph)])) if with_probes else looked_at
    keep = [*looked_at, *read.statistics, *graph.products, *(read.aux.atoms if read.aux else ())]

    def forward(leaves: dict[str, Array], probes: dict[str, Array]) -> tuple[PyTree, list[Array]]:
        return graph.forward(leaves, inputs, probes, keep)

    push = None
    if read.reverse_only:
        outputs, back, kept = jax.vjp(forward, leaves, probes, has_aux=True)
    else:
        outputs, push, kept = jax.linearize(forward, leaves, probes, has_aux=True)
        back = jax.linear_transpose(push, leaves, probes)
    loss = loss_of(objective.loss, targets)
    check_outputs(loss, outputs, inputs, targets)
    values = {v: x for v, x in zip(keep, kept, strict=True) if is_variable(v)}
    statistics, products = ([values[v] for v in vs] for vs in (read.statistics, graph.products))
    aux = None
    if read.aux:
        alone = None in read.aux.axes and read.axis_name is None
        own = objective.run(params, inputs)[1] if alone else None
        aux = read.aux.of_batch(kept[len(keep) - len(read.aux.atoms) :], read.varying, own)
    dtype = factor_dtype(*(x.dtype for x in jax.tree.leaves((outputs, leaves))))
    weights = weights_of(graph, leaves, values, dtype)
    found = graph, leaves, values, outputs, targets, loss, push, back, probes, weights
    model = Linearized(*found, inputs, statistics, products, aux)
    if not with_probes or sum(x[0].size for x in jax.tree.leaves(outputs)) != 1:
        return model
    met = {graph.model.parameters[n] for n in graph.reasons}.intersection(graph.model.reached)
    if met or any(use.derived or use.form.indexed for use in graph.uses.values()):
        return model
    return model._replace(alone=model.pull(jnp.ones((count, 1), dtype))[1])


def hold_statistics(objective: Objective, params: PyTree, batch: Batch) -> tuple[Objective, Batch]:
    """The objective and the batch with its statistics as data, `((inputs, statistics), targets)`.

    Its examples are independent: it is what curvature is of. Without an axis of examples
    both stay what they are.
    """
    if objective.axis_name is None:
        inputs, targets = read_batch(objective, batch)
        carried, inputs = carry(objective, params, inputs)
        return carried, batch if carried is objective else (inputs, targets)
    inputs, targets, _ = require_batch(objective, params, batch)
    graph = build_graph(objective, params, inputs)
    _, statistics = graph.forward(named_leaves(params), inputs, keep=graph.model.statistics)
    return held_objective(objective, graph), ((inputs, statistics), targets)


def held_objective(objective: Objective, graph: Graph) -> Objective:
    """The objective of `((inputs, statistics), targets)`."""
    return dataclasses.replace(objective, model=graph.held, axis_name=None, has_aux=False)


def _in_parameters(model: Linearized, gradients: dict[str, Array]) -> dict[str, Array]:
    """Gradients at parameters from those at the pre-activations of every use."""
    found = jax.tree.map(jnp.zeros_like, model.params)
    for name, use in model.graph.uses.items():
        a = use.activations(model.values[use.input], model.dtype)
        g = use.pre_activations(gradients[name]).astype(model.dtype)
        matrix = row_products(a, g)
        sources = [use.kernel, *([use.bias.source] if use.bias else [])]
        shapes = {
            n: jax.ShapeDtypeStruct(v.aval.shape, matrix.dtype)
            for source in sources
            for n, v in source.parameters.items()
        }
        (own,) = jax.linear_transpose(use.matrix, shapes)(matrix)
        found |= {n: found[n] + x.astype(found[n].dtype) for n, x in own.items()}
    return found


def as_outputs(flat: Float[Array, "N K"], outputs: PyTree) -> PyTree:
    """Splits a matrix into the structure, shapes and dtypes of the outputs."""
    leaves, tree = jax.tree.flatten(outputs)
    parts, start = [], 0
    for leaf in leaves:
        size = leaf[0].size
        part = flat[:, start : start + size].reshape(leaf.shape)
        parts.append(part.astype(leaf.dtype))
        start += size
    return vary_like(jax.tree.unflatten(tree, parts), outputs)


@dataclasses.dataclass(frozen=True)
class _TransposedPass:
    objective: Objective

    def __call__(
        self, params: PyTree, inputs: PyTree, direction: dict[str, Array]
    ) -> Float[Array, "N K"]:
        check_direction(direction, named_leaves(params))
        leaves = {
            name: direction[name].astype(leaf.dtype) if name in direction else jnp.zeros_like(leaf)
            for name, leaf in named_leaves(params).items()
        }
        push = backward_pass(self.objective.outputs, params, inputs).push
        return flatten_batch(push(with_leaves(params, leaves)))


@dataclasses.dataclass(frozen=True)
class _LinearPass:
    shapes: tuple
    probes: tuple
    axes: frozenset  # of devices, over which all of these vary

    def __call__(self, push: Callable, direction: dict[str, Array]) -> Float[Array, "N K"]:
        check_direction(direction, [name for name, _, _ in self.shapes])
        full = {
            name: direction[name].astype(dtype) if name in direction else jnp.zeros(shape, dtype)
            for name, shape, dtype in self.shapes
        }
        still = {name: jnp.zeros(shape, dtype) for name, shape, dtype in self.probes}
        pushed = in_auto_axes(lambda push, *tangents: flatten_batch(push(*tangents)))
        return pushed(push, *vary((full, still), self.axes))
