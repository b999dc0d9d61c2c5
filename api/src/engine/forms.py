"""Which weights of a model are held in which form, while they are loaded, and their cache.

Owns the policy. The decoder layers, nearly all of what a frame reads, take the wanted form. The heads, the text's
projection and what leads into the code predictor stay exact: they are a fiftieth of what a frame reads, and what they
lost would go straight into the choice of a code. In int8, the rows that come out of SwiGLU keep 16 bits: with 8, their
products lost three times as much as all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from .linear import Form, Linear
from .native.products import Native
from .quantised import Codes, Layout, Quantiser, quantised
from .weight_cache import FOLDER, WeightCache, fingerprint

Progress = Callable[[int, int], object]
"""(weights done, of how many)."""


def ignore(done: int, total: int) -> None:
    """As Progress, of which nobody is told."""


_LAYERS = "layers."
_AFTER_SWIGLU = "down_proj"


class Settler:
    """Gives each Linear of `module` its form as soon as it is loaded, or before, from the cache.

    A context manager around the loading: `ready` and `filled` are what `weights.load` asks. `cache`: folders for
    quantised weights, the first that can be used; see `cache_folders`. `native`: the CPU's kernel, if it is there.
    """

    def __init__(
        self,
        module: nn.Module,
        form: Form = "fp32",
        *,
        checkpoint: Path | None = None,
        cache: Sequence[Path] = (),
        progress: Progress = ignore,
        native: Native | None = None,
    ) -> None:
        self._form, self._progress, self._native = form, progress, native
        self._kinds: dict[Linear, tuple[str, Quantiser]] = {}
        self._chosen: set[Linear] = set()
        for path, part in module.named_modules():
            if isinstance(part, Linear) and _LAYERS in path:
                self._chosen.add(part)
                on_cpu = part.weight.device.type == "cpu" and part.weight.dtype == torch.float32
                fine = path.endswith(_AFTER_SWIGLU)
                if on_cpu and (kind := quantised(form, *part.weight.shape, fine=fine, native=native)):
                    self._kinds[part] = path, kind
        self._done, self._total = 0, len(self._kinds)
        self._cache: WeightCache | None = None
        if checkpoint is not None and cache and self._kinds:
            self._cache = WeightCache(cache, f"{form}-{fingerprint(checkpoint, form)}", self._layout())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cache is not None:
            self._cache.close()

    def ready(self, part: nn.Module) -> bool:
        """Whether `part` has its weight already and needs none of the checkpoint's."""
        if self._cache is None or not isinstance(part, Linear) or part not in self._kinds or part.bias is not None:
            return False
        path, kind = self._kinds[part]
        codes: Codes = {}
        for name in kind.layout(*part.weight.shape) or ():
            tensor = self._cache.read(f"{path}.{name}")
            if tensor is None:
                return False
            codes[name] = tensor
        part.adopt(kind(codes, None))
        self._count()
        return True

    def filled(self, part: nn.Module) -> None:
        """The checkpoint's weights of `part` are in."""
        if not isinstance(part, Linear):
            return
        if part not in self._kinds:
            part.settle(self._form if part in self._chosen else "fp32", native=self._native)
            return
        path, kind = self._kinds[part]
        codes = part.quantise(kind)
        if codes is None:
            part.settle(native=self._native)
        elif self._cache is not None:
            for name, tensor in codes.items():
                self._cache.write(f"{path}.{name}", tensor)
        self._count()

    def _count(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)

    def _layout(self) -> Layout:
        return {
            f"{path}.{name}": what
            for part, (path, kind) in self._kinds.items()
            for name, what in (kind.layout(*part.weight.shape) or {}).items()
        }


def cache_folders(checkpoint: Path, other: Path | None = None) -> list[Path]:
    """Beside the checkpoint, else in `other`."""
    return [checkpoint / FOLDER, *([other] if other else [])]
