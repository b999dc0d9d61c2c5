"""Inputs of the codec's reference cases, made alike by make_golden_codec.py and by the tests that compare with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STRIDE = 97
"""Of each reference waveform every 97th sample is kept, which meets every phase of the upsampling."""
DECODES = {
    # name: checkpoint, sliding window (0: the checkpoint's own), frames, seed
    "tiny_40": ("tiny", 0, 40, 1),
    "tiny_150": ("tiny", 0, 150, 2),
    "tiny_window_72": ("tiny", 72, 200, 3),
    "wide_1": ("codec_wide", 0, 1, 4),
    "wide_130": ("codec_wide", 0, 130, 5),
}
CLIPS = {
    # name: checkpoint, samples, seed
    "tiny_part_of_a_frame": ("tiny", 1000, 11),
    "tiny_whole_frames": ("tiny", 19200, 12),
    "tiny_one_sample_more": ("tiny", 24001, 13),
    "tiny_over_ten_seconds": ("tiny", 12 * 24000 + 77, 14),
    "wide_quarter_second": ("codec_wide", 6000, 15),
    "wide_three_seconds": ("codec_wide", 72345, 16),
}


def codes(frames: int, seed: int, size: int) -> NDArray[np.int64]:
    """(frames, 16), below `size`."""
    return np.random.default_rng(seed).integers(0, size, (frames, 16))


def clip(samples: int, seed: int) -> NDArray[np.float32]:
    """Noise that swells and fades, with a silent stretch; made of integers, so that it is the same everywhere."""
    noise = np.random.default_rng(seed).integers(-20000, 20000, samples)
    swell = np.abs(np.arange(samples) % 16384 - 8192)
    audio = noise * swell // 8192
    audio[samples // 2 : samples // 2 + samples // 10] = 0
    return (audio / 32768).astype(np.float32)
