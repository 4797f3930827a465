"""The curvature of several parts as one: of micro-batches their mean, of objectives their sum."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.devices import AxisName
from kfgn.base.diagonals import diagonal_blocks, on_diagonals
from kfgn.base.errors import OptionError
from kfgn.base.kronecker import is_diagonal
from kfgn.base.linalg import factor_dtype, total
from kfgn.base.types import Array, Scalar, Shape
from kfgn.curvature.basis_moments import Basis
from kfgn.curvature.curvature import Curvature, CurvatureSettings
from kfgn.curvature.factors import Factors, TwoTerms
from kfgn.curvature.lazy_factors import FactorsOf, unmerged
from kfgn.model.graph.unite import Term, United


def average_curvature(curvatures: Sequence[Curvature]) -> Curvature:
    """The mean of the curvatures of micro-batches at the same params, by examples or weights.

    Value, gradient, quadratic model and objective are those of the whole
    batch; so are the factors of "kflr", "kfac" and "empirical". Those of
    "kfra" are the mean of what each micro-batch's own recursion gives. Of a sum of
    objectives all is that of the whole batch where micro-batches have its proportions. The
    gradients that go with it need the same weights, as `curvature.gradient` has. Factors
    that wait keep what they read of a micro-batch: computed at once, they free it.

        curvatures.append(curvature.with_factors(curvature.factors))  # for each micro-batch
        optimizer.update(mean_grads, state, params, curvature=kfgn.average_curvature(curvatures))

    Raises:
      OptionError: there is nothing to average, or not only curvatures, or they
        were made with different settings.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> _, curvature = kfgn.value_grad_and_curvature(objective)(params, batch)
    >>> bool(kfgn.average_curvature([curvature, curvature]).value == curvature.value)
    True
    """
    curvatures = list(curvatures)
    if not curvatures or not all(isinstance(c, Curvature) for c in curvatures):
        found = ", ".join(type(c).__name__ for c in curvatures) or "nothing"
        raise OptionError(f"expected one kfgn.Curvature or more to average, found {found}")
    first = curvatures[0].settings
    for other in curvatures[1:]:
        first.require_equal(other.settings, "curvatures of one average")

    examples = total(c.examples for c in curvatures)
    weights = [c.examples / jnp.where(examples == 0, 1, examples) for c in curvatures]
    factors_of = FactorsOf(curvatures[0].blocks, _MeanFactors(curvatures[0].blocks))
    return _combined(curvatures, weights, factors_of, factors_of, first)


def summed(curvatures: list[Curvature], united: United, settings: CurvatureSettings) -> Curvature:
    """The curvature of a sum of objectives from those of its terms; factors are merged."""
    weights = [jnp.asarray(term.weight) for term in united.terms.values()]
    # With "gradient" parameters in no layer have no block in any term.
    lone = [n for n in united.reasons if any(n in c.blocks for c in curvatures)]
    names = tuple((term.names, term.turned) for term in united.terms.values())
    shapes = {n: (x.activation_shape, x.pre_activation_shape) for n, x in united.layers.items()}
    blocks = (*united.layers, *lone)
    factors_of = FactorsOf(blocks, _SummedFactors(blocks, names, shapes))
    moments_of = FactorsOf(blocks, _SummedMoments(names))
    return _combined(curvatures, weights, factors_of, moments_of, settings)


@dataclasses.dataclass(frozen=True)
class _MeanFactors:
    blocks: tuple[str, ...]

    def __call__(self, weights: list[Scalar], parts: list[Partial], *given: Any) -> dict[str, Any]:
        return jax.tree.map(lambda *x: _weighted(weights, x), *(part(*given) for part in parts))

    def apart(self, weights: list[Scalar], parts: list[Partial]) -> Partial:
        return Partial(FactorsOf(self.blocks, self), weights, list(map(unmerged, parts)))


@dataclasses.dataclass(frozen=True, eq=False)
class _SummedFactors:
    blocks: tuple[str, ...]
    names: tuple[tuple[dict[str, str], frozenset[str]], ...]  # of each term, as `Term` has them
    shapes: dict[str, tuple[Shape, Shape]]  # of the sum's factors
    merges: bool = True

    def apart(self, *read: Any) -> Partial:
        """What does not merge them."""
        return Partial(FactorsOf(self.blocks, dataclasses.replace(self, merges=False)), *read)

    def __call__(self, weights: list[Scalar], parts: list[Partial]) -> dict[str, Any]:
        shared: dict[str, list[Factors]] = {}
        lone: dict[str, list[Any]] = {}
        for (names, turned), weight, part in zip(self.names, weights, parts, strict=True):
            for name, factor in part().items():
                scale = weight.astype(jax.tree.leaves(factor)[0].dtype)
                if name in names:
                    q, g = cast(Factors, factor)
                    left, right = (q, is_diagonal(q, g)), (scale * g, False)
                    if name in turned:
                        left, right = right, left
                    shapes = self.shapes[names[name]]
                    fitted = Factors(_fitted(*left, shapes[0]), _fitted(*right, shapes[1]))
                    shared.setdefault(names[name], []).append(fitted)
                else:
                    scaled = {factor._fields[-1]: scale * factor[-1]}
                    lone.setdefault(name, []).append(factor._replace(**scaled))
        factors: dict[str, Any] = {}
        for name, found in lone.items():
            whole = total(x[-1] for x in found)
            factors[name] = found[0]._replace(**{found[0]._fields[-1]: whole})
        # What is alone in one term and in a layer of another is in a layer of the sum.
        return factors | {
            name: merged(own) if self.merges or len(own) == 1 else TwoTerms(own[0], merged(own[1:]))
            for name, own in shared.items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class _SummedMoments:
    """In one basis those of a sum are the sum of the terms' own, merged or not."""

    names: tuple[tuple[dict[str, str], frozenset[str]], ...]

    def __call__(
        self, weights: list[Scalar], parts: list[Partial], bases: dict[str, Basis]
    ) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for (names, turned), weight, part in zip(self.names, weights, parts, strict=True):
            factors_of: Any = part.func
            own = {n: _turned(bases[names.get(n, n)], n in turned) for n in factors_of.blocks}
            for n, moments in part(own).items():
                moments = weight.astype(moments.dtype) * moments
                moments = moments.swapaxes(-1, -2) if n in turned else moments
                whole = names.get(n, n)
                found[whole] = found[whole] + moments if whole in found else moments
        return found


def _turned(basis: Basis, turned: bool) -> Basis:
    return (basis[1], basis[0]) if turned else basis


def bases_of_term(
    term: Term, united: United, settings: CurvatureSettings, dtype: Any
) -> dict[str, Basis]:
    """The shapes of bases that a term's moments are in: those of the sum's factors."""
    bases: dict[str, Basis] = {}
    for own, name in term.names.items():
        layer = united.layers[name]
        both = layer.activation_shape, layer.pre_activation_shape
        left, right = (cast(Array, jax.ShapeDtypeStruct(shape, dtype)) for shape in both)
        bases[own] = _turned(
            (None if is_diagonal(left, right) else left, right), own in term.turned
        )
    if settings.unassigned == "block":
        for name in united.reasons.keys() & term.graph.reasons:
            size = math.prod(term.graph.model.parameters[name].aval.shape)
            sides = ((n, n) for n in (1, size))
            left, right = (cast(Array, jax.ShapeDtypeStruct(shape, dtype)) for shape in sides)
            bases[name] = left, right
    return bases


def merged(parts: Sequence[Factors]) -> Factors:
    """One Kronecker product for a sum of them, which is none, of every slot.

    It keeps the trace, and is exact where the products share either factor up to scale.
    """
    if len(parts) == 1:
        return parts[0]
    traces = [traces_of(part) for part in parts]
    norm = jnp.sqrt(total(q * g for q, g in traces))
    norm = jnp.where(norm > 0, norm, 1)
    pairs = list(zip(parts, traces, strict=True))

    def times(factor: Array, scale: Array) -> Array:
        return factor * scale.reshape(scale.shape + (1,) * (factor.ndim - scale.ndim))

    return Factors(
        total(times(part.activation, g / norm) for part, (_, g) in pairs),
        total(times(part.pre_activation, q / norm) for part, (q, _) in pairs),
    )


def traces_of(part: Factors) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """The traces of both factors of every slot, all of its blocks together."""
    q, g = part
    left = jnp.sum(q, axis=-1) if is_diagonal(q, g) else jnp.trace(q, axis1=-2, axis2=-1)
    right = jnp.trace(g, axis1=-2, axis2=-1)
    if left.shape != right.shape:
        left, right = (jnp.sum(x, axis=(-2, -1), keepdims=True) for x in (left, right))
    return left, right


def _fitted(factor: Array, diagonal: bool, shape: Shape) -> Array:
    """The same in the shape of the sum's: a diagonal as a matrix, all perhaps cut into blocks."""
    blocks = math.prod(shape[-4:-2]) if len(shape) > 3 else 1
    if diagonal and factor.shape != shape:
        factor = on_diagonals(factor.reshape(-1, factor.shape[-1]), blocks)
    elif factor.size != math.prod(shape):
        factor = diagonal_blocks(factor.reshape(-1, *factor.shape[-2:]), blocks)
    return factor.reshape(shape)


def _combined(
    curvatures: list[Curvature],
    weights: list[Scalar],
    factors_of: FactorsOf,
    moments_of: FactorsOf,
    settings: CurvatureSettings,
) -> Curvature:
    known = [(c.value, c.gradient) for c in curvatures]
    value, gradient = jax.tree.map(lambda *x: _weighted(weights, x), *known)
    shapes = tuple(jax.eval_shape(c.linearized, c.gradient).shape for c in curvatures)
    products = [c.output_product for c in curvatures]
    of_first: Any = products[0].func
    axis = of_first.axis_name
    moments = [c.lazy_moments for c in curvatures]
    return Curvature(
        lazy_factors=Partial(factors_of, weights, [c.lazy_factors for c in curvatures]),
        value=value,
        gradient=gradient,
        linearized=Partial(_concatenated, [c.linearized for c in curvatures]),
        output_product=Partial(_WeightedProduct(shapes, axis), weights, products),
        displaced=Partial(_weighted_value, weights, [c.displaced for c in curvatures]),
        examples=total(c.examples for c in curvatures),
        settings=settings,
        lazy_moments=Partial(moments_of, weights, moments) if settings.inverse == "ekfac" else None,
    )


def _concatenated(parts: list[Partial], direction: dict[str, Array]) -> Float[Array, "n K"]:
    """The outputs' changes of all parts, one after another; of several widths as one column."""
    outputs = [part(direction) for part in parts]
    if len({u.shape[1] for u in outputs}) > 1:
        outputs = [u.astype(factor_dtype(u.dtype)).reshape(-1, 1) for u in outputs]
    return jnp.concatenate(outputs)


@dataclasses.dataclass(frozen=True)
class _WeightedProduct:
    shapes: tuple[tuple[int, ...], ...]  # of the outputs' changes of each part
    axis_name: AxisName | None  # of devices

    def __call__(
        self,
        weights: list[Scalar],
        parts: list[Partial],
        u: Float[Array, "n K"],
        v: Float[Array, "n K"],
    ) -> Scalar:
        ends = list(itertools.accumulate(n * k // u.shape[1] for n, k in self.shapes))[:-1]
        split = zip(parts, self.shapes, jnp.split(u, ends), jnp.split(v, ends), strict=True)
        return _weighted(weights, [part(a.reshape(s), b.reshape(s)) for part, s, a, b in split])


def _weighted_value(
    weights: list[Scalar], parts: list[Partial], direction: dict[str, Array]
) -> Scalar:
    return _weighted(weights, [part(direction) for part in parts])


def _weighted(weights: list[Scalar], values: Sequence[Array]) -> Array:
    """The sum of the values times their weights."""
    return total(w.astype(x.dtype) * x for w, x in zip(weights, values, strict=True))
