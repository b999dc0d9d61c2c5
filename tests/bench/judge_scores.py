"""What a candidate's speech is worth: heard by the recogniser and by DNSMOS, summed up, and compared with another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from faster_whisper import WhisperModel

from api.src.domain import Samples
from tests.bench.judge_dnsmos import RATE, Dnsmos, Opinion, mean
from tests.bench.judge_speech import Take
from tests.bench.judge_stats import Difference, ratio_difference
from tests.bench.judge_text import Errors, character_errors, word_errors
from tests.bench.sentences import CODES
from tests.decoding import decoded
from tests.recogniser import transcribe

_AUDIBLE = 1e-3

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Score:
    """Of one take; `samples` at RATE. A failed one has no samples and no opinion, and all its words are missed."""

    take: Take
    samples: Samples
    heard: str
    words: Errors
    characters: Errors
    opinion: Opinion | None

    @property
    def audio_s(self) -> float:
        return len(self.samples) / RATE

    def sounds_like(self, other: Score) -> bool:
        """Whether nothing above -60 dBFS tells the two apart; the same codes may differ by a rounding in the codec."""
        if not 0 < len(self.samples) == len(other.samples):
            return False
        return bool(np.abs(self.samples - other.samples).max() < _AUDIBLE)


def score(take: Take, recogniser: WhisperModel, dnsmos: Dnsmos | None, language: str) -> Score:
    """Listen to one take. What is no sound counts as failed."""
    take, samples = _decoded(take)
    heard = transcribe(recogniser, "wav", take.wav, CODES[language]) if samples.size else ""
    return Score(
        take,
        samples,
        heard,
        word_errors(take.sentence, heard, language),
        character_errors(take.sentence, heard, language),
        dnsmos(samples) if dnsmos and samples.size else None,
    )


def _decoded(take: Take) -> tuple[Take, Samples]:
    silence = np.zeros(0, np.float32)
    if take.error:
        return take, silence
    try:
        return take, decoded("wav", take.wav, RATE).clip(-1, 1)
    except (OSError, ValueError, AssertionError) as error:  # av's errors are OSError or ValueError
        return replace(take, error=f"undecodable: {type(error).__name__}"), silence


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of one candidate; see judge's docstring."""
    words, characters = reduce(add, (s.words for s in scores)), reduce(add, (s.characters for s in scores))
    opinions = [s.opinion for s in scores if s.opinion]
    audio_s = sum(s.audio_s for s in scores)
    worst = max(scores, key=lambda s: (s.words.rate, s.words.edits))
    return {
        "sentences": len(scores),
        "errors": [s.take.error for s in scores if s.take.error],
        "words": words.total,
        "edits": words.edits,
        "wer": round(words.rate, 4),
        "cer": round(characters.rate, 4),
        "dnsmos": {name: round(value, 3) for name, value in asdict(mean(opinions)).items()} if opinions else None,
        "audio_s": round(audio_s, 2),
        "real_time_factor": round(sum(s.take.total_s for s in scores if s.audio_s) / audio_s, 4) if audio_s else None,
        "worst": {"said": worst.take.sentence.text, "heard": worst.heard, "wer": round(worst.words.rate, 4)},
    }


def compare(ours: Sequence[Score], reference: Sequence[Score]) -> dict[str, Any]:
    """Ours less the reference's, of the same sentences: [estimate, low, high], and how many takes sound the same."""
    found = {
        name: _shown(ratio_difference(_errors(ours, name), _errors(reference, name)))
        for name in ("words", "characters")
    }
    opinions = _opinions(ours, reference)
    same = sum(a.sounds_like(b) for a, b in zip(ours, reference, strict=True))
    return {"wer": found["words"], "cer": found["characters"], "dnsmos": opinions, "same_sound": same}


def _opinions(ours: Sequence[Score], reference: Sequence[Score]) -> dict[str, list[float]] | None:
    """Over the takes that both have spoken."""
    both = [(a, b) for a, b in zip(ours, reference, strict=True) if a.opinion and b.opinion]
    if not both:
        return None
    first, second = zip(*both, strict=True)
    return {
        name: _shown(ratio_difference(_scores(first, name), _scores(second, name)))
        for name in Opinion.__dataclass_fields__
    }


def _errors(scores: Sequence[Score], kind: str) -> Pairs:
    return _by_sentence(scores, [(getattr(s, kind).edits, getattr(s, kind).total) for s in scores])


def _scores(scores: Sequence[Score], name: str) -> Pairs:
    return _by_sentence(scores, [(getattr(s.opinion, name), 1) for s in scores])


def _by_sentence(scores: Sequence[Score], values: Sequence[tuple[float, float]]) -> Pairs:
    """Sums over each sentence's takes, which are no independent draws."""
    sums: dict[str, tuple[float, float]] = {}
    for each, (numerator, denominator) in zip(scores, values, strict=True):
        before = sums.get(each.take.sentence.text, (0.0, 0.0))
        sums[each.take.sentence.text] = (before[0] + numerator, before[1] + denominator)
    return list(sums.values())


def _shown(found: Difference) -> list[float]:
    return [round(value, 4) for value in (found.estimate, found.low, found.high)]
