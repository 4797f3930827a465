"""Steps: from a curvature to optax updates, by Kronecker factors or by other solvers.

The recipe (`kfra`, `kflr`, `kfac`) is made of parts: `LayerBlocks` say which
parameters form which layer, a preconditioner inverts their damped factors, the
quadratic model picks the step, rules adapt the dampings. Beside it stand
conjugate gradients on the full Gauss-Newton matrix, Newton's method, and the
general minimizers. `kfgn.transforms` and `kfgn.solvers` export what is public.
"""

from kfgn.optimizers.alias import kfac, kflr, kfra
from kfgn.optimizers.layer_blocks import LayerBlocks, find_blocks
from kfgn.optimizers.make import make

__all__ = ["LayerBlocks", "find_blocks", "kfac", "kflr", "kfra", "make"]
