"""Layers: the equations where a parameter meets data, and the matrix each acts as.

A dense layer is a `dot_general` of one kernel with data, with the bias that is
added to its result. What happens to the parameter on the way (transpose,
reshape, cast) is followed, so that kernel and bias can be read as one matrix
`[d_in + 1, d_out]` and written back in their own layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.errors import LayerError
from kfgn.jaxpr import Equation, FlatModel, Role, Var, bind, is_complex, variables

Array = jax.Array

# Operations that only relabel the entries of an array; those of the second set
# also keep their row-major order.
_ORDER_KEEPING = {
    "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type",
    "copy", "copy_p", "reduce_precision", "optimization_barrier",
}  # fmt: skip
_RELABELLING = _ORDER_KEEPING | {"transpose", "rev"}


def keeps_order(equation: Equation) -> bool:
    """Whether the equation only reshapes or casts its one operand."""
    atoms = equation.invars
    if len(atoms) != 1 or len(equation.outvars) != 1:
        return False
    if equation.primitive.name == "transpose":
        # Axes of one entry may go anywhere: vmap of `W @ x` leaves such a transpose.
        shape = atoms[0].aval.shape
        long = [axis for axis in equation.params["permutation"] if shape[axis] != 1]
        return long == sorted(long)
    same_size = atoms[0].aval.size == equation.outvars[0].aval.size
    return equation.primitive.name in _ORDER_KEEPING and same_size


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A parameter, and the relabelling steps from it to the value a layer uses."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    steps: tuple[Equation, ...] = ()

    def follow(self, value: Array) -> Array:
        """The parameter's entries in the layout that the layer sees, uncast."""
        for equation in self.steps:
            if equation.primitive.name not in ("convert_element_type", "reduce_precision"):
                (value,) = bind(equation, [value])
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One block of the curvature: a kernel, its bias if any, and where they act.

    `h = a W + b` for one example, with `a` `[d_in]` read from the value `input`
    and `h` `[d_out]` the value `output`, the pre-activation.
    """

    name: str
    kernel: Source
    bias: Source | None
    d_in: int
    d_out: int
    input: Var
    output: Var
    equations: tuple[Equation, ...]
    kernel_value: Var  # the kernel as the equation sees it, cast to the compute dtype
    kernel_axes: tuple[int, ...]  # the contracted axes of the kernel, then the others
    input_axes: tuple[int, ...]  # the free axes of the input, then the contracted ones

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the layer's parameters, kernel first."""
        return (self.kernel.name,) + ((self.bias.name,) if self.bias else ())

    @property
    def activation_size(self) -> int:
        """The size of the activation factor: `d_in`, and one more with a bias."""
        return self.d_in + (self.bias is not None)

    def activations(self, values: Array) -> Array:
        """The layer's inputs `[N, d_in (+ 1)]`, a 1 appended for the bias."""
        axes = (0, *tuple(axis + 1 for axis in self.input_axes))
        a = jnp.transpose(values, axes).reshape(values.shape[0], self.d_in)
        if self.bias is None:
            return a
        return jnp.concatenate([a, jnp.ones((a.shape[0], 1), a.dtype)], axis=1)

    def in_input_order(self, matrix: Array) -> Array:
        """Rows of `[d_in, ...]` put in the row-major order of the value `input`."""
        shape = [self.input.aval.shape[axis] for axis in self.input_axes]
        order = [self.input_axes.index(axis) for axis in range(len(shape))]
        split = matrix.reshape(*shape, *matrix.shape[1:])
        rest = range(len(shape), split.ndim)
        return jnp.transpose(split, (*order, *rest)).reshape(matrix.shape)

    def kernel_matrix(self, kernel: Array) -> Array:
        """The kernel as `[d_in, d_out]`."""
        seen = self.kernel.follow(kernel)
        return jnp.transpose(seen, self.kernel_axes).reshape(self.d_in, self.d_out)

    def to_matrix(self, leaves: dict[str, Array]) -> Array:
        """The layer's parameters as one matrix `[d_in (+ 1), d_out]`."""
        kernel = self.kernel_matrix(leaves[self.kernel.name])
        if self.bias is None:
            return kernel
        bias = self.bias.follow(leaves[self.bias.name]).reshape(1, self.d_out)
        return jnp.concatenate([kernel, bias.astype(kernel.dtype)])

    def from_matrix(self, matrix: Array) -> dict[str, Array]:
        """The inverse of `to_matrix`, in each parameter's own shape and dtype.

        `to_matrix` permutes entries, so its inverse is its transpose.
        """
        shapes = {s.name: jax.ShapeDtypeStruct(s.shape, matrix.dtype) for s in self.sources}
        (leaves,) = jax.linear_transpose(self.to_matrix, shapes)(matrix)
        return {s.name: leaves[s.name].astype(s.dtype) for s in self.sources}

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.kernel,) + ((self.bias,) if self.bias else ())


def find_layers(model: FlatModel) -> tuple[dict[str, Layer], dict[str, str]]:
    """The model's layers by name, and the parameters in no layer with the reason."""
    sources = _sources(model)
    consumers = _consumers(model)
    uses, matched = _data_uses(model, sources), []
    for equation in model.jaxpr.eqns:
        layer = _match_dense(model, equation, sources, consumers)
        if layer is not None:
            matched.append(layer)
    reasons, kept = {}, []
    used = [s.name for layer in matched for s in layer.sources]
    for layer in matched:
        tied = [n for n in layer.parameters if used.count(n) > 1 or len(uses[n]) > 1]
        if tied:
            text = f"is used {max(len(uses[tied[0]]), 2)} times (tied parameters)"
            reasons.update(dict.fromkeys(layer.parameters, text))
        else:
            kept.append(layer)
    in_layers = {name for layer in kept for name in layer.parameters}
    for name in model.parameters:
        if name not in in_layers:
            reasons.setdefault(name, _reason(model, name, uses[name]))
    return _named(kept), reasons


def require_blocks(reasons: dict[str, str]) -> None:
    """Raises LayerError where parameters belong to no layer."""
    if reasons:
        lines = "\n".join(f"  {name!r} {reason}" for name, reason in reasons.items())
        raise LayerError(
            f"{len(reasons)} parameter(s) belong to no layer that kfgn has a block for:\n{lines}\n"
            'Pass unassigned="gradient" to give them plain damped gradient steps, or keep them '
            "out of params and close over them."
        )


def _named(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layers keyed by their kernel's path without its leaf, where that is unique."""
    layers = list(layers)
    short = [layer.name.rpartition("/")[0] for layer in layers]
    names = [s if s and short.count(s) == 1 else n.name for s, n in zip(short, layers, strict=True)]
    return {
        name: dataclasses.replace(layer, name=name)
        for name, layer in zip(names, layers, strict=True)
    }


def _sources(model: FlatModel) -> dict[Var, Source]:
    """The values that are relabelled copies of exactly one parameter."""
    sources = {v: Source(name, v.aval.shape, v.aval.dtype) for name, v in model.parameters.items()}
    for equation in model.jaxpr.eqns:
        ins: list[Any] = equation.invars
        outs: list[Any] = equation.outvars
        if len(ins) != 1 or len(outs) != 1 or ins[0] not in variables(ins):
            continue
        source = sources.get(ins[0])
        relabels = equation.primitive.name in _RELABELLING
        if source is not None and relabels and outs[0].aval.size == ins[0].aval.size:
            sources[outs[0]] = dataclasses.replace(source, steps=(*source.steps, equation))
    return sources


def _consumers(model: FlatModel) -> dict[Var, list[Equation | None]]:
    """The equations that read each value; None stands for the model's output."""
    consumers: dict[Var, list[Equation | None]] = {}
    for equation in model.jaxpr.eqns:
        for v in set(variables(equation.invars)):
            consumers.setdefault(v, []).append(equation)
    for v in variables(model.outputs):
        consumers.setdefault(v, []).append(None)
    return consumers


def _data_uses(model: FlatModel, sources: dict[Var, Source]) -> dict[str, list[str]]:
    """For each parameter, the primitives where it, or what is made of it, meets data."""
    made_of: dict[Var, frozenset[str]] = {v: frozenset([n]) for n, v in model.parameters.items()}
    uses: dict[str, list[str]] = {name: [] for name in model.parameters}
    for equation in model.jaxpr.eqns:
        ins = [v for v in variables(equation.invars) if model.roles[v] is Role.PARAMETER]
        names = frozenset().union(*(made_of.get(v, frozenset()) for v in ins))
        pure = all(model.roles[v] <= Role.PARAMETER for v in variables(equation.invars))
        for out in equation.outvars:
            if pure:
                made_of[out] = names
        if not pure:
            for name in names:
                uses[name].append(equation.primitive.name)
    for v in variables(model.outputs):
        for name in made_of.get(v, ()):
            uses[name].append("the model's output")
    return uses


def _reason(model: FlatModel, name: str, uses: list[str]) -> str:
    shape = model.parameters[name].aval.shape
    if not uses:
        return f"(shape {shape}) never meets data: the outputs do not depend on it"
    if len(uses) > 1:
        return f"(shape {shape}) meets data {len(uses)} times: in {', '.join(uses)}"
    return f"(shape {shape}) meets data in `{uses[0]}`, in a way that is no dense layer"


def _match_dense(
    model: FlatModel,
    equation: Equation,
    sources: dict[Var, Source],
    consumers: dict[Var, list[Equation | None]],
) -> Layer | None:
    if equation.primitive.name != "dot_general" or len(variables(equation.invars)) != 2:
        return None
    is_kernel = [v in sources for v in equation.invars]
    if sum(is_kernel) != 1:
        return None
    side = is_kernel.index(True)
    kernel, data = equation.invars[side], equation.invars[1 - side]
    if model.roles[data] < Role.PASSIVE or is_complex(data):
        return None
    contracted, batch = equation.params["dimension_numbers"]
    if any(batch):
        return None
    kernel_in, data_in = contracted[side], contracted[1 - side]
    kernel_free = [a for a in range(kernel.aval.ndim) if a not in kernel_in]
    data_free = [a for a in range(data.aval.ndim) if a not in data_in]
    if math.prod(data.aval.shape[a] for a in data_free) != 1:
        return None  # weight sharing over positions has blocks of its own
    output, bias, chain = _match_bias(model, equation.outvars[0], sources, consumers)
    return Layer(
        name=sources[kernel].name,
        kernel=sources[kernel],
        bias=bias,
        d_in=math.prod(kernel.aval.shape[a] for a in kernel_in),
        d_out=math.prod(kernel.aval.shape[a] for a in kernel_free),
        input=data,
        output=output,
        equations=(equation, *chain),
        kernel_value=kernel,
        kernel_axes=(*kernel_in, *kernel_free),
        input_axes=(*data_free, *data_in),
    )


def _match_bias(model, value, sources, consumers):
    """Follows the product to the addition of a bias: `(pre-activation, bias, equations)`."""
    start, chain = value, []
    while len(consumers.get(value, ())) == 1 and (equation := consumers[value][0]) is not None:
        chain.append(equation)
        if equation.primitive.name in ("add", "add_any"):
            other = [a for a in equation.invars if a is not value]
            source = sources.get(other[0]) if other and other[0] in variables(other) else None
            if source is not None and math.prod(source.shape) == value.aval.size:
                return equation.outvars[0], source, tuple(chain)
            break
        if not keeps_order(equation):
            break
        value = equation.outvars[0]
    return start, None, ()
