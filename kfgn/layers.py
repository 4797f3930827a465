"""Layers: how parameters form blocks, what a block's factors are, kinds of your own."""

from kfgn.curvature.factors import Diagonal, Factors
from kfgn.model.layers.layer_kinds import register_layer
from kfgn.model.layers.parameter_use import ChannelRule, Form
from kfgn.model.program.primitives import register_primitive
from kfgn.optimizers.layer_blocks import LayerBlocks, find_blocks

__all__ = [
    "ChannelRule",
    "Diagonal",
    "Factors",
    "Form",
    "LayerBlocks",
    "find_blocks",
    "register_layer",
    "register_primitive",
]
