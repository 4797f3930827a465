"""Finds the uses in a model: equations that a form reads, and the bias added to each."""

import dataclasses
from typing import Any

import numpy as np

from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.flatten.loops import Loop
from kfgn.model.layers.layer_kinds import read_form
from kfgn.model.layers.loop_uses import of_all_iterations
from kfgn.model.layers.parameter_use import Bias, Form, Use
from kfgn.model.layers.routed import read_routed
from kfgn.model.layers.sources import Source, Sources
from kfgn.model.program.dependence import keeps_order, moved, moves_entries
from kfgn.model.program.equations import Equation, Role, Var, is_variable, variables
from kfgn.model.program.primitives import row_of


def find_uses(model: FlatModel, sources: Sources) -> list[tuple[Use, Use]]:
    """Every use alone, and with its bias where it has one, in the order of their equations.

    Where a bias is added, it is found as a use of its own, too: see `chosen`.
    """
    pairs = []
    for equation, around in model.every_equation:
        routed = read_routed(model, equation, sources)
        if routed is not None and routed.output in model.reached:
            pairs += [] if around else [(routed, routed)]  # what is chosen in a loop is not read
            continue
        found = _read(model, equation, sources)
        if found is None or equation.outvars[0] not in model.reached:
            continue
        form, side = found
        use = _use(equation, side, form, sources)
        joined = use if form.indexed else _with_bias(use, sources, model.readers)
        whole = _of_loops(use, around, model)
        if whole is not None:
            pairs.append((whole, _of_loops(joined, around, model) or whole))
    return pairs


def _of_loops(use: Use, around: tuple[Loop, ...], model: FlatModel) -> Use | None:
    """The use in all iterations of the loops around it."""
    late = model.reached[use.equations[0].outvars[0]]
    found: Use | None = use
    for loop in reversed(around):
        found = found and of_all_iterations(found, loop, late.get(loop, 0))
    return found


def chosen(pairs: list[tuple[Use, Use]], without_bias: set[Var]) -> list[Use]:
    """One of each pair: without bias for these results; no use whose parameter is a bias then."""
    uses = [
        alone if alone.equations[0].outvars[0] in without_bias else joined
        for alone, joined in pairs
    ]
    taken = {id(use.equations[-1]) for use in uses if use.bias is not None}
    return [use for use in uses if not (use.form.additive and id(use.equations[0]) in taken)]


def meets(use: Use) -> list[tuple[str, int]]:
    """The parameters that a use covers, each with the equation where it meets data."""
    found = [(name, id(use.equations[0])) for name in use.kernel.names]
    if use.bias is not None:
        found += [(name, id(use.equations[-1])) for name in use.bias.source.names]
    return found


def constant_states(model: FlatModel, sources: Sources) -> set[Var]:
    """Constants that take the place of data beside a parameter.

    The first state of a recurrent layer meets a kernel which elsewhere meets
    data: as data, its product with the kernel is one more use like the others.
    So it is of one row alone: the kernel of one output, in derivatives by the
    inputs, meets the constant cotangent. And rows that are looked up may be the
    same for every example.
    """
    with_data: set[str] = set()
    constants: list[tuple[str, Var]] = []
    looked_up: set[Var] = set()
    kernels = _kernels(model, sources)
    for equation, _ in model.every_equation:
        looks_up = equation.primitive.name == "gather" and equation.outvars[0] not in kernels
        if looks_up and equation.invars[0] in sources:
            looked_up.update(v for v in variables(equation.invars[1:]) if v not in sources)
        if equation.primitive.name != "dot_general" or len(variables(equation.invars)) != 2:
            continue
        for side, v in enumerate(equation.invars):
            other: Any = equation.invars[1 - side]
            if v in sources and model.roles[other] >= Role.PASSIVE:
                with_data.update(sources[v].names)
            elif v in sources and model.roles[other] is Role.CONSTANT:
                constants += [(name, other) for name in sources[v].names]
                if _is_one_row(equation, 1 - side):
                    with_data.update(sources[v].names)
    return {v for name, v in constants if name in with_data} | {
        v for v in looked_up if model.roles[v] is Role.CONSTANT
    }


def _is_one_row(product: Equation, side: int) -> bool:
    """Whether an operand has no axes but those that the product sums over, or of one entry."""
    contracted = product.params["dimension_numbers"][0][side]
    shape = product.invars[side].aval.shape
    return all(n == 1 for axis, n in enumerate(shape) if axis not in contracted)


def _kernels(model: FlatModel, sources: Sources) -> set[Var]:
    """The values that kernels of products are made of, by entries moved."""
    found: set[Var] = set()
    for equation, _ in reversed(model.every_equation):
        product = equation.primitive.name in ("dot_general", "conv_general_dilated")
        if product or found.intersection(equation.outvars):
            found.update(v for v in variables(equation.invars) if v in sources)
    return found


def _read(model: FlatModel, equation: Equation, sources: Sources) -> tuple[Form, int] | None:
    """The form of an equation where one operand is a kernel and the other is data."""
    operands = variables(equation.invars)
    kernels = [v for v in operands if v in sources]
    if len(kernels) != 1 or len(operands) < 2 or len(equation.outvars) != 1:
        return None
    side = equation.invars.index(kernels[0])
    data = [v for v in operands if v is not kernels[0]]
    if any(model.roles[v] < Role.PASSIVE for v in data):
        return None
    if model.roles[equation.outvars[0]] is not Role.ACTIVE:
        return None
    form = read_form(equation, side, sources[equation.invars[side]])
    return None if form is None else (form, side)


def _use(equation: Equation, side: int, form: Form, sources: Sources) -> Use:
    kernel = equation.invars[side]
    data = next(v for v in variables(equation.invars) if v is not kernel)
    source = sources[kernel]
    if form.additive:
        source = _signed(source, equation, side)
    return Use(form, source, None, data, equation.outvars[0], (equation,))


def _signed(source: Source, equation: Equation, side: int) -> Source:
    """The source with the sign of operand `side` of a sum; of what else there is, as it is."""
    signs = row_of(equation).signs
    return dataclasses.replace(source, factor=signs[side] * source.factor) if signs else source


def _with_bias(use: Use, sources: Sources, readers: dict[Var, list[Equation | None]]) -> Use:
    """Follows the product, as long as nothing else reads it, to the addition of a bias."""
    value, chain = use.output, []
    moves: list[Equation] = []
    while len(readers.get(value, ())) == 1 and (equation := readers[value][0]) is not None:
        chain.append(equation)
        if len(row_of(equation).signs) == 2:
            bias = _bias(use, moves, equation, value, sources)
            if bias is None:
                return use
            where = _order(use, moves)
            side = equation.invars.index(value)
            return dataclasses.replace(
                use,
                kernel=_signed(use.kernel, equation, side),
                sign=row_of(equation).signs[side],
                bias=bias,
                output=equation.outvars[0],
                equations=(*use.equations, *chain),
                order=where,
            )
        if not moves_entries(equation) or equation.outvars[0].aval.size != value.aval.size:
            return use
        moves.append(equation)
        value = equation.outvars[0]
        if len(equation.outvars) != 1:
            return use
    return use


def _along(use: Use, moves: list[Equation], labels: np.ndarray) -> np.ndarray:
    """Labels of the product's entries, moved as its entries are."""
    labels = labels.reshape(use.output.aval.shape)
    for equation in moves:
        labels = moved(equation, labels)
    return labels


def _order(use: Use, moves: list[Equation]) -> np.ndarray | None:
    """Where each entry of the product stands after the moves; None if they keep the order."""
    if all(map(keeps_order, moves)):
        return None
    return np.argsort(_along(use, moves, np.arange(use.output.aval.size)).reshape(-1))


def _bias(
    use: Use, moves: list[Equation], equation: Equation, value: Var, sources: Sources
) -> Bias | None:
    """The bias that the equation adds, if it gives every output of every group one entry."""
    side = [atom is value for atom in equation.invars].index(False)
    other = equation.invars[side]
    source = sources.get(other) if is_variable(other) else None
    form, count = use.form, use.form.groups * use.form.d_out
    if source is None or set(source.names) & set(use.kernel.names):
        return None
    if value.aval.shape != equation.outvars[0].aval.shape:
        return None
    # Which unit (s, o) stands at each entry of the product, and which bias is added there.
    places = form.outputs(np.arange(use.output.aval.size).reshape(use.output.aval.shape))
    unit = np.empty(use.output.aval.size, np.int64)
    names = np.arange(count).reshape(form.groups, 1, form.d_out)
    unit[places.reshape(-1)] = np.broadcast_to(names, places.shape).reshape(-1)
    units = _along(use, moves, unit).reshape(-1)
    added = np.broadcast_to(source.labels(), value.aval.shape).reshape(-1)
    order = np.zeros(count, np.int64)
    order[units] = added
    if np.any(order[units] != added) or np.any(order < 0) or np.unique(order).size != count:
        return None
    return Bias(_signed(source, equation, side), order.reshape(form.groups, form.d_out))
