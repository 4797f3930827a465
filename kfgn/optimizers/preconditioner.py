"""The Kronecker-factored preconditioner: factors, their inverses, directions."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_choice
from kfgn.base.errors import OptionError
from kfgn.base.kronecker import (
    INVERSES,
    Eigen,
    FactoredInverse,
    Rescaled,
    TwoTermInverse,
    apply_eigen,
    apply_rescaled,
    damped_extremes,
    eigen,
    factored_inverses,
    is_diagonal,
    kronecker_matvec,
    moved,
    rescaled,
    two_term_inverse,
    two_term_matvec,
)
from kfgn.base.linalg import factor_dtype, total
from kfgn.base.types import Array, Named, Number, PyTree, Scalar
from kfgn.curvature.basis_moments import Basis
from kfgn.curvature.blocks import LoneParameter
from kfgn.curvature.curvature import Curvature
from kfgn.curvature.factors import Diagonal, Factors, TwoTerms
from kfgn.optimizers.layer_blocks import LayerBlocks
from kfgn.optimizers.state import Count, Flag, all_finite, keep_if, number, zeros_like


def moving_average(old: PyTree, new: PyTree, count: Count, decay: Number | None) -> PyTree:
    """`β old + (1 - β) new` with `β = min(decay, 1 - 1/count)`; decay None keeps `new`.

    With this β the average of the first updates is the plain mean.
    """
    if decay is None:
        return new

    def average(a: Array, b: Array) -> Array:
        beta = jnp.minimum(decay, 1 - 1 / count).astype(a.dtype)
        return b.astype(a.dtype) + beta * (a - b.astype(a.dtype))

    return jax.tree.map(average, old, new)


def factors_of(curvature: Curvature, names: Iterable[str], two_term: bool) -> Named:
    """A curvature's factors by block, those in several terms of a sum apart if asked for."""
    found = curvature.terms if two_term else curvature.factors
    return {name: found[name] for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """How directions `C^-1 g` are made from factors, for a fixed set of layers.

    Args:
      blocks: all layers of the objective.
      inverse: "factored" (eq. 36, Cholesky), "eigen" (eq. 35, exact), "ekfac" (their eigenbasis,
        with the gradients' second moments in it), or "two-term", which is "factored" but where
        a layer is in several terms of a sum of objectives.
    """

    blocks: LayerBlocks
    inverse: str = "factored"

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, LayerBlocks):
            raise OptionError(
                "blocks must be what kfgn.layers.find_blocks(objective, params, batch) returned, "
                f"found a {type(self.blocks).__name__}"
            )
        check_choice("inverse", self.inverse, INVERSES)

    @property
    def undamped(self) -> bool:
        """Whether inverses are kept as `decompose` gives them, for any damping."""
        return self.inverse in ("eigen", "ekfac")

    @property
    def two_term(self) -> bool:
        """Whether it keeps the terms of a sum of objectives apart."""
        return self.inverse == "two-term"

    def init(self, leaves: Named) -> tuple[Named, Named]:
        """Zero factors, and zeros in the shapes of inverses, for what is among the leaves."""
        factors: Named = {}
        for name, block in self.blocks.present(leaves).items():
            dtype = factor_dtype(*(leaves[p].dtype for p in block.parameters))
            if isinstance(block, LoneParameter):
                factors[name] = Diagonal(jnp.zeros(leaves[name].shape, dtype))
            else:
                shapes = block.activation_shape, block.pre_activation_shape
                zeros = Factors(*(jnp.zeros(shape, dtype) for shape in shapes))
                two_term = self.two_term and name in self.blocks.shared
                factors[name] = TwoTerms(zeros, zeros_like(zeros)) if two_term else zeros
        damping = jnp.ones((), jnp.float32)
        inverses = jax.eval_shape(lambda f: self.invert(self._parts(f), damping), factors)
        return factors, zeros_like(inverses)

    def _parts(self, factors: Named) -> Named:
        if not self.undamped:
            return factors
        parts = {n: eigen(*f) if isinstance(f, Factors) else f for n, f in factors.items()}
        if self.inverse == "eigen":
            return parts
        return {n: rescaled(x) if isinstance(x, Eigen) else x for n, x in parts.items()}

    def decompose(self, factors: Named, old: Named, due: Flag) -> Named:
        """What does not depend on the damping, recomputed where it is due.

        Moments go over into a new basis as far as they say what they are there.
        """
        if not self.undamped:
            return factors

        def new() -> Named:
            parts = self._parts(factors)
            return {n: moved(old[n], x) if isinstance(x, Rescaled) else x for n, x in parts.items()}

        return jax.lax.cond(due, new, lambda: old)

    def rescale(
        self, parts: Named, curvature: Curvature, times: Count, due: Flag, decay: Number | None
    ) -> tuple[Named, Flag]:
        """The parts with the average of moments that a batch adds to where it is observed.

        `times` counts observations; also returns whether the moments are finite.
        """
        if self.inverse != "ekfac":
            return parts, jnp.array(True)

        def once(_: Any) -> tuple[Flag, Named, Flag]:
            new = self._moments(parts, curvature)
            scales = {n: parts[n].scales for n in new}
            average = moving_average(scales, new, times, decay)
            fine = all_finite(new)
            average = keep_if(fine, average, scales)
            found = {n: parts[n]._replace(scales=x) for n, x in average.items()}
            return jnp.array(False), parts | found, fine

        return jax.lax.while_loop(lambda c: c[0], once, (due, parts, jnp.array(True)))[1:]

    def _moments(self, parts: Named, curvature: Curvature) -> Named:
        """Of every block with a basis, in the shape of its matrix."""
        own = {n: x for n, x in parts.items() if isinstance(x, Rescaled)}
        bases: dict[str, Basis] = {n: x.basis for n, x in own.items()}
        blocks = {n: x for n, x in self.blocks.every.items() if not isinstance(x, LoneParameter)}
        for name in blocks.keys() - own.keys():  # masked out
            both = (jnp.zeros(x) for x in (blocks[name].activation_shape,
                                           blocks[name].pre_activation_shape))  # fmt: skip
            left, right = both
            bases[name] = None if is_diagonal(left, right) else left, right
        found = curvature.basis_moments(bases) if own else {}
        return {n: blocks[n].in_blocks(found[n]).astype(x.scales.dtype) for n, x in own.items()}

    def invert(self, decomposed: Named, damping: Scalar) -> Named:
        """The inverses at a damping, from what `decompose` gave."""
        if self.undamped:
            return decomposed
        kronecker = {n: f for n, f in decomposed.items() if isinstance(f, Factors)}
        lone = {n: f.diagonal for n, f in decomposed.items() if isinstance(f, Diagonal)}
        sums = {
            n: two_term_inverse(*f, damping)
            for n, f in decomposed.items()
            if isinstance(f, TwoTerms)
        }
        diagonals = {n: Diagonal(1 / (d + damping.astype(d.dtype))) for n, d in lone.items()}
        return factored_inverses(kronecker, damping) | diagonals | sums

    def extremes(self, decomposed: Named, damping: Scalar) -> tuple[Scalar, Scalar]:
        """The factors' largest eigenvalue, and the greatest condition of a damped block.

        Exact for "eigen" and for diagonals, else the bounds of `damped_extremes`.
        """
        largest, conditions = [number()], [number(1)]
        for part in decomposed.values():
            if isinstance(part, Factors):
                top, condition = damped_extremes(*part, damping)
            elif isinstance(part, TwoTerms):
                both = [damped_extremes(*f, damping) for f in part]
                top, condition = (total(x) for x in zip(*both, strict=True))
            else:
                low, top = _range(part)
                k = damping.astype(top.dtype)
                condition = jnp.max((top + k) / (low + k))
            largest.append(jnp.max(top).astype(jnp.float32))
            conditions.append(condition.astype(jnp.float32))
        return jnp.max(jnp.stack(largest)), jnp.max(jnp.stack(conditions))

    def apply(self, inverses: Any, damping: Scalar, gradient: Named) -> Named:
        """The direction `C^-1 g` for every leaf; those without curvature get `g / damping`."""
        direction = {n: leaf / damping.astype(leaf.dtype) for n, leaf in gradient.items()}
        blocks = self.blocks.present(gradient)
        for name, solved in self.solved(inverses, damping, gradient).items():
            found = blocks[name].from_matrix(solved)
            direction |= {n: x.astype(gradient[n].dtype) for n, x in found.items()}
        return direction

    def items(self, factors: Any) -> dict[Any, Any]:
        """What can be inverted by itself, each with its factors or their shapes."""
        return dict(factors)

    def some(self, tree: Any, items: list[Any]) -> Any:
        """Of factors or inverses what belongs to some items."""
        return {n: tree[n] for n in items}

    def put(self, tree: Any, new: Any, items: list[Any]) -> Any:
        """Factors or inverses with those of some items replaced."""
        return tree | new

    def arranged(self, found: Named, leaves: Named) -> Any:
        """What there is of the leaves' blocks, as the state keeps it."""
        return found

    def solved(self, inverses: Any, damping: Scalar, gradient: Named) -> Named:
        """`C^-1 g` of every block, as a matrix."""
        blocks = self.blocks.present(gradient).items()
        return {n: self._solve(inverses[n], damping, x.to_matrix(gradient)) for n, x in blocks}

    def _solve(self, inverse: Any, damping: Scalar, matrix: Array) -> Array:
        dtype = jax.tree.leaves(inverse)[0].dtype
        damping, matrix = damping.astype(dtype), matrix.astype(dtype)
        if isinstance(inverse, FactoredInverse):
            return kronecker_matvec(*inverse, matrix)
        if isinstance(inverse, TwoTermInverse):
            return two_term_matvec(inverse, matrix)
        if isinstance(inverse, Eigen):
            return apply_eigen(inverse, damping, matrix)
        if isinstance(inverse, Rescaled):
            return apply_rescaled(inverse, damping, matrix)
        scale = inverse.diagonal
        return matrix * (1 / (scale + damping) if self.undamped else scale)

    def at(self, damping: Scalar, curvature: Curvature, leaves: Named) -> Callable[[Named], Named]:
        """`r -> (Q ⊗ G + damping I)^-1 r` of one curvature for the layers among the leaves."""
        names = self.blocks.present(leaves)
        parts = self._parts(factors_of(curvature, names, self.two_term))
        if self.inverse == "ekfac":
            moments = self._moments(parts, curvature)
            parts |= {n: parts[n]._replace(scales=x) for n, x in moments.items()}
        inverses = self.invert(parts, damping)
        return lambda r: self.apply(inverses, damping, r)


def _range(part: Eigen | Rescaled | Diagonal) -> tuple[Array, Array]:
    """The smallest and the largest eigenvalue, of each of several blocks."""
    if not isinstance(part, Eigen):
        return jnp.min(part[-1]), jnp.max(part[-1])
    both = part.left_values, part.right_values
    low, top = ([f(x, axis=-1) for x in both] for f in (jnp.min, jnp.max))
    return low[0] * low[1], top[0] * top[1]
