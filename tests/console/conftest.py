"""What several tests of the console need."""

from collections.abc import Iterator

import pytest

from console.writer import FactWriter


@pytest.fixture
def writer(transactional_db) -> Iterator[FactWriter]:
    """The thread that writes to the database, as `serve` has one."""
    made = FactWriter()
    made.start()
    yield made
    made.stop()
