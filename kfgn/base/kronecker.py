"""Kronecker algebra: products with `Q ⊗ G`, and damped inverses of `Q ⊗ G + k I`.

Blocks act on the row-major vec of `V` `[a, b]`, so `(Q ⊗ G) vec(V)` is
`Q V G` for symmetric factors `Q` `[a, a]` and `G` `[b, b]`. All may have a
leading axis that stacks blocks, and a Q that is a diagonal may be a vector: it
then has one axis less than G.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.decompositions import cholesky, eigh, inverse_of_lower
from kfgn.base.linalg import matmul
from kfgn.base.spd_inverse import spd_inverses
from kfgn.base.types import Array, Scalar

#: What a curvature may be inverted by, see `kfgn.kfra`.
INVERSES = ("factored", "eigen", "ekfac", "two-term")

#: Q; the vector of its diagonal where it has no other entries.
Left: TypeAlias = Float[Array, "*S a a"] | Float[Array, "*S a"]


def kronecker_matvec(
    q: Left, g: Float[Array, "*S b b"], v: Float[Array, "*S a b"]
) -> Float[Array, "*S a b"]:
    """`(q ⊗ g) vec(v)` as a matrix like `v`."""
    return matmul(q[..., None] * v if is_diagonal(q, g) else matmul(q, v), g)


def is_diagonal(q: Left, g: Array) -> bool:
    """Whether `q` is the vector of a diagonal."""
    return q.ndim == g.ndim - 1


def factor_balance(q: Left, g: Float[Array, "*S b b"]) -> Float[Array, "*S"]:
    """ω of eq. (38) with the trace norm: the factors' mean eigenvalues, `sqrt(q / g)`.

    Where a factor vanishes (a layer whose units are all dead) there is nothing
    to balance, and ω is 1.
    """
    mean_q = jnp.mean(q, axis=-1) if is_diagonal(q, g) else _mean_eigenvalue(q)
    mean_g = _mean_eigenvalue(g)
    if mean_q.shape != mean_g.shape:  # blocks `[S_i, 1]` and `[1, S_o]`: one ω for all of them
        mean_q, mean_g = (jnp.mean(x, axis=(-2, -1), keepdims=True) for x in (mean_q, mean_g))
    usable = (mean_q > 0) & (mean_g > 0)
    ratio = jnp.where(usable, mean_q, 1) / jnp.where(usable, mean_g, 1)
    return jnp.sqrt(ratio)


def _roundoff(matrix: Float[Array, "*S d d"]) -> Float[Array, "*S"]:
    """What a semi-definite matrix's eigenvalues are known to, generously."""
    return 4 * jnp.finfo(matrix.dtype).eps * _trace(matrix)


def _mean_eigenvalue(matrix: Float[Array, "*S d d"]) -> Float[Array, "*S"]:
    return _trace(matrix) / matrix.shape[-1]


def _trace(matrix: Float[Array, "*S d d"]) -> Float[Array, "*S"]:
    # `jnp.trace` sums all entries, with zeros in place of others, by two loops to compile.
    entries = matrix.reshape(*matrix.shape[:-2], -1)
    return jnp.sum(entries[..., :: matrix.shape[-1] + 1], axis=-1)


class FactoredInverse(NamedTuple):
    """`(q + ω√k I)^-1` and `(g + √k/ω I)^-1`, eq. (36), the factors of `kronecker_matvec`."""

    left: Left
    right: Float[Array, "*S b b"]


def factored_inverses(
    factors: Mapping[str, tuple[Array, Array]], damping: Scalar
) -> dict[str, FactoredInverse]:
    """The factored approximations to `(q ⊗ g + damping I)^-1` of blocks by name, eqs. (36)-(38).

    Damping below a factor's own roundoff is raised to that: a matrix of fewer examples than rows
    would be singular.
    """
    matrices, shifts, left = [], [], {}
    for name, (q, g) in factors.items():
        root = jnp.sqrt(damping).astype(q.dtype)
        balance = factor_balance(q, g)
        if is_diagonal(q, g):
            left[name] = 1 / (q + (balance * root)[..., None])
        else:
            matrices.append(q)
            shifts.append(jnp.maximum(balance * root, _roundoff(q)))
        matrices.append(g)
        shifts.append(jnp.maximum(root / balance, _roundoff(g)))
    found = iter(spd_inverses(matrices, shifts))
    return {
        name: FactoredInverse(left[name] if name in left else next(found), next(found))
        for name in factors
    }


def damped_extremes(q: Left, g: Float[Array, "*S b b"], damping: Scalar) -> tuple[Scalar, Scalar]:
    """Bounds from above, by Frobenius norms, of two numbers whose exact values would cost.

    They are the largest eigenvalue of `q ⊗ g`, and the condition of the damped
    factors of eq. (36), `(q + ω√k I) ⊗ (g + √k/ω I)`, whose eigenvalues are above k.
    """
    root = jnp.sqrt(damping).astype(q.dtype)
    balance = factor_balance(q, g)
    left = jnp.max(jnp.abs(q), axis=-1) if is_diagonal(q, g) else _norm(q)
    right = _norm(g)
    condition = (left + balance * root) * (right + root / balance) / damping.astype(q.dtype)
    return jnp.max(left * right), jnp.max(condition)


def _norm(matrix: Float[Array, "*S d d"]) -> Float[Array, "*S"]:
    trace = _trace(matrix)  # no entry is larger
    scaled = matrix / jnp.where(trace > 0, trace, 1)[..., None, None]  # whose squares are in range
    return trace * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=(-2, -1)))


class TwoTermInverse(NamedTuple):
    """`K ⊗ R diag(w) (K ⊗ R)'`, the inverse of a sum of two Kronecker products."""

    left: Left  # K; the vector of a diagonal
    right: Float[Array, "*S b b"]  # R
    weights: Float[Array, "*S a b"]  # w


def two_term_inverse(
    first: tuple[Left, Array], second: tuple[Left, Array], damping: Scalar
) -> TwoTermInverse:
    """`((q + ω√k I) ⊗ (g + √k/ω I) + p ⊗ h)^-1`, exactly (Martens & Grosse 2015, appendix B).

    (q, g) is the smaller of both products, by its trace, so that the damping k, which is that
    of eq. (36), adds little to the other one: nothing where the smaller one vanishes. One
    basis diagonalizes both left factors, `K'(q + ω√k I)K = I` and `K'pK = diag(s)`, and
    another both right ones, with t; then `w = 1 / (1 + s t')`.
    """
    larger = _trace_of(*first) > _trace_of(*second)
    q, g, p, h = (
        jnp.where(larger, b, a) for a, b in zip((*first, *second), (*second, *first), strict=True)
    )
    root, balance = jnp.sqrt(damping).astype(q.dtype), factor_balance(q, g)
    if is_diagonal(q, g):
        left = 1 / jnp.sqrt(q + (balance * root)[..., None])
        s = p * jnp.square(left)
    else:
        left, s = _both_diagonal(q, p, balance * root)
    right, t = _both_diagonal(g, h, root / balance)
    return TwoTermInverse(left, right, 1 / (1 + s[..., :, None] * t[..., None, :]))


def two_term_matvec(inverse: TwoTermInverse, v: Float[Array, "*S a b"]) -> Float[Array, "*S a b"]:
    """The inverse times `vec(v)`, as a matrix like `v`."""
    k, r, weights = inverse
    vector = is_diagonal(k, r)
    turned = k[..., None] * v if vector else matmul(jnp.swapaxes(k, -1, -2), v)
    scaled = weights * matmul(turned, r)
    back = k[..., None] * scaled if vector else matmul(k, scaled)
    return matmul(back, jnp.swapaxes(r, -1, -2))


def _both_diagonal(
    a: Float[Array, "*S d d"], b: Float[Array, "*S d d"], shift: Float[Array, "*S"]
) -> tuple[Float[Array, "*S d d"], Float[Array, "*S d"]]:
    """K and s with `K'(a + shift I)K = I` and `K'bK = diag(s)`."""
    identity = jnp.eye(a.shape[-1], dtype=a.dtype)
    shift = jnp.maximum(shift, _roundoff(a))  # as in `factored_inverses`
    inverse = inverse_of_lower(cholesky(a + shift[..., None, None] * identity))
    turned = jnp.swapaxes(inverse, -1, -2)
    s, vectors = eigh(matmul(matmul(inverse, b), turned))
    return matmul(turned, vectors), jnp.maximum(s, 0)


def _trace_of(q: Left, g: Array) -> Scalar:
    """Of the whole product, all blocks together."""
    left = jnp.sum(q, axis=-1) if is_diagonal(q, g) else _trace(q)
    return jnp.sum(left * _trace(g))


class Eigen(NamedTuple):
    """Eigendecompositions of both factors; a diagonal one is its own."""

    left_values: Float[Array, "*S a"]
    left_vectors: Float[Array, "*S a a"] | None
    right_values: Float[Array, "*S b"]
    right_vectors: Float[Array, "*S b b"]


def eigen(q: Left, g: Float[Array, "*S b b"]) -> Eigen:
    """Eigendecompositions of both factors; eigenvalues below zero are roundoff."""
    left_values, left_vectors = (q, None) if is_diagonal(q, g) else eigh(q)
    right_values, right_vectors = eigh(g)
    return Eigen(
        jnp.maximum(left_values, 0), left_vectors, jnp.maximum(right_values, 0), right_vectors
    )


def apply_eigen(
    decomposition: Eigen, damping: Scalar, v: Float[Array, "*S a b"]
) -> Float[Array, "*S a b"]:
    """`(q ⊗ g + damping I)^-1 vec(v)` exactly, eq. (35)."""
    return apply_rescaled(rescaled(decomposition), damping, v)


class Rescaled(NamedTuple):
    """`U diag(s) U'` in the basis `U = U_q ⊗ U_g` of a Kronecker product's eigenvectors."""

    left_vectors: Float[Array, "*S a a"] | None  # None for the identity
    right_vectors: Float[Array, "*S b b"]
    scales: Float[Array, "*S a b"]  # s

    @property
    def basis(self) -> tuple[Array | None, Array]:
        """Both factors' eigenvectors."""
        return self.left_vectors, self.right_vectors


def rescaled(decomposition: Eigen) -> Rescaled:
    """`q ⊗ g` itself, with the products of eigenvalues for scales."""
    s, u, t, w = decomposition
    return Rescaled(u, w, s[..., :, None] * t[..., None, :])


def apply_rescaled(
    matrix: Rescaled, damping: Scalar, v: Float[Array, "*S a b"]
) -> Float[Array, "*S a b"]:
    """`(U diag(s) U' + damping I)^-1 vec(v)`."""
    u, w, scales = matrix
    v = v if u is None else matmul(jnp.swapaxes(u, -1, -2), v)
    turned = matmul(v, w) / (scales + damping)
    back = turned if u is None else matmul(u, turned)
    return matmul(back, jnp.swapaxes(w, -1, -2))


def moved(old: Rescaled, new: Rescaled) -> Rescaled:
    """The new basis, with the diagonal that the old matrix has in it for scales.

    `s'_ij = sum_kl (u'_i u_k)^2 (w'_j w_l)^2 s_kl`, whose sum is that of s.
    """
    scales = old.scales
    if old.left_vectors is not None and new.left_vectors is not None:
        scales = matmul(_overlaps(new.left_vectors, old.left_vectors), scales)
    right = _overlaps(new.right_vectors, old.right_vectors)
    return new._replace(scales=matmul(scales, jnp.swapaxes(right, -1, -2)))


def _overlaps(a: Float[Array, "*S d d"], b: Float[Array, "*S d d"]) -> Float[Array, "*S d d"]:
    return jnp.square(matmul(jnp.swapaxes(a, -1, -2), b))
