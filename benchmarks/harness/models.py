"""The deep autoencoder of Hinton & Salakhutdinov, as a flax module."""

from collections.abc import Sequence
from typing import Any

import jax
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
