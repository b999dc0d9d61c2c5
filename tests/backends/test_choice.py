"""Which backend is chosen, and which reason is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.src.backends import choice
from api.src.backends.choice import CPU_MODEL, GPU_MODEL, choose
from api.src.errors import NotReady

pytest.importorskip("torch")
from api.src.backends import qwen3_hub


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what the machine is to have."""

    def has(*, installed: bool = True, gpu: bool = True, here: bool = False, hub: bool = True) -> None:
        monkeypatch.setattr(choice, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(choice, "_gpu", lambda: "cuda:0" if gpu else None)
        monkeypatch.setattr(qwen3_hub, "find", lambda name: Path(name) if here else None)
        monkeypatch.setattr(qwen3_hub, "can_download", lambda name: hub)

    return has


def test_who_asks_for_a_backend_gets_it(machine: Any) -> None:
    machine(gpu=True, here=True)
    assert choose("embedded", [], "auto").backend == "embedded"
    machine(gpu=False, hub=False)
    chosen = choose("qwen3", ["some/folder"], "auto")
    assert (chosen.backend, chosen.models, chosen.device) == ("qwen3", ("some/folder",), "cpu")


def test_qwen3_without_torch_is_an_error_that_says_what_to_do(machine: Any) -> None:
    machine(installed=False)
    with pytest.raises(NotReady, match="make setup-qwen3"):
        choose("qwen3", [], "auto")


@pytest.mark.parametrize(
    ("has", "backend", "words"),
    [
        ({"installed": False}, "embedded", "not installed"),
        ({"gpu": False}, "embedded", "no GPU"),
        ({"here": False, "hub": False}, "embedded", "cannot be downloaded"),
        ({"here": True, "hub": False}, "qwen3", "a GPU and the weights"),
        ({"here": False, "hub": True}, "qwen3", "a GPU and the weights"),
    ],
)
def test_auto_goes_by_the_machine(machine: Any, has: dict[str, bool], backend: str, words: str) -> None:
    machine(**has)
    chosen = choose("auto", [], "auto")
    assert chosen.backend == backend
    assert words in chosen.reason
    if backend == "qwen3":
        assert (chosen.models, chosen.device) == ((GPU_MODEL,), "cuda:0")


def test_every_checkpoint_must_be_within_reach(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(here=False)
    monkeypatch.setattr(qwen3_hub, "can_download", lambda name: name == "a/b")
    assert choose("auto", ["a/b"], "auto").backend == "qwen3"
    assert "c/d" in choose("auto", ["a/b", "c/d"], "auto").reason


def test_the_default_checkpoint_fits_the_device(machine: Any) -> None:
    machine(gpu=True)
    assert choose("qwen3", [], "auto").models == (GPU_MODEL,)
    assert choose("qwen3", [], "cpu").models == (CPU_MODEL,)
    assert choose("qwen3", [], "cpu").device == "cpu"
    machine(gpu=False)
    assert choose("qwen3", [], "auto").models == (CPU_MODEL,)


def test_a_name_that_means_nothing_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_gpu", lambda: "cuda:0")
    assert choose("auto", ["no such folder"], "auto").backend == "embedded"


def test_this_machine_s_own_gpu_is_what_torch_says() -> None:
    import torch

    assert (choice._gpu() is not None) == torch.cuda.is_available()


@pytest.mark.skipif(any(Path(name).exists() for name in choice.GPU_FILES), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_does_not_load_torch_to_see_that() -> None:
    script = """
import sys
from api.src.backends.choice import choose
choose("auto", [], "auto")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
