"""`kfra`, `kflr` and `kfac`: the complete optimizer in one call.

The three differ in the factors alone, which the `curvature` of each update
brings along, so they are one recipe with one set of options, written once:
`optimizer` is the template of all three.
"""

import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import optax
from jax.sharding import NamedSharding

from kfgn.base.types import Batch, Number, PyTree
from kfgn.diagnostics.inspect import inspection_of
from kfgn.objective.sum_of import AnyObjective
from kfgn.optimizers.average_parameters import average_parameters
from kfgn.optimizers.damping import FactorDamping, StepDamping
from kfgn.optimizers.layer_blocks import find_blocks
from kfgn.optimizers.recipe import scale_by_curvature

Options = ParamSpec("Options")


def optimizer(
    method: str,
    /,
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    *,
    learning_rate: Number | optax.Schedule = 0.9,
    decay: Number | None = 0.7,
    step_damping: Number | StepDamping = 0.1,
    factor_damping: Number | FactorDamping | None = None,
    refresh_factors_every: Any = 5,
    refresh_inverse_every: Any = 5,
    inverse: str = "factored",
    factor_sharding: NamedSharding | None = None,
    stagger: bool = False,
    momentum: bool = True,
    average_decay: Number | None = None,
    unassigned: str = "block",
    large_factors: str = "raise",
    factor_limit: int | None = None,
    warn_after_skipped: Any = 10,
) -> optax.GradientTransformationExtraArgs:
    """The full recipe of eqs. (33)-(45).

        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)

    Args:
      objective: the objective that is minimized.
      params: its parameters; only their shapes matter (arrays or
        `jax.ShapeDtypeStruct`).
      batch: a batch `(inputs, targets)`; only shapes matter, likewise.
      learning_rate: a factor, or an optax schedule, on the step that the
        quadratic model picks; 1 takes it whole. The model is that of one
        batch, so its minimum goes too far for the others: hence 0.9.
      decay: of the moving average of the factors, per observation; None uses those of
        the batch that was observed last.
      step_damping: τ, added to the full Gauss-Newton matrix. A number is where
        `kfgn.transforms.LevenbergMarquardt` starts, which adapts it by the reduction ratio
        and, with momentum, by the agreement of the next batches; or any rule of its own.
      factor_damping: γ, added to the Kronecker factors. None lets it follow τ,
        which measures better and saves the search; a number is where
        `kfgn.transforms.Greedy` starts, the paper's search; or any rule.
      refresh_factors_every: updates between looks at a batch's factors, which are not
        computed otherwise. The first ten updates have one each, and of a longer period those
        after 16, 32, ... "auto" lets the method's cost say, by `kfgn.inspect`: so many that
        factors and inverses together add at most 0.6 gradients to an update, up to 50.
      refresh_inverse_every: updates between inversions of the factors, of which the first
        five have one each, and then likewise; or "auto", for the same number.
      inverse: "factored" damping, eq. (36), or "eigen" for the exact eq. (35); "ekfac", for
        the second moments of gradients in the factors' eigenbasis in place of products of
        eigenvalues (George et al. 2018), to be said to `value_grad_and_curvature` as well;
        "two-term", for a sum of objectives, inverts the sum of two Kronecker products that a
        layer in several terms has, instead of one that stands for them.
      factor_sharding: `jax.sharding.NamedSharding(mesh, PartitionSpec(axis))`, for each device
        along an axis of a mesh to keep, average and invert a share of the factors, and to
        solve for that; None for all on every device. Also inside `jax.shard_map` over the axis,
        where the state's own shardings, as `init` outside makes them, are its specs.
      stagger: refresh the inverses of some blocks at each update instead of all at every
        so many, so that updates after the first few cost about the same, as far as they observe
        factors alike (`refresh_factors_every=1`). With `factor_sharding` each device goes
        through its share in turns; of a stack with a block for each device all are one turn.
      momentum: let the quadratic model weigh the previous step in too (Martens
        & Grosse 2015, section 7), at the cost of one more linear pass. A step
        that goes against it, or more than once along it, extrapolates: it is
        taken only where the batch's objective falls, else `refused`.
      average_decay: β of the average of the parameters, eq. (44), kept in the
        state as `average`; None keeps none.
      unassigned: "block" to precondition parameters in no layer by their own exact
        blocks of the Gauss-Newton matrix, of up to 1024 entries; "diagonal", by its
        diagonal; "gradient" to give them damped gradient steps; "raise" for an error.
      large_factors: "raise" where a factor has more rows than `factor_limit`; "split",
        to keep blocks on its diagonal; or "diagonal".
      factor_limit: None stands for the rows of a factor that takes 2 GiB. Say the same
        three to `value_grad_and_curvature`.
      warn_after_skipped: so many updates skipped in a row, as numbers were not
        finite, raise a `kfgn.errors.SkippedUpdatesWarning`, in jitted loops, too; None
        for never. One call of `kfgn.diagnostics.record(state)` says the rest.

    The paper's own settings are `**kfgn.transforms.PRESETS["paper"]`.

    Returns:
      An optax transformation, sign included: add its updates.

    Raises:
      LayerError: a parameter belongs to no layer.
      OptionError: an option out of its range; in `update`, a curvature of
        another method, l2 or `unassigned`.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.

    >>> import jax, jax.numpy as jnp, optax, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> optimizer = kfgn.kfra(objective, w, batch, step_damping=1e-6)
    >>> curvature_fn = kfgn.value_grad_and_curvature(objective, "kfra")
    >>> (value, grads), curvature = curvature_fn(w, batch)
    >>> updates, state = optimizer.update(grads, optimizer.init(w), w, curvature=curvature)
    >>> bool(objective(optax.apply_updates(w, updates), batch) < 0.1 * value)
    True
    """
    periods = (
        inspection_of(objective, params, batch).totals.periods[method] if str(n) == "auto" else n
        for n in (refresh_factors_every, refresh_inverse_every)
    )
    refresh_factors_every, refresh_inverse_every = periods
    recipe = scale_by_curvature(
        find_blocks(
            *(objective, params, batch),
            unassigned=unassigned,
            large_factors=large_factors,
            factor_limit=factor_limit,
        ),
        factor_damping=factor_damping,
        step_damping=step_damping,
        decay=decay,
        refresh_factors_every=refresh_factors_every,
        refresh_inverse_every=refresh_inverse_every,
        inverse=inverse,
        factor_sharding=factor_sharding,
        stagger=stagger,
        momentum=momentum,
        warn_after_skipped=warn_after_skipped,
        method=method,
    )
    parts = [recipe, optax.scale_by_learning_rate(learning_rate)]
    if average_decay is not None:
        parts.append(average_parameters(average_decay))
    return optax.chain(*parts)


def _alias(
    template: Callable[Concatenate[str, Options], optax.GradientTransformationExtraArgs],
    method: str,
    factors: str,
) -> Callable[Options, optax.GradientTransformationExtraArgs]:
    """The template for one method, with its name, signature and docstring."""

    def alias(
        *args: Options.args, **options: Options.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        return template(method, *args, **options)

    signature = inspect.signature(template)
    first, *others = signature.parameters.values()
    doc = (template.__doc__ or "").replace("kfgn.kfra", f"kfgn.{method}")
    doc = doc.replace('"kfra"', f'"{method}"')
    if method == "kfac":
        doc = doc.replace("curvature_fn(w, batch)", "curvature_fn(w, batch, key=jax.random.key(0))")
    alias.__doc__ = doc.replace("recipe of eqs.", f"recipe with {factors}, eqs.", 1)
    alias.__name__ = alias.__qualname__ = method
    alias.__annotations__ = {n: x for n, x in template.__annotations__.items() if n != first.name}
    alias.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return alias


kfra = _alias(optimizer, "kfra", 'the factors of method "kfra", eq. (26)')
kflr = _alias(optimizer, "kflr", 'the factors of method "kflr", eqs. (23)-(25)')
kfac = _alias(optimizer, "kfac", 'the factors of method "kfac", appendix D.3')
