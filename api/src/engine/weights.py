"""Filling modules with a checkpoint's tensors.

Owns the safetensors files (single or sharded) and the matching of names: a module's parameters and buffers carry the
checkpoint's names, packed parameters say which names fill which part of them. Does not own what a module is.
Memory: tensors are read into their place, or converted there one by one. Files are not mapped, as the pages of a
mapping count as this process's memory until it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import INDEX, SINGLE
from .errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Packed(Protocol):
    """A module whose parameter holds several of the checkpoint's tensors."""

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's name, relative to this module's parent, and the view of the parameter that it fills."""
        ...


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: BinaryIO
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of one folder, by name; a context manager that keeps the files open.

    Raises:
        CheckpointError: no weights in the folder, a missing shard, a file that is truncated or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, Stored] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            for path in _files(self.folder):
                self._stored.update(_contents(path, stack.enter_context(path.open("rb", buffering=0))))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stored.clear()
        self._stack.close()

    def names(self, prefix: str = "") -> set[str]:
        return {name for name in self._stored if name.startswith(prefix)}

    def stored(self, name: str) -> Stored:
        """What is known of a tensor before it is read."""
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        return self._stored[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as it is stored, on the CPU: a copy of its own."""
        _, _, dtype, shape = self.stored(name)
        return self.read(name, torch.empty(shape, dtype=dtype, device="cpu"))

    def read(self, name: str, place: Tensor) -> Tensor:
        """The tensor into `place`, which has its shape: straight, if dtype and layout allow it, else converted."""
        file, begin, dtype, _ = self.stored(name)
        if place.dtype != dtype or place.device.type != "cpu" or not place.is_contiguous():
            return place.copy_(self.tensor(name))
        rest = memoryview(place.detach().view(-1).view(torch.uint8).numpy().data)
        try:
            file.seek(begin)
            while rest:
                if not (count := file.readinto(rest)):  # type: ignore[attr-defined]
                    raise OSError("the file has become shorter")
                rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from error
        return place


def load(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str = "",
    *,
    ignore: tuple[str, ...] = (),
    ready: Callable[[nn.Module], bool] = lambda part: False,
    filled: Callable[[nn.Module], object] = lambda part: None,
) -> None:
    """Fill every parameter and buffer of `module` from the tensors named `prefix` + its own name.

    Converts to the destination's dtype and device. `ignore`: prefixes (after `prefix`) of tensors that are not for it.
    `ready` is asked of each part of `module` whether it has what it needs already: none of its own tensors is read
    then. `filled` is called with each other part as soon as its own tensors are in.

    Raises:
        CheckpointError: a tensor that is missing, has another shape, or that nobody asked for under `prefix`.
    """
    parts = [
        (part, {prefix + name: place for name, place in _own_places(path, part)})
        for path, part in module.named_modules()
    ]
    wanted = {name for _, own in parts for name in own}
    stored = {name for name in checkpoint.names(prefix) if not name.removeprefix(prefix).startswith(ignore or ("\0",))}
    _complain(checkpoint, "lacks", sorted(wanted - stored))
    _complain(checkpoint, "has unexpected", sorted(stored - wanted))
    with torch.no_grad():
        while parts:  # taken apart, as a view would keep alive the weight that `filled` replaces
            part, own = parts.pop(0)
            if ready(part):
                continue
            while own:
                _fill(*own.popitem(), checkpoint)
            filled(part)


def _fill(name: str, place: Tensor, checkpoint: Checkpoint) -> None:
    shape = checkpoint.stored(name).shape
    if place.shape != shape:
        shapes = f"{shape} in {checkpoint.folder}, {tuple(place.shape)} by its config.json"
        raise CheckpointError(f"{name} is {shapes}")
    checkpoint.read(name, place)


def places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name, relative to `module`, and place of each tensor that fills it."""
    for path, part in module.named_modules():
        yield from _own_places(path, part)


def _own_places(path: str, part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Packed):
        parent = path.rpartition(".")[0]
        yield from ((_join(parent, name), place) for name, place in part.parts())
    else:
        yield from ((_join(path, name), place) for name, place in part.named_parameters(recurse=False))
        yield from ((_join(path, name), place) for name, place in part.named_buffers(recurse=False))


def empty(build: Callable[[], M], dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> M:
    """`build()` with uninitialised weights, in `dtype` if one is given, on `device`; nothing is held twice."""
    with torch.device("meta"):
        module = build()
    if dtype is not None:
        module = module.to(dtype)
    return module.to_empty(device=device).requires_grad_(False).eval()


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        index: Mapping[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error!r}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names")
    return [folder / name for name in names]


def _contents(path: Path, file: BinaryIO) -> dict[str, Stored]:
    try:
        with safe_open(str(path), framework="pt", device="cpu"):  # checks that all of it is there
            start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
    header.pop("__metadata__", None)
    try:
        return {
            name: Stored(file, start + each["data_offsets"][0], DTYPES[each["dtype"]], tuple(each["shape"]))
            for name, each in header.items()
        }
    except KeyError as error:
        raise CheckpointError(f"{path} has tensors of the type {error}, which no checkpoint has") from None


def _complain(checkpoint: Checkpoint, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(f"{checkpoint.folder} {what} tensors: {', '.join(names[:3])}{more}")


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
