"""Models of every kind with the sigmoid cross-entropy, beside dense truth."""

from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of, with_loss
from tests.tables.representatives import REPRESENTATIVES

pytest_generate_tests = rows_of(with_loss(REPRESENTATIVES, "sigmoid_binary_cross_entropy"))
