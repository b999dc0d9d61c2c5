"""The codec decoder's residual units and activation in C: torch's sound, each stream by itself, else torch."""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from api.src.engine import codec_layers, codec_tail
from api.src.engine.codec import CodecDecoder, CodecState
from api.src.engine.codec_layers import ResidualUnit, SnakeBeta, TailLayout
from api.src.engine.codec_tail import SOURCE, CodecTail
from api.src.engine.config import CodecDecoderConfig
from api.src.engine.linear import settle
from api.src.engine.native.library import load as library
from api.src.engine.native.library import user_folder
from api.src.engine.products import brain_product
from api.src.engine.weights import Checkpoint
from tests.engine.bench_codec import RandomTensors

DATA = Path(__file__).parent / "data"
FRAME = 1920
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def native() -> CodecTail:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    tail = codec_tail.load()
    assert tail is not None, "it compiles on this machine, or the log says why not"
    return tail


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def unit(channels: int, dilation: int) -> tuple[ResidualUnit, int]:
    """With random weights; the size of its state."""
    layout = TailLayout()
    return ResidualUnit(RandomTensors(Checkpoint(Path())), layout, channels, dilation), layout.size


def adopted(plain: ResidualUnit, native: CodecTail) -> ResidualUnit:
    mine = copy.deepcopy(plain)
    mine.adopt(native)
    assert mine.native is not None
    return mine


def decibels(x: Tensor, of: Tensor) -> float:
    return 10 * float((x.double().square().mean() / of.double().square().mean()).log10())


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4, 35, 36, 37, 130, 701])
@pytest.mark.parametrize(("channels", "dilation"), [(96, 1), (96, 9), (192, 3), (384, 9)])
def test_a_unit_is_torchs_within_rounding(
    channels: int, dilation: int, rows: int, streams: int, native: CodecTail
) -> None:
    plain, size = unit(channels, dilation)
    x, tails = torch.randn(streams, rows, channels), torch.randn(streams, size)
    ends = [tails.clone(), tails.clone(), tails.double()]
    mine = adopted(plain, native)(x.clone(), ends[0])
    theirs = plain(x.clone(), ends[1])
    exact = plain.double()(x.double(), ends[2])
    lost = [decibels(each - exact, exact - x) for each in (mine, theirs)]
    assert lost[0] < -118
    assert rows < 100 or lost[0] < lost[1] + 11  # torch's sums of many terms are the best; few rows scatter
    assert float((mine - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize("dilation", [1, 9])
def test_company_and_threads_change_no_bit_of_a_unit(dilation: int, native: CodecTail) -> None:
    plain, size = unit(96, dilation)
    mine, x, tails = adopted(plain, native), torch.randn(4, 333, 96), torch.randn(4, size)
    together = mine(x.clone(), tails.clone())
    for stream in range(4):
        assert torch.equal(
            mine(x[stream : stream + 1].clone(), tails[stream : stream + 1].clone())[0], together[stream]
        )
    torch.set_num_threads(3)
    try:
        for _ in range(50):  # chance decides who takes what
            assert torch.equal(mine(x.clone(), tails.clone()), together)
    finally:
        torch.set_num_threads(1)


def test_several_threads_may_call_a_unit_at_once(native: CodecTail) -> None:
    plain, size = unit(96, 3)
    mine, x, tails = adopted(plain, native), torch.randn(8, 1, 500, 96), torch.zeros(1, size)

    @torch.inference_mode()
    def run(number: int) -> Tensor:
        return mine(x[number % 8].clone(), tails.clone())

    expected = [run(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for number, out in enumerate(pool.map(run, range(64))):
            assert torch.equal(out, expected[number % 8])


def activation(frequency: float, height: float) -> SnakeBeta:
    act = SnakeBeta(RandomTensors(Checkpoint(Path())), 96)
    act.frequency.fill_(frequency)
    act.height.fill_(height)
    return act


@pytest.mark.parametrize("frequency", [0.03, 1.0, 7.5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e5])
def test_the_activation_is_as_exact_as_its_argument(frequency: float, scale: float, native: CodecTail) -> None:
    act, x = activation(frequency, 1.0), scale * torch.linspace(-1, 1, 96 * 500).view(1, 500, 96)
    act.native = native
    out = act(x, torch.empty_like(x))
    angle = x.double() * act.frequency.double()
    exact = x.double() + angle.sin().square()
    rounding = 2.0**-24 * angle.abs() + 2.0**-24 * exact.abs()  # of the angle, and of the result
    assert bool(((out - exact).abs() <= 1.5e-7 + rounding).all())
    assert torch.equal(act.inplace(x), out)


def test_the_activation_of_what_is_no_sound(native: CodecTail) -> None:
    """Beyond 2^21 radians fp32 does not know the phase; nothing becomes NaN that was not."""
    act, x = activation(1.0, 2.0), torch.zeros(1, 1, 96)
    act.native = native
    x[0, 0, :6] = torch.tensor([3e6, -3e30, torch.inf, -torch.inf, torch.nan, -0.0])
    out = act(x, torch.empty_like(x))
    assert torch.equal(out[0, 0, :4], x[0, 0, :4])
    assert bool(out[0, 0, 4].isnan())
    assert bool((out[0, 0, 5:] == 0).all())


def test_activations_that_the_c_code_would_misread_are_torchs(native: CodecTail) -> None:
    act, x = activation(0.7, 1.0), torch.randn(2, 40, 192)
    act.native = native
    for given in (x[:, :, 96:], x[:, :, ::2], x[:, ::2, :96], x[:, :, :96].double()):
        expected = given + (0.7 * given).sin().square()
        assert torch.allclose(act(given, torch.empty_like(given)), expected, atol=1e-6)
        assert torch.allclose(act.inplace(given.clone(memory_format=torch.preserve_format)), expected, atol=1e-6)


def test_activations_go_between_other_rows(native: CodecTail) -> None:
    act, x = activation(0.7, 1.0), torch.randn(3, 40, 96)[:, 9:33]
    out = torch.full((3, 50, 96), 5.0)
    act.native = native
    act(x, out[:, 20:44])
    assert torch.allclose(out[:, 20:44], x + (0.7 * x).sin().square(), atol=1e-6)
    assert bool((out[:, :20] == 5).all())
    assert bool((out[:, 44:] == 5).all())


# --- the decoder ---


@cache
def decoder(native: CodecTail | None, *, narrow: bool = False) -> CodecDecoder:
    """Half as wide as the published one: blocks of 384, 192, 96 and 48 channels. Always the same weights."""
    torch.manual_seed(0)
    sizes = {"latent_dim": 64, "codebook_dim": 32, "codebook_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = CodecDecoderConfig(**sizes, **heads, num_hidden_layers=1, decoder_dim=768)
    made = CodecDecoder(config, QuietTensors(Checkpoint(Path())))
    if narrow:
        for part in made.modules():
            if isinstance(part, codec_layers.MatrixKernel | ResidualUnit):
                part.narrow()
    if native is not None:
        made.adopt(native)
    settle(made)
    return made


class QuietTensors(RandomTensors):
    """Such that the sound stays within -1 and 1, where cutting it off would hide differences."""

    def get(self, name: str, *shape: int) -> Tensor:
        values = super().get(name, *shape)
        return 0.002 * values if self.prefix + name == "decoder.6.conv.weight" else values


def test_the_decoder_sounds_as_torchs(native: CodecTail, monkeypatch) -> None:
    """These random weights magnify rounding: what counts is the comparison."""
    codes = torch.randint(0, 64, (2, 9, 16))
    mine, theirs = (decoder(each).decode_full(codes) for each in (native, None))
    monkeypatch.setattr(f"{__name__}.settle", lambda model: model.double())
    exact = decoder.__wrapped__(None).decode_full(codes)
    assert exact.dtype == torch.float64
    assert 0.01 < float(exact.abs().max()) < 1  # nothing is cut off
    lost = [decibels(each - exact, exact) for each in (mine, theirs)]
    print(f"noise below the sound: {lost[0]:.1f} dB, with torch's operations {lost[1]:.1f} dB")
    assert lost[0] < min(-75, lost[1] + 4)


def test_any_division_of_a_stream_and_any_company_sound_the_same(native: CodecTail) -> None:
    model, codes = decoder(native), torch.randint(0, 64, (3, 12, 16))
    whole = model.decode_full(codes)
    for lengths in ([1] * 12, [5, 1, 6], [2, 10]):
        state, slot = CodecState(model, 2), torch.tensor([1])
        apart = torch.cat([model.decode(step, slot, state) for step in torch.split(codes[:1], lengths, 1)], 1)
        assert decibels(apart - whole[:1], whole[:1]) < -75
    assert decibels(model.decode_full(codes[2:]) - whole[2:], whole[2:]) < -75


def test_priming_and_slots(native: CodecTail) -> None:
    model, codes = decoder(native), torch.randint(0, 64, (2, 14, 16))
    whole, state = model.decode_full(codes), CodecState(model, 3)
    model.prime(codes[:, :9], torch.tensor([2, 0]), state)
    samples = model.decode(codes[:, 9:], torch.tensor([2, 0]), state)
    assert decibels(samples - whole[:, 9 * FRAME :], whole) < -75


@pytest.mark.parametrize("narrow", [False, True])
def test_units_of_many_channels_stay_in_bf16_and_others_leave_torch(narrow: bool, native: CodecTail) -> None:
    if narrow and brain_product(torch.ones(16, 16), None) is None:
        pytest.skip("no bf16 on this processor")
    units = [part for part in decoder(native, narrow=narrow).modules() if isinstance(part, ResidualUnit)]
    wanted = {channels: native.serves(channels) and not (narrow and channels == 384) for channels in (384, 192, 96, 48)}
    assert {part.mix.shape[0]: part.native is not None for part in units} == wanted
    assert wanted[96]


def test_what_the_c_code_would_misread_is_refused(native: CodecTail) -> None:
    plain, size = unit(96, 1)
    mine, tails = adopted(plain, native), torch.zeros(2, size)
    for x in (torch.zeros(2, 4, 96, dtype=torch.float64), torch.zeros(4, 2, 96).transpose(0, 1)):
        with pytest.raises(ValueError, match="a unit in C"):
            mine(x, tails.to(x.dtype))


def test_units_that_are_too_wide_or_of_other_sizes_stay_torchs(native: CodecTail, monkeypatch) -> None:
    monkeypatch.setattr(codec_layers, "NATIVE_CHANNELS", 96)
    for channels, in_c in ((96, True), (192, False), (50, False)):
        part, _ = unit(channels, 1)
        part.adopt(native)
        assert (part.native is not None) == in_c


# --- where it does not work ---


def changed(folder: Path, what: str, by: str) -> Path:
    text = SOURCE.read_text()
    assert what in text
    path = folder / "changed.c"
    path.write_text(text.replace(what, by, 1))
    return path


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("{0, 0.25f, 0.75f, 0.5f, 0}", "{0, 0.25f, 0.7501f, 0.5f, 0}"),
        ("{0, 1, -1, -0.5f, 1}", "{0, 1, -1, 0.5f, 1}"),
        ("0.008333087898790836f", "0.00834f"),
        ("first_row(group, dilation) - dilation", "first_row(group, dilation)"),
        ("for (int64_t c = 0; c < call->channels; c += LANES)", "for (int64_t c = 0; c < LANES; c += LANES)"),
    ],
)
def test_a_library_that_miscalculates_is_not_used(
    what: str, by: str, native: CodecTail, tmp_path: Path, caplog
) -> None:
    assert codec_tail.load(changed(tmp_path, what, by), tmp_path) is None
    assert "torch's operations serve" in caplog.text


def test_a_source_that_does_not_compile_is_not_used(native: CodecTail, tmp_path: Path, caplog) -> None:
    assert codec_tail.load(changed(tmp_path, "EXPORT int64_t", "EXPORT int46_t"), tmp_path) is None
    assert "torch's operations serve" in caplog.text
    assert "int46_t" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["changed.c"]


def test_a_machine_without_compiler_decodes_with_torch(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        model = CodecDecoder.load(DATA / "tiny")
    assert "no C compiler" in caplog.text
    assert all(part.native is None for part in model.modules() if isinstance(part, ResidualUnit | SnakeBeta))
    assert model.decode_full(torch.zeros(1, 2, 16, dtype=torch.long)).shape == (1, 2 * FRAME)


def test_a_loaded_decoder_has_it_in_float32_alone(native: CodecTail) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        acts = [part for part in CodecDecoder.load(DATA / "tiny", dtype).modules() if isinstance(part, SnakeBeta)]
        assert [part.native is not None for part in acts] == [dtype == torch.float32] * len(acts)


def test_a_library_is_compiled_once_and_again_when_damaged(native: CodecTail, tmp_path: Path, monkeypatch) -> None:
    ran = []

    def run(command, **given):
        ran.append(command)
        return real(command, **given)

    def compiled():
        return [command for command in ran if "--version" not in command]

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "kept"
    assert library(SOURCE, folder) is not None
    [path] = folder.iterdir()
    assert library(SOURCE, folder) is not None
    assert len(compiled()) == 1
    other = tmp_path / "damaged"  # under its old name, the library is in the process already
    other.mkdir(mode=0o700)
    (other / path.name).write_bytes(path.read_bytes()[:1000])
    assert library(SOURCE, other) is not None
    assert len(compiled()) == 2
    assert (other / path.name).stat().st_size > 1000
    assert [each.name for each in other.iterdir()] == [path.name]
    assert library(changed(tmp_path, "GROUPS = 16", "GROUPS = 32"), folder) is not None
    assert len(compiled()) == 3


def test_a_user_without_a_home_compiles_for_now(native: CodecTail, monkeypatch) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder() is None
    assert codec_tail.load() is not None


def test_a_folder_that_others_may_write_to_is_left_alone(native: CodecTail, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert library(SOURCE, folder) is not None
    assert list(folder.iterdir()) == []
