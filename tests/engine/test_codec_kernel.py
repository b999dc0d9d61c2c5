"""The codec's decoder in C: torch's sound, each stream by itself to the bit, else torch."""

from __future__ import annotations

import copy
import logging
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from api.src.engine import codec_check, codec_kernel, codec_layers
from api.src.engine.codec import CodecDecoder, CodecState
from api.src.engine.codec_check import SOURCE
from api.src.engine.codec_convolutions import ImageKernel, MatrixKernel, SnakeBeta, TailLayout
from api.src.engine.codec_kernel import CodecKernel
from api.src.engine.codec_layers import ResidualUnit
from api.src.engine.codec_parts import NativeBooks, NativeCausal, NativeLayers, Tails, Taps
from api.src.engine.codec_window import Ring, WindowLayer, WindowSizes, rotation_at
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
def native() -> Iterator[CodecKernel]:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    kernel = codec_check.load()
    assert kernel is not None, "it compiles on this machine, or the log says why not"
    yield kernel
    kernel.close()


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def unit(channels: int, dilation: int) -> tuple[ResidualUnit, int]:
    """With random weights; the size of its state."""
    layout = TailLayout()
    return ResidualUnit(RandomTensors(Checkpoint(Path())), layout, channels, dilation), layout.size


def adopted(plain: ResidualUnit, native: CodecKernel) -> ResidualUnit:
    mine = copy.deepcopy(plain)
    mine.adopt(native, narrow=False)
    assert mine.native is not None
    return mine


@contextmanager
def threads(count: int, native: CodecKernel) -> Iterator[None]:
    """So many for the calls within."""
    native.close()  # the next call starts them
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        native.close()


def narrow_mix(part: ResidualUnit) -> bool:
    return part.narrow_mix is not None


def decibels(x: Tensor, of: Tensor) -> float:
    return 10 * float((x.double().square().mean() / of.double().square().mean()).log10())


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4, 35, 36, 37, 130, 701])
@pytest.mark.parametrize(("channels", "dilation"), [(96, 1), (96, 9), (192, 3), (384, 9)])
def test_a_unit_is_torchs_within_rounding(
    channels: int, dilation: int, rows: int, streams: int, native: CodecKernel
) -> None:
    plain, size = unit(channels, dilation)
    x, tails = torch.randn(streams, rows, channels), torch.randn(streams, size)
    ends = [tails.clone(), tails.clone(), tails.double()]
    mine, theirs = (
        part(x.clone(), Tails.alone(end)) for part, end in ((adopted(plain, native), ends[0]), (plain, ends[1]))
    )
    exact = plain.double()(x.double(), Tails.alone(ends[2]))
    lost = [decibels(each - exact, exact - x) for each in (mine, theirs)]
    assert lost[0] < -118
    assert rows < 100 or lost[0] < lost[1] + 11  # torch's sums of many terms are the best; few rows scatter
    assert float((mine - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize("dilation", [1, 9])
def test_company_and_threads_change_no_bit_of_a_unit(dilation: int, native: CodecKernel) -> None:
    plain, size = unit(96, dilation)
    mine, x, tails = adopted(plain, native), torch.randn(4, 333, 96), torch.randn(4, size)
    together = mine(x.clone(), Tails.alone(tails.clone()))
    for stream in range(4):
        alone = Tails.alone(tails[stream : stream + 1].clone())
        assert torch.equal(mine(x[stream : stream + 1].clone(), alone)[0], together[stream])
    with threads(3, native):
        for _ in range(50):  # chance decides who takes what
            assert torch.equal(mine(x.clone(), Tails.alone(tails.clone())), together)


def test_several_threads_may_call_a_unit_at_once(native: CodecKernel) -> None:
    plain, size = unit(96, 3)
    mine, x, tails = adopted(plain, native), torch.randn(8, 1, 500, 96), torch.zeros(1, size)

    @torch.inference_mode()
    def run(number: int) -> Tensor:
        return mine(x[number % 8].clone(), Tails.alone(tails.clone()))

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
def test_the_activation_is_as_exact_as_its_argument(frequency: float, scale: float, native: CodecKernel) -> None:
    act, x = activation(frequency, 1.0), scale * torch.linspace(-1, 1, 96 * 500).view(1, 500, 96)
    act.native = native
    out = act(x, torch.empty_like(x))
    angle = x.double() * act.frequency.double()
    exact = x.double() + angle.sin().square()
    rounding = 2.0**-24 * angle.abs() + 2.0**-24 * exact.abs()  # of the angle, and of the result
    assert bool(((out - exact).abs() <= 1.5e-7 + rounding).all())
    assert torch.equal(act.inplace(x), out)


def test_the_activation_of_what_is_no_sound(native: CodecKernel) -> None:
    """Beyond 2^21 radians fp32 does not know the phase; nothing becomes NaN that was not."""
    act, x = activation(1.0, 2.0), torch.zeros(1, 1, 96)
    act.native = native
    x[0, 0, :6] = torch.tensor([3e6, -3e30, torch.inf, -torch.inf, torch.nan, -0.0])
    out = act(x, torch.empty_like(x))
    assert torch.equal(out[0, 0, :4], x[0, 0, :4])
    assert bool(out[0, 0, 4].isnan())
    assert bool((out[0, 0, 5:] == 0).all())


def test_activations_that_the_c_code_would_misread_are_torchs(native: CodecKernel) -> None:
    act, x = activation(0.7, 1.0), torch.randn(2, 40, 192)
    act.native = native
    for given in (x[:, :, 96:], x[:, :, ::2], x[:, ::2, :96], x[:, :, :96].double()):
        expected = given + (0.7 * given).sin().square()
        assert torch.allclose(act(given, torch.empty_like(given)), expected, atol=1e-6)
        assert torch.allclose(act.inplace(given.clone(memory_format=torch.preserve_format)), expected, atol=1e-6)


def test_activations_go_between_other_rows(native: CodecKernel) -> None:
    act, x = activation(0.7, 1.0), torch.randn(3, 40, 96)[:, 9:33]
    out = torch.full((3, 50, 96), 5.0)
    act.native = native
    act(x, out[:, 20:44])
    assert torch.allclose(out[:, 20:44], x + (0.7 * x).sin().square(), atol=1e-6)
    assert bool((out[:, :20] == 5).all())
    assert bool((out[:, 44:] == 5).all())


# --- the decoder ---


@cache
def decoder(native: CodecKernel | None, *, narrow: bool = False) -> CodecDecoder:
    """Half as wide as the published one: blocks of 384, 192, 96 and 48 channels. Always the same weights."""
    torch.manual_seed(0)
    sizes = {"latent_dim": 64, "codebook_dim": 32, "codebook_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = CodecDecoderConfig(**sizes, **heads, num_hidden_layers=1, decoder_dim=768)
    made = CodecDecoder(config, QuietTensors(Checkpoint(Path())))
    if native is not None:
        made.adopt(native, narrow=narrow)
    if narrow:
        made.narrow()
    settle(made)
    return made


class QuietTensors(RandomTensors):
    """Such that the sound stays within -1 and 1, where cutting it off would hide differences."""

    def get(self, name: str, *shape: int) -> Tensor:
        values = super().get(name, *shape)
        return 0.002 * values if self.prefix + name == "decoder.6.conv.weight" else values


def test_the_decoder_sounds_as_torchs(native: CodecKernel, monkeypatch) -> None:
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


def test_any_division_of_a_stream_and_any_company_sound_the_same(native: CodecKernel) -> None:
    model, codes = decoder(native), torch.randint(0, 64, (3, 12, 16))
    whole = model.decode_full(codes)
    for lengths in ([1] * 12, [5, 1, 6], [2, 10]):
        state, slot = CodecState(model, 2), torch.tensor([1])
        apart = torch.cat([model.decode(step, slot, state) for step in torch.split(codes[:1], lengths, 1)], 1)
        assert decibels(apart - whole[:1], whole[:1]) < -75
    assert decibels(model.decode_full(codes[2:]) - whole[2:], whole[2:]) < -75


def test_priming_and_slots(native: CodecKernel) -> None:
    model, codes = decoder(native), torch.randint(0, 64, (2, 14, 16))
    whole, state = model.decode_full(codes), CodecState(model, 3)
    model.prime(codes[:, :9], torch.tensor([2, 0]), state)
    samples = model.decode(codes[:, 9:], torch.tensor([2, 0]), state)
    assert decibels(samples - whole[:, 9 * FRAME :], whole) < -75


@pytest.mark.parametrize("narrow", [False, True])
def test_units_of_many_channels_are_in_bf16_as_torchs(narrow: bool, native: CodecKernel) -> None:
    if narrow and brain_product(torch.ones(16, 16), None) is None:
        pytest.skip("no bf16 on this processor")
    units = [part for part in decoder(native, narrow=narrow).modules() if isinstance(part, ResidualUnit)]
    wanted = {channels: channels == 384 and narrow for channels in (384, 192, 96, 48)}
    assert {part.conv1.tail.channels: part.native.narrow for part in units if part.native is not None} == wanted
    wide = {
        part.conv1.tail.channels: narrow_mix(part)
        for part in decoder(None, narrow=narrow).modules()
        if isinstance(part, ResidualUnit)
    }
    assert wide == wanted


def test_what_the_c_code_would_misread_is_refused(native: CodecKernel) -> None:
    plain, size = unit(96, 1)
    mine, tails = adopted(plain, native), torch.zeros(2, size)
    for x in (torch.zeros(2, 4, 96, dtype=torch.float64), torch.zeros(4, 2, 96).transpose(0, 1)):
        with pytest.raises(ValueError, match="a layer in C"):
            mine(x, Tails.alone(tails.to(x.dtype)))


def test_units_of_sizes_that_do_not_fill_vectors_stay_torchs(native: CodecKernel, monkeypatch) -> None:
    monkeypatch.setattr(codec_layers, "NATIVE_CHANNELS", 96)
    for channels, in_c in ((96, True), (192, True), (64, True), (50, False)):
        part, _ = unit(channels, 1)
        part.adopt(native, narrow=False)
        assert (part.native is not None) == in_c


# --- convolutions and the transformer ---


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 21, 333])
@pytest.mark.parametrize(("channels", "outputs", "dilation"), [(32, 80, 1), (272, 32, 9)])
def test_a_convolution_is_torchs_and_company_changes_no_bit(
    channels: int, outputs: int, dilation: int, rows: int, narrow: bool, native: CodecKernel
) -> None:
    if narrow and not native.narrow:
        pytest.skip("no bf16 on this processor")
    taps = Taps(torch.randn(outputs, 7, channels) / (7 * channels) ** 0.5, torch.randn(outputs), dilation)
    part = NativeCausal(native, channels, (16, 6 * dilation), None).convolution(taps, narrow=narrow)
    x, tails = torch.randn(3, rows, channels), torch.randn(5, 16 + 6 * dilation * channels)
    old = tails.clone()
    with threads(3, native):
        together = part.run(x, Tails(tails, torch.tensor([3, 0, 4])))
    alone = torch.cat(
        [part.run(x[i : i + 1], Tails(old.clone(), torch.tensor([slot]))) for i, slot in enumerate((3, 0, 4))]
    )
    assert torch.equal(together, alone)
    window = torch.cat((old[[3, 0, 4], 16:].view(3, -1, channels), x), 1)
    assert torch.equal(tails[[3, 0, 4], 16:].view(3, -1, channels), window[:, rows:])
    assert torch.equal(tails[[1, 2]], old[[1, 2]])
    assert torch.equal(tails[:, :16], old[:, :16])
    kernel = taps.kernel.transpose(1, 2)
    if narrow:
        window, kernel = window.bfloat16().float(), kernel.bfloat16().float()
    exact = torch.nn.functional.conv1d(
        window.transpose(1, 2).double(), kernel.double(), taps.bias.double(), dilation=dilation
    )
    assert decibels(together - exact.transpose(1, 2), exact) < -125


def test_rows_in_several_calls_are_those_of_one(native: CodecKernel) -> None:
    taps = Taps(torch.randn(48, 7, 64), torch.randn(48), 3)
    part = NativeCausal(native, 64, (0, 18), None).convolution(taps, narrow=False)
    x = torch.randn(1, 40, 64)
    whole, state = part.run(x, Tails.alone(torch.zeros(1, 18 * 64))), Tails.alone(torch.zeros(1, 18 * 64))
    assert torch.equal(torch.cat([part.run(each, state) for each in torch.split(x, [1, 5, 30, 4], 1)], 1), whole)


def test_the_transformer_is_torchs_whatever_company_and_division(native: CodecKernel) -> None:
    sizes = WindowSizes(heads=6, kv_heads=2, head_dim=16, inner=112, window=9, epsilon=1e-5)
    shapes = ((160, 48), (48, 96), (224, 48), (48, 112))
    weights = [[torch.randn(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(3)]
    layers, plain = NativeLayers(native, weights, sizes), [WindowLayer(each, sizes).double() for each in weights]
    x, mine, exact = torch.randn(2, 30, 48), torch.zeros(3, 4, 14, 2, 2, 16), torch.zeros(3, 4, 14, 2, 2, 16).double()
    alone, outs, at = mine.clone(), [], 0
    for length in (1, 3, 6, 2, 6, 6, 6):
        positions, slots = torch.tensor([[at], [at + 5]]) + torch.arange(length), torch.tensor([3, 1])
        single, double = (rotation_at(positions.flatten(), 16, 1e4, dtype) for dtype in (torch.float32, torch.float64))
        step = x[:, at : at + length].contiguous()
        out = layers.run(step.clone(), slots, positions, single, mine)
        for i in range(2):
            own = rotation_at(positions[i], 16, 1e4, torch.float32)
            assert torch.equal(
                layers.run(step[i : i + 1].clone(), slots[i : i + 1], positions[i : i + 1], own, alone)[0], out[i]
            )
        wanted, ring = step.double(), Ring(exact, slots, positions, sizes.window)
        for index, layer in enumerate(plain):
            wanted = layer(wanted, double, ring, index)
        assert decibels(out - torch.nn.functional.rms_norm(wanted, (48,), eps=1e-5), wanted) < -110
        outs.append(out)
        at += length
    assert torch.equal(mine, alone)
    assert decibels(mine - exact, exact) < -120
    assert bool((mine[:, [0, 2]] == 0).all())


def test_company_and_threads_change_no_bit_of_a_stream_and_its_division_only_rounding(native: CodecKernel) -> None:
    """The late units' rows are calculated in groups, which begin where a step does."""
    model, codes = decoder(native, narrow=native.narrow), torch.randint(0, 64, (3, 12, 16))
    assert model.in_c
    assert not any(isinstance(part, MatrixKernel | ImageKernel) for part in model.modules())
    whole = model.decode_full(codes)
    with threads(3, native):
        for stream in range(3):
            assert torch.equal(model.decode_full(codes[stream : stream + 1])[0], whole[stream])
        for lengths in ([1] * 12, [5, 1, 6], [4, 8]):
            heard = []
            for batch, slots in ((codes[:1], torch.tensor([1])), (codes, torch.tensor([2, 0, 1]))):
                state = CodecState(model, 3)
                steps = [model.decode(step, slots, state) for step in torch.split(batch, lengths, 1)]
                heard.append(torch.cat(steps, 1))
            assert torch.equal(heard[1][:1], heard[0])
            assert decibels(heard[0] - whole[:1], whole[:1]) < (-40 if native.narrow else -75)


def test_processors_whose_bf16_is_torchs_have_the_rest_in_c(native: CodecKernel, monkeypatch) -> None:
    """As with AMX: torch's wide products, and windows and tails that both use."""
    if brain_product(torch.ones(16, 16), None) is None:
        pytest.skip("no bf16 on this processor")
    monkeypatch.setattr(codec_kernel, "_has_tiles", lambda: True)
    other = codec_check.load()
    assert other is not None
    assert not other.narrow
    mixed, codes = decoder.__wrapped__(other, narrow=True), torch.randint(0, 64, (2, 6, 16))
    assert not mixed.in_c
    assert any(isinstance(part, MatrixKernel) and part.dtype for part in mixed.modules())
    assert any(part.native is not None for part in mixed.modules() if isinstance(part, ResidualUnit))
    state = CodecState(mixed, 3)
    whole = mixed.decode_full(codes)
    apart = torch.cat([mixed.decode(step, torch.tensor([2, 0]), state) for step in torch.split(codes, [1, 5], 1)], 1)
    assert decibels(apart - whole, whole) < -20
    exact = decoder(None).decode_full(codes)
    lost = [decibels(each.decode_full(codes) - exact, exact) for each in (mixed, decoder(None, narrow=True))]
    assert lost[0] < lost[1] + 3


def test_wide_products_in_c_lose_no_more_than_torchs(native: CodecKernel) -> None:
    if not native.narrow:
        pytest.skip("no bf16 on this processor")
    codes = torch.randint(0, 64, (2, 9, 16))
    exact = decoder(None).decode_full(codes)
    lost = [decibels(decoder(each, narrow=True).decode_full(codes) - exact, exact) for each in (native, None)]
    print(f"noise below the sound: {lost[0]:.1f} dB, with torch's products {lost[1]:.1f} dB")
    assert lost[0] < lost[1] + 1


# --- threads and memory ---


def kernel_threads() -> int:
    return sum(path.read_text().strip() == "tts-kernel" for path in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux has them")
def test_threads_and_memory_are_given_back(native: CodecKernel) -> None:
    model, codes = decoder(native), torch.randint(0, 64, (1, 2, 16))
    with threads(4, native):
        before = kernel_threads()
        first = model.decode_full(codes)
        assert kernel_threads() == before + 3
        assert len(native._scratch) > 0
        model.close()
        assert not native.pool.running
        assert len(native._scratch) == 0
        assert torch.equal(model.decode_full(codes), first)


def test_no_streams_and_no_rows_are_no_work(native: CodecKernel) -> None:
    """An empty phase would never end."""
    part = NativeCausal(native, 32, (0, 0), None).convolution(
        Taps(torch.randn(48, 1, 32), torch.randn(48)), narrow=False
    )
    for shape in ((0, 3, 32), (2, 0, 32)):
        assert part.run(torch.empty(shape), Tails.alone(torch.empty(shape[0], 16))).shape == (*shape[:2], 48)
    books = NativeBooks(native, torch.randn(3, 5, 32), 1)
    assert books.run(torch.zeros(0, 3, 3, dtype=torch.long)).shape == (0, 3, 64)


def test_codes_beyond_the_codebook_are_refused_before_they_are_read(native: CodecKernel) -> None:
    for code in (-1, 64, 1 << 40):
        codes = torch.zeros(1, 2, 16, dtype=torch.long)
        codes[0, 1, 3] = code
        with pytest.raises(IndexError):
            decoder(native).decode_full(codes)


# --- where it does not work ---


def changed(folder: Path, what: str, by: str) -> Path:
    """The source and its headers in `folder`, one of them changed."""
    texts = {path: path.read_text() for path in (SOURCE, *SOURCE.parent.glob("*.h"))}
    assert any(what in text for text in texts.values())
    for path, text in texts.items():
        (folder / path.name).write_text(text.replace(what, by, 1))
    return (folder / SOURCE.name).rename(folder / "changed.c")


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("{0, 0.25f, 0.75f, 0.5f, 0}", "{0, 0.25f, 0.7501f, 0.5f, 0}"),
        ("{0, 1, -1, -0.5f, 1}", "{0, 1, -1, 0.5f, 1}"),
        ("0.008333087898790836f", "0.00834f"),
        ("first_row(group, dilation) - dilation", "first_row(group, dilation)"),
        ("for (int64_t c = 0; c < a->channels; c += LANES)", "for (int64_t c = 0; c < LANES; c += LANES)"),
        ("int64_t from = row + w->rows - w->tail;", "int64_t from = row;"),
        ("load(tail + (row + w->rows) * w->channels + c)", "load(tail + row * w->channels + c)"),
        ("x[r] + tap * m->dilation * inputs", "x[r] + tap * inputs"),
        ("(first + r) / p->rows * p->length", "(first + r) / p->rows * p->rows"),
        ("if (p->matrix->bias) sum", "if (p->matrix->bias && !column) sum"),
        ("sum = gelu(sum)", "sum = sum / (1 + exponential(-1.702f * sum))"),
        ("2.319599679e-01f", "2.33e-01f"),
        ("(load(out + c) - mean) * scale", "load(out + c) * scale"),
        ("position - s->window + 1,", "position - s->window,"),
        ("at + 1 < s->ring ? at + 1 : 0)\n        scores", "at + 1)\n        scores"),
        ("sample > 1 ? 1 :", "sample > 2 ? 2 :"),
        ("(group >= b->semantic)) * b->width", "(group > b->semantic)) * b->width"),
    ],
)
def test_a_library_that_miscalculates_is_not_used(
    what: str, by: str, native: CodecKernel, tmp_path: Path, caplog
) -> None:
    assert codec_check.load(changed(tmp_path, what, by), tmp_path) is None
    assert "torch's operations serve" in caplog.text


def test_a_source_that_does_not_compile_is_not_used(native: CodecKernel, tmp_path: Path, caplog) -> None:
    assert codec_check.load(changed(tmp_path, "EXPORT int64_t", "EXPORT int46_t"), tmp_path) is None
    assert "torch's operations serve" in caplog.text
    assert "int46_t" in caplog.text
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".c", *[".h"] * len([*SOURCE.parent.glob("*.h")])]


def test_a_machine_without_compiler_decodes_with_torch(monkeypatch, tmp_path: Path, caplog) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        model = CodecDecoder.load(DATA / "tiny")
    assert "no C compiler" in caplog.text
    assert all(getattr(part, "native", None) is None for part in model.modules())
    assert not model.in_c
    assert model.decode_full(torch.zeros(1, 2, 16, dtype=torch.long)).shape == (1, 2 * FRAME)


def test_a_loaded_decoder_has_it_in_float32_alone(native: CodecKernel) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = CodecDecoder.load(DATA / "tiny", dtype)
        assert (model.native is not None) == (dtype == torch.float32)
        units = [part.native for part in model.modules() if isinstance(part, ResidualUnit)]
        assert (dtype == torch.float32) == any(unit is not None for unit in units)


def test_a_library_is_compiled_once_and_again_when_damaged(native: CodecKernel, tmp_path: Path, monkeypatch) -> None:
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
    assert library(changed(tmp_path, "GROUPS = 16", "GROUPS = 24"), folder) is not None
    assert len(compiled()) == 3


def test_a_user_without_a_home_compiles_for_now(native: CodecKernel, monkeypatch) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder() is None
    assert codec_check.load() is not None


def test_a_folder_that_others_may_write_to_is_left_alone(native: CodecKernel, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert library(SOURCE, folder) is not None
    assert list(folder.iterdir()) == []
