"""Speed of the codec's decoder at its published size, random weights, beside the official one if it is installed.

    PYTHONPATH=. python -m tests.engine.bench_codec [repeats]

Prints CPU milliseconds per frame on one thread (the least of some runs, taken in turn), and the peak memory so far. The
official decoder is stateless: what it is given here is the new frames alone, without any left context.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from api.src.engine import codec_check
from api.src.engine.codec import CodecDecoder, CodecState
from api.src.engine.codec_convolutions import Tensors
from api.src.engine.config import CodecDecoderConfig
from api.src.engine.linear import settle
from api.src.engine.weights import Checkpoint
from tests.bench.random_checkpoint import codec_config

PUBLISHED = codec_config()["decoder_config"]


class RandomTensors(Tensors):
    """Any tensor that is asked for, of the scale that keeps activations finite."""

    def get(self, name: str, *shape: int) -> torch.Tensor:
        values = torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        return values.abs() + 1 if name == "cluster_usage" else values * (0.2 if name in ("alpha", "beta") else 1)


def ours() -> Callable[[torch.Tensor], torch.Tensor]:
    decoder = CodecDecoder(CodecDecoderConfig(**PUBLISHED), RandomTensors(Checkpoint(Path())))
    if native := codec_check.load():
        decoder.adopt(native)
    settle(decoder)
    state = CodecState(decoder, 4)
    megabytes = sum(each.nbytes for each in (state.tails, state.cache)) / 4e6
    print(f"state {megabytes:.1f} MB a slot ({decoder.layout.size} floats of tails); peak memory {peak():.2f} GB")
    return lambda codes: decoder.decode(codes, torch.arange(len(codes)), state)


def official() -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        from .make_golden_codec import stub_torchaudio

        stub_torchaudio()
        from qwen_tts.core.tokenizer_12hz import modeling_qwen3_tts_tokenizer_v2 as model
    except ImportError:
        return None
    config = model.Qwen3TTSTokenizerV2DecoderConfig(**PUBLISHED)
    decoder = model.Qwen3TTSTokenizerV2Decoder._from_config(config).eval()
    return torch.inference_mode()(lambda codes: decoder(codes.transpose(1, 2)))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(run: Callable[[torch.Tensor], torch.Tensor], codes: torch.Tensor) -> float:
    start = time.process_time()
    run(codes)
    return (time.process_time() - start) * 1000 / codes[..., 0].numel()


def main() -> None:
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    runs = {"ours": ours(), "official": official()}
    for batch in (1, 4):
        for frames in (1, 2, 4, 8, 20):
            codes = torch.randint(0, 2048, (batch, frames, 16))
            times = [[timed(run, codes) for run in runs.values() if run] for _ in range(repeats + 1)][1:]
            best = [f"{name} {min(each):6.1f}" for name, each in zip(runs, zip(*times, strict=True), strict=False)]
            print(f"batch {batch}, {frames:2d} frames a step: {', '.join(best)} ms/frame", flush=True)
    print(f"peak memory {peak():.2f} GB")


if __name__ == "__main__":
    main()
