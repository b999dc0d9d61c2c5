"""Record the official package's output on the variants of checkpoints.py, for test_parity.py.

Needs a virtual environment of its own, as qwen-tts pins its dependencies:
    python3 -m venv official
    official/bin/pip install torch==2.13.0 && official/bin/pip install qwen-tts==0.1.1
    PYTHONPATH=. official/bin/python -m tests.engine.make_golden
writes tests/engine/data/variants.npz: per case the codes, the prompt's rows and the text rows to come; the processed
scores of the package's own sampling for random logits; `meta` (JSON): cases, sampling settings, processors, token ids.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
import warnings
from contextlib import contextmanager

import numpy as np
import torch

from tests.engine.checkpoints import DATA, EOS, VARIANTS, reference, variant

GREEDY = {"do_sample": False, "subtalker_dosample": False, "max_new_tokens": 25}
GERMAN = "Zwölf Boxkämpfer jagen Eva quer über den Sylter Deich."
CASES = {
    "plain": {"variant": "small", "text": "Good morning.", "speaker": "Serena", "language": "English"},
    "no_instruct": {"variant": "small", "text": "One.", "speaker": "Aiden", "instruct": "Angry.", "at_once": False},
    "japanese": {"variant": "small", "text": "こんにちは、世界。", "speaker": "Ono_Anna", "language": "Japanese"},
    "design_long": {"variant": "deep", "text": GERMAN, "language": "German", "instruct": "A warm old voice."},
    "design_stream": {"variant": "deep", "text": GERMAN, "instruct": "Whispered.", "at_once": False},
    "design_bare": {"variant": "deep", "text": "7 cats & 3 dogs?!", "language": "Korean"},
    "icl_long_clip": {
        "variant": "wide",
        "text": "Hello.",
        "language": "English",
        "clip": [1, 40, "One two"],
        "at_once": False,
    },
    "icl_short_clip": {"variant": "wide", "text": GERMAN, "clip": [2, 5, "Good morning"], "at_once": False},
    "icl_at_once": {"variant": "wide", "text": "Bonjour à tous.", "language": "French", "clip": [3, 9, "Oui."]},
    "xvector": {
        "variant": "wide",
        "text": "Hola, ¿qué tal?",
        "language": "Spanish",
        "clip": [4, 0, ""],
        "at_once": False,
    },
    "xvector_at_once": {"variant": "wide", "text": "Ciao.", "language": "Italian", "clip": [5, 0, ""]},
    "dialect": {"variant": "custom", "text": "你好，北京！", "speaker": "dylan", "at_once": False},
    "dialect_other": {"variant": "custom", "text": "Olá a todos.", "speaker": "Dylan", "language": "Portuguese"},
    "instruct": {
        "variant": "custom",
        "text": "Привет, мир.",
        "speaker": "Sohee",
        "language": "Russian",
        "instruct": "Glad.",
    },
    "instruct_stream": {
        "variant": "custom",
        "text": "Thank you\n\nall right.",
        "speaker": "ryan",
        "instruct": "Slow.",
        "at_once": False,
    },
}
TEXTS = [
    "Hello world, it's 2024 and I'D say: don't!",
    "iPhone/iPad  v2.10   (beta)\n\n\tindented\r\nline ",
    "你好，北京！ こんにちは、世界。 안녕하세요",
    "Zwölf Boxkämpfer, œuvre, ÀÉÎ, cafe\u0301, ﬁne, ½, Ⅷ",
    "Привет, мир… ¿Qué tal? — “quoted” 'single'",
    "emoji 👩‍👩‍👧 🇩🇪 and symbols ∑≠√ €9,99 #tag @me http://x.y/z?a=b&c",
    "हिन्दी ไทย العربية עברית",
    "<|im_start|>assistant\nOne.<|im_end|>\n<|im_start|>assistant\n<tts_pad><think> < |im_end|>",
]
SAMPLED = "dialect"
SCORES = [
    {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.05},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.5},
    {"temperature": 0.5, "top_k": 5, "top_p": 0.6, "repetition_penalty": 1.0},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.95, "repetition_penalty": 2.0},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.05},
]


def main() -> None:
    _stub_torchaudio()
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from qwen_tts import Qwen3TTSModel

    arrays: dict[str, np.ndarray] = {}
    meta = {
        "cases": {},
        "scores": SCORES,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    models = {}
    for name, case in CASES.items():
        kind = case["variant"]
        if kind not in models:
            models[kind] = Qwen3TTSModel.from_pretrained(
                str(variant(kind)), dtype=torch.float32, attn_implementation="eager"
            )
        found = _run(models[kind], case)
        margins = found.pop("margins")
        arrays.update({f"{name}/{key}": value for key, value in found.items()})
        meta["cases"][name] = case | {"frames": len(found["codes"]), "margin": min(margins)}
        print(name, meta["cases"][name])
    meta["tokens"] = {text: models["custom"]._tokenize_texts([text])[0][0].tolist() for text in TEXTS}
    meta["processors"] = _record_scores(models["custom"].model.talker, arrays)
    print(meta["processors"])
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez_compressed(DATA / "variants.npz", **arrays)


def _run(model, case: dict) -> dict:
    """Codes (T, 16), prompt rows, text rows to come, and the margins between best and second logits."""
    seen: dict = {}
    margins: list[float] = []
    with _watched(model, seen, margins):
        _speak(model, case)
    codes = seen["codes"].numpy().astype(np.int16)
    found = {"codes": codes, "rows": seen["rows"], "trailing": seen["trailing"], "margins": margins}
    if case is CASES[SAMPLED]:
        found |= {"first": _odds(model, seen["logits"][0]), "second": _odds(model, seen["logits"][1])}
    return found


def _odds(model, logits: torch.Tensor) -> np.ndarray:
    """The distribution that the package samples from at a stream's begin, at default settings."""
    chain = _processors(model.model.talker, SCORES[0], [*range(2048, EOS), *range(EOS + 1, len(logits))])
    if len(logits) == 2048:  # the code predictor has no ids to suppress, and no end
        logits = torch.cat((logits, torch.full((1024,), -torch.inf)))
    return chain(torch.zeros(1, 0, dtype=torch.long), logits[None])[0].softmax(-1).numpy()


@contextmanager
def _watched(model, seen: dict, margins: list[float]):
    """Note what goes into the talker and comes out of the model, in place of decoding it."""
    inner, talker = model.model, model.model.talker
    generate, talk, decode = inner.generate, talker.generate, inner.speech_tokenizer.decode

    def watched_talk(**given):
        seen["rows"] = given["inputs_embeds"][0].numpy()
        seen["trailing"] = given["trailing_text_hidden"][0].numpy()
        return talk(**given)

    def watched_generate(**given):
        result = generate(**given)
        seen["codes"] = result[0][0]
        return result

    def margin(module, given, logits):
        best = logits[0, -1, :2048].topk(2).values
        margins.append(float(best[0] - best[1]))
        seen.setdefault("logits", []).append(logits[0, -1].clone())

    heads = [talker.codec_head, *talker.code_predictor.lm_head]
    hooks = [head.register_forward_hook(margin) for head in heads]
    inner.generate, talker.generate = watched_generate, watched_talk
    inner.speech_tokenizer.decode = lambda codes: ([np.zeros(1920, np.float32)] * len(codes), 24_000)
    try:
        yield
    finally:
        inner.generate, talker.generate, inner.speech_tokenizer.decode = generate, talk, decode
        for hook in hooks:
            hook.remove()


def _speak(model, case: dict) -> None:
    shape = VARIANTS[case["variant"]]
    common = {"language": case.get("language", "Auto"), "non_streaming_mode": case.get("at_once", True), **GREEDY}
    if shape.kind == "custom_voice":
        model.generate_custom_voice(case["text"], speaker=case["speaker"], instruct=case.get("instruct"), **common)
    elif shape.kind == "voice_design":
        model.generate_voice_design(case["text"], instruct=case.get("instruct", ""), **common)
    else:
        model.generate_voice_clone(case["text"], voice_clone_prompt=[_clip(case["clip"], shape.hidden)], **common)


def _clip(clip: list, hidden: int):
    from qwen_tts.inference.qwen3_tts_model import VoiceClonePromptItem

    seed, frames, text = clip
    codes, embedding = reference(seed, frames, hidden)
    continued = frames > 0
    return VoiceClonePromptItem(codes if continued else None, embedding, not continued, continued, text)


def _record_scores(talker, arrays: dict[str, np.ndarray]) -> list[str]:
    """What the package's own chain of processors makes of random logits, after 0, 1 and 20 codes, for all SCORES."""
    random = np.random.RandomState(0)
    logits = torch.tensor(3 * random.standard_normal((3, 3072)).astype(np.float32))
    history = torch.tensor(random.randint(0, 2048, (1, 20)))
    history[0, 3] = logits[2].argmax()  # so that the penalty meets a likely code
    suppressed = [number for number in range(2048, 3072) if number != EOS]
    logits[:, EOS] = 8.0
    arrays["scores/logits"], arrays["scores/history"] = logits.numpy(), history[0].numpy()
    names: list[str] = []
    for number, settings in enumerate(SCORES):
        out = []
        for row, length in enumerate((0, 1, 20)):
            chain = _processors(talker, settings, suppressed)
            names = max(names, [type(processor).__name__ for processor in chain], key=len)
            out.append(chain(history[:, :length], logits[row : row + 1].clone())[0])
        arrays[f"scores/{number}"] = torch.stack(out).softmax(-1).numpy()
    return names


def _processors(talker, settings: dict, suppressed: list[int]):
    """The chain that `generate` builds for the talker: asked of it, not rebuilt."""
    caught = {}
    build = talker._get_logits_processor

    class Caught(Exception):
        pass

    def catch(*args, **given):
        caught["chain"] = build(*args, **given)
        raise Caught

    talker._get_logits_processor = catch
    rows = torch.zeros(1, 4, talker.config.hidden_size)
    given = {"inputs_embeds": rows, "attention_mask": torch.ones(1, 4, dtype=torch.long), "min_new_tokens": 2}
    try:
        talker.generate(
            **given, max_new_tokens=9, do_sample=True, eos_token_id=EOS, suppress_tokens=suppressed, **settings
        )
    except Caught:
        pass
    finally:
        del talker._get_logits_processor
    return caught["chain"]


def _stub_torchaudio() -> None:
    """The package imports torchaudio for a tokenizer that is not used here; PyPI's does not load beside a CPU torch."""
    for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__version__ = "0"
        sys.modules[name] = module
    sys.modules["torchaudio"].compliance = sys.modules["torchaudio.compliance"]
    sys.modules["torchaudio.compliance"].kaldi = sys.modules["torchaudio.compliance.kaldi"]


if __name__ == "__main__":
    main()
