"""The mixture of sigmoids, whose loss is not convex in the outputs, run in small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.experiments import mixture
from tests.benchmarks.measured import measured

pytestmark = pytest.mark.loose_dtypes  # optax's Adam and L-BFGS promote dtypes


def test_mixture(tmp_path):
    found = measured(
        tmp_path, "mixture", "--data", "digits", "--layers", "8,4", "--updates", "10",
        "--adam-updates", "20", "--batch-size", "100", "--exponents", "7",
        "--methods", "kfac",
    )  # fmt: skip
    assert {"kfac", "kfac, paper", "kfac, fixed"} < set(found)
    for runs in found.values():
        assert all(run["points"][-1][2] < run["points"][0][2] for run in runs)
    # Second order and the best of Adam's two settings train from another start, too.
    assert sorted(map(len, found.values())) == [1] + [2] * 4
    assert found["kfac"][0] != found["kfac"][1]


def test_mixture_is_a_likelihood():
    """Probabilities of both targets sum to one, and are those of eq. (27)."""
    outputs = jnp.asarray([0.3, -1.2, 2.0])
    ones = [jnp.exp(mixture.log_likelihoods(outputs, jnp.asarray(y))) for y in (0.0, 1.0)]
    np.testing.assert_allclose(sum(ones), 1, rtol=1e-6)
    s = jax.nn.sigmoid
    expected = s(0.3) * s(-1.2) + (1 - s(0.3)) * s(2.0)
    np.testing.assert_allclose(ones[1], expected, rtol=1e-6)
