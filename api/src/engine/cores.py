"""How many cores this process may use: by its affinity, its control group's share of time, and OMP_NUM_THREADS."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def usable_cores(root: Path = _ROOT) -> int:
    """At least 1. A quota of 1.5 cores counts as 2."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min([allowed, *_quotas(root), *([int(wanted)] if wanted.isdecimal() else [])]))


def _quotas(root: Path) -> list[int]:
    """Of both versions of control groups, as they are seen inside a container; those that are set."""
    quotas = []
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                quotas.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue
    return quotas
