"""Whether the kernel can be had, and calculates what torch's operations do: it is used only then.

Owns the comparison, by small random weights: products of each kind with rows alone and together, and two layers for
prompts and single positions. Whole frames are check_frame.py's.
Shapes: N rows, H hidden.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransformerConfig
from ..layers import DecoderLayer, RMSNorm, rotations
from ..linear import Form, Linear, settle
from ..quantised import Codes, Int8Product
from ..slots import KeyValues, PromptMemory, StepMemory
from .check_frame import check_choices, check_frames
from .library import COMPILERS, NoKernel, load
from .products import DECODER, Native, NativeProduct
from .stack import NativeStack

_STEPS = 127.5
_FINER = 2 * _STEPS * (1 - 2.0**-10)
_CONFIG = TransformerConfig(16, 80, 112, 2, 4, 2, 24)
"""No size is a multiple of the kernel's blocks."""
_HEAD_DIMS = (24, 128)
"""The published size is calculated in its own way."""
_SPAN = 24
TOLERANCES: dict[Form, float] = {"fp32": 1e-4, "int8": 1e-2}
"""Of layers, relative, root mean square. In int8 the last bit of a row may become the code next to it."""
PRODUCT_TOLERANCE = 1e-4

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The kernel, or nothing; and which, for people."""

    native: Native | None
    reason: str


def find(folder: Path | None, *, compilers: tuple[str, ...] = COMPILERS, source: Path = DECODER) -> Found:
    """The kernel, compiled into `folder` if it does not lie there yet, and checked. Never fails."""
    try:
        native = Native(load(source, folder, compilers=compilers))
        check(native)
    except (NoKernel, OSError, AttributeError, ctypes.ArgumentError) as error:
        _log.warning("torch's operations serve on the CPU, which slows speech down: %s", error)
        return Found(None, f"torch's operations, as there is no kernel of our own: {error}")
    return Found(native, "a kernel compiled for this processor")


@torch.inference_mode()
def check(native: Native) -> None:
    """Compare it with torch.

    Raises:
        NoKernel: they do not agree.
    """
    try:
        for rows in (*range(1, 10), 13, 16):
            _check_products(native, rows)
        forms: list[Form] = ["int8", "fp32"] if native.has_exact else ["int8"]
        for form in forms:
            for head_dim in _HEAD_DIMS:
                _check_layers(native, form, replace(_CONFIG, head_dim=head_dim))
        check_choices(native)
        if native.has_exact:
            check_frames(native)
    finally:
        native.close()


def _check_products(native: Native, rows: int) -> None:
    weight, x = _random(40, 150).bfloat16().float(), _random(rows, 150) ** 3
    codes = Int8Product.quantise(weight)
    products: dict[str, tuple[NativeProduct | None, Tensor]] = {
        "int8": (native.int8(codes, None, fine=False), _rounded(x, codes, fine=False)),
        "fine int8": (native.int8(codes, None, fine=True), _rounded(x, codes, fine=True)),
        "bf16": (native.exact(weight, None), x.double() @ weight.double().T),
    }
    for name, (product, expected) in products.items():
        if product is None:
            if native.has_exact:
                raise NoKernel("the kernel refuses weights in bf16")
            continue
        found = product(x)
        if not torch.equal(found, torch.cat([product(row[None]) for row in x])):
            raise NoKernel(f"the kernel's rows in {name} depend on one another")
        _compare(f"product in {name}", found, expected, PRODUCT_TOLERANCE)


def _rounded(x: Tensor, codes: Codes, *, fine: bool) -> Tensor:
    """What quantised.py's products are, in fp64: x (N, I)."""
    largest = x.abs().amax(dim=1, keepdim=True)
    steps = x / largest * _STEPS
    code = steps.round().clamp(-127, 127)
    value = code.double()
    if fine:
        value += ((steps - code) * _FINER).round().clamp(-127, 127).double() / _FINER
    weight = codes["codes"].double() * codes["scales"].double()[:, None]
    return F.linear(value * largest.double() / _STEPS, weight)


def _check_layers(native: Native, form: Form, config: TransformerConfig) -> None:
    layers, norm = _layers(form, native, config)
    stack = NativeStack(native, layers, norm, config)
    table = rotations(config, _SPAN, norm.weight)
    arenas = [KeyValues(config, 3, _SPAN, norm.weight) for _ in range(2)]
    prompt, frame = _random(5, config.hidden_size), _random(2, config.hidden_size)
    outs = []
    for arena, by_kernel in zip(arenas, (True, False), strict=True):
        for slot, length in ((1, 5), (2, 3)):
            places, index = torch.arange(length), torch.full((length,), slot)
            x = prompt[:length].clone()
            if by_kernel:
                stack.run(x, index, places, arena, table, fresh=length, span=length)
            else:
                _run(layers, x, table.at(places), PromptMemory(arena, [slot], [length]))
        index, places, x = torch.tensor([2, 1]), torch.tensor([3, 5]), frame.clone()
        if by_kernel:
            outs.append(stack.run(x, index, places, arena, table, span=_SPAN)[0])
        else:
            memory = StepMemory(arena, index, places, [(2, 4), (1, 6)], _SPAN)
            outs.append(norm(_run(layers, x, table.at(places), memory)))
    for name, (found, expected) in {
        "output": outs,
        "keys": [arena.keys for arena in arenas],
        "values": [arena.values for arena in arenas],
    }.items():
        _compare(f"layers' {name} in {form}", found, expected, TOLERANCES[form])


def _run(layers: nn.ModuleList, x: Tensor, *others: object) -> Tensor:
    delta: Tensor | None = None
    for layer in layers:
        x, delta = layer(x, delta, *others)
    return x if delta is None else x + delta


def _layers(form: Form, native: Native, config: TransformerConfig) -> tuple[nn.ModuleList, RMSNorm]:
    with torch.device("cpu"):
        layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    for number, part in enumerate([*layers.modules(), norm]):
        if isinstance(part, Linear | RMSNorm):
            part.requires_grad_(False)
            drawn = _random(*part.weight.shape, seed=number) / 10
            part.weight.copy_((drawn if isinstance(part, Linear) else 1 + drawn).bfloat16())
    for layer in layers:
        layer.mlp.down_proj.settle(form, fine=True, native=native)  # type: ignore[union-attr, operator]
    settle(layers, form, native)
    return layers, norm


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), device="cpu")


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not off <= tolerance:  # nor is NaN
        raise NoKernel(f"the kernel's {name} is off by {off:.1e}")
