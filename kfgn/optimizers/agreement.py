"""Whether the next batch agrees with a step, which its own batch cannot say.

The reduction ratio ρ is measured on the batch that chose the step, and a step that fits the
noise of its batch fits it well: ρ stays near 1 while the objective of all examples rises. The
next batch had no say in the step e, and its slope and curvature along e are known with the
momentum: it would have had e longer by the part

    b / a,   b = e'g,   a = e'(G + (τ + η) I)e,

and `1 + b/a` of it is what this batch takes for right: 1 or more where the batches agree, 1/2
where the step has changed nothing for it, by the model, and 0 where nothing but noise was
fitted. Sums over updates go into the ratio, for single slopes have heavy tails. Where every
batch is the same nothing is lost: the slope after a step is then that of the damping alone.
"""

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.types import Array, Scalar
from kfgn.optimizers.quadratic_model import Step

_DECAY = 0.9


def agreement_after(evidence: Float[Array, "2"], best: Step) -> tuple[Float[Array, "2"], Scalar]:
    """The averages of b and a with those of one more batch, and `1 + b/a`; 1 without momentum."""
    evidence = _DECAY * evidence + (1 - _DECAY) * best.along_previous
    slope, curved = evidence
    known = curved > 0
    return evidence, 1 + jnp.where(known, slope, 0) / jnp.where(known, curved, 1)
