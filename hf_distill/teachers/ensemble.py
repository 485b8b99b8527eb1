"""Several teachers at once.

Shapes: B batch, T tokens, N label-bearing positions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_distill.collators import Row
from hf_distill.losses.fused_linear import MixtureSignal, TeacherSignal
from hf_distill.losses.groups import places_of
from hf_distill.losses.sum import SumSignal
from hf_distill.teachers import Signal, Teacher
from hf_distill.teachers.columns import AnyDataset, called, map_rows

# "mixture" and "sum" weigh all teachers everywhere; with "route" a column of the dataset names the teacher of a row.
COMBINATIONS = ("mixture", "sum", "route")


class EnsembleTeacher:
    """Teachers that all read every row, with their weights, or each its own rows.

    Args:
        teachers (mapping of `str` to `Teacher`): by name; of any width, head, dtype and device.
        weights (`Sequence[float]`, *optional*): equal ones by default; they are made to sum to 1.
        combination (`str`):
            "mixture": one divergence, to the mixture of their distributions. "sum": the weighted sum of the divergences
            to each of them. "route": `inputs["teacher_index"]` (B,) says which teacher each row has. Of a mixture and
            with routes, all are models with the student's tokenizer.
        num_proc (`int`, *optional*): processes that prepare rows.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        weights: Sequence[float] | None = None,
        *,
        combination: str = "mixture",
        num_proc: int | None = None,
    ) -> None:
        self.teachers = dict(teachers)
        weights = [1.0] * len(teachers) if weights is None else weights
        self.weights = [weight / sum(weights) for weight in weights]
        self.combination, self.num_proc = combination, num_proc
        routed = combination == "route"
        self.name = " + ".join(
            name if routed else f"{weight:.3g} {name}" for name, weight in zip(teachers, self.weights, strict=True)
        )

    @property
    def collate(self) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """The tensors of all teachers, and the index of each row's teacher."""
        return partial(_collate, collates=[teacher.collate for teacher in self.teachers.values()])

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows with the columns of all teachers, and the index of the teacher that they name.

        Raises:
            `ValueError`: a row names a teacher that is not there, or what one of them refuses.
        """
        if self.combination == "route" and "teacher" in next(iter(dataset)):
            function = partial(_with_index, names=list(self.teachers), dataset_name=name)
            dataset = map_rows(dataset, function, f"Naming teachers of {name} dataset", self.num_proc)
        if isinstance(dataset, Dataset) and "teacher_index" in dataset.column_names:
            _check_index(set(dataset["teacher_index"]), len(self.teachers))
        for teacher in self.teachers.values():
            dataset = teacher.prepare(dataset, name)
        return dataset

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> Signal:
        """One signal, of all of them."""
        if self.combination == "route":
            return MixtureSignal(self._ask_by_row(dict(inputs), positions))
        # A teacher without weight is not asked: its forward would be for nothing.
        signals: list[tuple[float, Any]] = [
            (weight, teacher(inputs, positions))
            for teacher, weight in zip(self.teachers.values(), self.weights, strict=True)
            if weight
        ]
        return combined(signals, self.combination)

    def _ask_by_row(self, inputs: dict[str, Any], positions: Tensor) -> list[TeacherSignal]:
        index = inputs.pop("teacher_index")  # (B,)
        num_tokens = inputs["input_ids"].shape[1]
        row_of = torch.div(positions, num_tokens, rounding_mode="floor")  # (N,)
        asked = index[row_of]  # (N,)
        indices = torch.arange(len(self.teachers), device=index.device).unsqueeze(1)
        counts = torch.stack([(side == indices).sum(1) for side in (index, asked)], 1)
        signals = []
        # The host waits for the device once, for the numbers of rows and positions of all teachers.
        for i, (teacher, (num_rows, number)) in enumerate(zip(self.teachers.values(), counts.tolist(), strict=True)):
            if num_rows == 0:
                continue
            rows, mine = places_of(index == i, num_rows), places_of(asked == i, number)
            place = torch.searchsorted(rows, row_of[mine])  # of the row among those of this teacher
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            signal: Any = teacher(part, place * num_tokens + positions[mine] % num_tokens)
            hidden = signal.hidden.new_zeros(len(positions), signal.hidden.shape[1])
            hidden.index_copy_(0, mine.to(hidden.device), signal.hidden)
            signals.append(signal._replace(hidden=hidden, weight=(asked == i).to(torch.float32)))
        return signals


def combined(signals: Sequence[tuple[float, Any]], combination: str) -> Signal:
    """One signal of several with their weights: of their mixture, or their sum."""
    if combination == "sum" or not all(isinstance(signal, TeacherSignal) for _, signal in signals):
        # Forward KL to a mixture has the gradient of the weighted sum of the KLs. A sample has no logits to mix.
        return SumSignal(signals)
    return MixtureSignal([signal._replace(weight=weight) for weight, signal in signals])


def _collate(rows: Sequence[Row], collates: Sequence[Callable[..., Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for collate in collates:
        batch.update(collate(rows))
    if "teacher_index" in rows[0]:
        index = [row["teacher_index"] for row in rows]
        _check_index(index, len(collates))
        batch["teacher_index"] = torch.tensor(index)
    return batch


def _check_index(index: Iterable[int], number: int) -> None:
    if strange := [int(i) for i in index if not 0 <= i < number]:
        raise ValueError(f"a row has teacher_index {strange[0]}; there are {number} teachers")


def _with_index(row: dict[str, Any], index: int, names: list[str], dataset_name: str) -> dict[str, int]:
    if row["teacher"] not in names:
        raise ValueError(
            f"{called(index, dataset_name)} has the teacher {row['teacher']!r}; there are {', '.join(names)}"
        )
    return {"teacher_index": names.index(row["teacher"])}
