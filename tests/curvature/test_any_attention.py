"""The models of `tests.tables.attention` beside dense truth."""

from tests.tables import attention
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(attention.ROWS)
