"""The graph that the walk goes through: layers, and whole nodes between them.

Equations between two layers are gathered into as few nodes as possible: every
node that is not linear costs the KFRA recursion an expectation, which is an
approximation, so a chain of elementwise operations is one node, and so is a
LayerNorm or an attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from kfgn.base.errors import OptionError
from kfgn.model.clusters import Item, cluster_items, is_active
from kfgn.model.dependence import is_elementwise, is_linear
from kfgn.model.derivatives import check_derivatives
from kfgn.model.find_layers import constant_states
from kfgn.model.flat_model import (
    Array,
    Equation,
    FlatModel,
    Role,
    Var,
    as_function,
    evaluate,
    flatten_model,
    read,
    variables,
    with_roles,
)
from kfgn.model.independence import check_independent
from kfgn.model.layer import Layer, find_layers
from kfgn.model.parameter_path import find_sources
from kfgn.model.parameter_use import Use
from kfgn.objective.objective import Objective

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A group of equations, seen as one function of its differentiable inputs.

    `kind` says what its Jacobian is: "linear" (the same for every example),
    "elementwise" (a diagonal per example) or "general"; a "use" is linear.
    """

    kind: str
    equations: tuple[Equation, ...]
    inputs: tuple[Var, ...]  # active: differentiated
    passive: tuple[Var, ...]  # per example, not differentiated
    shared: tuple[Var, ...]  # the same for every example
    outputs: tuple[Var, ...]
    use: Use | None = None

    def function(self, shared: dict[Var, Array]) -> Callable[..., list[Array]]:
        """`(*inputs, *passive) -> outputs` on one example."""
        arguments = self.shared + self.inputs + self.passive
        body = as_function(self.equations, arguments, self.outputs)
        constants = [shared[v] for v in self.shared]
        return lambda *values: body(*constants, *values)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model on one example: its layers, its nodes in forward order, its outputs."""

    model: FlatModel
    layers: dict[str, Layer]
    reasons: dict[str, str]  # parameters in no layer, and why
    nodes: tuple[Node, ...]
    free: tuple[str, ...] = ()  # parameters that the walk differentiates like data

    @property
    def uses(self) -> dict[str, Use]:
        """The uses of all layers by their names."""
        return {name: use for layer in self.layers.values() for name, use in layer.uses.items()}

    @property
    def kept_uses(self) -> dict[str, Use]:
        """The uses of layers whose parameters are not free."""
        return {n: use for n, use in self.uses.items() if use.kernel.name not in self.free}

    def shared_values(self, params: dict[str, Array]) -> dict[Var, Array]:
        """The values that are the same for every example."""
        env = dict(self.model.constants)
        env.update({v: params[name] for name, v in self.model.parameters.items()})
        evaluate([e for e in self.model.jaxpr.eqns if self._is_shared(e)], env)
        return env

    def forward(
        self,
        params: dict[str, Array],
        inputs: PyTree,
        probes: dict[str, Array] | None = None,
        keep: Iterable[Var] = (),
    ) -> tuple[PyTree, list[Array]]:
        """The outputs of a batch and the values of `keep`, each with a leading `N`.

        A probe `[N, ...]` is added to a use's pre-activation: its cotangent
        is the gradient there.
        """
        shared = self.shared_values(params)
        use_of = {use.output: name for name, use in self.uses.items()}
        keep = list(keep)

        def one(leaves, probes):
            env = {**shared, **dict(zip(self.model.inputs, leaves, strict=True))}
            for equation in self.model.jaxpr.eqns:
                if self._is_shared(equation):
                    continue
                evaluate([equation], env)
                for v in equation.outvars:
                    if probes and use_of.get(v) in probes:
                        env[v] = env[v] + probes[use_of[v]]
            return [read(env, v) for v in self.model.outputs], [env[v] for v in keep]

        outputs, kept = jax.vmap(one)(jax.tree.leaves(inputs), probes or {})
        return jax.tree.unflatten(self.model.output_tree, outputs), kept

    def probes(self, count: int) -> dict[str, Array]:
        """Zero probes for `count` examples."""
        return {
            name: jax.numpy.zeros((count, *use.output.aval.shape), use.output.aval.dtype)
            for name, use in self.uses.items()
        }

    def is_active(self, variable: Var) -> bool:
        """Whether a value is differentiable and depends on both data and parameters."""
        return is_active(self.model, variable)

    def _is_shared(self, equation: Equation) -> bool:
        roles = self.model.roles
        return all(roles[v] <= Role.PARAMETER for v in variables(equation.invars))


def build_graph(objective: Objective, params: PyTree, inputs: PyTree, exact: bool = False) -> Graph:
    """Traces the objective's model on one example of `inputs` (arrays or shapes).

    With `exact`, parameters in no layer, and those of tied layers, are *free*:
    the walk differentiates them like data, so that it ends with their own
    exact blocks, whatever becomes of them in the model.
    """
    if not isinstance(objective, Objective):
        raise OptionError(
            f"objective must be a kfgn.Objective, found a {type(objective).__name__}; make one "
            "with kfgn.Objective(model, loss)."
        )
    model = flatten_model(objective.model, params, inputs)
    check_independent(objective.model, params, inputs)
    sources = find_sources(model)
    states = constant_states(model, sources)
    if states:
        model = with_roles(model, passive=states)
    layers, reasons = find_layers(model, sources)
    free: tuple[str, ...] = ()
    if exact:
        tied = {n: x for n, x in layers.items() if any(len(slot) > 1 for slot in x.slots)}
        free = (*reasons, *(name for layer in tied.values() for name in layer.parameters))
        model = with_roles(model, passive=states, active=[model.parameters[n] for n in free])
    check_derivatives(model)
    uses = [use for layer in layers.values() for use in layer.uses.values()]
    kept = [use for use in uses if use.kernel.name not in free]
    return Graph(model, layers, reasons, _nodes(model, kept), free)


def _nodes(model: FlatModel, uses: Iterable[Use]) -> tuple[Node, ...]:
    items = _items(model, uses)
    clusters = cluster_items(model, items)
    readers = _readers(model)
    nodes = [_node(model, [items[i] for i in sorted(members)], readers) for members in clusters]
    return tuple(nodes)


def _items(model: FlatModel, uses: Iterable[Use]) -> list[Item]:
    """Uses, each at its last equation's place, and single equations, in order."""
    last = {id(use.equations[-1]): use for use in uses}
    inside = {id(e) for use in last.values() for e in use.equations}
    items: list[Item] = []
    for equation in model.jaxpr.eqns:
        if id(equation) in last:
            use = last[id(equation)]
            items.append((use.equations, use))
        elif id(equation) not in inside and _active(model, equation.outvars):
            items.append(((equation,), None))
    return items


def _active(model: FlatModel, atoms: Iterable[Any]) -> list[Var]:
    return [v for v in variables(atoms) if is_active(model, v)]


def _readers(model: FlatModel) -> dict[Var, set[int]]:
    readers: dict[Var, set[int]] = {v: {-1} for v in variables(model.outputs)}
    for equation in model.jaxpr.eqns:
        if not _active(model, equation.outvars):
            continue
        for v in variables(equation.invars):
            readers.setdefault(v, set()).add(id(equation))
    return readers


def _node(model: FlatModel, items: list[Item], readers: dict[Var, set[int]]) -> Node:
    equations = tuple(e for group, _ in items for e in group)
    use = items[0][1]
    inside = {id(e) for e in equations}
    made = {v for e in equations for v in e.outvars}
    read_vars = dict.fromkeys(v for e in equations for v in variables(e.invars) if v not in made)
    by_role = {role: tuple(v for v in read_vars if model.roles[v] is role) for role in Role}
    outputs = tuple(
        v for e in equations for v in _active(model, e.outvars) if readers.get(v, set()) - inside
    )
    kind = "use" if use else _kind(model, equations)
    return Node(
        kind,
        equations,
        by_role[Role.ACTIVE],
        by_role[Role.PASSIVE],
        by_role[Role.CONSTANT] + by_role[Role.PARAMETER],
        outputs,
        use,
    )


def _kind(model: FlatModel, equations: tuple[Equation, ...]) -> str:
    if all(is_linear(e, model.roles) for e in equations):
        return "linear"
    if all(is_elementwise(e, model.roles) for e in equations):
        return "elementwise"
    return "general"
