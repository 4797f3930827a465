"""The graph that the walk goes through: the layers of a model, and whole nodes between them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.devices import refuse_explicit_axes
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, PyTree
from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.flatten.loops import evaluate_with
from kfgn.model.graph.clusters import is_active
from kfgn.model.graph.nodes import Node, gather_nodes
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    evaluate,
    live_equations,
    read,
    size,
    variables,
)
from kfgn.model.program.thin import whole

# The rows of the largest block that a parameter in no layer gets of its own.
OWN_ROWS = 1024
_PRODUCTS = ("dot_general", "conv_general_dilated")


@jax.custom_jvp
def _replaced(computed: Array, value: Array) -> Array:
    """The value, with the derivative of what is computed."""
    del computed
    return value


@_replaced.defjvp
def _replaced_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Any, Any]:
    return primals[1], tangents[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model on one example: its layers, its nodes in forward order, its outputs."""

    model: FlatModel
    layers: dict[str, Layer]
    reasons: dict[str, str]  # parameters in no layer, and why
    free: tuple[str, ...] = ()  # parameters that the walk differentiates like data

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        """In forward order; of a model without loops that are kept."""
        assert not self.model.loops
        return gather_nodes(self.model, list(self.kept_uses.values()))

    @property
    def uses(self) -> dict[str, Use]:
        """The uses of all layers by their names."""
        return {name: use for layer in self.layers.values() for name, use in layer.uses.items()}

    def without_block(self, unassigned: str) -> dict[str, str]:
        """Parameters in no layer, with the reason; with "block" those alone that cannot have one.

        A block of a parameter's own has as many rows as the parameter has entries.
        """
        if unassigned != "block":
            return self.reasons if unassigned == "raise" else {}
        found = {}
        for name, reason in self.reasons.items():
            variable = self.model.parameters[name]
            if variable not in self.model.reached:
                found[name] = reason
            elif size(variable) > OWN_ROWS:
                found[name] = (
                    f"{reason}; a block of its own would have {size(variable):,} rows, and at "
                    f"most {OWN_ROWS:,} are formed"
                )
        return found

    @property
    def kept_uses(self) -> dict[str, Use]:
        """The uses of layers whose parameters are not free."""
        return {n: use for n, use in self.uses.items() if use.kernel.name not in self.free}

    def shared_values(self, params: dict[str, Array]) -> dict[Var, Array]:
        """The values that are the same for every example."""
        # As jax's arrays: a `custom_vjp` rule may index them.
        env = {
            v: x if isinstance(x, jax.Array) else jnp.asarray(x)
            for v, x in self.model.constants.items()
        }
        env.update({v: params[name] for name, v in self.model.parameters.items()})
        evaluate([e for e in self.model.equations if self._is_shared(e) and e.outvars], env)
        return env

    def slopes(self, params: dict[str, Array]) -> dict[Var, Array]:
        """For weighted sources of kernels and biases, each entry's slope in its parameter's."""
        sources = [use.kernel for use in self.uses.values()]
        sources += [use.bias.source for use in self.uses.values() if use.bias]
        wanted = list(dict.fromkeys(source.value for source in sources if source.weighted))
        if not wanted:
            return {}
        equations = live_equations(self.model.jaxpr.replace(outvars=wanted))

        def values(params: dict[str, Array]) -> list[Array]:
            env = dict(self.model.constants)
            env.update({v: params[name] for name, v in self.model.parameters.items()})
            evaluate(equations, env)
            return [env[v] for v in wanted]

        ones = jax.tree.map(jnp.ones_like, params)
        return dict(zip(wanted, jax.jvp(values, (params,), (ones,))[1], strict=True))

    def forward(
        self,
        params: dict[str, Array],
        inputs: PyTree,
        probes: dict[str, Array] | None = None,
        keep: Iterable[Any] = (),
        *,
        statistics: list[Array] | None = None,
        exact: bool = False,
        products: list[Array] | None = None,
    ) -> tuple[PyTree, list[Array]]:
        """The outputs of a batch and the values of `keep`, each with a leading `N`.

        A probe `[N, ...]` is added to a use's pre-activation: its cotangent
        is the gradient there. Effects such as `jax.debug.print` run here, once
        for each example, as under `jax.vmap`; nothing else that is made of the
        graph repeats them.

        Statistics of the batch are those of these examples, or are given, `[N, ...]` in
        the order of `model.statistics`. They have a derivative if `exact`. In either case
        effects have run before. Those of `products` that are given are not computed; their
        derivatives are.
        """
        refuse_explicit_axes(params, inputs)
        model = self.model
        shared = self.shared_values(params)
        keep = list(keep)
        with_aux = model.aux and not set(variables(keep)).isdisjoint(variables(model.aux.atoms))
        equations = model.equations if with_aux else model.jaxpr.eqns
        equations = [e for e in equations if not (self._is_shared(e) and e.outvars)]
        if exact or statistics is not None:  # effects have run
            equations = [e for e in equations if e.outvars]
        if statistics is not None:
            equations = [e for e in equations if not model.is_collective(e)]

        def one(
            leaves: list[Array], probes: dict[str, Array], given: list[Array], known: list[Array]
        ) -> Any:
            env = {**shared, **dict(zip(model.inputs, leaves, strict=True))}
            env |= zip(model.statistics, given, strict=bool(given))
            products = dict(zip(self.products, known, strict=bool(known)))
            at = {use.output: probes[n] for n, use in self.uses.items() if n in probes}
            for equation in equations:
                evaluate_with([equation], env, model.loops, at, keep)
                made = products.keys() & equation.outvars
                env |= {v: _replaced(whole(env[v], v), products[v]) for v in made}
                if model.is_collective(equation) and not exact:
                    env |= {v: jax.lax.stop_gradient(env[v]) for v in equation.outvars}
            return tuple([whole(read(env, v), v) for v in atoms] for atoms in (model.outputs, keep))

        run = jax.vmap(one, axis_name=model.axis_name)
        outputs, kept = run(jax.tree.leaves(inputs), probes or {}, statistics or [], products or [])
        return jax.tree.unflatten(model.output_tree, outputs), kept

    @functools.cached_property
    def products(self) -> tuple[Var, ...]:
        """The values outside of loops that take most of a forward pass."""
        equations = (e for e in self.model.jaxpr.eqns if e.primitive.name in _PRODUCTS)
        return tuple(v for e in equations for v in e.outvars if self.is_active(v))

    @functools.cached_property
    def held(self) -> Callable[[PyTree, tuple[PyTree, list[Array]]], PyTree]:
        """The model as a function of `(params, (inputs, statistics))`."""

        def model(params: PyTree, inputs: tuple[PyTree, list[Array]]) -> PyTree:
            data, statistics = inputs
            return self.forward(named_leaves(params), data, statistics=statistics)[0]

        model.independent = True  # type: ignore[attr-defined]  # as its outputs at fixed statistics are
        return model

    def probes(self, count: int) -> dict[str, Array]:
        """Zero probes for `count` examples."""
        return {
            name: jax.numpy.zeros((count, *use.output.aval.shape), use.output.aval.dtype)
            for name, use in self.uses.items()
        }

    def is_active(self, variable: Var) -> bool:
        """Whether a value is differentiable and depends on both data and parameters."""
        return is_active(self.model, variable)

    def _is_shared(self, equation: Equation) -> bool:
        roles = self.model.roles
        if self.model.is_collective(equation):
            return False
        return all(roles[v] <= Role.PARAMETER for v in variables(equation.invars))
