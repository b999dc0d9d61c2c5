"""Encoded speech back to samples, by ffmpeg."""

from __future__ import annotations

import io

import av
import numpy as np

from api.src.domain import SAMPLE_RATE, AudioFormat, Samples


def decoded(format: AudioFormat, data: bytes, rate: int = SAMPLE_RATE) -> Samples:
    """The whole file as mono samples at `rate` Hz (pcm: at its own); raises unless it is exactly one audio stream."""
    if format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    resampler = av.AudioResampler("flt", "mono", rate)
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams) == 1
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray()[0] for frame in [*frames, *resampler.resample(None)]])
