"""The models of `tests.tables.layers` beside dense truth."""

from tests.tables import layers
from tests.tables.checks import *  # noqa: F403
from tests.tables.checks import rows_of

pytest_generate_tests = rows_of(layers.ROWS)
