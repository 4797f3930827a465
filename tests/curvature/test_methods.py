"""A method is one object in a registry: what is computed, checked and shown follows from it."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.curvature.methods import METHODS, Method
from tests.tables.comparison import close, setting

pytestmark = pytest.mark.usefixtures("x64")


class Signs(Method):
    """Gradients at the pre-activations of one random vector of signs at the outputs."""

    name = "signs"
    draws = True

    def moments(self, request):
        count, outputs = request.model.examples, request.model.outputs
        signs = jnp.where(jnp.arange(count * outputs.shape[1]) % 2, 1.0, -1.0)
        return request.column_moments(signs.reshape(count, -1).astype(outputs.dtype))

    def flops(self, use):
        return use.activation + 2 * use.column


def test_a_method_of_ones_own(monkeypatch):
    """One line in the registry: factors, the checks of options, and a column of `inspect`."""
    case, objective, batch = setting("tanh")
    monkeypatch.setitem(METHODS, "signs", Signs())
    function = kfgn.value_grad_and_curvature(objective, "signs")
    with pytest.raises(kfgn.errors.OptionError, match=r'method "signs" .* needs a random key'):
        function(case.params, batch)
    key = kfgn.curvature  # anything but None: nothing is drawn from it
    _, curvature = jax.jit(lambda p, b: function(p, b, key=key))(case.params, batch)
    assert curvature.settings.method == "signs"
    signs = np.where(np.arange(batch[1].size) % 2, 1.0, -1.0).reshape(batch[1].shape)
    close(curvature.factors["out"].pre_activation, signs.T @ signs / len(signs))
    found = kfgn.inspect(objective, case.params, batch, file=io.StringIO())
    assert " signs " in str(found) and found.totals.flops["signs"] > found.totals.flops["kfac"]
    with pytest.raises(
        kfgn.errors.OptionError, match=r"an option of method .kfra., not of 'signs'"
    ):
        kfgn.value_grad_and_curvature(objective, "signs", spatial="homogeneous")


@pytest.mark.parametrize("method", METHODS)
def test_keys_are_asked_for_and_refused(method):
    case, objective, batch = setting("tanh")
    function = kfgn.value_grad_and_curvature(objective, method)
    given = {} if METHODS[method].draws else {"key": 0}
    with pytest.raises(kfgn.errors.OptionError, match=r"needs a random key|draws nothing"):
        function(case.params, batch, **given)
