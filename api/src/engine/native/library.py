"""The compiled kernel: where it lies, how it is made, and its functions.

Owns the C sources' compilation by the machine's own compiler for its own processor, and the file that is kept. Does not
own what the functions are given (products.py, stack.py), nor whether they are right (check.py).
The file is code that this process runs: it is only ever taken from a folder that the user alone can write to, and its
name has the digest of all that it was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EngineError
from ..processor import processor

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-shared", "-fvisibility=hidden")
_MAIN = "decoder.c"
_COMPILE_S = 120.0
_KEPT = 4
"""Files of other versions and processors, such as of machines that share a home."""

_log = logging.getLogger(__name__)


class NoKernel(EngineError):
    """The kernel cannot be had on this machine; says why."""


def load(folder: Path | None, *, compilers: tuple[str, ...] = COMPILERS, sources: Path = SOURCES) -> ctypes.CDLL:
    """The functions of decoder.c, from `folder`, where it is kept, or compiled anew. None: it is not kept.

    Raises:
        NoKernel: no compiler, or none that compiles it.
    """
    reasons = []
    for compiler in filter(None, map(shutil.which, compilers)):
        try:
            return _declared(_loaded(folder, compiler, sources))
        except (OSError, subprocess.SubprocessError, NoKernel) as error:
            reasons.append(f"{compiler}: {error}")
    raise NoKernel("; ".join(reasons) or "there is no C compiler")


def _loaded(folder: Path | None, compiler: str, sources: Path) -> ctypes.CDLL:
    with _folder(folder) as place:
        path = place / f"decoder-{_digest(compiler, sources)}.so"
        if not _own(path):
            _compile(compiler, sources, path)
        return ctypes.CDLL(str(path))


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    """`folder` if only this user can write to it, else one that is gone afterwards: what is loaded stays."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if _own(folder) and os.access(folder, os.W_OK):
                yield folder
                return
    with tempfile.TemporaryDirectory(prefix="qwen3-tts-") as passing:
        yield Path(passing)


def _own(path: Path) -> bool:
    """Whether it is there, this user's, and no one else's to write."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return not hasattr(os, "geteuid") or (stat.st_uid == os.geteuid() and not stat.st_mode & 0o022)


def _digest(compiler: str, sources: Path) -> str:
    version = _run([compiler, "--version"], 10.0)
    digest = hashlib.sha256("\0".join((version, *_flags(), processor())).encode())
    for path in sorted([*sources.glob("*.c"), *sources.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    tune = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return (*FLAGS, tune)


def _compile(compiler: str, sources: Path, path: Path) -> None:
    """Whoever starts at the same time makes the same file; the last one stays."""
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        _log.info("compiling %s with %s", _MAIN, compiler)
        _run([compiler, *_flags(), str(sources / _MAIN), "-o", part, "-lm", "-lpthread"], _COMPILE_S)
        os.chmod(part, 0o700)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
    _prune(path)


def _prune(path: Path) -> None:
    with contextlib.suppress(OSError):
        kept = sorted(path.parent.glob("decoder-*.so"), key=lambda other: other.stat().st_mtime)
        for old in kept[:-_KEPT]:
            old.unlink(missing_ok=True)


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    if done.returncode:
        first = next(iter(done.stderr.strip().splitlines()), "")
        raise NoKernel(f"{Path(command[0]).name} ends with {done.returncode}: {first}")
    return done.stdout


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The functions' signatures; pointers are addresses."""
    number, address = ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[list[type], type | None]] = {
        "packed_bytes": ([number] * 3, number),
        "pack_int8": ([address, number, number, address, address], None),
        "multiplies_floats": ([], ctypes.c_bool),
        "pack_exact": ([address, number, number, address], ctypes.c_bool),
        "product_scratch": ([address, number], number),
        "multiply": ([address, address, number, address, address, address], None),
        "step_scratch": ([address, number, number], number),
        "run_step": ([address, address, address], None),
        "pool_new": ([number], address),
        "pool_free": ([address], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
