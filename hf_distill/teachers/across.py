"""A teacher with another tokenizer: it reads the same text in tokens of its own.

Shapes: B batch, T and Tt tokens of student and teacher, N and M label-bearing positions of student and teacher.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_distill.losses.cross_tokenizer import AlignedSignal, Spans
from hf_distill.modeling import label_positions
from hf_distill.teachers.local import LocalTeacher
from hf_distill.token_alignment import shared_tokens, vocabulary_pieces

# With fewer names in common than this share of the smaller vocabulary, probabilities are compared by rank alone.
ENOUGH_SHARED = 0.1


class AcrossTeacher:
    """A [`LocalTeacher`] for a student with another vocabulary.

    It finds its view of a batch ([`~hf_distill.collators.with_own_tokens`]) under names that begin with
    `teacher_<index>_`.

    Args:
        teacher ([`LocalTeacher`]): the model.
        tokenizer, student_tokenizer (`PreTrainedTokenizerBase`): fast ones.
        index (`int`): its place among the teachers.
        method (`str`): "aligned" or "uld" (`losses/cross_tokenizer.py`), or "auto": aligned, if enough is shared.
        student_rows (`int`): token ids that the student's head has.

    Raises:
        `ValueError`: a tokenizer that does not tell how its tokens become text.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        index: int,
        method: str,
        student_rows: int,
    ) -> None:
        self.teacher = teacher
        self.model, self.name = teacher.model, teacher.name
        self.index = index
        self.pieces = (
            vocabulary_pieces(student_tokenizer)[:student_rows],
            vocabulary_pieces(tokenizer)[: len(teacher.head.weight)],
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

    def __call__(self, inputs: dict[str, Any], positions: Tensor) -> list[AlignedSignal]:
        """The signal for flat `positions` (N,) of the student's batch (B * T), at M positions of the teacher's own."""
        prefix = f"teacher_{self.index}_"
        own = {name.removeprefix(prefix): value for name, value in inputs.items() if name.startswith(prefix)}
        teacher_positions, tokens = label_positions(own["labels"])  # (M,)
        (signal,) = self.teacher({name: own[name] for name in ("input_ids", "attention_mask")}, teacher_positions)
        # The student's side may be padded further, to a multiple of something.
        missing = inputs["input_ids"].shape[1] - own["student_groups"].shape[1]
        student_groups = nn.functional.pad(own["student_groups"], (0, missing), value=-1)  # (B, T)
        spans = Spans(
            inputs["input_ids"].flatten()[positions + 1],  # (N,)
            student_groups.flatten()[positions + 1],
            tokens,
            own["groups"].flatten()[teacher_positions + 1],
        )
        return [AlignedSignal(signal.hidden, signal.head, spans, self.shared, self.method, own["exact"].sum())]
