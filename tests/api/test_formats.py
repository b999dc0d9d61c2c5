"""Every format over HTTP: one stream that decodes, as long as it should be, for sound and for silence."""

from __future__ import annotations

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile

from api.src.domain import SAMPLE_RATE, AudioFormat
from tests.api.wire import BYTES_PER_SECOND, FORMATS, PARTS, STORY, events, pitch, speak
from tests.conftest import Server
from tests.decoding import decoded
from tests.fakes import FakeBackend

CODECS = {"mp3": "mp3float", "opus": "libopus", "ogg": "libopus", "aac": "aac", "flac": "flac", "wav": "pcm_s16le"}
CONTAINERS = {"mp3": "mp3", "opus": "ogg", "ogg": "ogg", "aac": "aac", "flac": "flac", "wav": "wav"}
CODEC_DELAY_S = 0.13
"""What MP3 and AAC, which cannot say how long they are, may add in front and at the end."""

UNSPEAKABLE = ["😀", "🎉🎊 👍🏽", "...", "?!", "—", "***", "# ---", "<b></b>", "```\n```", "\u200b\ufeff.", "()[]{}"]


def seconds(format: AudioFormat, data: bytes) -> float:
    return len(decoded(format, data)) / SAMPLE_RATE


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0, 1.5, 4.0])
def test_duration_and_pitch_at_every_speed(house: Server, format: AudioFormat, speed: float) -> None:
    answer = speak(house.client, STORY, response_format=format, speed=speed)
    sound = decoded(format, answer.content)
    expected = 0.4 * len(PARTS) / speed
    slack = 0.0 if speed == 1.0 else 0.1
    assert expected - slack - 0.001 <= len(sound) / SAMPLE_RATE <= expected + slack + CODEC_DELAY_S
    assert pitch(sound) == pytest.approx(220, abs=8)
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.15)


@pytest.mark.parametrize("format", CODECS)
def test_codec_and_container(house: Server, format: AudioFormat) -> None:
    with av.open(io.BytesIO(speak(house.client, response_format=format).content)) as container:
        assert container.format.name == CONTAINERS[format]
        (stream,) = container.streams
        assert stream.codec_context.codec.name in {CODECS[format], CODECS[format].removesuffix("float"), "opus"}
        assert stream.codec_context.layout.nb_channels == 1
        assert stream.codec_context.sample_rate == (48_000 if format in ("opus", "ogg") else SAMPLE_RATE)


@pytest.mark.parametrize("format", ["wav", "ogg", "opus", "mp3"])  # libsndfile needs a FLAC file that knows its length
def test_another_decoder_reads_it_too(house: Server, format: AudioFormat) -> None:
    with soundfile.SoundFile(io.BytesIO(speak(house.client, STORY, response_format=format).content)) as file:
        sound = file.read()
    assert len(sound) / file.samplerate == pytest.approx(1.6, abs=CODEC_DELAY_S)


def test_pcm_and_wav_are_exactly_the_sound(house: Server) -> None:
    pcm = speak(house.client, STORY, response_format="pcm").content
    wav = speak(house.client, STORY, response_format="wav").content
    assert len(pcm) == 1.6 * BYTES_PER_SECOND
    assert wav.startswith(b"RIFF")
    assert wav.endswith(pcm)
    spoken = house.backend.tone(house.backend.models[0].voices[0], 0)
    segment = np.frombuffer(pcm, "<i2")[: len(spoken)]
    assert np.abs(segment / 32768 - spoken).max() < 2 / 32768
    assert pcm == segment.tobytes() * len(PARTS)


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_that_arrive_before_the_end_are_a_prefix_of_one_stream(
    start_server: Callable[..., Server], format: AudioFormat
) -> None:
    server = start_server(FakeBackend(allowed=1))
    request = {"input": STORY, "response_format": format}
    chunks = []
    with server.client.stream("POST", "/v1/audio/speech", json=request) as answer:
        for chunk in answer.iter_raw():
            chunks.append(chunk)
            server.backend.allowed += 1  # each segment is made only when the one before was heard
    assert len(chunks) >= len(PARTS)
    assert b"".join(chunks) == speak(server.client, STORY, response_format=format).content
    assert seconds(format, b"".join(chunks)) == pytest.approx(1.6, abs=CODEC_DELAY_S)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", UNSPEAKABLE)
def test_what_cannot_be_spoken_is_a_short_silence(house: Server, format: AudioFormat, text: str) -> None:
    spoken = house.backend.spoken
    answer = speak(house.client, text, response_format=format)
    assert answer.status_code == 200, answer.text
    silence = decoded(format, answer.content)
    assert 0.1 <= len(silence) / SAMPLE_RATE <= 0.5
    assert np.abs(silence).max() < 0.001
    assert house.backend.spoken == spoken


@pytest.mark.parametrize("speed", [0.25, 4.0])
@pytest.mark.parametrize("format", FORMATS)
def test_silence_at_any_speed_is_still_a_file(house: Server, format: AudioFormat, speed: float) -> None:
    answer = speak(house.client, "...", response_format=format, speed=speed)
    assert len(decoded(format, answer.content)) > 0


def test_silence_in_the_other_forms(house: Server) -> None:
    delta, done = events(speak(house.client, "😀", stream_format="sse").text)
    assert delta["audio"]
    assert done["usage"]["output_tokens"] == 0  # no model made it
    body = house.client.post("/v1/audio/speech/base64", json={"input": "😀"}).json()
    assert body["duration_ms"] == 250


def test_markdown_is_spoken_as_text(house: Server) -> None:
    before = len(house.backend.segments)
    speak(house.client, "# Hello\n\n**You** there, see [the page](https://example.org/x_y).", seed=77)
    spoken = " ".join(segment.text for segment in house.backend.segments[before:])
    assert "Hello" in spoken
    assert "You" in spoken
    assert not {"*", "#", "[", "]"} & set(spoken)


def test_a_sound_that_is_too_short_for_a_frame(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(seconds_per_segment=0.001))
    for format in FORMATS:
        answer = speak(server.client, "Hi.", response_format=format)
        assert answer.status_code == 200, answer.text
        assert len(decoded(format, answer.content)) > 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_backend_without_any_sound_is_silence_rather_than_an_empty_file(
    start_server: Callable[..., Server], format: AudioFormat
) -> None:
    server = start_server(FakeBackend(seconds_per_segment=0.0))
    for _ in range(2):
        answer = speak(server.client, "Hi.", response_format=format)
        assert answer.status_code == 200, answer.text
        assert seconds(format, answer.content) > 0
