"""The probe: a few rows of a run and the trainer that it would have, made of them. All checks share it.

The trainer's own preparation, collator and loss are the truth about a run, so checks ask it and repeat nothing.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.diagnosis.findings import LeftOut
from hf_distill.diagnosis.pictures import in_parts, uncut_rows
from hf_distill.modeling import tokenizer_of
from hf_distill.named import student_tokenizer
from hf_distill.picture_rows import has_pictures
from hf_distill.quiet import quiet
from hf_distill.rows import with_messages
from hf_distill.servers import TeacherAway
from hf_distill.teachers import Teacher
from hf_distill.teachers.columns import reason_away
from hf_distill.teachers.kinds import own_models
from hf_distill.teachers.local import refuse_shared_memory, refuse_student_as_teacher
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer

# What a trainer, or a library underneath, raises for settings, files and rows that it cannot work with, for packages
# that are not installed, and for servers that do not answer.
PROBLEMS = (ImportError, LookupError, OSError, RuntimeError, TeacherAway, TypeError, ValueError)
SOME = 0.02  # a share of labels or rows that is no accident
# On a CPU, checks read so many tokens of the probe that their number times the parameters of both sides is MOST_WORK,
# which takes some 20 s on one core; and at least LEAST_ROWS rows, with about LEAST_LABELS tokens that bear labels.
MOST_WORK, LEAST_LABELS, LEAST_ROWS = 4e11, 1000, 4
FIRST_WRITTEN = 8  # prompts of speculative KD that are written to the end: each is a rollout


class Probe:
    """A few rows of a run, and its trainer on them.

    Args:
        trainer_class: of the run.
        arguments: what it would be called with; nothing of it is changed.
        num_rows (`int`): rows of the training set, and of each held-out set.
        folder (`str`): an empty one, in place of `output_dir`.

    Attributes:
        args: the settings as they were given.
        datasets: all rows as they were given, by the name of the data set; "train" is the first.
        samples: some rows of each.
        has_pictures (`bool`): whether the training rows have some.
        problem (`str`, *optional*): why there is no trainer.
    """

    def __init__(
        self, trainer_class: type[HardLabelTrainer], arguments: Mapping[str, Any], num_rows: int, folder: str
    ) -> None:
        self.trainer_class, self.arguments = trainer_class, dict(arguments)
        self.args = trainer_class.settings(arguments.get("args"))
        self.num_rows = num_rows
        self.memory, self.kind = 0, self.args.device.type  # bytes and kind of the device, for the plan
        held_out = arguments.get("eval_dataset")
        held_out = held_out if isinstance(held_out, Mapping) else {"eval": held_out}
        self.datasets = {"train": arguments.get("train_dataset"), **held_out}
        self.datasets = {name: rows for name, rows in self.datasets.items() if rows is not None}
        self.samples = {name: sample(rows, num_rows, self.args.seed) for name, rows in self.datasets.items()}
        self.has_pictures = has_pictures(self.datasets.get("train"))
        self.problem: str | None = None
        self.first: Any = None  # the gradient that several checks share (updates.py)
        self._found: dict[Any, tuple[Any, Exception | None]] = {}
        try:
            self._trainer = self._made(folder)
        except PROBLEMS as error:
            # The message of a KeyError is a mere name.
            kind = f"{type(error).__name__}: " if isinstance(error, LookupError | TypeError) else ""
            self.problem = kind + " ".join(str(error).split())

    def _made(self, folder: str) -> HardLabelTrainer:
        args = copy.copy(self.args)
        args.output_dir, args.report_to, args.push_to_hub = folder, [], False
        args.save_strategy, args.resume_from_checkpoint = "no", None
        arguments = {**self.arguments, "args": args, "train_dataset": self.samples.get("train")}
        if isinstance(arguments.get("eval_dataset"), Mapping):
            arguments["eval_dataset"] = {name: rows for name, rows in self.samples.items() if name != "train"}
        elif "eval" in self.samples:
            arguments["eval_dataset"] = self.samples["eval"]
        self._refuse_one_memory()
        for name in ("model", "processing_class", "peft_config"):  # which a trainer may change
            if name in arguments and not isinstance(arguments[name], str):
                arguments[name] = copy.deepcopy(arguments[name])
        return self.trainer_class(**arguments)

    def _refuse_one_memory(self) -> None:
        """The trainer's refusals of a student and a teacher in one memory, which a copy of the student would pass."""
        student, teachers = self.arguments.get("model"), _models(self.arguments.get("teacher_model"))
        refuse_student_as_teacher(student, teachers)
        if isinstance(student, PreTrainedModel) and self.arguments.get("peft_config") is None:
            for teacher in teachers:
                if isinstance(teacher, PreTrainedModel):
                    refuse_shared_memory(student, teacher)

    # ----------------------------------------------------------------------------------------------------- the models

    @property
    def trainer(self) -> Any:
        """The trainer; [`LeftOut`] if it cannot be made, which a finding of its own says."""
        if self.problem is not None:
            raise LeftOut("there is no trainer, see the first line")
        return self._trainer

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teachers by name; [`LeftOut`] without any."""
        if not (teachers := getattr(self.trainer, "teachers", {})):
            raise LeftOut("the run has no teacher")
        return teachers

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's, as the trainer has it; without a trainer as it comes."""
        if self.problem is None:
            return self._trainer.tokenizer
        try:
            given = self.arguments.get("processing_class")
            return tokenizer_of(given) if given else student_tokenizer(self.arguments["model"], self.args)
        except PROBLEMS as error:
            raise LeftOut("the student has no tokenizer") from error

    def once(self, function: Callable[["Probe"], Any]) -> Any:
        """`function(probe)`, computed once; what it raises it raises again."""
        if function not in self._found:
            try:
                self._found[function] = function(self), None
            except (LeftOut, *PROBLEMS) as error:
                self._found[function] = None, error
        value, error = self._found[function]
        if error is not None:
            raise error
        return value

    @property
    def writes(self) -> bool:
        """True if the training text is generated."""
        return issubclass(self.trainer_class, SpeculativeKDTrainer)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's, and those that the student's generation knows."""
        generation = getattr(self.trainer.student, "generation_config", None)
        found = [self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
        return frozenset(i for each in found if each is not None for i in (each if isinstance(each, list) else [each]))

    # ------------------------------------------------------------------------------------------------------- the rows

    @property
    def given_rows(self) -> Any:
        """The training rows of the probe, as they were given; [`LeftOut`] if there are none."""
        if "train" not in self.samples:
            raise LeftOut("there are no training rows")
        return self.samples["train"]

    @cached_property
    def conversations(self) -> list[dict[str, Any]]:
        """The training rows of the probe that are conversations, as messages; [`LeftOut`] if none is."""
        rows = [] if "input_ids" in columns_of(self.given_rows) else self.given_rows
        read = in_parts if self.has_pictures else with_messages
        found = [chat for row in rows if (chat := _with_messages(read(row, "a row"))) is not None]
        if not found:
            raise LeftOut("the rows are no conversations")
        return found

    @cached_property
    def uncut(self) -> Any:
        """The probe's training rows as tokens and labels, neither cut, packed nor dropped for their length."""
        if self.has_pictures:
            return uncut_rows(self.trainer)
        return self._prepared(max_length=None, drop_long_rows=False)

    @cached_property
    def rows(self) -> Any:
        """The same as they are trained on, one text in each row, with the columns of the teachers.

        Rows with pictures become tokens in a batch alone.
        """
        if self.has_pictures:
            return self.trainer.train_dataset
        return self.trainer.prepare_rows(self._prepared(), "train", self.trainer.args)

    def more_rows(self, number: int) -> Any:
        """A larger sample of the training rows, prepared in the same way, for what the teachers have to know."""
        rows = self._prepared(sample(self.datasets["train"], number, self.args.seed))
        return self.trainer.prepare_rows(rows, "train", self.trainer.args)

    def _prepared(self, rows: Any = None, **changes: Any) -> Any:
        trainer, rows = self.trainer, self.samples["train"] if rows is None else rows
        if self.writes:
            raise LeftOut("the training text is generated")
        if self.args.skips_preparation:
            return rows
        args = copy.copy(trainer.args)
        for name, value in {"shuffle_dataset": False, **changes}.items():
            setattr(args, name, value)
        return trainer._tokenized(rows, trainer.processing_class, args, False, trainer._formatting_func, "train")

    @cached_property
    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids (T,) and labels (T,) of each of the `uncut` rows; nothing predicts the first token."""
        found = []
        for row in self.uncut:
            labels = row.get("labels") if row.get("labels") is not None else row["input_ids"]
            labels = np.array(labels)
            labels[:1] = -100
            found.append((np.array(row["input_ids"]), labels))
        return found

    @cached_property
    def padded(self) -> list[int]:
        """The labels on padding at the end of each of the `texts`; one EOS that is the padding token ends the text."""
        runs = [_run_at_end(labels, self.tokenizer.pad_token_id) for _, labels in self.texts]
        return [max(run - self.pads_with_eos, 0) for run in runs]

    @property
    def pads_with_eos(self) -> bool:
        """True if one token is both."""
        return self.tokenizer.pad_token_id == self.tokenizer.eos_token_id

    @property
    def is_mislabelled(self) -> bool:
        """True if the labels are not what the rows say, so that predictions of them tell nothing about a model."""
        pairs = [(labels != -100, labels != ids) for ids, labels in self.texts]
        wrong = sum((bears & differs).sum() for bears, differs in pairs)
        return wrong > SOME * sum(bears.sum() for bears, _ in pairs) or sum(map(bool, self.padded)) > SOME * len(pairs)

    # ---------------------------------------------------------------------------------------------------- the batches

    def batches(self, size: int, *, packed: bool = False) -> Iterator[dict[str, Any]]:
        """The rows in batches of `size`, on the student's device, with all that teachers need.

        Args:
            packed (`bool`): whether they are those of the training, packed if it packs. Else each text is a row; the
                longest come first, so that batches have little padding. Where not all are [`affordable`], they are
                rows at even distances.

        Raises:
            [`TeacherAway`]: a server does not answer.
        """
        trainer = self.trainer
        if self.writes:
            yield from self.written
            return
        dataset = trainer.train_dataset if packed else self.rows
        rows, collate = trainer.first_rows(dataset, len(dataset)), trainer.batch_collator()
        if not packed:
            number = max(self.affordable(dataset), min(LEAST_ROWS, len(rows)))
            rows = [rows[index * len(rows) // number] for index in range(number)]
            rows.sort(key=lambda row: -len(row.get("input_ids", ())))
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size])
            if (reason := reason_away(batch)) is not None:
                raise TeacherAway(reason)
            yield trainer._prepare_inputs(batch)

    def affordable(self, dataset: Any, part: float = 1.0) -> int:
        """The number of rows of a data set that both sides can read in time: on an accelerator all, on a CPU some.

        Args:
            part (`float`): of this time.
        """
        if self.writes or self.trainer.args.device.type != "cpu":
            return len(dataset)
        teachers = own_models(getattr(self.trainer, "teachers", {})).values()
        models = [self.trainer.model, *(teacher.model for teacher in teachers)]
        limit = self.args.max_length or math.inf
        tokens = sum(min(len(ids), limit) for ids, _ in self.texts)
        labels = sum(int((labels != -100).sum()) for _, labels in self.texts)
        most = MOST_WORK / sum(parameter.numel() for model in models for parameter in model.parameters())
        share = part * max(most / max(tokens, 1), LEAST_LABELS / max(labels, 1))
        number = share * len(dataset)
        return min(len(dataset), max(1, math.ceil(number) if part == 1 else int(number)))

    @cached_property
    def written(self) -> list[dict[str, Any]]:
        """Batches of generated text, of speculative KD."""
        trainer = self.trainer
        size = trainer.args.per_device_train_batch_size
        loader = trainer.get_train_dataloader()
        number = min(max(1, FIRST_WRITTEN // size), len(loader))
        batches, _ = trainer.get_batch_samples(iter(loader), number, trainer.args.device)
        return [trainer._prepare_inputs(batch) for batch in batches]

    @property
    def updates(self) -> int | None:
        """The updates of the whole run; None for a stream whose length nobody knows."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        rows, sampled = self.datasets["train"], self.samples["train"]
        if not isinstance(rows, Dataset):
            return None
        # As many prepared rows as there would be of the whole data set: packing joins, and rows may be dropped.
        prepared = len(self.trainer.train_dataset) * len(rows) / max(len(sampled), 1)
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(prepared / size * self.args.num_train_epochs)


def sample(rows: Any, number: int, seed: int) -> Any:
    """Some rows, drawn at random, in their order; of a stream the first ones. What is no data set stays as it is."""
    if isinstance(rows, IterableDataset):
        return Dataset.from_list(list(rows.take(number)), features=rows.features if has_pictures(rows) else None)
    if not isinstance(rows, Dataset) or len(rows) <= number:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:number]))


def _run_at_end(labels: np.ndarray, token: Any) -> int:
    other = np.flatnonzero(labels != token)
    return len(labels) if not len(other) else len(labels) - 1 - int(other[-1])


def columns_of(rows: Any) -> set[str]:
    """The columns of rows."""
    return set(next(iter(rows), {}))


def _with_messages(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row whose messages are all in one list; None for one that is no conversation."""
    if row.get("messages"):
        return row
    parts = [row.get("prompt"), row.get("completion")]
    if not isinstance(parts[0], list):
        return None
    return {**row, "messages": [turn for part in parts for turn in (part if isinstance(part, list) else [])]}


@contextmanager
def open_probe(trainer_class: type[HardLabelTrainer], arguments: Mapping[str, Any], num_rows: int) -> Iterator[Probe]:
    """A probe, without progress bars and warnings of the libraries underneath while it lasts.

    Teachers that are models of the caller's come back as they were: trained or frozen, in their mode, on their device.
    So do the states of the random generators of Python, NumPy and torch, which a trainer seeds.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        stack.enter_context(quiet())
        stack.enter_context(_random_states_kept())
        for model in _models(arguments.get("teacher_model")):
            stack.enter_context(as_it_was(model))
        yield Probe(trainer_class, arguments, num_rows, folder)


def _models(teachers: Any) -> list[nn.Module]:
    given = teachers.values() if isinstance(teachers, Mapping) else teachers
    given = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [model for model in given if isinstance(model, nn.Module)]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts a model back afterwards: which parameters are trained, its mode, and its device if it was on one alone."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mode, was_hooked = model.training, _is_hooked(model)
    devices = {parameter.device for parameter in model.parameters()}
    try:
        yield
    finally:
        if not was_hooked and _is_hooked(model):  # offloaded, or laid out over devices
            _remove_hooks(model)
        if len(devices) == 1 and {parameter.device for parameter in model.parameters()} != devices:
            model.to(devices.pop())
        model.train(mode)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def _remove_hooks(model: nn.Module) -> None:
    remove_hook_from_module(model, recurse=True)
    for part in model.modules():  # the model may be inside of another, as with adapters
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def _is_hooked(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    # A CUDA that nobody has used has no state to keep, and is not started for it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
