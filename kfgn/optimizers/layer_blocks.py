"""The static description of an objective's layers that transformations are built from."""

import collections
import dataclasses

import jax.numpy as jnp

from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.trees import named_leaves
from kfgn.base.types import Batch, Named, Number, PyTree, Shape
from kfgn.curvature.blocks import Block, LoneParameter, OwnBlock
from kfgn.curvature.curvature import Curvature, check_unassigned
from kfgn.model.graph.unite import unite
from kfgn.model.layers.factor_size import check_factor_size
from kfgn.model.layers.layer import Layer, require_blocks
from kfgn.objective.objective import require_batch
from kfgn.objective.sum_of import AnyObjective, named_term, require_objective


@dataclasses.dataclass(frozen=True, eq=False)
class LayerBlocks:
    """Which parameters form which layer; no arrays, no values. `find_blocks` makes it.

    Args:
      layers: by name.
      unassigned: parameters in no layer.
      shapes: of all parameters.
      treatment: of those in no layer, as in `find_blocks`.
      l2: the weight η of the objective's penalty.
      shared: layers in several terms of a sum of objectives.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error, l2=0.1)
    >>> find_blocks(objective, jnp.ones((3, 2)), (jnp.ones((8, 3)), jnp.ones((8, 2)))).l2
    0.1
    """

    layers: dict[str, Layer]
    unassigned: tuple[str, ...] = ()
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    treatment: str = "raise"
    l2: Number = 0.0
    shared: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """A line for each layer; `kfgn.inspect` shows more."""
        lines = [f"{n!r}: {', '.join(map(repr, x.parameters))}" for n, x in self.layers.items()]
        if self.unassigned:
            outside = ", ".join(map(repr, self.unassigned))
            lines.append(f"in no layer, {self.treatment!r}: {outside}")
        return "\n".join(["LayerBlocks", *lines])

    def present(self, leaves: Named) -> dict[str, Block]:
        """What is preconditioned of the leaves: layers, and parameters that have a diagonal.

        Raises:
          ParameterError: a leaf is unknown or has another shape, or a layer is
            split: some of its parameters are there and some are masked out.
        """
        for name, leaf in leaves.items():
            if name not in self.shapes:
                raise ParameterError(
                    f"parameter {name!r} is unknown to the objective that the optimizer was made "
                    f"for, whose parameters are {', '.join(map(repr, self.shapes))}; make the "
                    "optimizer from these params."
                )
            if jnp.shape(leaf) != self.shapes[name]:
                raise ParameterError(
                    f"parameter {name!r} has shape {jnp.shape(leaf)}, but the optimizer was made "
                    f"for shape {self.shapes[name]}; make it from these params."
                )
        for layer in self.layers.values():
            inside = [name for name in layer.parameters if name in leaves]
            if inside and len(inside) < len(layer.parameters):
                outside = [name for name in layer.parameters if name not in leaves]
                raise ParameterError(
                    f"layer {layer.name!r} is split: {', '.join(map(repr, inside))} is optimized "
                    f"here but {', '.join(map(repr, outside))} is masked out; its block covers "
                    "kernel and bias together, so select whole layers."
                )
        return {n: x for n, x in self.every.items() if x.parameters[0] in leaves}

    @property
    def every(self) -> dict[str, Block]:
        """The blocks that a curvature must have factors or a diagonal of."""
        alone: dict[str, Block] = {}
        if self.treatment == "diagonal":
            alone = {n: LoneParameter(n, self.shapes[n]) for n in self.unassigned}
        elif self.treatment == "block":
            alone = {n: OwnBlock(n, self.shapes[n]) for n in self.unassigned}
        return self.layers | alone

    def check_seen(self, leaves: Named, initialized: Named) -> None:
        """Raises ParameterError where an update does not match what init saw."""
        if (found := self.present(leaves)).keys() != initialized.keys():
            raise ParameterError(
                f"update got gradients of {sorted(found)}, but init saw {sorted(initialized)}; "
                "initialize the state from the same params (and the same mask)."
            )


NO_BLOCKS = LayerBlocks({})


def find_blocks(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    *,
    unassigned: str = "block",
    large_factors: str = "raise",
    factor_limit: int | None = None,
) -> LayerBlocks:
    """Finds the objective's layers from shapes alone, without computing anything.

    Args:
      objective: the objective.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: `(inputs, targets)`, likewise; values are checked where there are any.
      unassigned: "block" to precondition a parameter in no layer by its own exact block of
        the Gauss-Newton matrix; "diagonal", by the diagonal of it; "gradient" to give it
        damped gradient steps; "raise" for an error.
      large_factors, factor_limit: as in `kfgn.value_grad_and_curvature`.

    Returns:
      The blocks, for `kfgn.transforms`.

    Raises:
      LayerError: a parameter belongs to no layer, or a factor is too large.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> blocks = find_blocks(objective, jnp.ones((3, 2)), (jnp.ones((8, 3)), jnp.ones((8, 2))))
    >>> blocks
    LayerBlocks
    '': ''
    """
    check_unassigned(unassigned)
    check_factor_size(large_factors, factor_limit)
    require_objective(objective)
    united = unite(objective, params, batch, None, large_factors, factor_limit)
    require_blocks(united.without_block(unassigned))
    for name, term in united.terms.items():
        with named_term(name):
            require_batch(term.objective, params, (term.inputs, term.targets))
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    terms = collections.Counter(n for term in united.terms.values() for n in term.names.values())
    shared = frozenset(name for name, count in terms.items() if count > 1)
    return LayerBlocks(
        united.layers, tuple(united.reasons), shapes, unassigned, objective.l2, shared
    )


def require_curvature(curvature: Curvature | None, blocks: LayerBlocks, leaves: Named) -> Curvature:
    """Returns `curvature`, checked to be one for these layers and these leaves.

    Raises:
      OptionError: no curvature, or something else.
      ParameterError: the curvature of other parameters.
    """
    if curvature is None:
        raise OptionError(
            "optimizer.update needs the curvature of the batch: compute it with "
            "(value, grads), curvature = kfgn.value_grad_and_curvature(objective, method)"
            "(params, batch) and pass update(grads, state, params, curvature=curvature)."
        )
    if not isinstance(curvature, Curvature):
        raise OptionError(
            f"curvature must be a kfgn.Curvature, found a {type(curvature).__name__}; pass what "
            "kfgn.value_grad_and_curvature(objective, method)(params, batch) returned."
        )
    missing = [name for name in blocks.every if name not in curvature.blocks]
    bare = [n for n in missing if n in blocks.unassigned]
    if bare:
        raise ParameterError(
            f"the curvature has nothing for parameter(s) {', '.join(map(repr, bare))}, which "
            f'are in no layer: the optimizer was made with unassigned="{blocks.treatment}"; pass '
            "the same to kfgn.value_grad_and_curvature."
        )
    if missing:
        raise ParameterError(
            f"the curvature has no factors for layer(s) {', '.join(map(repr, missing))}: it was "
            "computed for another objective than the optimizer was made for."
        )
    for name, leaf in leaves.items():
        found = jnp.shape(curvature.gradient[name]) if name in curvature.gradient else None
        if found != jnp.shape(leaf):
            raise ParameterError(
                f"the update has a parameter {name!r} of shape {jnp.shape(leaf)}, for which the "
                f"curvature has {'none' if found is None else f'shape {found}'}: it was computed "
                "at other parameters; compute it at the ones that are updated."
            )
    return curvature


def require_settings(curvature: Curvature, **wanted: str | Number | None) -> None:
    """Raises OptionError for a curvature made with other settings; None takes any.

    A setting that is an array, such as a traced l2, is not compared.
    """
    for name, expected in wanted.items():
        found = getattr(curvature.settings, name)
        known = all(isinstance(x, (str, float, int)) for x in (found, expected))
        if known and found != expected:
            raise OptionError(
                f"the optimizer was made with {name}={expected!r}, the curvature with "
                f"{name}={found!r}: tell kfgn.value_grad_and_curvature and the optimizer the "
                "same objective, method and treatment of unassigned parameters."
            )
