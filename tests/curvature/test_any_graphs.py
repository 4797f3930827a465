"""The models of `tests.tables.graphs` beside dense truth."""

from tests.tables import graphs
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(graphs.ROWS)
