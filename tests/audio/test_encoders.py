"""Encoders: each format decodes as one stream of the same sound, early, with the same bytes every time."""

import gc
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import get_args

import av
import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.src.audio import encoders
from api.src.audio.encoders import ENCODER_REVISION, MEDIA_TYPES, open_encoder
from api.src.domain import SAMPLE_RATE, AudioChunk, AudioFormat, Samples, Segment
from api.src.errors import InvalidRequest
from tests.decoding import decoded

FORMATS: tuple[AudioFormat, ...] = get_args(AudioFormat)
FRAME = 1920  # samples of one chunk, 80 ms
CPUS = os.sched_getaffinity(0) if sys.platform == "linux" else set()  # before any encoder was opened
SEGMENT = Segment("Hello.", 0, 6, final=True)
HEADER_BYTES = {"mp3": 0, "aac": 0, "pcm": 0, "wav": 44, "flac": 60, "opus": 97, "ogg": 97}
# How much longer than its sound a file may be: codec delay and the padding of the last frame. Ogg says both.
LONGEST_PADDING = {"mp3": 3 * 576, "aac": 2 * 1024, "pcm": 0, "wav": 0, "flac": 0, "opus": 0, "ogg": 0}


def voice(seconds: float, sample_rate: int = SAMPLE_RATE) -> Samples:
    """Twelve harmonics of a gliding pitch, with a peak of 0.5: no stretch of it resembles another."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    phase = 2 * np.pi * (120 + 20 * time) * time
    sound = sum((np.sin(harmonic * phase + harmonic**2) / harmonic for harmonic in range(1, 13)), 0 * time)
    return (0.5 * sound / np.abs(sound).max(initial=1e-9)).astype(np.float32)


def chunks(samples: Samples, size: int = FRAME, sample_rate: int = SAMPLE_RATE) -> list[AudioChunk]:
    return [AudioChunk(samples[start : start + size], sample_rate, SEGMENT) for start in range(0, len(samples), size)]


def encoded(format: AudioFormat, parts: list[AudioChunk], speed: float = 1.0) -> list[bytes]:
    """The header, the bytes of each chunk and those of the end."""
    with open_encoder(format, speed) as encoder:
        return [encoder.header, *(encoder.encode(part) for part in parts), encoder.finish()]


def delay_and_likeness(original: Samples, sound: Samples) -> tuple[int, float]:
    """By how many samples `sound` lags, and how well it then correlates (1 is identical)."""
    size = 1 << (len(original) + len(sound)).bit_length()
    product = np.fft.irfft(np.fft.rfft(sound, size) * np.conj(np.fft.rfft(original, size)))
    delay = int(np.argmax(product[: len(sound)]))
    aligned = sound[delay : delay + len(original)]
    return delay, float(np.corrcoef(original[: len(aligned)], aligned)[0, 1])


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_media_types_cover_every_format() -> None:
    assert set(MEDIA_TYPES) == set(FORMATS)
    for format in FORMATS:
        with open_encoder(format) as encoder:
            assert encoder.media_type == MEDIA_TYPES[format]


def test_an_unknown_format_or_speed_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        open_encoder("midi")  # type: ignore[arg-type]
    assert refusal.value.param == "response_format"
    with pytest.raises(InvalidRequest) as refusal:
        open_encoder("mp3", 4.5)
    assert refusal.value.param == "speed"


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_decode_as_one_stream_of_the_same_sound(format: AudioFormat) -> None:
    original = voice(3.3)
    sound = decoded(format, b"".join(encoded(format, chunks(original))))
    delay, likeness = delay_and_likeness(original, sound)
    assert likeness > 0.99
    assert len(original) <= len(sound) <= len(original) + LONGEST_PADDING[format]
    assert delay <= {"mp3": 1105, "aac": 1024}.get(format, 1)


def test_wav_and_flac_are_lossless_to_an_independent_decoder() -> None:
    original = voice(1.0)
    wav, rate = soundfile.read(io.BytesIO(b"".join(encoded("wav", chunks(original)))), dtype="float32")
    data = with_length(b"".join(encoded("flac", chunks(original))), len(original))
    flac, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == SAMPLE_RATE
    assert np.abs(wav - original).max() <= 0.5 / 32768
    assert np.array_equal(flac, wav)


def with_length(flac: bytes, samples: int) -> bytes:
    """libsndfile does not read a FLAC stream to its end whose header leaves the 36-bit length open."""
    word = int.from_bytes(flac[18:26], "big")
    assert word & (1 << 36) - 1 == 0
    return flac[:18] + (word | samples).to_bytes(8, "big") + flac[26:]


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_chunks_give_the_same_bytes(format: AudioFormat) -> None:
    parts = chunks(voice(0.5))
    assert encoded(format, parts) == encoded(format, parts)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    cuts=st.lists(st.integers(0, 9600) | st.integers(0, 300), max_size=8).map(sorted),
    speed=st.sampled_from([1.0, 1.0, 0.5]),
    rate=st.sampled_from([SAMPLE_RATE, SAMPLE_RATE, 22_050]),
)
# at low speeds atempo by itself depends on the size of what it gets first
@example(format="pcm", cuts=[100, 200], speed=0.5, rate=SAMPLE_RATE)
def test_the_bytes_do_not_depend_on_the_cuts(format: AudioFormat, cuts: list[int], speed: float, rate: int) -> None:
    samples = voice(0.4)
    parts = [AudioChunk(part, rate, SEGMENT) for part in np.split(samples, cuts)]
    whole = [AudioChunk(samples, rate, SEGMENT)]
    assert b"".join(encoded(format, parts, speed)) == b"".join(encoded(format, whole, speed))


@pytest.mark.parametrize("format", FORMATS)
def test_sound_leaves_at_once(format: AudioFormat) -> None:
    parts = encoded(format, chunks(voice(0.8)))[1:]
    first = next(index for index, part in enumerate(parts) if part)
    assert first == (1 if format == "aac" else 0)
    assert all(parts[first:-1])


@pytest.mark.parametrize("format", FORMATS)
def test_the_header_holds_no_sound_and_the_rest_no_header(format: AudioFormat) -> None:
    header, *sound = encoded(format, chunks(voice(0.5)))
    assert len(header) == HEADER_BYTES[format]
    assert header[:4] == {"wav": b"RIFF", "flac": b"fLaC", "opus": b"OggS", "ogg": b"OggS"}.get(format, b"")
    assert b"".join(sound).find(header[:4] if format in ("wav", "flac") else b"OpusHead") == -1
    if not header:
        return
    with suppress(EOFError), av.open(io.BytesIO(header)) as container:
        assert not [*container.decode(audio=0)]


@pytest.mark.parametrize(
    ("format", "start"),
    [("mp3", b"\xff\xf3"), ("aac", b"\xff\xf1"), ("flac", b"\xff\xf8"), ("opus", b"OggS"), ("ogg", b"OggS")],
)
def test_the_bytes_after_the_header_begin_with_a_frame(format: AudioFormat, start: bytes) -> None:
    _, *sound = encoded(format, chunks(voice(0.5)))
    assert b"".join(sound).startswith(start)


def test_no_version_or_random_number_is_written() -> None:
    for format in FORMATS:
        data = b"".join(encoded(format, chunks(voice(0.3))))
        assert b"Lavf" not in data
        assert b"Lavc" not in data
    assert encoded("opus", [])[0][14:18] == bytes(4)  # Ogg's serial number


def test_mp3_frames_stand_alone() -> None:
    data = b"".join(encoded("mp3", chunks(voice(2.0))))
    size = 72 * encoders.MP3_BIT_RATE // SAMPLE_RATE
    assert len(data) % size == 0
    frames = [data[start : start + size] for start in range(0, len(data), size)]
    assert {frame[:2] for frame in frames} == {b"\xff\xf3"}
    assert {frame[4] for frame in frames} == {0}  # main_data_begin: nothing borrowed from earlier frames


def test_wav_leaves_its_sizes_open() -> None:
    header = encoded("wav", [])[0]
    assert header[4:8] == header[40:44] == b"\xff" * 4
    assert encoded("wav", chunks(voice(0.5)))[1:] == encoded("pcm", chunks(voice(0.5)))[1:]


def test_sixteen_bit_sound_leaves_as_it_came() -> None:
    original = np.arange(-32768, 32768, dtype="<i2")
    parts = chunks(original.astype(np.float32) / 32768)
    assert b"".join(encoded("pcm", parts)) == original.tobytes()


def test_samples_out_of_range_are_clipped_and_nan_is_silence() -> None:
    samples = np.array([2.0, -2.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 0.0], np.float32)
    sound = np.frombuffer(b"".join(encoded("pcm", chunks(samples))), "<i2")
    assert sound.tolist() == [32767, -32768, 32767, -32768, 0, 32767, -32768, 0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rate", "speed"), [(SAMPLE_RATE, 1.0), (16_000, 0.5)])
def test_nan_does_not_spoil_what_follows(format: AudioFormat, rate: int, speed: float) -> None:
    poisoned = np.concatenate([np.full(200, np.nan, np.float32), np.full(200, np.inf, np.float32)])
    parts = chunks(np.concatenate([poisoned, voice(1.0, rate)]), sample_rate=rate)
    sound = decoded(format, b"".join(encoded(format, parts, speed)))
    assert np.isfinite(sound).all()
    assert np.abs(sound[len(sound) // 2 :]).max() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("format", FORMATS)
def test_an_encoder_that_heard_nothing_finishes(format: AudioFormat) -> None:
    header, rest = encoded(format, [])
    assert len(header) == HEADER_BYTES[format]
    assert rest == b""
    empty = AudioChunk(voice(0.0), SAMPLE_RATE, SEGMENT)
    assert b"".join(encoded(format, [empty])) == header
    assert b"".join(encoded(format, [replace(empty, sample_rate=16_000)], 2.0)) == header


@pytest.mark.parametrize(("rate", "speed"), [(SAMPLE_RATE, 1.0), (16_000, 1.0), (22_050, 0.75), (8_000, 2.0)])
def test_samples_counts_the_encoded_sound(rate: int, speed: float) -> None:
    with open_encoder("pcm", speed) as encoder:
        data = [encoder.encode(part) for part in chunks(voice(4.0, rate), sample_rate=rate)]
        data.append(encoder.finish())
        assert encoder.samples * 2 == len(b"".join(data))
        assert encoder.samples == pytest.approx(4.0 * SAMPLE_RATE / speed, rel=0.008)


def test_a_silence_of_another_rate_fits_between() -> None:
    silence = np.zeros(SAMPLE_RATE // 10, np.float32)
    parts = [
        *chunks(voice(0.5, 22_050), sample_rate=22_050),
        *chunks(silence),
        *chunks(voice(0.5, 22_050), sample_rate=22_050),
    ]
    sound = np.frombuffer(b"".join(encoded("pcm", parts)), "<i2")
    assert len(sound) == pytest.approx(1.1 * SAMPLE_RATE, abs=2)
    assert not sound[12_001:14_399].any()


@pytest.mark.parametrize("format", FORMATS)
def test_calls_may_come_from_different_threads(format: AudioFormat) -> None:
    parts = chunks(voice(0.8))
    with open_encoder(format, 1.25) as encoder:
        data = [encoder.header]
        for part in [*parts, None]:
            with ThreadPoolExecutor(1) as another:
                call = another.submit(encoder.encode, part) if part else another.submit(encoder.finish)
                data.append(call.result())
    assert data == encoded(format, parts, 1.25)


@linux_only
@pytest.mark.parametrize("format", FORMATS)
def test_an_encoder_starts_no_threads_and_keeps_the_callers_cpus(format: AudioFormat) -> None:
    before = tasks()
    opened = [open_encoder(format, 0.8) for _ in range(5)]
    for encoder in opened:
        for part in chunks(voice(0.4)):
            encoder.encode(part)
    assert tasks() == before
    assert os.sched_getaffinity(0) == CPUS
    for encoder in opened:
        encoder.close()


@linux_only
@pytest.mark.parametrize("format", FORMATS)
def test_closing_early_frees_everything_at_once(format: AudioFormat) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    part = chunks(voice(0.08))[0]
    kept = []  # closed ones that someone still holds

    def many() -> None:
        for _ in range(60):
            encoder = open_encoder(format, 1.5)
            encoder.encode(replace(part, sample_rate=16_000))
            encoder.close()
            encoder.close()
            kept.append(encoder)

    many()
    before = tasks(), len(os.listdir("/proc/self/fd")), resident()
    gc.disable()  # what only the collector would free counts as kept
    try:
        many()
        many()
    finally:
        gc.enable()
    assert (tasks(), len(os.listdir("/proc/self/fd"))) == before[:2]
    assert resident() - before[2] < 4_000_000


@pytest.mark.parametrize("format", ["mp3", "opus", "aac", "flac"])
def test_a_closed_encoder_says_so(format: AudioFormat) -> None:
    encoder = open_encoder(format)
    encoder.close()
    with pytest.raises(ValueError, match="closed"):
        encoder.encode(chunks(voice(0.1))[0])


def test_the_revision_names_the_library_and_covers_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert av.__version__ in ENCODER_REVISION
    assert encoders._revision(1) == ENCODER_REVISION
    changed = replace(encoders._SETTINGS["mp3"], bit_rate=96_000)
    monkeypatch.setattr(encoders, "_SETTINGS", {**encoders._SETTINGS, "mp3": changed})
    assert encoders._revision(1) != ENCODER_REVISION
