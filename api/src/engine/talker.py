"""The talker: text and codec embeddings, the decoder stack, code 0's head, and the code predictor below it.

Owns weights and their arithmetic; names are the checkpoint's, below `talker.`.
Shapes: N rows, H hidden, C code groups.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import TalkerConfig
from .layers import DecoderLayer, Memory, RMSNorm, Rotation
from .linear import Linear
from .predictor import CodePredictor


class TalkerModel(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TextProjection(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.text_hidden_size, config.text_hidden_size, bias=True)
        self.linear_fc2 = Linear(config.text_hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(F.silu(self.linear_fc1(x)))
        return out


class Talker(nn.Module):
    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.model = TalkerModel(config)
        self.text_projection = TextProjection(config)
        self.codec_head = Linear(config.hidden_size, config.vocab_size)
        self.code_predictor = CodePredictor(config.code_predictor_config, config.hidden_size)

    def text(self, ids: Tensor) -> Tensor:
        """Text side of prompt rows: ids (N,) -> (N, H)."""
        out: Tensor = self.text_projection(self.model.text_embedding(ids).to(self.model.norm.weight))
        return out

    def codec(self, ids: Tensor) -> Tensor:
        """Codec side of one id: ids (N,) -> (N, H)."""
        out: Tensor = self.model.codec_embedding(ids)
        return out

    def frames(self, codes: Tensor) -> Tensor:
        """Codec side of whole frames: codes (N, C) -> (N, H)."""
        out: Tensor = self.codec(codes[:, 0]) + self.code_predictor.model.codec_embedding(codes[:, 1:])
        return out

    def forward(self, x: Tensor, rotation: Rotation, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """Input rows (N, H) -> the two parts of the sum (N, H) that the final norm is of."""
        delta: Tensor | None = None
        for layer in self.model.layers:
            x, delta = layer(x, delta, rotation, memory)
        return x, delta
