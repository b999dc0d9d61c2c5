"""Fused kernels without a GPU: interpreted beside torch's operations, and compiled for GPUs in the models' real shapes.

kernel_cases.py has the comparisons, as they run on a GPU too (tests/gpu).
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from api.src.engine import kernels
from api.src.engine.config import TransformerConfig
from api.src.engine.errors import EngineError
from api.src.engine.kernels import FUSED, PLAIN, Way
from api.src.engine.language_model import LanguageModel
from api.src.engine.layers import DecoderLayer, Rotation, rotations, use
from api.src.engine.slots import KeyValues
from tests.engine.checkpoints import tiny

SHAPES = {
    "talker 1.7B": TransformerConfig(3072, 2048, 6144, 28, 16, 8, 128),
    "talker 0.6B": TransformerConfig(3072, 1024, 3072, 28, 16, 8, 128),
    "code predictor": TransformerConfig(2048, 1024, 3072, 5, 16, 8, 128),
}
GPUS = [80, 89, 90]
"""Compute capabilities: A100, RTX 4090 and L4, H100 and H200."""
REGISTERS = 65_536
"""Of a multiprocessor."""
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32", float: "fp32"}
NO_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import api.src.engine
for module in pkgutil.iter_modules(api.src.engine.__path__):
    importlib.import_module(f"api.src.engine.{module.name}")
from api.src.engine import kernels
try:
    kernels.load()
except ImportError:
    print("refused")
"""


# --- interpreted ---


@pytest.mark.slow
def test_interpreted_they_are_torch_s_operations() -> None:
    """Within the tolerances of kernel_cases.py, in a process whose Triton interprets."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engine/kernel_cases.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^\d\d+ passed in", done.stdout, re.MULTILINE), done.stdout[-500:]  # and none was skipped


# --- compiled ---


class Launches:
    """In a kernel's place: what it would have been started with."""

    def __init__(self, made: list[tuple[Any, tuple[int, ...], tuple[Any, ...], int]], kernel: Any) -> None:
        self.made, self.kernel = made, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, num_warps: self.made.append((self.kernel, grid, args, num_warps))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled where it is interpreted")
    kernels.load()
    made: list[Any] = []
    for name in ("_add_norm", "_swiglu", "_attend"):
        monkeypatch.setattr(kernels, name, Launches(made, getattr(kernels, name)))
    return made


class Counted(TorchDispatchMode):
    """Operations that start at least one kernel on a GPU, by name: not those that only make views or take memory."""

    FREE = re.compile(
        r"_?(unsafe_)?view|reshape|expand|slice|select|transpose|permute|t|split(_with_sizes)?|(un)?squeeze|flatten"
        r"|alias|detach|new_empty|empty(_like)?|unbind|chunk"
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not self.FREE.fullmatch(name):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Layer:
    """A decoder layer of real size without memory for it: its steps can be counted, not computed."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, rows: int, positions: int) -> None:
        like = torch.empty(0, dtype=dtype, device="meta")
        with torch.device("meta"):
            self.layer = DecoderLayer(config, 0).to(dtype).requires_grad_(False)
            self.arena = KeyValues(config, rows, positions, like)
            self.x, self.delta = torch.empty(2, 2 * rows, config.hidden_size, dtype=dtype)
            self.index = torch.zeros(rows, dtype=torch.int64)
            table = rotations(config, positions, like)
        self.rows, self.config, self.positions, self.counted = rows, config, positions, Counted()
        self.table = Rotation(*(part.to("meta") for part in table))

    def step(self, way: Way) -> None:
        use(self.layer, way.arithmetic)
        memory = way.step_memory(self.arena, self.index, self.index, (), self.positions)
        self._run(1, self.table.at(self.index), memory)

    def frame(self, way: Way) -> None:
        use(self.layer, way.arithmetic)
        memory: Any = way.frame_memory(self.arena, self.rows)
        self._run(2, self.table.at(self.index.repeat(2)), memory)
        memory.advance(2)
        self._run(1, Rotation(self.table.cos[2], self.table.sin[2]), memory)

    def _run(self, new: int, rotation: Rotation, memory: Any) -> None:
        rows = new * self.rows
        with self.counted:
            self.layer(self.x[:rows], self.delta[:rows], rotation, memory)


def compiled(kernel: Any, args: tuple[Any, ...], warps: int, gpu: int) -> Any:
    """As Triton would compile it on such a GPU for a launch with `args`."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {(place,): arg for place, arg in enumerate(args) if arg is None or kernel.params[place].is_constexpr}
    signature = {
        name: "constexpr" if (place,) in constants else TYPES[getattr(arg, "dtype", type(arg))]
        for place, (name, arg) in enumerate(zip(names, args, strict=True))
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, arg) in enumerate(zip(names, args, strict=True))
        if signature[name].startswith("*") or (isinstance(arg, int) and signature[name] == "i32" and arg % 16 == 0)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return compile_source(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps})


def usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread and bytes of its stack, to which registers spill."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", told)}


@pytest.mark.parametrize("gpu", [GPUS[0], *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in GPUS[1:])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_they_compile_for_gpus_in_real_shapes(
    launches: list[Any],
    name: str,
    dtype: torch.dtype,
    gpu: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all that a thread holds in registers, and as many of those as a multiprocessor has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    predictor = name == "code predictor"
    layer = Layer(SHAPES[name], dtype, rows=64, positions=16 if predictor else 1024)
    (layer.frame if predictor else layer.step)(FUSED)
    distinct = {
        (kernel.__name__, args[-7:] if "attend" in kernel.__name__ else args[-2:]): (kernel, args, warps)
        for kernel, _, args, warps in launches
    }
    assert len(distinct) == (4 if predictor else 3)
    for kernel, args, warps in distinct.values():
        made = compiled(kernel, args, warps, gpu)
        assert made.asm["cubin"].startswith(b"\x7fELF")
        used = usage(made.asm["cubin"], tmp_path)
        print(f"sm_{gpu} {dtype} {name} {kernel.__name__}: {used}, {made.metadata.shared} bytes shared, {warps} warps")
        assert used["STACK"] == 0
        assert used["REG"] * 32 * warps <= REGISTERS
        assert made.metadata.shared <= 48 * 1024


# --- how many ---


@pytest.mark.parametrize(("name", "kind"), [("talker 1.7B", "step"), ("code predictor", "frame")])
def test_a_layer_is_eight_kernels(launches: list[Any], name: str, kind: str) -> None:
    """Four products of matrices and four of ours, where torch's operations are more than twice as many."""
    layer = Layer(SHAPES[name], torch.bfloat16, rows=4, positions=16)
    passes = 2 if kind == "frame" else 1
    found = {}
    for way in (FUSED, PLAIN):
        layer.counted.found.clear()
        with torch.inference_mode():
            getattr(layer, kind)(way)
        found[way.name] = dict(layer.counted.found)
    print(f"{name}, {passes} passes: {found}")
    assert found[FUSED.name] == {"linear": 4 * passes}
    assert len(launches) == 4 * passes
    assert sum(found[PLAIN.name].values()) > 16 * passes


# --- the choice ---


def test_no_triton_is_needed_until_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TRITON], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"


@cache
def _model() -> LanguageModel:
    return LanguageModel.load(tiny("custom_voice"))


def test_a_cpu_has_torch_s_operations() -> None:
    model = _model()
    assert model.way is PLAIN
    assert kernels.chosen(model.config.talker_config, model.weight) is PLAIN


@pytest.mark.parametrize(("place", "error"), [("load", ImportError("no triton")), ("check", EngineError("off by 1"))])
def test_a_gpu_whose_kernels_fail_has_torch_s_operations(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(kernels, "load", lambda: None)
    monkeypatch.setattr(kernels, "check", lambda *_: None)
    weight: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    config = _model().config.talker_config
    assert kernels.chosen(config, weight) is FUSED
    monkeypatch.setattr(kernels, place, fail)
    with caplog.at_level(logging.WARNING):
        assert kernels.chosen(config, weight) is PLAIN
    assert [str(error) in record.getMessage() for record in caplog.records] == [True]
