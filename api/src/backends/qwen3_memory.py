"""Whether a checkpoint fits into memory: asked before gigabytes are read, answered in bytes.

Owns the estimate of what is needed and the reading of what is free. An estimate errs to the careful side by some
percent; what it prevents is a process killed in the middle of a sentence.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..engine.config import ModelConfig
from ..engine.linear import Form
from ..errors import NotReady

CODEC_SLOT_BYTES = 6_000_000
"""State of the codec's decoder for one stream: 5.2 MB in float32."""

WORKING_BYTES = 300_000_000
"""What torch itself and the largest step take beside weights and slots."""

GPU_WORKING_BYTES = 2_000_000_000
"""The same on a GPU: libraries' workspaces and more than a hundred graphs. Not measured yet, hence generous."""

QUANTISED_SHARE: dict[Form, float] = {"int8": 0.6, "int4": 0.4}
"""Of 16 bits; what is small in the model stays at them."""

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def require(name: str, needed: int, device: str) -> None:
    """Raise NotReady if `needed` bytes for the checkpoint `name` are not free. What is not known is not refused."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NotReady(
            f"{name} needs about {_gigabytes(needed)} on {device}, and {_gigabytes(free)} are free. "
            "TTS_SLOTS can be lowered, or a smaller model chosen."
        )


def needed_bytes(
    folder: Path,
    config: ModelConfig,
    *,
    slots: int,
    positions: int,
    dtype: torch.dtype,
    device: str,
    weights: Form = "fp32",
) -> int:
    """Weights as they will lie in memory, keys and values of all slots, codec states."""
    talker = config.talker_config
    width = dtype.itemsize
    keys = 2 * talker.num_hidden_layers * talker.num_key_value_heads * talker.head_dim * width
    # On a CPU that has kernels for them, weights stay at 16 bits whatever the dtype.
    narrow = device == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
    scale = 1.0 if narrow else width / 2
    working = WORKING_BYTES if device == "cpu" else GPU_WORKING_BYTES
    language_model = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    table = talker.text_vocab_size * talker.text_hidden_size * 2  # which is never quantised
    if narrow and weights in QUANTISED_SHARE and language_model > table:
        language_model = table + int((language_model - table) * QUANTISED_SHARE[weights])
    codec = sum(path.stat().st_size for path in (folder / "speech_tokenizer").glob("*.safetensors"))
    return int(language_model * scale) + codec + slots * (keys * positions + CODEC_SLOT_BYTES) + working


def free_bytes(device: str) -> int | None:
    """What can still be taken on `device`; None if unknown. In a container, its limit counts."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None
    known = [free for free in (_machine_free(), _container_free()) if free is not None]
    return min(known, default=None)


def _machine_free() -> int | None:
    """MemAvailable: free, or taken by caches that give way."""
    if not _MEMINFO.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _container_free() -> int | None:
    """What the control group (version 2) leaves; file caches count as free, as they give way."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        caches = re.search(
            r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(encoding="ascii"), re.MULTILINE
        )
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + (int(caches[1]) if caches else 0))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
