"""The codec's encoder (Mimi): a reference clip's samples to its codes.

Owns encoder.* of speech_tokenizer/. Takes mono samples at the codec's rate; resampling and trimming are the caller's,
as is the clip's length, which memory grows with. Everything is float32.
Facts of the arithmetic: transformers 4.57.3 as qwen-tts 0.1.1 runs it. It attends to all of the past: a window, as
transformers 5 has it, changes the codes of clips beyond ten seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec_convolutions import Tensors
from .codec_window import rotation_at
from .config import CodecConfig, CodecEncoderConfig
from .errors import CheckpointError, EngineError
from .layers import Rotation, rotate
from .weights import Checkpoint, empty, load

FRAME_STRIDE = 2
"""The last convolution's, from 25 to 12.5 frames a second; its kernel is twice as wide. Fixed in the official code."""


class CodecEncoder:
    """Samples to codes, of the quantizers that the talker knows."""

    def __init__(self, config: CodecConfig, network: FrameEncoder, semantic: Quantizer, acoustic: Quantizer) -> None:
        self.config, self.network = config, network
        self.semantic, self.acoustic = semantic, acoustic

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """The codec's encoder of the checkpoint in `folder`, which holds speech_tokenizer/ or is that folder.

        Raises:
            CheckpointError: whatever makes the checkpoint unusable.
        """
        folder = folder / "speech_tokenizer" if (folder / "speech_tokenizer").is_dir() else folder
        config = CodecConfig.read(folder)
        _check(config)
        sizes = config.encoder_config
        network = empty(lambda: FrameEncoder(sizes), torch.float32, device)
        semantic = sizes.num_semantic_quantizers
        with Checkpoint(folder) as checkpoint:
            load(network, checkpoint, "encoder.", ignore=("quantizer.",))
            tensors = Tensors(checkpoint, "encoder.") / "quantizer"
            parts = [
                Quantizer.read(tensors / f"{name}_residual_vector_quantizer", sizes, count, device)
                for name, count in (
                    ("semantic", semantic),
                    ("acoustic", config.encoder_valid_num_quantizers - semantic),
                )
            ]
        return cls(config, network, *parts)

    @torch.inference_mode()
    def encode(self, samples: Tensor) -> Tensor:
        """samples [L] at config.input_sample_rate, within -1 and 1 -> codes [frames, groups]; the last may be partial.

        Raises:
            EngineError: no samples.
        """
        if not samples.numel():
            raise EngineError("a reference clip must not be empty")
        vectors = self.network(samples.to(self.semantic.projection)[None, None])[0].t()  # [frames, hidden]
        return torch.cat((self.semantic.encode(vectors), self.acoustic.encode(vectors)), 1)


@dataclass(frozen=True)
class Quantizer:
    """A residual vector quantizer: each book codes what the ones before have left."""

    projection: Tensor  # [dim, hidden]
    books: Tensor  # [count, size, dim]

    @classmethod
    def read(cls, tensors: Tensors, config: CodecEncoderConfig, count: int, device: torch.device | str) -> Quantizer:
        size, dim = config.codebook_size, config.codebook_dim
        books = []
        for index in range(count):
            book = tensors / f"layers.{index}.codebook"
            usage = book.get("cluster_usage", size).clamp(min=1e-5)
            books.append(book.get("embed_sum", size, dim) / usage[:, None])
        projection = tensors.get("input_proj.weight", dim, config.hidden_size, 1).squeeze(2)
        return cls(projection.to(device, copy=True), torch.stack(books).to(device))

    def encode(self, vectors: Tensor) -> Tensor:
        """[frames, hidden] -> codes [frames, count]."""
        rest, codes = vectors @ self.projection.t(), []
        for book in self.books:
            code = torch.cdist(rest, book).argmin(1)
            rest = rest - book[code]
            codes.append(code)
        return torch.stack(codes, 1)


class FrameEncoder(nn.Module):
    """Convolutions, transformer, and the stride to the frame rate."""

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        self.config = config
        layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*_convolutions(config))})
        self.encoder_transformer = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        sizes = (config.hidden_size, config.hidden_size, 2 * FRAME_STRIDE)
        self.downsample = PaddedConv(*sizes, stride=FRAME_STRIDE, bias=False, mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        """samples [B, 1, L] -> [B, hidden, frames]."""
        x = self.encoder["layers"](x).transpose(1, 2)  # [B, positions, hidden]
        positions = torch.arange(x.shape[1], device=x.device)
        rotation = rotation_at(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.encoder_transformer["layers"].children():
            x = layer(x, rotation)
        out: Tensor = self.downsample(x.transpose(1, 2))
        return out


class PaddedConv(nn.Module):
    """A causal convolution; the right is padded to whole strides."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        mode: str = "constant",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride=stride, dilation=dilation, bias=bias)
        self.stride, self.mode = stride, mode
        self.left = (kernel - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (self.left, -x.shape[2] % self.stride), mode=self.mode))
        return out


class Residual(nn.Module):
    def __init__(self, config: CodecEncoderConfig, channels: int, dilation: int) -> None:
        super().__init__()
        inner = channels // config.compress
        wide = PaddedConv(channels, inner, config.residual_kernel_size, dilation=dilation, mode=config.pad_mode)
        self.block = nn.Sequential(nn.ELU(), wide, nn.ELU(), PaddedConv(inner, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out + x


class EncoderLayer(nn.Module):
    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = EncoderAttention(config)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(hidden, config.intermediate_size, bias=False),
                "fc2": nn.Linear(config.intermediate_size, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.self_attn_layer_scale, self.mlp_layer_scale = Scale(hidden), Scale(hidden)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, hidden] -> the same."""
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rotation))
        inner = F.gelu(self.mlp["fc1"](self.post_attention_layernorm(x)))
        out: Tensor = x + self.mlp_layer_scale(self.mlp["fc2"](inner))
        return out


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class EncoderAttention(nn.Module):
    """Causal attention to all of the past."""

    def __init__(self, config: CodecEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.shared = config.num_attention_heads != config.num_key_value_heads
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj, self.v_proj = nn.Linear(hidden, keys, bias=False), nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, T, hidden] -> the same."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.view(*x.shape[:2], -1, self.head_dim) for part in parts)  # [B, T, heads, D]
        query, key, value = (part.transpose(1, 2) for part in (rotate(query, rotation), rotate(key, rotation), value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.shared)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


def _convolutions(config: CodecEncoderConfig) -> list[nn.Module]:
    """encoder.layers: names are positions in this list, activations included."""
    width, mode = config.num_filters, config.pad_mode
    layers: list[nn.Module] = [PaddedConv(config.audio_channels, width, config.kernel_size, mode=mode)]
    for ratio in reversed(config.upsampling_ratios):
        dilations = [config.dilation_growth_rate**index for index in range(config.num_residual_layers)]
        layers += [Residual(config, width, dilation) for dilation in dilations]
        layers += [nn.ELU(), PaddedConv(width, 2 * width, 2 * ratio, stride=ratio, mode=mode)]
        width *= 2
    return [*layers, nn.ELU(), PaddedConv(width, config.hidden_size, config.last_kernel_size, mode=mode)]


def _check(config: CodecConfig) -> None:
    sizes = config.encoder_config
    supported = {
        "audio_channels": sizes.audio_channels == 1,
        "hidden_act": sizes.hidden_act == "gelu",
        "attention_bias": not sizes.attention_bias,
        "use_causal_conv": sizes.use_causal_conv,
        "use_conv_shortcut": not sizes.use_conv_shortcut,
        "upsampling_ratios": math.prod(sizes.upsampling_ratios) * FRAME_STRIDE == config.encode_downsample_rate,
        "num_quantizers": sizes.num_quantizers >= config.encoder_valid_num_quantizers > sizes.num_semantic_quantizers,
        "vector_quantization_hidden_dimension": sizes.codebook_dim == sizes.vector_quantization_hidden_dimension,
    }
    for name, fine in supported.items():
        if not fine:
            raise CheckpointError(f"config.json: encoder_config.{name} = {getattr(sizes, name)!r} is not supported")
