"""What `kfgn.inspect` counts: for every block, and of all together."""

from typing import NamedTuple

from kfgn.base.types import Shape


class Row(NamedTuple):
    """One block of the curvature; for the costs see `inspect`."""

    name: str
    parameters: tuple[str, ...]  # their paths, kernel first
    kind: str  # "dense", "conv", "embedding", "scale", "shift", or a registered kind
    activation: Shape  # of Q; with a leading axis of slots and groups where there are several
    pre_activation: Shape  # of G, likewise
    positions: int  # of one example at which a kernel is applied, by all of its uses
    uses: int  # equations that a kernel is used in: more than one where it is tied
    slots: int  # kernels that are stacked in one parameter
    groups: int  # parts of a kernel that do not mix
    transposed: bool  # whether some uses see the kernel transposed
    bytes: int  # of both factors
    flops: dict[str, int]  # by method, of the factors of a batch, with one sample
    inversion: int  # FLOPs of inverting the factors once


class Totals(NamedTuple):
    """Sums over all blocks, and what the methods share among them."""

    parameters: int  # numbers in all parameters
    bytes: int
    between: dict[str, int]  # FLOPs by method between the layers, which are no block's
    flops: dict[str, int]  # with those
    waiting: dict[str, int]  # by method, what more those between layers take, for memory
    inversion: int
    solve: int  # FLOPs of a direction by the inverses
    gradient: int  # FLOPs of the batch's gradient, three times the forward pass
    linear: int  # FLOPs of the quadratic model, for 256 of the batch's examples
    update: dict[str, float]  # by method, what an update takes, predicted in gradients
    periods: dict[str, int]  # by method, of factors and inverses, where "auto" sets them
    update_auto: dict[str, float]  # what an update takes then
    columns: int  # of the output Hessian's root: backward passes that "kflr" makes
    largest: int  # entries per example of the largest value that "kfra" goes through, 0 for none
    matrix_bytes: int  # of the matrix over that value's entries
    feasible: bool  # whether "kfra" forms a matrix as large as that, and unrolls the loops
    unrolls: bool  # whether there are loops, which "kfra" unrolls
    values: int  # bytes of all values between a batch's equations
    moments: dict[str, int]  # by method, FLOPs of the moments that inverse="ekfac" takes besides
    update_ekfac: dict[str, float]  # by method, what an update takes then, in gradients
    roots: int = 0  # FLOPs of decomposing output Hessians that have no structure, among `between`
    split_at: int | None = None  # rows above which `kfgn.make` keeps blocks of factors; None: never
    too_large: tuple[str, ...] = ()  # what is wrong with factors that no method forms
