"""The kernel's choices and whole frames, beside sampling.py's and beside frames by single passes."""

from __future__ import annotations

import shutil
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from api.src.engine.language_model import LanguageModel
from api.src.engine.native.check_frame import check_choices, check_frames
from api.src.engine.native.library import NoKernel, load
from api.src.engine.native.memory import WeightMemory
from api.src.engine.native.products import DECODER, Native
from api.src.engine.passes import NativePasses
from api.src.engine.prompt import PromptRows
from api.src.engine.sampling import Rule, Sampling, choose, width
from tests.engine.checkpoints import variant
from tests.engine.test_native import changed

pytestmark = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
NEAR = 2e-5
"""Of a boundary between two codes: rounding may decide there."""
SAMPLINGS = [
    Sampling(seed=1, min_new_tokens=3),
    Sampling(seed=2, temperature=1.5, top_k=0, subtalker_top_k=0, subtalker_temperature=2.0),
    Sampling(do_sample=False, subtalker_dosample=False, repetition_penalty=1.3),
    Sampling(seed=4, top_p=0.6, subtalker_top_p=0.3, subtalker_top_k=0),
    Sampling(seed=5, top_k=1, subtalker_top_k=5000, repetition_penalty=0.7, min_new_tokens=100),
    Sampling(seed=-6, do_sample=False, subtalker_top_p=0.9),
    Sampling(seed=2**70, top_k=5, temperature=0.2),
    Sampling(seed=8, top_k=3000, top_p=1e-6),
]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    made = Native(load(DECODER, tmp_path_factory.mktemp("kernel")))
    made.has_exact = True
    yield made
    made.close()


# --- choices ---


def chosen(native: Native, logits, uniform: float, *, top_k=50, top_p=1.0, temperature=1.0, sampled=True) -> int:
    row = torch.as_tensor(logits, dtype=torch.float32).contiguous()
    scratch = torch.empty(native.library.scratch_to_choose(len(row)), dtype=torch.uint8)
    values = (sampled, temperature, top_k, top_p, uniform)
    return native.library.choose_one(row.data_ptr(), len(row), *values, scratch.data_ptr())


def places(scores: np.ndarray, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """In fp64: codes that are kept, the likeliest first and equal ones by number, and the end of each one's share."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    order = order[scores[order] >= np.sort(scores)[-min(top_k or len(scores), len(scores))]]
    odds = np.exp(scores[order] - scores.max())
    odds /= odds.sum()
    kept = odds.cumsum() - odds < top_p
    return order[kept], odds[kept].cumsum() / odds[kept].sum()


def allowed(logits: list[float], uniform: float, top_k: int, top_p: float, temperature: float) -> set[int]:
    """What the written rule gives for that number, and for those next to it."""
    scores = (np.array(logits, np.float32) / np.float32(temperature)).astype(np.float64)
    codes: set[int] = set()
    for cut in (top_p, top_p - NEAR, top_p + NEAR):
        order, ends = places(scores, top_k, max(cut, 1e-9))
        first, last = (np.searchsorted(ends, uniform + off) for off in (-NEAR, NEAR))
        codes |= set(order[first : last + 1].tolist()) | ({int(order[-1])} if last >= len(order) else set())
    return codes


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=70),
    uniform=st.floats(0, 1 - 2**-24, width=32),
    top_k=st.integers(0, 80),
    top_p=st.one_of(st.floats(0.001, 1), st.just(1.0)),
    temperature=st.floats(0.1, 5),
)
def test_a_choice_follows_the_written_rule(native, logits, uniform, top_k, top_p, temperature):
    code = chosen(native, logits, uniform, top_k=top_k, top_p=top_p, temperature=temperature)
    assert code in allowed(logits, uniform, top_k, top_p, temperature)
    greedy = chosen(native, logits, uniform, sampled=False)
    assert greedy == int(np.argmax(np.array(logits, np.float32)))


@pytest.mark.parametrize("size", [2048, 3072])
def test_torch_chooses_the_same(native, size):
    """At the published sizes, ten numbers by each of many rules: all but what rounding decides."""
    random, other, count = torch.Generator().manual_seed(size), 0, 0
    for top_k, top_p, temperature, sampled in product(
        (0, 1, 50, 5000), (1.0, 0.9, 0.05, 1e-6), (0.3, 0.9, 3.0), (True, False)
    ):
        logits, uniform = 4 * torch.randn(10, size, generator=random), torch.rand(10, generator=random)
        logits[:, 7:99] = -torch.inf
        rule = Rule(*(torch.full((10,), value) for value in (sampled, temperature, top_k, top_p)))
        expected = choose(logits, rule, uniform, width(sampled, top_k, size)).tolist()
        rules = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "sampled": sampled}
        found = [chosen(native, row, number, **rules) for row, number in zip(logits, uniform.tolist(), strict=True)]
        other += sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
        count += 10
    assert other <= count // 400


def test_all_that_tie_with_the_kth_stay_in_and_the_interval_s_ends_stay_within(native):
    logits = [-9.0] * 10 + [1.0] * 8 + [-9.0] * 82
    found = {chosen(native, logits, (number + 0.5) / 8, top_k=5) for number in range(8)}
    assert found == set(range(10, 18))
    few = [5.0, 4.0, 3.0, -torch.inf, -torch.inf]
    assert [chosen(native, few, number, top_k=4) for number in (0.0, 1 - 2**-24, 1.0)] == [0, 2, 2]
    assert [chosen(native, few, number, top_p=0.5) for number in (0.0, 1.0)] == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rules", [{}, {"top_k": 0, "top_p": 0.4}, {"sampled": False}])
def test_broken_logits_give_a_code_all_the_same(native, bad, rules):
    for size, places in ((1, [0]), (40, [0]), (40, [39, 3]), (40, range(40))):
        logits = torch.linspace(-2, 2, size)
        logits[list(places)] = bad
        for uniform in (0.0, 0.5, 1 - 2**-24):
            assert 0 <= chosen(native, logits, uniform, **rules) < size


# --- frames ---


def spoken(model: LanguageModel, rows: int, count: int = 5) -> list[torch.Tensor]:
    """Codes of streams with each its own sampling, in slots out of their order, and what is left: by stream first."""
    order = [(5 * slot + 2) % (rows + 2) for slot in range(rows)] if (rows + 2) % 5 else list(range(rows, 0, -1))
    slots = model.new_slots(rows + 2, 64, 8)
    random, hidden = torch.Generator().manual_seed(rows), model.config.talker_config.hidden_size
    entries = []
    for place, slot in enumerate(order):
        prompt = torch.randn(4 + 3 * place, hidden, generator=random)
        text = torch.randn(place % 4, hidden, generator=random)
        entries.append((slot, PromptRows(prompt, text, prompt[0]), SAMPLINGS[place % len(SAMPLINGS)]))
    model.prefill(slots, entries)
    codes = [model.frame_step(slots, order) for _ in range(count)]
    stored = (each[:, order].transpose(0, 1) for each in (slots.talker.keys, slots.talker.values))
    left = (slots.next_input[order], slots.seen[order], slots.progress[order])
    return [torch.stack(codes, dim=1), *left, *stored]


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal, if need be but for the order of a sum."""
    exact = not ours.is_floating_point()
    return torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["small", "deep", "wide", "custom"])
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_whole_frame_is_its_passes(native, name, form):
    """Where top-k keeps the whole vocabulary, rounding may decide between two of thousands of codes."""
    model = LanguageModel.load(variant(name), weights=form, native=native)
    assert isinstance(model.passes, NativePasses)
    whole, other = model.whole_frame, []
    assert whole is not None
    for rows in (*range(1, 9), 11):
        model.whole_frame = whole
        found = spoken(model, rows)
        model.whole_frame = None
        for ours, theirs in zip(found, spoken(model, rows), strict=True):
            other += [place for place in range(rows) if not alike(ours[place], theirs[place])]
    assert all(SAMPLINGS[place % len(SAMPLINGS)].subtalker_top_k == 0 for place in other)
    assert len(set(other)) <= 1


def test_arenas_come_and_go(native):
    """What a frame points to is that of the arenas that it is of."""
    model = LanguageModel.load(variant("wide"), weights="int8", native=native)
    first = [spoken(model, rows, 2)[0] for rows in (2, 3, 2, 3)]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[3])


def test_heads_that_are_not_the_kernels_go_by_passes(native):
    native.has_exact = False
    try:
        model = LanguageModel.load(variant("wide"), weights="int8", native=native)
    finally:
        native.has_exact = True
    assert isinstance(model.passes, NativePasses)
    assert model.whole_frame is None
    assert spoken(model, 2, 2)[0].shape == (2, 2, 16)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("uniform * (float)kept", "uniform", check_choices),
        ("0x9e3779b97f4a7c15", "0x9e3779b97f4a7c17", check_frames),
        ("progress[FRAME]++", "progress[FRAME] += 2", check_frames),
        ("sum[i] += said[i]", "sum[i] -= said[i]", check_frames),
        ("x[i] += f->bias[i]", "x[i] -= f->bias[i]", check_frames),
    ],
)
def test_a_kernel_that_chooses_otherwise_is_not_used(tmp_path, old, new, check):
    broken = Native(load(changed(tmp_path / "sources", old, new), tmp_path))
    broken.has_exact = True
    with torch.inference_mode(), pytest.raises(NoKernel):
        check(broken)
    broken.close()


# --- memory ---


def test_weights_lie_apart_in_memory_of_zeros():
    memory = WeightMemory()
    sizes = [1, 64, 65, 3 << 20, 70 << 20, 1000]
    pieces = [memory.take(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    assert not any(piece[:1000].any() for piece in pieces)
    for number, piece in enumerate(pieces):
        piece.fill_(number + 1)
    assert all(bool((piece == number + 1).all()) for number, piece in enumerate(pieces))
