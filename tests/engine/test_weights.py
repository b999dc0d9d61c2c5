"""Loading: whatever is wrong with a checkpoint is said, by name, before anything speaks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from api.src.engine.errors import CheckpointError, EngineError
from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import PackedLinear
from api.src.engine.weights import Checkpoint, empty, load, places
from tests.engine.checkpoints import tiny


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3)
        self.qkv = PackedLinear(3, {"q": 4, "k": 2})
        self.register_buffer("scale", torch.empty(2))


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"norm.weight": (3,), "norm.bias": (3,), "q.weight": (4, 3), "k.weight": (2, 3), "scale": (2,)}
    return {f"small.{name}": torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def saved(folder, given: dict[str, torch.Tensor]):
    save_file(given, folder / "model.safetensors")
    return folder


def sharded(folder, given: dict[str, torch.Tensor]):
    names = sorted(given)
    shards = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    for shard, inside in shards.items():
        save_file({name: given[name] for name in inside}, folder / shard)
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def loaded(folder) -> Small:
    module = empty(Small, torch.float32)
    with Checkpoint(folder) as checkpoint:
        load(module, checkpoint, "small.", ignore=("other.",))
    return module


@pytest.mark.parametrize("write", [saved, sharded])
def test_every_tensor_lands_in_its_place_and_dtype(write, tmp_path):
    given = tensors()
    module = loaded(write(tmp_path, given | {"small.other.x": torch.ones(1), "elsewhere": torch.ones(1)}))
    assert module.qkv.weight.dtype == torch.float32
    assert torch.equal(module.qkv.weight[:4], given["small.q.weight"].float())
    assert torch.equal(module.qkv.weight[4:], given["small.k.weight"].float())
    assert torch.equal(module.norm.bias, given["small.norm.bias"].float())
    assert torch.equal(module.scale, given["small.scale"].float())
    assert {f"small.{name}" for name, _ in places(module)} == set(given)


def test_each_part_is_announced_once_it_is_filled(tmp_path):
    saved(tmp_path, tensors())
    seen = []
    module = empty(Small, torch.float32)
    module.norm.weight.fill_(torch.nan)
    with Checkpoint(tmp_path) as checkpoint:
        load(module, checkpoint, "small.", filled=lambda part: seen.append((part, module.norm.weight.isnan().any())))
    assert [type(part).__name__ for part, _ in seen] == ["Small", "LayerNorm", "PackedLinear"]
    assert not seen[1][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"small.k.weight": None}, "lacks tensors: small.k.weight"),
        ({"small.more": torch.ones(1)}, "unexpected tensors: small.more"),
        ({"small.k.weight": torch.ones(2, 4)}, r"small.k.weight is \(2, 4\) in .*, \(2, 3\) by its config"),
        ({"small.norm.bias": torch.ones(3, 1)}, "small.norm.bias is"),
        (dict.fromkeys(tensors()), "and 2 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    given = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        loaded(saved(tmp_path, given))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_damaged(kept, tmp_path):
    path = saved(tmp_path, tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated"):
        loaded(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        loaded(tmp_path)
    sharded(tmp_path, tensors())
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks two.safetensors"):
        loaded(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        loaded(tmp_path)


def test_a_tensor_asked_for_by_name_may_be_missing(tmp_path):
    with (
        Checkpoint(saved(tmp_path, tensors())) as checkpoint,
        pytest.raises(EngineError, match="lacks the tensor nothing"),
    ):
        checkpoint.tensor("nothing")


def test_weights_by_another_config_are_refused(tmp_path):
    """A real checkpoint whose config.json says another width."""
    source = tiny("custom_voice")
    for path in source.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    config["talker_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks tensors: talker.model.layers.3"):
        LanguageModel.load(tmp_path)
    config["talker_config"].update(num_hidden_layers=3, intermediate_size=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"by its config.json"):
        LanguageModel.load(tmp_path)


def test_the_text_table_keeps_the_files_dtype():
    model = LanguageModel.load(tiny("base"))
    assert model.talker.model.text_embedding.weight.dtype == torch.bfloat16
    assert model.talker.model.codec_embedding.weight.dtype == torch.float32
