"""Tells the operator that an account has used more than it was thought to: a log line, and a webhook.

Owns the webhook's connections and the tasks that wait for it. No request waits for either, and the address, which may
hold a secret, is in no log.
"""

from __future__ import annotations

import asyncio
import logging
import random

import httpx

from ..observe import Metrics
from ..stores.limits import Alert

TIMEOUT_S = 5.0
TRIES = 4
FIRST_PAUSE_S = 0.5
CLOSING_S = 2.0
"""Seconds that alerts under way get when the server stops."""

MOST = 100
"""Alerts under way at once; more have a log line alone."""

_log = logging.getLogger(__name__)


class Alerts:
    """Logs each Alert, and posts it to `webhook`, an URL, with a few attempts. Counts "logged", "sent" and "failed"."""

    def __init__(self, webhook: str | None, metrics: Metrics) -> None:
        self._webhook = webhook
        self._metrics = metrics
        self._http: httpx.AsyncClient | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, alert: Alert) -> None:
        """Log `alert`, and send it in a task of its own. Never raises, never waits."""
        fields = _fields(alert)
        _log.warning("usage above the threshold of the day", extra={"fields": fields})
        if self._webhook is None:
            self._metrics.alerts.labels("logged").inc()
            return
        if len(self._tasks) >= MOST:
            self._done("dropped")
            return
        task = asyncio.get_running_loop().create_task(self._send(self._webhook, fields), name="usage alert")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait a little for alerts under way, then drop them."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSING_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    async def _send(self, url: str, fields: dict[str, object]) -> None:
        fault = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
            fault, again = await self._post(url, fields)
            if not again:
                break
        self._done(fault or "sent")

    async def _post(self, url: str, fields: dict[str, object]) -> tuple[str, bool]:
        """What went wrong in one attempt, empty for nothing; and whether another one may help."""
        if self._http is None:
            self._http = httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=4))
        try:
            async with asyncio.timeout(2 * TIMEOUT_S), self._http.stream("POST", url, json=fields) as answer:
                status = answer.status_code
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            return type(error).__name__, True
        return ("", False) if status < 300 else (f"status {status}", status == 429 or status >= 500)

    def _done(self, outcome: str) -> None:
        self._metrics.alerts.labels("sent" if outcome == "sent" else "failed").inc()
        if outcome != "sent":
            _log.error("a usage alert did not reach its webhook: %s", outcome)


def _fields(alert: Alert) -> dict[str, object]:
    return {
        "event": "usage_above_threshold",
        "account": alert.account,
        "user": alert.user,
        "characters": alert.characters,
        "threshold": alert.threshold,
        "day": alert.day,
    }
