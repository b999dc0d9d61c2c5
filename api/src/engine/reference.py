"""The speaker encoder: a reference clip's samples to the embedding of its voice.

Owns the ECAPA-TDNN of the Base checkpoints and its mel front end. Resampling and trimming are the caller's, as is the
clip's length, which memory grows with. Everything is float32. The clip's codes: codec_encoder.py.
Facts of the arithmetic: qwen-tts 0.1.1, extract_speaker_embedding and mel_spectrogram.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, SpeakerEncoderConfig
from .errors import EngineError
from .weights import Checkpoint, empty, load

N_FFT, HOP = 1024, 256
MEL_FLOOR = 1e-5
SHORTEST_CLIP = 0.25
"""Seconds. A clip of fewer mel frames than the encoder's widest reflection can't be embedded; 0.25 s is beyond it."""


class SpeakerEncoder(nn.Module):
    """speaker_encoder.* of a Base checkpoint: one embedding for a clip, of the talker's width."""

    def __init__(self, config: SpeakerEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths, kernels, dilations = config.enc_channels, config.enc_kernel_sizes, config.enc_dilations
        first = TimeDelay(config.mel_dim, widths[0], kernels[0], dilations[0])
        inner = [SqueezeExciteRes2Net(config, index) for index in range(1, len(widths) - 1)]
        self.blocks = nn.ModuleList([first, *inner])
        self.mfa = TimeDelay(widths[-1], widths[-1], kernels[-1], dilations[-1])
        self.asp = AttentivePooling(widths[-1], config.enc_attention_channels)
        self.fc = nn.Conv1d(widths[-1] * 2, config.enc_dim, 1)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """The speaker encoder of the Base checkpoint in `folder`.

        Raises:
            CheckpointError: whatever makes the checkpoint unusable, such as another kind, which has no such encoder.
        """
        config = ModelConfig.read(folder).speaker_encoder_config
        encoder = empty(lambda: cls(config), torch.float32, device)
        with Checkpoint(folder) as checkpoint:
            load(encoder, checkpoint, "speaker_encoder.")
        return encoder

    @torch.inference_mode()
    def embed(self, samples: Tensor) -> Tensor:
        """samples [L] at config.sample_rate, within -1 and 1 -> embedding [enc_dim].

        Raises:
            EngineError: a clip shorter than SHORTEST_CLIP.
        """
        if samples.shape[-1] < SHORTEST_CLIP * self.config.sample_rate:
            raise EngineError(f"a reference clip must be at least {SHORTEST_CLIP} s long")
        mel = mel_spectrogram(samples.to(self.fc.weight), self.config.mel_dim, self.config.sample_rate)
        embedding: Tensor = self(mel[None])[0]
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        """mel [B, mel_dim, T] -> [B, enc_dim]."""
        outputs = []
        for part in self.blocks:
            x = part(x)
            outputs.append(x)
        x = self.asp(self.mfa(torch.cat(outputs[1:], 1)))
        out: Tensor = self.fc(x).squeeze(2)
        return out


class TimeDelay(nn.Module):
    """Convolution over time with reflected edges, then ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding="same", padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Res2Net(nn.Module):
    """Channels in groups; each group but the first passes a convolution, fed by the group before."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.scale = scale
        width = channels // scale
        self.blocks = nn.ModuleList(TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = x.chunk(self.scale, 1)
        outputs = [first]
        for index, (block, part) in enumerate(zip(self.blocks, parts, strict=True)):
            outputs.append(block(part + outputs[-1] if index else part))
        return torch.cat(outputs, 1)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means over time."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(channels, inner, 1), nn.Conv1d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.relu(self.conv1(x.mean(2, keepdim=True)))
        return x * torch.sigmoid(self.conv2(gate))


class SqueezeExciteRes2Net(nn.Module):
    def __init__(self, config: SpeakerEncoderConfig, index: int) -> None:
        super().__init__()
        inputs, channels = config.enc_channels[index - 1], config.enc_channels[index]
        kernel, dilation = config.enc_kernel_sizes[index], config.enc_dilations[index]
        self.tdnn1, self.tdnn2 = TimeDelay(inputs, channels), TimeDelay(channels, channels)
        self.res2net_block = Res2Net(channels, config.enc_res2net_scale, kernel, dilation)
        self.se_block = SqueezeExcite(channels, config.enc_se_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))
        return out + x


class AttentivePooling(nn.Module):
    """Mean and deviation over time, weighted by attention per channel."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.tdnn = TimeDelay(channels * 3, inner)
        self.conv = nn.Conv1d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, 2 C, 1]."""
        even = torch.full_like(x[:, :1], 1.0 / x.shape[2])
        context = torch.cat([x, *(each.expand_as(x) for each in self.statistics(x, even))], 1)
        attention = self.conv(torch.tanh(self.tdnn(context))).softmax(2)
        return torch.cat(self.statistics(x, attention), 1)

    def statistics(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weights * x).sum(2, keepdim=True)
        variance = (weights * (x - mean).square()).sum(2, keepdim=True)
        return mean, variance.clamp(min=1e-12).sqrt()


def mel_spectrogram(samples: Tensor, bands: int, sample_rate: int) -> Tensor:
    """samples [L] -> natural logarithm of the mel magnitudes [bands, frames], from 0 Hz to half the sample rate."""
    padding = (N_FFT - HOP) // 2
    padded = F.pad(samples[None], (padding, padding), mode="reflect")[0]
    window = torch.hann_window(N_FFT, device=samples.device)
    spectrum = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
    magnitudes = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
    return (mel_filters(bands, sample_rate).to(samples) @ magnitudes).clamp(min=MEL_FLOOR).log()


def mel_filters(bands: int, sample_rate: int) -> Tensor:
    """[bands, N_FFT / 2 + 1]: triangles of equal area on Slaney's mel scale (linear to 1 kHz, logarithmic above)."""
    linear_step, knee = 200.0 / 3, 1000.0
    log_step = math.log(6.4) / 27
    top = sample_rate / 2
    highest = knee / linear_step + math.log(top / knee) / log_step
    mels = torch.linspace(0.0, highest, bands + 2, dtype=torch.float64)
    above = knee * torch.exp(log_step * (mels - knee / linear_step))
    edges = torch.where(mels < knee / linear_step, mels * linear_step, above)
    distances = edges[:, None] - torch.linspace(0.0, top, N_FFT // 2 + 1, dtype=torch.float64)  # [bands + 2, bins]
    steps = edges.diff()[:, None]
    rising, falling = -distances[:-2] / steps[:-1], distances[2:] / steps[1:]
    return torch.minimum(rising, falling).clamp(min=0) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
