"""The models of `tests.tables.uses` beside dense truth."""

from tests.tables import uses
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(uses.ROWS)
