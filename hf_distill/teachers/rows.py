"""The rows of a run as its models read them: what teachers need of a row, and of a batch.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.modeling import causal_lm, num_positions, num_token_ids, trying
from hf_distill.teachers import ModelTeacher, Teacher, model_teachers
from hf_distill.teachers.brought import BroughtTeacher
from hf_distill.teachers.columns import PREFIX, AnyDataset, TeacherColumnsCollator
from hf_distill.teachers.kinds import may_be_away, own_models, own_views
from hf_distill.teachers.local import BaseTeacher
from hf_distill.token_rows import Room


class Reader(NamedTuple):
    """A model that reads the student's rows, or its own view of them."""

    name: str
    model: PreTrainedModel
    read: Callable[[dict[str, Any]], Tensor]  # hidden states (n, D) of the n tokens of a batch
    prefix: str = ""  # of the names of its own tensors, if it has a view of its own


class TeacherRows:
    """The needs of a run's teachers: columns of the rows, tensors of the batches, and rows that they can read.

    A run without teachers needs nothing.

    Args:
        teachers (mapping of `str` to [`Teacher`], *optional*): by name.
        teacher ([`Teacher`], *optional*): all of them as one.
        are_asked (`bool`): whether the loss needs them at some time of the training.

    Attributes:
        columns (`set` of `str`): the teachers' columns that have been seen in prepared rows; batches are made of them.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher] | None = None, teacher: Teacher | None = None, *, are_asked: bool = True
    ) -> None:
        self.teachers, self.teacher, self.are_asked = {} if teachers is None else teachers, teacher, are_asked
        self.columns: set[str] = set()

    # --------------------------------------------------------------------------------------------------------- rows

    def prepare(self, dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
        """Rows with the teachers' columns; `ValueError` for rows that one of them cannot teach."""
        if self.teacher is None:
            return dataset
        columns = set(next(iter(dataset), {}))
        if "teacher_prompt" in columns and (made := columns & {"teacher_input_ids", "teacher_labels"}):
            dataset = dataset.remove_columns(sorted(made))  # by an earlier preparation
        with args.main_process_first(desc=f"preparing the {name} dataset for the teachers"):
            return self.teacher.prepare(dataset, name)

    def keep_columns(self, dataset: AnyDataset) -> None:
        """Lets the teachers' columns of prepared rows come through to their `collate`."""
        if self.teacher is not None:
            columns = next(iter(dataset), {})
            self.columns |= {name for name in columns if name.startswith(PREFIX) and name != "teacher_prompt"}

    def readable_ids(self, default: int) -> int:
        """The number of token ids that all teachers can read, each in its own text."""
        models = [causal_lm(teacher.model) for teacher in own_models(self.teachers).values()]
        return min((num_token_ids(model) for model in models), default=default)

    def rooms(self, columns: set[str]) -> list[Room]:
        """The tokens that teachers can read which read the student's own rows; `columns` are those of the rows."""
        if columns & {"teacher_prompt", "teacher_input_ids"}:
            return []
        return [
            Room(
                f"the {self._called(name)}",
                num_positions(teacher.model) if isinstance(teacher, ModelTeacher) else teacher.num_positions,
            )
            for name, teacher in self.teachers.items()
            # The base is the student.
            if isinstance(teacher, ModelTeacher | BroughtTeacher) and not isinstance(teacher, BaseTeacher)
        ]

    # ------------------------------------------------------------------------------------------------------ batches

    def collator(self, student_collator: Any) -> Any:
        """The collator of whole batches, around the one that makes the student's side of them."""
        if self.teacher is None:
            return student_collator
        return TeacherColumnsCollator(student_collator, self.teacher.collate)

    @property
    def may_be_away(self) -> bool:
        """True if batches may come without what a teacher says about them."""
        return may_be_away(self.teachers)

    # ------------------------------------------------------------------------------------------------- tried readings

    def readers(self, device: torch.device) -> list[Reader]:
        """The teachers that are models and read the student's rows, on the device of the batches."""
        return [
            Reader(self._called(name), teacher.model, _reading(teacher, device), getattr(teacher, "prefix", ""))
            for name, teacher in model_teachers(self.teachers).items()
        ]

    def try_views(self, inputs: dict[str, Any], positions: Tensor) -> None:
        """Raises `ValueError` for a batch that a teacher would read otherwise than the student."""
        for own in own_views(self.teachers):
            own.view(inputs, positions)

    def try_reading(self, inputs: dict[str, Any], positions: Tensor) -> None:
        """Raises `ValueError` for a batch with pictures that a teacher cannot read."""
        for name, teacher in self.teachers.items():
            with trying(f"the teacher {name} cannot read the batches of its processor: do they belong together?"):
                teacher(inputs, positions)

    def _called(self, name: str) -> str:
        return "teacher" if len(self.teachers) == 1 else f"teacher {name}"


def _reading(teacher: ModelTeacher, device: torch.device) -> Callable[[dict[str, Any]], Tensor]:
    def read(batch: dict[str, Any]) -> Tensor:
        positions = torch.arange(batch["input_ids"].numel(), device=device)
        return teacher(batch, positions).hidden

    return read
