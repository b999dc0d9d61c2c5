"""Whether the kernel's choices and whole frames are those of torch's operations; see check.py.

Owns the comparison: codes by random logits, and frames of a small random model with a projection between its parts.
What rounding may decide are single codes, so one may differ where hundreds are compared.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig, PredictorConfig, TalkerConfig
from ..language_model import SPECIAL_CODES, LanguageModel
from ..layers import RMSNorm
from ..prompt import PromptRows
from ..sampling import Rule, Sampling, choose, width
from ..talker import Talker
from ..weights import empty
from .library import NoKernel
from .products import Native

_RULES = ((False, 1.0, 50, 1.0), (True, 0.9, 50, 1.0), (True, 0.7, 0, 0.8), (True, 1.3, 7, 0.5), (True, 1.0, 0, 1.0))
"""do_sample, temperature, top_k, top_p."""
_DRAWS = 40
_STREAMS = (
    Sampling(seed=1, min_new_tokens=9),
    Sampling(seed=2, temperature=1.4, top_k=0, top_p=0.7, subtalker_top_k=5),
    Sampling(do_sample=False, subtalker_dosample=False, repetition_penalty=1.5),
)
_FRAMES = 3
_PREDICTOR = PredictorConfig(70, 24, 40, 2, 4, 2, 16, num_code_groups=4)
_TALKER = TalkerConfig(
    SPECIAL_CODES + 70, 40, 56, 2, 4, 2, 24, 4, 1e-6, code_predictor_config=_PREDICTOR, text_vocab_size=1,
    text_hidden_size=1, codec_eos_token_id=SPECIAL_CODES,
)  # fmt: skip
"""No size is a multiple of the kernel's blocks."""


def check_choices(native: Native) -> None:
    """Compare choices with sampling.py's.

    Raises:
        NoKernel: they are others.
    """
    wrong, random = 0, torch.Generator().manual_seed(0)
    for size in (1, 75, 300):
        scratch = torch.empty(native.library.scratch_to_choose(size), dtype=torch.uint8, device="cpu")
        for sampled, temperature, top_k, top_p in _RULES:
            logits = 3 * torch.randn(_DRAWS, size, generator=random, device="cpu")
            uniform = torch.rand(_DRAWS, generator=random, device="cpu")
            values = (sampled, temperature, top_k, top_p)
            rule = Rule(*(torch.full((_DRAWS,), value, device="cpu") for value in values))
            expected = choose(logits, rule, uniform, width(sampled, top_k, size))
            for row, number, code in zip(logits, uniform.tolist(), expected.tolist(), strict=True):
                found = native.library.choose_one(row.data_ptr(), size, *values, number, scratch.data_ptr())
                wrong += found != code
    if wrong > 1:
        raise NoKernel(f"{wrong} of the kernel's choices are others than torch's")


def check_frames(native: Native) -> None:
    """Compare whole frames with frames by single passes, which check.py compares with torch.

    Raises:
        NoKernel: their codes, or what they leave to the next frame, are others.
    """
    model = LanguageModel(ModelConfig(_TALKER, "custom_voice", "0b6"), _talker(), kernels=False, native=native)
    if model.whole_frame is None:
        raise NoKernel("the kernel does not take a model in bf16 as a whole")
    found = _frames(model)
    model.whole_frame = None
    expected = _frames(model)
    for ours, theirs in zip(found, expected, strict=True):
        if ours.dtype == torch.float32:
            alike = (ours - theirs).norm(dim=1) < 1e-4 * theirs.norm(dim=1)
        else:
            alike = (ours == theirs).flatten(1).all(dim=1)
        if int(alike.sum()) < len(_STREAMS) - 1:
            raise NoKernel("the kernel's whole frames are others than those by single passes")


def _frames(model: LanguageModel) -> tuple[Tensor, ...]:
    """Of each stream: codes, its next input, the codes that it has used, and its counters."""
    order = [2, 0, 1]
    slots = model.new_slots(len(order), 16, 2)
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(len(order), 6, _TALKER.hidden_size, generator=random, device="cpu")
    prompts = [PromptRows(x[: 3 + slot], x[4 : 4 + slot], x[5]) for slot, x in enumerate(rows)]
    model.prefill(slots, list(zip(order, prompts, _STREAMS, strict=True)))
    codes = torch.stack([model.frame_step(slots, order) for _ in range(_FRAMES)], dim=1)
    return codes, slots.next_input[order], slots.seen[order], slots.progress[order]


def _talker() -> Talker:
    talker = empty(lambda: Talker(_TALKER), torch.float32)
    random = torch.Generator().manual_seed(2)
    for part in talker.modules():
        for weight in part.parameters(recurse=False):
            drawn = torch.randn(weight.shape, generator=random, device="cpu") / 4
            weight.copy_((1 + drawn if isinstance(part, RMSNorm) else drawn).bfloat16())
    return talker
