"""Driving the language model in tests: prompts from recorded cases, and streams that join and leave at any step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from api.src.engine.language_model import LanguageModel
from api.src.engine.prompt import Prompt, PromptBuilder, PromptRows, Reference
from api.src.engine.sampling import Sampling
from api.src.engine.slots import Slots
from api.src.engine.tokenizer import TextTokenizer
from tests.engine.checkpoints import DATA, VARIANTS, reference, tiny, variant

GREEDY = Sampling(do_sample=False, subtalker_dosample=False)
POSITIONS = 160


@dataclass
class Stream:
    """One request of a test: when it joins, after how many frames it leaves at the latest, and its codes."""

    rows: PromptRows
    sampling: Sampling = GREEDY
    frames: int = 48
    joins: int = 0
    codes: list[torch.Tensor] = field(default_factory=list)
    ended: bool = False

    def result(self) -> np.ndarray:
        return torch.stack(self.codes).numpy() if self.codes else np.zeros((0, 16), int)


def run(model: LanguageModel, streams: Sequence[Stream], slots: Slots | None = None) -> list[np.ndarray]:
    """Step all streams to their ends, each in the lowest slot that is free when it joins."""
    slots = slots or model.new_slots(len(streams), POSITIONS, 64)
    running: dict[int, Stream] = {}
    step = 0
    while any(not stream.ended for stream in streams):
        new = [stream for stream in streams if stream.joins == step]
        free = [slot for slot in range(slots.count) if slot not in running]
        entries = dict(zip(free, new, strict=False))
        if entries:
            model.prefill(slots, [(slot, stream.rows, stream.sampling) for slot, stream in entries.items()])
            running.update(entries)
        if running:
            _step(model, slots, running)
        step += 1
    return [stream.result() for stream in streams]


def _step(model: LanguageModel, slots: Slots, running: dict[int, Stream]) -> None:
    order = sorted(running, reverse=True)  # not the slots' own order, so that an index mixed up shows
    for slot, codes in zip(order, model.frame_step(slots, order), strict=True):
        stream = running[slot]
        if codes[0] != model.eos:
            stream.codes.append(codes)
        if codes[0] == model.eos or len(stream.codes) == stream.frames:
            stream.ended = True
            slots.leave(slot)
            del running[slot]


@cache
def loaded(name: str) -> tuple[LanguageModel, PromptBuilder]:
    """A tiny checkpoint by kind, or a variant by name."""
    folder = variant(name) if name in VARIANTS else tiny(name)
    model = LanguageModel.load(folder)
    return model, PromptBuilder(model.config, TextTokenizer(folder), model.talker)


@cache
def golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the meta data of data/<name>.npz."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


@dataclass(frozen=True)
class Case:
    """A recorded case: which checkpoint, what was asked, what the official package made of it."""

    checkpoint: str
    prompt: Prompt
    rows: np.ndarray
    trailing: np.ndarray
    codes: np.ndarray
    limit: int

    def build(self) -> tuple[LanguageModel, PromptRows]:
        model, builder = loaded(self.checkpoint)
        return model, builder.rows(self.prompt)


def cases() -> dict[str, Case]:
    """All recorded cases."""
    return {name: _golden_case(name) for name in golden("golden")[1]["cases"]} | {
        name: _variant_case(name) for name in golden("variants")[1]["cases"]
    }


def _golden_case(name: str) -> Case:
    arrays, meta = golden("golden")
    case = meta["cases"][name]
    clip = None
    if name.startswith("clone"):
        codes = None if case.get("x_vector_only_mode") else torch.tensor(arrays["ref_code"])
        clip = Reference(torch.tensor(arrays["ref_spk_embedding"]), codes, case.get("ref_text", ""))
    kind = {"custom": "custom_voice", "design": "voice_design", "clone": "base"}[name.split("_")[0]]
    prompt = _prompt(case, clip, case["non_streaming_mode"])
    found = [arrays[f"{name}/{key}"] for key in ("talker_input_embeds", "trailing_text_hidden", "codes")]
    return Case(kind, prompt, found[0][0], found[1][0], found[2], meta["flags"]["max_new_tokens"] - 1)


def _variant_case(name: str) -> Case:
    arrays, meta = golden("variants")
    case = meta["cases"][name]
    clip = None
    if "clip" in case:
        seed, frames, text = case["clip"]
        codes, embedding = reference(seed, frames, VARIANTS[case["variant"]].hidden)
        clip = Reference(embedding, codes if frames else None, text)
    prompt = _prompt(case, clip, case.get("at_once", True))
    found = [arrays[f"{name}/{key}"] for key in ("rows", "trailing", "codes")]
    return Case(case["variant"], prompt, *found, limit=24)


def _prompt(case: dict, clip: Reference | None, at_once: bool) -> Prompt:
    speaker, instruct = case.get("speaker"), case.get("instruct")
    return Prompt(case["text"], case.get("language", "Auto"), speaker, instruct, clip, text_at_once=at_once)
