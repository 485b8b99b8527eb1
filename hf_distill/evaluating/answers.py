"""Scores of answers in text: exact match, F1, SQuAD's scores, GSM8K's number. Plain Python."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

# Scripts in which spaces do not separate words, and Hangul, whose words carry particles: a character is a token.
_CHARACTER_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1100, 0x11FF), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3130, 0x318F),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_CHARACTER = "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _CHARACTER_RANGES) + "]"
_TOKEN = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\S)+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+"
# No digit of a name or an exponent (m2, m^2), and no minus between two numbers (10-5).
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\w)\]}}%])[-−])?(?:\\?[$€£¥₩](?P<inner>[-−])?)?(?<![A-Za-z\d.^])"
    rf"(?:(?:(?P<whole>\d+)\ +)?(?P<above>\d+)/(?P<below>[1-9]\d*)|(?P<number>{_DIGITS}))"
    r"(?:\s?(?P<unit>thousand|million|billion)\b)?"
)
_UNITS = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_MARK = re.compile(r"####[ \t]*")
_LISTED = re.compile(r"[.):][ \t]+\S")  # what follows the number of a heading: `#### 1. Add the eggs`
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_FRACTION = re.compile(r"(\d\s*)?\\[dt]?frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d))")
# What may stand in a box beside a number; other commands make another number of it, as \sqrt and \pi.
_BESIDE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|circ|quad|left|right|[^A-Za-z])")
_SAID = re.compile(r"\banswer\b[^\n.\d]{0,40}?(?:\bis\b|:|=)(.*?)(?:\.\s|\n|$)", re.IGNORECASE)


def exact_match(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """1 where the prediction is one of the answers, whatever the spaces around and between words are."""
    return {"exact_match": float(any(_plain(prediction) == _plain(answer) for answer in answers))}


def best_f1(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """The best F1 of the tokens that the prediction shares with an answer ([`f1_tokens`])."""
    return {"f1": max(_f1(f1_tokens(prediction), f1_tokens(answer)) for answer in answers)}


def squad_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of the official script for SQuAD v1.1 (1606.05250), in [0, 1]; the best answer counts."""
    return {
        "squad_exact_match": float(any(normalized(prediction) == normalized(answer) for answer in answers)),
        "squad_f1": max(token_f1(prediction, answer) for answer in answers),
    }


def same_number(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """1 where the final number of the prediction is that of an answer, as GSM8K (2110.14168) compares answers."""
    found = final_number(prediction)
    return {"number": float(found is not None and any(found == final_number(answer) for answer in answers))}


# By the name of an option; each returns one score or several, in [0, 1].
METRICS: Mapping[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "exact_match": exact_match,
    "f1": best_f1,
    "squad": squad_scores,
    "number": same_number,
}


def final_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer; None where it has none.

    It is looked for in this order: directly after a `####`, the first time, as GSM8K writes it; in the last
    `\\boxed{}`, which has to hold one number or fraction and nothing else that is computed; after the last "answer is"
    or "answer:", there behind the last equals sign; anywhere, the last one. Signs of currencies, commas
    between thousands, units and signs of per cent do not count: `$1,250.00` is 1250. `3 1/2` is 7/2 and `1.5 million`
    1,500,000. Number words are no numbers.
    """
    text = text.replace("{,}", ",").replace("**", "")
    for mark in _MARK.finditer(text):
        if (found := _NUMBER.match(text, mark.end())) and not _LISTED.match(text, found.end()):
            return _value(found)
    if boxed := _BOXED.findall(text):
        return _boxed_number(boxed[-1])
    if (said := _SAID.findall(text)) and (found := _NUMBER.search(said[-1].rpartition("=")[2])):
        return _value(found)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _boxed_number(text: str) -> Fraction | None:
    """The number of a box, behind its last equals sign; None for several numbers, or one that has to be computed."""
    text = re.sub(r"\\[,!]", "", text.rpartition("=")[2])  # spaces, also between thousands
    text = _FRACTION.sub(lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[4]}/{m[3] or m[5]}", text)
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1 or "\\" in _BESIDE.sub("", text):
        return None
    return _value(numbers[0])


def _value(found: re.Match[str]) -> Fraction:
    if found["number"] is not None:
        value = Fraction(found["number"].replace(",", ""))
    else:
        value = Fraction(int(found["whole"] or 0)) + Fraction(int(found["above"]), int(found["below"]))
    return value * _UNITS[found["unit"]] * (-1 if found["minus"] or found["inner"] else 1)


def f1_tokens(text: str) -> list[str]:
    """The tokens of an F1 score: words, and characters of scripts without spaces between words and of Hangul.

    Case, punctuation of every script and English articles do not count. English text has the tokens of SQuAD's script,
    Korean text the characters of KorQuAD's (1909.07005), and mixed text both.
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return _TOKEN.findall(_ARTICLE.sub(" ", text))


def token_f1(prediction: str, answer: str) -> float:
    """The F1 score, in [0, 1], of the words that a prediction shares with an answer, as SQuAD's script computes it."""
    return _f1(normalized(prediction).split(), normalized(answer).split())


def normalized(text: str) -> str:
    """The text in lower case, without punctuation and articles, with one space between words, as in SQuAD's script."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLE.sub(" ", text).split())


def extracted(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last match of a pattern: its first group, or the whole match of one without groups; None without a match."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return (matches[-1][1] or "") if pattern.groups else matches[-1][0]


def without_thoughts(text: str) -> str:
    """The text behind the last `</think>`, whose beginning may stand in the prompt; all of it where there is none.

    A thought that was cut before its end is no answer: nothing is left.
    """
    said = text.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
