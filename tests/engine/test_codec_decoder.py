"""The codec's decoder: the official package's waveforms, and a stream that is the same however it is divided.

float64 shows that the arithmetic is the same (the official code rounds norms and angles to float32 even then). float32
is compared within the rounding that these random weights magnify: the official float32 waveforms are up to 5e-5 off.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import api.src.engine.codec_convolutions as codec_convolutions
from api.src.engine.codec import STEP_FRAMES, CodecDecoder, CodecState, reference_cut
from api.src.engine.codec_convolutions import MatrixKernel
from api.src.engine.codec_parts import NativeCausal
from api.src.engine.errors import CheckpointError
from api.src.engine.products import brain_product
from tests.engine.codec_cases import DECODES, STRIDE, codes

DATA = Path(__file__).parent / "data"
CASES = json.loads(str(np.load(DATA / "golden.npz")["meta"]))["cases"]
FRAME = 1920
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
SAME = {torch.float64: 1e-12, torch.float32: 1e-4}
torch.set_num_threads(1)


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return dict(file)


@cache
def decoder(checkpoint: str = "tiny", dtype: torch.dtype = torch.float64) -> CodecDecoder:
    return CodecDecoder.load(DATA / checkpoint, dtype)


@cache
def stream(frames: int, seed: int = 0) -> torch.Tensor:
    """Codes (1, frames, 16)."""
    return torch.from_numpy(codes(frames, seed, 2048))[None]


@cache
def full(frames: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return decoder("tiny", dtype).decode_full(stream(frames, seed))


def slots(*indices: int) -> torch.Tensor:
    return torch.tensor(indices)


def in_steps(given: torch.Tensor, lengths: list[int], model: CodecDecoder) -> torch.Tensor:
    state = CodecState(model, 3)
    return torch.cat([model.decode(step, slots(1), state) for step in torch.split(given, lengths, 1)], 1)


def with_window(window: int, folder: Path) -> Path:
    """The tiny codec with another sliding window."""
    source = DATA / "tiny" / "speech_tokenizer"
    config = json.loads((source / "config.json").read_text())
    config["decoder_config"]["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", folder)
    return folder


def off(samples: torch.Tensor, wanted: torch.Tensor | np.ndarray) -> float:
    assert samples.shape == wanted.shape
    return float((samples.double() - torch.as_tensor(wanted).double()).abs().max()) if samples.numel() else 0.0


@pytest.mark.parametrize("case", CASES)
def test_waveforms_of_the_official_package(case: str) -> None:
    given = torch.from_numpy(golden("golden.npz")[f"{case}/codes"]).long()[None]
    reference = torch.from_numpy(golden("golden.npz")["ref_code"]).long()[None]
    if case == "clone_icl":
        given = torch.cat((reference, given), 1)
    exact, single = (decoder("tiny", dtype).decode_full(given)[0] for dtype in (torch.float64, torch.float32))
    cut = reference_cut(reference.shape[1], given.shape[1], len(exact)) if case == "clone_icl" else 0
    wav = golden("golden.npz")[f"{case}/wav"]
    assert off(exact[cut:], wav) < 1e-4
    assert off(single, exact) < 1e-4
    assert float((single[cut:] - torch.from_numpy(wav)).square().mean().sqrt()) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", DECODES)
def test_waveforms_of_other_shapes_windows_and_lengths(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint, window, frames, seed = DECODES[case]
    model = CodecDecoder.load(with_window(window, tmp_path), dtype) if window else decoder(checkpoint, dtype)
    given = torch.from_numpy(codes(frames, seed, model.config.codebook_size))[None]
    assert off(model.decode_full(given)[0, ::STRIDE], golden("golden_codec.npz")[f"{case}/wav"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 25, 61])
def test_any_step_length_gives_the_full_waveform(length: int, dtype: torch.dtype) -> None:
    samples = in_steps(stream(130), [length] * (130 // length) + [130 % length], decoder("tiny", dtype))
    assert samples.dtype == dtype
    assert off(samples, full(130, dtype=dtype)) < SAME[dtype]


@pytest.mark.parametrize("length", [1, 7, 25])
def test_steps_with_the_published_window(length: int, tmp_path: Path) -> None:
    model = CodecDecoder.load(with_window(72, tmp_path), torch.float64)
    samples = in_steps(stream(200), [length] * (200 // length) + [200 % length], model)
    assert off(samples, model.decode_full(stream(200))) < 1e-12
    assert off(samples[:, : 60 * FRAME], full(200)[:, : 60 * FRAME]) > 1e-3  # a window of 12 sounds otherwise


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_random_steps_give_the_full_waveform(lengths: list[int]) -> None:
    given = stream(sum(lengths), seed=len(lengths))
    assert off(in_steps(given, lengths, decoder()), decoder().decode_full(given)) < 1e-12


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 9)), min_size=1, max_size=12))
def test_slots_at_different_positions_share_steps(plan: list[tuple[set[int], int]]) -> None:
    """Each step takes some slots, in any order, some frames further."""
    state, at, heard = CodecState(decoder(), 4), [0] * 4, [[] for _ in range(4)]
    for members, length in plan:
        order = sorted(members, key=lambda slot: (slot * 7 + length) % 5)
        batch = torch.cat([stream(120, seed=slot)[:, at[slot] : at[slot] + length] for slot in order])
        for slot, samples in zip(order, decoder().decode(batch, slots(*order), state), strict=True):
            at[slot] += length
            heard[slot].append(samples)
    for slot in range(4):
        if heard[slot]:
            assert off(torch.cat(heard[slot]), full(120, seed=slot)[0, : at[slot] * FRAME]) < 1e-12


def test_batch_mates_do_not_matter_in_float32() -> None:
    model = decoder("tiny", torch.float32)
    batch = torch.cat([stream(60, seed=seed) for seed in range(8)])
    together = model.decode_full(batch)
    for seed in range(8):
        assert off(together[seed], full(60, seed, torch.float32)[0]) < 1e-4


def test_reset_leaves_no_trace() -> None:
    state = CodecState(decoder(), 2)
    decoder().decode(stream(70, seed=1), slots(0), state)
    state.tails[0], state.cache[:, 0] = torch.nan, torch.nan
    state.reset(0)
    samples = decoder().decode(stream(20), slots(0), state)
    fresh = decoder().decode(stream(20), slots(0), CodecState(decoder(), 2))
    assert torch.equal(samples, fresh)


def test_reset_of_several_slots_and_no_other() -> None:
    state = CodecState(decoder(), 3)
    batch = torch.cat([stream(30, seed=seed) for seed in range(3)])
    decoder().decode(batch, slots(0, 1, 2), state)
    state.reset(slots(0, 2))
    kept = decoder().decode(stream(40, seed=1)[:, 30:], slots(1), state)
    assert off(kept, full(40, seed=1)[:, 30 * FRAME :]) < 1e-12
    assert off(decoder().decode(stream(20), slots(2), state), full(20)) < 1e-12


def test_a_step_touches_no_other_slot() -> None:
    state = CodecState(decoder(), 3)
    decoder().decode(stream(9), slots(0), state)
    before = state.read(0)
    decoder().decode(torch.cat((stream(30, seed=1), stream(30, seed=2))), slots(2, 1), state)
    after = state.read(0)
    assert torch.equal(before.tails, after.tails)
    assert torch.equal(before.cache, after.cache)
    assert torch.equal(before.position, after.position)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 59), st.integers(0, 15))
def test_a_frame_changes_nothing_before_it(frame: int, group: int) -> None:
    changed = stream(60).clone()
    changed[0, frame, group] = (changed[0, frame, group] + 1000) % 2048
    samples = decoder().decode_full(changed)
    assert torch.equal(samples[:, : frame * FRAME], full(60)[:, : frame * FRAME])
    assert not torch.equal(samples[:, frame * FRAME : (frame + 1) * FRAME], full(60)[:, frame * FRAME :][:, :FRAME])


@pytest.mark.parametrize("frames", [0, 1, 4, 9, 10, 11, 25, 26, 63])
def test_priming_is_decoding_without_the_sound(frames: int) -> None:
    state = CodecState(decoder(), 2)
    decoder().prime(stream(100)[:, :frames], slots(1), state)
    assert off(decoder().decode(stream(100)[:, frames:], slots(1), state), full(100)[:, frames * FRAME :]) < 1e-12


def test_priming_continues_and_batches() -> None:
    state, batch = CodecState(decoder(), 3), torch.cat((stream(100), stream(100, seed=1)))
    decoder().decode(batch[:, :7], slots(2, 0), state)
    decoder().prime(batch[:, 7:12], slots(2, 0), state)
    decoder().prime(batch[:, 12:50], slots(2, 0), state)
    samples = decoder().decode(batch[:, 50:], slots(2, 0), state)
    assert off(samples, torch.cat((full(100), full(100, seed=1)))[:, 50 * FRAME :]) < 1e-12


def test_a_stream_of_a_clone_is_the_official_one() -> None:
    data = golden("golden.npz")
    reference, given = (torch.from_numpy(data[name]).long()[None] for name in ("ref_code", "clone_icl/codes"))
    model = decoder("tiny", torch.float32)
    state = CodecState(model, 1)
    model.prime(reference, slots(0), state)
    samples = torch.cat([model.decode(step, slots(0), state) for step in torch.split(given, 4, 1)], 1)[0]
    wav = data["clone_icl/wav"]
    extra = len(wav) - len(samples)  # the official cut may leave one sample of the reference
    assert extra in (0, 1)
    assert off(samples, wav[extra:]) < 1.5e-4


@pytest.mark.parametrize(("reference", "frames"), [(25, 58), (49, 98), (7, 29), (3, 58), (0, 5)])
def test_the_official_cut(reference: int, frames: int) -> None:
    cut = reference_cut(reference, frames, frames * FRAME)
    assert cut == int(reference / frames * (frames * FRAME))
    assert reference * FRAME - cut in (0, 1)


def test_a_kept_state_saves_priming_again() -> None:
    state, other = CodecState(decoder(), 1), CodecState(decoder(), 3)
    decoder().prime(stream(100)[:, :40], slots(0), state)
    kept = state.read(0)
    decoder().decode(stream(9, seed=3), slots(0), state)
    for _ in range(2):
        other.write(2, kept)
        samples = decoder().decode(stream(100)[:, 40:], slots(2), other)
        assert off(samples, full(100)[:, 40 * FRAME :]) < 1e-12


def test_memory_is_that_of_the_arenas() -> None:
    state = CodecState(decoder(), 2)
    places = [each.data_ptr() for each in (state.tails, state.cache, state.positions)]
    ring, layers, heads, size = 12 - 1 + STEP_FRAMES, 2, 2, 16
    assert state.nbytes == 2 * 8 * (decoder().layout.size + layers * ring * 2 * heads * size + 1)
    decoder().decode(stream(90), slots(0), state)
    assert places == [each.data_ptr() for each in (state.tails, state.cache, state.positions)]


def test_no_frames_are_no_samples() -> None:
    assert decoder().decode(stream(5)[:, :0], slots(0), CodecState(decoder(), 1)).shape == (1, 0)


def test_bfloat16_runs_and_sounds_alike() -> None:
    samples = CodecDecoder.load(DATA / "codec_wide", torch.bfloat16).decode_full(stream(30) % 64)
    wanted = decoder("codec_wide").decode_full(stream(30) % 64)
    assert samples.dtype == torch.float32
    assert float((samples - wanted).square().mean()) < 0.2 * float(wanted.square().mean())


@pytest.mark.parametrize("code", [-1000000, 2048, 3071])
def test_codes_beyond_the_codebook_are_refused(code: int) -> None:
    wrong = stream(3).clone()
    wrong[0, 1, 2] = code
    with pytest.raises(IndexError):
        decoder().decode_full(wrong)


def damaged(folder: Path, change: dict[str, torch.Tensor | None], **config: object) -> Path:
    """The codec_wide codec with tensors changed, added or (None) left out, and fields of its decoder_config changed."""
    source = DATA / "codec_wide" / "speech_tokenizer"
    tensors = {**load_file(source / "model.safetensors"), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    raw["decoder_config"].update(config)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"decoder.pre_conv.conv.bias": None}, {}, "lacks the tensor decoder.pre_conv.conv.bias"),
        ({"decoder.decoder.5.alpha": torch.zeros(4)}, {}, r"decoder.decoder.5.alpha is \(4,\)"),
        ({"decoder.decoder.7.alpha": torch.zeros(4)}, {}, "unexpected tensors: decoder.decoder.7.alpha"),
        ({}, {"num_hidden_layers": 4}, r"lacks the tensor decoder.pre_transformer.layers.3"),
        ({}, {"num_hidden_layers": 2}, r"unexpected tensors: decoder.pre_transformer.layers.2"),
        ({}, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({}, {"attention_bias": True}, "attention_bias = True is not supported"),
    ],
)
def test_unusable_checkpoints_are_named(
    change: dict[str, torch.Tensor | None], config: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        CodecDecoder.load(damaged(tmp_path, change, **config))


def test_a_missing_codec_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CodecDecoder.load(tmp_path)


# --- wide products in bf16 ---


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> CodecDecoder:
    """The tiny codec, with so low a bound that most of its products are narrow."""
    if brain_product(torch.ones(16, 16), None) is None:
        pytest.skip("no bf16 on this processor")
    monkeypatch.setattr(codec_convolutions, "MATMUL_CHANNELS", 16)
    return CodecDecoder.load(DATA / "tiny", narrow=True)


def test_bf16_products_lose_less_than_bf16_throughout(narrow: CodecDecoder) -> None:
    """These random weights magnify rounding; what counts is the comparison with what the official package does."""
    kernels = [part for part in narrow.modules() if isinstance(part, MatrixKernel)]
    assert all(kernel.dtype == torch.bfloat16 for kernel in kernels)
    natives = [getattr(part, "native", None) for part in narrow.modules()]
    assert len(kernels) + sum(isinstance(part, NativeCausal) and part.narrow for part in natives) > 3
    throughout = CodecDecoder.load(DATA / "tiny", torch.bfloat16)
    lost = [decibels(other.decode_full(stream(40)) - full(40), full(40)) for other in (narrow, throughout)]
    print(f"noise below the sound: {lost[0]:.1f} dB, in bf16 throughout {lost[1]:.1f} dB")
    assert -80 < lost[0] < min(-20, lost[1])


def decibels(x: torch.Tensor, of: torch.Tensor) -> float:
    return 10 * float((x.square().mean() / of.square().mean()).log10())


def test_a_stream_in_bf16_may_be_divided_too(narrow: CodecDecoder) -> None:
    whole = narrow.decode_full(stream(30))
    level = float(whole.square().mean().sqrt())
    for lengths in ([1] * 30, [7, 1, 12, 10]):
        apart = in_steps(stream(30), lengths, narrow)
        assert float((apart - whole).square().mean().sqrt()) < 0.02 * level
