"""Products with the axes of size 1 that `jnp.matmul` drops before them and puts back after them.

Of a batch of one example it drops the axis of examples, too, so that the program reads otherwise
than that of two.
"""

import collections
from typing import Any

from kfgn.model.program.equations import Equation, is_variable


def rebatched(jaxpr: Any) -> Any:
    """A jaxpr where `squeeze, squeeze, dot_general, broadcast_in_dim` is one `dot_general`."""
    uses = collections.Counter(
        atom for e in (*jaxpr.eqns, jaxpr) for atom in _read(e) if is_variable(atom)
    )
    made = {out: e for e in jaxpr.eqns for out in e.outvars}

    def only(atom: Any, name: str) -> Equation | None:
        """The equation of that name that makes a value for one reader."""
        found = made.get(atom) if is_variable(atom) and uses[atom] == 1 else None
        return found if found is not None and found.primitive.name == name else None

    gone, new = set[int](), {}
    for equation in jaxpr.eqns:
        if equation.primitive.name != "broadcast_in_dim":
            continue
        dot = only(equation.invars[0], "dot_general")
        squeezed = [only(atom, "squeeze") for atom in dot.invars] if dot is not None else []
        if dot is None or None in squeezed:
            continue
        numbers = _numbers(equation, dot, squeezed)
        if numbers is not None:
            gone |= {id(e) for e in (dot, *squeezed)}
            new[id(equation)] = equation.replace(
                primitive=dot.primitive,
                invars=[e.invars[0] for e in squeezed if e is not None],
                params={**dot.params, "dimension_numbers": numbers},
            )
    return jaxpr.replace(eqns=[new.get(id(e), e) for e in jaxpr.eqns if id(e) not in gone])


def _read(part: Any) -> Any:
    return part.invars if hasattr(part, "primitive") else part.outvars


def _numbers(after: Equation, dot: Equation, before: list[Any]) -> Any:
    """The dimension numbers with the dropped axes among those of the batch, if they belong."""
    contracted, batched = dot.params["dimension_numbers"]
    axes = after.params["broadcast_dimensions"]
    back = [k for k in range(len(after.params["shape"])) if k not in axes]
    dropped = [e.params["dimensions"] for e in before]
    fits = list(axes) == sorted(axes) and all(after.params["shape"][k] == 1 for k in back)
    fits = fits and all(len(d) == len(back) for d in dropped)
    count = len(batched[0]) + len(back)
    if not fits or any(k >= count for k in back):
        return None
    sides = []
    for side, equation in enumerate(before):
        kept = [k for k in range(equation.invars[0].aval.ndim) if k not in dropped[side]]
        own, known = iter(sorted(dropped[side])), (kept[k] for k in batched[side])
        batch = tuple(next(own) if k in back else next(known) for k in range(count))
        sides.append((tuple(kept[k] for k in contracted[side]), batch))
    return tuple(zip(*sides, strict=True))
