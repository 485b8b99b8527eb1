"""Where the teacher's signal comes from."""

from typing import NamedTuple, Protocol

from torch import Tensor

from hf_distill.losses.fused_linear import Head


class TeacherSignal(NamedTuple):
    """What a teacher says at the label-bearing positions of a batch, on the device that asked for it."""

    hidden: Tensor  # (N, Dt), last hidden states, without gradient
    head: Head  # turns them into logits


class Teacher(Protocol):
    """Anything that can be asked for the next-token distributions of a batch."""

    name: str  # for model cards and logs

    def __call__(self, inputs: dict[str, Tensor], positions: Tensor) -> TeacherSignal:
        """The signal at flat `positions` (N,) of a batch's (B * T); `inputs` are what the forward takes."""
        ...
