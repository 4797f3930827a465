"""Spectra: of Kronecker factors in closed form, of exact matrices by Lanczos's method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from kfgn.base.checks import check_not_negative, check_whole
from kfgn.base.decompositions import eigh, eigvalsh
from kfgn.base.errors import OptionError
from kfgn.base.kronecker import eigen
from kfgn.base.linalg import factor_dtype, map_examples, matmul
from kfgn.base.types import Array, Batch, Number, PyTree, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.curvature.operator import Operator
from kfgn.curvature.operator_sum import OperatorSum


class Spectrum(NamedTuple):
    """Eigenvalues of a symmetric matrix A, damped, and what follows from them.

    >>> import jax.numpy as jnp
    >>> spectrum(jnp.diag(jnp.array([3.0, 1.0])), damping=1.0).condition.item()
    2.0
    """

    eigenvalues: Float[Array, " P"]  # of A + damping I, in ascending order

    @property
    def trace(self) -> Scalar:
        """The sum of the eigenvalues."""
        return jnp.sum(self.eigenvalues)

    @property
    def log_determinant(self) -> Scalar:
        """`log det`; -inf where an eigenvalue is 0, NaN where one is negative."""
        return jnp.sum(jnp.log(self.eigenvalues))

    @property
    def condition(self) -> Scalar:
        """The largest over the smallest eigenvalue, by size."""
        sizes = jnp.abs(self.eigenvalues)
        return jnp.max(sizes) / jnp.min(sizes)


def spectrum(
    matrix: Factors | Diagonal | Array | Curvature | Mapping[str, Any], *, damping: Number = 0.0
) -> Spectrum:
    """The spectrum of a block, or of all blocks together.

    That of `Q ⊗ G` is every product `s_i t_j` of the factors' eigenvalues.

    Args:
      matrix: the factors of a layer, `[*S d_in d_in]` and `[*S d_out d_out]`; a symmetric
        matrix or a stack of them, `[*S D D]`, as of `operator.blocks`; or a dictionary of
        such, or a curvature, for the block-diagonal matrix of all layers.
      damping: is added to every eigenvalue.

    Raises:
      OptionError: something else, or a damping below 0.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((2, 3)), (jnp.eye(2), jnp.zeros((2, 3)))
    >>> _, curvature = kfgn.value_grad_and_curvature(objective, "kflr")(w, batch)
    >>> spectrum(curvature).eigenvalues.tolist()  # half the identity
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    check_not_negative("damping", damping)
    values = jnp.sort(_eigenvalues(matrix))
    return Spectrum(values + jnp.asarray(damping).astype(values.dtype))


def _eigenvalues(matrix: Any) -> Float[Array, " P"]:
    if isinstance(matrix, Curvature):
        matrix = matrix.factors
    if isinstance(matrix, Mapping):
        return jnp.concatenate([_eigenvalues(part) for part in matrix.values()])
    if isinstance(matrix, Diagonal):
        return matrix.diagonal.reshape(-1)
    if isinstance(matrix, Factors):
        left, _, right, _ = eigen(*matrix)
        return (left[..., :, None] * right[..., None, :]).reshape(-1)
    shape = jnp.shape(matrix)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise OptionError(
            "expected kfgn.layers.Factors, square matrices [..., D, D], a curvature or a "
            f"dictionary of blocks, found a {type(matrix).__name__} of shape {shape}"
        )
    return eigvalsh(matrix).reshape(-1)


class SpectralDensity(NamedTuple):
    """A quadrature of the density of eigenvalues, `φ(t) = (1/P) sum_i δ(t - λ_i)`.

    >>> import jax.numpy as jnp
    >>> density = SpectralDensity(jnp.array([1.0, 3.0]), jnp.array([0.5, 0.5]))
    >>> round(density.smooth(jnp.array([2.0]), width=1.0).item(), 3)
    0.242
    """

    nodes: Float[Array, " M"]  # Ritz values of all probes
    weights: Float[Array, " M"]  # their sum is 1

    def smooth(self, points: Float[Array, " n"], *, width: Number) -> Float[Array, " n"]:
        """φ at these points, each node a Gaussian of this standard deviation."""
        scaled = (points[:, None] - self.nodes) / jnp.asarray(width).astype(self.nodes.dtype)
        bells = jnp.exp(-jnp.square(scaled) / 2) * self.weights
        return jnp.sum(bells, axis=1) / (width * (2 * jnp.pi) ** 0.5)


def spectral_density(
    operator: Operator | OperatorSum,
    params: PyTree,
    batch: Batch,
    key: Array,
    *,
    steps: int = 50,
    probes: int = 4,
) -> SpectralDensity:
    """The density of an exact matrix's eigenvalues by stochastic Lanczos quadrature.

    From a random direction v, `steps` products give a tridiagonal matrix whose eigenvalues
    t_i and first components w_i of its eigenvectors make `v'f(A)v ~ |v|² sum_i w_i² f(t_i)`
    exact for polynomials of degree below `2 steps`; the mean over directions is `tr f(A)/P`
    (Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019).

    Args:
      operator: `kfgn.hessian(objective)` or another.
      key: of the random directions.
      steps: products for each direction, and its number of nodes; at most P are made.
      probes: directions.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((2, 3)), (2 * jnp.eye(2), jnp.zeros((2, 3)))
    >>> density = spectral_density(
    ...     kfgn.hessian(objective), w, batch, jax.random.key(0), steps=1, probes=2
    ... )
    >>> density.nodes.round(5).tolist(), density.weights.tolist()  # twice the identity
    ([2.0, 2.0], [0.5, 0.5])
    """
    nodes, weights = _lanczos(operator, params, batch, key, steps, probes)
    return SpectralDensity(nodes.reshape(-1), weights.reshape(-1) / probes)


def largest_eigenvalues(
    operator: Operator | OperatorSum,
    params: PyTree,
    batch: Batch,
    key: Array,
    *,
    count: int = 1,
    steps: int = 50,
) -> Float[Array, " count"]:
    """The largest eigenvalues of an exact matrix, from the largest down, without the matrix.

    They are Ritz values of Lanczos's method after `steps` products: never above the
    eigenvalues, exact after P, and converged to roundoff long before where the largest
    stand apart.

    Raises:
      OptionError: `count` exceeds `steps`, or P.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((2, 1)), (jnp.diag(jnp.array([2.0, 4.0])), jnp.zeros((2, 1)))
    >>> kfgn.diagnostics.largest_eigenvalues(
    ...     kfgn.hessian(objective), w, batch, jax.random.key(0), count=2
    ... ).round(4).tolist()
    [8.0, 2.0]
    """
    check_whole("count", count, 1)
    nodes, _ = _lanczos(operator, params, batch, key, steps, 1)
    if count > nodes.shape[1]:
        raise OptionError(
            f"count is {count}, but there are {nodes.shape[1]} Ritz values, one for each of "
            "min(steps, P) products: ask for fewer, or raise steps"
        )
    return nodes[0, ::-1][:count]


def _lanczos(
    operator: Any, params: PyTree, batch: Batch, key: Array, steps: int, probes: int
) -> tuple[Float[Array, "probes s"], Float[Array, "probes s"]]:
    """Ritz values in ascending order, and the squares of the first components."""
    if not isinstance(operator, Operator | OperatorSum):
        raise OptionError(
            "operator must be kfgn.hessian(objective), kfgn.gauss_newton(objective) or "
            f"kfgn.empirical_fisher(objective), found a {type(operator).__name__}"
        )
    check_whole("steps", steps, 1)
    check_whole("probes", probes, 1)
    dtype = factor_dtype(*(jnp.result_type(x) for x in jax.tree.leaves(params)))
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, dtype), params))

    def product(v: Float[Array, " P"]) -> Float[Array, " P"]:
        own = jax.tree.map(lambda x, p: x.astype(jnp.result_type(p)), unravel(v), params)
        return ravel_pytree(operator.matvec(params, batch, own))[0].astype(dtype)

    def one(own: Array) -> tuple[Array, Array]:
        values, vectors = eigh(_tridiagonal(product, flat, min(steps, flat.size), own))
        return values, jnp.square(vectors[0])

    return map_examples(one, jax.random.split(key, probes))


def _tridiagonal(
    product: Callable[[Array], Array], like: Float[Array, " P"], steps: int, key: Array
) -> Float[Array, "s s"]:
    """A in an orthonormal basis of the products with a random vector, whose first it is.

    Where they have no more directions, as of a matrix of low rank, the basis goes on with
    another random one.
    """
    keys = jax.random.split(key, steps + 1)

    def random(own: Array) -> Float[Array, " P"]:
        return jax.random.normal(own, like.shape, like.dtype)

    def turn(carry: tuple[Array, Array, Array], own: tuple[Array, Array]) -> tuple[Any, Any]:
        basis, v, largest = carry
        k, key = own
        basis = basis.at[k].set(v)

        def rest(w: Array) -> Array:
            for _ in range(2):  # twice is enough for orthogonality to roundoff
                w = w - matmul(matmul(basis, w), basis)
            return w

        moved = product(v)
        found = rest(moved)
        largest = jnp.maximum(largest, jnp.linalg.norm(moved))
        length = jnp.linalg.norm(found)
        ends = length <= 16 * jnp.finfo(like.dtype).eps * largest
        length = jnp.where(ends, 0, length)
        found = jnp.where(ends, rest(random(key)), found)
        following = found / jnp.linalg.norm(found)
        return (basis, following, largest), (jnp.sum(v * moved), length)

    first = random(keys[0])
    start = jnp.zeros((steps, like.size), like.dtype), first / jnp.linalg.norm(first), like[0] * 0
    _, (diagonal, beside) = jax.lax.scan(turn, start, (jnp.arange(steps), keys[1:]))
    return jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)


def cosine(first: PyTree, second: PyTree) -> Scalar:
    """The cosine `u'v / (|u| |v|)` of two directions, such as an update and another's.

    >>> import jax.numpy as jnp
    >>> round(float(cosine({"w": jnp.ones(2)}, {"w": jnp.array([1.0, 0.0])})), 4)
    0.7071
    """
    u, v = (ravel_pytree(tree)[0] for tree in (first, second))
    dtype = factor_dtype(u.dtype, v.dtype)
    u, v = u.astype(dtype), v.astype(dtype)
    u, v = (x / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(dtype).tiny) for x in (u, v))
    return jnp.sum(u * v) / (jnp.linalg.norm(u) * jnp.linalg.norm(v))
