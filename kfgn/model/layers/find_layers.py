"""Finds the layers of a model: which uses share a block, and why a parameter has none."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.extend.core as jex
import numpy as np

from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.layers.find_uses import chosen, find_uses, meets
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use
from kfgn.model.layers.sources import Source
from kfgn.model.program.equations import Role, Var, size, variables

UNMET = "never meets data"  # in the reason of a parameter that has no curvature
LOOPED = "inside of a loop of"  # in the reason of one that only an unrolled loop might have
_FIRST_STATE = "the first state of a loop"


def find_layers(
    model: FlatModel,
    sources: dict[Var, Source],
    apart: frozenset[str] = frozenset(),
    barred: frozenset[str] = frozenset(),
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The model's layers by name, and the parameters in no layer with the reason.

    Those in `apart` are biases of no kernel, but layers of their own; those in `barred` are
    in no layer.
    """
    met = _data_uses(model)
    pairs, without_bias = find_uses(model, sources), set[Var]()
    uses = chosen(pairs, without_bias)
    while unjoined := _unjoined(uses, met, apart):
        without_bias |= unjoined
        uses = chosen(pairs, without_bias)
    covered: dict[str, set[int]] = {name: set() for name in model.parameters}
    for name, place in (pair for use in uses for pair in meets(use)):
        covered[name].add(place)
    layers, reasons = [], {}
    for kernels in dict.fromkeys(use.kernel.names for use in uses):
        own = _biased([use for use in uses if use.kernel.names == kernels])
        names = dict.fromkeys(n for use in own for n, _ in meets(use))
        lacking = [n for n in names if n in barred or set(met[n]) - covered[n]]
        mixed = any(set(u.kernel.names) & {*names} for u in uses if u.kernel.names != kernels)
        layer = None if lacking or mixed else _grouped(kernels[0], own)
        if layer is not None:
            layers.append(layer)
            continue
        for n in names:
            reasons[n] = _reason(model, n, met[n]) if not lacking or n in lacking else (
                f"shares a layer with {lacking[0]!r}, which has no block"
            )  # fmt: skip
    inside = {name for layer in layers for name in layer.parameters}
    for name in model.parameters:
        if name not in inside:
            reasons.setdefault(name, _reason(model, name, met[name]))
    # A parameter without entries needs no block.
    return named_layers(layers), {n: r for n, r in reasons.items() if size(model.parameters[n])}


def named_layers(layers: list[Layer]) -> dict[str, Layer]:
    """Layers keyed by their kernel's path without its leaf, where that is unique."""
    paths = [layer.parameters[0] for layer in layers]
    short = [path.rpartition("/")[0] for path in paths]
    names = [s if s and short.count(s) == 1 else p for s, p in zip(short, paths, strict=True)]
    return {
        name: dataclasses.replace(layer, name=name)
        for name, layer in zip(names, layers, strict=True)
    }


def _unjoined(uses: list[Use], met: dict[str, dict[int, str]], apart: frozenset[str]) -> set[Var]:
    """Results whose bias has to be a layer of its own.

    Kernel and bias make one block only where the bias is added to uses of that
    kernel alone, and slices of the kernel have biases of their own.
    """
    partners: dict[str, list[Use]] = {}
    for use in uses:
        for name in dict.fromkeys(n for n, _ in meets(use)):
            partners.setdefault(name, []).append(use)
    bad: set[Var] = set()
    for use in uses:
        if use.bias is None:
            continue
        names = use.bias.source.names
        own, others = partners[names[0]], partners[use.kernel.name]
        alike = all(partners[n] == own for n in names)
        alike = alike and all(partners[n] == others for n in use.kernel.names)
        alone = all(len(met[n]) == len(own) for n in names) and all(u in others for u in own)
        whole = {u.bias.source.names for u in others if u.bias is not None} == {names}
        joins = not apart.intersection(names) and alike and alone and whole and _biased(others)
        if not joins or _shared_by_slices(own):
            bad.add(use.equations[0].outvars[0])
    return bad


def _shared_by_slices(uses: list[Use]) -> bool:
    """Whether slices of a kernel share entries of the bias, or one slice has several biases."""
    if len(uses) == 1:
        return False
    orders: dict[int, np.ndarray] = {}  # of the bias, by the slice's first entry
    for use in uses:
        assert use.bias is not None
        order = orders.setdefault(_first_entry(use.labels()), use.bias.order)
        if not _same(order, use.bias.order):
            return True
    entries = np.concatenate([order.reshape(-1) for order in orders.values()])
    return np.unique(entries).size < entries.size


def _biased(uses: list[Use]) -> list[Use]:
    """The uses of a kernel, those with a bias first; where it is not added, it is, zero times.

    So a kernel that derivatives of a layer meet, too, keeps one block with its bias.
    Empty where a use has a slice of the kernel for itself, and no bias.
    """
    known = [(use.labels(), use.bias) for use in uses if use.bias is not None]
    if len(known) in (0, len(uses)):
        return uses
    if any(use.derived for use in uses):
        return []
    found = []
    for use in uses:
        if use.bias is None:
            own = use.labels()
            bias = next((b for labels, b in known if _same(labels, own)), None)
            if bias is not None:
                absent = dataclasses.replace(bias.source, factor=0.0)
                use = dataclasses.replace(use, bias=dataclasses.replace(bias, source=absent))
            elif not any(_transposed(labels, own) for labels, _ in known):
                return []
        found.append(use)
    return sorted(found, key=lambda use: use.bias is None)


def _grouped(name: str, uses: list[Use]) -> Layer | None:
    """One layer of all uses of a kernel, or None where they do not fit together."""
    if len(uses) == 1:
        return Layer(name, ((uses[0],),), order=_order(uses))
    labels = [use.labels() for use in uses]
    slots: list[list[int]] = []
    flipped: set[Use] = set()
    for k, seen in enumerate(labels):
        for slot in slots:
            known = labels[slot[0]]
            if _same(known, seen) and _fit(uses[slot[0]], uses[k]):
                slot.append(k)
                break
            if _transposed(known, seen) and uses[k].bias is None:
                slot.append(k)
                flipped.add(uses[k])
                break
        else:
            slots.append([k])
    first = [labels[slot[0]] for slot in slots]
    if any(x.shape != first[0].shape for x in first):
        return None
    used = np.concatenate([x[x >= 0] for x in first])
    other = any(use.form.indexed or use.derived for use in uses)
    if np.unique(used).size != used.size or (flipped and other and len(slots) > 1):
        return None
    if any(uses[s[0]].width != uses[slots[0][0]].width for s in slots):
        return None
    ordered = sorted(slots, key=lambda slot: _first_entry(labels[slot[0]]))
    whole = tuple(tuple(uses[k] for k in slot) for slot in ordered)
    order = _order([slot[0] for slot in whole])
    return Layer(name, whole, frozenset(flipped), order=order)


def _order(uses: list[Use]) -> tuple[int, ...] | None:
    """The order of the kernels in a parameter among all groups; None where they are in order.

    Loops may run over a stack in any order, and take several kernels at a time.
    """
    form = uses[0].form
    if form.slots == 1 or (len(uses) == 1 and uses[0].kernel.is_stack):
        return None
    first = [_first_entry(x) for use in uses for x in use.labels().reshape(form.slots, -1)]
    places = np.argsort(first)
    if np.all(np.diff(places) == 1):
        return None
    groups = np.arange(form.groups * len(uses)).reshape(len(places), -1)
    return tuple(groups[places].reshape(-1).tolist())


def _first_entry(labels: np.ndarray) -> int:
    return int(labels[labels >= 0].min())


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.all(a == b))


def _transposed(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape[0] == b.shape[0] == 1 and _same(a, b.swapaxes(-1, -2))


def _fit(a: Use, b: Use) -> bool:
    """Whether two uses of the same kernel entries have the same bias entries."""
    if a.bias is None or b.bias is None:
        return a.bias is b.bias
    return _same(a.bias.order, b.bias.order)


def _data_uses(model: FlatModel) -> dict[str, dict[int, str]]:
    """For each parameter, the equations where it, or what is made of it, meets data."""
    made_of: dict[Var, frozenset[str]] = {v: frozenset([n]) for n, v in model.parameters.items()}
    uses: dict[str, dict[int, str]] = {name: {} for name in model.parameters}
    _meetings(model, model.jaxpr, made_of, uses)
    for v in variables(model.outputs):
        for name in made_of.get(v, ()):
            uses[name][id(v)] = "the model's output itself"
    return uses


def _meetings(
    model: FlatModel,
    jaxpr: jex.Jaxpr,
    made_of: dict[Var, frozenset[str]],
    uses: dict[str, dict[int, str]],
    where: str = "",
) -> None:
    def names_of(atoms: Iterable[Any]) -> frozenset[str]:
        own = [v for v in variables(atoms) if model.roles[v] is Role.PARAMETER]
        return frozenset[str]().union(*(made_of.get(v, frozenset()) for v in own))

    for equation in jaxpr.eqns:
        operands, names = variables(equation.invars), names_of(equation.invars)
        if all(model.roles[v] <= Role.PARAMETER for v in operands):
            made_of.update(dict.fromkeys(equation.outvars, names))
        elif (loop := model.loops.get(id(equation))) is not None:
            for atom, v in zip(equation.invars, loop.body.invars, strict=True):
                if model.roles[v] is not Role.ACTIVE:
                    made_of[v] = names_of([atom])
                elif v in model.reached:
                    for name in names_of([atom]):
                        uses[name][id(v)] = _FIRST_STATE
            consts, states = loop.parts
            pure = names_of(loop.body.invars)  # what such states may be made of later
            made_of.update(dict.fromkeys(loop.body.invars[consts : consts + states], pure))
            inside = where if loop.once else f" {LOOPED} {loop.length} iterations"
            _meetings(model, loop.body, made_of, uses, inside)
            pairs = zip(equation.outvars, loop.body.outvars, strict=True)
            made_of.update({out: names_of([v]) for out, v in pairs})
        elif model.reached.keys() & equation.outvars:
            for name in names:
                uses[name][id(equation)] = _description(equation, names - {name}) + where


def _description(equation: Any, others: frozenset[str]) -> str:
    if equation.primitive.name == "optimization_barrier":
        return _FIRST_STATE
    with_others = f" together with {', '.join(map(repr, sorted(others)))}" if others else ""
    return f"`{equation.primitive.name}`{with_others}"


def _reason(model: FlatModel, name: str, met: dict[int, str]) -> str:
    shape = model.parameters[name].aval.shape
    if not met:
        return f"(shape {shape}) {UNMET}: no output depends on it, or none has a derivative"
    where = ", ".join(met.values())
    if len(met) > 1:
        return f"(shape {shape}) meets data {len(met)} times: in {where}"
    return f"(shape {shape}) meets data in {where}, in a way that is no layer"
