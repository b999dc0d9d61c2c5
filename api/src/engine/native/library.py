"""C sources of this folder as libraries in the process, compiled for the machine at hand by its own C compiler.

Owns the compiling, where libraries are kept, and when one that is kept may be taken. Does not own what is in them
(products.py, stack.py, ../codec_parts.py), nor whether they are right (check.py).
A library is code that this process runs: it is only ever taken from a folder that the user alone can write to. Its name
has the digest of all that it was made from, so that a home folder which several machines share cannot bring
instructions that the processor lacks.
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

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC", "-shared", "-fvisibility=hidden")
_COMPILE_S = 120.0
_KEPT = 4
"""Libraries of other versions and processors."""
_SUM_BYTES = 32

_log = logging.getLogger(__name__)


class NoKernel(EngineError):
    """A library cannot be had on this machine; says why."""


def user_folder() -> Path | None:
    """Where a user's programs keep what they can make again. None: a user without a home."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwen3-tts"
    return None


def load(source: Path, folder: Path | None, *, compilers: tuple[str, ...] = COMPILERS) -> ctypes.CDLL:
    """`source`, with the headers beside it, from `folder`, where it is kept, or compiled anew. None: it is not kept.

    Raises:
        NoKernel: no compiler, or none that compiles it.
    """
    reasons = []
    for compiler in filter(None, map(shutil.which, compilers)):
        try:
            with _writable(folder) as place:
                path = place / f"{source.stem}-{_digest(compiler, source)}.so"
                return _kept(path) or _compiled(compiler, source, path)
        except (OSError, subprocess.SubprocessError, NoKernel) as error:
            reasons.append(f"{compiler}: {error}")
    raise NoKernel("; ".join(reasons) or "there is no C compiler")


@contextmanager
def _writable(folder: Path | None) -> Iterator[Path]:
    """`folder` if only this user can write to it, else one that is gone afterwards: what is loaded stays."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def _kept(path: Path) -> ctypes.CDLL | None:
    """None: it is not there, or it is damaged, which to load could end the process."""
    with contextlib.suppress(OSError):
        content = path.read_bytes() if _own(path) else b""
        if content[-_SUM_BYTES:] == _sum(content[:-_SUM_BYTES]):
            return ctypes.CDLL(str(path))
    return None


def _compiled(compiler: str, source: Path, path: Path) -> ctypes.CDLL:
    """Whoever starts at the same time makes the same file; the last one stays."""
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        _log.info("compiling %s with %s", source.name, compiler)
        _run([compiler, *_flags(), str(source), "-o", part, "-lm", "-lpthread"], _COMPILE_S)
        with open(part, "rb+") as file:
            file.write(_sum(file.read()))  # behind what loaders read
        os.chmod(part, 0o700)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)
    _prune(path.parent, source.stem)
    return ctypes.CDLL(str(path))


def _prune(folder: Path, stem: str) -> None:
    with contextlib.suppress(OSError):
        kept = sorted(folder.glob(f"{stem}-*.so"), key=lambda other: other.stat().st_mtime)
        for old in kept[:-_KEPT]:
            old.unlink(missing_ok=True)


def _digest(compiler: str, source: Path) -> str:
    version = _run([compiler, "--version"], 10.0)
    digest = hashlib.sha256("\0".join((version, *_flags(), processor())).encode())
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return (*FLAGS, "-march=native" if x86 else "-mcpu=native")


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise NoKernel(f"{Path(command[0]).name} ends with {done.returncode}: {said}")
    return done.stdout


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
