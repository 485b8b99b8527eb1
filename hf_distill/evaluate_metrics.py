"""Perplexity and the SQuAD scores as metrics of the `evaluate` package that load without a network.

`evaluate.load("squad")` downloads a script from the hub. `Squad()` is the same metric and can replace it, for example
in `evaluate.combine`.
"""

import logging
from typing import Any

from datasets import Dataset, Features, Sequence, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.evaluating.answers import normalized, token_f1
from hf_distill.evaluation import perplexity

try:
    import evaluate
except ImportError as error:
    raise ImportError("hf_distill.evaluate_metrics needs `evaluate`: pip install 'hf_distill[eval]'") from error

logger = logging.getLogger(__name__)


class Perplexity(evaluate.Metric):
    """Perplexity of a model on texts: `Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer)`.

    Unlike the hub's metric of this name, it gives every token the same weight, whatever the length of its text, and
    does not load the model. Options and results are those of `evaluation.perplexity`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity of a causal language model on texts, a mean over their tokens.",
            citation="",
            inputs_description="predictions: texts; model, tokenizer: the model to measure and its tokenizer",
            features=Features({"predictions": Value("string")}),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> dict[str, float]:
        return perplexity(model, Dataset.from_dict({"text": predictions}), tokenizer, **options)


class Squad(evaluate.Metric):
    """Exact match and F1 of the official script for SQuAD v1.1 (1606.05250), in per cent.

    Predictions are `{"id", "prediction_text"}`. References are `{"id", "answers": {"text": [...], "answer_start":
    [...]}}`. The best of a question's answers counts. A question without a prediction counts as wrong. A question
    without an answer raises `ValueError`, because v1.1 has no such questions.
    """

    def _info(self) -> evaluate.MetricInfo:
        answers = Sequence({"text": Value("string"), "answer_start": Value("int32")})
        return evaluate.MetricInfo(
            description="Exact match and token F1 of answers to questions, after SQuAD v1.1's normalisation.",
            citation="Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016",
            inputs_description="predictions: id, prediction_text; references: id, answers with text and answer_start",
            features=Features(
                {
                    "predictions": {"id": Value("string"), "prediction_text": Value("string")},
                    "references": {"id": Value("string"), "answers": answers},
                }
            ),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, predictions: list[dict[str, str]], references: list[dict[str, Any]]
    ) -> dict[str, float]:
        given = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        if missing := [reference["id"] for reference in references if reference["id"] not in given]:
            logger.warning("%d questions have no prediction and count as wrong: %s, ...", len(missing), missing[0])
        totals = {"exact_match": 0.0, "f1": 0.0}
        for reference in references:
            if not (answers := reference["answers"]["text"]):
                raise ValueError(f"question {reference['id']!r} has no answer; the scores are SQuAD v1.1's, not v2's")
            if reference["id"] in given:
                prediction = given[reference["id"]]
                totals["exact_match"] += max(normalized(prediction) == normalized(answer) for answer in answers)
                totals["f1"] += max(token_f1(prediction, answer) for answer in answers)
        return {name: 100 * total / len(references) for name, total in totals.items()}
