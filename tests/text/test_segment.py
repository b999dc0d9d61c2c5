"""Where sentences end, and the laws that segments keep."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.src.domain import Segment
from api.src.text.normalize import is_speakable, spoken
from api.src.text.segment import FIRST_LIMIT, LIMIT, LOOKAHEAD, WIDE_WEIGHT, segment, sentence_ends, sentences

# One `|` for each place where a sentence ends.
BOUNDARIES = [
    "One.| Two!| Three?| Four",
    "Mr. Smith met Dr. Jones and Prof. Lee.| They left.",
    "It costs 3.14 euros, e.g. at 10.30, i.e. now.| Version 1.2.3 is out.",
    "J. K. Rowling lives in the U.S. and not in the U.K. Really.",
    "So do I.| Then we go at 5 p.m.| He waits.",
    "See example.com.| Or node.js, etc. and so on.| And so on, etc.| Done.",
    "No.| No. 5 is alive.| See Fig. 3 and pp. 4.| Fig.| A.",
    "Smith et al. (2019) said so.| Acme Inc. was founded.| Acme Inc.| Founded.",
    "The answer is 42.| That is all.| In 2024.| Then.",
    "Das gilt z.B. für uns, d. h. für alle, bzw. für Hrn. Maier.| Am 3. Mai kam er.| Im 21. Jahrhundert.| Ja.",
    "M. Dupont et Mme. Durand sont là.| « Quoi ? » dit-il.| « Rien. »| Elle part.",
    "»Ja.«| »Nein!«| Er ging.",
    "¿Qué?| ¡No!| El Sr. Gómez vino.",
    '"Really?" he asked.| "Yes!"| "No."| (Fine.)| End.',
    "“Stop.”| “Go.”| He said ‘no.’| End.",
    "Wait... what?| Well…| No.| Hm... so it is.| Hm...| So it is.",
    "hello there.| how are you?| fine!| thanks",
    "1. Open the box.| Look.\n|2. Close it.",
    "Heading\n|Text",
    "你好。|今天很好！|你呢？|好的",
    "「行く。」と言った。|「帰る。」|そうか。",
    "价格是3.5元。|版本1.2。|好",
    "مرحبا بكم.| كيف حالك؟| أنا بخير۔| نعم",
    "नमस्ते।| आप कैसे हैं?| मैं ठीक हूँ॥| जी",
    "안녕하세요.| 반갑습니다!| 네",
    "Привет.| Как дела?| А. С. Пушкин писал.",
    "ሰላም።| እንዴት ነህ",
    "Yes!!| What?!| Oh.",
]

SENTENCE = "The committee met on the first day of spring to talk about the plan number {}."


@pytest.mark.parametrize("marked", BOUNDARIES)
def test_sentences_end_where_they_do(marked: str) -> None:
    parts = [part.strip() for part in marked.split("|")]
    text = marked.replace("|", "")
    assert [text[start:end].strip() for start, end in sentences(text)] == parts


def test_one_segment_per_sentence_of_plain_prose() -> None:
    text = " ".join(SENTENCE.format(number) for number in range(20))
    segments = segment(text)
    assert [s.text for s in segments][1:] == [SENTENCE.format(number) for number in range(1, 20)]
    assert [text[s.start : s.end].strip() for s in segments] == [s.text for s in segments]


def _texts(text: str, **limits: int) -> list[str]:
    return [s.text for s in segment(text, **limits)]


def test_short_sentences_are_spoken_together() -> None:
    assert _texts("Yes. No. Maybe.") == ["Yes. No. Maybe."]
    assert _texts("Yes. No. " + SENTENCE) == ["Yes. No.", SENTENCE]
    assert _texts("# Shopping\n- Milk\n- Eggs") == ["Shopping. Milk. Eggs."]


def test_what_ends_without_punctuation_stands_alone() -> None:
    assert _texts("Fast\n\nCheap\n\nGood.") == ["Fast", "Cheap", "Good."]


def test_a_long_first_sentence_is_cut_at_a_clause() -> None:
    text = "When we first came to this valley, nobody knew what would happen, and so we waited for it."
    assert _texts(text) == [text[:34], text[35:]]
    assert _texts("今天早上天气非常好，我们大家一起去公园里面玩了一整天，非常开心。")[0] == "今天早上天气非常好，"


def test_the_first_cut_leaves_no_crumbs() -> None:
    """`Well,` alone would sound odd; an over-long clause is better cut later, or not at all."""
    text = "Well, the quick brown fox jumped over the lazy dog by the old river, as foxes like to do."
    assert _texts(text)[0] == text[:68]
    whole = "The quick brown fox jumps over the lazy dog near the old river bank today, yes."
    assert _texts(whole) == [whole]


def test_a_first_sentence_without_clauses_is_cut_between_words() -> None:
    text = "word " * 40
    assert _texts(text)[0] == ("word " * 12).strip()


def test_over_long_sentences_are_cut_at_clauses() -> None:
    clause = "and then the others came along and took what they wanted"
    parts = _texts("Start. " + ", ".join([clause] * 12) + ".")[1:]
    assert all(part.endswith((",", ".")) for part in parts)
    assert all(100 < len(part) <= LIMIT for part in parts)


def test_unspaced_runs_are_cut_hard() -> None:
    assert [len(part) for part in _texts("x" * 600)] == [250, 250, 100]
    assert all(len(part) <= LIMIT // WIDE_WEIGHT for part in _texts("我" * 300))


def test_no_mark_is_cut_from_its_letter() -> None:
    for limit in (50, 51, 53):
        assert {part[0] for part in _texts("क्षि" * 200, limit=limit)} == {"क"}


@pytest.mark.parametrize("text", ["", " \n", "...", "🙂🙂", "---", "**", "```\n```", "<br>", "\u200b", "![](x)"])
def test_nothing_to_say_is_no_segment(text: str) -> None:
    assert segment(text) == []


def test_offsets_count_the_marks() -> None:
    text = "🙂 **Hello there, my friend.** \n\n## Goodbye, then, and see you later on the other side\n🙂"
    assert segment(text) == [
        Segment("Hello there, my friend.", 0, 35),
        Segment("Goodbye, then, and see you later on the other side.", 35, len(text), final=True),
    ]


words = st.text(alphabet="abcdefghiXYZäéß", min_size=1, max_size=12)
scripts = st.sampled_from(
    ["你好", "天气", "かな", "नमस्ते", "हिन्दी", "مرحبا", "안녕", "Привет", "สวัสดี", "42", "3.14", "z.B."]
)
gaps = st.sampled_from([" "] * 6 + [", ", ". ", "? ", "! ", "... ", "; ", " – ", "。", "，", "؟ ", "। ", ".” ", "\n\n"])
marks = st.sampled_from(["**", "# ", "\n- ", "`", "🙂", "[a](b)", "<b>", "\n", "|", "!!!", "* ", "\n\n1. "])
prose = st.lists(st.tuples(words | scripts, gaps), min_size=1, max_size=60).map(
    lambda parts: "".join(word + gap for word, gap in parts)
)
anything = st.lists(words | scripts | gaps | marks, max_size=60).map("".join) | st.text()
limits = st.fixed_dictionaries({"first_limit": st.integers(10, 80), "limit": st.integers(20, 300)})


@given(anything, limits)
def test_segments_tile_the_text(text: str, limits: dict[str, int]) -> None:
    segments = segment(text, **limits)
    assert bool(segments) is is_speakable(spoken(text).text)
    if not segments:
        return
    assert segments[0].start == 0
    assert segments[-1].end == len(text)
    assert all(left.end == right.start for left, right in pairwise(segments))
    assert all(s.start <= s.end for s in segments)
    assert [s.final for s in segments] == [False] * (len(segments) - 1) + [True]


@given(anything, limits)
def test_every_segment_can_be_spoken_and_nothing_is_lost(text: str, limits: dict[str, int]) -> None:
    texts = _texts(text, **limits)
    assert all(is_speakable(part) and part == part.strip() and "\n" not in part for part in texts)
    whole = spoken(text).text
    assert "".join("".join(texts).split()) == ("".join(whole.split()) if texts else "")


@given(prose, limits)
def test_every_segment_keeps_to_its_limit(text: str, limits: dict[str, int]) -> None:
    first, *others = [_weight(part) for part in _texts(text, **limits)]
    assert first <= limits["limit"] + _SLACK
    assert all(weight <= limits["limit"] + _SLACK for weight in others)


_SLACK = 4  # punctuation that clings to a segment may exceed the limit


@given(st.lists(words, min_size=1, max_size=60).map(" ".join))
def test_the_first_segment_is_short_and_ends_at_a_word(text: str) -> None:
    first = segment(text)[0]
    assert len(first.text) <= 2 * FIRST_LIMIT
    assert first.end == len(text) or text[first.end - 1] == " "


@given(prose, st.integers(0, 400))
def test_sentence_ends_stand_when_more_text_comes(text: str, cut: int) -> None:
    """What an incremental segmenter builds on."""
    whole = spoken(text).text
    known = whole[:cut]
    settled = len(known) - LOOKAHEAD
    assert [end for end in sentence_ends(known) if end <= settled] == [
        end for end in sentence_ends(whole) if end <= settled
    ]


def _weight(text: str) -> int:
    return sum(WIDE_WEIGHT if "\u2e80" <= character <= "\ud7ff" else 1 for character in text)


@pytest.mark.parametrize(
    "unit", ["a", "a ", "a. ", "a, ", "我", "。", ". ", "J. ", ".", "?!", "「", "(", " »", "\n\n", "… "]
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    start = time.process_time()
    segment((unit * 60_000)[:60_000])
    assert time.process_time() - start < 3
