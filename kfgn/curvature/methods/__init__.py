"""How pre-activation factors are made: a method is one file here, and one line below."""

from kfgn.base.errors import OptionError
from kfgn.curvature.methods.empirical import Empirical
from kfgn.curvature.methods.kfac import KFAC
from kfgn.curvature.methods.kflr import KFLR
from kfgn.curvature.methods.kfra import KFRA
from kfgn.curvature.methods.method import LossCost, Method, Request, UseCost

METHODS: dict[str, Method] = {
    method.name: method for method in (KFRA(), KFLR(), KFAC(), Empirical())
}

__all__ = ["METHODS", "LossCost", "Method", "Request", "UseCost", "method_of"]


def method_of(name: str) -> Method:
    """The method of a name; raises OptionError for an unknown one."""
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
