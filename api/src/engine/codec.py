"""The codec's decoder: codes to samples, as a stream of any number of slots at once.

Owns the loading of the decoder's weights, the state of the slots and the order of a step. The state is a true one
(tails of the convolutions, keys and values of the window, position): any division of the same codes into steps gives
the waveform of one full decode. Does not own what makes the codes, nor who sits in which slot.
Facts of the arithmetic: qwen-tts 0.1.1, tokenizer_12hz. Neighbouring linear maps of the checkpoint are folded at load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import codec_check
from .codec_convolutions import (
    CausalConv,
    ImageKernel,
    MatrixKernel,
    Stage,
    TailLayout,
    Tensors,
    read_conv,
    upsampling_kernel,
    weight,
)
from .codec_kernel import CodecKernel
from .codec_layers import DecoderBlock, Output, ResidualUnit, Upsample
from .codec_parts import NativeBooks, NativeLayers, Tails
from .codec_window import Ring, WindowLayer, WindowSizes, rotation_at
from .config import CodecConfig, CodecDecoderConfig
from .errors import CheckpointError
from .linear import Linear, settle
from .native.pool import Pool
from .weights import Checkpoint

STEP_FRAMES = 25
"""The most frames that are taken at once, so that memory is bounded; longer input becomes several steps."""
RENDER_FRAMES = 4
"""On a CPU the late stages, of large activations and small weights, take so many frames at once, for its caches."""


@dataclass(frozen=True)
class SlotState:
    """A copy of one slot's state, for any slot of any CodecState of the same decoder."""

    tails: Tensor
    cache: Tensor
    position: Tensor


class CodecState:
    """The arenas with the state of `count` slots, allocated once. New slots are at the beginning of a stream."""

    def __init__(self, decoder: CodecDecoder, count: int) -> None:
        config, like = decoder.config, decoder.codebooks
        ring = config.sliding_window - 1 + STEP_FRAMES
        self.tails = like.new_zeros(count, decoder.layout.size)
        self.cache = like.new_zeros(
            config.num_hidden_layers, count, ring, 2, config.num_key_value_heads, config.head_dim
        )
        self.positions = torch.zeros(count, dtype=torch.long, device=like.device)

    @torch.inference_mode()
    def reset(self, slots: int | Tensor) -> None:
        """Put one slot, or those of a tensor [B], at the beginning of a stream; nothing of the former one is kept."""
        self.tails[slots] = 0
        self.cache[:, slots] = 0
        self.positions[slots] = 0

    @torch.inference_mode()
    def read(self, slot: int) -> SlotState:
        """A copy of the slot's state, such as after prime(), which need not be repeated then."""
        return SlotState(self.tails[slot].clone(), self.cache[:, slot].clone(), self.positions[slot].clone())

    @torch.inference_mode()
    def write(self, slot: int, state: SlotState) -> None:
        self.tails[slot], self.cache[:, slot], self.positions[slot] = state.tails, state.cache, state.position

    @property
    def nbytes(self) -> int:
        return self.tails.nbytes + self.cache.nbytes + self.positions.nbytes


class CodecDecoder(nn.Module):
    """decoder.* of speech_tokenizer/. Holds weights only; what it continues from is a CodecState's."""

    def __init__(self, config: CodecDecoderConfig, tensors: Tensors) -> None:
        """Raises CheckpointError: a tensor that is missing or misshapen, a shape that the arithmetic does not serve."""
        super().__init__()
        _check(config)
        self.config, self.layout = config, TailLayout()
        self.codebooks = weight(_codebooks(config, tensors / "quantizer"))  # [groups, size, dim]
        self.input = CausalConv(self.layout, *_input(config, tensors))
        layers = tensors / "pre_transformer" / "layers"
        self.layers = nn.ModuleList(WindowLayer.read(layers / str(i), config) for i in range(config.num_hidden_layers))
        stages = _stages(config, tensors, self.layout)
        self.stages, self.needs = nn.ModuleList(stages), _needs(stages)
        self.early = len(config.upsampling_ratios) + 2
        self.frame_rows = math.prod(config.upsampling_ratios) * config.upsample_rates[0]
        self.frame_samples = math.prod(config.upsampling_ratios) * math.prod(config.upsample_rates)
        self.native: CodecKernel | None = None
        self.native_layers: NativeLayers | None = None
        self.native_books: NativeBooks | None = None
        self.in_c = False
        """Whether all of it is."""

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        narrow: bool = False,
        pool: Pool | None = None,
    ) -> Self:
        """The decoder of the checkpoint in `folder`, which holds speech_tokenizer/ or is that folder.

        `narrow`: the products of many channels, most of its work, are in bf16 on a CPU; what is small in weights and
        near the sound stays. On random weights that costs 10 dB less than all in bf16, as the official package has it.
        `pool`: on a CPU, threads of the C code to share.

        Raises:
            CheckpointError: whatever makes the checkpoint unusable.
        """
        folder = folder / "speech_tokenizer" if (folder / "speech_tokenizer").is_dir() else folder
        config = CodecConfig.read(folder)
        with Checkpoint(folder) as checkpoint:
            tensors = Tensors(checkpoint, "decoder.")
            decoder = cls(config.decoder_config, tensors)
            if unused := [name for name in tensors.unused() if not name.endswith(".input_proj.weight")]:
                raise CheckpointError(f"{folder} has unexpected tensors: {', '.join(unused[:3])}")
        decoder = decoder.to(device, dtype).eval()
        if dtype == torch.float32 and torch.device(device).type == "cpu" and (native := codec_check.load(pool=pool)):
            decoder.adopt(native, narrow=narrow)
        if narrow:
            decoder.narrow()
        if dtype != torch.float64:
            settle(decoder)
        return decoder

    def adopt(self, native: CodecKernel, *, narrow: bool = False) -> None:
        """Have all that it serves in C: in float32 on a CPU, before `settle`. `narrow`: see load."""
        self.native, sizes = native, WindowSizes.of(self.config)
        self.input.adopt(native, narrow=narrow)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.adopt(native, narrow=narrow)
        if native.serves(self.config.hidden_size, sizes.head_dim, sizes.inner):
            weights = [layer.weights() for layer in self.layers if isinstance(layer, WindowLayer)]
            self.native_layers = NativeLayers(native, weights, sizes)
            self.layers = nn.ModuleList()
        if native.serves(self.codebooks.shape[2]):
            self.native_books = NativeBooks(native, self.codebooks, self.config.num_semantic_quantizers)
        torchs = (MatrixKernel, ImageKernel, Linear, WindowLayer)
        self.in_c = self.native_books is not None and not any(isinstance(part, torchs) for part in self.modules())

    def narrow(self) -> None:
        """Have wide products that are torch's in bf16, before `settle`; see load."""
        for part in self.modules():
            if isinstance(part, MatrixKernel | ResidualUnit):
                part.narrow()

    def close(self) -> None:
        """End the C code's threads, if it has any; the next step starts them again."""
        if self.native is not None:
            self.native.close()

    @torch.inference_mode()
    def decode(self, codes: Tensor, slots: Tensor, state: CodecState) -> Tensor:
        """Continue the streams in `slots`, which may stand at different positions.

        codes [B, T, groups] of any T, slots [B] without repetition, both on the state's device.
        Returns the samples [B, T * frame_samples] within -1 and 1, in float32 (in float64 if the weights are).
        """
        if not 0 < codes.shape[1] <= STEP_FRAMES:
            none = self.codebooks.new_empty(codes.shape[0], 0)
            steps = [self.decode(step, slots, state) for step in torch.split(codes, STEP_FRAMES, 1) if step.shape[1]]
            return torch.cat((none, *steps), 1)
        samples = self._step(codes, slots, state)
        return samples.to(torch.promote_types(samples.dtype, torch.float32))

    @torch.inference_mode()
    def prime(self, codes: Tensor, slots: Tensor, state: CodecState) -> None:
        """Put the streams in `slots` where decode() of the same codes would, without making their sound.

        All codes [B, T, groups] pass through the transformer; of what follows only the rows that the state depends on.
        """
        hidden = self.codebooks.new_empty(codes.shape[0], 0, self.config.hidden_size)
        with self._tails(slots, state) as tails:
            for step in torch.split(codes, STEP_FRAMES, 1):
                if step.shape[1]:
                    hidden = torch.cat((hidden, self._transform(step, tails, slots, state)), 1)[:, -self.needs[0] :]
            for stage, need in zip(self.stages, self.needs, strict=True):
                if hidden.shape[1]:
                    hidden = stage(hidden[:, -need:].contiguous(), tails)

    def decode_full(self, codes: Tensor) -> Tensor:
        """codes [B, T, groups] -> samples [B, T * frame_samples]: whole streams from their beginning."""
        slots = torch.arange(codes.shape[0], device=codes.device)
        return self.decode(codes, slots, CodecState(self, codes.shape[0]))

    def _step(self, codes: Tensor, slots: Tensor, state: CodecState) -> Tensor:
        with self._tails(slots, state) as tails:
            x = self._transform(codes, tails, slots, state)
            for stage in self.stages[: self.early]:
                x = stage(x, tails)
            # [B, T * frame_rows, channels]
            rows = RENDER_FRAMES * self.frame_rows if x.device.type == "cpu" else x.shape[1]
            samples = x.new_empty(x.shape[0], codes.shape[1] * self.frame_samples)
            parts = torch.split(samples, rows * self.frame_samples // self.frame_rows, 1)
            for part, out in zip(torch.split(x, rows, 1), parts, strict=True):
                self._render(part, tails, out)
        return samples

    @contextmanager
    def _tails(self, slots: Tensor, state: CodecState) -> Iterator[Tails]:
        """Those of `slots`: where they lie, or, for torch's operations, a copy that is put back."""
        if self.in_c:
            yield Tails(state.tails, slots)
            return
        copy = Tails.alone(state.tails[slots])
        yield copy
        state.tails[slots] = copy.memory

    def _look_up(self, codes: Tensor) -> Tensor:
        """codes [B, T, groups] -> the sums of their vectors [B, T, codebook_dim]."""
        if self.native_books is not None:
            return self.native_books.run(codes)
        groups = torch.arange(codes.shape[2], device=codes.device)
        vectors = self.codebooks[groups, codes]  # [B, T, groups, dim]
        semantic = self.config.num_semantic_quantizers
        return torch.cat((vectors[:, :, :semantic].sum(2), vectors[:, :, semantic:].sum(2)), 2)

    def _transform(self, codes: Tensor, tails: Tails, slots: Tensor, state: CodecState) -> Tensor:
        """codes [B, T, groups] -> [B, T, hidden]; advances positions and the window of keys and values."""
        x = self.input(self._look_up(codes), tails)
        positions = state.positions[slots][:, None] + torch.arange(codes.shape[1], device=codes.device)  # [B, T]
        state.positions[slots] = positions[:, -1] + 1
        rotation = rotation_at(positions.flatten(), self.config.head_dim, self.config.rope_theta, x.dtype)
        if self.native_layers is not None:
            return self.native_layers.run(x, slots, positions, rotation, state.cache)
        ring = Ring(state.cache, slots, positions, self.config.sliding_window)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, ring, index)
        return F.rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps)

    def _render(self, x: Tensor, tails: Tails, out: Tensor) -> None:
        """x [B, T * frame_rows, channels] -> out [B, T * frame_samples]."""
        for stage in self.stages[self.early : -1]:
            x = stage(x, tails)
        last = self.stages[-1]
        assert isinstance(last, Output)
        last.render(x, tails, out)


def reference_cut(reference_frames: int, frames: int, samples: int) -> int:
    """How many first samples of a clone's waveform, decoded behind its reference, the official package cuts off.

    frames: both together. Its quotient in floating point may leave one sample of the reference.
    """
    return int(reference_frames / max(frames, 1) * samples)


def _check(config: CodecDecoderConfig) -> None:
    supported = {
        "hidden_act": config.hidden_act == "silu",
        "attention_bias": not config.attention_bias,
        "codebook_dim": config.codebook_dim % 2 == 0,
        "num_key_value_heads": config.num_attention_heads % config.num_key_value_heads == 0,
        "num_quantizers": config.num_quantizers > config.num_semantic_quantizers,
        "upsampling_ratios": len(config.upsampling_ratios) > 0,
        "upsample_rates": len(config.upsample_rates) > 0,
    }
    for name, fine in supported.items():
        if not fine:
            raise CheckpointError(f"config.json: decoder_config.{name} = {getattr(config, name)!r} is not supported")


def _codebooks(config: CodecDecoderConfig, tensors: Tensors) -> Tensor:
    """[groups, codebook_size, codebook_dim / 2]: each cluster's mean."""
    size, semantic = config.codebook_size, config.num_semantic_quantizers
    means = []
    for group in range(config.num_quantizers):
        part, index = ("rvq_first", group) if group < semantic else ("rvq_rest", group - semantic)
        book = tensors / f"{part}.vq.layers.{index}._codebook"
        usage = book.get("cluster_usage", size).clamp(min=1e-5)
        means.append(book.get("embedding_sum", size, config.codebook_dim // 2) / usage[:, None])
    return torch.stack(means)


def _input(config: CodecDecoderConfig, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Kernel [hidden, codebook_dim, 3] and bias: quantizer projections, pre_conv and the transformer's input_proj."""
    dim, latent, hidden = config.codebook_dim, config.latent_dim, config.hidden_size
    names = ("rvq_first", "rvq_rest")
    parts = [tensors.get(f"quantizer.{name}.output_proj.weight", dim, dim // 2, 1).squeeze(2) for name in names]
    matrix = tensors.get("pre_transformer.input_proj.weight", hidden, latent).double()
    kernel = tensors.get("pre_conv.conv.weight", latent, dim, 3).double()
    bias = matrix @ tensors.get("pre_conv.conv.bias", latent).double()
    folded = torch.einsum("hl,lcj,cd->hdj", matrix, kernel, torch.cat(parts, 1).double())
    return folded, bias + tensors.get("pre_transformer.input_proj.bias", hidden)


def _upsampling(config: CodecDecoderConfig, tensors: Tensors, index: int, factor: int) -> tuple[Tensor, Tensor]:
    """Kernel [factor * latent, in, 1] and bias; the first takes in the transformer's norm weight and output_proj."""
    latent, hidden = config.latent_dim, config.hidden_size
    conv = tensors / f"upsample.{index}.0.conv"
    kernel = upsampling_kernel(conv.get("weight", latent, latent, factor), factor)
    bias = conv.get("bias", latent).repeat(factor)
    if index:
        return kernel, bias
    matrix, last = kernel.squeeze(2).double(), tensors / "pre_transformer"
    projection = last.get("output_proj.weight", latent, hidden) * last.get("norm.weight", hidden)
    return (matrix @ projection.double()).unsqueeze(2), bias + matrix @ last.get("output_proj.bias", latent).double()


def _stages(config: CodecDecoderConfig, tensors: Tensors, layout: TailLayout) -> list[Stage]:
    """All that follows the transformer, in order."""
    stages: list[Stage] = [
        Upsample(layout, *_upsampling(config, tensors, index, factor), factor, tensors / f"upsample.{index}.1")
        for index, factor in enumerate(config.upsampling_ratios)
    ]
    width, decoder = config.decoder_dim, tensors / "decoder"
    stages.append(read_conv(decoder / "0.conv", layout, (width, config.latent_dim, 7)))
    for index, rate in enumerate(config.upsample_rates, 1):
        stages.append(DecoderBlock(decoder / f"{index}.block", layout, (width, width // 2), rate))
        width //= 2
    count = len(config.upsample_rates)
    stages.append(Output(decoder / str(count + 1), decoder / f"{count + 2}.conv", layout, width))
    return stages


def _needs(stages: list[Stage]) -> list[int]:
    """For each stage, how many last rows of its input decide its and all later stages' state."""
    needs = [0]
    for stage in reversed(stages):
        needs.append(stage.need(needs[-1]))
    return needs[:0:-1]
