"""The parts of a Qwen3-style decoder: norms, rotary positions, attention, one layer.

Owns arithmetic and weights only. What a layer attends to is the caller's: a `Memory` writes the new keys and values and
answers with the attention's output, so that no module holds state.
Shapes: N rows (tokens or slots), H hidden, Q query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TransformerConfig
from .linear import Linear, PackedLinear


class Rotation(NamedTuple):
    """cos and sin of N positions, each (N, 1, D); the first half of sin is negated."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> Rotation:
        """Of a table: positions (N,)."""
        return Rotation(self.cos[positions], self.sin[positions])


class Memory(Protocol):
    """Keys and values of earlier positions."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store key and value (N, K, D); attention output (N, Q * D) of query (N, Q, D)."""
        ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        sizes = [heads * config.head_dim for heads in self.heads]
        self.qkv_proj = PackedLinear(config.hidden_size, dict(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)))
        self.o_proj = Linear(sizes[0], config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, memory: Memory) -> Tensor:
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)  # (N, Q + 2 K, D)
        query, key, value = torch.split(heads, self.heads, dim=1)
        query = rotate(self.q_norm(query), rotation)
        key = rotate(self.k_norm(key), rotation)
        out: Tensor = self.o_proj(memory.attend(self.layer, query, key, value))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = PackedLinear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, memory: Memory) -> Tensor:
        """x (N, H) -> (N, H)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, memory)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def rotations(config: TransformerConfig, positions: int, like: Tensor) -> Rotation:
    """The table of positions 0 .. positions - 1, each (positions, 1, D), computed in fp32, then in `like`'s dtype.

    The talker's mrope has three rows of equal positions, which is this plain rotation.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(positions).float(), 1.0 / config.rope_theta**exponents)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), dim=-1).to(like), torch.cat((-sin, sin), dim=-1).to(like))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (N, heads, D) at the rotation's positions."""
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, dims=-1), rotation.sin)
