"""The models of `tests.any_loops` beside dense truth."""

from tests import any_loops
from tests.any_checks import *  # noqa: F403
from tests.any_checks import rows_of

pytest_generate_tests = rows_of(any_loops.ROWS)
