"""`make judge`: what a form of the weights loses, as a recogniser and DNSMOS hear it. For those with trained weights.

    python -m tests.bench.judge --model FOLDER [--model FOLDER2] --weights fp32,int8,int4 [--voice NAME] [--takes 3]
    python -m tests.bench.judge --base-url http://127.0.0.1:8091    any OpenAI-compatible server that runs
    python -m tests.bench.judge                                     the embedded voice

Each candidate (a model in a form of its weights) is a real server, started with TTS_MODEL and TTS_CPU_WEIGHTS and asked
for a fixed list of sentences (sentences.py), one at a time, with fixed seeds and without the cache. The first candidate
is the reference. Some of the word errors are the recogniser's own: a rate means something beside the reference's only.
judge_text says how they are counted, judge_dnsmos what DNSMOS is. --keep FOLDER keeps the sounds for one's own ears;
--takes 3 speaks each sentence with three seeds, which narrows the intervals. Prints tables, and as its last line one
JSON object:

    machine, language, takes
    no_dnsmos       null, or why there is no DNSMOS: its weights are not installed
    candidates      name -> sentences (all takes), errors (of failed requests, whose words count as missed), words,
                    edits, wer (edits by words), cer (of characters; wer is that too in languages without spaces),
                    dnsmos (means of p808, ovrl, sig, bak), audio_s, real_time_factor (one request at a time),
                    worst (said, heard, wer), says (its GET /version), and of each but the first:
        difference  to the first in wer, cer and dnsmos, as [estimate, low, high]: a 95 % interval of a paired bootstrap
                    over sentences. Only where 0 lies outside it is there a difference to speak of. same_sound: takes
                    that are the reference's but for what is below -60 dBFS
    silent          name -> why that candidate's server did not start; the exit status is 1 then
    seconds         how long it took
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from api.src.engine.cores import usable_cores
from tests.bench import report
from tests.bench.judge_dnsmos import Dnsmos
from tests.bench.judge_scores import Score, compare, score, summary
from tests.bench.judge_speech import Candidate, Speech, speak
from tests.bench.sentences import SENTENCES
from tests.recogniser import load_recogniser

SCORES = ("p808", "ovrl", "sig", "bak")
_SHOWN = 300
"""Characters: a recogniser that is lost may repeat itself."""
FORMS = ("auto", "fp32", "bf16", "int8", "int4")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.weights) - set(FORMS):
        parser.error(f"--weights: {', '.join(sorted(unknown))} is none of {', '.join(FORMS)}")
    if not Path("/proc/self/stat").exists():
        print("The judge starts servers as the benchmarks do: it needs Linux.", file=sys.stderr)
        return 1
    started = time.perf_counter()
    spoken: dict[str, Speech] = {}
    silent: dict[str, str] = {}
    for candidate in candidates(options):
        try:
            spoken[candidate.name] = _spoken(candidate, options)
        except RuntimeError as error:
            silent[candidate.name] = str(error)
            print(f"{candidate.name} does not start: {error}", file=sys.stderr, flush=True)
    if spoken:
        figures = judge(spoken, options.language) | {"silent": silent, "takes": options.takes}
        figures["seconds"] = round(time.perf_counter() - started, 1)
        print(f"\n{json.dumps(figures, ensure_ascii=False)}")
    return 1 if silent else 0


def candidates(options: argparse.Namespace) -> list[Candidate]:
    """Models in each form, then servers that run; the embedded voice without any."""
    fields: dict[str, Any] = {"model": options.served_model} if options.served_model else {}
    fields |= {"language": options.language}
    short = Counter(Path(model).name for model in options.model)
    found = [
        Candidate(
            f"{Path(model).name if short[Path(model).name] == 1 else model} {form}",
            {"TTS_BACKEND": "qwen3", "TTS_MODEL": model, "TTS_CPU_WEIGHTS": form, "TTS_DEVICE": options.device},
            fields=fields | {"voice": options.voice or "vivian"},
        )
        for model in options.model
        for form in options.weights
    ]
    fields |= {"voice": options.voice or "alloy"}
    headers = dict(given.split("=", 1) for given in options.header)
    found += [Candidate(url, base_url=url, headers=headers, fields=fields) for url in options.base_url]
    return found or [Candidate("embedded", {"TTS_BACKEND": "embedded"}, fields=fields)]


def judge(spoken: dict[str, Speech], language: str) -> dict[str, Any]:
    """Listen to all candidates, the reference first, and print the tables; the figures."""
    dnsmos, no_dnsmos = _dnsmos()
    with tempfile.TemporaryDirectory(prefix="tts-judge-") as name:
        machine, recogniser = report.machine(Path(name)), load_recogniser(Path(name))
        scores = {name: _scores(name, speech, recogniser, dnsmos, language) for name, speech in spoken.items()}
    found = {name: summary(each) | {"says": spoken[name].says} for name, each in scores.items()}
    reference, *others = scores
    for name in others:
        found[name]["difference"] = compare(scores[name], scores[reference])
    _print(found, language, no_dnsmos)
    return {"machine": machine, "language": language, "no_dnsmos": no_dnsmos, "candidates": found}


def _spoken(candidate: Candidate, options: argparse.Namespace) -> Speech:
    print(f"{candidate.name} speaks", file=sys.stderr, flush=True)
    sentences = SENTENCES[options.language][: options.sentences]
    with tempfile.TemporaryDirectory(prefix="tts-judge-") as folder:
        speech = speak(candidate, sentences, Path(folder), takes=options.takes, timeout_s=options.timeout)
    if options.keep:
        _keep(options.keep / candidate.name.replace("/", "_"), speech)
    return speech


def _keep(folder: Path, speech: Speech) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, take in enumerate(speech.takes, start=1):
        (folder / f"{number:03}.wav").write_bytes(take.wav)


def _dnsmos() -> tuple[Dnsmos | None, str | None]:
    try:
        return Dnsmos(usable_cores()), None
    except FileNotFoundError as error:
        return None, str(error)


def _scores(name: str, speech: Speech, recogniser: Any, dnsmos: Dnsmos | None, language: str) -> list[Score]:
    print(f"listening to {name}", file=sys.stderr, flush=True)
    return [score(take, recogniser, dnsmos, language) for take in speech.takes]


# --- tables ---


def _print(found: dict[str, dict[str, Any]], language: str, no_dnsmos: str | None) -> None:
    head = ["", "sentences", "failed", "words", "edits", "WER %", "CER %", *_titles(), "audio s", "real-time factor"]
    report.table(f"As heard by the recogniser and by DNSMOS, {language}", head, [_row(*each) for each in found.items()])
    rows = [_difference_row(name, each["difference"]) for name, each in found.items() if "difference" in each]
    if rows:
        title = f"Difference to {next(iter(found))} [95 % interval], * where 0 is outside"
        report.table(title, ["", "WER points", "CER points", *_titles(), "same sound"], rows)
    for name, each in found.items():
        worst = each["worst"]
        heard = shorten(worst["heard"], _SHOWN, placeholder=" ...")
        print(f"\nWorst of {name}: {100 * worst['wer']:.0f} %\n  said:  {worst['said']}\n  heard: {heard}")
        if each["errors"]:
            print(f"  {len(each['errors'])} failed, the first with: {each['errors'][0]}")
        if each.get("difference", {}).get("same_sound") == each["sentences"]:
            print("  Each sound is the reference's: this form was not used, or what it loses changes nothing.")
    if no_dnsmos:
        print(f"\n-: {no_dnsmos}")


def _titles() -> list[str]:
    return ["P.808", "OVRL", "SIG", "BAK"]


def _row(name: str, each: dict[str, Any]) -> list[object]:
    opinions = [f"{each['dnsmos'][key]:.2f}" if each["dnsmos"] else "-" for key in SCORES]
    rates = [f"{100 * each[key]:.1f}" for key in ("wer", "cer")]
    factor = "-" if each["real_time_factor"] is None else f"{each['real_time_factor']:.3g}"
    counts = [each["sentences"], len(each["errors"]), each["words"], each["edits"]]
    return [name, *counts, *rates, *opinions, each["audio_s"], factor]


def _difference_row(name: str, found: dict[str, Any]) -> list[object]:
    opinions = [_interval(found["dnsmos"][key], 2) if found["dnsmos"] else "-" for key in SCORES]
    rates = [_interval([100 * value for value in found[key]], 1) for key in ("wer", "cer")]
    return [name, *rates, *opinions, found["same_sound"]]


def _interval(values: Sequence[float], digits: int) -> str:
    estimate, low, high = values
    star = "*" if low > 0 or high < 0 else ""
    return f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{star}"


def _names(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.judge", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("who is judged")
    what.add_argument(
        "--model", action="append", default=[], help="a checkpoint: folder or name on the hub; repeatable"
    )
    what.add_argument("--weights", type=_names, default=["auto"], help=f"forms: of {','.join(FORMS)}; default: auto")
    what.add_argument("--device", default="cpu", help="TTS_DEVICE of the models; forms are the CPU's; default: cpu")
    what.add_argument("--base-url", action="append", default=[], help="a server that speaks OpenAI's API; repeatable")
    what.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="for such servers")
    what.add_argument("--voice", help="default: vivian of a model, else alloy")
    what.add_argument("--served-model", help="the requests' `model`; default: none is named")
    how = parser.add_argument_group("what is said")
    how.add_argument("--language", choices=SENTENCES, default="english")
    how.add_argument("--sentences", type=int, help="only so many of the list")
    how.add_argument("--takes", type=int, default=1, help="of each sentence, each with a seed of its own")
    how.add_argument("--timeout", type=float, default=600.0, help="seconds after which a request has failed")
    how.add_argument("--keep", type=Path, metavar="FOLDER", help="for the sounds, as wav files")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
