"""The papers' experiments, and measurements of speed: ``python -m benchmarks --help``."""


class BenchmarkError(Exception):
    """Something the user can put right; the command line shows it as one line."""
