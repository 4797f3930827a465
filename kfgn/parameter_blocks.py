"""Each layer's Hessian by weights and biases, and where it is not positive semi-definite.

Equation numbers with a V are those of Veitch, "Second order optimisation methods
in Deep Learning". With x_n a layer's input and H_n the Hessian in its
pre-activation, which the recursion (V66)-(V67) brings down (his Algorithm 3),

    weights and weights   (1/N) sum_n  x_n x_n' ⊗ H_n     (V68), (V78)
    weights and biases    (1/N) sum_n  x_n ⊗ H_n          (V69), (V79)
    biases and biases     (1/N) sum_n  H_n                (V70), (V80)

on the row-major vec of the kernel `[d_in, d_out]`; his has the transposed kernel.
Each is contracted as it stands: no `I ⊗ X` is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.checks import check_flag, check_not_negative
from kfgn.dense import refuse_large
from kfgn.errors import OptionError, ParameterError
from kfgn.exact import block_gauss_newton, block_hessian, example_blocks
from kfgn.graph import Graph, build_graph
from kfgn.layer import Layer
from kfgn.linalg import factor_dtype
from kfgn.objective import Objective, check_batch
from kfgn.paths import named_leaves
from kfgn.per_example import mean_over, prepare
from kfgn.products import require_batch, require_objective
from kfgn.second_order_terms import example_terms

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]


class ParameterHessian(NamedTuple):
    """A layer's Hessian by weights W (`D_W = d_in d_out`) and biases b (`D_b = d_out`).

    Arrays have a leading `[N]` per example, and one of slots for a kernel that
    stacks those of several layers. A layer without bias has `weight_weight`
    alone, and so has a parameter that belongs to no layer.
    """

    weight_weight: Array  # `[D_W, D_W]`
    weight_bias: Array | None  # `[D_W, D_b]`; its transpose is the block below the diagonal
    bias_bias: Array | None  # `[D_b, D_b]`


class ParameterHessianProducts(NamedTuple):
    """The products of the same blocks with weights `[d_in, d_out]` and biases `[d_out]`."""

    weight_weight: Callable[[Array], Array]  # weights to weights
    weight_bias: Callable[[Array], Array] | None  # biases to weights
    bias_weight: Callable[[Array], Array] | None  # weights to biases
    bias_bias: Callable[[Array], Array] | None  # biases to biases


class NegativeCurvature(NamedTuple):
    """How far one layer's Hessian H is from its Gauss-Newton matrix G, each a scalar.

    H - G holds all second-order terms of the layers above, brought down to this one, and what
    the loss itself lacks of convexity. T is the layer's own term, which enters between the next
    layers and this: after a transfer function, the diagonal `σ''(z_j) dE/dx_j` of (V87).
    """

    least: Array  # the least eigenvalue of H
    greatest: Array  # the greatest one
    negative_share: Array  # the share of eigenvalues that are negative beyond rounding
    second_order_trace: Array  # the trace of H - G
    second_order_norm: Array  # the Frobenius norm of H - G
    gauss_newton_norm: Array  # the Frobenius norm of G, to compare with
    # The same of T in the pre-activation, which `of="block"` leaves out:
    term_negative_share: Array | None = None
    term_positive_share: Array | None = None
    term_trace: Array | None = None
    term_norm: Array | None = None


def parameter_hessian(
    objective: Objective, *, per_example: bool = False, as_matvec: bool = False
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """The exact Hessian of the loss in each layer's weights and biases, without l2.

    Args:
      objective: the objective.
      per_example: whether to give every example's, with a leading `[N]`, rather
        than their mean.
      as_matvec: whether to give `ParameterHessianProducts`, which form no matrix,
        rather than a `ParameterHessian`.

    Returns:
      `(params, batch) -> {layer: blocks}`.

    Raises:
      OptionError: an option has a wrong value, or a block would hold over 2 GiB.
    """
    require_objective(objective)
    check_flag("per_example", per_example)
    check_flag("as_matvec", as_matvec)

    def dense(params, batch):
        prepared = prepare(objective, params, batch, hessian=True)
        graph, count = prepared.graph, jax.tree.leaves(prepared.arguments)[0].shape[0]
        _refuse_large_blocks(graph, params, prepared.dtype, count if per_example else 1)
        blocks = example_blocks(prepared, params)
        if per_example:
            found = jax.lax.map(blocks, prepared.arguments)
        else:
            found = mean_over(blocks, prepared.arguments, 1)
        return {name: _split(block, graph.layers.get(name)) for name, block in found.items()}

    def matvecs(params, batch):
        inputs, _, _ = require_batch(objective, params, batch)
        graph, leaves = build_graph(objective, params, inputs), named_leaves(params)
        if per_example:
            found = _example_matvecs(objective, graph, params, batch)
        else:
            found = block_hessian(objective, as_matvec=True)(params, batch)
        return {
            name: _products(name, found[name], graph.layers.get(name), leaves) for name in found
        }

    return matvecs if as_matvec else dense


def negative_curvature(
    objective: Objective, *, of: str = "pre_activation", tol: float | None = None
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
      tol: eigenvalues below `-tol` times the largest magnitude of the same matrix
        are negative; None stands for ten rounding units times its size.

    Returns:
      `(params, batch) -> {name: NegativeCurvature}`, by the names of
      `pre_activation_hessian` or `block_hessian`.

    Raises:
      OptionError: an option has a wrong value, or a block would hold over 2 GiB.
    """
    require_objective(objective)
    if of not in ("pre_activation", "block"):
        raise OptionError(f'of must be "pre_activation" or "block", found {of!r}')
    if tol is not None:
        check_not_negative("tol", tol)

    def of_blocks(params, batch):
        inputs, _ = check_batch(batch)
        dtype = factor_dtype(*(x.dtype for x in jax.tree.leaves(params)))
        _refuse_large_blocks(build_graph(objective, params, inputs), params, dtype, 1)
        exact = block_hessian(objective)(params, batch)
        positive = block_gauss_newton(objective)(params, batch)
        return {n: _gathered(_measured(h, positive[n], tol), 1) for n, h in exact.items()}

    def of_pre_activations(params, batch):
        exact, positive = (prepare(objective, params, batch, h, exact=False) for h in (True, False))
        own_terms = example_terms(objective, exact.graph, params)

        def one(arguments):
            h, g = exact.walk_one(arguments[0]).uses, positive.walk_one(arguments[1]).uses
            t = own_terms(arguments[2])
            return {name: _measured(h[name], g[name], tol, t[name]) for name in h}

        found = jax.lax.map(one, (exact.arguments, positive.arguments, tuple(batch)))
        count = jax.tree.leaves(exact.arguments)[0].shape[0]
        return {name: _gathered(measured, count) for name, measured in found.items()}

    return of_blocks if of == "block" else of_pre_activations


def _measured(
    hessian: Array, positive: Array, tol: float | None, term: Array | None = None
) -> NegativeCurvature:
    """The measures of matrices `[..., D, D]`, with squared norms."""
    values, beyond = jnp.linalg.eigvalsh(hessian), hessian - positive
    measured = NegativeCurvature(
        values[..., 0],
        values[..., -1],
        _negative_share(values, tol),
        jnp.trace(beyond, axis1=-2, axis2=-1),
        jnp.sum(beyond**2, axis=(-2, -1)),
        jnp.sum(positive**2, axis=(-2, -1)),
    )
    if term is None:
        return measured
    own = jnp.linalg.eigvalsh(term)
    shares = _negative_share(own, tol), _negative_share(-own, tol)
    return NegativeCurvature(*measured[:6], *shares, jnp.trace(term), jnp.sum(term**2))


def _negative_share(values: Array, tol: float | None) -> Array:
    relative = 10 * values.shape[-1] * jnp.finfo(values.dtype).eps if tol is None else tol
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.mean((values < -relative * largest).astype(values.dtype), axis=-1)


def _gathered(measured: NegativeCurvature, count: int) -> NegativeCurvature:
    """The measures of `count` examples, or of one matrix with blocks for slots, as scalars."""

    def gather(field: str, values: Array) -> Array:
        if field in ("least", "greatest"):
            return jnp.min(values) if field == "least" else jnp.max(values)
        mean = jnp.sum(values) / (jnp.size(values) if field.endswith("share") else count)
        return jnp.sqrt(mean) if field.endswith("norm") else mean

    found = {f: gather(f, x) for f, x in measured._asdict().items() if x is not None}
    return NegativeCurvature(**found)


def _split(block: Array, layer: Layer | None) -> ParameterHessian:
    """A block `[..., D, D]` on the vec of `[groups, d_in + 1, d_out]` by weights and biases."""
    if layer is None or layer.first.bias is None:
        return ParameterHessian(block, None, None)
    use = layer.first
    places = np.arange(block.shape[-1]).reshape(use.form.groups, use.width, use.form.d_out)
    w, b = places[:, :-1].reshape(-1), places[:, -1].reshape(-1)
    return ParameterHessian(
        block[..., w[:, None], w], block[..., w[:, None], b], block[..., b[:, None], b]
    )


def _example_matvecs(
    objective: Objective, graph: Graph, params: PyTree, batch: Batch
) -> dict[str, Callable[[Array], Array]]:
    """By block, the product of every example's block with the same matrix, `[N, ...]`."""

    def matvec_of(name):
        def matvec(matrix):
            def one(example):
                alone = jax.tree.map(lambda a: a[None], example)
                return block_hessian(objective, as_matvec=True)(params, alone)[name](matrix)

            return jax.lax.map(one, tuple(batch))

        return matvec

    return {name: matvec_of(name) for name in (*graph.layers, *graph.reasons)}


def _products(
    name: str, matvec: Callable[[Array], Array], layer: Layer | None, leaves: dict[str, Array]
) -> ParameterHessianProducts:
    """A block's product with `[..., d_in + 1, d_out]`, by weights and biases."""
    shape = jnp.shape(leaves[name]) if layer is None else layer.matrix_shape

    def checked(vector, expected):
        if jnp.shape(vector) != expected:
            raise ParameterError(
                f"the block of {name!r} acts on an array of shape {expected}, found shape "
                f"{jnp.shape(vector)}"
            )
        return jnp.asarray(vector)

    if layer is None or layer.first.bias is None:
        return ParameterHessianProducts(lambda w: matvec(checked(w, shape)), None, None, None)
    weights, biases = (*shape[:-2], shape[-2] - 1, shape[-1]), (*shape[:-2], shape[-1])

    def of_weights(w):
        w = checked(w, weights)
        return matvec(jnp.concatenate([w, jnp.zeros((*shape[:-2], 1, shape[-1]), w.dtype)], -2))

    def of_biases(b):
        b = checked(b, biases)[..., None, :]
        return matvec(jnp.concatenate([jnp.zeros(weights, b.dtype), b], -2))

    return ParameterHessianProducts(
        lambda w: of_weights(w)[..., :-1, :],
        lambda b: of_biases(b)[..., :-1, :],
        lambda w: of_weights(w)[..., -1, :],
        lambda b: of_biases(b)[..., -1, :],
    )


def _refuse_large_blocks(graph: Graph, params: PyTree, dtype: Any, count: int) -> None:
    """Raises OptionError where `count` dense copies of a block would hold over 2 GiB."""
    leaves = named_leaves(params)
    sizes = {n: (len(x.slots), int(np.prod(x.matrix_shape))) for n, x in graph.layers.items()}
    sizes |= {n: (1, jnp.size(leaves[n])) for n in graph.reasons}
    for name, (slots, entries) in sizes.items():
        side = entries // slots
        remedy = (
            "Pass as_matvec=True to kfgn.parameter_hessian, or look at kfgn.negative_curvature "
            'of="pre_activation".'
        )
        refuse_large(f"the block of {name!r}", (count * slots, side, side), dtype, remedy)
