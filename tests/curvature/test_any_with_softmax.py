"""Models of every kind with the softmax cross-entropy, beside dense truth."""

from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of, with_loss
from tests.tables.representatives import REPRESENTATIVES

pytest_generate_tests = rows_of(with_loss(REPRESENTATIVES, "softmax_cross_entropy"))
