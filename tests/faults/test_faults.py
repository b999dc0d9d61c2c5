"""The fault run (`make faults`), and that its verdict sees what is broken."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from api.src.domain import UsageEvent
from tests.faults.house import FULL, PAID, built
from tests.faults.load import TEXTS, Attempt
from tests.faults.run import run
from tests.faults.verdict import Books, faults, full_price

KILLS = 110


@pytest.mark.slow
@pytest.mark.timeout(580)  # 30 s on two cores
def test_nothing_is_lost_or_invented_when_everything_is_killed(tmp_path: Path) -> None:
    with built(tmp_path) as house:
        report = asyncio.run(run(house, kills=KILLS, clients=8, seed=1, pause_s=0.2))
    print(report)
    assert report["faults"] == []
    assert sum(report["killed"].values()) == KILLS
    assert min(report["killed"].values()) >= 3
    # What makes the above worth something: all of it was under way.
    attempts, statuses = report["attempts"], report["statuses"]
    assert attempts["whole"] >= KILLS
    assert attempts["cut"] > 0
    assert attempts["left"] > 0
    assert statuses[402] > 0
    assert min(report["cache"].get(status, 0) for status in ("miss", "hit", "join")) > 0
    assert report["charged_micros"] > 0


TEXT = TEXTS[0]
WHOLE = Attempt("wallet", PAID, TEXT, "", "whole", request_id="req_1", cache="miss", status=200, ended=5.0)
PRICE = full_price(WHOLE)
EVENT = UsageEvent("req_1", "wallet", PAID, "tone", len(TEXT), 100, "completed", PRICE, 1.0)
BOOKS = Books([EVENT], {}, {"wallet": 1000 * FULL - PRICE}, {"wallet": 1000 * FULL}, 0)
FREE_WHOLE = replace(WHOLE, model="gpt-4o-mini-tts")
KEYED = replace(WHOLE, key="k")


def balance(spent: int) -> dict[str, int]:
    return {"wallet": 1000 * FULL - spent}


@pytest.mark.parametrize(
    ("attempts", "books", "away"),
    [
        pytest.param([WHOLE], BOOKS, [], id="a whole answer"),
        pytest.param([replace(WHOLE, outcome="cut")], BOOKS, [], id="a cut answer that was charged"),
        pytest.param(
            [replace(WHOLE, outcome="cut")], replace(BOOKS, events=[], balances=balance(0)), [], id="or was not"
        ),
        pytest.param([replace(WHOLE, outcome="silent", request_id="")], BOOKS, [], id="an answer that did not arrive"),
        pytest.param([KEYED], replace(BOOKS, keys={("wallet", "k"): PRICE}), [], id="an answer under a key"),
        pytest.param(
            [FREE_WHOLE], replace(BOOKS, events=[], balances=balance(0)), [(4, 6)], id="free, in memory alone"
        ),
    ],
)
def test_sound_books_pass(attempts: list[Attempt], books: Books, away: list[tuple[float, float]]) -> None:
    assert faults(attempts, books, away) == []


@pytest.mark.parametrize(
    ("attempts", "books"),
    [
        pytest.param([replace(WHOLE, outcome="false")], BOOKS, id="false bytes"),
        pytest.param([WHOLE], replace(BOOKS, events=[], balances=balance(0)), id="a whole answer for nothing"),
        pytest.param([FREE_WHOLE], replace(BOOKS, events=[], balances=balance(0)), id="a free answer without an event"),
        pytest.param([WHOLE], replace(BOOKS, events=[EVENT, EVENT], balances=balance(2 * PRICE)), id="charged twice"),
        pytest.param([replace(WHOLE, cache="hit")], BOOKS, id="too dear"),
        pytest.param([replace(WHOLE, outcome="refused", status=503)], BOOKS, id="charged for silence"),
        pytest.param([], BOOKS, id="a charge that nobody asked for"),
        pytest.param([WHOLE], replace(BOOKS, balances=balance(PRICE - 1)), id="a balance that is no sum"),
        pytest.param([WHOLE], replace(BOOKS, open_holds=1), id="a hold that outlived its lease"),
        pytest.param([KEYED], replace(BOOKS, keys={("wallet", "k"): 2 * PRICE}), id="a repeat that was charged"),
        pytest.param([KEYED], BOOKS, id="a key under which nothing was charged"),
    ],
)
def test_broken_books_are_seen(attempts: list[Attempt], books: Books) -> None:
    assert faults(attempts, books, []) != []
