"""Layers: how parameters form blocks, what a block's factors are, kinds of your own."""

from kfgn.curvature.factors import Diagonal, Factors
from kfgn.model.layer_kinds import register_layer
from kfgn.model.parameter_use import ChannelRule, Form
from kfgn.model.primitives import register_primitive
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
