"""The models of `tests.any_frameworks` beside dense truth."""

from tests import any_frameworks
from tests.any_checks import *  # noqa: F403
from tests.any_checks import rows_of

pytest_generate_tests = rows_of(any_frameworks.ROWS)
