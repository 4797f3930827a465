"""Where, and by how much, a layer's Hessian is not positive semi-definite.

The Hessian of a layer is its Gauss-Newton matrix, which is, and second-order terms,
which need not be (appendix C of Veitch, whose equations have numbers with a V).

In the recursion down to a layer's pre-activation z, eq. (8), what the layers above found is
brought down by congruences, which keep it positive semi-definite, and one term is added: with
functions z_v of z that lead to the next layers' pre-activations

    T = sum_v sum_k  dE/dz_vk  d²z_vk/dz².

Where a transfer function σ follows and then the next layer, with inputs x = σ(z), T is the
diagonal matrix of `σ''(z_j) dE/dx_j`, whose signs (V87) asks for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_choice, check_not_negative
from kfgn.base.decompositions import eigvalsh
from kfgn.base.errors import OptionError
from kfgn.base.linalg import count_of, map_examples
from kfgn.base.trees import batch_of, named_leaves
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.curvature.forward_pass import hold_statistics
from kfgn.curvature.operators import gauss_newton, hessian
from kfgn.model.graph.graph import Graph
from kfgn.model.program.equations import Var, evaluate, read, size
from kfgn.objective.objective import Objective
from kfgn.objective.sum_of import AnyObjective, require_objective
from kfgn.objective.weights import loss_of


class NegativeCurvature(NamedTuple):
    """How far one layer's Hessian H is from its Gauss-Newton matrix G.

    H - G holds all second-order terms of the layers above, brought down to this one, and what
    the loss itself lacks of convexity; T is the layer's own term, as (V87) has it.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: jnp.square(x @ w), kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.ones((1, 1)), jnp.full((1, 1), 4.0))
    >>> found = kfgn.diagnostics.negative_curvature(objective, of="block")(w, batch)[""]
    >>> float(found.least), float(found.gauss_newton_norm)  # of ½ (w² - 4)² at 1
    (-2.0, 4.0)
    """

    least: Scalar  # the least eigenvalue of H
    greatest: Scalar  # the greatest one
    negative_share: Scalar  # the share of eigenvalues that are negative beyond rounding
    second_order_trace: Scalar  # the trace of H - G
    second_order_norm: Scalar  # the Frobenius norm of H - G
    gauss_newton_norm: Scalar  # the Frobenius norm of G, to compare with
    # The same of T in the pre-activation, which `of="block"` leaves out:
    term_negative_share: Scalar | None = None
    term_positive_share: Scalar | None = None
    term_trace: Scalar | None = None
    term_norm: Scalar | None = None


def negative_curvature(
    objective: AnyObjective, *, of: str = "pre_activation", tolerance: float | None = None
) -> Callable[[PyTree, Batch], dict[str, NegativeCurvature]]:
    """A detector of saddle points and of non-convexity, layer by layer (appendix C of Veitch).

    Without second-order terms every layer's Hessian is positive semi-definite. A
    network that is piecewise linear in each layer, with a convex loss, has none.
    A layer's own terms T may cancel with others: where T is negative, H need not be.

    Args:
      objective: the objective.
      of: "pre_activation" looks at every example's Hessian in the layer's
        pre-activation: the least and greatest eigenvalue of all examples, the
        share among all eigenvalues, the mean trace, the root of the mean squared
        norms, and the same of the layer's own terms. "block" looks at the mean
        Hessian in the layer's parameters, for small layers.
      tolerance: eigenvalues below `-tolerance` times the largest magnitude of the same
        matrix are negative; None stands for ten rounding units times its size.

    Returns:
      `(params, batch) -> {name: NegativeCurvature}`, by the names of the
      `pre_activation` matrices or `blocks` of `kfgn.hessian`.

    Raises:
      OptionError: an option has a wrong value, or a block would hold over 2 GiB.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.sin(x @ p["w"]), kfgn.losses.half_squared_error)
    >>> params, batch = {"w": jnp.full((3, 2), 0.5)}, (jnp.ones((4, 3)), -jnp.ones((4, 2)))
    >>> detector = kfgn.diagnostics.negative_curvature(objective)
    >>> {name: bool(found.least < 0) for name, found in detector(params, batch).items()}
    {'w': True}
    """
    require_objective(objective)
    check_choice("of", of, ("pre_activation", "block"))
    whole = objective if isinstance(objective, Objective) else None
    if of == "pre_activation" and whole is None:
        raise OptionError('of a sum of objectives look at of="block", or at its terms one by one')
    if tolerance is not None:
        check_not_negative("tolerance", tolerance)

    def of_blocks(params: PyTree, batch: Batch) -> dict[str, NegativeCurvature]:
        exact = hessian(objective).blocks(params, batch)
        positive = gauss_newton(objective).blocks(params, batch)
        return {n: _gathered(_measured(h, positive[n], tolerance), 1) for n, h in exact.items()}

    def of_pre_activations(params: PyTree, batch: Batch) -> dict[str, NegativeCurvature]:
        assert whole is not None
        held, batch = hold_statistics(whole, params, batch)
        exact = hessian(held)._prepare(params, batch, exact=False)
        positive = gauss_newton(held)._prepare(params, batch, exact=False)
        own_terms = _example_terms(held, exact.graph, params)

        def one(arguments: Any) -> dict[str, NegativeCurvature]:
            h, g = exact.walk_one(arguments).uses, positive.walk_one(arguments).uses
            _, example, _, target = arguments
            t = own_terms((example, target))
            return {name: _measured(h[name], g[name], tolerance, t[name]) for name in h}

        found = map_examples(one, exact.arguments)
        count = count_of(exact.arguments)
        return {name: _gathered(measured, count) for name, measured in found.items()}

    return of_blocks if of == "block" else of_pre_activations


def _measured(
    hessian: Float[Array, "*S D D"],
    positive: Float[Array, "*S D D"],
    tolerance: float | None,
    term: Float[Array, "D D"] | None = None,
) -> NegativeCurvature:
    """The measures of each matrix, with squared norms."""
    values, beyond = eigvalsh(hessian), hessian - positive
    measured = NegativeCurvature(
        values[..., 0],
        values[..., -1],
        _negative_share(values, tolerance),
        jnp.trace(beyond, axis1=-2, axis2=-1),
        jnp.sum(beyond**2, axis=(-2, -1)),
        jnp.sum(positive**2, axis=(-2, -1)),
    )
    if term is None:
        return measured
    own = eigvalsh(term)
    shares = _negative_share(own, tolerance), _negative_share(-own, tolerance)
    return NegativeCurvature(*measured[:6], *shares, jnp.trace(term), jnp.sum(term**2))


def _negative_share(values: Float[Array, "*S D"], tolerance: float | None) -> Float[Array, "*S"]:
    rounding = 10 * values.shape[-1] * jnp.finfo(values.dtype).eps
    relative = rounding if tolerance is None else tolerance
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.mean((values < -relative * largest).astype(values.dtype), axis=-1)


def _gathered(measured: NegativeCurvature, count: int) -> NegativeCurvature:
    """The measures of `count` examples, or of one matrix with blocks for slots, as scalars."""

    def gather(field: str, values: Array) -> Scalar:
        if field in ("least", "greatest"):
            return jnp.min(values) if field == "least" else jnp.max(values)
        mean = jnp.sum(values) / (jnp.size(values) if field.endswith("share") else count)
        return jnp.sqrt(mean) if field.endswith("norm") else mean

    known = measured._asdict().items()
    return NegativeCurvature(**{f: gather(f, x) for f, x in known if x is not None})


def _example_terms(
    objective: Objective, graph: Graph, params: PyTree
) -> Callable[[Batch], dict[str, Float[Array, "D D"]]]:
    """`(input, target) -> {use: T}` of one example, in all entries of a use's output."""
    leaves = named_leaves(params)
    shared = graph.shared_values(leaves)
    variables = {name: use.output for name, use in graph.uses.items()}

    def terms(example: Batch) -> dict[str, Array]:
        inputs, target = batch_of(example)
        loss = loss_of(objective.loss, target)

        def value(probes: dict[str, Array]) -> tuple[Scalar, PyTree]:
            outputs, _ = graph.forward(leaves, inputs, probes)
            return jnp.sum(jax.vmap(loss)(outputs, target)), outputs

        # Gradients at all pre-activations and at the outputs: where the sum over k ends.
        behind, outputs = jax.grad(value, has_aux=True)(graph.probes(1))
        ends = {variables[name]: gradient for name, gradient in behind.items()}
        last = loss.gradients(outputs, target)
        data = jax.tree.leaves(example[0])
        values = {**shared, **dict(zip(graph.model.inputs, data, strict=True))}

        def against_gradients(own: Var, change: Float[Array, " D"]) -> Scalar:
            """The next pre-activations times their gradients, where one of them changes."""
            env, total = dict(values), jnp.zeros((), change.dtype)
            for equation in graph.model.jaxpr.eqns:
                if all(v in values for v in equation.outvars):
                    continue
                evaluate([equation], env)
                for v in equation.outvars:
                    if v is own:
                        env[v] = env[v] + change.reshape(env[v].shape)
                    elif v in ends:  # the next layer: what lies behind it is not this term's
                        total = total + _inner(ends[v], env[v], change.dtype)
                        env[v] = jax.lax.stop_gradient(env[v])
            flat = [read(env, v).reshape(-1).astype(change.dtype) for v in graph.model.outputs]
            return total + _inner(last, jnp.concatenate(flat), change.dtype)

        return {
            name: jax.hessian(functools.partial(against_gradients, v))(
                jnp.zeros(size(v), v.aval.dtype)
            )
            for name, v in variables.items()
        }

    return terms


def _inner(a: Array, b: Array, dtype: Any) -> Scalar:
    return jnp.sum(a.reshape(-1).astype(dtype) * b.reshape(-1).astype(dtype))
