"""One server for a whole module of tests that leave it as they found it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Server, run_server
from tests.fakes import FakeBackend


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server shared by the module; at the end nothing may be left in it, and its books must be sound."""
    with contextmanager(run_server)(tmp_path_factory.mktemp("house"), FakeBackend()) as server:
        yield server
        server.wait_idle()
        assert server.call(server.service.ledger.check) == []
