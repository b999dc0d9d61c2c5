"""Milliseconds per frame of the language model at real size, with random weights, beside the bound that memory sets.

python -m tests.engine.bench_frames [--size 0.6b|1.7b] [--folder DIR] [--threads 1] [--rows 1 8] [--weights int8]
                                    [--torch] [--profile]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from api.src.engine.codec import CodecDecoder
from api.src.engine.codec_convolutions import MatrixKernel
from api.src.engine.codec_layers import ResidualUnit
from api.src.engine.codec_parts import NativeCausal
from api.src.engine.language_model import LanguageModel
from api.src.engine.linear import Form, Linear
from api.src.engine.native.check import find
from api.src.engine.native.memory import WeightMemory
from api.src.engine.prompt import PromptRows
from api.src.engine.sampling import Sampling
from api.src.engine.talker import Talker
from tests.bench.random_checkpoint import SIZES, build


def reads_per_frame(model: LanguageModel) -> tuple[int, int]:
    """Bytes and number of the weights that a frame reads: the talker's once, the predictor's 15 times, a head each."""
    with torch.device("meta"):
        sizes = {
            name: part.weight.numel()
            for name, part in Talker(model.config.talker_config).named_modules()
            if isinstance(part, Linear)
        }
    total = count = 0
    for name, part in model.talker.named_modules():
        if isinstance(part, Linear) and "text_projection" not in name:
            repeated = "code_predictor.model" in name
            passes = model.config.talker_config.num_code_groups - 1 if repeated else 1
            width = part.weight_bytes
            count += sizes[name] * passes
            total += round(sizes[name] * passes * width)
    return total, count


def read_speed(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> float:
    """Bytes per second of a plain sum over 400 MB, the best of 5, each waited for. On a CPU they lie as weights do."""
    count = 400_000_000 // dtype.itemsize
    if torch.device(device).type == "cpu":
        block = WeightMemory().take(count * dtype.itemsize).view(dtype).fill_(1)
    else:
        block = torch.ones(count, dtype=dtype, device=device)
    return block.nbytes / min(_timed(lambda: block.sum().item()) for _ in range(5))


def multiply_speed(form: Form = "fp32") -> float:
    """Operations per second of a square product with weights in that form, the best of 10."""
    block = torch.randn(1024, 1024)
    product = Linear(1024, 1024)
    product.weight.data.copy_(block)
    if form != "fp32":
        product.settle(form)
    with torch.inference_mode():
        return 2 * 1024**3 / min(_timed(lambda: product(block)) for _ in range(10))


def narrow_flop(codec: CodecDecoder) -> float:
    """Operations per frame that the codec does in bf16, counted."""
    counted: list[int] = []

    def count(product: Linear, given: tuple[Tensor], out: Tensor) -> None:
        counted.append(2 * given[0].numel() * out.shape[1])

    narrow = [part.product for part in codec.modules() if isinstance(part, MatrixKernel) and part.dtype]
    narrow += [part.narrow_mix for part in codec.modules() if isinstance(part, ResidualUnit) and part.narrow_mix]
    hooks = [product.register_forward_hook(count) for product in narrow]
    natives = [getattr(part, "native", None) for part in codec.modules()]
    watched = [_Watched(part, counted) for part in natives if isinstance(part, NativeCausal)]
    codec.decode_full(torch.zeros(1, 2, codec.codebooks.shape[0], dtype=torch.long))
    for each in (*hooks, *watched):
        each.remove()
    return sum(counted) / 2


class _Watched:
    """Counts the operations in bf16 of a layer in C, until it is removed."""

    def __init__(self, part: NativeCausal, counted: list[int]) -> None:
        self._part, run = part, part.run

        def counting(x: Tensor, *others: Any) -> Tensor:
            counted.append(2 * x.shape[0] * x.shape[1] * part.narrow_weights)
            return run(x, *others)

        part.run = counting  # type: ignore[method-assign]

    def remove(self) -> None:
        del self._part.run


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
    parser.add_argument("--size", default="0.6b", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, help="of a checkpoint of random_checkpoint, made if it is not there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", default="fp32", choices=get_args(Form))
    parser.add_argument("--torch", action="store_true", help="without the kernel of our own")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    folder = args.folder or Path(tempfile.gettempdir()) / f"random-{args.size}"
    native = find(folder).native if dtype == torch.float32 and not args.torch else None
    model = LanguageModel.load(build(folder, args.size), dtype, weights=args.weights, native=native)
    speed, amount = read_speed(dtype), reads_per_frame(model)[0]
    print(
        f"{args.size} {args.dtype} {args.weights} {args.threads} threads: {amount / 1e6:.0f} MB a frame, "
        f"{speed / 1e9:.1f} GB/s",
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
