"""The listening judge: end to end on the embedded voice, and what it makes of speech that is damaged."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faster_whisper import WhisperModel

from tests.bench import judge, judge_dnsmos
from tests.bench.judge_dnsmos import Dnsmos, Opinion, windows
from tests.bench.judge_scores import compare, score, summary
from tests.bench.judge_speech import Speech, Take
from tests.bench.judge_stats import ratio_difference
from tests.bench.judge_text import Errors, character_errors, normalised, word_errors
from tests.bench.sentences import CODES, SENTENCES, Sentence
from tests.decoding import decoded

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmarks read /proc")
JUDGE = judge.judge

SUMMARY = {
    *("sentences", "errors", "words", "edits", "wer", "cer", "dnsmos", "audio_s", "real_time_factor", "worst", "says"),
}


# --- end to end ---


@dataclass(frozen=True)
class Judged:
    """The last line's figures, the tables above it, and the folder of what was kept."""

    figures: dict[str, Any]
    printed: str
    kept: Path

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.figures["candidates"][name]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Three short sentences in the embedded voice, and as another candidate the same sounds, garbled."""
    folder = tmp_path_factory.mktemp("judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            judge, "judge", lambda spoken, language: JUDGE(spoken | {"garbled": garbled(spoken["embedded"])}, language)
        )
        patch.setitem(SENTENCES, "english", tuple(map(SENTENCES["english"].__getitem__, (0, 1, 19, 3))))
        printed = io.StringIO()
        with redirect_stdout(printed):
            assert judge.main(["--sentences", "3", "--keep", str(folder)]) == 0
    *tables, last = printed.getvalue().splitlines()
    return Judged(json.loads(last), "\n".join(tables), folder)


def garbled(speech: Speech) -> Speech:
    """Backwards, in noise."""
    return Speech([replace(take, wav=changed(take.wav, lambda samples: noisy(samples[::-1]))) for take in speech.takes])


@pytest.mark.slow
@linux
def test_the_embedded_voice_is_understood_and_clean(judged: Judged) -> None:
    assert judged.figures.keys() == {"machine", "language", "no_dnsmos", "candidates", "silent", "takes", "seconds"}
    found = judged["embedded"]
    assert found.keys() == SUMMARY
    assert (found["sentences"], found["errors"], found["words"]) == (3, [], 31)
    assert found["wer"] == round(found["edits"] / found["words"], 4) <= 0.08
    assert found["dnsmos"]["p808"] > 3.3
    assert found["dnsmos"]["ovrl"] > 2.7
    assert 5 < found["audio_s"] < 15
    assert found["real_time_factor"] > 0
    assert found["says"]["backend"] == "embedded"
    assert found["worst"]["said"] in [sentence.text for sentence in SENTENCES["english"]]
    wavs = sorted((judged.kept / "embedded").iterdir())
    assert sum(decoded("wav", wav.read_bytes()).size / 24_000 for wav in wavs) == pytest.approx(
        found["audio_s"], abs=0.02
    )
    for title in ("As heard by the recogniser", "Difference to embedded [95 % interval]", "Worst of garbled"):
        assert title in judged.printed


@pytest.mark.slow
@linux
def test_garbled_speech_is_judged_worse(judged: Judged) -> None:
    clean, worse = judged["embedded"], judged["garbled"]
    assert "difference" not in clean
    assert worse["wer"] > 0.7
    assert worse["cer"] > 0.4
    assert worse["dnsmos"]["p808"] < clean["dnsmos"]["p808"] - 0.5
    assert worse["dnsmos"]["ovrl"] < clean["dnsmos"]["ovrl"] - 0.5
    found = worse["difference"]
    assert found["wer"][0] == pytest.approx(worse["wer"] - clean["wer"], abs=2e-4)
    assert found["wer"][1] > 0.3  # the low end
    assert found["dnsmos"]["bak"][2] < -1  # the high end
    assert found["same_sound"] == 0


def changed(wav: bytes, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    with wave.open(io.BytesIO(wav)) as file:
        parameters = file.getparams()
        samples = np.frombuffer(file.readframes(2**31 - 1), "<i2")
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setparams(parameters._replace(nframes=len(samples)))
        file.writeframes(change(samples).astype("<i2").tobytes())
    return written.getvalue()


def noisy(samples: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 2000, len(samples))
    return np.clip(samples + noise, -32768, 32767)


@linux
def test_a_server_that_refuses_has_all_its_words_missed(
    tmp_path: Path, start_server: Callable[..., Any], backend: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    url = start_server(backend, tmp_path).url
    assert judge.main(["--base-url", url, "--voice", "nobody", "--sentences", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"][url]
    assert len(found["errors"]) == found["sentences"] == 2
    assert "404" in found["errors"][0] or "400" in found["errors"][0]
    assert found["wer"] == found["cer"] == 1
    assert found["dnsmos"] is found["real_time_factor"] is None
    assert found["says"]["backend"] == backend.name


@linux
def test_a_model_that_cannot_be_loaded_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(["--model", str(tmp_path), "--weights", "int8"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{tmp_path.name} int8 does not start: " in printed.err
    assert "config.json" in printed.err


def test_candidates_are_models_in_their_forms_and_servers() -> None:
    options = judge._parser().parse_args(
        ["--model", "a/small", "--model", "b/large", "--weights", "fp32,int8", "--base-url", "http://x", "--voice", "v"]
    )
    found = judge.candidates(options)
    assert [each.name for each in found] == ["small fp32", "small int8", "large fp32", "large int8", "http://x"]
    assert found[1].settings == {
        "TTS_BACKEND": "qwen3",
        "TTS_MODEL": "a/small",
        "TTS_CPU_WEIGHTS": "int8",
        "TTS_DEVICE": "cpu",
    }
    assert {each.fields["voice"] for each in found} == {"v"}
    alike = judge._parser().parse_args(["--model", "a/m", "--model", "b/m"])
    assert [each.name for each in judge.candidates(alike)] == ["a/m auto", "b/m auto"]


def test_an_unknown_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        judge.main(["--model", "m", "--weights", "fp32,int3"])
    assert "int3 is none of auto, fp32" in capsys.readouterr().err


# --- DNSMOS ---


def tone(seconds: float) -> np.ndarray:
    """A swelling voice-like tone over a hiss."""
    t = np.arange(int(seconds * 16000)) / 16000
    pitch = 2 * np.pi * (120 * t + 20 * np.sin(2 * np.pi * 0.7 * t))
    voice = sum(np.sin(k * pitch) / k for k in range(1, 20))
    hiss = np.sin(1e6 * t**2)
    return (0.1 * voice * (0.5 - 0.5 * np.cos(2 * np.pi * 3 * t)) + 0.01 * hiss).astype(np.float32)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.6, Opinion(2.6384, 2.4366, 3.2758, 2.9779)),  # doubled four times
        (9.5, Opinion(2.6521, 2.8899, 3.4561, 3.4781)),
        (11.2, Opinion(2.6682, 2.7672, 3.4148, 3.3339)),  # two windows
    ],
)
def test_scores_are_those_of_the_published_code(seconds: float, expected: Opinion) -> None:
    """Recorded from speechmos 0.0.1.1 itself with librosa 1.0.0."""
    found = Dnsmos()(tone(seconds))
    assert vars(found) == pytest.approx(vars(expected), abs=0.002)


def test_windows_hold_what_the_networks_take() -> None:
    assert [len(list(windows(np.ones(round(s * 16000))))) for s in (0.1, 9.01, 10.5, 11.2, 20.0)] == [3, 1, 1, 2, 11]
    assert {len(window) for window in windows(np.ones(20 * 16000))} == {144_160}
    with pytest.raises(ValueError, match="no sound"):
        next(windows(np.ones(0)))


def test_without_the_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        judge_dnsmos.importlib.util, "find_spec", lambda name: None if name == "speechmos" else find_spec(name)
    )
    assert judge._dnsmos() == (None, "DNSMOS's weights are not installed: they are the package speechmos.")


# --- how errors are counted ---


@pytest.mark.parametrize(
    ("said", "heard", "edits", "total"),
    [
        ("The cat sat.", "the cat sat", 0, 3),
        ("Dr. Miller paid $45.", "Doctor Miller paid forty-five dollars", 0, 4),
        ("In 1969 it doesn't matter.", "in nineteen sixty-nine, it does not matter", 0, 6),
        ("Roughly 75% of them", "Roughly seventy-five percent of them", 0, 4),
        ("one word is lost", "one is lost", 1, 4),
        ("one word is added", "one more word is added", 1, 4),
        ("one word is wrong", "one bird is wrong", 1, 4),
        ("nothing was heard", "", 3, 3),
        ("hello", "hello hello hello", 2, 1),
    ],
)
def test_words_are_counted_fairly(said: str, heard: str, edits: int, total: int) -> None:
    assert word_errors(Sentence(said), heard, "english") == Errors(edits, total)


def test_the_nearest_way_to_write_it_counts() -> None:
    sentence = Sentence("Sara and Jon left", also=("Sarah and John left",))
    assert word_errors(sentence, "Sarah and John left.", "english").edits == 0
    assert word_errors(sentence, "Sarah and Jan left.", "english") == Errors(1, 4)


def test_languages_without_spaces_count_characters() -> None:
    sentence = Sentence("今天很冷，但是天气很好。")
    assert word_errors(sentence, "今天 很冷但是天气不好", "chinese") == Errors(1, 10)
    assert character_errors(Sentence("Schöne Grüße"), "schöne grüsse!", "german") == Errors(2, 11)


@pytest.mark.parametrize("language", SENTENCES)
def test_each_sentence_is_its_own_transcript(language: str) -> None:
    assert language in CODES
    assert len({sentence.text for sentence in SENTENCES[language]}) == len(SENTENCES[language]) >= 8
    for sentence in SENTENCES[language]:
        for text in (sentence.text, *sentence.also):
            assert word_errors(sentence, text.lower().rstrip(".?!。？"), language).edits == 0
        assert language == "english" or not any(letter.isdigit() for letter in sentence.text)


def test_normalising_twice_changes_nothing() -> None:
    for sentence in SENTENCES["english"]:
        once = normalised(sentence.text, "english")
        assert normalised(once, "english") == once


# --- summing up ---


def test_the_bootstrap_interval_is_that_of_the_textbook() -> None:
    """Of a mean of many draws with unit variance it is 1.96 standard errors to either side."""
    ours = np.stack([np.random.default_rng(1).normal(0.5, 1, 400), np.ones(400)], axis=1)
    theirs = ours * [0, 1]
    found = ratio_difference(ours, theirs)
    assert found.estimate == pytest.approx(ours[:, 0].mean())
    error = ours[:, 0].std() / 20
    assert found.high - found.estimate == pytest.approx(1.96 * error, rel=0.05)
    assert found.estimate - found.low == pytest.approx(1.96 * error, rel=0.05)


def test_the_bootstrap_is_paired_and_weighs_sentences_by_their_words() -> None:
    theirs = [(5, 10), (0, 2), (9, 10)]
    found = ratio_difference([(edits + words / 10, words) for edits, words in theirs], theirs)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))  # hard sentences are so for both
    assert ratio_difference([(1, 10), (1, 1)], [(0, 10), (0, 1)]).estimate == pytest.approx(2 / 11)
    with pytest.raises(ValueError, match="no sentences"):
        ratio_difference(np.zeros((0, 2)), np.zeros((0, 2)))


def tone_file(seconds: float) -> bytes:
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((20_000 * tone(seconds)).astype("<i2").tobytes())
    return written.getvalue()


@pytest.fixture
def hears() -> Callable[[str], WhisperModel]:
    """A recogniser that hears what it is told, so that sums can be checked by hand."""

    def build(text: str) -> Any:
        return SimpleNamespace(transcribe=lambda *_, **__: ([SimpleNamespace(text=text)], None))

    return build


def test_takes_of_a_sentence_count_together(hears: Callable[[str], Any]) -> None:
    wav = tone_file(1.0)
    said = [Sentence("the cat sat down"), Sentence("hello")]
    takes = [Take(sentence, wav, 0.5) for sentence in said for _ in range(2)]
    heard = ["the cat sat down", "the cat sat", "hello", "hello"]
    ours = [score(take, hears(text), None, "english") for take, text in zip(takes, heard, strict=True)]
    theirs = [score(replace(take, error="cut"), hears("the"), None, "english") for take in takes]
    found = summary(ours)
    assert (found["sentences"], found["dnsmos"]) == (4, None)
    assert (found["words"], found["edits"], found["wer"]) == (10, 1, 0.1)
    assert found["worst"] == {"said": "the cat sat down", "heard": "the cat sat", "wer": 0.25}
    assert found["audio_s"] == pytest.approx(4)
    assert found["real_time_factor"] == 0.5
    assert summary(theirs)["errors"] == ["cut"] * 4
    assert summary(theirs)["wer"] == 1
    assert compare(ours, theirs)["dnsmos"] is None
    assert compare(theirs, theirs)["same_sound"] == 0  # half a file is none
    shifted = [replace(each, samples=each.samples + 5e-4) for each in ours]
    assert compare(shifted, ours)["same_sound"] == 4
    assert compare([replace(each, samples=each.samples + 2e-3) for each in ours], ours)["same_sound"] == 0
    assert compare(ours, ours) == {"wer": [0, 0, 0], "cer": [0, 0, 0], "dnsmos": None, "same_sound": 4}
    estimate, low, high = compare(ours, theirs)["wer"]
    assert (estimate, low, high) == (-0.9, -1, -0.875)  # of two sentences, either may be drawn alone


@pytest.mark.parametrize("wav", [b"", b"not a sound", tone_file(0)])
def test_what_is_no_sound_has_failed(hears: Callable[[str], Any], wav: bytes) -> None:
    found = score(Take(Sentence("the cat"), wav, 0.5), hears("the cat"), None, "english")
    assert found.take.error.startswith("undecodable")
    assert (found.heard, found.words, found.audio_s, found.opinion) == ("", Errors(2, 2), 0, None)
