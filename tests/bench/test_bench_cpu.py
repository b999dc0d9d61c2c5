"""The CPU benchmark in its smallest form: our engine alone, on the tiny checkpoint, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from api.src.engine.config import CodecConfig, ModelConfig
from tests.bench import cpu, random_checkpoint

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the benchmark reads /proc")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


@pytest.mark.slow
@linux
def test_the_last_line_holds_the_documented_figures(threads: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--smoke", "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    ratios = ("ratio_batch1", "ratio_8_streams", "ratio_8_batched", "memory_ratio")
    assert [figures[name] for name in ratios] == [None] * 4  # nobody to compare with
    assert figures["bound_share_batch1"] is figures["bound_share_8_streams"] is None
    assert min(figures["read_gb_per_s"], *figures["gflop_per_s"].values()) > 0
    assert set(figures["gflop_per_s"]) == {"fp32", "bf16", "int8"}
    names = [f"{streams} at once" for streams in cpu.STREAMS]
    assert list(figures["first_sound_s"]) == names
    assert all(first <= median <= last for first, median, last in figures["first_sound_s"].values())
    assert {f"{form}, {name}" for form in ("fp32", "int8") for name in names} == set(figures["frames_per_s"])
    assert (figures["form"], list(figures["forms"])) == ("fp32", ["fp32", "int8"])
    assert min(figures["frames_per_s"].values()) > 0
    assert figures["peak_mb"]["int8"] >= figures["anonymous_mb"]["int8"] > 10
    assert len(figures["ready_s"]["int8"]) == 2
    for title in ("Medians", "Memory and start", "GB/s"):
        assert title in printed


@pytest.mark.slow
@linux
def test_another_number_of_frames_is_no_figure(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SAMPLES_PER_FRAME", 1919)
    with pytest.raises(RuntimeError, match="2 frames gave"):
        cpu.main(["--smoke", "--threads", str(threads)])


@pytest.mark.parametrize(
    ("size", "kind", "parameters"),
    [
        ("0.6b", "custom_voice", 905_788_672),
        ("0.6b", "base", 914_643_008),
        ("1.7b", "voice_design", 1_916_676_352),
        ("1.7b", "base", 1_928_677_440),
    ],
)
def test_random_checkpoints_have_the_published_number_of_parameters(
    tmp_path: Path, size: str, kind: str, parameters: int
) -> None:
    codec = tmp_path / "speech_tokenizer"
    codec.mkdir()
    (tmp_path / "config.json").write_text(json.dumps(random_checkpoint.model_config(size, kind)))
    (codec / "config.json").write_text(json.dumps(random_checkpoint.codec_config()))
    shapes = random_checkpoint.model_shapes(tmp_path)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    shapes = random_checkpoint.codec_shapes(tmp_path)
    decoder = {name: shape for name, shape in shapes.items() if name.startswith("decoder.")}
    assert (len(decoder), sum(torch.Size(shape).numel() for shape in decoder.values())) == (271, 114_323_137)
    assert len(shapes) == 496
    assert ModelConfig.read(tmp_path).tts_model_type == kind
    assert CodecConfig.read(tmp_path).decoder_config.sliding_window == 72
