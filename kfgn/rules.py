"""What each primitive's Jacobian looks like: one line per primitive.

The rules only classify; every Jacobian itself comes from automatic
differentiation. A primitive not named here is *general*: correct, and treated
by its vector-Jacobian product example by example.
"""

from __future__ import annotations

from kfgn.jaxpr import Equation, FlatModel, Role, variables
from kfgn.source import keeps_order

# Linear in all differentiable operands together.
_LINEAR = {
    "add", "add_any", "sub", "neg", "copy", "copy_p", "convert_element_type", "real", "imag",
    "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "slice", "pad",
    "concatenate", "split", "reduce_sum", "cumsum", "reduce_window_sum", "reduce_precision",
    "optimization_barrier",
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


def is_linear(model: FlatModel, equation: Equation) -> bool:
    """Whether the Jacobian is the same for every example (offsets may differ)."""
    name = equation.primitive.name
    roles = [_role(model, atom) for atom in equation.invars]
    if name in _LINEAR:
        return True
    if name in _MULTILINEAR:
        return roles.count(Role.ACTIVE) == 1 and Role.PASSIVE not in roles
    allowed = _LINEAR_IN.get(name)
    if allowed is None:
        return False
    # A passive operand in a linear position is an offset, elsewhere a factor.
    return all(role < Role.PASSIVE or i in allowed for i, role in enumerate(roles))


def is_heavy(equation: Equation) -> bool:
    """Whether a linear equation should stay a node of its own."""
    return equation.primitive.name in _HEAVY


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
    if equation.primitive.name in _ELEMENTWISE or keeps_order(equation):
        return True
    body = equation.params.get(_CALLS.get(equation.primitive.name, ""))
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
