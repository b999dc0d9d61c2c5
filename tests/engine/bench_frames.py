"""Milliseconds per frame of the language model at real size, with random weights, beside the bound that memory sets.

python -m tests.engine.bench_frames [--size 0b6|1b7] [--threads 1] [--rows 1 8] [--frames 8] [--dtype D] [--profile]
"""

from __future__ import annotations

import argparse
import time

import torch

from api.src.engine.config import ModelConfig, PredictorConfig, TalkerConfig
from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import HalfProduct, Linear
from api.src.engine.prompt import PromptRows
from api.src.engine.sampling import Sampling
from api.src.engine.talker import Talker
from api.src.engine.weights import empty

WIDTHS = {"0b6": (1024, 3072), "1b7": (2048, 6144)}


def real_config(size: str) -> ModelConfig:
    """The published shapes, with the published ids."""
    hidden, intermediate = WIDTHS[size]
    shape = {"num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 128, "num_code_groups": 16}
    talker = TalkerConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        rope_theta=1e6,
        text_vocab_size=151_936,
        codec_pad_id=2148,
        codec_bos_id=2149,
        codec_eos_token_id=2150,
        codec_think_id=2154,
        codec_nothink_id=2155,
        codec_think_bos_id=2156,
        codec_think_eos_id=2157,
        code_predictor_config=PredictorConfig(rope_theta=1e6, **shape),
        **shape,
    )
    return ModelConfig(talker_config=talker, tts_model_type="custom_voice", tts_model_size=size)


def random_model(config: ModelConfig, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, int]]:
    """N(0, .02) weights, norms 1; the end of speech has logit 0, which top-k never picks. Also each map's size."""

    def build() -> Talker:
        talker = Talker(config.talker_config).to(dtype)
        talker.model.text_embedding.to(torch.bfloat16)
        return talker

    talker = empty(build)
    for name, weight in talker.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        elif "text_embedding" in name:
            weight.zero_()  # never read here: prompts are random rows
        else:
            weight.normal_(std=0.02)
            weight.copy_(weight.bfloat16())  # published weights are bf16
    talker.codec_head.weight[config.talker_config.codec_eos_token_id] = 0
    sizes = {name: part.weight.numel() for name, part in talker.named_modules() if isinstance(part, Linear)}
    return LanguageModel(config, talker), sizes


def bytes_per_frame(model: LanguageModel, sizes: dict[str, int]) -> int:
    """Weights that one frame reads: the talker's stack and head once, the code predictor's 15 times, a head each."""
    total = 0
    for name, part in model.talker.named_modules():
        if isinstance(part, Linear) and "text_projection" not in name:
            repeated = "code_predictor.model" in name
            passes = model.config.talker_config.num_code_groups - 1 if repeated else 1
            width = 2 if isinstance(part._product, HalfProduct) else model.weight.element_size()
            total += sizes[name] * passes * width
    return total


def read_speed(dtype: torch.dtype) -> float:
    """Bytes per second of a plain sum over 400 MB, the best of 5."""
    block = torch.ones(400_000_000 // dtype.itemsize, dtype=dtype)
    times = [_timed(block.sum) for _ in range(5)]
    return block.nbytes / min(times)


def measure(model: LanguageModel, rows: int, frames: int) -> list[tuple[float, float]]:
    """Wall and CPU seconds of each of `frames` steps of `rows` streams, prompts of 30 rows, sampling at defaults."""
    slots = model.new_slots(rows, 256, 8)
    width = model.config.talker_config.hidden_size
    rand = torch.randn(rows, 30, width, dtype=model.weight.dtype)
    prompts = [PromptRows(x, x[:0], x[0]) for x in rand]
    print(f"  prefill of {rows} x 30 rows {1e3 * _timed(lambda: _prefill(model, slots, prompts)):.0f} ms", end=" ")
    model.frame_step(slots, range(rows))
    return [_timed_twice(lambda: model.frame_step(slots, range(rows))) for _ in range(frames)]


def _prefill(model, slots, prompts):
    model.prefill(slots, [(slot, prompt, Sampling(seed=slot)) for slot, prompt in enumerate(prompts)])


def _timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _timed_twice(action) -> tuple[float, float]:
    used = time.process_time()
    wall = _timed(action)
    return wall, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0b6", choices=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    model, sizes = random_model(real_config(args.size), dtype)
    speed, amount = read_speed(dtype), bytes_per_frame(model, sizes)
    print(
        f"{args.size} {args.dtype} {args.threads} threads: {amount / 1e6:.0f} MB a frame, {speed / 1e9:.1f} GB/s",
        end="",
    )
    print(f": at least {1e3 * amount / speed:.0f} ms")
    for rows in args.rows:
        walls, cpus = (
            sorted(1e3 * x for x in column) for column in zip(*measure(model, rows, args.frames), strict=True)
        )
        middle = walls[len(walls) // 2]
        print(
            f"  {rows} rows: wall best {walls[0]:.0f}, median {middle:.0f}, CPU best {cpus[0]:.0f} ms a step, "
            f"{rows * 80 / walls[0]:.2f} x real time at best",
            flush=True,
        )
    if args.profile:
        _profile(model)


def _profile(model: LanguageModel) -> None:
    slots = model.new_slots(1, 256, 8)
    rows = torch.randn(30, model.config.talker_config.hidden_size, dtype=model.weight.dtype)
    _prefill(model, slots, [PromptRows(rows, rows[:0], rows[0])])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model.frame_step(slots, [0])
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


if __name__ == "__main__":
    main()
