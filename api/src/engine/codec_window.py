"""The codec's transformer layers, which attend to a window of positions, and the ring that keeps its keys and values.

Owns their arithmetic. The arena that a ring writes to is the caller's (codec.py).
Shapes: B slots of a step, T frames, Q query heads, K key-value heads, D head_dim, R rows of the ring.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec_convolutions import Tensors, linear, rows
from .config import CodecDecoderConfig
from .layers import Rotation, rotate


class WindowSizes(NamedTuple):
    """Of all layers."""

    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    window: int
    epsilon: float

    @classmethod
    def of(cls, config: CodecDecoderConfig) -> Self:
        """The checkpoint's."""
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*heads, config.intermediate_size, config.sliding_window, config.rms_norm_eps)


class WindowLayer(nn.Module):
    """A transformer layer over a window of positions; the products take in the norms' weights and the layer scales."""

    def __init__(self, weights: list[Tensor], sizes: WindowSizes) -> None:
        """weights [out, in]: of queries, keys and values together, of the output, of gate and up together, of down."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.epsilon = *sizes[:3], sizes.epsilon
        self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj = map(linear, weights)

    @classmethod
    def read(cls, tensors: Tensors, config: CodecDecoderConfig) -> Self:
        """The layer in `tensors`."""
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        attention, mlp = tensors / "self_attn", tensors / "mlp"
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        qkv = torch.cat([attention.get(f"{name}.weight", size, hidden) for name, size in sizes.items()])
        qkv = qkv * tensors.get("input_layernorm.weight", hidden)
        scale = tensors.get("self_attn_layer_scale.scale", hidden)
        output = attention.get("o_proj.weight", hidden, queries) * scale[:, None]
        gate_up = torch.cat([mlp.get(f"{name}.weight", inner, hidden) for name in ("gate_proj", "up_proj")])
        gate_up = gate_up * tensors.get("post_attention_layernorm.weight", hidden)
        scale = tensors.get("mlp_layer_scale.scale", hidden)
        down = mlp.get("down_proj.weight", hidden, inner) * scale[:, None]
        return cls([qkv, output, gate_up, down], WindowSizes.of(config))

    def weights(self) -> list[Tensor]:
        """As they were given."""
        return [part.weight for part in (self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj)]

    def forward(self, x: Tensor, rotation: Rotation, ring: Ring, layer: int) -> Tensor:
        """x [B, T, hidden] -> the same; rotation of its B * T positions."""
        x = x + self.attention(self.norm(x), rotation, ring, layer)
        gate, up = rows(self.gate_up_proj, self.norm(x)).chunk(2, dim=-1)
        return x + rows(self.down_proj, F.silu(gate) * up)

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.epsilon)

    def attention(self, x: Tensor, rotation: Rotation, ring: Ring, layer: int) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv_proj(x.flatten(0, 1)).view(batch * length, -1, self.head_dim)  # [B * T, Q + 2 K, D]
        turned = rotate(heads[:, : self.heads + self.kv_heads], rotation)
        query = turned[:, : self.heads].reshape(batch, length, self.heads, -1).transpose(1, 2)  # [B, Q, T, D]
        new = torch.stack((turned[:, self.heads :], heads[:, -self.kv_heads :]), 1)  # [B * T, 2, K, D]
        key, value = ring.exchange(layer, new.view(batch, length, *new.shape[1:]))  # [B, K, R, D] each
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=ring.mask, enable_gqa=self.heads != self.kv_heads
        )
        return rows(self.o_proj, out.transpose(1, 2).flatten(2))


class Ring:
    """One step's view of the keys and values of its slots: position p lies in row p modulo R."""

    def __init__(self, cache: Tensor, slots: Tensor, positions: Tensor, window: int) -> None:
        """cache [layers, slots, R, 2, K, D], slots [B], positions [B, T] of the rows to come; R >= window - 1 + T."""
        self.cache, self.slots = cache, slots
        length = cache.shape[2]
        self.rows = positions % length
        last = positions[:, -1:]
        held = last - (last - torch.arange(length, device=slots.device)) % length  # [B, R]: the position in each row
        age = positions[:, :, None] - held[:, None]  # [B, T, R]
        self.mask = ((age >= 0) & (age < window) & (held >= 0)[:, None]).unsqueeze(1)  # [B, 1, T, R]

    def exchange(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Store new [B, T, 2, K, D]; all keys and values of the slots, each [B, K, R, D]."""
        cache = self.cache[layer]
        cache[self.slots[:, None], self.rows] = new
        key, value = cache[self.slots].permute(2, 0, 3, 1, 4)
        return key, value


def rotation_at(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Of positions [N]; angles in float32 as in the official code."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = torch.outer(positions.float(), 1.0 / theta**exponents)[:, None]  # [N, 1, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))
