"""A teacher with another tokenizer: it reads the same text in tokens of its own.

Shapes: B batch, T and Tt tokens of student and teacher, N and M label-bearing positions of student and teacher.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.collators import Row
from hf_distill.losses.cross_tokenizer import AlignedSignal, Spans
from hf_distill.modeling import label_positions
from hf_distill.teachers.columns import (
    PREFIX,
    AnyDataset,
    collate_own_tokens,
    lost_messages,
    map_rows,
    with_own_tokens,
)
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.stored import StoredHiddenTeacher
from hf_distill.token_alignment import SharedTokens, shared_tokens, vocabulary_pieces
from hf_distill.token_rows import PEEKED_ROWS, Room, without_long_rows

logger = logging.getLogger(__name__)

# With fewer names in common than this share of the smaller vocabulary, probabilities are compared by rank alone.
ENOUGH_SHARED = 0.1
PEEKED_TEMPLATES = 20  # rows whose conversations are looked for in the teacher's text


class AcrossTeacher:
    """A teacher for a student with another vocabulary.

    Args:
        teacher ([`LocalTeacher`] or [`StoredHiddenTeacher`]): with its tokenizer, a fast one.
        student_tokenizer (`PreTrainedTokenizerBase`): a fast one.
        index (`int`): its place among the teachers, part of the names of its columns.
        method (`str`): "aligned" or "uld" (`losses/cross_tokenizer.py`), or "auto": aligned, if enough is shared.
        student_rows (`int`): token ids that the student's head has.

    Raises:
        `ValueError`: a tokenizer that does not tell how its tokens become text.
    """

    def __init__(
        self,
        teacher: LocalTeacher | StoredHiddenTeacher,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        index: int,
        method: str,
        student_rows: int,
    ) -> None:
        assert teacher.tokenizer is not None
        self.teacher, self.name = teacher, teacher.name
        self.tokenizer, self.student_tokenizer = teacher.tokenizer, student_tokenizer
        self.prefix = f"teacher_{index}_"
        self.columns = f"{self.prefix}input_ids", f"{self.prefix}labels"
        if isinstance(teacher, StoredHiddenTeacher):
            teacher.columns = self.columns
        self.pieces = (
            vocabulary_pieces(student_tokenizer)[:student_rows],
            vocabulary_pieces(self.tokenizer)[: len(teacher.head.weight)],
        )
        self.shared = shared_tokens(*self.pieces)
        sizes = [sum(piece is not None for piece in side) for side in self.pieces]
        num_shared = len(self.shared.student_ids)
        self.method = method
        if method == "auto":
            self.method = "aligned" if num_shared >= ENOUGH_SHARED * min(sizes) else "uld"
        self.reason = (
            f"{num_shared:,} tokens mean the same to the student ({sizes[0]:,}) and to {self.name} ({sizes[1]:,})"
        )

    @property
    def layout(self) -> str:
        """As in [`LocalTeacher`]."""
        return self.teacher.layout

    def bind(self, student: PreTrainedModel, accelerator: Accelerator, *, sharded: bool) -> None:
        """As in [`LocalTeacher`]."""
        self.shared = SharedTokens(*(each.to(accelerator.device) for each in self.shared))
        self.teacher.bind(student, accelerator, sharded=sharded)

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows with their text in the teacher's tokens ([`~hf_distill.teachers.columns.with_own_tokens`]).

        Raises:
            `ValueError`: rows have a text of the teacher's own, which could not be aligned.
        """
        if set(next(iter(dataset))) & {"teacher_prompt", "teacher_input_ids"}:
            raise ValueError(
                f"the {name} dataset has a text of the teacher's own, but {self.name} has another tokenizer, and reads "
                "the student's text: remove 'teacher_prompt' and 'teacher_input_ids'"
            )
        function = partial(
            with_own_tokens, prefix=self.prefix, tokenizer=self.tokenizer, student_tokenizer=self.student_tokenizer,
            pieces=self.pieces, positions=None if self.teacher.drop_long_rows else self.teacher.num_positions,
            dataset_name=name,
        )  # fmt: skip
        dataset = map_rows(dataset, function, f"Aligning {name} dataset with {self.name}", self.teacher.num_proc)
        if self.teacher.drop_long_rows:
            room = Room(f"the teacher ({self.name})", self.teacher.num_positions, f"{self.prefix}input_ids")
            dataset = without_long_rows(dataset, name, [room], self.teacher.num_proc)
        self._tell_alignment(dataset, name)
        return self.teacher.prepare(dataset, name)

    @property
    def collate(self) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        """The teacher's own tokens, and what it has to say of rows before they are asked for."""
        return partial(_collate, prefix=self.prefix, collate=self.teacher.collate)

    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> AlignedSignal:
        """The signal for flat `positions` (N,) of the student's batch (B * T), at M positions of the teacher's own."""
        own = {name.removeprefix(self.prefix): value for name, value in inputs.items() if name.startswith(self.prefix)}
        teacher_positions, tokens = label_positions(own["labels"])  # (M,)
        read = {name: value for name, value in inputs.items() if name.startswith(PREFIX)}
        read |= {name: own[name] for name in ("input_ids", "attention_mask")}
        signal = self.teacher(read, teacher_positions)
        # The student's side may be padded further, to a multiple of something.
        missing = inputs["input_ids"].shape[1] - own["student_groups"].shape[1]
        student_groups = nn.functional.pad(own["student_groups"], (0, missing), value=-1)  # (B, T)
        spans = Spans(
            inputs["input_ids"].flatten()[positions + 1],  # (N,)
            student_groups.flatten()[positions + 1],
            tokens,
            own["groups"].flatten()[teacher_positions + 1],
        )
        return AlignedSignal(signal.hidden, signal.head, spans, self.shared, self.method, own["exact"].sum())

    def _tell_alignment(self, dataset: AnyDataset, name: str) -> None:
        """Says once per data set how two tokenizers are brought together and how well that goes."""
        exact, compared, total = 0, 0, 0
        for row in islice(iter(dataset), PEEKED_ROWS):
            exact += row[f"{self.prefix}exact"]
            compared += sum(group >= 0 for group in row[f"{self.prefix}student_groups"])
            total += sum(label != -100 for label in row["labels"][1:])
        shares = [100 * count / max(total, 1) for count in (exact, compared)]
        logger.warning(
            "%s has another tokenizer: %s; compared by %s. In the %s dataset %.0f%% of the label-bearing tokens face "
            "exactly one of its tokens, %.0f%% are compared at all",
            self.name, self.reason, self.method, name, *shares,
        )  # fmt: skip
        peeked = islice(iter(dataset), PEEKED_TEMPLATES)
        if lost := {role for row in peeked for role in lost_messages(row, self.tokenizer)}:
            logger.warning(
                "the chat template of %s leaves out or changes messages of %s in the %s dataset: it does not read what "
                "the student reads", self.name, ", ".join(sorted(lost)), name,
            )  # fmt: skip
        if shares[1] < 50:
            logger.warning(
                "more than half of the %s dataset says nothing about %s: look whether its chat template keeps what is "
                "said, and whether its tokenizer keeps the text", name, self.name,
            )  # fmt: skip


def _collate(
    rows: Sequence[Row], prefix: str, collate: Callable[[Sequence[Row]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    return {**collate_own_tokens(rows, prefix=prefix), **collate(rows)}
