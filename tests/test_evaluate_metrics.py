"""Metrics of the `evaluate` package, against values computed by hand and against `perplexity` itself."""

import importlib
import sys

import evaluate
import pytest
from datasets import Dataset

from hf_distill import evaluate_metrics
from hf_distill.evaluate_metrics import Perplexity, Squad, normalized, token_f1
from hf_distill.evaluation import perplexity
from tests.conftest import SENTENCES, make_model


def reference(name, *answers):
    return {"id": name, "answers": {"text": list(answers), "answer_start": [0] * len(answers)}}


def prediction(name, text):
    return {"id": name, "prediction_text": text}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\n sat.", "cat sat"),
        ("an Apple a day", "apple day"),
        ("Theory of a theatre", "theory of theatre"),  # articles are words, not beginnings of words
        ("U.S.A.'s $1,000", "usas 1000"),  # punctuation goes without leaving a space
        ("the the a", ""),
        ("Łódź — the city", "łódź — city"),  # only ASCII's punctuation
    ],
)
def test_normalisation_is_that_of_squad(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("the Saint Bernadette", "Saint Bernadette Soubirous", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("in 1858", "1858", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("cat cat dog", "cat dog dog", 2 / 3),  # words are counted, not only known
        ("cat", "dog", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
        ("The cat.", "cat", 1.0),
    ],
)
def test_f1_is_over_shared_words(text, answer, expected):
    assert token_f1(text, answer) == pytest.approx(expected)
    assert token_f1(answer, text) == pytest.approx(expected)


def test_squad_takes_the_best_answer_and_the_mean_over_questions_in_per_cent(tmp_path):
    predictions = [prediction("1", "The cat"), prediction("2", "in May 1858"), prediction("3", "nothing")]
    references = [reference("3", "everything"), reference("2", "1858", "May 1858"), reference("1", "dog", "cat!")]
    found = Squad(cache_dir=str(tmp_path)).compute(predictions=predictions, references=references)
    # F1: 1 for the cat; 2 of 3 words against 2 of 2 (0.8) for the year; 0.
    assert found == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (1 + 0.8) / 3})


def test_squad_adds_up_over_batches_and_goes_into_a_combination(tmp_path):
    metric = Squad(cache_dir=str(tmp_path))
    metric.add_batch(predictions=[prediction("1", "cat")], references=[reference("1", "cat")])
    metric.add(prediction=prediction("2", "cat"), reference=reference("2", "dog"))
    assert metric.compute() == {"exact_match": 50.0, "f1": 50.0}
    combined = evaluate.combine([Squad(cache_dir=str(tmp_path)), Squad(cache_dir=str(tmp_path / "other"))])
    found = combined.compute(predictions=[prediction("1", "cat")], references=[reference("1", "cat")])
    assert set(found.values()) == {100.0}


def test_a_question_without_a_prediction_is_wrong_and_one_without_an_answer_is_refused(tmp_path, caplog):
    metric = Squad(cache_dir=str(tmp_path))
    found = metric.compute(
        predictions=[prediction("1", "cat"), prediction("1", "cat")],
        references=[reference("1", "cat"), reference("2", "cat")],
    )
    assert found == {"exact_match": 50.0, "f1": 50.0}
    assert "1 questions have no prediction and count as wrong: 2" in caplog.text
    with pytest.raises(ValueError, match="question '3' has no answer"):
        metric.compute(predictions=[prediction("3", "cat")], references=[reference("3")])


def test_perplexity_as_a_metric_is_the_perplexity(tmp_path, tokenizer):
    model = make_model()
    options = {"max_length": 8, "stride": 3, "batch_size": 2}
    found = Perplexity(cache_dir=str(tmp_path)).compute(
        predictions=SENTENCES, model=model, tokenizer=tokenizer, **options
    )
    assert found == perplexity(model, Dataset.from_dict({"text": SENTENCES}), tokenizer, **options)


def test_a_missing_package_is_told_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_distill\[eval\]'"):
        importlib.reload(evaluate_metrics)
