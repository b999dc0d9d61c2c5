"""The filters: tempo and resampling keep pitch and length, and do not depend on how their input was cut."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.src.audio.filters import Resampler
from api.src.audio.tempo import Tempo
from api.src.domain import SAMPLE_RATE, Samples
from api.src.errors import InvalidRequest

PITCH = 440.0
CUTS = st.lists(st.integers(1, 9000) | st.integers(60, 200), min_size=1, max_size=6)


def tone(seconds: float, sample_rate: int = SAMPLE_RATE) -> Samples:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (0.5 * np.sin(2 * np.pi * PITCH * time)).astype(np.float32)


def pitch(samples: Samples) -> float:
    """Hz of the strongest partial, from the middle half."""
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 19))
    return float(np.argmax(spectrum)) * SAMPLE_RATE / (1 << 19)


def cut(samples: Samples, sizes: list[int]) -> list[Samples]:
    """Pieces of these sizes, in turn, until the samples are used up."""
    pieces, start = [], 0
    while start < len(samples):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(samples[start : start + size])
        start += size
    return pieces


def through_tempo(pieces: list[Samples], speed: float) -> Samples:
    tempo = Tempo(speed)
    return np.concatenate([*(tempo.push(piece) for piece in pieces), tempo.flush()])


def resampled(pieces: list[tuple[Samples, int]]) -> Samples:
    resampler = Resampler()
    return np.concatenate([*(resampler.push(*piece) for piece in pieces), resampler.flush()])


@pytest.mark.parametrize("speed", [0.25, 0.3, 0.5, 0.75, 0.9, 1.1, 1.25, 2.0, 3.0, 4.0])
def test_tempo_changes_the_length_and_keeps_the_pitch(speed: float) -> None:
    spoken = through_tempo(cut(tone(4.0), [1920]), speed)
    assert len(spoken) == pytest.approx(4.0 * SAMPLE_RATE / speed, rel=0.008)
    assert pitch(spoken) == pytest.approx(PITCH, rel=0.025)
    assert spoken.dtype == np.float32
    assert np.abs(spoken).max() == pytest.approx(0.5, rel=0.02)


def test_a_speed_of_one_passes_samples_through_untouched() -> None:
    samples = tone(0.1)
    tempo = Tempo(1.0)
    assert tempo.push(samples) is samples
    assert not len(tempo.flush())


@pytest.mark.parametrize("speed", [0.5, 1.25, 4.0])
def test_tempo_streams(speed: float) -> None:
    tempo = Tempo(speed)
    assert sum(len(tempo.push(piece)) for piece in cut(tone(0.4), [1920]))


@pytest.mark.parametrize("speed", [0.2499, 4.001, 0.0, -1.0, float("nan"), float("inf")])
def test_other_speeds_are_refused(speed: float) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.25 and 4") as refusal:
        Tempo(speed)
    assert refusal.value.param == "speed"


@settings(max_examples=25, deadline=None)
@given(
    sizes=CUTS,
    speed=st.sampled_from([0.25, 0.9, 3.0]),
)
def test_tempo_does_not_depend_on_the_cuts(sizes: list[int], speed: float) -> None:
    sound = tone(0.5)
    assert np.array_equal(through_tempo(cut(sound, sizes), speed), through_tempo([sound], speed))


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_length_and_sound(sample_rate: int) -> None:
    seconds = 1.037
    sound = resampled([(piece, sample_rate) for piece in cut(tone(seconds, sample_rate), [1764])])
    samples = round(seconds * sample_rate)
    assert len(sound) == pytest.approx(samples * SAMPLE_RATE / sample_rate, abs=1)
    assert sound.dtype == np.float32
    inner = slice(200, -200)
    assert np.abs(sound[inner] - tone(2 * seconds)[: len(sound)][inner]).max() < 1e-3


def test_samples_of_the_right_rate_pass_through_untouched() -> None:
    samples = tone(0.1)
    resampler = Resampler()
    assert resampler.push(samples, SAMPLE_RATE) is samples
    assert not len(resampler.flush())


@settings(max_examples=25, deadline=None)
@given(
    sizes=CUTS,
    rate=st.sampled_from([16_000, 22_050]),
)
def test_resampling_does_not_depend_on_the_cuts(sizes: list[int], rate: int) -> None:
    noise = np.random.default_rng(2).uniform(-0.5, 0.5, 9_000).astype(np.float32)
    pieces = cut(noise, sizes)
    assert np.array_equal(resampled([(piece, rate) for piece in pieces]), resampled([(noise, rate)]))


def test_the_rate_may_change_on_the_way() -> None:
    rates = [22_050, SAMPLE_RATE, 16_000, 22_050, SAMPLE_RATE]
    sound = resampled([(tone(0.5, rate), rate) for rate in rates])
    assert len(sound) == pytest.approx(0.5 * len(rates) * SAMPLE_RATE, abs=len(rates))
    assert pitch(sound) == pytest.approx(PITCH, rel=0.01)
    peaks = np.abs(sound[: len(sound) // 100 * 100].reshape(-1, 100)).max(axis=1)
    assert peaks.min() > 0.3


def test_nothing_in_nothing_out() -> None:
    assert not len(through_tempo([], 0.5))
    assert not len(resampled([]))
    assert not len(resampled([(tone(0.0), 16_000)]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_filters_start_no_threads() -> None:
    before = len(os.listdir("/proc/self/task"))
    open_ones = [Tempo(0.3) for _ in range(10)]
    resampler = Resampler()
    resampler.push(tone(0.1, 16_000), 16_000)
    assert len(open_ones) == 10
    assert len(os.listdir("/proc/self/task")) == before
