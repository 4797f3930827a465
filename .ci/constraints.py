"""Constraints for pip: `python .ci/constraints.py lowest|highest`, of pyproject.toml's versions."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

NAMES = ("jax", "jaxlib", "flax", "optax")


def lowest(name: str) -> str:
    """The lower bound that pyproject.toml has."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = chain(project["dependencies"], *project["optional-dependencies"].values())
    (bound,) = (m[1] for x in needed if (m := re.fullmatch(rf"{name}>=([\d.]+)", x)))
    return bound


def highest(name: str) -> str:
    """The latest release that the registry has for this Python."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return found.split("(")[1].split(")")[0]


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["highest"]):
        sys.exit("the versions are either lowest or highest")
    version = {"lowest": lowest, "highest": highest}[sys.argv[1]]
    print("\n".join(f"{name}=={version(name)}" for name in NAMES))
