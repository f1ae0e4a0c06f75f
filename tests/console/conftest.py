"""What several tests of the console need."""

from collections.abc import Iterator

import pytest
from django.test import Client

from console.writer import FactWriter
from tests.console.pagecast import client_of


@pytest.fixture
def writer(transactional_db) -> Iterator[FactWriter]:
    """The thread that writes to the database, as `serve` has one."""
    made = FactWriter()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def operator(db: None) -> Client:
    """An operator who has logged in."""
    return client_of()
