"""Fused kernels on a GPU: beside torch's operations one by one, and as whole speech by graphs. Skipped without one.

`make test ARGS="tests/gpu -s"` also prints how far bfloat16 speech agrees with torch's operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from api.src.engine import kernels
from api.src.engine.config import PredictorConfig, TalkerConfig
from api.src.engine.graphs import CudaCapture
from api.src.engine.kernels import FUSED, PLAIN, Way
from api.src.engine.prompt import Prompt
from tests.engine.kernel_cases import (  # noqa: F401  what pytest finds here runs on the GPU
    interpreted,
    test_a_frame_s_attention,
    test_a_row_is_the_same_bits_in_any_company,
    test_a_step_s_attention,
    test_add_and_norm,
    test_every_length,
    test_swiglu,
    test_the_check_finds_faults,
    test_the_check_passes,
)
from tests.engine.step_pairs import GREEDY, StepPair

SLOTS = 5
FRAMES = 24
TEXTS = ("Hello world.", "One two three four.", "She said she would be here by noon.", "Yes.", "No.")
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
REAL = TalkerConfig(
    3072,
    2048,
    6144,
    28,
    **HEADS,
    num_code_groups=16,
    code_predictor_config=PredictorConfig(num_code_groups=16),
    text_vocab_size=8,
)


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> Iterator[None]:
    """float32 products of 24 bits, not of TF32's 11."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def pair(dtype: torch.dtype) -> StepPair:
    return StepPair("custom_voice", CudaCapture(), GREEDY, SLOTS, "cuda", dtype)


def speak(steps: StepPair, way: Way) -> Tensor:
    """Greedy codes (SLOTS, FRAMES, C) as they come, without graphs."""
    steps.model.use(way)
    prompts = [steps.builder.rows(Prompt(text, "english", "Vivian")) for text in TEXTS]
    steps.plain.prefill([(slot, prompt, GREEDY) for slot, prompt in enumerate(prompts)])
    made = torch.stack([steps.plain.frame(list(range(SLOTS))) for _ in range(FRAMES)], dim=1)
    for slot in range(SLOTS):
        steps.plain.slots.leave(slot)
    return made.cpu()


def graphed(steps: StepPair) -> Tensor:
    """The same by graphs, which were captured with the way that the model had chosen."""
    prompts = [steps.builder.rows(Prompt(text, "english", "Vivian")) for text in TEXTS]
    steps.graphed.prefill([(slot, prompt, GREEDY) for slot, prompt in enumerate(prompts)])
    made = torch.stack([steps.graphed.frame(list(range(SLOTS))) for _ in range(FRAMES)], dim=1)
    for slot in range(SLOTS):
        steps.graphed.slots.leave(slot)
    return made.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_check_passes_in_real_shapes(dtype: torch.dtype) -> None:
    kernels.check(REAL, torch.empty(0, dtype=dtype, device="cuda"))
    kernels.check(replace(REAL, hidden_size=1024, intermediate_size=3072), torch.empty(0, dtype=dtype, device="cuda"))


def test_greedy_codes_are_torch_s_and_graphs_replay_them() -> None:
    steps = pair(torch.float32)
    assert steps.model.way is FUSED
    replayed = graphed(steps)
    assert torch.equal(replayed, speak(steps, FUSED))
    assert torch.equal(replayed, speak(steps, PLAIN))
    assert steps.graphed.missed == 0


def test_bfloat16_codes_are_repeated_and_their_agreement_is_reported() -> None:
    steps = pair(torch.bfloat16)
    replayed = graphed(steps)
    assert torch.equal(replayed, graphed(steps))
    agreeing = (speak(steps, PLAIN) == replayed).all(2).float().cumprod(1).mean()
    print(f"bfloat16, kernels against torch's operations: the first {100 * agreeing:.0f} % of the frames agree")
