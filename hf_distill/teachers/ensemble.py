"""Several teachers at once.

Shapes: B batch, T tokens, N label-bearing positions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_distill.losses.fused_linear import COMBINATIONS as LOSS_COMBINATIONS
from hf_distill.teachers import Signal, Teacher

# "mixture" and "sum" weigh all teachers everywhere; with "route" a column of the dataset names the teacher of a row.
COMBINATIONS = (*LOSS_COMBINATIONS, "route")


class EnsembleTeacher:
    """Teachers that all read every row, with their weights, or each its own rows.

    Args:
        teachers (mapping of `str` to `Teacher`): by name; of any width, head, dtype and device.
        weights (`Sequence[float]`, *optional*): equal ones by default; they are made to sum to 1.
        routed (`bool`): whether `inputs["teacher_index"]` (B,) says which teacher each row has.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], weights: Sequence[float] | None = None, *, routed: bool = False
    ) -> None:
        self.teachers = dict(teachers)
        weights = [1.0] * len(teachers) if weights is None else weights
        self.weights = [weight / sum(weights) for weight in weights]
        self.routed = routed
        self.name = " + ".join(
            name if routed else f"{weight:.3g} {name}" for name, weight in zip(teachers, self.weights, strict=True)
        )

    def __call__(self, inputs: dict[str, Tensor], positions: Tensor) -> list[Signal]:
        if self.routed:
            return self._ask_by_row(dict(inputs), positions)
        # A teacher without weight is not asked: its forward would be for nothing.
        return [
            signal._replace(weight=weight)
            for teacher, weight in zip(self.teachers.values(), self.weights, strict=True)
            if weight
            for signal in teacher(inputs, positions)
        ]

    def _ask_by_row(self, inputs: dict[str, Tensor], positions: Tensor) -> list[Signal]:
        index = inputs.pop("teacher_index")  # (B,)
        num_tokens = inputs["input_ids"].shape[1]
        row_of = torch.div(positions, num_tokens, rounding_mode="floor")  # (N,)
        signals = []
        for i, teacher in enumerate(self.teachers.values()):
            rows = (index == i).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            mine = index[row_of] == i  # (N,)
            place = torch.searchsorted(rows, row_of[mine])  # of the row among those of this teacher
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            for signal in teacher(part, place * num_tokens + positions[mine] % num_tokens):
                hidden = signal.hidden.new_zeros(len(positions), signal.hidden.shape[1])
                hidden[mine.to(hidden.device)] = signal.hidden
                signals.append(signal._replace(hidden=hidden, weight=mine.to(torch.float32)))
        return signals
