"""What loading owes a CPU: the cores that may be used, steps that are not too long, and no mapped files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from api.src.engine.config import PredictorConfig
from api.src.engine.cores import usable_cores
from api.src.engine.loading import load_model
from api.src.engine.messages import Limits
from api.src.engine.slots import KeyValues
from api.src.engine.weights import Checkpoint
from tests.engine.checkpoints import tiny


@pytest.fixture(autouse=True)
def keep_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_cores_are_those_of_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert usable_cores(tmp_path) == 6


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "nonsense"}, 6),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
    ],
)
def test_a_control_group_may_allow_less(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("wanted", "cores"), [("2", 2), ("9", 6), ("0", 1), ("", 6), ("2,1", 6)])
def test_whoever_starts_the_server_may_want_less(tmp_path, monkeypatch, wanted, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert usable_cores(tmp_path) == cores


def test_the_engines_thread_uses_the_threads_it_was_given():
    model = load_model(tiny("custom_voice"), slots=1, threads=3)
    torch.set_num_threads(1)  # whatever else this process does meanwhile
    seen, looked = [], threading.Event()

    def look(steps):
        seen.append(torch.get_num_threads())
        looked.set()

    model.engine.start()
    model.engine._post(look)
    assert looked.wait(10)
    assert model.engine.stop(10)
    assert seen == [3]


def test_prompts_of_a_step_are_bounded_on_a_cpu():
    limits = Limits(slots=2, prompt_tokens=1000, chunk_frames=5)
    used = load_model(tiny("custom_voice"), slots=2, limits=limits).engine._stepper.scheduler.limits
    assert used.prompt_tokens < 100
    assert used.chunk_frames == 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_reading_maps_no_file(tmp_path):
    stored = {"half": torch.randn(3, 5).bfloat16(), "one": torch.tensor(2.5), "none": torch.empty(0, 4)}
    save_file(stored, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        read = {name: checkpoint.tensor(name) for name in stored}
        wide = checkpoint.read("half", torch.empty(3, 10)[:, ::2])
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(torch.equal(read[name], stored[name]) and read[name].dtype == stored[name].dtype for name in stored)
    assert torch.equal(wide, stored["half"].float())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_arenas_take_memory_only_where_they_are_written_to():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    arena = KeyValues(PredictorConfig(num_hidden_layers=4), 8, 512, torch.empty(0))
    assert arena.keys.nbytes == 2**26
    for part in (arena.keys, arena.values):
        part[:, :, :, :3] = 1.0
        assert part[0, 0, 0, 3, 0] == 0.0
    assert resident() - before < 2**24
