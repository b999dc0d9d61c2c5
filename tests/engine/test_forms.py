"""Forms of a whole model's weights: which modules get them, what comes from the cache, and streams side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from api.src.engine.config import ModelConfig
from api.src.engine.forms import Settler, cache_folders
from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import Linear
from api.src.engine.products import HalfProduct
from api.src.engine.prompt import PromptRows
from api.src.engine.quantised import FineInt8Product, Int4Product, Int8Product
from api.src.engine.sampling import Sampling
from api.src.engine.talker import Talker
from api.src.engine.weights import Checkpoint, empty, load
from tests.engine.checkpoints import tiny, variant


def loaded(folder: Path, form: str, cache=(), seen=None) -> LanguageModel:
    """As the server loads it; `seen` gets each part that is filled from the checkpoint."""
    config = ModelConfig.read(folder)
    talker = empty(lambda: Talker(config.talker_config), torch.float32)
    with Checkpoint(folder) as checkpoint, Settler(talker, form, checkpoint=folder, cache=cache) as settler:

        def filled(part):
            settler.filled(part)
            if seen is not None:
                seen.append(part)

        load(talker, checkpoint, "talker.", ready=settler.ready, filled=filled)
    return LanguageModel(config, talker)


def frames(model: LanguageModel, streams: list[int], count: int = 6) -> torch.Tensor:
    """Codes (count, B, C) of streams by seed."""
    slots = model.new_slots(len(streams), 64, 8)
    width = model.config.talker_config.hidden_size
    entries = []
    for slot, seed in enumerate(streams):
        rows = torch.randn(5 + seed % 3, width, generator=torch.Generator().manual_seed(seed))
        entries.append((slot, PromptRows(rows, rows[:0], rows[0]), Sampling(seed=seed, min_new_tokens=100)))
    model.prefill(slots, entries)
    return torch.stack([model.frame_step(slots, list(range(len(streams)))) for _ in range(count)])


def kinds(model: LanguageModel) -> dict[str, type]:
    return {name: type(part._product) for name, part in model.talker.named_modules() if isinstance(part, Linear)}


def test_layers_are_quantised_and_what_chooses_codes_is_exact():
    for name, kind in kinds(loaded(variant("wide"), "int8")).items():
        if "layers." not in name:
            assert kind is HalfProduct, name
        else:
            assert kind is (FineInt8Product if name.endswith("down_proj") else Int8Product), name


def test_4_bits_where_the_shape_has_a_kernel():
    found = kinds(loaded(variant("wide"), "int4"))
    assert found["model.layers.0.self_attn.qkv_proj"] is Int4Product
    assert found["code_predictor.model.layers.0.self_attn.qkv_proj"] is Int8Product  # 24 inputs


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["wide", "deep"])
def test_a_streams_codes_are_its_own_in_every_form(form, name):
    model = loaded(variant(name), form)
    together = frames(model, [3, 1, 4, 8, 5])
    for place, seed in enumerate([3, 1, 4, 8, 5]):
        assert torch.equal(together[:, [place]], frames(model, [seed]))
    assert torch.equal(together[:, [4, 0]], frames(model, [5, 3]))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_second_load_reads_no_quantised_weight_and_speaks_alike(tmp_path, form):
    first = loaded(variant("custom"), form, [tmp_path])
    seen: list = []
    second = loaded(variant("custom"), form, [tmp_path], seen)
    assert seen
    quantised = {
        part for part in seen if isinstance(part, Linear) and isinstance(part._product, Int8Product | Int4Product)
    }
    assert not quantised
    assert kinds(first) == kinds(second)
    assert torch.equal(frames(first, [1, 2]), frames(second, [1, 2]))


def test_a_damaged_cache_costs_one_reading_and_changes_nothing(tmp_path):
    plain = frames(loaded(variant("custom"), "int8"), [1])
    loaded(variant("custom"), "int8", [tmp_path])
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    seen: list = []
    assert torch.equal(frames(loaded(variant("custom"), "int8", [tmp_path], seen), [1]), plain)
    assert sum(isinstance(part, Linear) and isinstance(part._product, Int8Product) for part in seen) == 1
    assert not path.exists()
    loaded(variant("custom"), "int8", [tmp_path])
    assert path.exists()


def test_forms_that_lose_nothing_leave_no_file(tmp_path):
    loaded(tiny("custom_voice"), "fp32", [tmp_path])
    loaded(tiny("custom_voice"), "bf16", [tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_a_load_that_fails_leaves_no_file(tmp_path):
    folder = variant("custom")
    config = ModelConfig.read(folder)
    talker = empty(lambda: Talker(config.talker_config), torch.float32)
    with pytest.raises(RuntimeError), Settler(talker, "int8", checkpoint=folder, cache=[tmp_path]):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_quantised_weight(tmp_path):
    folder = variant("custom")
    for _ in range(2):  # made, and read
        config = ModelConfig.read(folder)
        talker = empty(lambda config=config: Talker(config.talker_config), torch.float32)
        told: list[tuple[int, int]] = []
        settler = Settler(
            talker, "int8", checkpoint=folder, cache=[tmp_path], progress=lambda *now, told=told: told.append(now)
        )
        with Checkpoint(folder) as checkpoint, settler:
            load(talker, checkpoint, "talker.", ready=settler.ready, filled=settler.filled)
        total = 4 * (
            config.talker_config.num_hidden_layers + config.talker_config.code_predictor_config.num_hidden_layers
        )
        assert told == [(done + 1, total) for done in range(total)]


def test_the_cache_is_beside_the_checkpoint_or_elsewhere(tmp_path):
    assert cache_folders(tmp_path) == [tmp_path / ".qwen3-tts"]
    assert cache_folders(tmp_path, Path("/elsewhere")) == [tmp_path / ".qwen3-tts", Path("/elsewhere")]
