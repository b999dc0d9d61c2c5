"""The engine on a GPU, by CUDA graphs: the same speech as on the CPU and as without graphs. Skipped without one.

`make test ARGS="tests/gpu -s"` also prints how far bfloat16 agrees with itself across batch sizes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from threading import Event

import numpy as np
import pytest
import torch
from torch import Tensor

from api.src.engine.codec import CodecDecoder
from api.src.engine.graphs import CudaCapture
from api.src.engine.loading import SpeechModel, load_model
from api.src.engine.messages import Delivery
from api.src.engine.prompt import Prompt
from api.src.engine.sampling import Sampling
from tests.engine.checkpoints import tiny
from tests.engine.step_pairs import GREEDY, StepPair, spoken_greedily
from tests.engine.streams import cases

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

SLOTS = 8
FRAMES = 24
TEXTS = ("Hello world.", "One two three four.", "She said she would be here by noon.", "Yes.")


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> Iterator[None]:
    """float32 products of 24 bits, not of TF32's 11."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture(scope="module")
def greedy() -> dict[str, StepPair]:
    kinds = ("custom_voice", "voice_design", "base")
    return {kind: StepPair(kind, CudaCapture(torch.device("cuda")), GREEDY, SLOTS, "cuda") for kind in kinds}


@pytest.fixture(scope="module")
def sampled() -> StepPair:
    return StepPair("custom_voice", CudaCapture(torch.device("cuda")), Sampling(), SLOTS, "cuda")


def speak(pair: StepPair, seeds: dict[int, int]) -> dict[int, Tensor]:
    """Codes (FRAMES, C) by slot, all slots at once: slot -> seed, which chooses the text too."""
    entries = [
        (slot, pair.builder.rows(Prompt(TEXTS[seed % len(TEXTS)], "english", "Vivian")), Sampling(seed=seed))
        for slot, seed in seeds.items()
    ]
    pair.graphed.prefill(entries)
    made = torch.stack([pair.graphed.frame(list(seeds)) for _ in range(FRAMES)], dim=1)
    for slot in seeds:
        pair.graphed.slots.leave(slot)
    return dict(zip(seeds, made.cpu(), strict=True))


@pytest.mark.parametrize("name", list(cases()))
def test_golden_cases(greedy: dict[str, StepPair], name: str) -> None:
    case = cases()[name]
    if case.checkpoint not in greedy:
        pytest.skip("a variant, which is compared on the CPU")
    pair = greedy[case.checkpoint]
    assert np.array_equal(spoken_greedily(pair, case), case.codes)
    assert pair.graphed.missed == 0


def test_the_same_seed_gives_the_same_codes_in_every_company(sampled: StepPair) -> None:
    together = speak(sampled, {slot: slot for slot in range(SLOTS)})
    for company in ([0], [3, 1], [7, 2, 5], [6, 4, 0, 1, 2]):
        some = speak(sampled, {slot: slot for slot in company})
        for slot in company:
            assert torch.equal(some[slot], together[slot]), (company, slot)
    assert sampled.graphed.missed == 0


def test_bfloat16_is_itself_within_a_batch_size_and_reports_the_rest() -> None:
    pair = StepPair("custom_voice", CudaCapture(torch.device("cuda")), Sampling(), SLOTS, "cuda", torch.bfloat16)
    one, again = (speak(pair, {slot: slot for slot in range(SLOTS)}) for _ in range(2))
    assert all(torch.equal(one[slot], again[slot]) for slot in one)
    shifted = speak(pair, {slot: (slot + 3) % SLOTS for slot in range(SLOTS)})
    assert all(torch.equal(shifted[slot], one[(slot + 3) % SLOTS]) for slot in one)
    alone = [speak(pair, {0: seed})[0] for seed in range(SLOTS)]
    agreeing = [float((codes == one[seed]).all(1).float().cumprod(0).mean()) for seed, codes in enumerate(alone)]
    print(f"bfloat16, alone against among eight: the first {100 * np.mean(agreeing):.0f} % of the frames agree")


@pytest.mark.parametrize("chunks", [(1,) * 40, (8,) * 5, (5, 8, 3, 7, 6, 4, 7)])
def test_sound_is_the_cpu_s(sampled: StepPair, chunks: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2048, (2, sum(chunks), 16), generator=torch.Generator().manual_seed(1))
    expected = CodecDecoder.load(tiny("custom_voice")).decode_full(codes)
    steps = sampled.graphed
    for slot in (1, 6):
        steps.sounds.reset(slot)
    pieces = []
    for piece in torch.split(codes, list(chunks), 1):
        if piece.shape[1] == 1:  # as first chunks go
            steps.beside.mark()
            with steps.beside.work():
                pieces.append(steps.first_sound([1, 6], piece.cuda()))
        else:
            pieces.append(steps.sound([1, 6], piece.cuda()))
        steps.beside.join()
    assert (torch.cat(pieces, 1).cpu() - expected).abs().max() < 1e-4
    assert steps.missed == 0


def test_the_engine_speaks_alike_in_company_and_nothing_is_captured_late() -> None:
    """Also shows that lanes and copies wait for each other: whatever did not would be heard."""
    model = load_model(tiny("custom_voice"), slots=SLOTS, positions=256, device="cuda")
    model.engine.start()
    alone = [heard(model, [seed])[0] for seed in range(2 * SLOTS)]
    for _ in range(5):
        together = heard(model, range(2 * SLOTS))
        for one, other in zip(alone, together, strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).max() < 1e-3
    assert model.engine.stop(30)
    assert model.steps.missed == 0
    assert all(np.abs(samples).max() > 0.01 for samples in alone)


def heard(model: SpeechModel, seeds: Iterable[int]) -> list[np.ndarray]:
    """The sound of requests that are made at once, by their seeds."""
    sounds: list[list[np.ndarray]] = []
    ends: list[Event] = []

    def ask(seed: int) -> None:
        chunks: list[np.ndarray] = []
        ended = Event()

        def deliver(delivery: Delivery) -> None:
            if delivery.sound is not None:
                chunks.append(delivery.sound.samples)
            if delivery.finish_reason is not None:
                assert delivery.finish_reason in ("stop", "length")
                ended.set()

        prompt = Prompt(TEXTS[seed % len(TEXTS)], "english", "Ryan")
        model.engine.submit(model.request(prompt, model.sampling(seed), 40), deliver)
        sounds.append(chunks)
        ends.append(ended)

    for seed in seeds:
        ask(seed)
    assert all(ended.wait(60) for ended in ends)
    return [np.concatenate(chunks) for chunks in sounds]


def test_a_voice_is_cloned_on_the_gpu_as_on_the_cpu() -> None:
    clip = np.sin(np.arange(48_000) * 0.05).astype(np.float32) * 0.3
    here, there = (
        load_model(tiny("base"), slots=1, positions=128, device=device).clone(clip, "Hello world.")
        for device in ("cpu", "cuda")
    )
    assert here.embedding is not None
    assert there.embedding is not None
    assert (here.embedding - there.embedding.cpu()).abs().max() < 1e-4
    assert here.codes is not None
    assert there.codes is not None
    assert torch.equal(here.codes, there.codes.cpu())


POISON = """
import torch
from api.src.engine.device import require_working
from api.src.engine.errors import DeviceLost
device = torch.device("cuda")
try:
    torch.empty(10**15, device=device)
except torch.OutOfMemoryError:
    require_working(device)
try:
    torch.zeros(1, device=device)[torch.tensor([5], device=device)].cpu()
except RuntimeError:
    pass
try:
    require_working(device)
except DeviceLost:
    print("lost")
"""


def test_a_poisoned_context_is_known_as_lost() -> None:
    done = subprocess.run([sys.executable, "-c", POISON], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["lost"], done.stderr
