"""The models of `tests.tables.loops` beside dense truth."""

from tests.tables import loops
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(loops.ROWS)
