"""Sampling beside the official package's own chain of processors, and the generator beside chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from api.src.engine.config import GenerationConfig, ModelConfig
from api.src.engine.errors import EngineError
from api.src.engine.sampling import Rule, Sampling, choose, draws, key, penalise, width
from tests.engine.checkpoints import EOS, tiny
from tests.engine.streams import cases, golden

VOCABULARY = 3072
CASES = cases()


def rule(count: int, temperature: float, top_k: int, top_p: float, do_sample: bool = True) -> Rule:
    full = (torch.full((count,), value) for value in (do_sample, temperature, top_k, top_p))
    return Rule(*full)


def shares(logits: torch.Tensor, settings: dict, count: int = 20_000) -> np.ndarray:
    """How much of [0, 1) each code gets: the chosen code of evenly spaced uniform numbers, counted."""
    uniform = (torch.arange(count) + 0.5) / count
    sorted_width = width(True, settings["top_k"], VOCABULARY)
    chosen = [
        choose(
            logits.expand(len(part), -1),
            rule(len(part), settings["temperature"], settings["top_k"], settings["top_p"]),
            part,
            sorted_width,
        )
        for part in uniform.split(2000)
    ]
    return np.bincount(torch.cat(chosen).numpy(), minlength=VOCABULARY) / count


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("row", range(3))
def test_the_distribution_is_the_official_chains(number, row):
    """Rows 0, 1, 2: after no code, one code, twenty; before the minimum of two tokens the end is out of reach."""
    arrays, meta = golden("variants")
    settings = meta["scores"][number]
    length = (0, 1, 20)[row]
    seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
    seen[0, arrays["scores/history"][:length]] = True
    logits = torch.tensor(arrays["scores/logits"][row : row + 1])
    logits = penalise(logits, seen, torch.tensor([settings["repetition_penalty"]]))
    special = torch.arange(VOCABULARY) >= 2048
    special[EOS] = length < 2
    found = shares(logits.masked_fill(special, -torch.inf), settings)
    expected = arrays[f"scores/{number}"][row]
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 1.5 / 20_000 + 1e-6
    assert (found[EOS] > 0) == (expected[EOS] > 1e-4)


def test_the_official_chain_has_the_order_that_is_kept_here():
    order = [name.removesuffix("LogitsProcessor") for name in golden("variants")[1]["processors"]]
    assert order[0] == "RepetitionPenalty"
    assert order[-3:] == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    assert {"SuppressTokens", "MinNewTokensLength"} <= set(order[1:-3])


@pytest.mark.parametrize(("group", "name"), [(0, "first"), (1, "second")])
def test_the_model_samples_its_first_codes_as_the_official_one_does(group, name):
    """1,536 streams that differ in their seed alone: code 0, and code 1 after the greedy code 0, by chi-square."""
    model, rows = CASES["dialect"].build()
    slots = model.new_slots(64, 64, 64)
    expected = golden("variants")[0][f"dialect/{name}"]
    counts = np.zeros(len(expected))
    for batch in range(24):
        styles = [Sampling(seed=64 * batch + slot, do_sample=group == 0) for slot in range(64)]
        model.prefill(slots, [(slot, rows, style) for slot, style in enumerate(styles)])
        np.add.at(counts, model.frame_step(slots, range(64))[:, group].numpy(), 1)
        for slot in range(64):
            slots.leave(slot)
    assert counts[expected == 0].sum() == 0
    likely = expected * 1536 > 5
    found, wanted = (np.append(x[likely], x[~likely].sum()) for x in (counts, expected * 1536))
    freedom = len(found) - 1
    assert freedom > 5
    assert ((found - wanted) ** 2 / wanted).sum() < freedom + 3.5 * np.sqrt(2 * freedom)


def test_draws_through_the_whole_sampler_fit_the_distribution():
    """Chi-square over 20,000 frames of one stream, 13 codes: above 30 in 0.3 % of cases, and the seed is fixed."""
    logits = torch.linspace(2, -1, 13)
    uniform = draws(torch.full((20_000,), key(3)), torch.arange(20_000), 16)[:, 7]
    chosen = choose(logits.expand(20_000, -1), rule(20_000, 0.9, 0, 1.0), uniform, 13)
    expected = (logits / 0.9).softmax(-1).numpy() * 20_000
    found = np.bincount(chosen.numpy(), minlength=13)
    assert ((found - expected) ** 2 / expected).sum() < 30


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=70),
    uniform=st.floats(0, 1 - 2**-24, width=32),
    top_k=st.integers(0, 80),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.1, 5),
)
def test_only_what_is_kept_is_chosen(logits, uniform, top_k, top_p, temperature):
    scores = torch.tensor([logits])
    kept = plain(np.array(logits, np.float64) / temperature, top_k, top_p)
    size = width(True, top_k, len(logits))
    chosen = int(choose(scores, rule(1, temperature, top_k, top_p), torch.tensor([uniform]), size))
    assert kept[chosen]


def plain(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """What top-k and then top-p keep, with a little to spare for rounding."""
    kept = np.ones(len(scores), bool) if top_k == 0 else scores >= np.sort(scores)[-min(top_k, len(scores))] - 1e-5
    odds = np.where(kept, np.exp(scores - scores.max()), 0)
    odds /= odds.sum()
    ahead = np.array([odds[scores > score + 1e-5].sum() for score in scores])
    return kept & (ahead < top_p + 1e-5)


def test_the_ends_of_the_unit_interval_stay_within_what_is_kept():
    logits = torch.tensor([[5.0, 4.0, 3.0, -torch.inf, -torch.inf]])
    for uniform in (0.0, 1 - 2**-24, 1.0):
        chosen = choose(logits, rule(1, 1.0, 4, 1.0), torch.tensor([uniform]), 5)
        assert chosen == (0 if uniform == 0 else 2)


def test_all_that_tie_with_the_kth_stay_in():
    logits = torch.full((1, 100), -9.0)
    logits[0, 10:18] = 1.0
    settings = {"temperature": 1.0, "top_k": 5, "top_p": 1.0}
    logits = torch.nn.functional.pad(logits, (0, VOCABULARY - 100), value=-torch.inf)
    assert np.allclose(shares(logits, settings)[10:18], 1 / 8, atol=1e-4)


def test_rows_of_one_batch_go_by_their_own_rules():
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY)
    mixed = Rule(
        torch.tensor([True, False, True, True]),
        torch.tensor([0.9, 1.0, 2.0, 0.5]),
        torch.tensor([50, 50, 0, 1]),
        torch.tensor([1.0, 1.0, 0.5, 1.0]),
    )
    uniform = torch.tensor([0.3, 0.9, 0.6, 0.99])
    together = choose(logits, mixed, uniform, VOCABULARY)
    for row in range(4):
        own = Rule(*(column[row : row + 1] for column in mixed))
        size = width(bool(own.do_sample), int(own.top_k), VOCABULARY)
        assert choose(logits[row : row + 1], own, uniform[row : row + 1], size) == together[row]
    assert together[1] == logits[1].argmax()
    assert together[3] == logits[3].argmax()


def test_draws_are_uniform_and_unrelated():
    """16 code groups of 500 frames of 40 seeds: bins, and correlation between neighbours in each direction."""
    keys = torch.tensor([key(seed) for seed in range(40)])
    grid = torch.stack([draws(keys, torch.full((40,), frame), 16) for frame in range(500)]).numpy()  # (500, 40, 16)
    assert grid.min() >= 0
    assert grid.max() < 1
    bins = np.histogram(grid, bins=64, range=(0, 1))[0]
    expected = grid.size / 64
    assert ((bins - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)
    centred = grid - 0.5
    for axis in range(3):
        near, far = np.delete(centred, 0, axis), np.delete(centred, -1, axis)
        assert abs((near * far).mean() * 12) < 5 / np.sqrt(near.size)


def test_a_draw_depends_on_its_own_row_alone():
    keys, frames = torch.tensor([key(1), key(2), key(3)]), torch.tensor([5, 0, 9])
    together = draws(keys, frames, 16)
    for row in range(3):
        assert torch.equal(draws(keys[row : row + 1], frames[row : row + 1], 16)[0], together[row])


def test_the_generator_is_splitmix64():
    """The first outputs of its authors' reference code from state 0, of which the high 24 bits are used."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = draws(torch.tensor([0]), torch.tensor([0]), 3)[0]
    assert found.tolist() == [(number >> 40) * 2.0**-24 for number in known]


@pytest.mark.parametrize(
    ("do_sample", "top_k", "expected"),
    [(False, 50, 0), (True, 50, 64), (True, 1, 64), (True, 60, 128), (True, 0, 3072), (True, 5000, 3072)],
)
def test_width(do_sample, top_k, expected):
    assert width(do_sample, top_k, VOCABULARY) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"top_p": -1.0},
        {"repetition_penalty": float("nan")},
        {"top_k": -1},
        {"min_new_tokens": -1},
    ],
)
def test_what_no_distribution_can_be_made_of_is_refused(wrong):
    with pytest.raises(EngineError):
        Sampling(**wrong)


def test_the_default_is_the_checkpoints():
    assert Sampling.default(ModelConfig.read(tiny("base")).generation, seed=4) == Sampling(seed=4)
    other = {
        "do_sample": False,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.6,
        "repetition_penalty": 1.5,
        "subtalker_dosample": False,
        "subtalker_temperature": 0.8,
        "subtalker_top_k": 9,
        "subtalker_top_p": 0.7,
    }
    assert Sampling.default(GenerationConfig(**other)) == Sampling(**other)
