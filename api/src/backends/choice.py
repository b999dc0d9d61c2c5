"""Which backend speaks, and why: asked for by name, or chosen by what this machine has.

Owns the decision alone; building what was chosen is main's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..errors import NotReady

BackendName = Literal["embedded", "qwen3", "remote"]
Asked = Literal["auto", "embedded", "qwen3", "remote"]

GPU_MODEL = "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice"
CPU_MODEL = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of these is there where a driver is: NVIDIA's, the one of Windows' subsystem for Linux, AMD's."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`reason` is a sentence for people. `models` and `device` are Qwen3-TTS's."""

    backend: BackendName
    reason: str
    models: tuple[str, ...] = ()
    device: str = "cpu"


def choose(asked: Asked, models: Sequence[str], device: str) -> Choice:
    """Decide on what was asked for. `models` may be empty and `device` "auto": both are chosen then.

    With "auto", Qwen3-TTS speaks where there are a GPU and weights, on this machine or within reach; else the embedded
    voice does. May ask the hub, for some seconds at most.

    Raises:
        NotReady: Qwen3-TTS is asked for, and torch is not installed.
    """
    if asked == "embedded":
        return Choice("embedded", "The embedded voice is asked for.")
    if asked == "remote":
        return Choice("remote", "A remote server is asked for.")
    installed = find_spec("torch") is not None
    if asked == "qwen3" and not installed:
        raise NotReady("Qwen3-TTS needs torch and more: make setup-qwen3 installs it.")
    gpu = _gpu() if installed else None
    chosen = (gpu or "cpu") if device == "auto" else device
    names = tuple(models) or (CPU_MODEL if chosen == "cpu" else GPU_MODEL,)
    if asked == "qwen3":
        return Choice("qwen3", "Qwen3-TTS is asked for.", names, chosen)
    if not installed:
        return Choice("embedded", "Qwen3-TTS is not installed (make setup-qwen3 does it).")
    if gpu is None:
        return Choice("embedded", "There is no GPU. (TTS_BACKEND=qwen3 speaks with Qwen3-TTS on the CPU.)")
    if missing := _out_of_reach(names):
        return Choice("embedded", f"The weights of {missing} are not here, and cannot be downloaded.")
    return Choice("qwen3", f"There are a GPU and the weights of {', '.join(names)}.", names, chosen)


def _gpu() -> str | None:
    if sys.platform == "linux" and not any(Path(name).exists() for name in GPU_FILES):
        return None  # without torch, which takes seconds and hundreds of megabytes to say the same
    import torch  # only where it is installed

    return "cuda:0" if torch.cuda.is_available() else None


def _out_of_reach(names: Sequence[str]) -> str | None:
    from . import qwen3_hub  # needs the extra, which is installed by now

    for name in names:
        try:
            here = qwen3_hub.find(name) is not None
        except NotReady:
            return name
        if not (here or qwen3_hub.can_download(name)):
            return name
    return None
