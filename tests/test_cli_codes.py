"""The command `codes`: the recorded codes and sound of the official package, and a clear no to anything else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from api.src.cli import main
from tests.engine.checkpoints import tiny
from tests.engine.conftest import one_thread  # noqa: F401 (a fixture that this module's tests use by itself)
from tests.engine.streams import golden

ARRAYS, META = golden("golden")
CASES = META["cases"]
KINDS = {"custom": "custom_voice", "design": "voice_design", "clone": "base"}
SCRIPT = str(Path(sys.executable).with_name("qwen3-tts"))
Found = dict[str, np.ndarray]


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """The recorded clip as a file."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, ARRAYS["ref_audio"], 24_000, subtype="FLOAT")
    return str(path)


def asked(kind: str, to: Path, **options: object) -> list[str]:
    """The command line. True is a flag; None and False are left out."""
    words = ["codes"]
    usual = {"model": tiny(kind), "out": to, "text": "One two.", "max_new_tokens": 6}
    for name, value in (usual | options).items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value in (None, False) else [flag, str(value)]
    return words


def recorded(name: str, out: Path, clip: str) -> list[str]:
    """The command line of a recorded case."""
    case, kind = CASES[name], KINDS[name.split("_")[0]]
    names = ("text", "language", "speaker", "instruct", "ref_text")
    options = {name: case.get(name) for name in names} | {"text_stream": not case["non_streaming_mode"]}
    if kind == "base":
        options["ref_audio"] = clip
    return asked(kind, out, greedy=True, **options | {"max_new_tokens": META["flags"]["max_new_tokens"]})


def read(out: Path) -> Found:
    with np.load(out) as file:
        return dict(file)


def check(name: str, found: Found) -> None:
    assert found.keys() == {"codes", "wav"}
    assert np.array_equal(found["codes"], ARRAYS[f"{name}/codes"])
    assert found["wav"].dtype == np.float32
    assert found["wav"].shape == ARRAYS[f"{name}/wav"].shape
    assert np.abs(found["wav"] - ARRAYS[f"{name}/wav"]).max() < 1.1e-4


@pytest.mark.parametrize("name", CASES)
def test_codes_and_sound_are_the_official_ones(name, tmp_path, clip, capsys):
    out = tmp_path / "found.npz"
    assert main(recorded(name, out, clip)) == 0
    check(name, read(out))
    end = "the model" if CASES[name]["stopped_by_eos"] else "the limit"
    assert capsys.readouterr().out == f"{out}: {CASES[name]['frames']} frames, ended by {end}\n"


def test_the_console_script_clones_in_context(tmp_path, clip):
    out = tmp_path / "found"  # and gets no suffix
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([SCRIPT, *recorded("clone_icl", out, clip)], check=True, cwd=tmp_path, env=environment)
    check("clone_icl", read(out))


def test_the_module_says_what_is_wrong_and_ends_with_1(tmp_path):
    command = [sys.executable, "-m", "api.src.cli", *asked("custom_voice", tmp_path / "found.npz", speaker="Bob")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the model has no speaker Bob; it has aiden")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def spoken(kind: str, out: Path, **options: object) -> Found:
    assert main(asked(kind, out, **options)) == 0
    return read(out)


def test_a_seed_draws_the_same_codes_again_and_greedy_needs_none(tmp_path):
    out = tmp_path / "found.npz"
    first, same, other = (spoken("custom_voice", out, speaker="Ryan", seed=seed)["codes"] for seed in (1, 1, -2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    sure, also = (spoken("custom_voice", out, speaker="Ryan", seed=seed, greedy=True)["codes"] for seed in (1, 2))
    assert np.array_equal(sure, also)


def test_a_clip_of_any_format_is_cloned(tmp_path):
    """Stereo mp3 at 44.1 kHz, of two voices that are told apart."""
    found = []
    for pitch in (120, 240):
        wave = 0.3 * np.sign(np.sin(2 * np.pi * pitch * np.arange(44_100) / 44_100))
        soundfile.write(tmp_path / "clip.mp3", np.stack([wave, wave], axis=1), 44_100)
        clone = {"ref_audio": tmp_path / "clip.mp3", "greedy": True}
        found.append(spoken("base", tmp_path / "found.npz", **clone)["codes"])
    assert found[0].shape == (5, 16)
    assert not np.array_equal(*found)


def test_speech_without_a_frame_is_an_empty_file(tmp_path, monkeypatch):
    """A model that ends at once, which this one does not: the end's code is taken for the one that it begins with."""
    from api.src.engine.language_model import LanguageModel

    begin = int(spoken("custom_voice", tmp_path / "found.npz", speaker="Ryan", greedy=True)["codes"][0, 0])
    load = LanguageModel.load

    def ending(*args: object) -> LanguageModel:
        model = load(*args)
        model.eos = begin
        return model

    monkeypatch.setattr(LanguageModel, "load", ending)
    found = spoken("custom_voice", tmp_path / "found.npz", speaker="Ryan", greedy=True)
    assert (found["codes"].shape, found["wav"].shape) == ((0, 16), (0,))


def noise() -> bytes:
    return np.random.default_rng(1).bytes(3000)


def short() -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, np.zeros(2400), 24_000, format="wav")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("custom_voice", {"model": "missing"}, "missing is no checkpoint: it has no config.json"),
        ("custom_voice", {}, "A custom_voice checkpoint needs --speaker"),
        ("custom_voice", {"speaker": "Ryan", "ref_audio": "noise.wav"}, "custom_voice checkpoint takes no --ref-audio"),
        ("custom_voice", {"speaker": "Ryan", "language": "Klingon"}, "does not speak Klingon"),
        ("custom_voice", {"speaker": "Ryan", "text": ""}, "no text to speak"),
        ("custom_voice", {"speaker": "Ryan", "text": "\udcff"}, "half of a surrogate pair"),
        ("custom_voice", {"speaker": "Ryan", "max_new_tokens": 1}, "--max-new-tokens must be from 2 to 32768"),
        ("custom_voice", {"speaker": "Ryan", "max_new_tokens": 10**9}, "--max-new-tokens must be"),
        ("custom_voice", {"speaker": "Ryan", "device": "abacus"}, "The device abacus cannot be used"),
        ("custom_voice", {"speaker": "Ryan", "out": "no/folder/found.npz"}, "cannot be written"),
        ("voice_design", {"speaker": "Ryan"}, "A voice_design checkpoint takes no --speaker"),
        ("base", {}, "A base checkpoint needs --ref-audio"),
        ("base", {"ref_text": "One."}, "A base checkpoint needs --ref-audio"),
        ("base", {"ref_audio": "noise.wav", "instruct": "Slowly."}, "A base checkpoint takes no --instruct"),
        ("base", {"ref_audio": "missing.wav"}, "missing.wav cannot be read"),
        ("base", {"ref_audio": "noise.wav"}, "The recording is damaged"),
        ("base", {"ref_audio": "short.wav"}, "at least 0.25 s"),
    ],
)
def test_what_is_wrong_is_said(kind, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("noise.wav").write_bytes(noise())
    Path("short.wav").write_bytes(short())
    assert main(asked(kind, tmp_path / "found.npz", **options)) == 1
    assert message in capsys.readouterr().err
    assert not Path("found.npz").exists()


def test_the_engine_is_imported_by_the_command_alone_and_may_be_missing(tmp_path):
    """A torch that cannot be imported stands for one that is not installed."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from api.src.cli import main\n"
        f"sys.exit(main({asked('custom_voice', tmp_path / 'found.npz', speaker='Ryan')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make setup-qwen3" in done.stderr
    assert "Traceback" not in done.stderr
