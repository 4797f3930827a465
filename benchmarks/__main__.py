"""Command line: ``python -m benchmarks NAME ...``."""

import importlib
import sys
from collections.abc import Sequence

from benchmarks import BenchmarkError
from benchmarks.harness import interrupt
from benchmarks.harness.arguments import OneLineParser

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
FAILED = 2

# Every command is a module of `benchmarks.experiments` with a function `main(arguments)`.
EXPERIMENTS = {
    "autoencoder": "train the paper's deep autoencoders",
    "speed": "time the curvature computations",
    "trainings": "small trainings as users write them, beside Adam",
    "suite": "thirteen tasks beside first-order methods at their best rates",
    "loops": "what KFAC's step costs to compile and to run where a model has loops",
    "sharing": "what weight sharing's products lose",
    "rosenbrock": "gradient descent and Newton's method on Rosenbrock's function",
    "poisson": "a physics-informed network beside L-BFGS and Adam",
    "logistic": "logistic regression by Newton, L-BFGS and conjugate gradients",
    "fashion": "Fashion-MNIST classifiers by first-, second- and quasi-second-order methods",
    "cnn": "subsampled Newton-CG on convolutional networks",
    "mixture": "a mixture of two classifiers, whose Fisher matrix is not its Gauss-Newton matrix",
    "grid": "first-order methods at a grid of rates beside KFRA and KFAC (section 5.1)",
    "versus": "KFRA beside KFAC, setting by setting and seed by seed",
    "peers": "the autoencoder by kfgn and by optax's optimizers, for the same time each",
    "figure": "draw the README's figure from the results of peers",
    "ablations": "which of the defaults matter",
    "alignment": "how near the approximate updates are to Gauss-Newton's own",
    "ranks": "the rank of a batch's Gauss-Newton matrix, and its bounds",
    "cost": "what the factors cost as batch, width, outputs and samples grow",
    "plan": "seconds of an update, predicted from shapes and measured",
    "savings": "blocks of factors, and Q of few examples: what they save and cost",
    "stagger": "updates of even length, and what that does to the loss",
    "refresh": "what a refresh of the inverses takes of each of many devices",
    "surface": "the error surface of a toy network, and its curvature",
    "kills": "a training killed at random moments, and what each kill cost",
    "curvature": "where and by how much curvature is negative while a network trains",
}


def run(argv: Sequence[str]) -> None:
    """Hands the arguments to the command they name."""
    if argv and argv[0] in EXPERIMENTS:
        # Imported only when asked for: each pulls in JAX, which takes seconds.
        experiment = importlib.import_module(f"benchmarks.experiments.{argv[0]}")
        with interrupt.heard():
            experiment.main(argv[1:])
        return
    parser = OneLineParser(
        prog="python -m benchmarks",
        description="The papers' experiments, and measurements of speed.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in EXPERIMENTS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what goes wrong into a line on stderr and an exit code."""
    try:
        run(list(sys.argv[1:] if argv is None else argv))
        return 0
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
