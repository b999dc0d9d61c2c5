"""A tiny checkpoint whose steps can be taken with and without graphs, for tests that compare the two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from api.src.engine.codec import CodecDecoder
from api.src.engine.device_steps import GraphedSteps, Steps
from api.src.engine.graphs import Capture
from api.src.engine.language_model import LanguageModel
from api.src.engine.prompt import PromptBuilder
from api.src.engine.sampling import Sampling
from api.src.engine.tokenizer import TextTokenizer
from tests.engine.checkpoints import tiny
from tests.engine.streams import Case

GREEDY = Sampling(do_sample=False, subtalker_dosample=False)
SLOTS = 3
POSITIONS = 128


class StepPair:
    """`plain` and `graphed` steps of one model, each with arenas of its own; all graphs are captured."""

    def __init__(
        self,
        kind: str,
        capture: Capture,
        sampling: Sampling,
        slots: int = SLOTS,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        positions: int = POSITIONS,
    ) -> None:
        folder = tiny(kind)
        self.model, codec = LanguageModel.load(folder, dtype, device), CodecDecoder.load(folder, device=device)
        self.builder = PromptBuilder(self.model.config, TextTokenizer(folder), self.model.talker)
        arenas: dict[str, Any] = {"slots": slots, "positions": positions, "text_rows": 64}
        self.plain = Steps(self.model, codec, **arenas)
        self.graphed = GraphedSteps(self.model, codec, **arenas, codec_frames=16, sampling=sampling, capture=capture)
        self.graphed.prepare()


def spoken_greedily(pair: StepPair, case: Case) -> np.ndarray:
    """The case's codes (T, C), by graphs, in the last slot."""
    slot = pair.graphed.slots.count - 2  # the very last one is spare
    pair.graphed.prefill([(slot, pair.builder.rows(case.prompt), GREEDY)])
    frames: list[torch.Tensor] = []
    while len(frames) < case.limit:
        [codes] = pair.graphed.frame([slot])
        if codes[0] == pair.model.eos:
            break
        frames.append(codes.cpu())
    pair.graphed.slots.leave(slot)
    return torch.stack(frames).numpy()
