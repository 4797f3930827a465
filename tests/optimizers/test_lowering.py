"""The whole step lowers for accelerators that these tests do not have."""

from __future__ import annotations

import jax
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params, make_step, shapes

PLATFORMS = ("cuda", "rocm", "tpu")


@pytest.mark.parametrize(
    "method, inverse",
    [("kfra", "factored"), ("kflr", "factored"), ("kflr", "eigen"), ("kfac", "factored")],
)
def test_step_lowers_for_every_platform(method, inverse):
    given = make_params(), make_batch()
    optimizer = getattr(kfgn, method)(OBJECTIVE, *given, inverse=inverse)
    key = jax.random.key(0) if method == "kfac" else None
    state = jax.eval_shape(optimizer.init, given[0])
    # Which solver a vendor's library has is no promise of JAX, hence nothing to serialize.
    free = [jax.export.DisabledSafetyCheck.custom_call(name) for name in SOLVERS]
    step = jax.export.export(
        jax.jit(make_step(optimizer, method)), platforms=PLATFORMS, disabled_checks=free
    )
    assert step(*shapes((given[0], state, given[1])), key).platforms == PLATFORMS


SOLVERS = ("hipsolver_potrf_ffi", "hipsolver_syevd_ffi")
