"""Which equations between two layers become one node.

An *item* is an equation, or a whole use. Items that are not linear are
merged wherever a path without layers connects them, together with what lies
between; a merge that would put the graph into a cycle is left undone.
"""

from __future__ import annotations

from kfgn.model.flat_model import Equation, FlatModel, Role, is_complex, variables
from kfgn.model.parameter_use import Use
from kfgn.model.primitives import is_heavy, is_linear, joins_freely

Item = tuple[tuple[Equation, ...], Use | None]


def cluster_items(model: FlatModel, items: list[Item]) -> list[set[int]]:
    """Merges nonlinear items that a path without layers connects, keeping the order acyclic."""
    parents = _parents(model, items)
    # Blocks of the curvature are real: complex values have to stay inside nodes.
    inner = [use is None and _is_complex(equations[0]) for equations, use in items]
    barrier = [
        use is not None
        or (is_linear(model, equations[0]) and is_heavy(equations[0]) and not inner[i])
        for i, (equations, use) in enumerate(items)
    ]
    seed = [
        not barrier[i] and (inner[i] or joins_freely(model, e[0]) or not is_linear(model, e[0]))
        for i, (e, _) in enumerate(items)
    ]
    cluster_of = {i: {i} for i in range(len(items))}
    for j in range(len(items)):
        if not seed[j]:
            continue
        for i in _upstream_seeds(j, parents, barrier, seed):
            if cluster_of[i] is cluster_of[j]:
                continue
            merged = _closure(cluster_of[i] | cluster_of[j], parents, cluster_of)
            if not any(barrier[k] for k in merged) and _acyclic(merged, parents, cluster_of):
                cluster_of.update(dict.fromkeys(merged, merged))
    _absorb_inner(model, items, parents, barrier, cluster_of)
    return _in_order(parents, cluster_of)


def _absorb_inner(
    model: FlatModel,
    items: list[Item],
    parents: list[set[int]],
    barrier: list[bool],
    cluster_of: dict[int, set[int]],
) -> None:
    """Takes in linear items that lie between a cluster's inputs and the cluster alone.

    A mean that a normalization subtracts is such an item: outside, it would be
    one more value between which and the others the walk carries blocks.
    """
    returned = set(variables(model.outputs))
    children: dict[int, set[int]] = {}
    for j, above in enumerate(parents):
        for i in above:
            children.setdefault(i, set()).add(j)
    for j in reversed(range(len(items))):
        if barrier[j] or len(cluster_of[j]) > 1 or returned.intersection(items[j][0][0].outvars):
            continue
        below = children.get(j, set())
        targets = {id(cluster_of[k]): cluster_of[k] for k in below}
        if len(targets) != 1:
            continue
        (cluster,) = targets.values()
        reads = {v for k in cluster for v in _reads(model, items[k])}
        if len(cluster) > 1 and _reads(model, items[j]) <= reads:
            cluster_of.update(dict.fromkeys(cluster | {j}, cluster | {j}))


def _reads(model: FlatModel, item: Item) -> set:
    return {v for e in item[0] for v in variables(e.invars) if is_active(model, v)}


def _parents(model: FlatModel, items: list[Item]) -> list[set[int]]:
    """For each item, the items whose differentiable results it reads."""
    producer = {v: i for i, (group, _) in enumerate(items) for e in group for v in e.outvars}
    parents = []
    for i, (group, _) in enumerate(items):
        reads = {v for e in group for v in variables(e.invars)}
        parents.append({producer[v] for v in reads & producer.keys() if is_active(model, v)} - {i})
    return parents


def is_active(model: FlatModel, variable) -> bool:
    """Whether the walk goes through this value."""
    return model.roles.get(variable) is Role.ACTIVE


def _is_complex(equation: Equation) -> bool:
    """Whether the equation reads or makes a complex value."""
    return any(map(is_complex, (*equation.invars, *equation.outvars)))


def _upstream_seeds(j, parents, barrier, seed) -> list[int]:
    """The nearest seeds from which a path without layers leads to item j, last first."""
    found, stack, seen = [], list(parents[j]), set()
    while stack:
        i = stack.pop()
        if i in seen or barrier[i]:
            continue
        seen.add(i)
        if seed[i]:
            found.append(i)
        else:
            stack.extend(parents[i])
    return sorted(found, reverse=True)


def _closure(members: set[int], parents: list[set[int]], cluster_of: dict) -> set[int]:
    """The smallest union of clusters around `members` that no path leaves and re-enters."""
    while True:
        first = min(members)
        below = set(members)  # descendants of members
        for k in range(first, max(members) + 1):
            if parents[k] & below:
                below.add(k)
        above = set(members)  # ancestors of members
        for k in range(max(members), first - 1, -1):
            if k in above:
                above |= {p for p in parents[k] if p >= first}
        grown = set().union(*(cluster_of[k] for k in (below & above) | members))
        if grown == members:
            return members
        members = grown


def _acyclic(merged: set[int], parents: list[set[int]], cluster_of: dict) -> bool:
    try:
        _in_order(parents, {**cluster_of, **dict.fromkeys(merged, merged)})
    except _Cycle:
        return False
    return True


class _Cycle(Exception):
    pass


def _in_order(parents: list[set[int]], cluster_of: dict[int, set[int]]) -> list[set[int]]:
    """The clusters in topological order."""
    order: list[set[int]] = []
    done: set[int] = set()
    waiting = list({id(c): c for c in cluster_of.values()}.values())
    while waiting:
        ready = [c for c in waiting if all(parents[k] <= done | c for k in c)]
        if not ready:
            raise _Cycle
        for cluster in ready:
            done |= cluster
            order.append(cluster)
        waiting = [c for c in waiting if not c <= done]
    return order
