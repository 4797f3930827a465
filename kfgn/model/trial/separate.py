"""Programs that provably act on each example alone, told without compiling or running them.

A program is read at several sizes of the batch. Each value either is the same at all of them,
whatever the examples are, or has an axis along which entry k depends on example k alone, in one
and the same way for every k. What is not surely of one kind proves nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from kfgn.model.flatten.loops import counts_of
from kfgn.model.program.equations import Equation, Var, is_variable
from kfgn.model.program.primitives import TABLE
from kfgn.model.trial.rebatched import rebatched

#: The axis of examples of a value; None for one that is the same for every batch.
Place = int | None

# Parameters that follow the size of the batch, as the shapes of the outputs do.
_SIZES = {"shape", "new_sizes", "limit_indices", "reps"}
_ENTRYWISE = {name for name, row in TABLE.items() if row.elementwise} | {
    "convert_element_type", "reduce_precision", "copy", "copy_p", "random_fold_in",
    "shift_left", "shift_right_logical", "shift_right_arithmetic",
}  # fmt: skip


class _Unproven(Exception):
    """Examples may meet here."""


def acts_alone(
    programs: Sequence[jex.ClosedJaxpr],
    counts: Sequence[int],
    given: Sequence[Place],
    outputs: int | None = None,
) -> bool:
    """Whether a model surely is one function of each example, as read at several sizes.

    Args:
      programs: the model at each size.
      counts: the sizes.
      given: where the examples are in each argument; None for one that all share.
      outputs: how many of its results count, the first ones; None for all.
    """
    try:
        places = _walk(programs, counts, given)
    except Exception:  # what is not followed, such as an equation of another jax, proves nothing
        return False
    return not any(places[:outputs])


def _walk(programs: Sequence[Any], counts: Sequence[int], given: Sequence[Place]) -> list[Place]:
    """The places of the outputs of jaxprs, from those of their arguments."""
    jaxprs = [rebatched(getattr(program, "jaxpr", program)) for program in programs]
    first, *others = jaxprs
    _require(all(len(j.eqns) == len(first.eqns) for j in others))
    for known in zip(*(getattr(program, "consts", ()) for program in programs), strict=True):
        _require(_are_equal(known))
    places: dict[Var, Place] = dict.fromkeys(first.constvars)
    places.update(zip(first.invars, given, strict=True))
    for equations in zip(*(j.eqns for j in jaxprs), strict=True):
        places.update(zip(equations[0].outvars, _outputs(equations, counts, places), strict=True))
    return [_place_of(places, atoms) for atoms in zip(*(j.outvars for j in jaxprs), strict=True)]


def _place_of(places: dict[Var, Place], atoms: Sequence[Any]) -> Place:
    """The place of an operand, which each size has."""
    if any(map(is_variable, atoms)):
        _require(all(map(is_variable, atoms)))
        return places[atoms[0]]
    _require(_are_equal([atom.val for atom in atoms]))
    return None


def _outputs(
    equations: Sequence[Equation], counts: Sequence[int], places: dict[Var, Place]
) -> list[Place]:
    """The places of what an equation makes, the same equation at each size."""
    equation, name = equations[0], equations[0].primitive.name
    _require(all(e.primitive.name == name and not e.effects for e in equations))
    read = [_place_of(places, atoms) for atoms in zip(*(e.invars for e in equations), strict=True)]
    body = "jaxpr" if name == "scan" else TABLE[name].body if name in TABLE else ""
    if not body or name == "scan":
        _require(_have_equal_params(equations, {*_SIZES, body}))
    if body:
        inner = [e.params[body] for e in equations]
        found = _of_scan(equation, inner, counts, read) if name == "scan" else _walk(
            inner, counts, read
        )  # fmt: skip
    elif all(place is None for place in read):
        moved = _follows(equations, counts)
        if moved is not None:  # what is repeated for every example
            _require(name in _REPEATS and _REPEATS[name](equation, moved))
        found = [moved] * len(equation.outvars)
    else:
        _require(name in _RULES)
        found = [_RULES[name](equation, read)] * len(equation.outvars)
    for number, place in enumerate(found):
        _require(place == _follows(equations, counts, number))
    return found


def _follows(equations: Sequence[Equation], counts: Sequence[int], number: int = 0) -> Place:
    """The axis along which an output follows the size of the batch."""
    shapes = [_shape(e.outvars[number]) for e in equations]
    _require(all(len(s) == len(shapes[0]) for s in shapes))
    moved = [k for k, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if not moved:
        return None
    _require(len(moved) == 1 and [s[moved[0]] for s in shapes] == list(counts))
    return moved[0]


def _require(condition: Any) -> None:
    if not condition:
        raise _Unproven


def _shape(atom: Any) -> tuple[Any, ...]:
    return getattr(atom.aval, "shape", ())


def _are_equal(values: Sequence[Any]) -> bool:
    """Whether values known at each size are one: the same object, or the same bits."""
    first, *others = values
    if all(x is first for x in others):
        return True
    kinds = (np.ndarray, np.generic, bool, int, float, complex)
    if not all(isinstance(x, kinds) for x in values):
        return False
    arrays = list(map(np.asarray, values))
    return len({(a.dtype, a.shape, a.tobytes()) for a in arrays}) == 1


def _have_equal_params(equations: Sequence[Equation], but: set[str]) -> bool:
    first, *others = (e.params for e in equations)
    return all(
        p.keys() == first.keys()
        and all(_are_equal((p[k], v)) or p[k] == v for k, v in first.items() if k not in but)
        for p in others
    )


def _is_spread(equation: Equation, axis: int) -> bool:
    shape = _shape(equation.invars[0])
    spread = equation.params.get("broadcast_dimensions", range(len(shape)))
    return axis not in spread or bool(shape[spread.index(axis)] == 1)


# What makes the same for every example: whether it repeats along this axis.
_REPEATS: dict[str, Callable[[Equation, int], bool]] = {
    "broadcast_in_dim": _is_spread,
    "tile": _is_spread,
    "iota": lambda equation, axis: equation.params["dimension"] != axis,
}

# A rule for each primitive: where the axis of examples is in the outputs, from where it is in
# the operands; one of them at least has it.

Rule = Callable[[Equation, Sequence[Place]], Place]


def _one(places: Iterable[Place]) -> int:
    """The only place that there is."""
    found = {place for place in places if place is not None}
    _require(len(found) == 1)
    return found.pop()


def _entrywise(equation: Equation, places: Sequence[Place]) -> Place:
    found = _one(places)
    for atom, place in zip(equation.invars, places, strict=True):
        shape = _shape(atom)
        _require(place is not None or not shape or shape[found] == 1)
    return found


def _operand(equation: Equation, places: Sequence[Place]) -> int:
    """The place in the first operand; others are single numbers, the same for all."""
    place, *others = places
    _require(place is not None and all(other is None for other in others))
    return _one(places)


def _kept_by(names: str) -> Rule:
    """All operands have the examples on one axis, which is none of those that the rule names."""

    def rule(equation: Equation, places: Sequence[Place]) -> Place:
        _require(None not in places)
        axes = equation.params[names]
        _require(_one(places) not in (axes if isinstance(axes, Iterable) else (axes,)))
        return _one(places)

    return rule


def _dropping(names: str) -> Rule:
    """Axes are dropped that are not those of the examples."""

    def rule(equation: Equation, places: Sequence[Place]) -> Place:
        place, axes = _operand(equation, places), equation.params[names]
        axes = axes if isinstance(axes, Iterable) else (axes,)
        _require(place not in axes)
        return place - sum(axis < place for axis in axes)

    return rule


def _stack(equation: Equation, places: Sequence[Place]) -> Place:
    _require(None not in places)
    return _one(places) + (equation.params["axis"] <= _one(places))


def _transpose(equation: Equation, places: Sequence[Place]) -> Place:
    return equation.params["permutation"].index(_one(places))


def _broadcast(equation: Equation, places: Sequence[Place]) -> Place:
    return equation.params["broadcast_dimensions"][_operand(equation, places)]


def _reshape(equation: Equation, places: Sequence[Place]) -> Place:
    place = _operand(equation, places)
    _require(equation.params["dimensions"] is None)
    before, new = _shape(equation.invars[0]), equation.params["new_sizes"]
    ahead = math.prod(before[:place])
    found = [k for k in range(len(new)) if math.prod(new[:k]) == ahead and new[k] == before[place]]
    _require(found)
    return found[0]


def _slice(equation: Equation, places: Sequence[Place]) -> Place:
    place, params = _operand(equation, places), equation.params
    _require(params["start_indices"][place] == 0 and (params["strides"] or {place: 1})[place] == 1)
    return place


def _pad(equation: Equation, places: Sequence[Place]) -> Place:
    place = _operand(equation, places)
    _require(tuple(equation.params["padding_config"][place]) == (0, 0, 0))
    return place


def _window(equation: Equation, places: Sequence[Place]) -> Place:
    place, params = _operand(equation, places), equation.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    _require(all(params[name][place] == 1 for name in names))
    _require(tuple(params["padding"][place]) == (0, 0))
    return place


def _dot_general(equation: Equation, places: Sequence[Place]) -> Place:
    contracted, batched = equation.params["dimension_numbers"]
    free = [
        [k for k in range(len(_shape(atom))) if k not in (*contracted[side], *batched[side])]
        for side, atom in enumerate(equation.invars)
    ]
    left, right = places
    if left is not None and right is not None:
        _require((left, right) in zip(*batched, strict=True))
        return list(batched[0]).index(left)
    side, place = (0, left) if right is None else (1, right)
    _require(place in free[side])
    return len(batched[0]) + side * len(free[0]) + free[side].index(_one(places))


def _convolution(equation: Equation, places: Sequence[Place]) -> Place:
    numbers = equation.params["dimension_numbers"]
    _require(_operand(equation, places) == numbers.lhs_spec[0])
    _require(equation.params["batch_group_count"] == 1)
    return int(numbers.out_spec[0])


def _gather(equation: Equation, places: Sequence[Place]) -> Place:
    """Look-ups in a table that all examples share, or in each example's own."""
    numbers, (table, place) = equation.params["dimension_numbers"], places
    if table is not None:
        pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        _require((table, place) in pairs)
    _require(place is not None and place < len(_shape(equation.invars[1])) - 1)
    rank = len(_shape(equation.outvars[0]))
    return [k for k in range(rank) if k not in numbers.offset_dims][_one([place])]


def _of_scan(
    equation: Equation, bodies: Sequence[Any], counts: Sequence[int], places: Sequence[Place]
) -> list[Place]:
    """A loop over other axes than that of the examples."""
    consts, carried = counts_of(equation, bodies[0].jaxpr)
    given = list(places[: consts + carried])
    for place in places[consts + carried :]:
        _require(place != 0)
        given.append(None if place is None else place - 1)
    found = _walk(bodies, counts, given)
    _require(found[:carried] == given[consts : consts + carried])
    return found[:carried] + [p if p is None else p + 1 for p in found[carried:]]


_RULES: dict[str, Rule] = dict.fromkeys(_ENTRYWISE, _entrywise) | {
    **{f"random_{name}": _operand for name in ("bits", "split", "wrap", "unwrap")},
    "bitcast_convert_type": _operand,
    "transpose": _transpose,
    "stack": _stack,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "pad": _pad,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "squeeze": _dropping("dimensions"),
    "concatenate": _kept_by("dimension"),
    "split": _kept_by("axis"),
    "unstack": _dropping("axis"),
    "sort": _kept_by("dimension"),
    "rev": _kept_by("dimensions"),
    **dict.fromkeys(("argmax", "argmin"), _dropping("axes")),
    **{f"reduce_{n}": _dropping("axes") for n in ("sum", "max", "min", "prod", "and", "or", "xor")},
    **{f"cum{n}": _kept_by("axis") for n in ("sum", "max", "min", "prod", "logsumexp")},
    **{f"reduce_window_{n}": _window for n in ("sum", "max", "min")},
}
