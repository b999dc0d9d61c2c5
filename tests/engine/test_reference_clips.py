"""Reference clips: the official package's codes and speaker embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from api.src.engine.codec_encoder import CodecEncoder
from api.src.engine.errors import CheckpointError, EngineError
from api.src.engine.reference import SpeakerEncoder, mel_filters, mel_spectrogram
from tests.engine.checkpoints import tiny
from tests.engine.codec_cases import CLIPS, clip

DATA = Path(__file__).parent / "data"
FOUND = dict(np.load(DATA / "golden_codec.npz"))
EMBEDDED = [name for name in CLIPS if len(FOUND[f"{name}/embedding"])]
torch.set_num_threads(1)


def folder(checkpoint: str) -> Path:
    return tiny("base") if checkpoint == "tiny" else DATA / checkpoint


def test_the_reference_clip_of_the_golden_data() -> None:
    with np.load(DATA / "golden.npz") as golden:
        audio = torch.from_numpy(golden["ref_audio"])
        codes, embedding = golden["ref_code"], golden["ref_spk_embedding"]
    assert np.array_equal(CodecEncoder.load(tiny("base")).encode(audio).numpy(), codes)
    assert np.abs(SpeakerEncoder.load(tiny("base")).embed(audio).numpy() - embedding).max() < 1e-4


@pytest.mark.parametrize("case", CLIPS)
def test_codes_of_the_official_package(case: str) -> None:
    """One clip is over ten seconds, where attention to a window would give other codes."""
    checkpoint, samples, seed = CLIPS[case]
    codes = CodecEncoder.load(folder(checkpoint)).encode(torch.from_numpy(clip(samples, seed)))
    assert codes.dtype == torch.long
    assert np.array_equal(codes.numpy(), FOUND[f"{case}/codes"])


@pytest.mark.parametrize("case", EMBEDDED)
def test_embeddings_of_the_official_package(case: str) -> None:
    checkpoint, samples, seed = CLIPS[case]
    embedding = SpeakerEncoder.load(folder(checkpoint)).embed(torch.from_numpy(clip(samples, seed)))
    assert np.abs(embedding.numpy() - FOUND[f"{case}/embedding"]).max() < 1e-5


@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921, 3840, 5000])
def test_a_started_frame_counts(samples: int) -> None:
    codes = CodecEncoder.load(DATA / "codec_wide").encode(torch.from_numpy(clip(samples, 1)))
    assert codes.shape == (-(-samples // 1920), 16)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 64


def test_codes_depend_on_nothing_later() -> None:
    encoder, audio = CodecEncoder.load(DATA / "codec_wide"), torch.from_numpy(clip(30 * 1920, 2))
    assert torch.equal(encoder.encode(audio)[:15], encoder.encode(audio[: 15 * 1920]))


def test_a_clip_may_be_float64_and_is_not_changed() -> None:
    encoder, audio = SpeakerEncoder.load(DATA / "codec_wide"), torch.from_numpy(clip(12000, 3))
    kept = audio.clone()
    assert torch.equal(encoder.embed(audio.double()), encoder.embed(audio))
    assert torch.equal(audio, kept)


@pytest.mark.parametrize("samples", [0, 500, 5999])
def test_too_short_a_clip_is_refused(samples: int) -> None:
    with pytest.raises(EngineError, match="at least"):
        SpeakerEncoder.load(DATA / "codec_wide").embed(torch.zeros(samples))


def test_an_empty_clip_is_refused() -> None:
    with pytest.raises(EngineError, match="empty"):
        CodecEncoder.load(DATA / "codec_wide").encode(torch.zeros(0))


def test_silence_is_finite() -> None:
    assert SpeakerEncoder.load(DATA / "codec_wide").embed(torch.zeros(6000)).isfinite().all()


def test_a_tone_is_in_its_mel_band() -> None:
    """1 kHz is band 15 on Slaney's scale, of 45.2 mel (12 kHz is 15 + log(12) / log(6.4) * 27 mel) in 129 steps."""
    mel = mel_spectrogram(torch.sin(torch.arange(24000) * (2 * torch.pi * 1000 / 24000)), 128, 24000)
    assert mel.shape == (128, (24000 - 1024 + 768) // 256 + 1)
    top = 15 + np.log(12) / np.log(6.4) * 27
    assert int(mel[:, 40].argmax()) == round(15 / top * 129) - 1
    assert float(mel.min()) >= np.log(1e-5) - 1e-6


def test_mel_filters_have_equal_area() -> None:
    areas = mel_filters(128, 24000)[64:].sum(1) * (24000 / 1024)
    assert torch.allclose(areas, torch.ones_like(areas), atol=0.05)


def test_unusable_checkpoints_are_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "codec_wide", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    widths = {
        "enc_channels": [24, 24, 24, 24, 72],
        "enc_kernel_sizes": [5, 3, 5, 3, 1],
        "enc_dilations": [1, 3, 2, 1, 1],
    }
    config["speaker_encoder_config"].update(widths)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks tensors: speaker_encoder\.blocks\.3"):
        SpeakerEncoder.load(tmp_path)
    (tmp_path / "speech_tokenizer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CodecEncoder.load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("use_causal_conv", False), ("num_quantizers", 8), ("hidden_act", "relu")])
def test_unsupported_encoders_are_named(name: str, value: object, tmp_path: Path) -> None:
    shutil.copytree(DATA / "codec_wide" / "speech_tokenizer", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"encoder_config.{name} = "):
        CodecEncoder.load(tmp_path)
