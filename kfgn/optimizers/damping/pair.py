"""Both rules of a recipe, of what a user gives for them."""

from kfgn.base.errors import OptionError
from kfgn.base.types import Number
from kfgn.optimizers.damping.following import Following
from kfgn.optimizers.damping.greedy import Greedy
from kfgn.optimizers.damping.levenberg_marquardt import LevenbergMarquardt
from kfgn.optimizers.damping.rule import FactorDamping, StepDamping, as_rule


def rules_of(
    step_damping: Number | StepDamping, factor_damping: Number | FactorDamping | None
) -> tuple[StepDamping, FactorDamping]:
    """The rules for τ and γ; γ may not become zero."""
    tau = as_rule("step_damping", step_damping, StepDamping, LevenbergMarquardt)
    if factor_damping is None:
        factor_damping = Following()
    gamma = as_rule("factor_damping", factor_damping, FactorDamping, Greedy).beside(tau)
    if isinstance(gamma.least, (int, float)) and gamma.least <= 0:
        raise OptionError(
            "factor_damping, or the step_damping that it follows, needs a positive minimum: "
            f"factors may be singular; found {gamma.least}"
        )
    return tau, gamma
