"""The CPU's kernel: beside torch's operations, rows alone and together, and a machine on which it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import Linear
from api.src.engine.loading import load_model
from api.src.engine.native import check as checks
from api.src.engine.native.check import find
from api.src.engine.native.library import NoKernel, load
from api.src.engine.native.products import DECODER, Native, NativeProduct
from api.src.engine.passes import LayerPasses, NativePasses
from api.src.engine.prompt import PromptRows
from api.src.engine.quantised import FineInt8Product, Int8Product
from api.src.engine.sampling import Sampling
from tests.engine.checkpoints import tiny, variant
from tests.engine.streams import GREEDY, Stream, cases, run
from tests.engine.test_forms import frames

pytestmark = pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
ROOT = Path(__file__).parents[2]
GENERIC = "#undef __AVX512VNNI__\n#undef __AVX512F__\n"
SIZES = [(33, 7), (5, 70), (64, 128), (16, 1), (1, 260)]
ROWS = range(1, 20)


def changed(folder: Path, old: str, new: str) -> Path:
    """A copy of the sources with another text in one place."""
    shutil.copytree(DECODER.parent, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", "codec*"))
    [path] = [path for path in folder.iterdir() if old in path.read_text()]
    path.write_text(path.read_text().replace(old, new, 1))
    return folder / DECODER.name


@pytest.fixture(scope="module", params=["own", "generic"])
def native(request, tmp_path_factory):
    """For this processor, and as on one without its widest registers."""
    folder = tmp_path_factory.mktemp("kernel")
    source = DECODER
    if request.param == "generic":
        source = changed(folder / "sources", "#define _GNU_SOURCE", f"{GENERIC}#define _GNU_SOURCE")
    made = Native(load(source, folder))
    made.has_exact = True
    yield made
    made.close()


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads() -> int:
    """The kernel's: torch has its own, which come and go."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            names.append((task / "comm").read_text())
    return names.count("tts-kernel\n")


def gone_to(count: int) -> bool:
    """Whether there are so many threads; the system lists one for a moment after its end."""
    deadline = time.monotonic() + 30
    while threads() != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return threads() == count


# --- products ---


@pytest.mark.parametrize("kind", ["int8", "fine", "exact"])
@pytest.mark.parametrize("shape", SIZES)
def test_products_are_the_written_arithmetic_and_rows_their_own(native, kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    x = torch.randn(max(ROWS), shape[1], generator=torch.Generator().manual_seed(2)) ** 3
    x[3] = 0.0
    codes = Int8Product.quantise(weight)
    product = native.exact(weight, None) if kind == "exact" else native.int8(codes, None, fine=kind == "fine")
    x[3, 0] = 1.0  # what is 0 throughout has no error to compare
    expected = x.double() @ weight.T.double() if kind == "exact" else checks._rounded(x, codes, fine=kind == "fine")
    alone = torch.cat([product(row[None]) for row in x])
    assert torch.allclose(alone.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    for rows in ROWS:
        assert torch.equal(product(x[:rows]), alone[:rows])


def test_fbgemm_and_the_kernel_round_alike(native):
    weight, x = torch.randn(96, 320), torch.randn(7, 320)
    for kind in (Int8Product, FineInt8Product):
        codes = kind.quantise(weight)
        theirs, ours = kind(codes, None)(x), native.int8(codes, None, fine=kind is FineInt8Product)(x)
        assert float((theirs - ours).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_breaks_no_other(native, fine, bad):
    product = native.int8(Int8Product.quantise(torch.randn(40, 70)), None, fine=fine)
    x = torch.randn(5, 70)
    right, x[2, 69] = product(x), bad
    found = product(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], right[[0, 1, 3, 4]])
    assert torch.equal(product(torch.zeros(2, 70)), torch.zeros(2, 40))


def test_weights_beyond_bf16_are_refused_and_a_bias_is_added(native):
    assert native.exact(torch.tensor([[1.0, 1 + 2.0**-20]]), None) is None
    product = native.exact(torch.ones(3, 2), torch.tensor([1.0, 2.0, 3.0]))
    assert product(torch.ones(1, 2)).tolist() == [[3.0, 4.0, 5.0]]
    assert product(torch.ones(0, 2)).shape == (0, 3)


# --- the model ---


def passes(model: LanguageModel, way, rows: int, length: int):
    """What a prompt and a frame make of the same rows: all outputs and all that is stored."""
    config = model.config.talker_config
    slots = model.new_slots(rows + 1, 128, 8)
    random = torch.Generator().manual_seed(rows)
    index = torch.arange(rows, 0, -1)
    prompts = [torch.randn(length + row, config.hidden_size, generator=random) for row in range(rows)]
    model.passes = way
    entries = [(slot, PromptRows(x, x[:0], x[0]), Sampling()) for slot, x in zip(index.tolist(), prompts, strict=True)]
    model.prefill(slots, entries)
    with torch.inference_mode():
        order = index.tolist()
        made = [*way.talk(slots, index, slots.rows(index), slots.shape(order), slots.lengths(order))]
        predict, width = way.predict(slots, rows), config.code_predictor_config.hidden_size
        made += [
            predict(group, torch.randn(rows * (2 if group == 0 else 1), width, generator=random)) for group in range(15)
        ]
    arenas = (slots.talker, slots.predictor)
    return [*made, *(arena.keys for arena in arenas), *(arena.values for arena in arenas)]


@pytest.mark.parametrize("name", ["small", "deep", "wide", "custom"])
@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-5), ("int8", 0.02)])
def test_layers_are_torch_s(native, name, form, tolerance):
    model = LanguageModel.load(variant(name), weights=form, native=native)
    ours = model.passes
    assert isinstance(ours, NativePasses)
    theirs = LayerPasses(model.talker, model.config.talker_config, model.way)
    for rows, length in ((1, 2), (3, 9), (9, 70)):
        for found, expected in zip(*(passes(model, way, rows, length) for way in (ours, theirs)), strict=True):
            assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_streams_codes_are_its_own(native, form):
    model = LanguageModel.load(variant("wide"), weights=form, native=native)
    alone = {seed: frames(model, [seed]) for seed in range(1, 10)}
    for company in ([1, 2], [3, 1, 4], list(range(1, 10)), [9, 2, 7, 1, 5]):
        together = frames(model, company)
        for place, seed in enumerate(company):
            assert torch.equal(together[:, [place]], alone[seed])


def test_codes_do_not_depend_on_the_threads(native):
    model = LanguageModel.load(variant("custom"), weights="int8", native=native)
    codes = []
    for count in (1, 2, 5):
        native.close()
        torch.set_num_threads(count)
        codes.append(frames(model, [1, 2, 3]))
    native.close()
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("name", cases())
def test_the_official_codes_in_fp32(native, name):
    case = cases()[name]
    _, rows = case.build()
    folder = (
        variant(case.checkpoint) if case.checkpoint in ("small", "deep", "wide", "custom") else tiny(case.checkpoint)
    )
    model = LanguageModel.load(folder, native=native)
    assert isinstance(model.passes, NativePasses)
    [codes] = run(model, [Stream(rows, GREEDY, frames=case.limit)])
    assert codes.tolist() == case.codes[: case.limit].tolist()


def test_a_form_that_it_does_not_have_goes_by_torch(native):
    model = LanguageModel.load(variant("wide"), weights="int4", native=native)
    assert isinstance(model.passes, LayerPasses)
    assert frames(model, [1]).shape == (6, 1, 16)


# --- having it ---


def test_no_compiler_is_no_error(tmp_path, caplog):
    found = find(tmp_path, compilers=("no-such-compiler",))
    assert found.native is None
    assert "there is no C compiler" in found.reason
    assert "slows speech down" in caplog.text
    model = LanguageModel.load(variant("wide"), weights="int8", native=found.native)
    assert isinstance(model.passes, LayerPasses)


def test_a_compiler_that_fails_is_named_and_the_next_one_tried(tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "broken-cc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no headers' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    with pytest.raises(NoKernel, match="broken-cc ends with 3: no headers"):
        load(DECODER, tmp_path / "cache", compilers=("broken-cc",))
    assert list((tmp_path / "cache").iterdir()) == []
    assert load(DECODER, tmp_path / "cache", compilers=("broken-cc", "cc", "gcc"))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("STEPS = 127.5f", "STEPS = 120.5f", "product in int8"),
        ("FINER = 2 *", "FINER = 3 *", "product in fine int8"),
        ("scores[i] = dot(query", "scores[i] = 1.1f * dot(query", "layers' output"),
        ("there * sin[i]", "there * -sin[i]", "layers'"),
        ("values + i * n + d + v * LANES", "values + i * n + d", "layers' output"),
        ("gate / (1 + ", "gate / (2 + ", "layers'"),
    ],
)
def test_a_kernel_that_calculates_something_else_is_not_used(tmp_path, old, new, fault):
    found = find(None, source=changed(tmp_path / "sources", old, new))
    assert found.native is None
    assert fault in found.reason


def test_the_second_start_compiles_nothing_and_other_sources_do(tmp_path):
    load(DECODER, tmp_path / "cache")
    [made] = (tmp_path / "cache").iterdir()
    before = made.stat().st_mtime_ns
    load(DECODER, tmp_path / "cache")
    assert made.stat().st_mtime_ns == before
    load(changed(tmp_path / "sources", "SPINS = 2000", "SPINS = 2001"), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_code_that_others_could_have_written_is_never_loaded(tmp_path):
    load(DECODER, tmp_path)
    [made] = tmp_path.iterdir()
    made.unlink()  # what is loaded must not change under its feet
    made.write_bytes(b"something else")
    made.chmod(0o777)
    assert load(DECODER, tmp_path)  # the file is replaced
    assert made.read_bytes() != b"something else"
    made.unlink()
    made.write_bytes(b"something else")
    made.chmod(0o700)
    tmp_path.chmod(0o777)
    assert load(DECODER, tmp_path)  # and here another folder is taken
    assert made.read_bytes() == b"something else"


def test_starts_at_the_same_time_make_one_file(tmp_path):
    code = "from pathlib import Path; from api.src.engine.native.check import find; assert find(Path.cwd()).native"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) for _ in range(2)]
    assert [process.wait(100) for process in started] == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


# --- threads ---


def test_threads_end_with_the_engine_and_come_again(tmp_path):
    found = find(tmp_path)
    assert found.native is not None
    found.native.has_exact = True
    model = load_model(tiny("custom_voice"), slots=1, threads=3, weights="int8", native=found.native)
    assert not found.native.pool.running
    worked = threading.Event()

    def work(steps):
        linear = next(part for part in model.steps.model.talker.modules() if isinstance(part, Linear))
        assert isinstance(linear.product, NativeProduct)
        linear(torch.randn(1, linear.product.matrix.inputs))
        worked.set()

    model.engine.start()
    model.engine._post(work)
    assert worked.wait(10)
    assert found.native.pool.running
    assert model.engine.stop(10)
    assert not found.native.pool.running
    torch.set_num_threads(3)
    linear, before = model.steps.model.talker.codec_head, threads()
    linear(torch.randn(1, linear.product.matrix.inputs))
    assert threads() == before + 2
    found.native.close()
    found.native.close()
    assert gone_to(before)


def test_a_pool_that_nobody_holds_has_no_threads(tmp_path):
    native, codes, row = Native(load(DECODER, tmp_path)), Int8Product.quantise(torch.ones(64, 64)), torch.ones(2, 64)
    before = threads()
    torch.set_num_threads(4)
    native.int8(codes, None, fine=False)(row)
    assert threads() == before + 3
    del native
    assert gone_to(before)


def test_calls_from_several_threads_wait_for_one_another(native):
    product = native.int8(Int8Product.quantise(torch.randn(320, 64)), None, fine=False)
    rows = torch.randn(40, 64)
    expected, wrong = product(rows), []

    def call():
        wrong.extend(number for number in range(40) if not torch.equal(product(rows[number:]), expected[number:]))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert wrong == []
