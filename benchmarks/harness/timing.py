"""How things are timed here: medians, in one process, beside a yardstick of the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timed(NamedTuple):
    """A compiled function's seconds per call, and what compiling it took."""

    median: float
    minimum: float
    compile_seconds: float  # tracing included
    temporary_bytes: int  # what XLA plans beside arguments and results


def compiled(function: Callable[..., Any], *arguments: Any, **jit: Any) -> tuple[Any, float, int]:
    """The compiled function, the seconds that took, and its temporary memory."""
    start = time.perf_counter()
    program = jax.jit(function, **jit).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    return program, seconds, int(getattr(memory, "temp_size_in_bytes", 0) or 0)


def timed(function: Callable[..., Any], *arguments: Any, repeats: int = 15) -> Timed:
    """Times `function(*arguments)`, compiled, after one call that does not count."""
    program, seconds, memory = compiled(function, *arguments)
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return Timed(float(np.median(times)), min(times), seconds, memory)


def timed_updates(
    step: Callable[..., Any], state: Any, arguments: Any, *, blocks: int, period: int = 20
) -> Timed:
    """Times `state -> step(state, arguments)` in blocks that hold every periodic part once.

    A block's mean counts refreshed inverses and adapted dampings at their
    share; the median is over blocks. One block warms up. The state is donated,
    as in training.
    """
    program, seconds, memory = compiled(step, state, arguments, donate_argnums=0)
    state = jax.tree.map(lambda x: x.copy(), state)
    means = []
    for _ in range(blocks + 1):
        start = time.perf_counter()
        for _ in range(period):
            state = program(state, arguments)
        jax.block_until_ready(state)
        means.append((time.perf_counter() - start) / period)
    return Timed(float(np.median(means[1:])), min(means[1:]), seconds, memory)
