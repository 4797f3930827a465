"""The models of `tests.any_uses` beside dense truth."""

from tests import any_uses
from tests.any_checks import *  # noqa: F403
from tests.any_checks import rows_of

pytest_generate_tests = rows_of(any_uses.ROWS)
