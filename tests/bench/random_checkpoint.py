"""Checkpoints of the published size and layout with random weights: what speed and memory are measured on.

    python -m tests.bench.random_checkpoint --size 0.6b --kind custom_voice FOLDER

Random weights cost what trained ones cost. Weights are N(0, .02) and norms 1, the codec's scaled so that it sounds; the
row of the end of speech in `codec_head` is 0, whose logit top-k never picks: each request runs to its max_new_tokens.
The tokenizer is the tiny test checkpoint's, with its ids. Tensors go to the disk one by one; names and shapes are asked
of the engine's own modules. A folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from api.src.engine.codec import CodecDecoder
from api.src.engine.codec_convolutions import Tensors
from api.src.engine.codec_encoder import FrameEncoder
from api.src.engine.config import CodecConfig, CodecEncoderConfig, ModelConfig
from api.src.engine.reference import SpeakerEncoder
from api.src.engine.talker import Talker
from api.src.engine.weights import Checkpoint, places

TINY = Path(__file__).parents[1] / "engine" / "data" / "tiny"
EOS = 2150
SIZES = {"0.6b": ("0b6", 1024, 3072), "1.7b": ("1b7", 2048, 6144)}
KINDS = ("custom_voice", "voice_design", "base")
STAMP = "random.json"
"""Written last: what the folder was made of."""

_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_PIECE = 1 << 24
"""Values that are made at once."""

Shapes = dict[str, tuple[int, ...]]


def build(folder: Path, size: str = "0.6b", kind: str = "custom_voice", seed: int = 0) -> Path:
    """Make the checkpoint in `folder`, unless it is there already."""
    stamp = {"size": size, "kind": kind, "seed": seed, "torch": torch.__version__}
    if (folder / STAMP).is_file() and json.loads((folder / STAMP).read_text()) == stamp:
        return folder
    codec = folder / "speech_tokenizer"
    codec.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)
    for path in TINY.rglob("*.*"):
        if path.is_file() and not path.name.startswith(("config-", "config.", "model.")):
            shutil.copy(path, folder / path.relative_to(TINY))
    _save(folder / "config.json", model_config(size, kind))
    _save(codec / "config.json", codec_config())
    generator = torch.Generator().manual_seed(seed)
    _write(folder / "model.safetensors", model_shapes(folder), torch.bfloat16, generator)
    _write(codec / "model.safetensors", codec_shapes(folder), torch.float32, generator)
    _save(folder / STAMP, stamp)
    return folder


# --- configuration ---


def model_config(size: str, kind: str) -> dict[str, Any]:
    """config.json: the tiny checkpoint's with the published sizes."""
    name, hidden, intermediate = SIZES[size]
    config: dict[str, Any] = json.loads((TINY / f"config-{kind}.json").read_text())
    talker = config["talker_config"]
    talker.update(_HEADS, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=28)
    talker.update(text_hidden_size=2048, text_vocab_size=151_936)
    talker["rope_scaling"]["mrope_section"] = [24, 20, 20]
    talker["code_predictor_config"].update(
        _HEADS,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=5,
        layer_types=["full_attention"] * 5,
    )
    config["tts_model_size"] = name
    config["speaker_encoder_config"] = {"enc_dim": hidden, "sample_rate": 24_000}
    return config


def codec_config() -> dict[str, Any]:
    """speech_tokenizer/config.json. What it leaves out has the published value by default."""
    config: dict[str, Any] = json.loads((TINY / "speech_tokenizer" / "config.json").read_text())
    config["encoder_config"] = {"_frame_rate": 12.5, "num_quantizers": 32, "use_causal_conv": True}
    config["decoder_config"] = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "codebook_dim": 512,
        "latent_dim": 1024,
        "head_dim": 64,
        "sliding_window": 72,
    }
    return config


# --- names and shapes ---


def model_shapes(folder: Path) -> Shapes:
    """Of model.safetensors, in the order of the modules; the speaker encoder only where a clip can be a voice."""
    config = ModelConfig.read(folder)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"talker": Talker(config.talker_config)}
        if config.tts_model_type == "base":
            parts["speaker_encoder"] = SpeakerEncoder(config.speaker_encoder_config)
    return {f"{part}.{name}": tuple(place.shape) for part in parts for name, place in places(parts[part])}


def codec_shapes(folder: Path) -> Shapes:
    """Of speech_tokenizer/model.safetensors, with what the published file has and the engine does not read."""
    config = CodecConfig.read(folder)
    found: Shapes = {}

    class Asked(Tensors):
        def get(self, name: str, *shape: int) -> Tensor:
            found[self.prefix + name] = shape
            return torch.empty(shape, device="meta")

    with torch.device("meta"):
        CodecDecoder(config.decoder_config, Asked(Checkpoint(Path()), "decoder."))
        encoder = FrameEncoder(config.encoder_config)
    dim = config.decoder_config.codebook_dim
    for part in ("rvq_first", "rvq_rest"):
        found[f"decoder.quantizer.{part}.input_proj.weight"] = (dim // 2, dim, 1)
    found |= {f"encoder.{name}": tuple(place.shape) for name, place in places(encoder)}
    return found | _quantizer_shapes(config.encoder_config)


def _quantizer_shapes(config: CodecEncoderConfig) -> Shapes:
    size, dim, hidden = config.codebook_size, config.codebook_dim, config.hidden_size
    semantic = config.num_semantic_quantizers
    shapes: Shapes = {}
    for name, count in (("semantic", semantic), ("acoustic", config.num_quantizers - semantic)):
        part = f"encoder.quantizer.{name}_residual_vector_quantizer"
        shapes |= {f"{part}.input_proj.weight": (dim, hidden, 1), f"{part}.output_proj.weight": (hidden, dim, 1)}
        for index in range(count):
            book = f"{part}.layers.{index}.codebook"
            shapes |= {f"{book}.initialized": (1,), f"{book}.cluster_usage": (size,), f"{book}.embed_sum": (size, dim)}
    return shapes


# --- values ---


def _write(path: Path, shapes: Shapes, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A safetensors file: the length of its header, the header, then the tensors in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _values(name, shape, generator):
                file.write(piece.to(dtype).view(torch.uint8).numpy().tobytes())


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """One tensor's values in pieces."""
    if name.endswith("codec_head.weight"):
        head = torch.empty(shape).normal_(0, 0.02, generator=generator)
        head[EOS] = 0
        yield head.flatten()
        return
    scale = _scale(name, shape)
    for begin in range(0, math.prod(shape), _PIECE):
        piece = torch.ones(min(_PIECE, math.prod(shape) - begin))
        yield piece if scale is None else piece.normal_(0, scale, generator=generator)


def _scale(name: str, shape: tuple[int, ...]) -> float | None:
    """The standard deviation of a tensor's values; None: all are 1."""
    last = name.rpartition(".")[2]
    if ("norm" in name and last == "weight") or last in ("cluster_usage", "initialized", "scale", "gamma"):
        return None
    if not name.startswith(("decoder.", "encoder.")):
        return 0.02
    if "embed" in last:
        return 1.0
    if last in ("alpha", "beta"):
        return 0.2
    return 1 / math.sqrt(math.prod(shape[1:]))


def _save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.random_checkpoint", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--kind", choices=KINDS, default="custom_voice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    print(build(options.folder, options.size, options.kind, options.seed))


if __name__ == "__main__":
    main()
