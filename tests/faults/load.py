"""Clients that go on asking whatever dies, and remember what came of each attempt.

Owns what a client can know: the answer's head, its bytes, how it ended. A cut answer that had an Idempotency-Key is
asked for again until it comes whole.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Literal

import httpx

from tests.faults.house import FREE, KEYS, PAID, House
from tests.speech.textual import SAMPLES, pcm_of

Outcome = Literal["whole", "cut", "left", "silent", "refused", "false"]
"""false: whole, with bytes that are not the text's. silent: not even a head. left: the client hung up."""

TEXTS = [
    " ".join(f"Sentence {part} of text number {number} is long enough to be spoken alone." for part in range(parts))
    for number, parts in ((number, 1 + number % 5) for number in range(40))
]
EXPECTED = {text: pcm_of(text, SAMPLES) for text in TEXTS}
LONGEST_ANSWER_S = 20.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request, as its client saw it. `request_id` is empty without a head; `ended`: by the monotonic clock."""

    account: str
    model: str
    text: str
    key: str
    outcome: Outcome
    request_id: str = ""
    cache: str = ""
    status: int = 0
    heard: int = 0
    ended: float = 0.0


class Clients:
    """`count` clients, each of which asks for one thing at a time until `stop` is set."""

    def __init__(self, house: House, count: int, seed: int) -> None:
        self.attempts: list[Attempt] = []
        self._urls = [server.url for server in house.servers]
        self._count, self._seed = count, seed
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        self._stopped.set()

    def answered(self) -> int:
        """How many answers came whole by now."""
        return sum(attempt.outcome == "whole" for attempt in self.attempts)

    async def run(self) -> None:
        """Ask until stopped; what is cut then is still asked for again until it is whole."""
        timeout = httpx.Timeout(LONGEST_ANSWER_S, pool=None)
        async with httpx.AsyncClient(timeout=timeout) as client:
            await asyncio.gather(*(self._live(client, number) for number in range(self._count)))

    async def _live(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        for turn in range(10**9):
            if self._stopped.is_set():
                return
            text = TEXTS[min(int(rng.expovariate(0.1)), len(TEXTS) - 1)]
            account = rng.choice(list(KEYS))
            model = PAID if rng.random() < 0.7 else FREE
            key = f"key-{number}-{turn}" if rng.random() < 0.5 else ""
            leaves_after = rng.randrange(len(EXPECTED[text])) if rng.random() < 0.1 else None
            again = True
            while again:
                attempt = await self._ask(client, rng.choice(self._urls), account, model, text, key, leaves_after)
                self.attempts.append(attempt)
                again = attempt.status in (500, 503) or (bool(key) and attempt.outcome in ("cut", "silent"))
                leaves_after = None
                if attempt.outcome in ("silent", "refused"):
                    await asyncio.sleep(0.05)

    async def _ask(
        self,
        client: httpx.AsyncClient,
        url: str,
        account: str,
        model: str,
        text: str,
        key: str,
        leaves_after: int | None,
    ) -> Attempt:
        body = {"model": model, "voice": "alloy", "input": text, "response_format": "pcm"}
        headers = {"Authorization": f"Bearer {KEYS[account]}", **({"Idempotency-Key": key} if key else {})}
        head: dict[str, str | int] = {}
        heard = 0
        outcome: Outcome = "silent"
        try:
            async with client.stream("POST", f"{url}/v1/audio/speech", json=body, headers=headers) as answer:
                head = {"request_id": answer.headers["x-request-id"], "status": answer.status_code}
                head["cache"] = answer.headers.get("x-cache", "")
                outcome, heard = await _listen(answer, EXPECTED[text], leaves_after)
        except httpx.HTTPError:
            outcome = "cut" if head.get("status") == 200 else "silent"
        return Attempt(account, model, text, key, outcome, **head, heard=heard, ended=time.monotonic())  # type: ignore[arg-type]


async def _listen(answer: httpx.Response, expected: bytes, leaves_after: int | None) -> tuple[Outcome, int]:
    if answer.status_code != 200:
        await answer.aread()
        return "refused", 0
    data = b""
    try:
        async for part in answer.aiter_raw():
            data += part
            if not expected.startswith(data):
                return "false", len(data)
            if leaves_after is not None and len(data) > leaves_after:
                return "left", len(data)
    except httpx.HTTPError:
        return "cut", len(data)
    return ("whole" if data == expected else "false"), len(data)
