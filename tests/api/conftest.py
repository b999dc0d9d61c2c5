"""One server for a whole module of tests that leave it as they found it, and what a server logs."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.api.stderr import StderrLines
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server shared by the module; at the end nothing may be left in it, and its books must be sound."""
    with contextmanager(run_server)(tmp_path_factory.mktemp("house"), FakeBackend()) as server:
        yield server
        server.wait_idle()
        assert server.call(server.service.ledger.check) == []


@pytest.fixture
def stderr_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[StderrLines]:
    """What has been written to standard error, in lines. The server logs there; start it in a fixture that comes
    after this one, for pytest puts a stream of its own in place before the test itself."""
    handlers, level = logging.root.handlers[:], logging.root.level
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    for client in ("httpx", "httpcore"):  # the tests' own, which log what they ask for
        monkeypatch.setattr(logging.getLogger(client), "disabled", True)

    def lines() -> list[str]:
        for handler in logging.root.handlers:
            handler.flush()
        return stderr.getvalue().split("\n")[:-1]

    yield lines
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
