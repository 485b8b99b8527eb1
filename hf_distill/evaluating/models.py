"""Base, student and teacher over the same rows: fidelity and perplexity, generated answers, tasks of a harness."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.evaluating.answers import METRICS, extracted, without_thoughts
from hf_distill.evaluating.gaps import BASE, STUDENT, TEACHER, Measure, mean_measure, measures_data, perplexity_measure
from hf_distill.evaluating.generation import (
    check_lengths,
    generate_about_pictures,
    generate_answers,
    picture_prompt_lengths,
    refuse_blind,
)
from hf_distill.evaluating.harness import HarnessTasks, task_measures
from hf_distill.evaluating.questions import PictureQuestions, Questions
from hf_distill.evaluation import row_sums
from hf_distill.modeling import shared_vocabulary, tokenizer_of
from hf_distill.report import Part, Shown, evaluation_rows

PERCENT = "{:.1%}"
OTHER_TOKENIZER = (
    "The teacher has another tokenizer: its perplexity and the distance from it, which are means over the student's "
    "tokens, are left out."
)


OTHER_BASE = "The base has another tokenizer: its perplexity and its distance from the teacher are left out."


@dataclass(frozen=True)
class Scoring:
    """The way in which answers are generated and scored.

    Args:
        metrics: names in `METRICS`.
        pattern (`str`, *optional*):
            A regular expression: its last match in a generated text is the answer, and nothing where it does not match.
            Right answers in which it matches are taken in the same way.
        max_new_tokens (`int`): tokens of an answer at most.
        stop: texts that end an answer.

    Raises:
        `ValueError`: an unknown metric, no metric, or a pattern that is no regular expression.
    """

    metrics: Sequence[str] = ("exact_match", "f1")
    pattern: str | None = None
    max_new_tokens: int = 256
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if not self.metrics:
            raise ValueError(f"metrics is empty: give some of {', '.join(METRICS)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens has to be at least 1, got {self.max_new_tokens}")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"answer_pattern {self.pattern!r} is no regular expression: {error}") from error

    def scores(self, text: str, answers: Sequence[str]) -> dict[str, float]:
        """The scores, in [0, 1], of a generated text against right answers; in both, thoughts are passed over."""
        text, answers = without_thoughts(text), [without_thoughts(answer) for answer in answers]
        if self.pattern is not None:
            pattern = re.compile(self.pattern)
            text = extracted(text, pattern) or ""
            answers = [answer if (found := extracted(answer, pattern)) is None else found for answer in answers]
        return {name: value for metric in self.metrics for name, value in METRICS[metric](text, answers).items()}


@dataclass(frozen=True, repr=False)
class Evaluated(Shown):
    """Numbers of models side by side, which show themselves as a table."""

    measures: list[Measure]
    generated: list[dict[str, Any]]  # each question, its right answers, and of each model the text and its scores
    notes: list[str]  # what is left out, in sentences

    def shown(self) -> list[Part]:
        """A line for each measure, with the gap recovered, and the notes."""
        rows = evaluation_rows(measures_data(self.measures))
        return [(rows, None) if rows else "nothing is measured", *self.notes]


def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | ProcessorMixin],
    *,
    rows: Dataset | None = None,
    questions: Questions | PictureQuestions | None = None,
    scoring: Scoring | None = None,
    tasks: HarnessTasks | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> Evaluated:
    """Fidelity on rows, scores of generated answers, and tasks of lm_eval, of `base`, `student` and `teacher`.

    [`~hf_distill.evaluating.gaps.gap_recovered`] of a measure says which share of the gap between base and teacher the
    student has closed.

    Args:
        models: by the names `student` and, optionally, `base` and `teacher`; in eval mode while they are measured.
        tokenizers: by the same names, as far as they have their own; otherwise the student's. Rows with pictures need
            processors, of which the base reads with the student's.
        rows: as in `evaluate_fidelity`; perplexity, and with a teacher KL, agreement and expected acceptance.
        questions ([`~hf_distill.evaluating.questions.Questions`], or those about pictures): answers to them are
            generated and scored.
        scoring ([`Scoring`], *optional*): how.
        tasks ([`~hf_distill.evaluating.harness.HarnessTasks`], *optional*): of lm-evaluation-harness.
        batch_size (`int`): rows or prompts at once.
        max_length (`int`, *optional*): as in `evaluate_fidelity`.
        vocab_size (`int`, *optional*): as there.

    Raises:
        `ValueError`: no student, a name that is none of the three, or what the functions underneath refuse.
    """
    if STUDENT not in models or set(models) - {BASE, STUDENT, TEACHER}:
        raise ValueError(f"models are a student and, with it, base and teacher; got {', '.join(models) or 'none'}")
    whole = {name: tokenizers.get(name, tokenizers[STUDENT]) for name in models}
    found = Evaluated([], [], [])
    if rows is not None:
        measures, notes = fidelity_measures(
            models, whole, rows, batch_size=batch_size, max_length=max_length, vocab_size=vocab_size
        )
        found.measures.extend(measures)
        found.notes.extend(notes)
    if questions is not None:
        measures, generated = answer_measures(models, whole, questions, scoring or Scoring(), batch_size=batch_size)
        found.measures.extend(measures)
        found.generated.extend(generated)
    if tasks is not None:
        texts = {name: tokenizer_of(each) for name, each in whole.items()}
        found.measures.extend(task_measures(models, texts, tasks, batch_size=batch_size))
    return found


def fidelity_measures(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | ProcessorMixin],
    rows: Dataset,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> tuple[list[Measure], list[str]]:
    """Perplexity and, with a teacher of the student's vocabulary, the distance from it; and notes."""
    teacher, notes = models.get(TEACHER), []
    if teacher is not None and not is_vocabulary_shared(tokenizers[STUDENT], tokenizers[TEACHER]):
        teacher, notes = None, [OTHER_TOKENIZER]
    names = [name for name in (BASE, STUDENT) if name in models]
    if BASE in models and not is_vocabulary_shared(tokenizers[STUDENT], tokenizers.get(BASE, tokenizers[STUDENT])):
        names, notes = [STUDENT], [*notes, OTHER_BASE]
    own = tokenizers.get(TEACHER)
    sums = row_sums(
        [models[name] for name in names], teacher, rows, tokenizers[STUDENT],
        batch_size=batch_size, max_length=max_length, vocab_size=vocab_size,
        teacher_processing_class=own if isinstance(own, ProcessorMixin) else None,
    )  # fmt: skip
    of_students = dict(zip(names, sums.students, strict=True))
    nats = {name: each["ce"] for name, each in of_students.items()}
    if sums.teacher_ce is None:
        return [perplexity_measure("perplexity", nats, sums.num_tokens)], notes
    measures = [perplexity_measure("perplexity", {**nats, TEACHER: sums.teacher_ce}, sums.num_tokens)]
    # A teacher is at no distance from itself, and agrees with itself at every token.
    own = {"kl": np.zeros_like(sums.num_tokens), "agreement": sums.num_tokens, "acceptance": sums.num_tokens}
    for name, of_teacher in own.items():
        values = {**{side: each[name] for side, each in of_students.items()}, TEACHER: of_teacher}
        measures.append(mean_measure(name, values, sums.num_tokens, "{:.4f}" if name == "kl" else PERCENT))
    return measures, notes


def check_questions(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | ProcessorMixin],
    questions: Questions | PictureQuestions,
    max_new_tokens: int,
) -> None:
    """Raises `ValueError` for a question that a model has no room to answer, or whose pictures it cannot read.

    Pictures are read once with each processor. Arguments are those of [`evaluate_models`].
    """
    seen: dict[int, list[int]] = {}  # lengths by processor
    for name, model in models.items():
        if isinstance(questions, PictureQuestions):
            refuse_blind(model)
            processor = tokenizers.get(name, tokenizers[STUDENT])
            if id(processor) not in seen:
                seen[id(processor)] = picture_prompt_lengths(processor, questions.rows)
            lengths = seen[id(processor)]
        else:
            lengths = [len(prompt) for prompt in _prompts(questions, name)]
        check_lengths(model, lengths, max_new_tokens)


def _prompts(questions: Questions, name: str) -> list[list[int]]:
    return questions.teacher_prompts if name == TEACHER else questions.prompts


def answer_measures(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase | ProcessorMixin],
    questions: Questions | PictureQuestions,
    scoring: Scoring,
    *,
    batch_size: int = 8,
) -> tuple[list[Measure], list[dict[str, Any]]]:
    """The scores of the answers that models generate, and these answers."""
    scores: dict[str, dict[str, list[float]]] = {}  # by measure and model, of each row
    if isinstance(questions, PictureQuestions):
        asked = questions.prompts_as_texts(tokenizers[STUDENT])
    else:
        tokenizer = tokenizer_of(tokenizers[STUDENT])
        asked = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in questions.prompts]
    generated: list[dict[str, Any]] = [
        {"prompt": prompt, "answers": answers} for prompt, answers in zip(asked, questions.answers, strict=True)
    ]
    options: Any = {"batch_size": batch_size, "max_new_tokens": scoring.max_new_tokens, "stop": scoring.stop}
    for name, model in models.items():
        if isinstance(questions, PictureQuestions):
            texts = generate_about_pictures(model, tokenizers[name], questions.rows, **options)
        else:
            texts = generate_answers(model, tokenizer_of(tokenizers[name]), _prompts(questions, name), **options)
        for row, text in zip(generated, texts, strict=True):
            found = scoring.scores(text, row["answers"])
            row[name] = {"text": text, **found}
            for measure, value in found.items():
                scores.setdefault(measure, {}).setdefault(name, []).append(value)
    return [
        mean_measure(measure, {name: np.array(values) for name, values in by_model.items()}, form=PERCENT)
        for measure, by_model in scores.items()
    ], generated


def is_vocabulary_shared(tokenizer: Any, other: Any) -> bool:
    """True if token ids mean the same to both tokenizers, or those of processors, as far as both have them."""
    try:
        shared_vocabulary(tokenizer_of(tokenizer), tokenizer_of(other))
    except ValueError:
        return False
    return True
