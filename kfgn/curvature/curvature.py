"""What an update must know of a batch, and how it was made."""

import dataclasses
from typing import NamedTuple

import jax
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.checks import check_choice, check_whole
from kfgn.base.errors import OptionError
from kfgn.base.kronecker import INVERSES
from kfgn.base.linalg import PRECISIONS
from kfgn.base.types import Array, Scalar
from kfgn.curvature.basis_moments import Basis
from kfgn.curvature.factors import Diagonal, Factors, TwoTerms, check_sharing
from kfgn.curvature.lazy_factors import blocks_of, evaluate, known, unmerged
from kfgn.curvature.methods import METHODS, method_of
from kfgn.model.layers.factor_size import check_factor_size


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CurvatureSettings:
    """What a curvature was made with: the arguments of `value_grad_and_curvature`.

    A pytree without leaves: it is part of the tree structure of a `Curvature`.

    Raises:
      OptionError: an option has a wrong value.

    >>> import kfgn
    >>> settings = kfgn.curvature.CurvatureSettings(
    ...     "kfac", 1, "expand", "joint", 256, "raise", l2=0.0
    ... )
    >>> jax.tree.leaves(settings)
    []
    """

    method: str
    samples: int
    sharing: str
    spatial: str
    model_examples: int | None
    unassigned: str
    l2: float | None  # the objective's; None where it is an array, whose value may be unknown
    large_factors: str = "raise"
    factor_limit: int | None = None
    precision: str = "highest"
    inverse: str = "factored"
    activation_rows: int | None = None

    def __post_init__(self) -> None:
        method = method_of(self.method)
        check_whole("samples", self.samples, 1)
        check_sharing(self.sharing)
        check_choice("spatial", self.spatial, {s: 0 for m in METHODS.values() for s in m.spatial})
        if self.spatial not in method.spatial:
            able = ", ".join(f'"{n}"' for n, m in METHODS.items() if self.spatial in m.spatial)
            raise OptionError(f"spatial is an option of method {able}, not of {self.method!r}")
        if self.model_examples is not None:
            check_whole("model_examples", self.model_examples, 1)
        if self.activation_rows is not None:
            check_whole("activation_rows", self.activation_rows, 1)
        check_unassigned(self.unassigned)
        check_factor_size(self.large_factors, self.factor_limit)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("inverse", self.inverse, INVERSES)

    def require_equal(self, other: "CurvatureSettings", what: str) -> None:
        """Raises OptionError where other settings differ, with the fields that do."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        differing = [n for n in mine if mine[n] != others[n]]
        if differing:
            found = ", ".join(f"{n}={mine[n]!r} and {n}={others[n]!r}" for n in differing)
            raise OptionError(
                f"{what} must have the same settings, found {found}; make all of them with one "
                "function of kfgn.value_grad_and_curvature."
            )


class Curvature(NamedTuple):
    """Everything an update needs to know about a batch, as one pytree.

    The callables are `jax.tree_util.Partial`, so all of it crosses jit.
    Directions are dictionaries from parameter name to array; absent names
    stand for zeros. Factors are not computed before they are asked for.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 1)), (jnp.ones((4, 3)), jnp.zeros((4, 1)))
    >>> _, curvature = kfgn.value_grad_and_curvature(objective, "kflr")(w, batch)
    >>> float(curvature.value), float(curvature.displaced({"": -w}))
    (4.5, 0.0)
    >>> curvature.linearized({"": w}).shape, curvature.settings.method
    ((4, 1), 'kflr')
    """

    lazy_factors: Partial  # () -> the factors
    value: Scalar  # the objective, l2 included
    gradient: dict[str, Array]  # its gradient, l2 included
    # Of all examples, or of the `model_examples` that stand for them, n:
    linearized: Partial  # direction -> the outputs' change to first order, `[n, K]`
    output_product: Partial  # (u, v) of `[n, K]` -> mean of u'Hv, H the output Hessian
    displaced: Partial  # direction -> the objective at params + direction
    examples: Scalar  # how many the batch has, or the sum of `|w|`: its weight in an average
    settings: CurvatureSettings  # static: what it was made with
    lazy_moments: Partial | None = None  # of gradients in bases: see `basis_moments`

    @property
    def factors(self) -> dict[str, Factors | Diagonal]:
        """By layer, diagonals by parameter; computed anew whenever they are asked for."""
        return evaluate(self.lazy_factors, self.value.ndim)

    @property
    def terms(self) -> dict[str, Factors | TwoTerms | Diagonal]:
        """The factors, where layers in several terms of a sum of objectives are not merged.

        Such a layer has the factors of its first term, and the merged ones of the others.
        """
        return evaluate(unmerged(self.lazy_factors), self.value.ndim)

    def basis_moments(self, bases: dict[str, Basis]) -> dict[str, Float[Array, "S i o"]]:
        """The second moments of gradients in a basis for every layer's block, by its name.

        Raises:
          OptionError: it was not made with `inverse="ekfac"`.
        """
        if self.lazy_moments is None:
            raise OptionError(
                'inverse="ekfac" needs second moments of gradients that the curvature was made '
                'without: pass inverse="ekfac" to kfgn.value_grad_and_curvature too'
            )
        found: dict[str, Array] = self.lazy_moments(bases)
        return found

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names in `factors`."""
        return blocks_of(self.lazy_factors)

    def with_factors(self, factors: dict[str, Factors | Diagonal]) -> "Curvature":
        """The same with these factors, such as its own: computed now, they free what they read."""
        return self._replace(lazy_factors=known(factors))


def check_unassigned(unassigned: str) -> None:
    """Raises OptionError unless it is a known treatment of parameters without a block."""
    check_choice("unassigned", unassigned, ("block", "raise", "diagonal", "gradient"))
