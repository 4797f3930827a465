"""Which parameters share a block of the curvature, and where they meet data.

Where parameters go (`sources`, `find_sources`); the equations that read them as kernels
(`find_uses`, by `layer_kinds`, `readers`, `routed`, `loop_uses`; described as a `parameter_use`);
and which of these make a block (`find_layers`, `layer`, `factor_size`).
"""
