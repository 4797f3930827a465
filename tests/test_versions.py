"""What has broken others when jax changed is not leaned on, and .ci/run knows the versions.

`KFGN_CI_VERSIONS=lowest .ci/run` and `highest` run the suite with other versions. Meshes with
explicit axes, which came to be the default, have a test in tests/curvature/test_devices.py.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest

import kfgn
from kfgn.model.flatten.custom_vjp import body_of, check_linear, holds_rule
from kfgn.model.flatten.inline import flattened
from kfgn.model.program.equations import Role, bind

ROOT = Path(kfgn.__file__).parent


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@jax.custom_jvp
def tripled(x):
    return 3 * x


tripled.defjvp(lambda x, t: (3 * x[0], 3 * t[0]))


def equation_of(function):
    (equation,) = jax.make_jaxpr(function)(1.0).eqns
    return equation


@pytest.mark.parametrize("rule", [doubled, tripled])
def test_get_bind_params_is_jaxs_own_affair(rule):
    """Equations that need `Primitive.get_bind_params` are evaluated by jax, rules included."""
    sources = {path.name: path.read_text() for path in ROOT.rglob("*.py")}
    assert [name for name, text in sources.items() if "get_bind_params" in text] == []
    equation = equation_of(rule)
    (value,) = bind(equation, [jnp.float32(2.0)])
    assert value == rule(2.0)
    slope = jax.grad(lambda x: bind(equation, [x])[0])(2.0)
    assert slope == jax.grad(rule)(2.0)


def test_names_of_the_parameters_of_custom_vjp():
    """The function's jaxpr is found whatever the parameter is called, and by nothing else."""
    equation = equation_of(doubled)
    (name,) = (k for k, v in equation.params.items() if isinstance(v, jex.ClosedJaxpr))
    others = {k: v for k, v in equation.params.items() if k != name}
    renamed = equation.replace(params={"another_name": equation.params[name], **others})
    assert holds_rule(renamed) and body_of(renamed) is equation.params[name]
    check_linear(equation, [Role.ACTIVE], flattened)


def test_lowest_versions_of_ci():
    """The lower bounds of pyproject.toml, as exact versions that are not above those here."""
    command = [sys.executable, str(ROOT.parent / ".ci" / "constraints.py"), "lowest"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    bounds = dict(line.split("==") for line in lines)
    assert list(bounds) == ["jax", "jaxlib", "flax", "optax"]
    for name, bound in bounds.items():
        here = importlib.metadata.version(name)
        assert [int(x) for x in bound.split(".")] <= [int(x) for x in here.split(".")[:3]]
