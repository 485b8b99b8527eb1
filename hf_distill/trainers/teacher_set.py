"""The teachers of a run: loaded, checked, combined, and what each of them reads of a row."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.collators import (
    OWN_COLUMNS,
    TEACHER_COLUMNS,
    TeacherColumnsCollator,
    lost_messages,
    with_own_tokens,
    with_teacher_prompt,
)
from hf_distill.modeling import causal_lm, num_positions, num_token_ids, shared_vocabulary
from hf_distill.teachers import Teacher
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.local import BASE, BaseTeacher, LocalTeacher, is_split, load_teacher
from hf_distill.trainers.checks import (
    PEEKED_ROWS,
    AnyDataset,
    refuse_across,
    refuse_row_columns,
    refuse_shared_memory,
    student_rows,
    teacher_tokenizer,
)
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.data import check_chat_template

logger = logging.getLogger(__name__)

PEEKED_TEMPLATES = 20  # rows whose conversations are looked for in what the teacher reads


class TeacherSet:
    """The teachers of a run by name. They are loaded before the student, one after the other.

    Args:
        models: each teacher as hub id, path or model; "base" is the student's own base model.
        tokenizers: those that came with them; None where they are to be found.
        student: hub id, path or model.
        student_tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        args ([`KDConfig`]): settings.
        crosses (`bool`): whether a teacher may have another tokenizer.
        has_adapters (`bool`): whether the student will be trained in adapters alone, which no teacher shares.
        datasets (mapping of `str` to `Dataset` or `IterableDataset`): those that will be prepared, by name.

    Raises:
        `ValueError`: what `load_teacher` and the checks of `trainers/checks.py` refuse.
    """

    def __init__(
        self,
        models: Mapping[str, str | PreTrainedModel],
        tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
        student: str | PreTrainedModel,
        student_tokenizer: PreTrainedTokenizerBase,
        args: KDConfig,
        *,
        crosses: bool,
        has_adapters: bool,
        datasets: Mapping[str, AnyDataset],
    ) -> None:
        self.args = args
        self.student_tokenizer = student_tokenizer
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}  # of teachers that have the student's vocabulary
        self._across: dict[str, PreTrainedTokenizerBase] = {}  # of those that have another
        shared: dict[str, int | None] = {}
        for name, model in models.items():  # What tokenizers tell is told before any teacher is loaded.
            found = None if model == BASE else tokenizers[name] or teacher_tokenizer(model, args)
            tokenizer = found or student_tokenizer
            shared[name] = self._shared_vocabulary(tokenizer, crosses)
            (self._tokenizers if shared[name] is not None else self._across)[name] = tokenizer
        refuse_across(self._across, models, args)
        for name, tokenizer in self._across.items():
            for dataset_name, dataset in datasets.items():
                check_chat_template(dataset, dataset_name, args, tokenizer, f"{name}'s", "teacher_processing_class")
        devices = [place.strip() or None for place in (args.teacher_device or "").split(",")]
        self._places = dict(zip(models, devices * len(models), strict=False))
        # Token ids below this mean the same to all sides; ids past it get no probability.
        self.vocab_size = min([student_rows(student, args), *(size for size in shared.values() if size is not None)])
        self.by_name: dict[str, Any] = {}
        for name, model in models.items():
            if model == BASE:
                self.by_name[name] = None  # until the student is there
                continue
            model = load_teacher(
                model,
                device=self._places[name],
                student_device=args.device,
                quantization=args.teacher_quantization,
                trust_remote_code=args.trust_remote_code,
                init_kwargs=args.teacher_model_init_kwargs,  # pyright: ignore[reportArgumentType]
            )
            if not isinstance(student, str) and not has_adapters:
                refuse_shared_memory(student, model)  # Before the teacher is frozen, and what it shares with it.
            teacher = LocalTeacher(model, args.device)
            if len(models) > 1:
                logger.info("teacher %s: %.1f MiB", name, model.get_memory_footprint() / 2**20)
            if name not in self._across:
                self.by_name[name] = teacher
                self.vocab_size = min(self.vocab_size, teacher.head.weight.shape[0])
                continue
            side = self.by_name[name] = AcrossTeacher(
                teacher, self._across[name], student_tokenizer, index=len(self.by_name), method=args.cross_tokenizer,
                student_rows=student_rows(student, args),
            )  # fmt: skip
            if side.method == "uld" and (args.divergence != "forward_kl" or args.divergence_params):
                logger.warning(
                    "%s: uld compares sorted probabilities by their distance, divergence=%r has no part in it", name,
                    args.divergence,
                )  # fmt: skip

    def _shared_vocabulary(self, tokenizer: PreTrainedTokenizerBase, crosses: bool) -> int | None:
        """How many token ids mean the same to both sides; None where texts have to be aligned."""
        try:
            return shared_vocabulary(self.student_tokenizer, tokenizer)
        except ValueError:
            is_prepared = (self.args.dataset_kwargs or {}).get("skip_prepare_dataset")  # pyright: ignore[reportAttributeAccessIssue]
            if self.args.cross_tokenizer == "error" or is_prepared or not crosses:
                raise
            return None

    def combined(self, student: PreTrainedModel, accelerator: Accelerator) -> Teacher:
        """The one teacher that all of them make, now that the student is loaded."""
        for name, teacher in self.by_name.items():
            self.by_name[name] = teacher or BaseTeacher(student)
            if not isinstance(self.by_name[name], BaseTeacher):
                refuse_shared_memory(student, self.by_name[name].model)
        for name, teacher in self.local().items():
            if self._places[name] == "sharded" or is_split(teacher.model):
                teacher.shard(accelerator)
        if len(self.by_name) == 1:
            return next(iter(self.by_name.values()))
        routed = self.args.teacher_combination == "route"
        return EnsembleTeacher(self.by_name, self.args.teacher_weights, routed=routed)

    def local(self) -> dict[str, LocalTeacher]:
        """Those that are models of their own."""
        sides = {name: getattr(teacher, "teacher", teacher) for name, teacher in self.by_name.items()}
        return {name: teacher for name, teacher in sides.items() if isinstance(teacher, LocalTeacher)}

    def num_token_ids(self) -> int:
        """The number of token ids that all teachers can read, each in its own text."""
        sides = [causal_lm(side.model) for side in self.local().values()]
        return min((num_token_ids(side) for side in sides), default=self.vocab_size)

    def methods(self) -> dict[str, str]:
        """How those with another tokenizer are compared."""
        return {name: self.by_name[name].method for name in self._across}

    # ------------------------------------------------------------------------------------------------------- rows

    def columns(self) -> list[str]:
        """What only teachers see of a row."""
        own = [f"teacher_{index}_{name}" for index in range(len(self.by_name)) for name in OWN_COLUMNS]
        return [*TEACHER_COLUMNS, *own]

    def collator(self, collator: Any, dataset: AnyDataset) -> Any:
        """A collator that brings these columns along, if the dataset has any."""
        if not set(self.columns()) & set(next(iter(dataset), {})) or isinstance(collator, TeacherColumnsCollator):
            return collator
        return TeacherColumnsCollator(collator, len(self.by_name))

    def prepared(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Tokenised rows with these columns: the teacher of each row, its own prompt, its own tokens."""
        refuse_row_columns(dataset, name, self.args)  # an evaluation may bring its own
        columns = set(next(iter(dataset)))
        if self._across and columns & {"teacher_prompt", "teacher_input_ids"}:
            raise ValueError(
                f"the {name} dataset has a text of the teacher's own, but {next(iter(self._across))} has another "
                "tokenizer, and reads the student's text: remove 'teacher_prompt' and 'teacher_input_ids'"
            )
        if self.args.teacher_combination == "route" and "teacher" in columns:
            function = partial(_with_teacher_index, names=list(self.by_name), dataset_name=name)
            dataset = self._with_columns(dataset, function, f"Naming teachers of {name} dataset")
        if "teacher_prompt" in columns:
            tokenizers = list(self._tokenizers.values())
            sides = [side for teacher, side in self.local().items() if teacher in self._tokenizers]
            positions = min((limit for side in sides if (limit := num_positions(side.model))), default=None)
            function = partial(with_teacher_prompt, tokenizers=tokenizers, positions=positions, dataset_name=name)
            dataset = self._with_columns(dataset, function, f"Tokenizing teacher prompts of {name} dataset")
        for teacher, tokenizer in self._across.items():
            side = self.by_name[teacher]
            function = partial(
                with_own_tokens, index=side.index, tokenizer=tokenizer, student_tokenizer=self.student_tokenizer,
                pieces=side.pieces, positions=num_positions(side.model), dataset_name=name,
            )  # fmt: skip
            dataset = self._with_columns(dataset, function, f"Aligning {name} dataset with {teacher}")
            _tell_alignment(dataset, side, tokenizer, name)
        return dataset

    def _with_columns(self, dataset: AnyDataset, function: Callable[..., dict], what: str) -> AnyDataset:
        if not isinstance(dataset, Dataset):
            return dataset.map(function)
        with self.args.main_process_first(desc=what):
            return dataset.map(function, num_proc=self.args.dataset_num_proc, desc=what)


def _with_teacher_index(row: dict[str, Any], names: list[str], dataset_name: str) -> dict[str, int]:
    if row["teacher"] not in names:
        raise ValueError(
            f"a row of the {dataset_name} dataset has the teacher {row['teacher']!r}; there are {', '.join(names)}"
        )
    return {"teacher_index": names.index(row["teacher"])}


def _tell_alignment(dataset: AnyDataset, teacher: AcrossTeacher, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Says once per data set how two tokenizers are brought together and how well that goes."""
    exact, compared, total = 0, 0, 0
    for row in islice(iter(dataset), PEEKED_ROWS):
        exact += row[f"teacher_{teacher.index}_exact"]
        compared += sum(group >= 0 for group in row[f"teacher_{teacher.index}_student_groups"])
        total += sum(label != -100 for label in row["labels"][1:])
    shares = [100 * count / max(total, 1) for count in (exact, compared)]
    logger.warning(
        "%s has another tokenizer: %s; compared by %s. In the %s dataset %.0f%% of the label-bearing tokens face "
        "exactly one of its tokens, %.0f%% are compared at all",
        teacher.name, teacher.reason, teacher.method, name, *shares,
    )  # fmt: skip
    if lost := {role for row in islice(iter(dataset), PEEKED_TEMPLATES) for role in lost_messages(row, tokenizer)}:
        logger.warning(
            "the chat template of %s leaves out or changes messages of %s in the %s dataset: it does not read what the "
            "student reads", teacher.name, ", ".join(sorted(lost)), name,
        )  # fmt: skip
    if shares[1] < 50:
        logger.warning(
            "more than half of the %s dataset says nothing about %s: look whether its chat template keeps what is "
            "said, and whether its tokenizer keeps the text", name, teacher.name,
        )  # fmt: skip
