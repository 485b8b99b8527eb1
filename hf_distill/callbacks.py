"""Callbacks that observe a run."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import is_trackio_available, is_wandb_available

from hf_distill.evaluating.gaps import BASE, STUDENT, TEACHER, Measure, gap_recovered
from hf_distill.evaluating.models import Scoring, answer_measures, check_questions, fidelity_measures
from hf_distill.evaluating.questions import PictureQuestions, Questions
from hf_distill.evaluation import perplexity, window_length
from hf_distill.measured_pictures import batches_with_pictures, sees_pictures
from hf_distill.modeling import causal_lm, evaluating, is_vision_language, label_positions, tokenizer_of
from hf_distill.report import markdown, save_curve
from hf_distill.rows import refuse_pictures, tokenized_row
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.own_view import OwnViewTeacher

TITLE = "rollout/samples"
# The name of a cosine below each number. A name is no proof of learning.
PHASES = {0.50: "Adapting", 0.70: "Learning", 0.90: "Good", 0.95: "Great", 1.01: "Excellent"}


class CosinePhaseCallback(TrainerCallback):
    """Prints the cosine of keys and values with its phase, draws its curve at the end, and may stop a run.

    `[Step 0200] loss 0.0432 | cosine 0.9568 | Excellent`

    Args:
        every (`int`): updates between two lines, which show the latest log.
        target (`float`, *optional*): stops the run once the cosine has stayed at or above it for `hold` updates.
        hold (`int`): see `target`.

    Raises:
        `ValueError`: `every` or `hold` below 1, or a target that is no cosine.
    """

    def __init__(self, every: int = 50, target: float | None = None, hold: int = 100) -> None:
        if every < 1 or hold < 1:
            raise ValueError(f"every and hold have to be at least 1, got {every} and {hold}")
        if target is not None and not -1 <= target <= 1:
            raise ValueError(f"target has to be a cosine, in [-1, 1], got {target}")
        self.every = every
        self.target = target
        self.hold = hold
        self.curve: list[tuple[float, float]] = []  # step, cosine
        self._printed = 0
        self._held_since: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.curve = [(entry["step"], entry["kv/cosine"]) for entry in state.log_history if "kv/cosine" in entry]
        self._printed = state.global_step
        self._held_since = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "kv/cosine" not in logs:
            return
        step, cosine = state.global_step, logs["kv/cosine"]
        self.curve.append((step, cosine))
        if step // self.every > self._printed // self.every and state.is_world_process_zero:
            self._printed = step
            Console(highlight=False).print(
                f"\\[Step {step:04d}] loss {logs['loss']:.4f} | cosine {cosine:.4f} | {phase(cosine)}"
            )
        if self.target is None or cosine < self.target:
            self._held_since = None
            return
        self._held_since = step if self._held_since is None else self._held_since
        if step - self._held_since >= self.hold:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.curve and state.is_world_process_zero:
            save_curve(f"{args.output_dir}/cosine.png", self.curve, "cosine of keys and values", PHASES)


def phase(cosine: float) -> str:
    """Adapting, Learning, Good, Great or Excellent."""
    return next((name for limit, name in PHASES.items() if cosine < limit), "Excellent")


class _Measuring(TrainerCallback):
    """The times at which a callback measures, and its logs: the start, every `every` updates, and the end."""

    trainer: Trainer
    every: int
    beginning: str  # of a logged name, which tells that the update of a resumed run has been measured

    def measured(self, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        """The values to log, by name; called in the main process."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if not _is_logged(state, self.beginning):
            self._measure(state, control, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        # The trainer's own flow callback runs before others, and has set by now whether this was the last step.
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._measure(state, control, model, processing_class)

    def _measure(self, state: Any, control: Any, model: Any, processing_class: Any) -> None:
        if not state.is_world_process_zero:
            return
        found = self.measured(state, model, processing_class)
        # In train mode SFTTrainer would add the training metrics collected so far to this record.
        with evaluating(model):
            # Logging resets should_log, and the other processes would wait for the log of this step.
            should_log = control.should_log
            self.trainer.log(found)
            control.should_log = should_log


class PerplexityCallback(_Measuring):
    """Logs the student's perplexity on one or several data sets, as `perplexity/<name>`.

    It is measured at the start, every `every` updates and at the end, and goes where the trainer's other logs go:
    trackers and `trainer_state.json`.

        trainer.add_callback(PerplexityCallback(trainer, {"stories": stories, "code": code}, every=100))

    The measurement is `evaluation.perplexity`, without dropout or autocast. It draws no random numbers, so the training
    is the same with and without it. On several processes the main one measures, on its whole copy of the model. The
    others wait for it at their next exchange of gradients, `ddp_timeout` seconds at most: keep the data sets small.

    Args:
        trainer (`Trainer`): any trainer of transformers; add the callback to it with `add_callback`.
        datasets: a dict of data sets by name, or one, which is called `eval` then; rows as in `evaluate_fidelity`.
        every (`int`): updates between two measurements.
        batch_size (`int`): as in `evaluation.perplexity`.
        max_length (`int`, *optional*): as there.
        stride (`int`, *optional*): as there.

    Raises:
        `ValueError`: `every` or `batch_size` below 1; a name that is taken; no data set, an empty one or one with rows
            that cannot be measured; windows that leave tokens out; a model that is sharded over processes (FSDP,
            ZeRO-3).
    """

    def __init__(
        self,
        trainer: Trainer,
        datasets: Mapping[str, Dataset | IterableDataset] | Dataset | IterableDataset,
        every: int = 100,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> None:
        _check_measuring(self, trainer, every, batch_size)
        model: Any = trainer.model
        tokenizer = tokenizer_of(trainer.processing_class)
        window_length(model, max_length, stride)
        if isinstance(datasets, Dataset | IterableDataset):
            datasets = {"eval": datasets}
        if not datasets:
            raise ValueError("datasets is empty; PerplexityCallback needs at least one data set")
        for name, dataset in datasets.items():
            row = next(iter(dataset), None)
            if row is None:
                raise ValueError(f"the data set {name!r} is empty")
            try:
                if is_vision_language(causal_lm(model)):
                    refuse_pictures(row, "the first row")
                tokenized_row(row, tokenizer)
            except ValueError as error:
                raise ValueError(f"the data set {name!r} cannot be measured: {error}") from error
        _refuse_same_names(trainer, PerplexityCallback, datasets)
        self.trainer = trainer
        self.names = {*datasets}
        self.datasets = datasets
        self.beginning = f"perplexity/{next(iter(datasets))}"
        self.every = every
        self.options = {"batch_size": batch_size, "max_length": max_length, "stride": stride}

    def measured(self, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        vocab_size, tokenizer = getattr(self.trainer, "vocab_size", None), tokenizer_of(processing_class)
        return {
            f"perplexity/{name}": perplexity(model, data, tokenizer, vocab_size=vocab_size, **self.options)[
                "perplexity"
            ]
            for name, data in self.datasets.items()
        }


class EvaluateCallback(_Measuring):
    """Measures the student as [`~hf_distill.evaluating.models.evaluate_models`] does, while it is trained.

    It logs `evaluate/<measure>` at the start, every `every` updates and at the end: perplexity on `rows`, the distance
    from the teacher there, and the scores of answers to `questions`. From the second time on it also logs
    `evaluate/<measure>_gap_recovered`, the share of the way from the student at the start to the teacher, where these
    two differ; a resumed run does not know its start, and logs none.

        trainer.add_callback(EvaluateCallback(trainer, rows=held_out, questions=questions_of(held_out, collator)))

    The training is the same with and without it. On several processes the main one measures, and the others wait, as
    with [`PerplexityCallback`]. Answers are generated in the precision of the training.

    Args:
        trainer (`Trainer`): any trainer of transformers; add the callback to it with `add_callback`.
        every (`int`): updates between two measurements.
        rows (`Dataset`, *optional*): as in `evaluate_fidelity`, with pictures or without.
        questions ([`~hf_distill.evaluating.questions.Questions`] or those about pictures, *optional*):
            Prompts and right answers.
        scoring ([`~hf_distill.evaluating.models.Scoring`], *optional*): how answers are scored.
        teacher (`PreTrainedModel`, *optional*):
            A model with the student's tokenizer. By default that of the trainer, if it has one such model.
        teacher_processing_class (`ProcessorMixin`, *optional*):
            Of a teacher that reads pictures through its own processor. By default that of the trainer's teacher.
        batch_size (`int`): rows or prompts at once.
        max_length (`int`, *optional*): as in `evaluate_fidelity`.
        name (`str`): what the logged names begin with; several callbacks of a trainer need different ones.

    Raises:
        `ValueError`: `every` or `batch_size` below 1; a name that is taken; neither rows nor questions; prompts
            that leave no room for an answer; rows that cannot be measured; a model that is sharded over processes
            (FSDP, ZeRO-3).
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 100,
        *,
        rows: Dataset | None = None,
        questions: Questions | PictureQuestions | None = None,
        scoring: Scoring | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_processing_class: ProcessorMixin | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        name: str = "evaluate",
    ) -> None:
        _check_measuring(self, trainer, every, batch_size)
        _refuse_same_names(trainer, EvaluateCallback, [name])
        if rows is None and questions is None:
            raise ValueError("there is nothing to measure: give rows, questions or both")
        if rows is not None and not len(rows):
            raise ValueError("there are no rows to measure")
        self.trainer = trainer
        self.names = {name}
        self.name = name
        self.beginning = f"{name}/"
        self.every = every
        self.rows, self.questions, self.scoring = rows, questions, scoring or Scoring()
        self.options = {"batch_size": batch_size, "max_length": max_length}
        own = getattr(trainer, "teacher", None)
        if teacher is None and isinstance(own, LocalTeacher):
            teacher = own.model
            if isinstance(own, OwnViewTeacher):
                teacher_processing_class = teacher_processing_class or own.own.processor
        self.teacher, self.teacher_processing_class = teacher, teacher_processing_class
        if rows is not None:
            self._try_rows(rows)
        if questions is not None:
            models: dict[str, Any] = {STUDENT: trainer.model} | ({} if teacher is None else {TEACHER: teacher})
            check_questions(models, self._tokenizers(trainer.processing_class), questions, self.scoring.max_new_tokens)
        self._start: dict[str, np.ndarray] = {}  # the student's values of each row before the training, by measure
        self._taught: dict[str, np.ndarray] = {}  # those of the teacher's answers

    def _try_rows(self, rows: Dataset) -> None:
        """Raises `ValueError` for a first row that cannot be measured, and, of pictures, for any that is broken."""
        processor = self.trainer.processing_class
        models = [cast(Any, model) for model in (self.trainer.model, self.teacher) if model is not None]
        if sees_pictures(models, rows):
            batches, view = batches_with_pictures(
                models, rows, processor, self.teacher_processing_class, **{**self.options, "batch_size": 1}
            )
            batch = next(batches)
            if view is not None:
                view.view(batch, label_positions(batch["labels"])[0])
            return
        if is_vision_language(causal_lm(models[0])):
            refuse_pictures(rows[0], "the first of the rows")
        tokenized_row(dict(rows[0]), tokenizer_of(processor), "the first of the rows")

    def _tokenizers(self, processing_class: Any) -> dict[str, Any]:
        return {STUDENT: processing_class, TEACHER: self.teacher_processing_class or processing_class}

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._start.clear()
        super().on_train_begin(args, state, control, model, processing_class, **kwargs)

    def measured(self, state: Any, model: Any, processing_class: Any) -> dict[str, float]:
        vocab_size = getattr(self.trainer, "vocab_size", None)
        students = {STUDENT: model}
        teachers = {} if self.teacher is None else {TEACHER: self.teacher}
        whole = self._tokenizers(processing_class)
        measures: list[Measure] = []
        if self.rows is not None:
            measures += fidelity_measures(
                {**students, **teachers}, whole, self.rows, vocab_size=vocab_size, **self.options
            )[0]
        if self.questions is not None:
            asked = students if self._taught else {**students, **teachers}  # the teacher answers once
            measures += answer_measures(
                asked, whole, self.questions, self.scoring, batch_size=self.options["batch_size"]
            )[0]
        found = {}
        for measure in measures:
            found[f"{self.name}/{measure.name}"] = measure.values[STUDENT]
            sums = dict(measure.sums or {})
            self._taught.update({measure.name: sums[TEACHER]} if TEACHER in sums else {})
            if state.global_step == 0:
                self._start[measure.name] = sums[STUDENT]
            elif measure.name in self._start and measure.name in self._taught:
                sums |= {BASE: self._start[measure.name], TEACHER: self._taught[measure.name]}
                if gap := gap_recovered(measure._replace(sums=sums)):
                    found[f"{self.name}/{measure.name}_gap_recovered"] = gap.share
        return found


def _check_measuring(callback: TrainerCallback, trainer: Trainer, every: int, batch_size: int) -> None:
    if every < 1 or batch_size < 1:
        raise ValueError(f"every and batch_size have to be at least 1, got {every} and {batch_size}")
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{type(callback).__name__} needs the whole model on the main process, not one sharded over several"
        )


def _is_logged(state: Any, beginning: str) -> bool:
    """True at the begin of a resumed run whose update has a record of such a name, or one after such a `prefix/`."""
    now = [entry for entry in state.log_history if entry["step"] == state.global_step]
    is_prefix = beginning.endswith("/")
    return any(name == beginning or (is_prefix and name.startswith(beginning)) for entry in now for name in entry)


def _refuse_same_names(trainer: Trainer, kind: type[TrainerCallback], names: Iterable[str]) -> None:
    """Raises `ValueError` if another callback of this kind logs under one of these names."""
    others: list[Any] = [each for each in trainer.callback_handler.callbacks if isinstance(each, kind)]
    if taken := [name for name in names if any(name in other.names for other in others)]:
        raise ValueError(
            f"{kind.__name__}: another one of this trainer has the name {taken[0]!r}; take a name of its own"
        )


class RolloutSamplesCallback(TrainerCallback):
    """Shows generated samples every `steps` updates: in the terminal, and in W&B, trackio or TensorBoard.

    The teacher's corrections are marked, by colour in a terminal and by `‹›` elsewhere.

    Args:
        trainer (`SpeculativeKDTrainer`): the run; add the callback to it with `add_callback`.
        steps (`int`): updates between two tables.
        num_samples (`int`, *optional*): rows of a table.

    Raises:
        `ValueError`: `steps` or `num_samples` below 1, or a trainer that generates no text.
    """

    def __init__(self, trainer: Any, steps: int, num_samples: int = 4) -> None:
        if steps < 1 or num_samples < 1:
            raise ValueError(f"steps and num_samples have to be at least 1, got {steps} and {num_samples}")
        if not hasattr(trainer, "last_rows"):
            raise ValueError(f"{type(trainer).__name__} writes no text; samples need a SpeculativeKDTrainer")
        self.trainer = trainer
        self.steps = steps
        self.num_samples = num_samples

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps or not state.is_world_process_zero:
            return
        rows = [_sample(row, kwargs["processing_class"]) for row in self.trainer.last_rows[: self.num_samples]]
        _print(rows, f"{TITLE}, step {state.global_step}")
        plain = [
            {"step": state.global_step, "source": source, "prompt": prompt, "completion": _plain(parts)}
            for source, prompt, parts in rows
        ]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(TITLE, markdown(plain), state.global_step)
        _log_tables(args.report_to, plain)


def _sample(row: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, list[tuple[bool, str]]]:
    """Source, student's prompt, and the parts of the completion: whether each is a correction, and its text."""
    drafted = [True] * len(row.completion_ids) if row.source == "dataset" else row.drafted
    parts, end, text = [], 0, ""
    for is_draft, run in groupby(drafted):
        end += len(list(run))
        # The text of a token may depend on the tokens before it, and a character may end in a later part.
        longer = str(tokenizer.decode(row.completion_ids[:end]))
        longer = longer if end == len(drafted) else longer.rstrip("\ufffd")
        parts.append((not is_draft, longer[len(text) :]))
        text = longer
    return row.source, str(tokenizer.decode(row.student_prompt_ids)), parts


def _plain(parts: list[tuple[bool, str]]) -> str:
    return "".join(f"‹{text}›" if is_correction else text for is_correction, text in parts)


def _print(rows: list[tuple[str, str, list[tuple[bool, str]]]], title: str) -> None:
    console = Console()
    view = Table(title=title, title_justify="left", show_lines=True)
    for name in ("source", "prompt", "completion"):
        view.add_column(name, overflow="fold")
    for source, prompt, parts in rows:
        colored = Text.assemble(*((text, "bold red" if mine else "") for mine, text in parts))
        view.add_row(source, Text(prompt), colored if console.is_terminal else Text(_plain(parts)))
    console.print(view)


def _log_tables(report_to: Any, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns, data = list(rows[0]), [list(row.values()) for row in rows]
    if "wandb" in report_to and is_wandb_available():
        import wandb

        if wandb.run is not None:
            wandb.log({TITLE: wandb.Table(columns=columns, data=data)}, commit=False)
    if "trackio" in report_to and is_trackio_available():
        import pandas as pd
        import trackio

        trackio.log({TITLE: trackio.Table(dataframe=pd.DataFrame(rows))})
