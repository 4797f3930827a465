"""Command line: ``python -m benchmarks autoencoder ...``, or another experiment's name."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import BenchmarkError
from benchmarks.harness.arguments import (
    OneLineParser,
    names,
    number,
    option,
    positive_int,
    positive_number,
    seed_int,
    widths,
)

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
FAILED = 2

# Modules with command lines of their own, by their names.
EXPERIMENTS = {
    "speed": "time the curvature computations",
    "sharing": "what weight sharing's products lose",
    "rosenbrock": "gradient descent and Newton's method on Rosenbrock's function",
    "logistic": "logistic regression by Newton, L-BFGS and conjugate gradients",
    "fashion": "Fashion-MNIST classifiers by first-, second- and quasi-second-order methods",
    "cnn": "subsampled Newton-CG on convolutional networks",
    "mixture": "a mixture of two classifiers, whose Fisher matrix is not its Gauss-Newton matrix",
    "grid": "first-order methods at a grid of rates beside KFRA and KFAC (section 5.1)",
    "versus": "KFRA beside KFAC, setting by setting and seed by seed",
    "peers": "the autoencoder by kfgn and by optax's optimizers, for the same time each",
    "ablations": "which of the defaults matter",
    "alignment": "how near the approximate updates are to Gauss-Newton's own",
    "ranks": "the rank of a batch's Gauss-Newton matrix, and its bounds",
    "cost": "what the factors cost as batch, width, outputs and samples grow",
    "surface": "the error surface of a toy network, and its curvature",
    "curvature": "where and by how much curvature is negative while a network trains",
}


def add_autoencoder_arguments(parser: argparse.ArgumentParser) -> None:
    """What the autoencoder can be told."""
    add = parser.add_argument
    add("--data", default="curves", help="curves, mnist, faces, digits or fashion_mnist (curves)")
    add("--data-dir", type=Path, help="read the data's files here, instead of downloading them")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--optimizer",
        default="kfra",
        help="kfra, kflr, kfac, adam, sgd, momentum or nesterov (kfra)",
    )
    which.add_argument(
        "--compare", type=names, help="several, as in kfra,adam: same batches, same start"
    )
    add("--updates", type=positive_int, help="how long to train (minutes on two CPU cores)")
    add("--batch-size", type=positive_int, default=1000, help="images per update (1000)")
    add("--learning-rate", type=positive_number, help="for the first-order optimizers")
    add("--decay-period", type=positive_int, help="halve the learning rate every so many updates")
    add(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="passed to kfgn's optimizer; may be repeated",
    )
    add("--l2", type=number, default=1e-5, help="weight of the L2 regularization (1e-5)")
    add("--layers", type=widths, help="widths of the encoder (1000,500,250,30)")
    add("--seed", type=seed_int, default=0, help="of the parameters and the batches (0)")
    add("--eval-every", type=positive_int, help="updates between evaluations (about 100 in all)")
    add("--out", type=Path, default=Path("runs"), help="where the run's folder is made (runs)")
    add("--resume", action="store_true", help="continue the latest such run from its checkpoint")
    add("--checkpoint-every", type=positive_int, help="updates between checkpoints (each minute)")
    add("--references", type=Path, help="plot the loss curves of this folder's csv files, too")
    add("--no-sgd-yardstick", action="store_true", help="do not time an SGD step to compare with")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = OneLineParser(
        prog="python -m benchmarks",
        description="The papers' experiments, and measurements of speed.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_autoencoder_arguments(
        commands.add_parser(
            "autoencoder", help="train the paper's deep autoencoders", allow_abbrev=False
        )
    )
    for name, purpose in EXPERIMENTS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return parser


def run(argv: Sequence[str]) -> int:
    """Hands the arguments to the command they name."""
    # The commands are imported only when asked for: each pulls in JAX, which takes seconds.
    if argv and argv[0] in EXPERIMENTS:
        return int(importlib.import_module(f"benchmarks.experiments.{argv[0]}").main(argv[1:]) or 0)
    given = vars(build_parser().parse_args(argv))
    del given["command"]
    compared, single = given.pop("compare"), given.pop("optimizer")
    if compared == ():
        raise BenchmarkError("argument --compare: expected names with commas between them")
    options = dict(given.pop("option"))
    autoencoder = importlib.import_module("benchmarks.experiments.autoencoder")
    request = autoencoder.Request(optimizers=compared or (single,), options=options, **given)
    problems, interrupted = autoencoder.run(request)
    if problems:
        print(f"error: {problems[0]}", file=sys.stderr)
    return INTERRUPTED if interrupted else FAILED if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what goes wrong into a line on stderr and an exit code."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except BenchmarkError as error:
        problem = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        problem = f"the package {error.name!r} is missing; install the benchmarks' requirements"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {problem}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
