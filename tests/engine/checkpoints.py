"""Checkpoints for the engine's tests: the tiny one of the reference data, and variants of other shapes.

Owns the folders, which are temporary: weights and tokenizer of data/tiny are linked into them. A variant's weights come
from a frozen generator (numpy's RandomState), so none are stored; make_golden.py recorded the official package's
output on the same folders. Weights are large where a trained model's are small, so that a wrong layer shows.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from api.src.engine.config import ModelConfig
from api.src.engine.talker import Talker
from api.src.engine.weights import places

os.environ["OMP_NUM_THREADS"] = "1"
"""Tensors this small are many times slower on several threads, most of all where other processes want the cores too."""

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny"
EOS = 2150


@dataclass(frozen=True)
class Variant:
    """Where a checkpoint differs from the tiny one."""

    kind: str
    seed: int
    size: str = "1b7"
    hidden: int = 32
    predictor_hidden: int = 16
    layers: int = 3
    predictor_layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    eos_gain: float = 1.9
    rope_theta: float = 1e6


VARIANTS = {
    "small": Variant("custom_voice", 11, size="0b6", hidden=48, predictor_hidden=48, layers=2, heads=3, kv_heads=1),
    "deep": Variant("voice_design", 12, layers=6, predictor_layers=4, head_dim=8, rope_theta=1e4, eos_gain=1.6),
    "wide": Variant("base", 13, hidden=64, predictor_hidden=24, heads=8, kv_heads=2, eos_gain=1.6),
    "custom": Variant("custom_voice", 14, hidden=40, predictor_hidden=20, layers=4, kv_heads=4),
}


@cache
def tiny(kind: str) -> Path:
    """The folder of the reference checkpoint of a kind: custom_voice, voice_design or base."""
    folder = _folder(kind)
    shutil.copy(TINY / f"config-{kind}.json", folder / "config.json")
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    return folder


@cache
def variant(name: str) -> Path:
    """The folder of one of VARIANTS."""
    folder, shape = _folder(name), VARIANTS[name]
    config = variant_config(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        talker = Talker(ModelConfig.read(folder).talker_config)
    shapes = {f"talker.{name}": tuple(place.shape) for name, place in places(talker)}
    random = np.random.RandomState(shape.seed)
    weights = {name: _weight(name, shapes[name], random, shape) for name in sorted(shapes)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def variant_config(shape: Variant) -> dict:
    """config.json of a variant."""
    config = json.loads((TINY / f"config-{shape.kind}.json").read_text())
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    talker = config["talker_config"]
    talker.update(heads, hidden_size=shape.hidden, intermediate_size=2 * shape.hidden, num_hidden_layers=shape.layers)
    talker.update(rope_theta=shape.rope_theta)
    half = shape.head_dim // 2
    talker["rope_scaling"]["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    talker["code_predictor_config"].update(
        heads,
        hidden_size=shape.predictor_hidden,
        intermediate_size=3 * shape.predictor_hidden,
        num_hidden_layers=shape.predictor_layers,
        layer_types=["full_attention"] * shape.predictor_layers,
    )
    config["speaker_encoder_config"]["enc_dim"] = shape.hidden
    config["tts_model_size"] = shape.size
    return config


def reference(seed: int, frames: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (frames, 16) and a speaker embedding (hidden,), as of some clip."""
    random = np.random.RandomState(seed)
    codes = random.randint(0, 2048, (frames, 16))
    return torch.tensor(codes), torch.tensor(random.standard_normal(hidden).astype(np.float32))


def _weight(name: str, shape: tuple[int, ...], random: np.random.RandomState, variant: Variant) -> torch.Tensor:
    values = random.standard_normal(shape)
    if "norm" in name:
        values = 1 + 0.1 * values
    elif name.endswith("bias"):
        values *= 0.05
    elif "codec_head" in name or "lm_head" in name:
        values *= 3 / math.sqrt(shape[1])
    elif "embedding" not in name:
        values /= math.sqrt(shape[1])
    if "codec_head" in name:
        values[EOS] *= variant.eos_gain  # so that speech ends by itself after tens of frames
    return torch.tensor(values, dtype=torch.float32).bfloat16()


def _folder(name: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in TINY.iterdir():
        if not path.name.startswith(("config-", "model.")):
            (folder / path.name).symlink_to(path)
    return folder
