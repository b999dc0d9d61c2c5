"""Record the official package's codec and speaker encoder, for test_codec_decoder.py and test_reference_clips.py.

In the virtual environment that make_golden.py describes:
    PYTHONPATH=. official/bin/python -m tests.engine.make_golden_codec
writes tests/engine/data/golden_codec.npz and tests/engine/data/codec_wide, a checkpoint of other sizes than data/tiny:
grouped heads, a smaller codebook, quantizers that are not used, more layers. Waveforms are computed in float64, so that
they carry as little rounding as the official code allows.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .codec_cases import CLIPS, DECODES, STRIDE, clip, codes

DATA = Path(__file__).parent / "data"
CODEC = {
    "model_type": "qwen3_tts_tokenizer_12hz",
    "encoder_valid_num_quantizers": 16,
    "encoder_config": {
        "_frame_rate": 12.5,
        "num_filters": 2,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "num_residual_layers": 2,
        "num_quantizers": 20,
        "codebook_size": 64,
        "codebook_dim": 6,
        "vector_quantization_hidden_dimension": 6,
        "upsample_groups": 24,
    },
    "decoder_config": {
        "latent_dim": 20,
        "codebook_dim": 12,
        "codebook_size": 64,
        "decoder_dim": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 17,
        "rms_norm_eps": 1e-5,
    },
}
SPEAKER = {
    "enc_dim": 24,
    "enc_channels": [24, 24, 24, 48],
    "enc_kernel_sizes": [5, 3, 5, 1],
    "enc_dilations": [1, 3, 2, 1],
    "enc_attention_channels": 12,
    "enc_res2net_scale": 4,
    "enc_se_channels": 6,
}


def stub_torchaudio() -> None:
    """torchaudio's wheel does not load beside a CPU-only torch; qwen_tts needs it for another tokenizer only."""
    for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    sys.modules["torchaudio"].compliance = sys.modules["torchaudio.compliance"]
    sys.modules["torchaudio.compliance"].kaldi = sys.modules["torchaudio.compliance.kaldi"]


stub_torchaudio()
from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model  # noqa: E402
from qwen_tts.core.models.configuration_qwen3_tts import Qwen3TTSSpeakerEncoderConfig  # noqa: E402
from qwen_tts.core.models.modeling_qwen3_tts import Qwen3TTSSpeakerEncoder, mel_spectrogram  # noqa: E402


def fill(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values that keep the scale through each layer, with norms, scales and usages away from one."""
    noise = torch.randn(shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last == "initialized":
        return torch.ones(shape)
    if last == "cluster_usage":
        return 1 + noise.abs()
    if last in ("gamma", "scale"):
        return 0.3 + 0.1 * noise
    if last in ("alpha", "beta"):
        return 0.2 * noise
    if last == "weight" and len(shape) == 1:
        return 1 + 0.1 * noise
    if last == "bias":
        return 0.05 * noise
    if last in ("embedding_sum", "embed_sum"):
        return noise
    return noise / np.prod(shape[1:]) ** 0.5


def build_wide() -> None:
    folder = DATA / "codec_wide"
    (folder / "speech_tokenizer").mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        codec = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**json.loads(json.dumps(CODEC))))
        speaker = Qwen3TTSSpeakerEncoder(Qwen3TTSSpeakerEncoderConfig(**SPEAKER))
    generator = torch.Generator().manual_seed(7)
    tensors = {name: fill(name, value.shape, generator) for name, value in sorted(codec.state_dict().items())}
    tensors["decoder.decoder.6.conv.weight"] *= 0.005  # waveforms of a standard deviation of about 0.1
    save_file(tensors, folder / "speech_tokenizer" / "model.safetensors")
    (folder / "speech_tokenizer" / "config.json").write_text(json.dumps(CODEC, indent=2))
    tensors = {
        f"speaker_encoder.{name}": fill(name, value.shape, generator)
        for name, value in sorted(speaker.state_dict().items())
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "qwen3_tts",
        "tts_model_type": "base",
        "tts_model_size": "0b6",
        "speaker_encoder_config": SPEAKER,
        "talker_config": {
            "text_vocab_size": 8,
            "code_predictor_config": {"num_code_groups": 16},
            "num_code_groups": 16,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def codec_of(checkpoint: str, window: int = 0) -> Qwen3TTSTokenizerV2Model:
    folder = DATA / checkpoint / "speech_tokenizer"
    config = json.loads((folder / "config.json").read_text())
    if window:
        config["decoder_config"]["sliding_window"] = window
    model = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**config)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def speaker_of(checkpoint: str) -> Qwen3TTSSpeakerEncoder:
    folder = DATA / checkpoint
    name = "config-base.json" if checkpoint == "tiny" else "config.json"
    config = json.loads((folder / name).read_text())["speaker_encoder_config"]
    encoder = Qwen3TTSSpeakerEncoder(Qwen3TTSSpeakerEncoderConfig(**config)).eval()
    prefix = "speaker_encoder."
    tensors = load_file(folder / "model.safetensors")
    encoder.load_state_dict(
        {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}
    )
    return encoder


def waveform(checkpoint: str, window: int, frames: int, seed: int) -> np.ndarray:
    model = codec_of(checkpoint, window)
    size = model.config.decoder_config.codebook_size
    given = torch.from_numpy(codes(frames, seed, size)).t()[None]
    single = model.decoder(given)[0, 0]
    exact = model.decoder.double()(given)[0, 0]
    print(f"rms {exact.square().mean().sqrt():.3f}, float32 is off by {(single - exact).abs().max():.1e}")
    return exact[::STRIDE].numpy()


def reference(checkpoint: str, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    audio = torch.from_numpy(clip(samples, seed))[None]
    found = codec_of(checkpoint).encode(audio, torch.ones_like(audio, dtype=torch.long)).audio_codes[0]
    if samples < 6000:
        return found.numpy().astype(np.int16), np.zeros(0, np.float32)
    mel = mel_spectrogram(
        audio, n_fft=1024, num_mels=128, sampling_rate=24000, hop_size=256, win_size=1024, fmin=0, fmax=12000
    )
    return found.numpy().astype(np.int16), speaker_of(checkpoint)(mel.transpose(1, 2))[0].numpy()


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    build_wide()
    found = {}
    for name, case in DECODES.items():
        print(name, end=": ")
        found[f"{name}/wav"] = waveform(*case)
    for name, case in CLIPS.items():
        found[f"{name}/codes"], found[f"{name}/embedding"] = reference(*case)
        print(name, found[f"{name}/codes"].shape, len(np.unique(found[f"{name}/codes"])))
    np.savez_compressed(DATA / "golden_codec.npz", **found)


if __name__ == "__main__":
    main()
