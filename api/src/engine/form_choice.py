"""Which form of the weights is fastest on this processor, of those whose error is small: a second's measurement.

Owns the measurement, the bound on what a form may lose, and the note of the choice beside the quantised weights.
Measured are the products of a code predictor's layer at its real size, as 15 of a frame's 16 passes are its, for one
row and for 8, in turns, with more weights than a processor's caches hold. By one thread: where other processes want the
cores, several wait for one another for a hundred times what they measure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from .config import TalkerConfig, TransformerConfig
from .linear import Form, Linear
from .native.products import Native
from .processor import processor

MAX_ERROR = 0.03
"""Of a product, relative, root mean square, for normally distributed weights and rows.

Errors of layers add up like independent ones: the divergence of a code's distribution (Kullback-Leibler) goes with the
square of this. With random weights of the published size it was 0.0006 nats in int8, whose error is 0.012 at most, so
that 2 of 100 draws can differ (Pinsker), and 0.038 in int4, error 0.08: 14 of 100. At the bound, 5 of 100 can. See
tests/bench/weight_forms.py; the official package's own bf16 has 0.0024, and 0.00006 nats.
"""
MIN_GAIN = 1.1
"""How many times as fast a form that loses something must be."""
ROWS = (1, 8)
_REPEATS = 5
_MIN_BYTES = 40_000_000
_MAX_COPIES = 6
_FORMAT = 2


@dataclass(frozen=True)
class Choice:
    """A form and why. `frame_ms`: by form, the time of a frame's products for each of ROWS."""

    form: Form
    reason: str
    frame_ms: dict[str, list[float]]


@torch.inference_mode()
def choose_form(config: TalkerConfig, folders: Sequence[Path] = (), native: Native | None = None) -> Choice:
    """The choice noted in one of `folders` for this processor, torch and size, or a new one.

    `native`: the CPU's kernel, which has some of the forms then.
    """
    name = f"auto-{_key(config, native)}.choice"
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return _noted(folder / name)
    choice = _decide(config, native)
    _note(choice, [folder / name for folder in folders])
    return choice


def product_error(form: Form, native: Native | None = None, outputs: int = 512, inputs: int = 1024) -> float:
    """Of a product in that form: relative, root mean square."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(outputs, inputs).normal_(0, 0.02, generator=generator).bfloat16().float()
    rows = torch.empty(32, inputs).normal_(generator=generator)
    exact = rows.double() @ weight.T.double()
    return float((_linear(weight, form, native)(rows) - exact).norm() / exact.norm())


def _decide(config: TalkerConfig, native: Native | None) -> Choice:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(config, native)
    finally:
        torch.set_num_threads(threads)
        if native is not None:
            native.close()  # the next call has as many threads as torch has then


def _measured(config: TalkerConfig, native: Native | None) -> Choice:
    errors = {form: product_error(form, native) for form in get_args(Form)}
    safe = [form for form, error in errors.items() if error <= MAX_ERROR]
    per_weight = _measure(config.code_predictor_config, safe, native)
    frame_ms = {form: [1e3 * _frame_weights(config) * each for each in per_weight[form]] for form in safe}
    gains = {form: _gain(frame_ms["fp32"], times) for form, times in frame_ms.items()}
    best = max(gains, key=lambda form: gains[form])
    form: Form = best if gains[best] >= MIN_GAIN else "fp32"
    return Choice(form, _reason(form, frame_ms, errors), frame_ms)


def _gain(exact: Sequence[float], times: Sequence[float]) -> float:
    ratios = [before / after for before, after in zip(exact, times, strict=True)]
    return float(torch.tensor(ratios).log().mean().exp())


def _reason(form: Form, frame_ms: dict[Form, list[float]], errors: dict[Form, float]) -> str:
    times = ", ".join(f"{name} {' and '.join(f'{ms:.0f}' for ms in each)}" for name, each in frame_ms.items())
    left_out = [
        f"{name} left out, as its products lose {100 * error:.1f} %, more than {100 * MAX_ERROR:.0f} %"
        for name, error in errors.items()
        if name not in frame_ms
    ]
    return "; ".join([f"{form}: ms of one core for a frame's products, alone and for 8 streams: {times}", *left_out])


def _measure(config: TransformerConfig, forms: Sequence[Form], native: Native | None) -> dict[Form, list[float]]:
    """Seconds per weight of each form, for each of ROWS."""
    weights = [torch.empty(shape).normal_(0, 0.02).bfloat16().float() for shape in _shapes(config)]
    count = sum(weight.numel() for weight in weights)
    layers: dict[Form, list[list[Linear]]] = {}
    for form in forms:
        layers[form] = [_layer(weights, form, native)]
        read = count * layers[form][0][0].weight_bytes
        copies = min(_MAX_COPIES, max(1, round(_MIN_BYTES / read)))
        layers[form] += [_layer(weights, form, native) for _ in range(copies - 1)]
    best: dict[Form, list[float]] = {form: [] for form in forms}
    for rows in ROWS:
        inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]
        turns = [{form: _seconds(layers[form], inputs) for form in forms} for _ in range(_REPEATS)]
        for form in forms:
            best[form].append(min(turn[form] for turn in turns) / (count * len(layers[form])))
    return best


def _seconds(layers: list[list[Linear]], inputs: list[Tensor]) -> float:
    started = time.perf_counter()
    for layer in layers:
        for linear, x in zip(layer, inputs, strict=True):
            linear(x)
    return time.perf_counter() - started


def _layer(weights: Sequence[Tensor], form: Form, native: Native | None) -> list[Linear]:
    *others, down = weights
    return [*(_linear(weight, form, native) for weight in others), _linear(down, form, native, fine=True)]


def _linear(weight: Tensor, form: Form, native: Native | None, *, fine: bool = False) -> Linear:
    outputs, inputs = weight.shape
    with torch.device("meta"):
        linear = Linear(inputs, outputs)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.settle(form, fine=fine, native=native)
    return linear


def _shapes(config: TransformerConfig) -> list[tuple[int, int]]:
    """Of a layer's packed weights."""
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = inner + 2 * config.num_key_value_heads * config.head_dim
    size = config.intermediate_size
    return [(qkv, hidden), (hidden, inner), (2 * size, hidden), (hidden, size)]


def _frame_weights(config: TalkerConfig) -> int:
    """Of all layers, as often as a frame reads them."""

    def layers(part: TransformerConfig) -> int:
        return part.num_hidden_layers * sum(outputs * inputs for outputs, inputs in _shapes(part))

    return layers(config) + (config.num_code_groups - 1) * layers(config.code_predictor_config)


# --- the note ---


def _key(config: TalkerConfig, native: Native | None) -> str:
    parts = (_FORMAT, torch.__version__, processor(), MAX_ERROR, _frame_weights(config), native is not None)
    return hashlib.sha256(repr((*parts, _shapes(config.code_predictor_config))).encode()).hexdigest()[:16]


def _noted(path: Path) -> Choice:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["form"] not in get_args(Form):
        raise ValueError(f"{path}: no form is called {content['form']}")
    times = {str(form): [float(ms) for ms in each] for form, each in content["frame_ms"].items()}
    return Choice(cast(Form, content["form"]), str(content["reason"]), times)


def _note(choice: Choice, paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(choice), file)
            os.replace(part, path)
            return
