"""Scores of answers, against marks by hand and values computed from the definitions."""

import re
import unicodedata
from fractions import Fraction

import pytest
from lm_eval.tasks.super_glue.record import t5_utils

from hf_distill.evaluating.answers import (
    METRICS,
    best_f1,
    exact_match,
    extracted,
    f1_tokens,
    final_number,
    same_number,
    squad_scores,
)
from tests.evaluating.gsm8k_marks import MARKED, MISSED


@pytest.mark.parametrize(("text", "answer", "is_right"), MARKED)
def test_numbers_are_compared_as_a_person_marked_them(text, answer, is_right):
    assert same_number(text, [answer]) == {"number": float(is_right)}


def test_the_marks_are_forty_and_no_line_stands_twice():
    assert len(MARKED) == len({(text, answer) for text, answer, _ in MARKED}) == 40
    assert sum(mark for _, _, mark in MARKED) == 30


@pytest.mark.parametrize(("text", "answer"), MISSED)
def test_what_the_documentation_calls_missed_is_missed(text, answer):
    assert same_number(text, [answer]) == {"number": 0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 1,234,567", 1_234_567),
        ("####-3.50", Fraction(-7, 2)),
        ("#### none, so 7", 7),  # no number directly behind the mark: anywhere
        ("#### Step 1: add\n40 + 32 = 72\n#### Step 2: say it\n\\boxed{72}", 72),  # headings
        ("#### Step 1\n#### 18\n#### 19", 18),
        ("#### 1. Add the eggs\n9 + 9\n#### 2) Say it\n\\boxed{18}", 18),
        ("#### 18.", 18),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{-\\dfrac{3}{4}}", Fraction(-3, 4)),
        ("\\boxed{\\frac{-3}{4}}", Fraction(-3, 4)),
        ("\\boxed{3\\tfrac12}", Fraction(7, 2)),
        ("\\boxed{x = 2 \\times 4 = 8\\text{ cm}^2}", 8),
        ("\\boxed{10,\\!000}", 10_000),
        ("\\boxed{90^\\circ}", 90),
        ("4 and \\boxed{3, 4}", None),
        ("\\boxed{\\frac{\\sqrt{3}}{2}}", None),
        ("1 and \\boxed{2\\pi}", None),
        ("1 and \\boxed{\\text{none}}", None),
        ("#### none\nbut 7 and then 8", 8),  # nothing on the line of the mark: anywhere
        ("10-5", 5),
        ("x=-5", -5),
        ("(-5)", -5),
        ("- 5", 5),  # an item of a list
        ("2/4", Fraction(1, 2)),
        ("5/0", 0),  # no number; its last part is one
        ("12, 13", 13),
        ("1,23", 23),  # no thousands
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("v2", None),
        ("", None),
    ],
)
def test_final_numbers_are_exact(text, expected):
    assert final_number(text) == expected


def test_any_of_several_numbers_may_be_right():
    assert same_number("It is 4.", ["3", "#### 4"]) == {"number": 1.0}
    assert same_number("It is 4.", ["three"]) == {"number": 0.0}


def test_exact_match_knows_spaces_and_composed_characters_and_nothing_else():
    assert exact_match(" New  York\n", ["York", "New York"]) == {"exact_match": 1.0}
    assert exact_match("new york", ["New York"]) == {"exact_match": 0.0}
    assert exact_match(unicodedata.normalize("NFD", "세배"), ["세배"]) == {"exact_match": 1.0}


def test_f1_of_english_is_over_words_and_of_korean_over_characters():
    assert f1_tokens("The cat, a CAT!") == ["cat", "cat"]
    assert f1_tokens("큰절을 2번 한다.") == ["큰", "절", "을", "2", "번", "한", "다"]
    assert f1_tokens("東京タワー、333m") == ["東", "京", "タ", "ワ", "ー", "333m"]
    # By words the two have nothing in common: a particle is a part of its word.
    assert best_f1("떡국을", ["떡국"]) == {"f1": pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))}
    assert squad_scores("떡국을", ["떡국"])["squad_f1"] == 0
    assert best_f1("in May 1858", ["1858", "May 1858"]) == {"f1": pytest.approx(0.8)}
    assert best_f1("", ["cat"]) == {"f1": 0.0}


def official_squad(prediction, answers):
    """Exact match and F1 of the official script as lm-evaluation-harness has them."""
    pairs = [(prediction, f"0_{answer}") for answer in answers]
    return {"squad_exact_match": t5_utils.squad_em_agg(pairs), "squad_f1": t5_utils.squad_f1_agg(pairs)}


@pytest.mark.parametrize(
    ("prediction", "answers"),
    [
        ("the Saint Bernadette", ["Saint Bernadette Soubirous", "Bernadette"]),
        ("in 1858.", ["1858", "the year 1858", "February 1858"]),
        ("Copper statue of Christ", ["a copper statue of Christ"]),
        ("$5,000", ["5000", "five thousand"]),
        ("cat cat dog", ["cat dog dog"]),
        ("anthem of the theatre", ["Anthem of a Theatre!"]),
        ("the", ["a"]),  # nothing is left of either: a match without a shared word
        ("", ["nothing"]),
        ("Łódź — city", ["łódź city"]),
    ],
)
def test_squad_is_the_official_script(prediction, answers):
    assert squad_scores(prediction, answers) == pytest.approx(official_squad(prediction, answers))


def test_patterns_take_the_last_match_and_its_group():
    text = "<answer>4</answer> or <answer> 5 </answer>"
    assert extracted(text, re.compile(r"<answer>(.*?)</answer>")) == " 5 "
    assert extracted(text, re.compile(r"\d")) == "5"
    assert extracted(text, re.compile("x")) is None
    assert extracted("ab", re.compile("(c)?b")) == ""


def test_every_metric_gives_scores_between_0_and_1():
    for metric in METRICS.values():
        for text in ("", "4", "cat"):
            assert all(0 <= value <= 1 for value in metric(text, ["4", "dog"]).values())
