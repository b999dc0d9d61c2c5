"""The form of an entry: what comes back is what went in, and nothing else is believed."""

from __future__ import annotations

import json

import pytest

from api.src.domain import UsageEvent
from api.src.stores.usage_entry import FIELD, Unreadable, pack, unpack

EVENT = UsageEvent("r1", "ännchen", "tts-1", "alloy", 10, 800, "cached", 0, 1700000000.123456, "emma")
CONTENT = json.loads(pack(EVENT))


def test_an_event_comes_back_as_it_was() -> None:
    assert unpack({FIELD: pack(EVENT)}) == EVENT


def test_without_an_end_user_and_with_what_a_newer_version_adds() -> None:
    content = {**CONTENT, "mood": "merry"}
    del content["user"]
    assert unpack({FIELD: json.dumps(content).encode(), b"version": b"9"}).user == ""


@pytest.mark.parametrize("name", [name for name in CONTENT if name != "user"])
def test_nothing_may_be_missing(name: str) -> None:
    content = {key: value for key, value in CONTENT.items() if key != name}
    with pytest.raises(Unreadable, match=name):
        unpack({FIELD: json.dumps(content).encode()})


@pytest.mark.parametrize("raw", [b"", b"no JSON", b"[]", b"7", b"null", b"[" * 100_000, b"\xff"])
def test_what_is_no_object_is_unreadable(raw: bytes) -> None:
    with pytest.raises(Unreadable):
        unpack({FIELD: raw})


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_id": None},
        {"account": "a\0"},
        {"voice": "\ud800"},
        {"user": 5},
        {"characters": "1"},
        {"characters": True},
        {"characters": -1},
        {"audio_ms": 2**63},
        {"audio_ms": 1.5},
        {"price_micros": 7},
        {"at": "now"},
        {"at": True},
        {"at": float("inf")},
        {"at": 10**400},
    ],
)
def test_values_that_no_ledger_takes_are_unreadable(wrong: dict[str, object]) -> None:
    with pytest.raises(Unreadable):
        unpack({FIELD: json.dumps({**CONTENT, **wrong}).encode()})


def test_an_entry_without_the_field_is_unreadable() -> None:
    with pytest.raises(Unreadable):
        unpack({b"other": pack(EVENT)})
