"""What each primitive's Jacobian looks like: one line per primitive.

The rules only classify; every Jacobian itself comes from automatic
differentiation. A primitive that is neither named here nor registered with
`kfgn.layers.register_primitive` is *general*: correct, and treated by its
vector-Jacobian product example by example. Those of jax that are rightly
general are named, too, so that only unknown ones are announced.
"""

from __future__ import annotations

import jax.numpy as jnp

from kfgn.model.flat_model import Equation, FlatModel, Role, variables
from kfgn.model.parameter_path import keeps_order
from kfgn.model.registry import LAYERS, PRIMITIVES

# Linear in all differentiable operands together.
_LINEAR = {
    "add", "add_any", "sub", "neg", "copy", "copy_p", "convert_element_type", "real", "imag",
    "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "slice", "pad",
    "concatenate", "split", "reduce_sum", "cumsum", "reduce_window_sum", "reduce_precision",
    "optimization_barrier", "stack", "unstack", "tile", "name", "device_put",
    "sharding_constraint", "layout_constraint", "reshard",
}  # fmt: skip

# Linear in one operand where the others are the same for every example.
_MULTILINEAR = {"mul", "dot_general", "conv_general_dilated"}

# Linear in the operands at these positions; the others must be the same for
# every example (a denominator, a predicate, indices).
_LINEAR_IN = {
    "div": (0,),
    "select_n": (1, 2, 3, 4, 5, 6, 7, 8),
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter-add": (0, 2),
    "scatter-sub": (0, 2),
}

# Linear maps that mix many entries: cheaper as a node of their own than inside
# a chain, whose Jacobian is then applied example by example.
_HEAVY = {"dot_general", "conv_general_dilated", "reduce_window_sum", "cumsum", "fft"}

_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos",
    "cosh", "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "nextafter", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor", "and", "or", "not",
    "eq", "ne", "lt", "le", "gt", "ge",
}  # fmt: skip

_CUSTOM_RULES = {
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", **_CUSTOM_RULES}

# Primitives of jax whose Jacobian differs per example, or which have none.
_GENERAL = {
    # arrays
    "after_all", "argmax", "argmin", "bitcast_convert_type", "broadcast_to", "clz", "complex",
    "conj", "create_token", "cumlogsumexp", "cummax", "cummin", "cumprod", "dce_sink", "empty",
    "empty2", "eq_to", "fft", "igamma", "igamma_grad_a", "igammac", "iota", "le_to", "lt_to",
    "mulhi", "polygamma", "population_count", "ragged_dot_general", "random_gamma_grad",
    "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_xor",
    "reduce_window", "reduce_window_max", "reduce_window_min", "regularized_incomplete_beta",
    "scaled_dot", "scaled_matmul", "scaled_matmul_wrapper", "scatter", "scatter-max",
    "scatter-min", "scatter-mul", "select_and_gather_add", "select_and_scatter",
    "select_and_scatter_add", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sort", "stage", "tie", "top_k", "approx_top_k", "zeros_like", "zeta",
    # linear algebra
    "cholesky", "cholesky_update", "custom_linear_solve", "eig", "eigh", "geqp3", "geqrf",
    "hessenberg", "householder_product", "lu", "lu_pivots_to_permutation", "ormqr", "qr", "schur",
    "svd", "symmetric_product", "triangular_solve", "tridiagonal", "tridiagonal_solve",
    # random numbers
    "philox2x32", "philox4x32", "random_bits", "random_clone", "random_fold_in", "random_gamma",
    "random_seed", "random_split", "random_unwrap", "random_wrap", "rng_bit_generator",
    "rng_uniform", "threefry2x32", "threefry4x32",
    # loops, calls and rules of the user's own
    "addupdate", "call", "call_exported", "checkpoint", "closed_call", "composite", "cond",
    "core_call", "custom_lin", "custom_partitioning", "custom_vmap_call", "debug_callback",
    "debug_print", "ffi_call", "get", "io_callback", "linear_call", "pallas_call",
    "platform_index", "pure_callback", "remat", "remat2", "remat_opt", "run_state", "scan",
    "shard_map", "swap", "while",
    # several devices
    "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "pbroadcast", "pmax",
    "pmin", "ppermute", "psum", "psum_invariant", "pvary", "ragged_all_to_all", "reduce_scatter",
    "with_memory_space_constraint",
    # sparse matrices, fused attention
    "bcoo_dot_general", "bcoo_dot_general_sampled", "bcoo_extract", "bcoo_fromdense",
    "bcoo_sort_indices", "bcoo_spdot_general", "bcoo_sum_duplicates", "bcoo_todense",
    "bcoo_transpose", "bcsr_dot_general", "bcsr_extract", "bcsr_fromdense", "bcsr_todense",
    "coo_fromdense", "coo_matmat", "coo_matvec", "coo_todense", "csr_fromdense", "csr_matmat",
    "csr_matvec", "csr_todense", "spsolve", "todense",
    "dot_product_attention_fwd_wrapper", "dot_product_attention_fwd",
}  # fmt: skip

# Those of them whose derivative does not exist, or only with some options.
_PARTLY_DIFFERENTIABLE = {
    "approx_top_k", "broadcast_to", "call_exported", "cholesky_update", "composite", "cond",
    "custom_partitioning", "custom_vmap_call", "dot_product_attention_fwd",
    "dot_product_attention_fwd_wrapper", "eig", "ffi_call", "geqp3", "geqrf", "hessenberg",
    "householder_product", "igamma_grad_a", "io_callback", "lu_pivots_to_permutation",
    "nextafter", "ormqr", "pallas_call", "pmax", "pmin", "polygamma", "pure_callback", "qr",
    "reduce", "reduce_window", "regularized_incomplete_beta", "rng_uniform", "scaled_dot",
    "scaled_matmul", "scaled_matmul_wrapper", "scatter", "scatter-mul", "schur",
    "select_and_gather_add", "select_and_scatter", "svd", "symmetric_product", "tridiagonal",
    "while", "zeta",
}  # fmt: skip

_KNOWN = {*_LINEAR, *_MULTILINEAR, *_LINEAR_IN, *_ELEMENTWISE, *_CALLS, *_GENERAL}


def is_known(equation: Equation) -> bool:
    """Whether the primitive is named here or registered."""
    name = equation.primitive.name
    return name in _KNOWN or name in PRIMITIVES or name in LAYERS


def surely_differentiable(equation: Equation) -> bool:
    """Whether the primitive is one of jax's that always have a derivative."""
    name = equation.primitive.name
    return name in _KNOWN and name not in _PARTLY_DIFFERENTIABLE


def is_linear(model: FlatModel, equation: Equation) -> bool:
    """Whether the Jacobian is the same for every example (offsets may differ)."""
    name = equation.primitive.name
    roles = [_role(model, atom) for atom in equation.invars]
    if name in PRIMITIVES:
        return _is_linear_as_registered(equation, roles)
    if name in _LINEAR:
        return True
    if name in _MULTILINEAR:
        return _has_one_factor(roles)
    allowed = _LINEAR_IN.get(name)
    if allowed is None:
        return False
    # A passive operand in a linear position is an offset, elsewhere a factor.
    return all(role < Role.PASSIVE or i in allowed for i, role in enumerate(roles))


def _is_linear_as_registered(equation: Equation, roles: list[Role]) -> bool:
    kind = PRIMITIVES[equation.primitive.name]
    if kind == "linear":
        # Data that are no floating-point numbers, such as indices, are no offsets.
        passive = [a for a, r in zip(equation.invars, roles, strict=True) if r is Role.PASSIVE]
        return all(jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in passive)
    return kind == "multilinear" and _has_one_factor(roles)


def _has_one_factor(roles: list[Role]) -> bool:
    """Whether the operands but one are the same for every example."""
    return roles.count(Role.ACTIVE) == 1 and Role.PASSIVE not in roles


def is_heavy(equation: Equation) -> bool:
    """Whether a linear equation should stay a node of its own."""
    name = equation.primitive.name
    return PRIMITIVES[name] == "multilinear" if name in PRIMITIVES else name in _HEAVY


def is_elementwise(model: FlatModel, equation: Equation) -> bool:
    """Whether output entry i depends on entry i of each differentiable operand alone."""
    entries = equation.outvars[0].aval.size
    active = [a for a in equation.invars if _role(model, a) is Role.ACTIVE]
    # A differentiable value that is broadcast has a column, no diagonal.
    return all(v.aval.size == entries for v in active) and _acts_by_entry(equation)


def _acts_by_entry(equation: Equation) -> bool:
    if len(equation.outvars) != 1:
        return False
    entries = equation.outvars[0].aval.size
    if any(v.aval.size not in (1, entries) for v in variables(equation.invars)):
        return False
    name = equation.primitive.name
    if name in PRIMITIVES:
        return PRIMITIVES[name] == "elementwise"
    if name in _ELEMENTWISE or keeps_order(equation):
        return True
    body = equation.params.get(_CALLS.get(name, ""))
    if body is None:
        return False
    return all(_acts_by_entry(inner) for inner in getattr(body, "jaxpr", body).eqns)


def joins_freely(model: FlatModel, equation: Equation) -> bool:
    """Whether a chain of elementwise operations should take this equation in.

    A sum of several differentiable values stays outside: as a linear node it
    merely copies the curvature to its summands.
    """
    active = [a for a in equation.invars if _role(model, a) is Role.ACTIVE]
    return is_elementwise(model, equation) and (len(active) == 1 or not is_linear(model, equation))


def _role(model: FlatModel, atom) -> Role:
    return model.roles[atom] if variables([atom]) else Role.CONSTANT
