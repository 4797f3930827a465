"""Several objectives as one: their weighted sum, each on a batch of its own.

f(params) = sum_i c_i f_i(params, batch_i)
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from kfgn.base.checks import check_not_negative
from kfgn.base.errors import BatchError, KfgnError, OptionError
from kfgn.base.linalg import total
from kfgn.base.types import Batch, Number, PyTree, Scalar
from kfgn.objective.loss import Loss
from kfgn.objective.objective import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class SumOfObjectives:
    """What `sum_of` makes: an objective whose batch is a dictionary or tuple of batches.

    >>> import jax.numpy as jnp, kfgn
    >>> first = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error, l2=0.5)
    >>> kfgn.sum_of([first, first], weights=[1.0, 3.0]).l2
    2.0
    """

    terms: dict[str, Objective]
    weights: dict[str, Number]
    named: bool  # whether batches come by name, or in order

    @property
    def l2(self) -> Number:
        """η of the sum, `sum_i c_i η_i`."""
        return sum((c * self.terms[n].l2 for n, c in self.weights.items()), start=0.0)

    @property
    def has_aux(self) -> bool:
        """Whether a model of a term returns `(outputs, aux)`; the sum's is that of every term."""
        return any(term.has_aux for term in self.terms.values())

    def like_terms(self, found: dict[str, Any]) -> Any:
        """What was found for each term, in the structure of a batch."""
        return found if self.named else tuple(found.values())

    def batches(self, batch: Any) -> dict[str, Batch]:
        """The batch of every term.

        Raises:
          BatchError: it has another structure than the terms.
        """
        if self.named and isinstance(batch, Mapping) and set(batch) == set(self.terms):
            return {name: batch[name] for name in self.terms}
        if not self.named and isinstance(batch, tuple | list) and len(batch) == len(self.terms):
            return dict(zip(self.terms, batch, strict=True))
        names = ", ".join(map(repr, self.terms))
        wanted = (
            f"a dictionary with the keys {names}" if self.named else f"{len(self.terms)} in order"
        )
        found = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            found += f" with the keys {', '.join(map(repr, batch))}"
        elif isinstance(batch, tuple | list):
            found += f" of length {len(batch)}"
        raise BatchError(f"expected a batch for each term of the sum, {wanted}, found {found}")

    def __call__(self, params: PyTree, batch: Any = None) -> Scalar:
        return self._sum(lambda term, own: term(params, own), batch)

    def mean_loss(self, params: PyTree, batch: Any) -> Scalar:
        """The sum without the penalties."""
        return self._sum(lambda term, own: term.mean_loss(params, own), batch)

    def penalty(self, params: PyTree) -> Scalar:
        """`l2/2 |params|^2`."""
        return total(
            _scaled(c, self.terms[name].penalty(params)) for name, c in self.weights.items()
        )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """That of every term."""
        return tuple(term.loss for term in self.terms.values())

    def with_model(self, change: Callable[[Any], Any]) -> "SumOfObjectives":
        """The same sum of other models, `change` of each."""
        terms = {name: term.with_model(change) for name, term in self.terms.items()}
        return dataclasses.replace(self, terms=terms)

    def _sum(self, of: Callable[[Objective, Batch], Scalar], batch: Any) -> Scalar:
        parts = []
        for name, own in self.batches(batch).items():
            with named_term(name):
                parts.append(_scaled(self.weights[name], of(self.terms[name], own)))
        return total(parts)


AnyObjective: TypeAlias = Objective | SumOfObjectives


def sum_of(
    terms: Mapping[str, Objective] | Sequence[Objective],
    weights: Mapping[str, Number] | Sequence[Number] | None = None,
) -> SumOfObjectives:
    """The sum `sum_i c_i f_i` of objectives of the same params, an objective itself.

    The points inside a domain and those on its boundary, labelled and unlabelled data, a
    reconstruction and a prior: each term has a model, a loss and a batch of its own, of
    any size. It is taken wherever a `kfgn.Objective` is, with a batch that is a
    dictionary (or tuple) of batches, as the terms are:

        {"interior": (points, right_sides), "boundary": (edges, values)}

    Value, gradient, exact matrices and the quadratic model are the sums of those of the
    terms, penalties included: the sum has `l2 = sum_i c_i l2_i`. The Kronecker factors of a
    kernel in several terms are merged into `Q ⊗ G` with the trace of `sum_i c_i Q_i ⊗ G_i`:

        Q ~ sum_i c_i tr(G_i) Q_i,   G ~ sum_i c_i tr(Q_i) G_i

    A bias that joins its kernel in one term and not in another has a block of its own.

    Args:
      terms: the objectives, by name or in order.
      weights: c, numbers of at least 0 or arrays of one, likewise; 1 where a name is
        missing, or for all.

    Raises:
      OptionError: no term, a term that is no Objective, or a weight that fits none.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> net = lambda w, x: jnp.tanh(x @ w)
    >>> slope = lambda w, x: jax.vmap(jax.grad(lambda z: net(w, z)[0]))(x)
    >>> loss = kfgn.losses.half_squared_error
    >>> objective = kfgn.sum_of(
    ...     {"inside": kfgn.Objective(slope, loss), "edge": kfgn.Objective(net, loss)},
    ...     weights={"edge": 10.0},
    ... )
    >>> inside, edge = (jnp.zeros((5, 2)), jnp.ones((5, 2))), (jnp.ones((2, 2)), jnp.zeros((2, 1)))
    >>> float(objective(jnp.zeros((2, 1)), {"inside": inside, "edge": edge}))
    1.0
    """
    named = isinstance(terms, Mapping)
    found = dict(terms) if isinstance(terms, Mapping) else {str(k): t for k, t in enumerate(terms)}
    wrong = [name for name, term in found.items() if not isinstance(term, Objective)]
    if not found or wrong:
        what = f"{type(found[wrong[0]]).__name__} as term {wrong[0]!r}" if wrong else "none"
        raise OptionError(f"sum_of takes one kfgn.Objective or more, found {what}")
    if weights is None:
        weights = {} if named else [1.0] * len(found)
    fits = isinstance(weights, Mapping) == named and (
        set(weights) <= set(found) if named else len(weights) == len(found)
    )
    if not fits:
        raise OptionError(
            f"weights must be like the terms, for {', '.join(map(repr, found))}, found {weights!r}"
        )
    given = weights if isinstance(weights, Mapping) else dict(zip(found, weights, strict=True))
    for name, weight in given.items():
        check_not_negative(f"the weight of the term {name!r}", weight)
    return SumOfObjectives(found, {name: given.get(name, 1.0) for name in found}, named)


def require_objective(objective: Any) -> None:
    """Raises OptionError for anything but an objective or a sum of them."""
    if not isinstance(objective, AnyObjective):
        raise OptionError(
            f"objective must be a kfgn.Objective, found a {type(objective).__name__}; make one "
            "with kfgn.Objective(model, loss)."
        )


@contextlib.contextmanager
def named_term(name: str) -> Iterator[None]:
    """Errors of kfgn inside say which term of a sum they are about; "" is no sum."""
    try:
        yield
    except KfgnError as error:
        if not name:
            raise
        raise type(error)(f"in the term {name!r} of the sum: {error}") from error


def _scaled(weight: Number, x: Scalar) -> Scalar:
    return jnp.asarray(weight).astype(x.dtype) * x
