"""Recordings: the same sound from every format, and one kind of error for whatever else arrives."""

from __future__ import annotations

import io
import math
import struct
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.audio.frame import AudioFrame
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.src.audio.decode import decode_recording
from api.src.domain import Samples
from api.src.errors import InvalidRequest, PayloadTooLarge

PITCH, LEVEL = 440.0, 0.5


def sine(seconds: float, rate: int, pitch: float = PITCH) -> Samples:
    return (LEVEL * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def written(samples: np.ndarray, rate: int, form: str = "wav", kind: str | None = "FLOAT") -> bytes:
    """By libsndfile, which shares no code with ffmpeg. samples: (n,) or (n, channels)."""
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=form, subtype=kind)
    return sink.getvalue()


@cache
def encoded(container: str, codec: str, rate: int = 48_000) -> bytes:
    """A second of the sine in a format that libsndfile does not write."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = AudioFrame.from_ndarray(sine(1, rate)[np.newaxis], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        context = stream.codec_context
        resampler = av.AudioResampler(context.format, "mono", rate, context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return sink.getvalue()


def measured(samples: Samples, rate: int) -> tuple[float, float]:
    """The level of PITCH in the middle half, and that of all else: of another pitch, of a pitch that drifts."""
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4].astype(np.float64)
    turns = 2 * np.pi * PITCH / rate * np.arange(len(middle))
    waves = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    found, *_ = np.linalg.lstsq(waves, middle, rcond=None)
    return float(np.hypot(*found)), float(np.sqrt(2 * np.mean((middle - waves @ found) ** 2)))


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("kind", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_samples_at_the_wanted_rate_are_untouched(kind, channels):
    clip = np.random.default_rng(1).uniform(-1, 1, (5000, channels)).astype(np.float32)
    data = written(clip, 24_000, kind=kind)
    expected = soundfile.read(io.BytesIO(data), dtype="float64")[0].reshape(5000, channels).mean(axis=1)
    found = decode_recording(data, 24_000)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-7


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("wanted", [16_000, 24_000])
def test_resampling_keeps_length_pitch_and_level(rate, wanted):
    found = decode_recording(written(sine(2, rate), rate), wanted)
    assert abs(len(found) - 2 * wanted) <= 1
    level, rest = measured(found, wanted)
    assert abs(level - LEVEL) < 1e-3
    assert rest < 1e-3


def test_what_the_wanted_rate_cannot_hold_is_gone_and_not_folded_back():
    found = decode_recording(written(sine(1, 48_000, pitch=15_000), 48_000), 24_000)
    assert np.abs(found[2000:-2000]).max() < 1e-3 * LEVEL


FORMATS = {
    "u8": ("wav", "PCM_U8"),
    "mu-law": ("au", "ULAW"),
    "aiff": ("aiff", "PCM_16"),
    "flac": ("flac", "PCM_24"),
    "alac": ("caf", "ALAC_16"),
    "vorbis": ("ogg", "VORBIS"),
    "opus": ("ogg", "OPUS"),
    "mp3": ("mp3", None),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_of_libsndfile(name, channels):
    sound = np.stack([sine(1, 48_000)] * channels, axis=1)
    check_sine(decode_recording(written(sound, 48_000, *FORMATS[name]), 24_000))


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("ipod", "aac"),
        ("mp4", "alac"),
        ("adts", "aac"),
        ("webm", "libopus"),
        ("matroska", "flac"),
        ("mp3", "libmp3lame"),
    ],
)
def test_formats_of_ffmpeg(container, codec):
    check_sine(decode_recording(encoded(container, codec), 24_000))


def check_sine(found: Samples) -> None:
    """Codecs may add or lose a frame at the ends, and are not exact: LAME lowers the level by 5 %."""
    assert abs(len(found) - 24_000) <= 1200
    level, rest = measured(found, 24_000)
    assert abs(level - LEVEL) < 0.03
    assert rest < 0.03


def test_a_path_is_read_as_its_bytes_are(tmp_path):
    path = tmp_path / "clip with spaces: 1.flac"
    path.write_bytes(written(sine(0.5, 44_100), 44_100, "flac", "PCM_16"))
    assert np.array_equal(decode_recording(path, 24_000), decode_recording(path.read_bytes(), 24_000))


def test_a_title_may_be_in_any_encoding():
    assert len(decode_recording(riff(1, 16, b"\xff\xfe\xff\xff"), 24_000)) == 2400


def test_too_loud_samples_are_clipped():
    found = decode_recording(written(np.full(3000, 1e30, np.float32), 24_000), 24_000)
    assert found.min() == found.max() == 1.0


@pytest.mark.parametrize("rate", [24_000, 48_000])
def test_the_bound_on_duration_is_exact(rate):
    data = written(sine(2, rate), rate)
    assert len(decode_recording(data, 24_000, max_seconds=2.0)) == 48_000
    with pytest.raises(InvalidRequest, match=r"longer than 1\.99 seconds"):
        decode_recording(data, 24_000, max_seconds=1.99)


def test_a_long_recording_is_refused_before_it_is_decoded():
    """A minute of flac silence is small: what counts is what comes out."""
    data = written(np.zeros(60 * 8000, np.float32), 8000, "flac", "PCM_16")
    assert len(data) < 20_000
    with pytest.raises(InvalidRequest, match="longer than 5 seconds"):
        decode_recording(data, 24_000, max_seconds=5)


def test_the_bound_on_size_is_exact(tmp_path):
    data = written(sine(0.1, 24_000), 24_000)
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    for source in (data, path):
        assert len(decode_recording(source, 24_000, max_bytes=len(data))) == 2400
        with pytest.raises(PayloadTooLarge, match=f"more than {len(data) - 1} bytes"):
            decode_recording(source, 24_000, max_bytes=len(data) - 1)


def video() -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        output.mux(stream.encode(None))
    return sink.getvalue()


def odd_rate(rate: int) -> bytes:
    data = bytearray(written(sine(0.1, 24_000), 24_000, kind="PCM_16"))
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


def riff(tag: int, bits: int, info: bytes = b"") -> bytes:
    """A tenth of a second of silence in a WAVE file by hand, with a title."""
    head = struct.pack("<HHIIHH", tag, 1, 24_000, 24_000 * bits // 8, bits // 8, bits)
    title = b"INFOINAM" + struct.pack("<I", len(info)) + info
    chunks = ((b"fmt ", head), (b"LIST", title), (b"data", bytes(2400 * bits // 8)))
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(chunk)) + chunk for name, chunk in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def grain() -> bytes:
    """A Core Audio file whose packets are as small as its samples: each would be a frame of its own."""
    data = bytearray(written(np.zeros(48_000, np.float32), 48_000, "caf", "PCM_16"))
    at = data.index(b"desc") + 4 + 8 + 8 + 4 + 4  # size, rate, format, flags; then bytes and frames per packet
    data[at : at + 8] = (2).to_bytes(4, "big") + (2).to_bytes(4, "big")
    return bytes(data)


def test_damage_does_not_cost_more_time_than_sound_does():
    with av.open(io.BytesIO(grain())) as container:
        assert sum(frame.samples == 1 for frame in container.decode(audio=0)) == 48_000
    with pytest.raises(InvalidRequest, match="damaged"):
        decode_recording(grain(), 24_000, max_seconds=2)


NOT_A_NUMBER = np.array([0.0, math.nan, 0.0] * 500, np.float32)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "damaged"),
        (bytes(4000), "damaged"),
        (written(sine(0.1, 24_000), 24_000)[:20], "damaged"),
        (written(np.zeros(0, np.float32), 24_000), "holds no sound"),
        (video(), "holds no sound"),
        (written(NOT_A_NUMBER, 24_000), "damaged"),
        (encoded("nut", "pcm_s16le"), "format that cannot be read"),  # a container that is not allowed
        (riff(0x1234, 16), "format that cannot be read"),  # a codec that ffmpeg does not know
        (riff(1, 64), "format that cannot be read"),  # samples that numpy does not know
        (odd_rate(1), "at 1 Hz"),
        (odd_rate(2**31 - 1), "at 2147483647 Hz"),
    ],
)
def test_what_is_no_recording_is_refused(data, message):
    with pytest.raises(InvalidRequest, match=message):
        decode_recording(data, 24_000)


@pytest.mark.parametrize("name", ["missing.wav", "."])
def test_a_path_that_is_no_file_is_refused(name, tmp_path):
    with pytest.raises(InvalidRequest, match="cannot be read"):
        decode_recording(tmp_path / name, 24_000)


def test_no_other_file_is_opened(tmp_path, monkeypatch):
    """ffmpeg alone follows this playlist."""
    monkeypatch.chdir(tmp_path)
    Path("secret.wav").write_bytes(written(sine(1, 24_000), 24_000))
    playlist = b"ffconcat version 1.0\nfile secret.wav\n"
    with av.open(io.BytesIO(playlist)) as container:
        assert next(container.decode(audio=0)).samples > 0
    with pytest.raises(InvalidRequest):
        decode_recording(playlist, 24_000)


WHOLE = [
    written(sine(0.2, 16_000), 16_000, kind="PCM_16"),
    written(sine(0.2, 16_000), 16_000, kind="DOUBLE"),
    written(sine(0.2, 16_000), 16_000, "flac", "PCM_16"),
    written(sine(0.2, 16_000), 16_000, "ogg", "VORBIS"),
    written(sine(0.2, 16_000), 16_000, "mp3", None),
    written(sine(0.2, 16_000), 16_000, "caf", "PCM_16"),
    encoded("ipod", "aac", 16_000),
    encoded("webm", "libopus"),
]


def read_or_refuse(data: bytes) -> None:
    try:
        found = decode_recording(data, 24_000, max_seconds=3)
    except InvalidRequest:
        return
    assert found.dtype == np.float32
    assert found.ndim == 1
    assert 0 < len(found) <= 3 * 24_000 + 1
    assert np.abs(found).max() <= 1


@settings(max_examples=150, deadline=None)
@given(data=st.data(), number=st.integers(0, len(WHOLE) - 1))
def test_damage_is_read_or_refused_and_nothing_else(data, number):
    """Cut off, bytes replaced (half of the time near the start, where headers are), bytes put in or left out."""
    whole = bytearray(WHOLE[number])
    places = st.integers(0, len(whole) - 1) | st.integers(0, 200)
    for place in data.draw(st.lists(places, max_size=8)):
        whole[place] = data.draw(st.integers(0, 255))
    place = data.draw(places)
    whole[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    read_or_refuse(bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]))


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\x1aE\xdf\xa3", b"caff"]),
    rest=st.binary(),
)
@example(start=b"\0\0\0\x18ftypM4A ", rest=bytes(64))
def test_noise_is_read_or_refused_and_nothing_else(start, rest):
    read_or_refuse(start + rest)
