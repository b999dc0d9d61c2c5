"""The remote backend against a server that misbehaves, over a real socket."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from api.src.backends import remote as remote_module
from api.src.backends import remote_client
from api.src.backends.chain import Chain
from api.src.backends.remote import RemoteBackend
from api.src.backends.remote_client import Remote
from api.src.backends.remote_faults import retry_after
from api.src.breaker import Breaker
from api.src.domain import AudioChunk, Segment, SpeechRequest
from api.src.errors import (
    NotReady,
    RateLimited,
    ShuttingDown,
    SpeechError,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimedOut,
    UpstreamUnavailable,
)
from tests.backends.faulty_upstream import (
    SECRET,
    Answer,
    FaultyUpstream,
    bare,
    chunked,
    document,
    endless,
    faulty_upstream,
    head,
    held,
    late,
    refusal,
    silent_after,
    tone,
    whole,
)
from tests.speech.asking import eventually

TEXT = "The river runs past the old mill."
TONE = tone()
Start = Callable[..., Any]


@pytest.fixture
def upstream() -> Iterator[FaultyUpstream]:
    with faulty_upstream() as server:
        yield server


@pytest_asyncio.fixture
async def start(upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Start backends: what `Remote` and `RemoteBackend` take, as keyword arguments."""
    monkeypatch.setattr(remote_client, "BACKOFF_S", 0.001)
    monkeypatch.setattr(remote_module, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(remote_module, "LONGEST_RETRY_S", 0.05)
    running = []

    async def start(**fields: Any) -> RemoteBackend:
        own = {name: fields.pop(name) for name in ("models", "revision", "breaker") if name in fields}
        remote = Remote(**{"url": upstream.url, "api_key": SECRET, "first_byte_s": 25.0, **fields})
        running.append(RemoteBackend(remote, **own))
        await running[-1].start()
        return running[-1]

    yield start
    for backend in running:
        await backend.stop()


def request(**fields: Any) -> SpeechRequest:
    return SpeechRequest(**{"id": "req", "account": "a", "model": "tts-1", "text": TEXT, "voice": "alloy", **fields})


async def stream(texts: list[str]) -> AsyncIterator[Segment]:
    for i, text in enumerate(texts):
        yield Segment(text, i, i + 1, i == len(texts) - 1)


def speak(backend: RemoteBackend, *texts: str, voice: str = "alloy", **fields: Any) -> Any:
    (known,) = (known for known in backend.models[0].voices if known.id == voice)
    return backend.speak(request(**fields), known, stream(list(texts or [TEXT])))


async def hear(backend: RemoteBackend, *texts: str, **fields: Any) -> tuple[list[AudioChunk], SpeechError | None]:
    """What is heard, and the error that ends it."""
    chunks = []
    try:
        async for chunk in speak(backend, *texts, **fields):
            chunks.append(chunk)  # noqa: PERF401 (what came before an error counts)
    except SpeechError as error:
        return chunks, error
    return chunks, None


def pcm(chunks: list[AudioChunk]) -> bytes:
    return (np.concatenate([chunk.samples for chunk in chunks]) * 32768).astype("<i2").tobytes() if chunks else b""


# --- what is asked, and what is heard ---


async def test_sound_comes_through_bit_for_bit(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    for answer in (whole(TONE), chunked(TONE[:1001], TONE[1001:1002], TONE[1002:])):
        upstream.speech = [answer]
        chunks, error = await hear(backend)
        assert error is None
        assert pcm(chunks) == TONE
        assert {chunk.sample_rate for chunk in chunks} == {24_000}
        assert chunks[0].segment.text == TEXT
    asked = upstream.spoken[0]
    assert asked.headers["authorization"] == f"Bearer {SECRET}"
    expected = {"model": "tts-1", "voice": "alloy", "response_format": "pcm", "stream_format": "audio"}
    assert asked.body == {"input": TEXT, **expected}
    assert upstream.spoken[1].connection == asked.connection, "the connection is kept"


async def test_what_a_client_asks_for_goes_along(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    assert (await hear(backend, instructions="Softly.", seed=7, language="german"))[1] is None
    assert upstream.spoken[0].body.items() >= {"instructions": "Softly.", "seed": 7, "language": "German"}.items()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 22_050),
        ({"Content_Type": "audio/pcm;rate=16000"}, 16_000),
        ({"Content_Type": "audio/pcm", "X_Sample_Rate": "44100"}, 44_100),
        ({"Content_Type": "application/octet-stream"}, 22_050),
    ],
)
async def test_the_sample_rate(start: Start, upstream: FaultyUpstream, headers: Any, expected: int) -> None:
    backend = await start(sample_rate=22_050)
    upstream.speech = [whole(tone(2.0), **headers)]
    chunks, error = await hear(backend)
    assert error is None
    assert {chunk.sample_rate for chunk in chunks} == {expected}


async def test_segments_keep_their_order_and_one_is_asked_for_ahead(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    texts = [f"Segment {i} of the text." for i in range(4)]
    async with aclosing(speak(backend, *texts)) as chunks:
        first = await anext(chunks)
        assert first.segment.text == texts[0]
        await eventually(lambda: len(upstream.spoken) == 2)
        await asyncio.sleep(0.05)
        assert len(upstream.spoken) == 2
        rest = [chunk.segment.text async for chunk in chunks]
    heard = [first.segment.text, *rest]
    assert sorted(heard) == heard
    assert list(dict.fromkeys(heard)) == texts
    assert [asked.body["input"] for asked in upstream.spoken] == texts
    assert len({asked.headers["idempotency-key"] for asked in upstream.spoken}) == 4


async def test_sound_is_heard_before_the_answer_has_ended(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.speech = [chunked(TONE, TONE, pause_s=30)]
    async with asyncio.timeout(25), aclosing(speak(backend)) as chunks:
        assert TONE.startswith(pcm([await anext(chunks)]))
    assert await asyncio.to_thread(upstream.spoken[0].left.wait, 25), "who leaves ends the request"


async def test_a_task_that_is_cancelled_ends_the_request(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.speech = [late(30, whole(TONE))]
    task = asyncio.create_task(hear(backend))
    await eventually(lambda: len(upstream.spoken) == 1)
    task.cancel()
    assert await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.to_thread(upstream.spoken[0].left.wait, 25)
    assert backend.breaker.state == "closed"
    assert backend._utterances == set()


async def test_stopping_ends_what_runs(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.speech = [chunked(TONE, TONE, pause_s=30)]
    task = asyncio.create_task(hear(backend))
    await eventually(lambda: len(upstream.spoken) == 1)
    await asyncio.sleep(0.05)
    await backend.stop()
    _, error = await asyncio.wait_for(task, 25)
    assert isinstance(error, ShuttingDown)
    assert not backend.readiness().ready
    assert upstream.spoken[0].left.wait(25)


# --- faulty answers ---

QUIET = b"\0\0" * 24_000

NOT_BELIEVED: dict[str, tuple[Answer, str]] = {
    "html": (whole(b"<html>Welcome to nginx</html>" * 2000, Content_Type="text/html"), "type"),
    "json": (document({"error": None}), "type"),
    "no type": (bare(head(Content_Length=len(TONE)), TONE), "type"),
    "wav": (whole(b"RIFF" + TONE, Content_Type="audio/wav"), "type"),
    "wav that says pcm": (whole(b"RIFF" + TONE), "not pcm"),
    "json that says pcm": (chunked(b'{"', b'error": "no"}' + TONE), "not pcm"),
    "big-endian": (whole(TONE, Content_Type="audio/L16;rate=24000"), "type"),
    "events": (chunked(b"data: {}\n\n", Content_Type="text/event-stream"), "type"),
    "gzip": (whole(TONE, Content_Encoding="gzip"), "compressed"),
    "stereo": (whole(TONE, Content_Type="audio/pcm; channels=2"), "mono"),
    "a rate that cannot be": (whole(TONE, X_Sample_Rate="24"), "sample rate"),
    "a rate that is no number": (whole(TONE, X_Sample_Rate="٢٤٠٠٠".encode().decode("latin-1")), "sample rate"),
    "nothing": (whole(b""), "empty"),
    "nothing in chunks": (chunked(), "empty"),
    "silence": (whole(QUIET), "silence"),
    "an odd byte": (whole(TONE[:-1]), "middle of a sample"),
    "one byte": (whole(b"\1"), "middle of a sample"),
    "too short": (whole(TONE[:9600]), "too short"),
    "a length that is too short": (whole(TONE, length=9600), "too short"),
    "endless": (endless(), "longer than any speech"),
    "no end of its own": (bare(head(Content_Type="audio/pcm"), TONE), "no end of its own"),
    "HTTP/1.0": (bare(head(Content_Type="audio/pcm").replace(b"1.1", b"1.0"), TONE), "no end of its own"),
}


@pytest.mark.parametrize("fault", NOT_BELIEVED)
async def test_an_answer_that_is_not_believed(start: Start, upstream: FaultyUpstream, fault: str) -> None:
    backend = await start(breaker=Breaker(failures=2))
    upstream.speech = [NOT_BELIEVED[fault][0]]
    chunks, error = await hear(backend)
    assert isinstance(error, UpstreamFailed)
    assert (error.status, error.code) == (502, "upstream_invalid")
    assert NOT_BELIEVED[fault][1] in error.message
    assert not any(chunk.samples.max() <= 0 for chunk in chunks)
    assert len(upstream.spoken) == 1, "it is not asked again"
    await hear(backend)
    assert backend.breaker.state == "open"


async def test_silence_before_the_sound_belongs_to_it(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.speech = [chunked(QUIET, QUIET[:1], QUIET[:1], TONE)]
    chunks, error = await hear(backend)
    assert error is None
    assert pcm(chunks) == QUIET + QUIET[:2] + TONE


CUT = {
    "a length that is too long": whole(TONE, length=len(TONE) + 2),
    "chunks without an end": chunked(TONE, TONE, ends=False),
    "a cut chunk": bare(head(Content_Type="audio/pcm", Transfer_Encoding="chunked"), b"BB80\r\n" + TONE[:40_000]),
    "a broken chunk": bare(head(Content_Type="audio/pcm", Transfer_Encoding="chunked"), b"8\r\n12345678\r\nzz\r\n"),
}


@pytest.mark.parametrize("fault", CUT)
async def test_a_cut_answer_is_a_failure_and_is_not_asked_for_again(
    start: Start, upstream: FaultyUpstream, fault: str
) -> None:
    backend = await start(breaker=Breaker(failures=2))
    upstream.speech = [CUT[fault], CUT[fault], whole(TONE)]
    for number in (1, 2):
        chunks, error = await hear(backend)
        assert chunks, "what came before the cut was heard"
        assert isinstance(error, UpstreamFailed)
        assert (error.status, error.code) == (502, "upstream_failed")
        assert len(upstream.spoken) == number
    assert backend.breaker.state == "open"


async def test_a_later_segment_that_is_cut(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.speech = [whole(TONE), CUT["chunks without an end"]]
    chunks, error = await hear(backend, "The first segment.", "The second segment.", "The third one.")
    assert isinstance(error, UpstreamFailed)
    assert {chunk.segment.text for chunk in chunks} == {"The first segment.", "The second segment."}


async def test_what_is_left_over_of_an_answer_harms_no_other(start: Start, upstream: FaultyUpstream) -> None:
    """More bytes than the length said stay in the connection; who gets that one next must not hear them."""
    backend = await start()
    upstream.speech = [whole(TONE + TONE, length=len(TONE)), whole(TONE)]
    assert (await hear(backend))[1] is None
    chunks, error = await hear(backend)
    assert error is None
    assert pcm(chunks) == TONE


# --- times ---


async def test_a_slow_first_byte_is_given_up(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start(first_byte_s=0.15, breaker=Breaker(failures=1))
    for slow in (late(30, whole(TONE)), silent_after(head(Content_Type="audio/pcm", Content_Length=9))):
        upstream.asked.clear()
        upstream.speech = [slow]
        chunks, error = await asyncio.wait_for(hear(backend), 25)
        assert isinstance(error, UpstreamTimedOut)
        assert (error.status, chunks) == (504, [])
        assert len(upstream.spoken) == 1, "who is slow is not asked twice"
        assert backend.breaker.state == "open"
        backend._client.breaker = backend._breaker = Breaker(failures=1)


async def test_drops_do_not_keep_a_first_byte_from_being_late(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start(first_byte_s=0.3)
    lines = [f"X-Line-{i}: {i}\r\n".encode() for i in range(100)]

    async def dripping(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        for line in lines:
            writer.write(line)
            await asyncio.sleep(0.25)

    upstream.speech = [dripping]
    assert isinstance((await asyncio.wait_for(hear(backend), 20))[1], UpstreamTimedOut)


async def test_a_pause_and_a_whole_that_takes_too_long(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start(first_byte_s=0.2, breaker=Breaker(failures=10))
    upstream.speech = [chunked(TONE, TONE, pause_s=30)]
    for _ in range(8):  # the first byte may be late too, on a busy machine
        chunks, error = await hear(backend)
        assert isinstance(error, UpstreamTimedOut)
        if chunks:
            break
    assert pcm(chunks) == TONE
    backend = await start(total_s=0.3, breaker=Breaker(failures=1))
    upstream.speech = [chunked(*[TONE[:200]] * 600, pause_s=0.05)]
    chunks, error = await hear(backend)
    assert len(chunks) < 300
    assert isinstance(error, UpstreamTimedOut)
    assert backend.breaker.state == "open"


async def test_a_server_that_does_not_accept(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.down()
    chunks, error = await asyncio.wait_for(hear(backend), 25)
    assert isinstance(error, UpstreamUnavailable)
    assert (error.status, error.code, chunks) == (503, "upstream_unavailable", [])
    upstream.up()


# --- statuses, and trying again ---


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
async def test_a_failure_before_the_first_byte_is_tried_again(
    start: Start, upstream: FaultyUpstream, status: int
) -> None:
    backend = await start()
    upstream.speech = [refusal(status), whole(b"oops", status), whole(TONE)]
    chunks, error = await hear(backend)
    assert error is None
    assert pcm(chunks) == TONE
    assert len(upstream.spoken) == 3
    assert len({asked.headers["idempotency-key"] for asked in upstream.spoken}) == 1


async def test_a_connection_that_breaks_before_the_first_byte_is_tried_again(
    start: Start, upstream: FaultyUpstream
) -> None:
    backend = await start()
    upstream.speech = [bare(), bare(head(Content_Type="audio/pcm", Content_Length=len(TONE))), whole(TONE)]
    chunks, error = await hear(backend)
    assert error is None
    assert pcm(chunks) == TONE


@pytest.mark.parametrize(("said", "told"), [(500, 500), (502, 502), (503, 503), (504, 504), (501, 502), (529, 502)])
async def test_a_server_that_keeps_failing(start: Start, upstream: FaultyUpstream, said: int, told: int) -> None:
    backend = await start(retries=1)
    upstream.speech = [refusal(said, "secret internals", Retry_After=2 if said == 501 else "soon")]
    _, error = await hear(backend)
    assert isinstance(error, UpstreamFailed | UpstreamUnavailable)
    assert error.status == told
    assert "internals" not in error.message
    assert len(upstream.spoken) == (2 if said in (500, 502, 503, 504) else 1)


async def test_too_many_requests(start: Start, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = await start(breaker=Breaker(failures=1))
    upstream.speech = [refusal(429, Retry_After="17", code="rate_limit_exceeded")]
    _, error = await hear(backend)
    assert isinstance(error, RateLimited)
    assert (error.status, error.retry_after) == (429, 17)
    assert len(upstream.spoken) == 1, "it is told rather than waited for"
    upstream.asked.clear()
    upstream.speech = [refusal(429, Retry_After="0.2"), whole(TONE)]
    begun = time.monotonic()
    assert (await hear(backend))[1] is None
    assert time.monotonic() - begun >= 0.2
    assert backend.breaker.state == "closed", "a server that is busy is not broken"


def test_retry_after_is_a_number_or_a_date() -> None:
    assert 900 < retry_after({"retry-after": formatdate(time.time() + 1000, usegmt=True)}) <= 1000
    given = {"3": 3.0, "1e9": 3600.0, "-1": 0.0, "nan": 0.0, "inf": 0.0, "": 0.0, "soon": 0.0, "Mon, 99": 0.0}
    assert {text: retry_after({"retry-after": text}) for text in given} == given
    assert retry_after({}) == 0.0


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_what_is_refused_is_the_client_s_to_know(start: Start, upstream: FaultyUpstream, status: int) -> None:
    backend = await start(breaker=Breaker(failures=1))
    upstream.speech = [refusal(status, f"No\r\nsuch\udc80 {SECRET} voice" + "x" * 999, param="voice", code="no_voice")]
    _, error = await hear(backend)
    assert isinstance(error, UpstreamRefused)
    assert (error.status, error.param, error.code, error.type) == (status, "voice", "no_voice", "invalid_request_error")
    assert error.message.startswith("No  such  ... voice")
    assert len(error.message) == 500
    assert len(upstream.spoken) == 1
    assert backend.breaker.state == "closed"


@pytest.mark.parametrize(
    "answer",
    [
        *(
            refusal(status, f"Incorrect API key provided: {SECRET}", code="invalid_api_key")
            for status in (401, 402, 403)
        ),
        refusal(429, "You exceeded your current quota", code="insufficient_quota", Retry_After="1"),
    ],
)
async def test_our_key_and_our_quota_are_not_the_client_s(
    start: Start, upstream: FaultyUpstream, answer: Answer
) -> None:
    backend = await start(breaker=Breaker(failures=1))
    upstream.speech = [answer]
    _, error = await hear(backend)
    assert isinstance(error, UpstreamFailed)
    assert (error.status, error.code, error.type) == (502, "upstream_refuses_us", "server_error")
    assert SECRET not in error.message
    assert len(upstream.spoken) == 1
    assert backend.breaker.state == "open"
    assert Chain([backend]).breakers() == {"remote": "open"}


@pytest.mark.parametrize(
    "answer",
    [
        whole(b"<html>404 Not Found</html>", 404, Content_Type="text/html"),
        document({"detail": "Not Found"}, 404),
        document(["error"], 400),
        document({"error": {"message": 7}}, 400),
        whole(b"", 307, Location="http://127.0.0.1:9/"),
        whole(b"[" * 200_000, 400),
    ],
)
async def test_a_refusal_that_is_not_the_api_s(start: Start, upstream: FaultyUpstream, answer: Answer) -> None:
    """A wrong URL, a proxy: nothing that a client's request could change."""
    backend = await start()
    upstream.speech = [answer]
    _, error = await hear(backend)
    assert isinstance(error, UpstreamFailed)
    assert error.status == 502


# --- the breaker ---


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_server_that_keeps_failing_is_left_alone_for_a_while(start: Start, upstream: FaultyUpstream) -> None:
    clock = Clock()
    backend = await start(breaker=Breaker(failures=4, open_s=10, clock=clock))
    upstream.speech = [refusal(500)]
    assert (await hear(backend))[1].status == 500
    assert not backend.models[0].down
    _, error = await hear(backend)
    assert len(upstream.spoken) == 4, "the last try of all is not made"
    assert error.status == 500
    _, error = await hear(backend)
    assert isinstance(error, UpstreamUnavailable)
    assert error.retry_after == 10
    assert len(upstream.spoken) == 4
    assert (backend.readiness().ready, backend.readiness().phase) == (True, "failing")
    assert backend.models[0].down
    upstream.speech = [whole(TONE)]
    clock.now += 10
    assert (await hear(backend))[1] is None
    assert (backend.breaker.state, backend.readiness().phase) == ("closed", "ready")
    assert not backend.models[0].down


async def test_a_probe_is_one_request(start: Start, upstream: FaultyUpstream) -> None:
    clock = Clock()
    backend = await start(breaker=Breaker(failures=1, open_s=10, clock=clock))
    go_on = threading.Event()
    upstream.speech = [refusal(400), refusal(501), held(go_on, whole(TONE))]
    assert (await hear(backend))[1].status == 400
    assert (await hear(backend))[1].status == 502
    clock.now += 10
    probe = asyncio.create_task(hear(backend))
    await eventually(lambda: len(upstream.spoken) == 3)
    assert backend.models[0].down, "while it is probed, others are asked first"
    assert isinstance((await hear(backend))[1], UpstreamUnavailable)
    go_on.set()
    assert (await probe)[1] is None
    assert len(upstream.spoken) == 3
    assert (await hear(backend))[1] is None


# --- the lists ---


async def test_the_lists_in_the_shapes_of_servers(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    best, second = backend.models
    assert (best.id, second.id) == ("tts-1", "tts-1-hd")
    assert [(voice.id, voice.name, voice.language) for voice in best.voices] == [
        ("alloy", "alloy", "english"),
        ("Vera", "Vera V.", "german"),
    ]
    assert best.languages == ("english", "german")
    assert "alloy" not in best.aliases
    assert len(best.aliases) == 12
    assert set(best.aliases.values()) == {"alloy", "Vera"}
    upstream.models = document({"data": [{"id": "Qwen/Omni"}]})
    upstream.voices = document({"voices": ["vivian", "ryan", "Vivian", "bad\nname", "ü", "", 7, None], "uploaded": []})
    (omni,) = (await start()).models
    assert omni.id == "Qwen/Omni"
    assert [voice.id for voice in omni.voices] == ["vivian", "ryan"]
    assert set(omni.aliases.values()) == {"vivian", "ryan"}
    assert {"german", "english"} <= set(omni.languages)
    upstream.voices = refusal(404, "Invalid URL")
    (openai,) = (await start()).models
    assert {"alloy", "marin"} <= {voice.id for voice in openai.voices}
    assert openai.aliases == {}


async def test_a_language_goes_only_to_servers_that_know_of_languages(start: Start, upstream: FaultyUpstream) -> None:
    upstream.voices = refusal(404)
    backend = await start()
    assert (await hear(backend, language="german"))[1] is None
    assert "language" not in upstream.spoken[0].body


async def test_models_that_are_named_are_not_asked_for(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start(models=["My-TTS"])
    assert [model.id for model in backend.models] == ["My-TTS"]
    assert [asked.path for asked in upstream.asked] == ["/v1/audio/voices"]


async def test_what_is_served_has_an_identity_of_its_own(start: Start, upstream: FaultyUpstream) -> None:
    def identities(backend: RemoteBackend) -> set[str]:
        return {
            *(model.revision for model in backend.models),
            *(voice.fingerprint for model in backend.models for voice in model.voices),
        }

    first = identities(await start())
    assert len(first) == 6
    assert identities(await start(api_key="another")) == first
    assert not identities(await start(revision="2")) & first
    assert not identities(await start(sample_rate=16_000)) & first
    assert not identities(await start(url=f"{upstream.url}/v1", models=["other"])) & first
    assert identities(await start(url=f"{upstream.url}/v1/")) == first
    with faulty_upstream() as other:
        assert not identities(await start(url=other.url)) & first


@pytest.mark.parametrize(
    "answer",
    [
        refusal(500),
        refusal(401),
        whole(b"<html>", Content_Type="text/html"),
        document({"data": []}),
        document({"data": {"id": "x"}}),
        document(None),
        whole(b"[" * 200_000),
        whole(b'"' + b"x" * 5_000_000 + b'"'),
        whole(b"{}", length=7),
    ],
)
async def test_lists_that_cannot_be_had_are_asked_for_until_they_can(
    start: Start, upstream: FaultyUpstream, answer: Answer
) -> None:
    upstream.models = answer
    remote = Remote(upstream.url, SECRET)
    backend = RemoteBackend(remote)
    try:
        with pytest.raises(NotReady):
            await backend.start()
        assert (backend.readiness().ready, backend.readiness().phase) == (False, "connecting")
        assert "remote server" in backend.readiness().reason
        assert SECRET not in backend.readiness().reason
        with pytest.raises(NotReady):
            await backend.start()
        looking = [task for task in asyncio.all_tasks() if task.get_name() == "remote lists"]
        assert len(looking) == 1, "a second start takes nothing more"
        upstream.models = document({"data": [{"id": "tts-1"}]})
        await eventually(lambda: backend.readiness().ready)
    finally:
        await backend.stop()


async def test_lists_are_kept_while_the_server_is_down(
    start: Start, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "REFRESH_S", 0.05)
    backend = await start()
    known = [model.id for model in backend.models]
    upstream.down()
    await eventually(lambda: backend.models[0].down)
    assert [model.id for model in backend.models] == known
    assert (backend.readiness().ready, backend.readiness().phase) == (True, "failing")
    assert "cannot be reached" in backend.readiness().reason
    upstream.models = document({"data": [{"id": "tts-2"}]})
    upstream.up()
    await eventually(lambda: [model.id for model in backend.models] == ["tts-2"])
    assert not backend.models[0].down
    assert backend.readiness().phase == "ready"


async def test_one_request_that_fails_shows_that_the_server_is_down(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start()
    upstream.down()
    _, error = await hear(backend)
    assert isinstance(error, UpstreamUnavailable)
    await eventually(lambda: backend.models[0].down)
    upstream.up()
    await eventually(lambda: not backend.models[0].down)


async def test_a_list_that_nobody_expected_does_not_end_the_looking(
    start: Start, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "REFRESH_S", 0.05)
    backend = await start()
    fetch = remote_module.remote_lists.fetch

    async def stumble(*given: Any) -> Any:
        monkeypatch.setattr(remote_module.remote_lists, "fetch", fetch)
        raise KeyError("planted")

    monkeypatch.setattr(remote_module.remote_lists, "fetch", stumble)
    upstream.models = document({"data": [{"id": "tts-2"}]})
    await eventually(lambda: [model.id for model in backend.models] == ["tts-2"])


async def test_looks_that_fail_come_ever_more_seldom(
    start: Start, upstream: FaultyUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.Event().wait() if len(pauses) == 8 else None

    upstream.models = refusal(503)
    backend = RemoteBackend(Remote(upstream.url))
    monkeypatch.setattr(remote_module, "FIRST_RETRY_S", 1.0)
    monkeypatch.setattr(remote_module, "LONGEST_RETRY_S", 60.0)
    monkeypatch.setattr(remote_module.asyncio, "sleep", sleep)
    with pytest.raises(NotReady):
        await backend.start()
    await asyncio.wait_for(_until(lambda: len(pauses) == 8), 30)
    await backend.stop()
    bounds = [1, 2, 4, 8, 16, 32, 60, 60]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True)), pauses


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.01)


async def test_requests_that_fail_make_it_look(start: Start, upstream: FaultyUpstream) -> None:
    backend = await start(breaker=Breaker(failures=1))
    upstream.models = refusal(500)
    upstream.speech = [refusal(501)]
    await hear(backend)
    await eventually(lambda: backend.readiness().reason == "The remote server failed with status 500.")


async def test_neither_text_nor_key_is_logged(
    start: Start, upstream: FaultyUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    backend = await start()
    for answer in (refusal(500, TEXT), refusal(400, f"{TEXT} {SECRET}"), CUT["chunks without an end"], whole(TONE)):
        upstream.asked.clear()
        upstream.speech = [answer]
        await hear(backend)
    assert caplog.records
    everything = "".join(str(record.__dict__) + record.getMessage() for record in caplog.records)
    assert TEXT not in everything
    assert SECRET not in everything
    assert SECRET not in repr(backend._remote) + repr(vars(backend))
