"""The language model beside the official package: the same codes, frame for frame, in fp32 under greedy decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import BlockedProduct, HalfProduct, Linear
from api.src.engine.prompt import PromptBuilder
from api.src.engine.tokenizer import TextTokenizer
from tests.engine.checkpoints import tiny
from tests.engine.streams import GREEDY, Stream, cases, golden, loaded, run

CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_prompt_rows_are_the_official_ones(name):
    case = CASES[name]
    _, rows = case.build()
    assert rows.rows.shape == case.rows.shape
    assert np.abs(rows.rows.numpy() - case.rows).max() < 1e-5
    to_come = rows.trailing if len(rows.trailing) else rows.pad[None]
    assert to_come.shape == case.trailing.shape
    assert np.abs(to_come.numpy() - case.trailing).max() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_codes_are_the_official_ones(name):
    case = CASES[name]
    model, rows = case.build()
    [codes] = run(model, [Stream(rows, frames=case.limit)])
    assert codes.shape == case.codes.shape
    assert (codes == case.codes).all()


def test_the_cases_cover_both_ends_and_all_layouts():
    ends = {len(case.codes) == case.limit for case in CASES.values()}
    assert ends == {True, False}
    assert {case.prompt.text_at_once for case in CASES.values()} == {True, False}
    recorded = golden("golden")[1]["cases"]
    assert all(len(CASES[name].codes) == recorded[name]["frames"] for name in recorded)


@pytest.mark.parametrize("checkpoint", ["custom_voice", "wide", "deep", "custom"])
def test_unequal_prompts_in_one_batch_give_the_same_codes(checkpoint):
    chosen = [case for case in CASES.values() if case.checkpoint == checkpoint]
    assert len({case.rows.shape[0] for case in chosen}) > 1
    model, _ = loaded(checkpoint)
    codes = run(model, [Stream(case.build()[1], frames=case.limit) for case in chosen])
    for mine, case in zip(codes, chosen, strict=True):
        assert np.array_equal(mine, case.codes)


@pytest.mark.parametrize("form", ["plain", "blocked", "half"])
def test_every_form_of_the_weights_gives_the_same_codes(form, monkeypatch):
    if form != "half":
        monkeypatch.setattr(HalfProduct, "of", lambda weight, bias: None)
    if form == "plain":
        monkeypatch.setattr(BlockedProduct, "of", lambda weight, bias: None)
    folder = tiny("custom_voice")
    model = LanguageModel.load(folder)
    forms = {type(part._product).__name__ for part in model.talker.modules() if isinstance(part, Linear)}
    assert forms == {{"plain": "NoneType", "blocked": "BlockedProduct", "half": "HalfProduct"}[form]}
    case = CASES["custom_2_stream"]
    rows = PromptBuilder(model.config, TextTokenizer(folder), model.talker).rows(case.prompt)
    assert np.array_equal(run(model, [Stream(rows, frames=case.limit)])[0], case.codes)


def test_bf16_speaks_and_agrees_with_fp32_at_first():
    folder = tiny("custom_voice")
    model = LanguageModel.load(folder, torch.bfloat16)
    builder = PromptBuilder(model.config, TextTokenizer(folder), model.talker)
    same = 0
    for name in ("custom_0_nonstream", "custom_0_stream", "custom_1_nonstream", "custom_2_nonstream"):
        case = CASES[name]
        rows = builder.rows(case.prompt)
        assert rows.rows.dtype == torch.bfloat16
        [codes] = run(model, [Stream(rows, GREEDY, frames=6)])
        assert codes.min() >= 0
        assert codes.max() < 2048
        same += int(codes[0, 0] == case.codes[0, 0])
    assert same >= 2  # of four first codes, among 2048 each
