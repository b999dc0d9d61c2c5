"""How a response ends other than well: a client that leaves while work runs, a bill that cannot be paid."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.src.errors import Unavailable
from api.src.routers.responses import ClientGone, until_hangup
from api.src.stores.ledger_front import StoredLedger
from tests.conftest import Server
from tests.fakes import FakeBackend


class Client:
    """What a server's `receive` says of a client: nothing until it leaves."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def idle() -> int:
    """Let every callback run; the tasks beside this one."""
    for _ in range(5):
        await asyncio.sleep(0)
    return len(asyncio.all_tasks()) - 1


async def test_work_that_ends_in_time_is_returned() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await until_hangup(Client().receive, work()) == 7
    assert await idle() == 0


@pytest.mark.parametrize("error", [TimeoutError(), Unavailable("later"), ValueError()])
async def test_what_work_raises_is_raised(error: Exception) -> None:
    async def work() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        await until_hangup(Client().receive, work())
    assert raised.value is error
    assert await idle() == 0


async def test_a_hang_up_ends_the_work_first() -> None:
    client, ended = Client(), []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    asyncio.get_running_loop().call_later(0.01, client.left.set)
    with pytest.raises(ClientGone):
        await until_hangup(client.receive, work())
    assert ended == [True]
    assert await idle() == 0
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_client_that_had_left_before() -> None:
    client = Client()
    client.left.set()
    with pytest.raises(ClientGone):
        await until_hangup(client.receive, asyncio.sleep(60))


async def test_a_cancellation_from_outside_stays_one() -> None:
    task = asyncio.create_task(until_hangup(Client().receive, asyncio.sleep(60)))
    await idle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await idle() == 0


def test_a_hit_that_cannot_be_charged_is_an_error_and_costs_nothing(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nper_1000_characters = 1000\n")
    server = start_server(FakeBackend(), prices_file=prices)
    server.call(lambda: server.service.ledger.credit("anonymous", 10**6, "start"))
    body = {"input": "Said before.", "voice": "alloy"}
    assert server.client.post("/v1/audio/speech", json=body).headers["x-cache"] == "miss"
    server.wait_idle()
    balance = server.call(lambda: server.service.ledger.balance("anonymous"))

    async def charge(ledger: StoredLedger, event: Any, key: Any) -> None:
        raise Unavailable("Billing is not available at the moment.", retry_after=3)

    monkeypatch.setattr(StoredLedger, "charge", charge)
    answer = server.client.post("/v1/audio/speech", json=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert answer.json()["error"]["code"] == "unavailable"
    server.wait_idle()
    assert server.call(lambda: server.service.ledger.balance("anonymous")) == balance
