"""The deep autoencoder of Hinton & Salakhutdinov as a flax module, and a plain chain of layers."""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Params = Any

ENCODER = (1000, 500, 250, 30)


class Autoencoder(nn.Module):
    """tanh layers down to a linear code and, mirrored, back to as many linear outputs as pixels.

    ``encoder`` lists the widths from the first layer to the code. The outputs are logits (or, under
    squared error, the pixels themselves): the loss, not the model, says what they mean.
    """

    pixels: int
    encoder: Sequence[int] = ENCODER

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        *hidden, code = self.encoder
        values = inputs
        for width in hidden:
            values = nn.tanh(self._dense(width)(values))
        values = self._dense(code)(values)
        for width in reversed(hidden):
            values = nn.tanh(self._dense(width)(values))
        return self._dense(self.pixels)(values)

    def _dense(self, width: int) -> nn.Dense:
        return nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())


def initial_params(model: Autoencoder, seed: int) -> Params:
    """The parameters every optimizer starts from: they depend on the seed and nothing else."""
    example = jax.ShapeDtypeStruct((1, model.pixels), "float32")
    return jax.jit(lambda key: model.lazy_init(key, example))(jax.random.key(seed))


def chain_params(
    sizes: Sequence[int],
    seed: int,
    initial: Any = jax.nn.initializers.glorot_uniform(),  # noqa: B008 - a pure function
    dtype: Any = jnp.float32,
) -> Params:
    """Kernels `[a, b]` and zero biases of dense layers of these sizes, "layer 1", "layer 2", ..."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"layer {k}": {"kernel": initial(key, (a, b), dtype), "bias": jnp.zeros(b, dtype)}
        for k, (key, (a, b)) in enumerate(zip(keys, itertools.pairwise(sizes), strict=True), 1)
    }


def hidden_values(
    params: Params, x: jax.Array, transfer: Callable[..., Any] = jnp.tanh,
    linear: Collection[int] = (),
) -> list[jax.Array]:  # fmt: skip
    """What every layer of a chain passes on; the last and those in `linear` do so untouched."""
    values = []
    for k in range(1, len(params) + 1):
        layer = params[f"layer {k}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = x if k == len(params) or k in linear else transfer(x)
        values.append(x)
    return values


def chain(
    transfer: Callable[..., Any] = jnp.tanh, linear: Collection[int] = ()
) -> Callable[..., Any]:
    """The model `(params, x) -> outputs` of a chain."""
    return lambda params, x: hidden_values(params, x, transfer, linear)[-1]
