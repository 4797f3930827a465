"""Damping rules, one a file: how τ and γ start, when they are due, and how they change.

A rule of your own is a subclass of `StepDamping` or `FactorDamping`.
"""

from kfgn.optimizers.damping.fixed import Fixed
from kfgn.optimizers.damping.following import Following
from kfgn.optimizers.damping.greedy import Greedy
from kfgn.optimizers.damping.levenberg_marquardt import LevenbergMarquardt
from kfgn.optimizers.damping.pair import rules_of
from kfgn.optimizers.damping.rule import Damping, FactorDamping, StepDamping, as_rule

__all__ = [
    "Damping",
    "FactorDamping",
    "Fixed",
    "Following",
    "Greedy",
    "LevenbergMarquardt",
    "StepDamping",
    "as_rule",
    "rules_of",
]
