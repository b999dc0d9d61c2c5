"""The code predictor: codes 1 .. 15 of a frame from the talker's hidden state and code 0.

Owns its weights and the order of the passes; how one is computed is the caller's (passes.py), as are keys and values,
which are scratch, restarted each frame.
Shapes: B rows, H talker's hidden, h the predictor's, V codebook size, C code groups (16).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from .config import PredictorConfig
from .layers import DecoderLayer, RMSNorm, Rotation
from .linear import Linear
from .sampling import Rule, choose
from .slots import FrameMemory


class CodeTables(nn.Module):
    """The embedding tables of codes 1 .. C - 1 as one weight: (C - 1, V, H)."""

    def __init__(self, tables: int, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tables, size, width))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each table under its checkpoint name."""
        for number, table in enumerate(self.weight):
            yield f"codec_embedding.{number}.weight", table

    def forward(self, codes: Tensor) -> Tensor:
        """codes (N, C - 1) -> the sum of their embeddings (N, H)."""
        tables = torch.arange(self.weight.shape[0], device=codes.device)
        return self.weight[tables, codes].sum(dim=1)


class PredictorModel(nn.Module):
    def __init__(self, config: PredictorConfig, talker_width: int) -> None:
        super().__init__()
        self.codec_embedding = CodeTables(config.num_code_groups - 1, config.vocab_size, talker_width)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class PredictorPass(Protocol):
    """The layers and a head, for the passes of one frame in their order."""

    def __call__(self, group: int, x: Tensor) -> Tensor:
        """x (B * T, h), T new positions of each row, two in pass 0 and then one -> logits (B, V) of code group + 1."""
        ...


class CodePredictor(nn.Module):
    """talker.code_predictor of the checkpoint. Call `fold` after loading."""

    def __init__(self, config: PredictorConfig, talker_width: int) -> None:
        super().__init__()
        self.model = PredictorModel(config, talker_width)
        groups = range(config.num_code_groups - 1)
        self.lm_head = nn.ModuleList(Linear(config.hidden_size, config.vocab_size) for _ in groups)
        same = config.hidden_size == talker_width
        self.small_to_mtp_projection = None if same else Linear(talker_width, config.hidden_size, bias=True)
        self.tables: list[Tensor] = []
        """Per pass after the talker's hidden state, what a code becomes as input: (V, h)."""

    def fold(self, first: Tensor) -> None:
        """Project the embedding tables once: first (V0, H) is the talker's own, for code 0."""
        project = self.small_to_mtp_projection or nn.Identity()
        # the last table's codes are never an input here
        self.tables = [project(table) for table in (first, *self.model.codec_embedding.weight[:-1])]

    def forward(
        self, hidden: Tensor, first: Tensor, run: PredictorPass, rule: Rule, uniform: Tensor, width: int
    ) -> Tensor:
        """hidden (B, H), first (B,), uniform (B, C - 1) -> codes 1 .. C - 1: (B, C - 1). `run`: of this frame."""
        project = self.small_to_mtp_projection or nn.Identity()
        x = torch.stack((project(hidden), self.tables[0][first]), dim=1).flatten(0, 1)  # (2 B, h)
        codes: list[Tensor] = []
        for group in range(len(self.lm_head)):
            logits = run(group, x)  # (B, V)
            codes.append(choose(logits.float(), rule, uniform[:, group], width))
            if group + 1 < len(self.lm_head):
                x = self.tables[group + 1][codes[-1]]  # (B, h)
        return torch.stack(codes, dim=1)


class LayerPass:
    """Implements PredictorPass layer by layer. rotation: the table of C positions; `memory`: of this frame."""

    def __init__(self, predictor: CodePredictor, rotation: Rotation, memory: FrameMemory) -> None:
        self._predictor, self._rotation, self._memory = predictor, rotation, memory

    def __call__(self, group: int, x: Tensor) -> Tensor:
        """As PredictorPass."""
        rows, fresh = self._memory.rows, x.shape[0] // self._memory.rows
        if group == 0:
            turn = self._rotation.at(torch.arange(fresh, device=x.device).repeat(rows))
        else:
            turn = Rotation(*(table[group + 1] for table in self._rotation))
        delta: Tensor | None = None
        for layer in self._predictor.model.layers:
            x, delta = layer(x, delta, turn, self._memory)
        self._memory.advance(fresh)
        _, normed = self._predictor.model.norm.add(_last(x, rows), None if delta is None else _last(delta, rows))
        logits: Tensor = self._predictor.lm_head[group](normed)
        return logits


def _last(x: Tensor, rows: int) -> Tensor:
    """Of each row its last position: x (B * T, h) -> (B, h)."""
    return x.view(rows, -1, x.shape[-1])[:, -1]
