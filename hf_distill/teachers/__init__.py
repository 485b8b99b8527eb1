"""Where the teacher's signal comes from."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hf_distill.losses.cross_tokenizer import AlignedSignal
from hf_distill.losses.fused_linear import TeacherSignal

__all__ = ["Signal", "Teacher"]

Signal = TeacherSignal | AlignedSignal


class Teacher(Protocol):
    """Anything that can be asked for the next-token distributions of a batch."""

    name: str  # for model cards and logs

    def __call__(self, inputs: dict[str, Tensor], positions: Tensor) -> Sequence[Signal]:
        """The signals at flat `positions` (N,) of a batch's (B * T); `inputs` are what the forward takes.

        One signal per model; where there are several, they carry their weights.
        """
        ...
