"""What the weights' forms on a CPU lose against fp32: of each product, of the logits, and of greedy codes.

    python -m tests.bench.weight_forms [--folder DIR] [--size 0.6b] [--forms bf16 int8 int4] [--frames 12] [--streams 4]

Without a folder, on random weights of the published size. All forms see the same prompts and, for the logits, the same
codes before them: those that fp32 draws by the checkpoint's own sampling. Prints, by form:

    product     relative error of products for the rows that fp32 gives them: of the layers, the mean and the largest
    logits      error where all that comes before has its error too, by the spread of the exact ones; the largest, alike
    KL          of the exact distribution at the checkpoint's temperature from the form's, in nats: mean and largest
    first       how often the likeliest code is the exact one's
    greedy      of the codes of greedy runs of their own, how many are the exact run's: of the first frame, and of all

"model bf16" calculates everything in bf16, as the official package does on a GPU: what is held to be good enough there.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from api.src.engine import language_model, predictor
from api.src.engine.forms import Settler
from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import Form, Linear
from api.src.engine.prompt import PromptRows
from api.src.engine.sampling import Sampling
from api.src.engine.talker import Talker
from api.src.engine.weights import Checkpoint, empty, load
from tests.bench.random_checkpoint import SIZES, build

MODEL_BF16 = "model bf16"
_PROMPT_ROWS = 24
_KEPT_ROWS = 32


@dataclass
class Errors:
    """Of one form."""

    product: float = 0.0
    product_max: float = 0.0
    logits: float = 0.0
    logits_max: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    first: float = 0.0
    greedy_frame: float = 0.0
    greedy: float = 0.0
    worst: str = ""


@dataclass
class Record:
    """What a run chose, and from what: [choice] of (B, V) and (B,)."""

    logits: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)


def load_form(folder: Path, form: str) -> LanguageModel:
    """The checkpoint's language model in a form, or calculated in bf16."""
    dtype = torch.bfloat16 if form == MODEL_BF16 else torch.float32
    config = language_model.ModelConfig.read(folder)
    talker = empty(lambda: Talker(config.talker_config), dtype)
    wanted: Form = "fp32" if form == MODEL_BF16 else form  # type: ignore[assignment]
    with Checkpoint(folder) as checkpoint, Settler(talker, wanted) as settler:
        load(talker, checkpoint, "talker.", ready=settler.ready, filled=settler.filled)
    return LanguageModel(config, talker)


def compare(folder: Path, forms: Sequence[str], frames: int, streams: int) -> dict[str, Errors]:
    """Errors by form."""
    model = load_form(folder, "fp32")
    sampling = Sampling.default(model.config.generation)
    with _inputs(model.talker) as rows:
        exact = _run(model, frames, streams, sampling)
    outputs = {name: part(rows[name]) for name, part in _linears(model.talker)}
    greedy = _greedy(model, frames, streams)
    del model
    found = {}
    for form in forms:
        other = load_form(folder, form)
        errors = _products(other, rows, outputs)
        _of_logits(errors, exact, _run(other, frames, streams, sampling, exact.codes), sampling)
        same = [a == b for a, b in zip(greedy, _greedy(other, frames, streams), strict=True)]
        errors.greedy_frame, errors.greedy = float(same[0].float().mean()), float(torch.stack(same).float().mean())
        found[form] = errors
        del other
    return found


# --- runs ---


def _run(model: LanguageModel, frames: int, streams: int, sampling: Sampling, codes: Sequence[Tensor] = ()) -> Record:
    """Frames of all streams; the choices are `codes` where there are any."""
    record, forced = Record(), iter(codes)

    def choose(logits: Tensor, *rest: Any) -> Tensor:
        chosen = next(forced) if codes else _choose(logits, *rest)
        record.logits.append(logits.clone())
        record.codes.append(chosen)
        return chosen

    with mock.patch.object(language_model, "choose", choose), mock.patch.object(predictor, "choose", choose):
        _frames(model, frames, streams, sampling)
    return record


_choose = predictor.choose


def _greedy(model: LanguageModel, frames: int, streams: int) -> list[Tensor]:
    """Each frame's codes (B, C)."""
    default = Sampling.default(model.config.generation)
    return _frames(model, frames, streams, replace(default, do_sample=False, subtalker_dosample=False))


@torch.inference_mode()
def _frames(model: LanguageModel, frames: int, streams: int, sampling: Sampling) -> list[Tensor]:
    slots = model.new_slots(streams, _PROMPT_ROWS + frames + 8, 8)
    generator = torch.Generator().manual_seed(1)
    sizes = model.config.talker_config.text_vocab_size, 2048
    entries = []
    for slot in range(streams):
        words, sounds = (torch.randint(0, size, (_PROMPT_ROWS,), generator=generator) for size in sizes)
        rows = model.talker.text(words) + model.talker.codec(sounds)
        own = replace(sampling, seed=slot, min_new_tokens=frames + 1)
        entries.append((slot, PromptRows(rows, rows[:0], rows[0]), own))
    model.prefill(slots, entries)
    return [model.frame_step(slots, list(range(streams))) for _ in range(frames)]


# --- errors ---


def _linears(talker: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, part) for name, part in talker.named_modules() if isinstance(part, Linear) and "layers." in name)


@contextmanager
def _inputs(talker: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The last rows that each linear map of the layers got."""
    rows: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] = torch.cat((rows.get(name, inputs[0][:0]), inputs[0]))[-_KEPT_ROWS:].clone()

        return hook

    hooks = [part.register_forward_pre_hook(keep(name)) for name, part in _linears(talker)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _products(model: LanguageModel, rows: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    dtype = model.weight.dtype
    errors = {
        name: float((part(rows[name].to(dtype)).float() - exact[name]).norm() / exact[name].norm())
        for name, part in _linears(model.talker)
    }
    worst = max(errors, key=lambda name: errors[name])
    return Errors(product=sum(errors.values()) / len(errors), product_max=errors[worst], worst=worst)


def _of_logits(errors: Errors, exact: Record, found: Record, sampling: Sampling) -> None:
    groups = len(exact.logits) // _count_firsts(exact)
    spreads, worst, kls, firsts = [], [], [], []
    for number, (a, b) in enumerate(zip(exact.logits, found.logits, strict=True)):
        kept = a[0].isfinite() & b[0].isfinite()
        a, b = a[:, kept].double(), b[:, kept].double()
        spreads.append((a - b).square().mean(1).sqrt() / a.std(1))
        worst.append((a - b).abs().amax(1) / a.std(1))
        heat = sampling.subtalker_temperature if number % groups else sampling.temperature
        p, q = (a / heat).log_softmax(1), (b / heat).log_softmax(1)
        kls.append((p.exp() * (p - q)).sum(1))
        firsts.append((a.argmax(1) == b.argmax(1)).double())
    errors.logits, errors.logits_max = float(torch.cat(spreads).mean()), float(torch.cat(worst).max())
    errors.kl, errors.kl_max = float(torch.cat(kls).mean()), float(torch.cat(kls).max())
    errors.first = float(torch.cat(firsts).mean())


def _count_firsts(record: Record) -> int:
    """Choices of a frame's first code: those with suppressed ids."""
    return sum(not bool(logits.isfinite().all()) for logits in record.logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", default="0.6b", choices=list(SIZES))
    parser.add_argument("--forms", nargs="+", default=[MODEL_BF16, "bf16", "int8", "int4"])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--streams", type=int, default=4)
    args = parser.parse_args()
    folder = args.folder or build(Path(tempfile.gettempdir()) / f"random-{args.size}", args.size)
    found = compare(folder, args.forms, args.frames, args.streams)
    print(f"{'':11} {'product':>15} {'logits':>15} {'KL':>19} {'first':>7} {'greedy':>13}")
    for form, e in found.items():
        print(
            f"{form:11} {e.product:7.4f} {e.product_max:7.4f} {e.logits:7.4f} {e.logits_max:7.3f} {e.kl:9.6f} "
            f"{e.kl_max:9.6f} {e.first:7.1%} {e.greedy_frame:6.1%} {e.greedy:6.1%}  worst {e.worst}"
        )
    print(json.dumps({form: asdict(errors) for form, errors in found.items()}))


if __name__ == "__main__":
    main()
