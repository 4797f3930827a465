"""Which equations between two layers become one node.

An *item* is an equation, or a whole use. Items that are not linear are
merged wherever a path without layers connects them, together with what lies
between; a merge that would take in a layer is left undone.
"""

from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.flatten.loops import innermost
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.dependence import is_linear, joins_freely
from kfgn.model.program.equations import Equation, Role, Var, is_complex, variables
from kfgn.model.program.primitives import row_of

Item = tuple[tuple[Equation, ...], Use | None]


def cluster_items(model: FlatModel, items: list[Item]) -> list[set[int]]:
    """Merges nonlinear items that a path without layers connects, keeping the order acyclic."""
    parents = _parents(model, items)
    # Blocks of the curvature are real: complex values have to stay inside nodes.
    inner = [use is None and _is_complex(equations[0]) for equations, use in items]
    roles, first = model.roles, [equations[0] for equations, _ in items]
    linear = [is_linear(equation, roles) for equation in first]
    barrier = [
        use is not None or (linear[i] and row_of(first[i]).heavy and not inner[i])
        for i, (_, use) in enumerate(items)
    ]
    seed = [
        not barrier[i] and (inner[i] or not linear[i] or joins_freely(first[i], roles))
        for i in range(len(items))
    ]
    clusters = _Clusters(parents)
    for j in range(len(items)):
        if not seed[j]:
            continue
        for i in _upstream_seeds(j, parents, barrier, seed):
            between = clusters.between(i, j)
            if not any(barrier[k] for k in between):
                clusters.merge(between)
    _absorb_inner(model, items, parents, barrier, clusters)
    return clusters.in_order()


class _Clusters:
    """A partition of the items whose quotient graph is acyclic; a cluster goes by an item of it.

    `rank` is a topological order of the clusters. A merge changes it between
    the merged clusters only (Pearce & Kelly 2006, "A dynamic topological sort
    algorithm for directed acyclic graphs"), so that a merge costs what lies
    between, however deep the model is.
    """

    def __init__(self, parents: list[set[int]]):
        count = range(len(parents))
        self.of, self.members = list(count), {i: {i} for i in count}
        self.rank, self.above = list(count), {i: set(parents[i]) for i in count}
        self.below: dict[int, set[int]] = {i: set() for i in count}
        for j in count:
            for i in parents[j]:
                self.below[i].add(j)

    def between(self, i: int, j: int) -> set[int]:
        """The clusters of both items, and those on paths between the two."""
        ends = {self.of[i], self.of[j]}
        return ends | (self._reached(ends, self.below) & self._reached(ends, self.above))

    def _reached(self, ends: set[int], neighbors: dict[int, set[int]]) -> set[int]:
        """What lies below, or above, of the ends, and not beyond them."""
        ranks = [self.rank[c] for c in ends]
        found: set[int] = set()
        stack = list(ends)
        while stack:
            for c in neighbors[stack.pop()] - found:
                if min(ranks) < self.rank[c] < max(ranks) and c not in ends:
                    found.add(c)
                    stack.append(c)
        return found

    def merge(self, merged: set[int]) -> None:
        """Makes one cluster of some between which no path leads through another one."""
        if len(merged) == 1:
            return
        below, above = (self._reached(merged, n) for n in (self.below, self.above))
        (name, *others), by_rank = sorted(merged), self.rank.__getitem__
        ranks = sorted(map(by_rank, merged | below | above))
        order = [*sorted(above, key=by_rank), name, *sorted(below, key=by_rank)]
        # The clusters above first, those below last; the numbers in the middle fall out.
        for c, rank in zip(order, ranks[: len(above) + 1] + ranks[len(ranks) - len(below) :]):  # noqa: B905
            self.rank[c] = rank
        for c in others:
            for own, back in ((self.above, self.below), (self.below, self.above)):
                for neighbor in own.pop(c):
                    back[neighbor].discard(c)
                    if neighbor != name:
                        back[neighbor].add(name)
                        own[name].add(neighbor)
            self.members[name] |= self.members.pop(c)
        for k in self.members[name]:
            self.of[k] = name
        self.above[name] -= merged
        self.below[name] -= merged

    def in_order(self) -> list[set[int]]:
        """The clusters by the longest path that leads to each, then by their first item."""
        depth: dict[int, int] = {}
        for c in sorted(self.members, key=self.rank.__getitem__):
            depth[c] = 1 + max((depth[a] for a in self.above[c]), default=0)
        return [
            self.members[c] for c in sorted(depth, key=lambda c: (depth[c], min(self.members[c])))
        ]


def _absorb_inner(
    model: FlatModel,
    items: list[Item],
    parents: list[set[int]],
    barrier: list[bool],
    clusters: _Clusters,
) -> None:
    """Takes in linear items that lie between a cluster's inputs and the cluster alone.

    A mean that a normalization subtracts is such an item: outside, it would be
    one more value between which and the others the walk carries blocks.
    """
    returned = set(variables(model.outputs))
    for j in reversed(range(len(items))):
        own, below = clusters.of[j], clusters.below[clusters.of[j]]
        alone = len(clusters.members[own]) == 1 == len(below)
        if barrier[j] or not alone or returned.intersection(items[j][0][0].outvars):
            continue
        (target,) = below
        inside = clusters.members[target]
        reads = {v for k in inside for v in _reads(model, items[k])}
        if len(inside) > 1 and _reads(model, items[j]) <= reads:
            clusters.merge({own, target})


def _reads(model: FlatModel, item: Item) -> set[Var]:
    return {v for e in item[0] for v in variables(e.invars) if is_active(model, v)}


def _parents(model: FlatModel, items: list[Item]) -> list[set[int]]:
    """For each item, the items whose differentiable results it reads."""
    producer = {v: i for i, (group, _) in enumerate(items) for e in group for v in e.outvars}
    parents = []
    for i, (group, _) in enumerate(items):
        reads = {v for e in group for v in variables(e.invars)}
        parents.append({producer[v] for v in reads & producer.keys() if is_active(model, v)} - {i})
    return parents


def is_active(model: FlatModel, variable: Var) -> bool:
    """Whether the walk goes through this value."""
    return model.roles.get(innermost(variable)) is Role.ACTIVE


def _is_complex(equation: Equation) -> bool:
    """Whether the equation reads or makes a complex value."""
    return any(map(is_complex, (*equation.invars, *equation.outvars)))


def _upstream_seeds(
    j: int, parents: list[set[int]], barrier: list[bool], seed: list[bool]
) -> list[int]:
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
