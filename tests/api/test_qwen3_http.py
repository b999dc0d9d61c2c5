"""Qwen3-TTS as a whole: `qwen3-tts serve` on the tiny checkpoints answers over HTTP while its engine still speaks.

The weights are random: their sound says nothing, but it follows from the text and from everything else that is asked.
"""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

torch = pytest.importorskip("torch")

from api.src.audio.encoders import open_encoder  # noqa: E402
from api.src.domain import SAMPLE_RATE, AudioFormat  # noqa: E402
from tests.api.qwen3_process import FRAME, MOST_APART, NO_STORE, Qwen3Server, apart, samples, serving  # noqa: E402
from tests.api.wire import FORMATS, OPENAI_MODELS, assert_error, events, speak  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402
from tests.fakes import OPENAI_VOICES  # noqa: E402
from tests.moments import measured_again  # noqa: E402
from tests.speech.asking import wait_until  # noqa: E402
from tests.speech.caller import Caller  # noqa: E402

CUSTOM = "qwen3-tts-12hz-1.7b-custom-voice"
DESIGN = "qwen3-tts-12hz-1.7b-voice-design"
SPEAKERS = {"Vivian", "Serena", "Uncle_Fu", "Dylan", "Eric", "Ryan", "Aiden", "Ono_Anna", "Sohee"}

LONG = {"input": "Two boats lie at the old bank and nobody seems to own them.", "seed": 5}
"""One segment, whose speech ends by itself after 125 frames."""

SHORT = "Hello world, here I am."

TWO_SEGMENTS = "The first sentence is long enough to be spoken alone. So is the second sentence, which ends here."

CODEC_DELAY_S = 0.13
"""What formats that cannot say how long they are may add in front and at the end."""

SLOTS = 8
SEEDS = (0, 4, 3, 0, 3, 1, 5, 11)
"""With which each of the eight requests speaks for 30 to 60 frames."""


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qwen3Server]:
    with serving(tmp_path_factory.mktemp("custom"), tiny("custom_voice"), slots=SLOTS, max_concurrent=SLOTS) as server:
        yield server


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qwen3Server]:
    with serving(tmp_path_factory.mktemp("design"), tiny("voice_design")) as server:
        yield server


# --- what is loaded ---


def test_it_says_what_is_loaded(custom: Qwen3Server) -> None:
    ready = custom.client.get("/ready").json()
    assert (ready["ready"], ready["phase"], ready["backend"]) == (True, "ready", "qwen3")
    assert "asked for" in ready["backend_reason"]
    models = custom.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [*OPENAI_MODELS, CUSTOM]
    voices = custom.client.get("/v1/audio/voices").json()["voices"]
    assert {voice["id"] for voice in voices} == {*SPEAKERS, *OPENAI_VOICES}
    assert {voice["kind"] for voice in voices} == {"built_in"}
    assert_error(speak(custom.client, model=DESIGN), 400, code="model_not_loaded", param="model")


# --- sound while it is made ---


@measured_again
def test_every_format_sounds_before_the_engine_has_ended(custom: Qwen3Server) -> None:
    shutil.rmtree(custom.process.folder / "cache" / "audio", ignore_errors=True)
    before = custom.figures()
    sounding = threading.Barrier(len(FORMATS) + 1)

    def listen(format: AudioFormat) -> bytes:
        body = {**LONG, "response_format": format}
        with open_encoder(format) as encoder:
            header = len(encoder.header)
        with httpx.stream("POST", f"{custom.process.url}/v1/audio/speech", json=body, timeout=120) as answer:
            assert (answer.status_code, answer.headers["x-cache"]) == (200, "miss")
            parts, data = answer.iter_raw(), b""
            while len(data) <= header:
                data += next(parts)
            sounding.wait(60)
            return data + b"".join(parts)

    with ThreadPoolExecutor(len(FORMATS)) as pool:
        answers = pool.map(listen, FORMATS)
        sounding.wait(60)
        then = custom.figures().since(before)  # all seven have sounded by now
        sounds = {format: samples(format, data) for format, data in zip(FORMATS, answers, strict=True)}
    made = custom.figures().since(before)
    assert (then.active, then.ended) == (len(FORMATS), {})
    assert then.frames < made.frames / 2
    assert made.ended == {"stop": len(FORMATS)}
    expected = sounds["pcm"]
    assert made.frames * FRAME == len(FORMATS) * len(expected)
    assert len(expected) > 100 * FRAME
    for format in ("wav", "flac"):
        assert apart(sounds[format], expected) <= MOST_APART
    for format, sound in sounds.items():
        assert 0 <= len(sound) - len(expected) <= CODEC_DELAY_S * SAMPLE_RATE, format


@measured_again
def test_events_carry_sound_before_the_engine_has_ended(custom: Qwen3Server) -> None:
    body = {**LONG, "response_format": "pcm", "stream_format": "sse"}
    before = custom.figures()
    with custom.client.stream("POST", "/v1/audio/speech", json=body, headers=NO_STORE) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.iter_text()
        text = next(parts)
        then = custom.figures().since(before)
        *deltas, done = events(text + "".join(parts))
    assert text.startswith("event: speech.audio.delta\n")
    assert (then.active, then.ended) == (1, {})
    made = custom.figures().since(before)
    sound = samples("pcm", b"".join(base64.b64decode(delta["audio"]) for delta in deltas))
    assert len(deltas) > 10
    assert then.frames < made.frames / 2
    assert len(sound) == made.frames * FRAME
    assert done["usage"]["output_tokens"] == made.frames
    assert 1 < done["usage"]["input_tokens"] < len(LONG["input"])


def test_a_whole_answer_in_base64(custom: Qwen3Server) -> None:
    before = custom.figures()
    body = {"input": SHORT, "seed": 3, "response_format": "flac"}
    answer = custom.client.post("/v1/audio/speech/base64", json=body, headers=NO_STORE).json()
    made = custom.figures().since(before)
    sound = samples("flac", base64.b64decode(answer["audio"], validate=True))
    assert (answer["format"], answer["sample_rate"]) == ("flac", SAMPLE_RATE)
    assert answer["duration_ms"] == 80 * made.frames
    assert len(sound) == FRAME * made.frames
    assert apart(sound, custom.pcm(SHORT, seed=3)) <= MOST_APART


# --- what is asked reaches the model ---


def test_each_wish_of_the_official_client_changes_the_sound(custom: Qwen3Server) -> None:
    wishes: dict[str, dict[str, Any]] = {
        "nothing else": {},
        "the same again": {},
        "seed": {"seed": 4},
        "language": {"language": "de"},
        "voice": {"voice": "nova"},
        "instructions": {"instructions": "Whisper, as if somebody slept next door."},
    }
    with openai.OpenAI(base_url=f"{custom.process.url}/v1", api_key="unused", max_retries=0) as client:

        def ask(wish: dict[str, Any]) -> Any:
            asked = {"voice": "coral", "instructions": "Cheerful.", "seed": 3, "language": "English", **wish}
            extra = {"seed": asked.pop("seed"), "language": asked.pop("language")}
            return client.audio.speech.with_raw_response.create(
                model="gpt-4o-mini-tts",
                input=SHORT,
                response_format="pcm",
                extra_body=extra,
                extra_headers=NO_STORE,
                **asked,
            )

        with ThreadPoolExecutor(len(wishes)) as pool:
            answers = dict(zip(wishes, pool.map(ask, wishes.values()), strict=True))
    assert {answer.headers["x-model"] for answer in answers.values()} == {CUSTOM}
    assert answers["nothing else"].headers["x-voice"] == "Uncle_Fu"
    assert answers["voice"].headers["x-voice"] == "Aiden"
    sounds = {wish: samples("pcm", answer.content) for wish, answer in answers.items()}
    first = sounds.pop("nothing else")
    assert apart(sounds.pop("the same again"), first) <= MOST_APART
    assert {wish for wish, sound in sounds.items() if apart(sound, first) > 0.01} == set(sounds)


# --- several at once ---


@measured_again
def test_eight_requests_at_once_get_what_they_get_alone(custom: Qwen3Server) -> None:
    texts = (SHORT, "One two three four five.", "你好，世界。", "She said she would be here by noon.")
    wishes = ({}, {"instructions": "Calm."}, {"language": "german"})
    requests = [
        {"text": texts[i % 4], "voice": sorted(SPEAKERS)[i], "seed": SEEDS[i], **wishes[i % 3]} for i in range(SLOTS)
    ]
    alone = [custom.pcm(**request) for request in requests]
    assert min(map(len, alone)) >= 20 * FRAME, "too short to meet the others"
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], custom.figures().active)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        together = custom.together(requests)
    finally:
        over.set()
        watcher.join()
    assert most[0] == SLOTS
    assert [apart(one, other) <= MOST_APART for one, other in zip(together, alone, strict=True)] == [True] * SLOTS
    assert min(apart(one, other) for i, one in enumerate(alone) for other in alone[:i]) > 0.01


@measured_again
def test_a_hang_up_frees_the_slot_at_once(custom: Qwen3Server) -> None:
    before = custom.figures()
    with Caller(custom.process.url) as caller:
        caller.ask(**LONG, response_format="pcm", no_store=True)
        caller.read_head()
        caller.read()
        then = custom.figures().since(before)
    wait_until(lambda: custom.figures().idle)
    made = custom.figures().since(before)
    assert (then.active, then.ended, made.ended) == (1, {}, {"cancelled": 1})
    assert made.frames - then.frames < 30  # of more than a hundred
    assert len(custom.pcm(SHORT, seed=3))


# --- a voice from a description ---


def test_instructions_describe_the_designed_voice(design: Qwen3Server) -> None:
    assert [model["id"] for model in design.client.get("/v1/models").json()["data"]] == [*OPENAI_MODELS, DESIGN]
    voices = {voice["id"]: voice["kind"] for voice in design.client.get("/v1/audio/voices").json()["voices"]}
    assert voices == dict.fromkeys(["designed", *OPENAI_VOICES], "designed")
    asked = {"text": SHORT, "seed": 3, "voice": "designed"}
    deep, high = {"instructions": "A deep, old voice."}, {"instructions": "A high, young voice."}
    first, again, other = design.together([asked | deep, asked | deep, asked | high])
    assert apart(first, again) <= MOST_APART
    assert apart(first, other) > 0.01


def test_a_designed_voice_speaks_two_segments(design: Qwen3Server) -> None:
    asked = {"text": TWO_SEGMENTS, "seed": 0, "instructions": "A deep, old voice."}
    before = design.figures()
    alone = design.pcm(**asked)
    made = design.figures().since(before)
    assert sum(made.ended.values()) == made.ended.get("stop", 0) + made.ended.get("length", 0) == 2
    assert made.frames * FRAME == len(alone)
    among, _ = design.together([asked, {"text": SHORT, "seed": 1, "instructions": "A high, young voice."}])
    assert apart(among, alone) <= MOST_APART
