"""What processor this is: what is measured or compiled for one must not be taken for another."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def processor() -> str:
    """Its name and its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(sorted(set(kept)))
    return platform.processor() or platform.machine()
