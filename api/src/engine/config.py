"""The checkpoint's configuration as frozen dataclasses.

Owns the reading of config.json, generation_config.json and speech_tokenizer/config.json. Names are the files' own. A
field that a file leaves out has the default of the official configuration classes (qwen-tts 0.1.1; for the codec's
encoder MimiConfig of transformers), as saved files may omit what equals a default. One without a default must be there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, get_origin, get_type_hints

from .errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where a checkpoint's weights lie: in this file, or in those that the index names."""

Raw = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of one Qwen3-style decoder stack."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_code_groups: int = 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 32_768
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False


@dataclass(frozen=True)
class PredictorConfig(TransformerConfig):
    """talker_config.code_predictor_config: codes 1..15 of a frame."""

    vocab_size: int = 2048
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 5
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True)
class TalkerConfig(TransformerConfig):
    """talker_config: code 0 of each frame, the text side, and every special id of the codec's vocabulary."""

    vocab_size: int = 3072
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 0
    """0: hidden_size / num_attention_heads, filled in on reading."""
    code_predictor_config: PredictorConfig = field(default_factory=PredictorConfig)
    text_vocab_size: int = field(kw_only=True)
    text_hidden_size: int = 2048
    codec_pad_id: int = 4196
    codec_bos_id: int = 4197
    codec_eos_token_id: int = 4198
    codec_think_id: int = 4202
    codec_nothink_id: int = 4203
    codec_think_bos_id: int = 4204
    codec_think_eos_id: int = 4205
    codec_language_id: dict[str, int] = field(default_factory=dict)
    spk_id: dict[str, int] = field(default_factory=dict)
    spk_is_dialect: dict[str, str | bool] = field(default_factory=dict)
    """Speaker -> the dialect that it speaks, a key of codec_language_id, or False."""

    def __post_init__(self) -> None:
        _fill_head_dim(self)


@dataclass(frozen=True)
class SpeakerEncoderConfig:
    """speaker_encoder_config: the ECAPA-TDNN of the Base checkpoints."""

    mel_dim: int = 128
    enc_dim: int = 1024
    enc_channels: tuple[int, ...] = (512, 512, 512, 512, 1536)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 128
    enc_res2net_scale: int = 8
    enc_se_channels: int = 128
    sample_rate: int = 24_000


@dataclass(frozen=True)
class CodecDecoderConfig:
    """decoder_config of the codec: codes to samples."""

    latent_dim: int = 1024
    codebook_dim: int = 512
    codebook_size: int = 2048
    decoder_dim: int = 1536
    hidden_size: int = 1024
    intermediate_size: int = 3072
    hidden_act: str = "silu"
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 72
    num_quantizers: int = 16
    num_semantic_quantizers: int = 1
    upsample_rates: tuple[int, ...] = (8, 5, 4, 3)
    upsampling_ratios: tuple[int, ...] = (2, 2)
    attention_bias: bool = False
    max_position_embeddings: int = 8000


@dataclass(frozen=True)
class CodecEncoderConfig:
    """encoder_config of the codec (Mimi): samples to codes."""

    audio_channels: int = 1
    num_filters: int = 64
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    num_residual_layers: int = 1
    dilation_growth_rate: int = 2
    compress: int = 2
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    """The decoder's order; the encoder strides by them reversed."""
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 0
    """0: hidden_size / num_attention_heads, filled in on reading."""
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 250
    """Not applied by the official package (transformers 4.57.3 attends to all of the past)."""
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    codebook_size: int = 2048
    codebook_dim: int = 256
    vector_quantization_hidden_dimension: int = 256
    pad_mode: str = "constant"
    use_causal_conv: bool = True
    use_conv_shortcut: bool = False
    trim_right_ratio: float = 1.0
    sampling_rate: int = 24_000
    max_position_embeddings: int = 8000
    attention_bias: bool = False

    def __post_init__(self) -> None:
        _fill_head_dim(self)


@dataclass(frozen=True)
class CodecConfig:
    """speech_tokenizer/config.json."""

    encoder_config: CodecEncoderConfig = field(default_factory=CodecEncoderConfig)
    decoder_config: CodecDecoderConfig = field(default_factory=CodecDecoderConfig)
    encoder_valid_num_quantizers: int = 16
    input_sample_rate: int = 24_000
    output_sample_rate: int = 24_000
    decode_upsample_rate: int = 1920
    encode_downsample_rate: int = 1920

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The codec's configuration: of a checkpoint folder, which holds speech_tokenizer/, or of the codec's own."""
        path = _codec_folder(folder) / "config.json"
        return _build(cls, _architecture(path, "qwen3_tts_tokenizer_12hz"), str(path))


@dataclass(frozen=True)
class ChoiceConfig:
    """How codes are chosen: of the talker, and of the subtalker, which is the code predictor."""

    do_sample: bool = True
    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.05
    subtalker_dosample: bool = True
    subtalker_temperature: float = 0.9
    subtalker_top_k: int = 50
    subtalker_top_p: float = 1.0


@dataclass(frozen=True)
class GenerationConfig(ChoiceConfig):
    """generation_config.json: the checkpoint's own choice, and how many tokens end an utterance."""

    max_new_tokens: int = 2048


@dataclass(frozen=True)
class ModelConfig:
    """config.json, with generation_config.json beside it."""

    talker_config: TalkerConfig
    tts_model_type: str
    """custom_voice, voice_design or base."""
    tts_model_size: str
    """0b6 or 1b7."""
    im_start_token_id: int = 151_644
    im_end_token_id: int = 151_645
    tts_pad_token_id: int = 151_671
    tts_bos_token_id: int = 151_672
    tts_eos_token_id: int = 151_673
    speaker_encoder_config: SpeakerEncoderConfig = field(default_factory=SpeakerEncoderConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The configuration of the checkpoint in `folder`.

        Raises:
            CheckpointError: a missing or unreadable file, another architecture, a missing or mistyped field.
        """
        raw = dict(_architecture(folder / "config.json", "qwen3_tts"))
        optional = folder / "generation_config.json"
        if optional.is_file():
            raw["generation"] = _json(optional)
        config = _build(cls, raw, "config.json")
        _check(config)
        return config


def _fill_head_dim(config: TalkerConfig | CodecEncoderConfig) -> None:
    if config.head_dim == 0:
        object.__setattr__(config, "head_dim", config.hidden_size // config.num_attention_heads)


def _codec_folder(folder: Path) -> Path:
    inner = folder / "speech_tokenizer"
    return inner if inner.is_dir() else folder


def _json(path: Path) -> Raw:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no object")
    return raw


def _architecture(path: Path, expected: str) -> Raw:
    raw = _json(path)
    if raw.get("model_type") != expected:
        raise CheckpointError(f"{path} describes a {raw.get('model_type')!r}, not a {expected!r}")
    return raw


def _build(cls: type[T], raw: Raw, where: str) -> T:
    """`raw` as a `cls`: known fields converted and nested, unknown ones ignored, null taken as left out."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = raw.get(item.name)
        if value is not None:
            values[item.name] = _value(hints[item.name], value, f"{where}: {item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise CheckpointError(f"{where} lacks {item.name}")
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, _of_type(Mapping, value, where), where)
    if kind is float:
        return float(_of_type((int, float), value, where))
    origin = get_origin(kind)
    if origin is tuple:
        return tuple(_of_type(int, each, where) for each in _of_type(list, value, where))
    return _of_type(origin or kind, value, where)


def _of_type(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', 'number')}")
    return value


def _check(config: ModelConfig) -> None:
    """What the engine's arithmetic takes for granted, so that another shape fails here and not as noise."""
    known = ("custom_voice", "voice_design", "base")
    if config.tts_model_type not in known:
        raise CheckpointError(f"config.json: tts_model_type {config.tts_model_type!r} is none of {', '.join(known)}")
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    if talker.num_code_groups != predictor.num_code_groups:
        raise CheckpointError("config.json: talker and code predictor differ in num_code_groups")
    _check_stack("talker_config", talker)
    _check_stack("code_predictor_config", predictor)


def _check_stack(name: str, stack: TransformerConfig) -> None:
    supported = {
        "hidden_act": stack.hidden_act == "silu",
        "attention_bias": not stack.attention_bias,
        "use_sliding_window": not stack.use_sliding_window,
        # mrope's three rows always carry the same position, which is plain rope
        "rope_scaling": stack.rope_scaling.get("rope_type", "default") == "default",
        "num_key_value_heads": stack.num_attention_heads % stack.num_key_value_heads == 0,
    }
    for field_name, fine in supported.items():
        if not fine:
            value = getattr(stack, field_name)
            raise CheckpointError(f"config.json: {name}.{field_name} = {value!r} is not supported")
