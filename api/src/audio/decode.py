"""Recordings of any format to float32 mono samples at a wanted rate, in memory.

Owns the reading of what strangers send: bounds on size and duration, and one kind of error for whatever is wrong with
it. Trims and levels nothing. ffmpeg may use no demuxer that opens anything else (playlists, image sequences, URLs).
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from numpy.typing import NDArray

from ..domain import Samples
from ..errors import InvalidRequest, PayloadTooLarge
from .filters import SILENCE, FilterChain

MAX_BYTES = 25 * 1024 * 1024
MAX_SECONDS = 120.0
FRAMES_PER_SECOND = 1000
"""The most that a codec makes of max_seconds: Opus makes up to 400, damage one of each sample."""
SAMPLE_RATES = range(4_000, 384_001)
"""Hz of what is taken for a recording; others would make resampling cost more than any sound is worth."""

CONTAINERS = "wav,w64,aiff,caf,au,mp3,flac,ogg,mov,matroska,aac,ac3,amr,asf,avi,mpegts,mpeg,wv,tta,ape"
"""ffmpeg's names of the demuxers that may be tried; mov is also mp4 and m4a, matroska also webm, ogg also opus."""
_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none", "enable_drefs": "0"}
_DAMAGED = "The recording is damaged, or of a format that cannot be read."


def decode_recording(
    source: bytes | Path, sample_rate: int, *, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> Samples:
    """The recording (a file's bytes, or its path) as mono samples within -1 and 1 at `sample_rate` Hz, at least one.

    Of several channels the mean is taken, of several streams the first with sound.

    Raises:
        InvalidRequest: no recording, a damaged one, one without sound, one longer than `max_seconds`.
        PayloadTooLarge: more than `max_bytes`.
    """
    data = _read(source, max_bytes + 1) if isinstance(source, Path) else source
    if len(data) > max_bytes:
        raise PayloadTooLarge(f"The recording has more than {max_bytes} bytes.")
    if not data:
        raise InvalidRequest("The recording is empty.")
    try:
        with av.open(BytesIO(data), "r", options=_OPTIONS, metadata_errors="ignore") as container:
            samples = np.concatenate([SILENCE, *_resampled(container, sample_rate, max_seconds)])
    except (av.FFmpegError, ValueError) as error:  # the latter of PyAV, of sample formats unknown to numpy
        raise InvalidRequest(_DAMAGED) from error
    if not len(samples):
        raise InvalidRequest("The recording holds no sound.")
    np.clip(samples, -1.0, 1.0, out=samples)  # resampling overshoots
    return samples


def _read(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error


def _resampled(container: InputContainer, sample_rate: int, max_seconds: float) -> Iterator[Samples]:
    """The first sound stream's samples at `sample_rate`. Its own rate may change, as at the start of AAC."""
    chain, own_rate, seconds = None, 0, 0.0
    for count, frame in enumerate(_frames(container)):
        if frame.sample_rate not in SAMPLE_RATES:
            raise InvalidRequest(f"A recording at {frame.sample_rate} Hz cannot be used.")
        seconds += frame.samples / frame.sample_rate
        if seconds > max_seconds:
            raise InvalidRequest(f"The recording is longer than {max_seconds:g} seconds.")
        if count > FRAMES_PER_SECOND * max_seconds:
            raise InvalidRequest(_DAMAGED)
        if frame.sample_rate != own_rate:
            yield chain.flush() if chain else SILENCE
            own_rate = frame.sample_rate
            chain = FilterChain(own_rate, [("aresample", str(sample_rate))]) if own_rate != sample_rate else None
        yield chain.push(_mono(frame)) if chain else _mono(frame)
    yield chain.flush() if chain else SILENCE


def _frames(container: InputContainer) -> Iterator[AudioFrame]:
    if not container.streams.audio:
        raise InvalidRequest("The recording holds no sound.")
    stream = container.streams.audio[0]
    if stream.codec_context is None:  # no decoder is known
        raise InvalidRequest(_DAMAGED)
    stream.codec_context.thread_count = 1
    for frame in container.decode(stream):
        assert isinstance(frame, AudioFrame)
        if frame.samples:
            yield frame


def _mono(frame: AudioFrame) -> Samples:
    """The mean of a frame's channels, within -1 and 1."""
    data: NDArray[Any] = frame.to_ndarray()  # planar: (channels, samples), else (1, samples * channels)
    if not frame.format.is_planar:
        data = data.reshape(frame.samples, -1).T
    middle, scale = 0.0, 1.0
    if data.dtype.kind == "f":
        if not np.isfinite(data).all():
            raise InvalidRequest(_DAMAGED)
        data = data.clip(-1.0, 1.0)
    elif data.dtype == np.uint8:
        middle = scale = 128.0
    else:
        scale = -float(np.iinfo(data.dtype).min)
    samples: Samples = ((data.mean(axis=0, dtype=np.float64) - middle) / scale).astype(np.float32)
    return samples
