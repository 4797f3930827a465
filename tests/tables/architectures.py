"""The table of architectures: any layer, any use of a parameter, any graph, any library.

    row = ROWS["conv_1d"]
    model, params, inputs = row.case()
    targets = make_targets("conv_1d")

Needs the fixture `x64`. Every model is small enough for dense truth. The table
of `tests.tables.nets` beside it has networks of dense layers, with the theorems
that hold for each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import kfgn
from tests.tables import attention, derivatives, frameworks, graphs, layers, loops, uses
from tests.tables.losses import LOSSES as PLAIN
from tests.tables.losses import LossRow
from tests.tables.rows import Case, Row

__all__ = [
    "KINDS",
    "LOSSES",
    "ROWS",
    "SAME_EQUATIONS",
    "SECOND_LOSS",
    "Case",
    "Row",
    "make_targets",
]


def _merged(*tables: dict[str, Row]) -> dict[str, Row]:
    merged: dict[str, Row] = {}
    for table in tables:
        assert not merged.keys() & table.keys(), merged.keys() & table.keys()
        merged |= table
    return merged


ROWS: dict[str, Row] = _merged(
    layers.ROWS,
    uses.ROWS,
    loops.ROWS,
    graphs.ROWS,
    derivatives.ROWS,
    attention.ROWS,
    frameworks.ROWS,
)

#: Rows of every kind of layer, use and loop. A Hessian's diagonal is that of its blocks but for
#: the last step, at a kernel, which knows of no graph around it.
KINDS = frozenset((*layers.ROWS, *uses.ROWS, *loops.LAYER_LOOPS))

#: Rows whose equations are those of another, from another library or in a net around them: how
#: they are read, and what is made of the Jacobians, is compared; the Hessian knows equations.
FROM_ELSEWHERE = """
    linen_gru_sequence nnx_gru equinox_gru linen_optimized_lstm linen_setup encoder_block
    attention_nnx attention_nnx_defaults attention_equinox vision_transformer equinox_image
"""
SAME_EQUATIONS = frozenset(FROM_ELSEWHERE.split())


def classes_and_value(outputs: Any, target: Any) -> jax.Array:
    """Cross-entropy of one output and squared error of another: convex."""
    error = outputs["value"] - target["value"]
    return 0.5 * error**2 - jnp.sum(target["classes"] * jax.nn.log_softmax(outputs["classes"]))


def _classes_and_value_targets(key, outputs):
    first, second = jax.random.split(key)
    return {
        "classes": PLAIN["one_hot"].targets(first, outputs["classes"]),
        "value": PLAIN["squared_error"].targets(second, outputs["value"]),
    }


#: The losses of the rows; all have targets of the shape of the outputs.
LOSSES: dict[str, LossRow] = {
    "squared_error": PLAIN["squared_error"],
    "softmax_cross_entropy": PLAIN["one_hot"],
    "sigmoid_binary_cross_entropy": PLAIN["sigmoid"],
    "classes_and_value": LossRow(
        kfgn.losses.from_function(classes_and_value, convex=True),
        classes_and_value,
        _classes_and_value_targets,
    ),
}


def loss_row(name: str) -> LossRow:
    """The loss that a row is tested with."""
    return LOSSES[ROWS[name].loss]


def make_targets(name: str, case: Case | None = None, seed: int = 7, loss: str = "") -> Any:
    """Targets for the inputs of a row, or of a case of it, under its loss or another."""
    model, params, inputs = case or ROWS[name].case()
    outputs = jax.eval_shape(model, params, inputs)
    return LOSSES[loss or ROWS[name].loss].targets(jax.random.key(seed), outputs)


#: A row for each way that curvature passes a model, once more under another loss. The
#: recursions know the loss by its Hessian and gradient in the outputs alone, and the rows'
#: own losses already go with every structure, so one second loss each is enough: a full
#: Hessian that depends on the outputs (softmax) or a diagonal one (sigmoid).
WITH_SOFTMAX = """
    conv_2d_groups layer_norm scalar_scale custom_jvp weight_norm tied scan_layers siamese
    attention_cross
"""
WITH_SIGMOID = """
    conv_1d_strided dense_sequence embed_tied token_prepended einsum_heads custom_vjp
    tied_transposed max_pool resnet
"""
SECOND_LOSS: dict[str, str] = dict.fromkeys(WITH_SOFTMAX.split(), "softmax_cross_entropy")
SECOND_LOSS |= dict.fromkeys(WITH_SIGMOID.split(), "sigmoid_binary_cross_entropy")
