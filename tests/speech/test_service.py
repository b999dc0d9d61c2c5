"""The service without HTTP: what it yields, what a key covers, and what a sudden end leaves."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from api.src.audio.encoders import open_encoder
from api.src.domain import AudioChunk, AudioFormat, Model, Voice
from api.src.errors import InvalidRequest, NotFound, NotReady, ShuttingDown, SpeechError, SynthesisFailed, TimedOut
from api.src.speech import service as service_module
from api.src.speech.service import Qwen3TTSService
from api.src.stores.cache import CacheWriter
from api.src.text.segment import segment
from tests.conftest import Server
from tests.speech.asking import StartService, collect, eventually, speech_request
from tests.speech.textual import TextualBackend, noise, pcm_of, sentences
from tests.stores.ledgers import held_up

TEXT = sentences(4)


def leftovers(service: Qwen3TTSService) -> list[Any]:
    return [
        *service._running,
        *service._generations,
        *service._listeners,
        *service._tasks,
        *range(service.admission.running + service.admission.waiting),
    ]


# --- generate_speech ---


@pytest.mark.parametrize("format", get_args(AudioFormat))
async def test_one_chunk_is_the_last_and_all_together_are_the_file(
    start_service: StartService, format: AudioFormat
) -> None:
    service = await start_service(TextualBackend())
    with open_encoder(format) as encoder:
        expected = encoder.header
        for part in segment(TEXT):
            expected += encoder.encode(AudioChunk(noise(part.text), 24_000, part))
        expected += encoder.finish()
    for _ in range(2):  # made, then replayed
        chunks = [chunk async for chunk in service.generate_speech(speech_request(TEXT, format=format))]
        assert [chunk.is_last for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
        assert b"".join(chunk.data for chunk in chunks) == expected


def test_http_and_generate_speech_give_the_same_bytes(server: Server) -> None:
    body = {
        "input": TEXT,
        "response_format": "opus",
        "speed": 1.5,
        "seed": 7,
        "language": "de",
        "voice": {"id": "Nova"},
    }
    answer = server.client.post("/v1/audio/speech", json=body, headers={"Cache-Control": "no-store"})
    request = speech_request(
        TEXT, format="opus", speed=1.5, seed=7, language="german", voice="hum", model="fake-1", store=False
    )

    async def ask() -> bytes:
        return await collect(server.service, request)

    assert answer.content == server.call(ask)
    assert server.backend.spoken == 2


async def test_who_stops_iterating_leaves_nothing(start_service: StartService) -> None:
    backend = TextualBackend()
    service = await start_service(backend)
    async with aclosing(service.generate_speech(speech_request(TEXT))) as chunks:
        for backend.allowed in (1, 2):
            assert not (await anext(chunks)).is_last
    await eventually(lambda: not (leftovers(service) or backend.open))
    assert len(backend.segments) < 4
    assert [event.outcome for event in await service.ledger.usage(None, 10)] == ["cancelled"]


async def test_who_leaves_before_a_hit_is_charged_is_not_charged(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    await collect(service, speech_request(TEXT))
    async with held_up(service.ledger):
        listener = service.open(speech_request(TEXT))
        starting = asyncio.ensure_future(listener.start())
        await eventually(lambda: service.ledger._writer._jobs.qsize() > 0)
        listener.close()
        with pytest.raises(ShuttingDown):
            await starting
    await eventually(lambda: not leftovers(service))
    assert [event.outcome for event in await service.ledger.usage(None, 10)] == ["completed"]


async def test_who_leaves_while_a_finished_generation_tidies_up_has_not_stopped_it(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave, go_on = CacheWriter.__exit__, threading.Event()
    monkeypatch.setattr(CacheWriter, "__exit__", lambda *arguments: (go_on.wait(30), leave(*arguments))[1])
    service = await start_service(TextualBackend())
    await collect(service, speech_request(TEXT))
    assert service._running, "it must still be tidying up"
    await eventually(lambda: not service._listeners)
    go_on.set()
    await eventually(lambda: not service._running)
    counter = service._metrics.generations
    assert [counter.labels(outcome)._value.get() for outcome in ("completed", "stopped")] == [1, 0]


async def test_a_hundred_at_the_same_time_each_get_their_own(start_service: StartService) -> None:
    service = await start_service(TextualBackend(), queue_size=100)
    texts = [f"Number {number}. {TEXT}" for number in range(100)]
    answers = await asyncio.gather(*(collect(service, speech_request(text)) for text in texts))
    assert answers == [pcm_of(text) for text in texts]


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": "  \n"}, "input"),
        ({"text": "a" * 4097}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"model": "nothing"}, "model"),
        ({"language": "klingon"}, "language"),
    ],
)
async def test_what_cannot_be_spoken_is_refused_before_anything_is_taken(
    start_service: StartService, fields: dict[str, Any], param: str
) -> None:
    service = await start_service(TextualBackend())
    with pytest.raises(InvalidRequest) as refusal:
        service.open(replace(speech_request(TEXT), **fields))
    assert refusal.value.param == param
    assert leftovers(service) == []


async def test_an_odd_format_or_speed_gives_everything_back(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    for fields in ({"format": "midi"}, {"speed": 9.0}):
        with pytest.raises(SpeechError):
            await collect(service, replace(speech_request(TEXT), **fields))
    await eventually(lambda: not leftovers(service))


async def test_an_unready_backend_is_a_503(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    service.backend.ready = False  # type: ignore[attr-defined]
    with pytest.raises(NotReady):
        service.open(speech_request(TEXT))
    assert not service.readiness().ready


async def test_a_preview_is_free_made_once_and_only_of_built_in_voices(
    start_service: StartService, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nper_1000_characters = 1000\ncached_per_1000_characters = 1000\n")
    backend = TextualBackend()
    service = await start_service(backend, prices_file=prices)
    for name in ("hum", "nova", "HUM"):
        with closing(service.open_preview(name, "req_p")) as listener:
            await listener.start()
            assert await listener.whole()
    assert backend.spoken == 1
    assert "Hallo" in backend.segments[0].text, "a German voice speaks German"
    assert {event.price_micros for event in await service.ledger.usage(None, 10)} == {0}
    with pytest.raises(NotFound):
        service.open_preview("nobody", "req_q")


# --- the cache key ---

BASE = speech_request(TEXT)
CHANGES: dict[str, dict[str, Any]] = {
    "text": {"text": TEXT + " And more."},
    "voice": {"voice": "hum"},
    "format": {"format": "wav"},
    "speed": {"speed": 1.25},
    "language": {"language": "german"},
    "instructions": {"instructions": "whisper"},
    "seed": {"seed": 1},
}
SAME: dict[str, dict[str, Any]] = {
    "id": {"id": "req_other"},
    "account": {"account": "somebody else"},
    "alias of the voice": {"voice": "Alloy"},
    "alias of the model": {"model": "TTS-1-HD"},
    "tag of the language": {"language": "AUTO"},
    "whole speed": {"speed": 1},
}


def key_of(service: Qwen3TTSService, **fields: Any) -> str:
    listener = service.open(replace(BASE, **fields))
    listener.close()
    assert listener.script.key is not None
    return listener.script.key


@pytest.mark.parametrize("change", CHANGES)
async def test_what_changes_the_bytes_changes_the_key(start_service: StartService, change: str) -> None:
    service = await start_service(TextualBackend())
    assert key_of(service, **CHANGES[change]) != key_of(service)


@pytest.mark.parametrize("change", SAME)
async def test_what_leaves_the_bytes_leaves_the_key(start_service: StartService, change: str) -> None:
    service = await start_service(TextualBackend())
    assert key_of(service, **SAME[change]) == key_of(service)


class Changed(TextualBackend):
    """As TextualBackend, with another word for what it can do."""

    change: Callable[[Model], Model] = staticmethod(lambda model: model)

    @property
    def models(self) -> list[Model]:
        return [self.change(model) for model in super().models]


def with_fingerprint(model: Model) -> Model:
    tone, *others = model.voices
    return replace(model, voices=[Voice(tone.id, tone.name, tone.language, "tone-2"), *others])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: replace(model, revision="2"),
        lambda model: replace(model, id="fake-2"),
        with_fingerprint,
    ],
    ids=["revision", "model", "fingerprint"],
)
async def test_another_sound_of_the_backend_is_another_key(
    start_service: StartService, change: Callable[[Model], Model]
) -> None:
    backend = Changed()
    service = await start_service(backend)
    before = key_of(service)
    backend.change = change
    assert key_of(service) != before


async def test_the_backend_and_the_encoder_are_in_the_key(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {key_of(await start_service(TextualBackend(name=name))) for name in ("fake", "fake", "another")}
    monkeypatch.setattr(service_module, "ENCODER_REVISION", "another")
    keys.add(key_of(await start_service(TextualBackend())))
    assert len(keys) == 3


async def test_what_is_not_to_be_stored_has_no_key(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    listener = service.open(replace(BASE, store=False))
    listener.close()
    assert listener.script.key is None


# --- the end of the service ---


async def closed_in_time(service: Qwen3TTSService) -> None:
    async with asyncio.timeout(30):
        await service.close()
    assert leftovers(service) == []


@pytest.mark.parametrize("steps", [*range(12), 20, 40])
async def test_a_service_closed_while_a_request_starts_forgets_nothing(start_service: StartService, steps: int) -> None:
    backend = TextualBackend(delay_s=0.005, allowed=3 if steps < 20 else math.inf)
    service = await start_service(backend)
    requests = [asyncio.create_task(collect(service, speech_request(TEXT, store=store))) for store in (True, False)]
    for _ in range(steps):
        await asyncio.sleep(0.0005)
    await closed_in_time(service)
    for result in await asyncio.gather(*requests, return_exceptions=True):
        if isinstance(result, bytes):
            assert steps >= 20
        else:
            assert isinstance(result, ShuttingDown | SynthesisFailed), repr(result)
    assert backend.open == 0
    assert await service.ledger.check() == []


@pytest.mark.parametrize("blocked", ["find", "hold"])
async def test_a_service_closed_during_a_look_up_or_a_hold_leaves_none(
    start_service: StartService, blocked: str
) -> None:
    """The request is in the middle of taking something when everything is closed."""
    service = await start_service(TextualBackend())
    go_on = threading.Event()
    if blocked == "find":
        find = service._cache.find
        service._cache.find = lambda *place: (go_on.wait(30), find(*place))[1]  # type: ignore[method-assign]
    else:
        service.ledger._writer.submit(lambda db: go_on.wait(30))  # type: ignore[attr-defined]
    request = asyncio.create_task(collect(service, speech_request(TEXT)))
    await asyncio.sleep(0.05)
    threading.Timer(0.1, go_on.set).start()
    await closed_in_time(service)
    with pytest.raises(SpeechError):
        await request
    assert service.backend.spoken == 0  # type: ignore[attr-defined]


async def test_who_is_in_the_middle_of_an_answer_is_told_of_the_end(start_service: StartService) -> None:
    service = await start_service(TextualBackend(seconds_per_segment=2))
    long, short = sentences(8), sentences(1)
    for text in (long, short):
        await collect(service, speech_request(text))
    readers = [service.generate_speech(speech_request(text)) for text in (long, sentences(8, "sea"))]
    for reader in readers:
        await anext(reader)
    await closed_in_time(service)
    for reader in readers:
        with pytest.raises(SpeechError):
            async for _ in reader:
                pass
    with pytest.raises(ShuttingDown):
        await collect(service, speech_request(short))


async def test_a_closed_service_takes_nothing_and_closes_again(start_service: StartService) -> None:
    service = await start_service(TextualBackend())
    await closed_in_time(service)
    with pytest.raises(ShuttingDown):
        service.open(speech_request(TEXT))


async def test_the_wait_for_the_first_sound_is_bounded(start_service: StartService) -> None:
    backend = TextualBackend(allowed=0)
    service = await start_service(backend, request_timeout_s=0.1)
    asked_at = time.monotonic()
    with pytest.raises(TimedOut):
        await collect(service, speech_request(TEXT))
    assert time.monotonic() - asked_at >= 0.1
    await eventually(lambda: not (leftovers(service) or backend.open))
