"""The parts of a Qwen3-style decoder: norms, rotary positions, attention, one layer.

Owns arithmetic and weights only. What a layer attends to is the caller's: a `Memory` writes the new keys and values and
answers with the attention's output, so that no module holds state. What is no product of matrices may be done by fused
kernels: `Arithmetic` and `Memory` are where they come in (kernels.py), and torch's own operations are the default.
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


class Heads(NamedTuple):
    """A layer's queries, keys and values as projected: packed (N, Q + 2 K, D), without norm and rotation."""

    packed: Tensor
    counts: list[int]
    """Q, K, K."""
    q_norm: RMSNorm
    k_norm: RMSNorm
    rotation: Rotation

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query (N, Q, D), key and value (N, K, D), as they attend and are stored."""
        query, key, value = torch.split(self.packed, self.counts, dim=1)
        return rotate(self.q_norm(query), self.rotation), rotate(self.k_norm(key), self.rotation), value


class Memory:
    """Keys and values of earlier positions."""

    def attend_heads(self, layer: int, heads: Heads) -> Tensor:
        """Store the heads' keys and values; attention output (N, Q * D) of their queries."""
        return self.attend(layer, *heads.turned())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same with key and value (N, K, D) and query (N, Q, D) that are normed and rotated."""
        raise NotImplementedError


class Arithmetic(Protocol):
    """A layer's work between its products of matrices."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """x (N, H), delta (N, H) or nothing -> x + delta, and its RMSNorm by weight (H,)."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up (N, 2 I) -> silu(gate) * up (N, I)."""
        ...


class TorchArithmetic:
    """Implements Arithmetic, an operation at a time."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """As Arithmetic."""
        x = x if delta is None else x + delta
        return x, F.rms_norm(x, weight.shape, weight, epsilon)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """As Arithmetic."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class RMSNorm(nn.Module):
    arithmetic: Arithmetic = TorchArithmetic()

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + delta (N, H), and its norm."""
        return self.arithmetic.add_norm(x, delta, self.weight, self.epsilon)


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
        attended = memory.attend_heads(self.layer, Heads(heads, self.heads, self.q_norm, self.k_norm, rotation))
        out: Tensor = self.o_proj(attended)
        return out


class MLP(nn.Module):
    """SwiGLU."""

    arithmetic: Arithmetic = TorchArithmetic()

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = PackedLinear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.arithmetic.swiglu(self.gate_up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, delta: Tensor | None, rotation: Rotation, memory: Memory) -> tuple[Tensor, Tensor]:
        """x + delta (N, H) -> the two parts of the layer's sum: it is made together with the norm that comes next."""
        x, normed = self.input_layernorm.add(x, delta)
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(normed, rotation, memory))
        return x, self.mlp(normed)


def use(module: nn.Module, arithmetic: Arithmetic) -> None:
    """Have all of `module` calculate by `arithmetic`."""
    for part in module.modules():
        if isinstance(part, RMSNorm | MLP):
            part.arithmetic = arithmetic


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
