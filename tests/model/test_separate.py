"""Operations that tell by themselves whether they keep examples apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kfgn.model.trial import independence
from kfgn.model.trial.separate import acts_alone
from tests.tables.architectures import ROWS

PARAMETER = np.arange(6.0, dtype=np.float32).reshape(3, 2)
JAX = tuple(int(x) for x in jax.__version__.split(".")[:3])


def proven(function, *shape, dtype=jnp.float32):
    """Whether `function(parameter, batch)` surely acts on each example, as read at three sizes."""
    counts = (3, 1, 2)
    batches = [jax.ShapeDtypeStruct((n, *shape), dtype) for n in counts]
    return acts_alone([jax.make_jaxpr(function)(PARAMETER, x) for x in batches], counts, [None, 0])


def by_scan(x):
    return lax.scan(lambda h, row: (h + row, h * row), x[:, 0], x.swapaxes(0, 1))[1].swapaxes(0, 1)


def convolved(x, p):
    """Along the positions of examples `[n, t, i]`."""
    return lax.conv_general_dilated(x, p[:, :, None], (1,), "SAME", None, None,
                                    ("NWC", "WIO", "NWC"))  # fmt: skip


def pooled(x, *window):
    return lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 1), "VALID")


# By the primitive: along another axis than that of the examples, and along that axis. Examples
# are 4 x 2.
PAIRS = {
    "sum": (lambda p, x: x.sum(1), lambda p, x: x - x.sum(0)),
    "argmax": (lambda p, x: jnp.argmax(x, 1), lambda p, x: x + jnp.argmax(x, 0)),
    "cumulative": (lambda p, x: jnp.cumsum(x, 1), lambda p, x: jnp.cumsum(x, 0)),
    "sort": (lambda p, x: jnp.sort(x, 1), lambda p, x: jnp.sort(x, 0)),
    "flip": (lambda p, x: x[:, ::-1], lambda p, x: x[::-1]),
    "concatenate": (lambda p, x: jnp.concatenate([x, x], 1),
                    lambda p, x: jnp.concatenate([x, x], 0)[: len(x)]),
    "stack": (lambda p, x: jnp.stack([x, x], 1), lambda p, x: jnp.stack([x, x])[:, 0].sum(0) + x),
    "split": (lambda p, x: jnp.split(x, 2, 1)[1], lambda p, x: jnp.split(x, len(x))[0] + x),
    "slice": (lambda p, x: x[:, 1:], lambda p, x: x + x[-1:]),
    "pad": (lambda p, x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))),
            lambda p, x: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1]),
    "squeeze": (lambda p, x: x[:, 0], lambda p, x: x + x[0]),
    "reshape": (lambda p, x: x.reshape(len(x), -1), lambda p, x: x.reshape(2, -1, 4).sum(0)),
    "transpose": (lambda p, x: x.T.sum(0).T, lambda p, x: x.T.sum(2).T + x),
    "product": (lambda p, x: x @ p[:2], lambda p, x: x[:, 0] @ x[:, 0].T @ x[:, 0]),
    "products": (lambda p, x: jnp.einsum("nti,nsi->nts", x, x),
                 lambda p, x: jnp.einsum("nti,nti->ti", x, x) + x),
    "matrices": (lambda p, x: x @ x.swapaxes(1, 2),
                 lambda p, x: (x.swapaxes(0, 1) @ x.transpose(1, 2, 0)).sum(2).T),
    "matrices, one head": (lambda p, x: x[:, None] @ x[:, None].swapaxes(2, 3),
                           lambda p, x: (x.T[:, None] @ x.transpose(2, 0, 1)[:, None])[:, 0].T),
    "product from the left": (lambda p, x: jnp.einsum("ji,nti->jnt", p, x).swapaxes(0, 1),
                              lambda p, x: jnp.einsum("ji,nti->jnt", p, x)),
    "look up": (lambda p, x: p[x.astype(int)], lambda p, x: x[(x[:, 0, 0] > 0).astype(int)]),
    "look up in its own": (
        lambda p, x: jax.vmap(lambda one: one[jnp.argsort(one[:, 0])])(x),
        lambda p, x: x[jnp.argsort(x[:, 0, 0])],
    ),
    "convolution": (lambda p, x: convolved(x, p), lambda p, x: convolved(x.swapaxes(0, 1), p)),
    "window": (lambda p, x: pooled(x, 1, 2, 1), lambda p, x: pooled(x, len(x), 1, 1) + x),
    "fill": (lambda p, x: jnp.zeros_like(x) + p[0], lambda p, x: x / jnp.ones(len(x)).sum()),
    "loop": (lambda p, x: by_scan(x), lambda p, x: by_scan(x.swapaxes(0, 1)).swapaxes(0, 1)),
    "call": (lambda p, x: jax.jit(jax.nn.softmax)(x), lambda p, x: jax.nn.softmax(x, axis=0)),
    "rules": (lambda p, x: jax.nn.relu(x), lambda p, x: jax.nn.logsumexp(x, axis=0) + x),
    "remat": (jax.checkpoint(lambda p, x: jnp.sin(x)), jax.checkpoint(lambda p, x: x - x.mean(0))),
    "batch of all pairs": (lambda p, x: x[:, :, None] - x[:, None],
                           lambda p, x: (x[:, None] - x[None]).max(1)),
    "number": (lambda p, x: x / 3, lambda p, x: x / len(x)),
    "power": (lambda p, x: x**3, lambda p, x: x ** len(x)),
    "constant": (lambda p, x: x + np.arange(2.0, dtype=np.float32),
                 lambda p, x: x + np.arange(float(len(x)), dtype=np.float32)[:, None, None]),
    "place": (lambda p, x: x + jnp.arange(2.0), lambda p, x: x + jnp.arange(len(x))[:, None, None]),
    "branch of python": (lambda p, x: x, lambda p, x: x * 2 if len(x) == 2 else x),
}  # fmt: skip


# Examples meet though all shapes are as if they did not.
SAME_SHAPES = {
    "pad": lambda p, x: lax.pad(x, np.float32(0), ((1, -1, 0), (0, 0, 0), (0, 0, 0))),
    "window": lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1, 1), (1, 1, 1), "SAME"),
    "look up": lambda p, x: x[(x[:, 0, 0] > 0).astype(jnp.uint32)],
    "constant": lambda p, x: x + np.array([len(x), 1.0], np.float32),
    "flip": lambda p, x: jnp.flip(x, 0),
}


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", SAME_SHAPES)
def test_shapes_that_tell_nothing(name):
    assert not proven(SAME_SHAPES[name], 4, 2)


# Before 0.10.1 a product of batches of one example has axes of two kinds: it is tried instead.
TRIED = ("matrices", "matrices, one head") if JAX < (0, 10, 1) else ()


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", [name for name in PAIRS if name not in TRIED])
def test_operation(name):
    apart, meeting = PAIRS[name]
    assert proven(apart, 4, 2)
    assert not proven(meeting, 4, 2)


# Models of the table that are tried on values, as the operations at which they meet are unknown.
TRIED = {"conv_1d_over_frames", "complex_kernel", "map_examples", "heat_by_jet"}


@pytest.mark.usefixtures("x64")
def test_models_of_the_table_are_not_compiled(monkeypatch):
    """But for a few."""
    compiled = set()
    monkeypatch.setattr(independence, "compile_model", lambda traced: compiled.add(name))
    for name in ROWS:
        row = ROWS[name]
        with jax.numpy_dtype_promotion(row.promotion):
            independence.check_independent(*row.case())
    assert compiled == TRIED
