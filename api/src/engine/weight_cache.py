"""Quantised weights on the disk: made once, read by every later start.

Owns one file of named tensors: what it must be made of to be taken, its atomic making, and what happens where it cannot
be written. A file counts only if its header is byte for byte the one that would be written now, each tensor only if its
checksum is right: whatever else lies there is not read, and replaced. Does not own what the tensors mean.
The layout is safetensors', written and read tensor by tensor, so that no more than one is in memory twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .quantised import Layout

FOLDER = ".qwen3-tts"
"""Beside a checkpoint's files."""
SUFFIX = ".weights"
"""Not safetensors' own: nothing shall take it for a part of the checkpoint."""
_FORMAT = 1
_NAMES = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
_CHECKSUMS = "checksums"
_ABANDONED_S = 3600
"""Since its last change: whoever wrote a part is gone."""

_log = logging.getLogger(__name__)


def fingerprint(folder: Path, *parts: str) -> str:
    """Changes with the checkpoint's configuration, with its weights, with torch, and with `parts`.

    Of weights the names, sizes and times of change count, as to read gigabytes would take as long as to quantise them.
    """
    digest = hashlib.sha256("\0".join((str(_FORMAT), torch.__version__, *parts)).encode())
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        stat = path.stat()
        digest.update(f"\0{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


class WeightCache:
    """The tensors of `layout`, in their order, in a file `name` + SUFFIX in one of `folders`.

    The first folder that has a right file is read; else `write` takes all tensors, and `close` puts the file into the
    first folder that lets it. No trouble with files is ever an error: there is no cache then.
    """

    def __init__(self, folders: Sequence[Path], name: str, layout: Layout) -> None:
        self._layout = {**layout, _CHECKSUMS: (torch.int64, (len(layout),))}
        self._header, self._begins, self._size = _plan(self._layout, name)
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._part: Path | None = None
        self._sums: dict[str, int] = {}
        self.full = self._open(path / (name + SUFFIX) for path in folders)
        if not self.full:
            self._begin(path / (name + SUFFIX) for path in folders)

    def read(self, name: str) -> Tensor | None:
        """A tensor of the file. None: there is no file, or it is damaged, and the next start makes it anew."""
        if not self.full or self._file is None:
            return None
        tensor = self._tensor(name)
        if tensor is not None and zlib.crc32(_bytes(tensor)) == self._sums[name]:
            return tensor
        _log.warning("%s is damaged and will be made anew by the next start", self._path)
        with contextlib.suppress(OSError):
            assert self._path
            self._path.unlink(missing_ok=True)
        return None

    def write(self, name: str, tensor: Tensor) -> None:
        """A tensor as `layout` has it. Nothing happens where the file is there, or cannot be made."""
        if self.full or self._file is None:
            return
        self._sums[name] = zlib.crc32(_bytes(tensor))
        self._put(name, tensor)

    def close(self) -> None:
        """The file is in its place if all tensors were written, and is gone otherwise."""
        if self._file is not None and not self.full and len(self._sums) == len(self._layout) - 1:
            self._put(_CHECKSUMS, torch.tensor([self._sums[name] for name in list(self._layout)[:-1]]))
            self._finish()
        self._drop()

    # --- reading ---

    def _open(self, paths: Iterable[Path]) -> bool:
        for path in paths:
            try:
                self._file = path.open("rb", buffering=0)
                if os.fstat(self._file.fileno()).st_size == self._size and self._begins_right():
                    self._path = path
                    return True
                _log.info("%s belongs to other weights or to another version", path)
            except OSError:
                pass
            self._drop()
        return False

    def _begins_right(self) -> bool:
        assert self._file
        if self._file.read(len(self._header)) != self._header:
            return False
        sums = self._tensor(_CHECKSUMS)
        if sums is None:
            return False
        self._sums = dict(zip(self._layout, sums.tolist(), strict=False))
        return True

    def _tensor(self, name: str) -> Tensor | None:
        assert self._file
        dtype, shape = self._layout[name]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        rest = _bytes(tensor)
        try:
            self._file.seek(self._begins[name])
            while rest:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    return None
                rest = rest[count:]
        except OSError:
            return None
        return tensor

    # --- writing ---

    def _begin(self, paths: Iterable[Path]) -> None:
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
            except OSError as error:
                _log.info("%s takes no quantised weights: %s", path.parent, error)
                continue
            self._file, self._path, self._part = os.fdopen(handle, "w+b"), path, Path(part)
            self._attempt(lambda file: file.write(self._header))
            return

    def _put(self, name: str, tensor: Tensor) -> None:
        def put(file: BinaryIO) -> None:
            file.seek(self._begins[name])
            file.write(_bytes(tensor))

        self._attempt(put)

    def _attempt(self, action: Callable[[BinaryIO], object]) -> None:
        if self._file is None:
            return
        try:
            action(self._file)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)
            self._drop()

    def _finish(self) -> None:
        if self._file is None or self._part is None or self._path is None:
            return
        try:
            os.fchmod(self._file.fileno(), 0o644)
            self._file.close()
            self._part.replace(self._path)
            self._part = None
            _prune(self._path)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
            self._part = None


def _plan(layout: Layout, key: str) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, where each tensor begins, and the file's size."""
    header: dict[str, object] = {"__metadata__": {"made_for": key}}
    places, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + begin for name, begin in places.items()}, len(first) + end


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _prune(path: Path) -> None:
    """Beside a checkpoint, what an earlier version of it or of torch has left of the same form."""
    if path.parent.name == FOLDER:
        form = path.name.split("-")[0]
        for other in path.parent.glob(f"{form}-*{SUFFIX}"):
            if other != path:
                other.unlink(missing_ok=True)
    for part in path.parent.glob("*.part"):
        if time.time() - part.stat().st_mtime > _ABANDONED_S:
            part.unlink(missing_ok=True)
