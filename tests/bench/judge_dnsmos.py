"""How clean and natural speech sounds to DNSMOS: two small networks that predict listeners' opinions, from 1 to 5.

Reddy, Gopal and Cutler, "DNSMOS: a non-intrusive perceptual objective speech quality metric to evaluate noise
suppressors" (ICASSP 2021), gives P.808, one overall opinion; "DNSMOS P.835" (ICASSP 2022) by the same gives opinions
of the speech (SIG), of the background (BAK) and of both together (OVRL). They were trained on calls with noise in them:
they tell damage, not taste, and compare forms of one voice rather than voices.

The weights are those of Microsoft's package speechmos (MIT), which is installed for its files alone: its code needs
librosa. What it computes is computed here with numpy, after the published recipe; test_judge.py compares the two.
No network.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

RATE = 16_000
WINDOW = 144_160
"""Samples that the networks take, 9.01 s; the next window begins a second later."""

Array = NDArray[np.floating]

_FFT, _HOP, _BANDS = 321, 160, 120
_SIG = (-0.08397278, 1.22083953, 0.0052439)
_BAK = (-0.13166888, 1.60915514, -0.39604546)
_OVRL = (-0.06766283, 1.11546468, 0.04602535)
"""The published polynomials, highest power first, that map P.835's outputs to opinions."""


@dataclass(frozen=True)
class Opinion:
    """Mean opinion scores, from 1 (bad) to 5 (excellent)."""

    p808: float
    ovrl: float
    sig: float
    bak: float


class Dnsmos:
    """Both networks, loaded. Raises FileNotFoundError, with a sentence for people, without speechmos."""

    def __init__(self, threads: int = 2) -> None:
        folder = _weights()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._p808, self._p835 = (
            onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("model_v8.onnx", "sig_bak_ovr.onnx")
        )

    def __call__(self, samples: Array) -> Opinion:
        """The mean over all windows of mono samples at 16 kHz within -1 and 1. Raises ValueError: none at all."""
        return mean([self._window(window) for window in windows(samples.astype(np.float32))])

    def _window(self, window: Array) -> Opinion:
        mel = log_mel(window[:-_HOP]).astype(np.float32)
        p808 = self._p808.run(None, {"input_1": mel[None]})[0][0][0]
        sig, bak, ovrl = self._p835.run(None, {"input_1": window[None]})[0][0]
        fitted = (float(np.polyval(fit, raw)) for fit, raw in ((_OVRL, ovrl), (_SIG, sig), (_BAK, bak)))
        return Opinion(float(p808), *fitted)


def mean(opinions: list[Opinion]) -> Opinion:
    """Of each score by itself."""
    rows = [list(asdict(opinion).values()) for opinion in opinions]
    return Opinion(*(float(value) for value in np.mean(rows, axis=0)))


def windows(samples: Array) -> Iterator[Array]:
    """Windows of 9.01 s, a second apart; what is shorter is doubled until it fills one. Raises ValueError: no samples.

    As in the recipe, what is left after the last whole second is left out, and so may the last window be.
    """
    if not samples.size:
        raise ValueError("there is no sound")
    while len(samples) < WINDOW:
        samples = np.concatenate([samples, samples])
    for second in range(max(1, len(samples) // RATE - WINDOW // RATE)):
        yield samples[second * RATE :][:WINDOW]


def log_mel(samples: Array) -> Array:
    """Frames x 120 mel bands: decibels below the loudest, at most 80, mapped so that -40 is 0 and 0 is 1."""
    padded = np.pad(samples.astype(np.float64), _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2 @ _mel_bands().T
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    decibels -= decibels.max()
    return (np.maximum(decibels, -80) + 40) / 40


@cache
def _mel_bands() -> Array:
    """Bands x bins: triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8000 Hz."""
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(RATE / 2), _BANDS + 2))[:, None]
    bins = np.arange(_FFT // 2 + 1) * RATE / _FFT
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low))


_LINEAR_HZ, _LINEAR_MELS = 200 / 3, 15
"""Slaney's scale: 200/3 Hz a mel up to 1000 Hz, from there 27 mels for each factor of 6.4."""


def _hz_to_mel(hz: float) -> float:
    """Above 1000 Hz."""
    return float(_LINEAR_MELS + 27 * np.log(hz / 1000) / np.log(6.4))


def _mel_to_hz(mels: Array) -> Array:
    return np.where(mels < _LINEAR_MELS, mels * _LINEAR_HZ, 1000 * 6.4 ** ((mels - _LINEAR_MELS) / 27))


def _weights() -> Path:
    package = importlib.util.find_spec("speechmos")
    if package is None or package.origin is None:
        raise FileNotFoundError("DNSMOS's weights are not installed: they are the package speechmos.")
    return Path(package.origin).parent / "dnsmos_models"
