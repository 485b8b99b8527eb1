"""The sources of the teacher's signal.

A teacher is anything that can say something about a row: [`Teacher`]. A teacher that is a model in this process is a
[`ModelTeacher`], which inner layers, and keys and values, need. Rollouts need a [`WritingTeacher`].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.losses.fused_linear import Head, TeacherSignal
from hf_distill.losses.objective import Signal
from hf_distill.servers import TeacherAway
from hf_distill.verifying import Evidence, RolloutConfig, Verifier

__all__ = [
    "Counting",
    "DenseTeacher",
    "Introduced",
    "ModelTeacher",
    "Signal",
    "Teacher",
    "TeacherAway",
    "WritingTeacher",
    "model_teachers",
    "require_model",
    "require_writer",
]


@runtime_checkable
class Teacher(Protocol):
    """Anything that can say something about a row.

    Columns of the data set and tensors of the batch whose names begin with `teacher_` are the teacher's: they are kept
    for it, and taken out before the student reads the batch. A row whose labels are all -100 fills up a batch, and the
    teacher has nothing to say about it.
    """

    name: str
    """For model cards and logs."""

    def prepare(self, dataset: Any, name: str) -> Any:
        """Called for each data set (`Dataset` or `IterableDataset`) when its rows have `input_ids` and `labels`.

        Rows may be packed: they have `seq_lengths` then. Rows that have been prepared may come again, from an
        evaluation. Returns the rows, with the columns that the teacher needs added. Raises `ValueError` for rows that
        it cannot teach; `name` is what messages call the data set.
        """
        ...

    @property
    def collate(self) -> Callable[[Sequence[dict[str, Any]]], Mapping[str, Tensor]]:
        """Called with the rows of a batch, in the workers of the data loader; returns tensors to add to the batch.

        A method, or a function that can be pickled without the teacher. It raises [`TeacherAway`] if what it asks does
        not answer: the run then writes a checkpoint of its last finished update and stops, in all processes.
        """
        ...

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> Signal:
        """The signal at flat `positions` (N,) of a batch (B * T), whose next token has a label.

        Called outside of the student's forward, without labels: `inputs` are the batch on the student's device. The
        signal's loss is called inside the student's forward.
        """
        ...


@runtime_checkable
class Introduced(Protocol):
    """A teacher that wants to know its student. The method is not a part of [`Teacher`]: most do not need it."""

    def introduce(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Called once, before rows are prepared, with the student's tokenizer and the true vocabulary of the run.

        Raises `ValueError` if the teacher does not fit them.
        """
        ...


@runtime_checkable
class Counting(Protocol):
    """A teacher that counts what it costs. The method is not a part of [`Teacher`]: most do not need it."""

    def take_counts(self) -> dict[str, float]:
        """Sums by name since the last call, which are logged as `teacher/name`, summed over processes."""
        ...


@runtime_checkable
class DenseTeacher(Teacher, Protocol):
    """A teacher that has hidden states and a head to say: its signals can be mixed."""

    head: Head
    """On the device of the losses."""

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> TeacherSignal: ...


@runtime_checkable
class ModelTeacher(DenseTeacher, Protocol):
    """A teacher that is a causal language model in this process."""

    model: PreTrainedModel
    layers: tuple[int, ...]
    """Inner layers whose output at the positions is asked for, as `TeacherSignal.layers`."""

    def view(self, inputs: Mapping[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The inputs that the model reads of a batch, and the positions (N,) in them."""
        ...


@runtime_checkable
class WritingTeacher(Teacher, Protocol):
    """A teacher that takes part in rollouts: it checks what a student drafts, and generates text."""

    num_positions: int | None
    """The tokens of prompt and completion that it can read; None where that is not known."""
    remembers: bool
    """True if it keeps what it has read, so that short drafts and a second reading cost little."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens with which its own text ends, as far as they are known."""
        ...

    def verifier(self, prompt_ids: Tensor, prompt_mask: Tensor, config: RolloutConfig, vocab_size: int) -> Verifier:
        """A checker of the drafts that follow left-padded prompts (B, P). Raises `ValueError` for a rule it lacks."""
        ...

    def signal(self, evidence: Evidence) -> Signal:
        """The signal at N positions from a verifier's evidence, (N, ...); it is empty where there is no position."""
        ...

    def divergence(self, evidence: Evidence, other: Evidence, vocab_size: int) -> Tensor:
        """The sum over N positions of KL(evidence || other), in nats: the teacher's answer after two prompts."""
        ...


def model_teachers(teachers: Mapping[str, Teacher]) -> dict[str, ModelTeacher]:
    """Those that are a model in this process, and read the student's tokens."""
    return {name: teacher for name, teacher in teachers.items() if isinstance(teacher, ModelTeacher)}


def require_writer(teacher: Teacher, what_for: str) -> WritingTeacher:
    """The same teacher; `ValueError` if it can check no drafts, which `what_for` needs."""
    if not isinstance(teacher, WritingTeacher):
        raise ValueError(
            f"{what_for} needs one teacher that can check drafts: a model in this process, or one at an address; "
            f"{teacher.name} ({type(teacher).__name__}) is none"
        )
    return teacher


def require_model(teacher: Teacher, what_for: str) -> ModelTeacher:
    """The same teacher; `ValueError` if it is no model in this process, which `what_for` needs."""
    if not isinstance(teacher, ModelTeacher):
        raise ValueError(
            f"{what_for} needs one teacher that is a model in this process and has the student's tokenizer; "
            f"{teacher.name} ({type(teacher).__name__}) is none"
        )
    return teacher
