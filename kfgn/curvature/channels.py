"""KFRA where positions are many: all positions of a value share one channel matrix.

The joint recursion needs matrices over positions times channels. Here a value
with T positions and C channels has the curvature `I_T ⊗ Ω`: derivatives at
different positions are uncorrelated, and alike in the mean (Grosse & Martens
2016, the assumptions of spatial homogeneity and uncorrelated derivatives). A
node then moves

    Ω_i = E[sum_t (J' (I ⊗ Ω_o) J)_tt] / T_i,

which is exact where T is 1: behind a flattening or a mean over positions the
recursion is the joint one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.devices import vary_like
from kfgn.base.linalg import matmul, precision, sum_over_examples, total, weighed
from kfgn.base.types import Array
from kfgn.curvature.factors import entries_of
from kfgn.curvature.jacobians import Jacobian, PairBlocks, Slopes, elementwise_slopes
from kfgn.curvature.recursion import Walk, walk_nodes
from kfgn.model.graph.graph import Graph, Node
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.equations import Var, size

# Signs drawn for a node whose Jacobian is the same for every example.
_DRAWS = 16

Signs = dict[int, Array]  # by the number of positions


class Layout:
    """Which entries of a value make up its positions and channels, `[T, C]`."""

    def __init__(self, entries: np.ndarray):
        self.entries = entries
        self.positions, self.channels = entries.shape
        self.position_of = np.empty(entries.size, np.int64)
        self.channel_of = np.empty(entries.size, np.int64)
        self.position_of[entries] = np.arange(self.positions)[:, None]
        self.channel_of[entries] = np.arange(self.channels)[None, :]


def channel_matrix(
    matrix: Float[Array, "D_u D_v"], u: Layout, v: Layout
) -> Float[Array, "C_u C_v"] | None:
    """The mean over positions of a joint matrix's blocks, `[C_u, C_v]`."""
    if u.positions != v.positions:
        return None
    blocks = matrix[u.entries[:, :, None], v.entries[:, None, :]]
    return jnp.mean(blocks, axis=0)


def summed_over_positions(
    use: Use, layout: Layout, omega: Float[Array, "C C"]
) -> Float[Array, "s o o"]:
    """`sum_t M[s, t, o, s, t, o']` of the matrix `M = I ⊗ Ω` at a use, `[s, o, o']`."""
    places = entries_of(use)
    channel, position = layout.channel_of[places], layout.position_of[places]
    if np.all(channel == channel[:, :1]) and np.all(position == position[..., :1]):
        own = channel[:, 0]
        return use.form.positions * omega[own[:, :, None], own[:, None, :]]
    together = position[..., :, None] == position[..., None, :]
    found = omega[channel[..., :, None], channel[..., None, :]]
    return jnp.sum(jnp.where(together, found, 0), axis=1)


def walk_channels(
    walk: Walk, output_hessian: Float[Array, "K K"]
) -> dict[str, Float[Array, "s o o"]]:
    """What the walk leaves at every use, `I ⊗ Ω`, summed over its positions."""
    layout = layouts(walk.graph)
    found, _ = walk_nodes(
        walk,
        output_hessian,
        lambda node: homogeneous_jacobian(node, walk, layout),
        lambda u, v, block: channel_matrix(block, layout[u], layout[v]),
    )
    result = {}
    for name, omega in found.items():
        use = walk.graph.uses[name]
        if omega is None:
            omega = jnp.zeros((layout[use.output].channels,) * 2, output_hessian.dtype)
        result[name] = summed_over_positions(use, layout[use.output], omega)
    return result


def homogeneous_jacobian(node: Node, walk: Walk, layout: dict[Var, Layout]) -> Jacobian:
    """The node's Jacobian between channels: a diagonal where positions play no part."""
    entries = layout[node.outputs[0]].entries
    shapes = {v.aval.shape for v in (*node.outputs, *node.inputs)}
    alike = all(np.array_equal(layout[v].entries, entries) for v in (*node.outputs, *node.inputs))
    if node.kind != "elementwise" or len(shapes) > 1 or not alike:
        return Homogeneous(node, walk, layout)
    (positions, channels), importance = entries.shape, walk.importance
    if importance is not None:
        importance = jnp.repeat(importance, positions)
    slopes = elementwise_slopes(node, walk.shared, walk.values)
    return Slopes({k: s[:, entries].reshape(-1, channels) for k, s in slopes.items()}, importance)


class Homogeneous(Jacobian):
    """A node's Jacobian, applied to channel matrices.

    A layer's is known in closed form. Otherwise one vector of random signs over
    the positions is pulled back per channel and example, whose second moment has
    the right expectation; it is exact where no input position meets two output
    positions. The signs are fixed, so that results can be repeated.
    """

    def __init__(self, node: Node, walk: Walk, layout: dict[Var, Layout]):
        self.node, self.shared, self.values, self.layout = node, walk.shared, walk.values, layout
        self.importance = walk.importance
        self.rule = node.use.form.channels if node.use is not None else None

    def left(self, o: Var, i: Var, block: Array) -> Array | None:
        """`E[J_oi'] block` between equal positions; None where there are none such."""
        if self.layout[o].positions != self.layout[i].positions:
            return None
        use, rule = self.node.use, self.rule
        if use is not None and rule is not None and rule.left is not None:
            return use.signed(rule.left(self.shared[use.kernel_value], block))

        def own_positions(signs: Signs, rows: PairBlocks) -> Array:
            sign = signs[self.layout[o].positions].astype(block.dtype)
            pulled = rows[o, i].astype(block.dtype)
            return jnp.einsum("t,rtc->cr", sign, pulled, precision=precision())

        own = self._mean_of_pulled(own_positions, [i])
        return matmul(own, block) / self.layout[i].positions

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array | None:
        """`sum_op E[(J_oi' M_op J_pj)_tt]`, the mean over positions t; None where i, j differ."""
        if self.layout[i].positions != self.layout[j].positions:
            return None
        use, rule = self.node.use, self.rule
        if use is not None and rule is not None and rule.congruence is not None:
            (matrix,) = own.values()
            return rule.congruence(self.shared[use.kernel_value], matrix)

        def moments(_: Signs, rows: PairBlocks) -> Array:
            return total(
                jnp.einsum(
                    "rtc,rs,std->cd",
                    rows[o, i].astype(block.dtype),
                    block,
                    rows[p, j].astype(block.dtype),
                    precision=precision(),
                )
                for (o, p), block in own.items()
            )

        return self._mean_of_pulled(moments, [i, j]) / self.layout[i].positions

    def _mean_of_pulled(
        self, contribution: Callable[[Signs, PairBlocks], Array], wanted: list[Var]
    ) -> Array:
        """The mean over examples of `contribution(signs by T_o, rows by (output, input))`.

        Rows are `[C_o, T_i, C_i]`. Where the Jacobian is the same for every
        example, several draws of the signs take the examples' place.
        """
        node = self.node
        same = node.kind in ("linear", "use")
        values = [] if same else [self.values[v] for v in node.inputs + node.passive]
        lengths = sorted({self.layout[o].positions for o in node.outputs})
        count = values[0].shape[0] if values else (_DRAWS if lengths != [1] else 1)
        signs = [
            jax.random.rademacher(jax.random.key(t), (count, t), jnp.float32)
            if t > 1
            else jnp.ones((count, 1), jnp.float32)
            for t in lengths
        ]
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.inputs + node.passive]
        zeros = vary_like(zeros, list(self.values.values()))
        function, split = node.function(self.shared), len(node.inputs)

        def one(arguments: list[Array]) -> Array:
            signs = dict(zip(lengths, arguments, strict=False))
            given = arguments[len(lengths) :] or zeros
            inputs, passive = given[:split], given[split:]
            _, pull = jax.vjp(lambda *x: function(*x, *passive), *inputs)
            rows = {
                (o, i): self._pull_channels(pull, signs, o, i) for o in node.outputs for i in wanted
            }
            return contribution(signs, rows)

        def summed(given: tuple[list[Array], Array | None]) -> Array:
            arguments, importance = given
            return jnp.sum(weighed(importance, jax.vmap(one)(arguments)), axis=0)

        each = sum(self.layout[o].channels for o in node.outputs) * sum(map(size, wanted))
        given = ([*signs, *values], None if same else self.importance)
        return sum_over_examples(summed, given, 8 * each) / count

    def _pull_channels(self, pull: Callable, signs: Signs, o: Var, i: Var) -> Array:
        position = self.node.inputs.index(i)
        entries = self.layout[o].entries
        sign = signs[self.layout[o].positions]

        def row(places: Array) -> Array:
            flat = jnp.zeros(size(o), o.aval.dtype).at[places].set(sign.astype(o.aval.dtype))
            cotangents = [
                flat.reshape(v.aval.shape) if v is o else jnp.zeros(v.aval.shape, v.aval.dtype)
                for v in self.node.outputs
            ]
            cotangents = vary_like(cotangents, list(self.values.values()))
            return pull(cotangents)[position].reshape(-1)[self.layout[i].entries]

        return jax.vmap(row)(jnp.asarray(entries.T))


def layouts(graph: Graph) -> dict[Var, Layout]:
    """A layout for every value of the walk.

    That of a layer that makes or reads it, where there is one; else that of
    the value it is made from entry by entry; else its last axis is the channels.
    """
    found: dict[Var, Layout] = {}
    mixing = [(node, use) for node in graph.nodes if (use := node.use) and not use.form.entrywise]
    for _, use in mixing:  # the channels are all outputs of all groups
        places = np.moveaxis(entries_of(use), 0, 1)
        found.setdefault(use.output, Layout(places.reshape(use.form.positions, -1)))
    for node, use in mixing:
        for v in node.inputs:
            entries, rule = np.arange(size(v)).reshape(v.aval.shape), use.form.channels
            found.setdefault(v, _last_axis(v) if rule is None else Layout(rule.layout(entries)))
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
