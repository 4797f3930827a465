"""The table of nets: dense layers in every structure, with the theorems that hold for each.

A row names its dense layers; each holds a kernel "w" and, where it has one, a
bias "b". `dense` adds a bias wherever there is one, so that the dense truth can
perturb the pre-activation of a layer without bias, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Array = jax.Array
PyTree = Any


class Slot(NamedTuple):
    """Where a layer's parameters are, by path, and how its kernel reads as `[d_in, d_out]`."""

    kernel: str
    bias: str
    to_matrix: Callable[[Any], Any] = lambda kernel: kernel


class Case(NamedTuple):
    """A model with parameters and inputs."""

    model: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    inputs: PyTree
    slots: dict[str, Slot]  # by the layer's name in kfgn

    def perturbable(self) -> PyTree:
        """The parameters, with a zero bias for every layer that lacks one."""
        if not isinstance(self.params, dict):
            return self.params
        return {name: _with_bias(layer) for name, layer in self.params.items()}


def _with_bias(layer: Any) -> Any:
    if not isinstance(layer, dict) or "w" not in layer:
        return layer
    d_out = layer["w"].shape[-1]
    return {"b": np.zeros(d_out, layer["w"].dtype), **layer}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the table, and which theorems hold for it.

    Args:
      model: `(params, inputs) -> outputs`.
      sizes: `(d_in, d_out)` of each layer.
      inputs: the shape of one example's input, or a dictionary of shapes.
      loss: the row of the loss table it is tested with.
      bias: whether layers have one.
      last: the layers with nothing but constant linear maps above them.
      linear: the outputs are linear in the parameters of each layer, and in
        every pre-activation, with the same coefficients for every example.
      piecewise_linear: no layer's output has a second derivative, almost everywhere.
      kernel_shapes: kernels of another shape, and how they read as a matrix.
      build: `(key, count, dtype) -> Case`, where params are no dictionary of layers.
    """

    model: Callable[[PyTree, PyTree], PyTree] | None = None
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    inputs: Any = (4,)
    loss: str = "one_hot"
    bias: bool = True
    last: tuple[str, ...] = ("out",)
    linear: bool = False
    piecewise_linear: bool = False
    kernel_shapes: dict[str, tuple[tuple[int, ...], Callable]] = dataclasses.field(
        default_factory=dict
    )
    build: Callable[[Array, int, Any], Case] | None = None

    def case(self, dtype: Any, count: int = 4, seed: int = 0) -> Case:
        if self.build is not None:
            return self.build(jax.random.key(seed), count, dtype)
        rng = np.random.default_rng(seed)
        params = {name: self._layer(rng, name, *size, dtype) for name, size in self.sizes.items()}
        slots = {}
        for name in self.sizes:
            _, to_matrix = self.kernel_shapes.get(name, (None, lambda kernel: kernel))
            slots[name] = Slot(f"{name}/w", f"{name}/b", to_matrix)
        return Case(self.model, params, make_inputs(rng, self.inputs, count, dtype), slots)

    def _layer(self, rng, name, d_in, d_out, dtype):
        shape = self.kernel_shapes.get(name, ((d_in, d_out), None))[0]
        layer = {"w": jnp.asarray(1.5 * rng.normal(size=shape) / d_in**0.5, dtype)}
        if self.bias:
            layer["b"] = jnp.asarray(0.5 * rng.normal(size=d_out), dtype)
        return layer


def make_inputs(rng: np.random.Generator, shapes: Any, count: int, dtype: Any) -> PyTree:
    """Normal inputs of the given shape, or dictionary of shapes."""
    if isinstance(shapes, dict):
        return {name: make_inputs(rng, shape, count, dtype) for name, shape in shapes.items()}
    return jnp.asarray(rng.normal(size=(count, *shapes)), dtype)


def dense(layer: dict[str, Array], x: Array) -> Array:
    """`x W + b`, or `x W`."""
    return add_bias(layer, x @ layer["w"])


def add_bias(layer: dict[str, Array], h: Array) -> Array:
    return h + layer["b"] if "b" in layer else h


def normalize(x: Array) -> Array:
    """LayerNorm without parameters."""
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-3)


# Chains.

CHAIN = {"first": (4, 5), "second": (5, 4), "out": (4, 3)}


def chain(activation: Callable) -> Callable:
    """Three dense layers with an activation between them."""

    def model(p, x):
        x = activation(dense(p["first"], x))
        return dense(p["out"], activation(dense(p["second"], x)))

    return model


def linear_branches(p, x):
    h = dense(p["first"], x)
    a, b = dense(p["second"], h), dense(p["third"], h[:, ::-1])
    return dense(p["out"], jnp.concatenate([a - 2 * b, h], axis=1)) + a[:, :2]


# Branches that meet again.


def residual(activation: Callable) -> Callable:
    def model(p, x):
        h = dense(p["first"], x)
        h = h + activation(dense(p["second"], h))
        h = h + activation(dense(p["third"], h))
        return dense(p["out"], h)

    return model


def densely_connected(p, x):
    h = jnp.concatenate([x, jnp.tanh(dense(p["first"], x))], axis=1)
    h = jnp.concatenate([h, jnp.tanh(dense(p["second"], h))], axis=1)
    return dense(p["out"], h)


def gated(p, x):
    h = jnp.tanh(dense(p["first"], x))
    return dense(p["out"], dense(p["value"], h) * jax.nn.sigmoid(dense(p["gate"], h)))


def swiglu(p, x):
    value, gate = jnp.split(dense(p["first"], x), 2, axis=1)
    return dense(p["out"], value * jax.nn.silu(gate))


def branches(p, x):
    a, b = jnp.tanh(dense(p["first"], x)), dense(p["second"], x)
    h = a * b + 0.5 * a - b
    return dense(p["out"], jax.nn.softplus(h)) * dense(p["scale"], h)


def used_twice(p, x):
    h = dense(p["first"], x)
    return dense(p["out"], jnp.tanh(h) * jax.nn.sigmoid(h) + h)


def several_depths(p, x):
    a = dense(p["first"], x)
    b = dense(p["second"], jnp.tanh(a))
    c = dense(p["third"], jnp.sin(b) + a)
    return dense(p["out"], a + b * c) + c


def around_a_layer(p, x):
    # One node of all that is not linear here would have the second layer inside.
    h = jnp.tanh(dense(p["first"], x))
    return dense(p["out"], jnp.tanh(h * jnp.sin(dense(p["second"], h))) + h)


def one_wide(p, x):
    h = normalize(jnp.concatenate([dense(p["first"], x), x], axis=1))
    return dense(p["out"], h * jnp.tanh(dense(p["second"], x)))


def stopped(p, x):
    h = jnp.tanh(dense(p["first"], x))
    s = dense(p["second"], h)
    still = jax.lax.stop_gradient(jnp.tanh(s))
    return dense(p["out"], h * still + dense(p["third"], s))


def selected(p, x):
    a, b = dense(p["first"], x), dense(p["second"], x)
    by_value = jnp.where(a > 0, jnp.tanh(a), 0.3 * b)
    by_data = jnp.where(x > 0, by_value, b)
    return dense(p["out"], by_data)


def times_data(p, x):
    h = jnp.tanh(dense(p["first"], x) * x)
    return dense(p["out"], h) / (1 + x[:, :3] ** 2)


# Mixing.


def layer_norm(p, x):
    return dense(p["out"], normalize(dense(p["second"], jnp.tanh(dense(p["first"], x)))))


def tanh_layer_norm(p, x):
    h = normalize(jnp.tanh(dense(p["first"], x)))
    return dense(p["out"], normalize(jnp.tanh(dense(p["second"], h))))


def reshaped(p, x):
    h = jnp.tanh(dense(p["first"], x)).reshape(-1, 2, 3)
    h = jnp.transpose(h, (0, 2, 1))[:, ::-1].reshape(-1, 6)
    h = jnp.tanh(dense(p["second"], h)).reshape(-1, 2, 2)
    return dense(p["out"], jnp.pad(jnp.sum(h, axis=2), ((0, 0), (1, 0)), constant_values=1))


def attention(p, x):
    h = jnp.tanh(dense(p["embed"], x))
    q, k, v = (dense(p[name], h).reshape(-1, 3, 2) for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("nid,njd->nij", q, k))
    mixed = jnp.einsum("nij,njd->nid", weights, v)
    return dense(p["out"], mixed.reshape(-1, 6))


def maxout(p, x):
    h = jnp.max(dense(p["first"], x).reshape(-1, 3, 2), axis=2)
    return dense(p["out"], jax.nn.relu(dense(p["second"], h)))


def fourier(p, x):
    spectrum = jnp.fft.rfft(jnp.tanh(dense(p["first"], x)), axis=1)
    h = jnp.fft.irfft(spectrum * jnp.asarray([1, 0.5j, 1 - 1j], spectrum.dtype), axis=1)
    return dense(p["out"], jax.nn.silu(h) + jnp.abs(spectrum[:, 1:2]))


def rearranged(p, x):
    h = jnp.sort(dense(p["first"], x), axis=1)
    h = jnp.cumsum(jnp.tanh(h), axis=1)[:, jnp.asarray([3, 1, 1, 0])]
    h = jnp.take_along_axis(dense(p["second"], h), jnp.argsort(x, axis=1), axis=1)
    return dense(p["out"], jnp.roll(jnp.sin(h), 1, axis=1))


def looped(p, x):
    h, sums = jax.lax.scan(
        lambda h, scale: (jnp.tanh(scale * h), jnp.sum(h, axis=1)),
        dense(p["first"], x),
        jnp.asarray([1.5, 0.5], x.dtype),
    )
    return dense(p["out"], h * sums[1][:, None])


# Kernels in other layouts.


def transposed(p, x):
    h = jnp.tanh(add_bias(p["first"], x @ p["first"]["w"].T))
    return add_bias(p["out"], h @ p["out"]["w"].T)


def vmapped(p, x):
    def one(v):
        h = jnp.tanh(add_bias(p["first"], p["first"]["w"] @ v))
        return add_bias(p["out"], p["out"]["w"] @ h)

    return jax.vmap(one)(x)


def heads(p, x):
    h = jnp.einsum("nd,dhk->nhk", x, p["first"]["w"]) + p["first"]["b"].reshape(2, 3)
    h = jnp.einsum("nhk,hko->no", jnp.tanh(h), p["out"]["w"])
    return add_bias(p["out"], h)


# Calls and custom rules.


def nested_calls(p, x):
    @jax.jit
    def first(layer, x):
        return jnp.tanh(dense(layer, x))

    @jax.checkpoint
    def second(layer, x):
        return jax.jit(jax.nn.gelu)(dense(layer, x))

    return dense(p["out"], second(p["second"], first(p["first"], x)))


@jax.custom_jvp
def surrogate(x: Array) -> Array:
    """A function whose derivative rule is not its derivative, as surrogates have it."""
    return jnp.tanh(x)


@surrogate.defjvp
def _surrogate_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return surrogate(x), t * (1.2 - jax.nn.sigmoid(x) ** 2)


# Inputs and outputs.


def tree_inputs(p, inputs):
    grid = dense(p["grid"], inputs["grid"].reshape(-1, 4))
    line = dense(p["line"], inputs["line"])
    return dense(p["out"], jnp.tanh(grid * line))


def tree_outputs(p, x):
    h = jnp.tanh(dense(p["first"], x))
    return {"mean": dense(p["mean"], h), "log_scale": dense(p["log_scale"], h), "data": x[:, :2]}


def same_output_twice(p, x):
    h = dense(p["out"], jnp.tanh(dense(p["first"], x)))
    return h, {"again": h, "square": h**2}


def scalar_output(p, x):
    return dense(p["out"], jnp.tanh(dense(p["first"], x)))[:, 0]


def grid_output(p, x):
    return dense(p["out"], jnp.tanh(dense(p["first"], x))).reshape(-1, 2, 2)


def bounded_output(p, x):
    return jnp.tanh(dense(p["out"], jnp.tanh(dense(p["first"], x))))


# Neural network libraries.


def _moved(params: PyTree) -> PyTree:
    """Parameters away from their initial values, whose biases are zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)


def _some_inputs(count: int, dtype: Any) -> Array:
    return make_inputs(np.random.default_rng(2), (4,), count, dtype)


class LinenNet(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        h = nn.tanh(nn.jit(nn.Dense)(5, name="first", **kinds)(x))
        h = h + nn.gelu(nn.remat(nn.Dense)(5, name="second", **kinds)(h))
        return nn.Dense(3, name="out", **kinds)(h)


def flax_linen(key, count, dtype):
    net, x = LinenNet(dtype), _some_inputs(count, dtype)
    variables = _moved(net.init(key, x))
    slots = {
        f"params/{name}": Slot(f"params/{name}/kernel", f"params/{name}/bias")
        for name in ("first", "second", "out")
    }
    return Case(net.apply, variables, x, slots)


class NnxNet(nnx.Module):
    def __init__(self, dtype, rngs):
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.first = nnx.Linear(4, 5, **kinds)
        self.layers = nnx.List([nnx.Linear(5, 4, **kinds), nnx.Linear(4, 3, **kinds)])

    def __call__(self, x):
        return self.layers[1](nnx.silu(self.layers[0](nnx.tanh(self.first(x)))))


def flax_nnx(key, count, dtype):
    graph, state = nnx.split(NnxNet(dtype, nnx.Rngs(key)))
    names = ("first", "layers/0", "layers/1")
    slots = {name: Slot(f"{name}/kernel", f"{name}/bias") for name in names}

    def model(s, x):
        return nnx.merge(graph, s)(x)

    return Case(model, _moved(state), _some_inputs(count, dtype), slots)


def equinox(key, count, dtype):
    net = eqx.nn.MLP(4, 3, 5, depth=2, activation=jnp.tanh, key=key, dtype=dtype)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    slots = {
        f"layers/{i}": Slot(f"layers/{i}/weight", f"layers/{i}/bias", lambda w: w.T)
        for i in range(3)
    }

    def model(p, x):
        return jax.vmap(eqx.combine(p, static))(x)

    return Case(model, _moved(params), _some_inputs(count, dtype), slots)


TWO = {"first": (4, 4), "out": (4, 3)}
RESIDUAL = {"first": (4, 4), "second": (4, 4), "third": (4, 4), "out": (4, 3)}


def _turned(sizes):
    return {n: ((d_out, d_in), lambda w: w.T) for n, (d_in, d_out) in sizes.items()}


MODELS: dict[str, Row] = {
    # Chains, eq. (8) as it stands in the paper.
    "single_layer": Row(lambda p, x: dense(p["out"], x), {"out": (4, 3)}, piecewise_linear=True),
    "tanh": Row(chain(jnp.tanh), CHAIN),
    "tanh_without_bias": Row(chain(jnp.tanh), CHAIN, bias=False, loss="integer_labels"),
    "sigmoid": Row(chain(jax.nn.sigmoid), CHAIN, loss="sigmoid"),
    "relu": Row(chain(jax.nn.relu), CHAIN, piecewise_linear=True),
    "leaky_relu": Row(chain(jax.nn.leaky_relu), CHAIN, bias=False, piecewise_linear=True),
    "gelu": Row(chain(jax.nn.gelu), CHAIN, loss="soft_labels"),
    "silu": Row(chain(jax.nn.silu), CHAIN, loss="squared_error"),
    "softplus": Row(chain(jax.nn.softplus), CHAIN, loss="mixture"),
    "custom_jvp": Row(chain(surrogate), CHAIN),
    "linear": Row(chain(lambda x: x), CHAIN, loss="squared_error", linear=True),
    "linear_without_bias": Row(
        chain(lambda x: x), CHAIN, loss="squared_error", bias=False, linear=True
    ),
    # Branches.
    "linear_branches": Row(
        linear_branches,
        {"first": (4, 3), "second": (3, 2), "third": (3, 2), "out": (5, 2)},
        loss="squared_error",
        linear=True,
    ),
    "residual": Row(residual(jnp.tanh), RESIDUAL),
    "residual_relu": Row(residual(jax.nn.relu), RESIDUAL, loss="sigmoid", piecewise_linear=True),
    "densely_connected": Row(
        densely_connected, {"first": (4, 3), "second": (7, 3), "out": (10, 3)}
    ),
    "gated": Row(gated, {"first": (4, 4), "value": (4, 5), "gate": (4, 5), "out": (5, 3)}),
    "swiglu": Row(swiglu, {"first": (4, 6), "out": (3, 3)}, loss="squared_error"),
    "branches": Row(
        branches,
        {"first": (4, 4), "second": (4, 4), "scale": (4, 3), "out": (4, 3)},
        loss="sigmoid",
        last=(),
    ),
    "used_twice": Row(used_twice, TWO),
    "several_depths": Row(
        several_depths,
        {"first": (4, 3), "second": (3, 3), "third": (3, 3), "out": (3, 3)},
        bias=False,
    ),
    "around_a_layer": Row(around_a_layer, {"first": (4, 4), "second": (4, 4), "out": (4, 3)}),
    "one_wide": Row(one_wide, {"first": (4, 1), "second": (4, 1), "out": (5, 3)}),
    "stopped": Row(stopped, RESIDUAL),
    "selected": Row(selected, {"first": (4, 4), "second": (4, 4), "out": (4, 3)}),
    "times_data": Row(times_data, TWO, loss="squared_error", last=()),
    # Mixing.
    "layer_norm": Row(layer_norm, {"first": (4, 4), "second": (4, 5), "out": (5, 3)}),
    "tanh_layer_norm": Row(
        tanh_layer_norm, {"first": (4, 5), "second": (5, 4), "out": (4, 3)}, loss="squared_error"
    ),
    "reshaped": Row(reshaped, {"first": (4, 6), "second": (6, 4), "out": (3, 3)}),
    "attention": Row(
        attention,
        {"embed": (4, 4), "query": (4, 6), "key": (4, 6), "value": (4, 6), "out": (6, 3)},
    ),
    "maxout": Row(
        maxout, {"first": (4, 6), "second": (3, 4), "out": (4, 3)}, piecewise_linear=True
    ),
    "fourier": Row(fourier, TWO),
    "rearranged": Row(rearranged, {"first": (4, 4), "second": (4, 4), "out": (4, 3)}),
    "looped": Row(looped, TWO),
    # Layouts of kernels.
    "transposed_kernel": Row(transposed, TWO, kernel_shapes=_turned(TWO)),
    "vmapped": Row(vmapped, TWO, kernel_shapes=_turned(TWO)),
    "heads": Row(
        heads,
        {"first": (4, 6), "out": (6, 3)},
        kernel_shapes={
            "first": ((4, 2, 3), lambda w: w.reshape(4, 6)),
            "out": ((2, 3, 3), lambda w: w.reshape(6, 3)),
        },
    ),
    # Calls.
    "nested_calls": Row(nested_calls, CHAIN),
    # Inputs and outputs.
    "tree_inputs": Row(
        tree_inputs,
        {"grid": (4, 3), "line": (3, 3), "out": (3, 3)},
        inputs={"grid": (2, 2), "line": (3,)},
    ),
    "tree_outputs": Row(
        tree_outputs,
        {"first": (4, 4), "mean": (4, 2), "log_scale": (4, 2)},
        loss="gaussian",
        last=("mean", "log_scale"),
    ),
    "same_output_twice": Row(same_output_twice, TWO, loss="coupled", last=()),
    "scalar_output": Row(scalar_output, {"first": (4, 4), "out": (4, 1)}, loss="sigmoid"),
    "grid_output": Row(grid_output, {"first": (4, 3), "out": (3, 4)}, loss="integer_labels"),
    "bounded_output": Row(bounded_output, TWO, loss="pseudo_huber", last=()),
    # Libraries.
    "flax_linen": Row(build=flax_linen, last=("params/out",)),
    "flax_nnx": Row(build=flax_nnx, last=("layers/1",), loss="squared_error"),
    "equinox": Row(build=equinox, last=("layers/2",)),
}
