"""The models of `tests.tables.frameworks` beside dense truth."""

from tests.tables import frameworks
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(frameworks.ROWS)
