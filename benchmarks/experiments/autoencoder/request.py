"""What the command line asks of the autoencoder experiment, and whether it makes sense."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.datasets import NAMES as DATA_NAMES
from benchmarks.harness.models import ENCODER
from benchmarks.harness.optimizers import (
    NAMES,
    SECOND_ORDER,
    closest,
    default_learning_rate,
    default_updates,
)
from benchmarks.harness.training import Schedule

EVALUATIONS = 100  # about so many in a run, unless --eval-every says otherwise


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    optimizers: tuple[str, ...]
    data: str = "curves"
    data_dir: Path | None = None
    updates: int | None = None
    batch_size: int = 1000
    learning_rate: float | None = None
    decay_period: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    l2: float = 1e-5
    layers: tuple[int, ...] | None = None
    seed: int = 0
    eval_every: int | None = None
    out: Path = Path("runs")
    resume: bool = False
    checkpoint_every: int | None = None
    no_sgd_yardstick: bool = False
    references: Path | None = None

    def check(self) -> None:
        """Finds what can be found wrong before there are data."""
        for name in self.optimizers:
            if name not in NAMES:
                raise closest("optimizer", name, NAMES)
            if self.optimizers.count(name) > 1:
                raise BenchmarkError(f"--compare names {name} twice")
        if self.data not in DATA_NAMES:
            raise closest("data set", self.data, DATA_NAMES)
        if self.references is not None and not self.references.is_dir():
            raise BenchmarkError(f"--references must be a folder, found {self.references}")
        second = [name in SECOND_ORDER for name in self.optimizers]
        if self.options and not any(second):
            raise BenchmarkError("--option is for kfra, kflr and kfac; none of them is to be run")
        if (self.learning_rate or self.decay_period) and all(second):
            raise BenchmarkError(
                "--learning-rate and --decay-period are for the first-order optimizers; "
                f"{' and '.join(self.optimizers)} need neither (see --option)"
            )

    def schedule(self, name: str) -> Schedule:
        """How long this optimizer trains, and how often it is looked at."""
        updates = self.updates or default_updates(name)
        eval_every = self.eval_every or max(1, updates // EVALUATIONS)
        return Schedule(updates, eval_every, self.checkpoint_every)

    def settings(self, name: str, checksum: int) -> dict[str, Any]:
        """All that the numbers of a run depend on: what must not change when it is resumed."""
        second = name in SECOND_ORDER
        return {
            "data": self.data,
            "data_checksum": checksum,
            "optimizer": name,
            "options": dict(self.options) if second else {},
            "learning_rate": None if second else default_learning_rate(name, self.learning_rate),
            "decay_period": None if second else self.decay_period,
            "batch_size": self.batch_size,
            "l2": self.l2,
            "layers": list(self.layers or ENCODER),
            "seed": self.seed,
        }
