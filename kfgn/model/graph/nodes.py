"""Nodes: the groups of equations that the walk goes through as one function.

Equations between two layers are gathered into as few nodes as possible: every
node that is not linear costs the KFRA recursion an expectation, which is an
approximation, so a chain of elementwise operations is one node, and so is a
LayerNorm or an attention.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from kfgn.base.types import Array
from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.graph.clusters import Item, cluster_items, is_active
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.dependence import is_elementwise, is_linear
from kfgn.model.program.equations import Equation, Role, Var, as_function, variables


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


def gather_nodes(model: FlatModel, uses: Iterable[Use]) -> tuple[Node, ...]:
    """The uses, and what lies between them, in forward order."""
    items = _items(model, uses)
    clusters = cluster_items(model, items)
    nodes = [_node(model, [items[i] for i in sorted(members)]) for members in clusters]
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


def _node(model: FlatModel, items: list[Item]) -> Node:
    equations = tuple(e for group, _ in items for e in group)
    use = items[0][1]
    inside = {id(e) for e in equations}
    made = dict.fromkeys(v for e in equations for v in e.outvars)
    read_vars = dict.fromkeys(v for e in equations for v in variables(e.invars) if v not in made)
    by_role = {role: tuple(v for v in read_vars if model.roles[v] is role) for role in Role}

    def is_read_outside(v: Var) -> bool:
        readers = [e for e in model.readers.get(v, ()) if id(e) not in inside]
        return any(e is None or _active(model, e.outvars) for e in readers)

    outputs = tuple(filter(is_read_outside, _active(model, made)))
    kind = "use" if use and use.choice is None else _kind(model, equations)
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
