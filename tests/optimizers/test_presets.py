"""The presets as literal tables, every number with its source: a change of any is a failure."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params

# Botev, Ritter & Barber (2017); τ and γ start as in Martens & Grosse (2015), section 6.6.
PAPER = {
    "learning_rate": 1.0,  # eq. (33)
    "decay": 0.9,  # section 5, "a moving average with a factor of 0.9"
    "refresh_factors_every": 1,  # algorithm 1
    "refresh_inverse_every": 1,  # algorithm 1
    "inverse": "factored",  # eq. (36)
    "momentum": False,  # section 5, "we therefore do not include momentum"
    "average_decay": 0.95,  # eq. (45)
    "step_damping.initial": 150.0,
    "step_damping.minimum": 0.0,
    "step_damping.maximum": 1e10,
    "step_damping.period": 5,  # appendix C.3.1, T_τ = 5
    "step_damping.decay": 0.95,  # appendix C.3.1, ω_τ = 0.95^T_τ
    "step_damping.thresholds": (0.75, 0.75),  # appendix C.3.1
    "step_damping.agreement": None,  # by ρ alone
    "factor_damping.initial": 12.24744871391589,  # sqrt(150)
    "factor_damping.minimum": 1e-10,
    "factor_damping.maximum": 1e10,
    "factor_damping.period": 20,  # appendix C.3.2, T_γ = 20
    "factor_damping.decay": 0.95,  # appendix C.3.2, ω_γ = 0.95^T_γ
}

# The code that belongs to the lecture on Newton methods for convolutional networks.
CNN = {
    "damping.initial": 1.0,
    "damping.minimum": 1e-10,
    "damping.maximum": 1e10,
    "damping.period": 1,
    "damping.decay": 2 / 3,  # the drop; the boost is 3/2
    "damping.thresholds": (0.25, 0.75),
    "damping.agreement": None,
    "tolerance": 0.1,  # ξ
    "max_iterations": 250,
}

# Martens (2010), and the code that he published with it.
MARTENS = {
    "damping.initial": 45.0,  # the code
    "damping.minimum": 1e-10,
    "damping.maximum": 1e10,
    "damping.period": 1,
    "damping.decay": 2 / 3,  # section 4.1
    "damping.thresholds": (0.25, 0.75),  # section 4.1
    "damping.agreement": None,
    "tolerance": None,  # section 4.4
    "progress": 0.0005,  # section 4.4
    "max_iterations": 250,  # the code
    "warm_start": 0.95,  # the code
    "preconditioner": "diagonal",  # section 4.7
    "power": 0.75,  # section 4.7
}

# What is documented of the rules that a number starts.
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LevenbergMarquardt": (
        kfgn.transforms.LevenbergMarquardt(2.0),
        {"initial": 2.0, "minimum": 1e-9, "maximum": 1e6, "period": 5, "decay": 0.97,
         "thresholds": (0.25, 0.75),  # Martens & Grosse (2015), section 6.5
         "agreement": (0.5, 0.6)},  # ours
    ),
    "Greedy": (
        kfgn.transforms.Greedy(2.0),
        {"initial": 2.0, "minimum": 1e-9, "maximum": 1e6, "period": 20, "decay": 0.95},
    ),
}  # fmt: skip

PRESETS = {
    "paper": (kfgn.transforms.PRESETS["paper"], PAPER, kfgn.kfra),
    "cnn": (
        kfgn.transforms.HESSIAN_FREE_PRESETS["cnn"],
        CNN,
        kfgn.transforms.scale_by_conjugate_gradient,
    ),
    "martens": (
        kfgn.transforms.HESSIAN_FREE_PRESETS["martens"],
        MARTENS,
        kfgn.transforms.scale_by_conjugate_gradient,
    ),
}


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those of a rule beside the others as `option.field`."""
    found = {}
    for name, value in settings.items():
        inside = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        found |= {f"{name}.{f.name}": getattr(value, f.name) for f in inside} or {name: value}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_table(name):
    preset, table, function = PRESETS[name]
    assert flat(preset) == table
    assert set(preset) <= set(inspect.signature(function).parameters)


def test_no_other_presets():
    assert list(kfgn.transforms.PRESETS) == ["paper"]
    assert list(kfgn.transforms.HESSIAN_FREE_PRESETS) == ["cnn", "martens"]


@pytest.mark.parametrize("name", RULES)
def test_rules_have_their_defaults(name):
    rule, table = RULES[name]
    assert {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)} == table


def test_rules_of_the_paper():
    assert isinstance(PRESETS["paper"][0]["step_damping"], kfgn.transforms.LevenbergMarquardt)
    assert isinstance(PRESETS["paper"][0]["factor_damping"], kfgn.transforms.Greedy)


def test_aliases_have_one_explicit_signature():
    signatures = [inspect.signature(f) for f in (kfgn.kfra, kfgn.kflr, kfgn.kfac)]
    assert signatures[0] == signatures[1] == signatures[2]
    kinds = {p.kind for p in signatures[0].parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    for alias, equation in ((kfgn.kfra, "(26)"), (kfgn.kflr, "(25)"), (kfgn.kfac, "D.3")):
        assert alias.__name__ in alias.__doc__ and equation in alias.__doc__.splitlines()[0]
        assert all(name in alias.__doc__ for name in signatures[0].parameters)


def test_a_rule_of_ones_own():
    """One class, passed where a number could be."""

    @dataclasses.dataclass(frozen=True)
    class Halving(kfgn.transforms.StepDamping):
        def adapted(self, value, ratio):
            return self.clip(value / 2)

    @dataclasses.dataclass(frozen=True)
    class Tenth(kfgn.transforms.FactorDamping):
        def candidates(self, value, step_damping):
            return step_damping[None] / 10

    params, batch = make_params(), make_batch()
    tx = kfgn.transforms.scale_by_curvature(
        kfgn.layers.find_blocks(OBJECTIVE, params, batch),
        step_damping=Halving(8.0, period=1),
        factor_damping=Tenth(0.8),
    )
    (_, grads), curvature = kfgn.value_grad_and_curvature(OBJECTIVE)(params, batch)
    state = tx.init(params)
    for tau, gamma in ((4.0, 0.8), (2.0, 0.4), (1.0, 0.2)):
        _, state = tx.update(grads, state, params, curvature=curvature)
        assert float(state.step_damping) == tau
        assert float(state.factor_damping) == pytest.approx(gamma)
