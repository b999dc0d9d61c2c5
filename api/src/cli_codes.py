"""The command `codes`: one utterance of a Qwen3-TTS checkpoint as codes and samples in a file.

Owns its arguments and what each kind of checkpoint takes of them. For comparing with the official package and for bug
reports; torch is imported when the command runs, for only the `qwen3` extra brings it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .audio.decode import decode_recording
from .engine.config import ModelConfig
from .engine.errors import EngineError
from .errors import InvalidRequest, NotReady

TAKEN = {"custom_voice": {"speaker", "instruct"}, "voice_design": {"instruct"}, "base": {"ref_audio", "ref_text"}}
NEEDED = {"custom_voice": "speaker", "base": "ref_audio"}
MAX_CLIP_SECONDS, MAX_CLIP_BYTES = 600.0, 1 << 28


def add_codes(commands: Any) -> None:
    """Register the command with argparse's sub-parsers."""
    codes = commands.add_parser("codes", help="run a Qwen3-TTS checkpoint alone, and keep codes and samples")
    codes.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    codes.add_argument("--text", required=True)
    codes.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="codes (T,16), wav (float32)")
    codes.add_argument("--language", default="auto")
    codes.add_argument("--speaker", help="of a CustomVoice checkpoint")
    codes.add_argument("--instruct", help="how to speak; of a VoiceDesign checkpoint, the voice")
    codes.add_argument("--ref-audio", type=Path, metavar="F", help="the recording to clone, of a Base checkpoint")
    codes.add_argument("--ref-text", help="what the recording says; without it the voice is cloned by embedding alone")
    codes.add_argument("--text-stream", action="store_true", help="the layout of text that comes as a stream")
    codes.add_argument("--greedy", action="store_true", help="the likeliest code everywhere, never a drawn one")
    codes.add_argument("--seed", type=int, default=0)
    codes.add_argument("--max-new-tokens", type=int, metavar="N", help="N - 1 frames, as in the official package")
    codes.add_argument("--device", default="cpu")
    codes.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model")
    codes.set_defaults(run=lambda settings, options: run(options))


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    Raises:
        InvalidRequest: whatever cannot be spoken, read or written.
        NotReady: the `qwen3` extra is missing.
    """
    try:
        config = ModelConfig.read(options.model)
        _check(config, options)
        spoken, ending = _speak(config, options)
    except EngineError as error:
        raise InvalidRequest(str(error)) from error
    try:
        with options.out.open("wb") as file:  # given a name, numpy would add a suffix to it
            np.savez(file, **spoken)
    except OSError as error:
        raise InvalidRequest(f"{options.out} cannot be written: {error.strerror}.") from error
    sys.stdout.write(f"{options.out}: {len(spoken['codes'])} frames, ended by {ending}\n")
    return 0


def _check(config: ModelConfig, options: argparse.Namespace) -> None:
    """What can be said before anything large is loaded."""
    kind = config.tts_model_type
    for name in ("speaker", "instruct", "ref_audio", "ref_text"):
        given, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if given and name not in TAKEN[kind]:
            raise InvalidRequest(f"A {kind} checkpoint takes no {option}.")
        if not given and name == NEEDED.get(kind):
            raise InvalidRequest(f"A {kind} checkpoint needs {option}.")
    longest = config.talker_config.max_position_embeddings
    if options.max_new_tokens is not None and not 2 <= options.max_new_tokens <= longest:
        raise InvalidRequest(f"--max-new-tokens must be from 2 to {longest}.")
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise InvalidRequest(f"{options.out} cannot be written: its folder is missing, or it is one.")


def _speak(config: ModelConfig, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    try:
        import torch

        from .engine.generate import Generator
        from .engine.prompt import Prompt
        from .engine.sampling import Sampling
    except ImportError as error:
        raise NotReady(f"Qwen3-TTS cannot run ({error}): make setup-qwen3 installs what it needs.") from error
    rate = config.speaker_encoder_config.sample_rate
    clip = options.ref_audio and decode_recording(
        options.ref_audio, rate, max_seconds=MAX_CLIP_SECONDS, max_bytes=MAX_CLIP_BYTES
    )
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise InvalidRequest(f"The device {options.device} cannot be used: {error}") from error
    generator = Generator(options.model, options.device, getattr(torch, options.dtype))
    sampling = Sampling.default(config.generation, options.seed)
    if options.greedy:
        sampling = replace(sampling, do_sample=False, subtalker_dosample=False)
    prompt = Prompt(
        options.text,
        options.language,
        options.speaker,
        options.instruct,
        None if clip is None else generator.clone(clip, options.ref_text or ""),
        text_at_once=not options.text_stream,
    )
    spoken = generator.speak(prompt, sampling, (options.max_new_tokens or config.generation.max_new_tokens) - 1)
    return {"codes": spoken.codes, "wav": spoken.samples}, "the model" if spoken.ended else "the limit"
