"""A teacher's own text of a row, where it differs from the student's: columns of the data set, tensors of the batch.

Shapes: B batch, T and Tt tokens of student and teacher.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.collators import PromptCollator, Row, template_arguments
from hf_distill.servers import TeacherAway
from hf_distill.token_alignment import Piece, align, group_numbers
from hf_distill.token_rows import pad

AnyDataset = Dataset | IterableDataset

# Columns and tensors with this beginning are the teachers'. The student's forward never sees them.
PREFIX = "teacher_"
# The columns of a teacher with another tokenizer, without their beginning `teacher_<index>_`. `input_ids` and `labels`
# are in the teacher's tokens. `groups` and `student_groups` have the number of each token's group, -1 for none. `exact`
# is the number of groups with one token on each side.
OWN_COLUMNS = ("input_ids", "labels", "groups", "student_groups", "exact")


# If a teacher does not answer, the batch has the reason under this name, as the bytes of a text, and no tensors of
# teachers. An exception in the worker of one process would leave the others waiting for it.
AWAY = f"{PREFIX}away"
REMEMBERED = 30.0  # seconds


class TeacherColumnsCollator:
    """Adds the teachers' tensors to the batches of the student's collator, or why a teacher is away.

    Args:
        collator: makes the student's batches; it is given rows without the teachers' columns.
        collate (`Callable`): makes the teachers' tensors of the same rows ([`~hf_distill.teachers.Teacher`]).
    """

    def __init__(self, collator: Any, collate: Callable[[Sequence[Row]], Mapping[str, Tensor]]) -> None:
        self.collator = collator
        self.collate = collate
        self._away: tuple[float, Tensor] | None = None  # since when, and why

    def __call__(self, rows: Sequence[Row]) -> Row:
        batch = self.collator([{k: v for k, v in row.items() if not k.startswith(PREFIX)} for row in rows])
        # One failure is enough to stop: the other batches of its update do not wait for the teacher once more.
        if self._away is None or time.monotonic() - self._away[0] > REMEMBERED:
            try:
                return {**batch, **self.collate(rows)}
            except TeacherAway as error:
                self._away = time.monotonic(), torch.tensor([*str(error).encode()], dtype=torch.uint8)
        return {**batch, AWAY: self._away[1]}


def no_columns(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tensors of teachers that are not asked."""
    return {}


def reason_away(batch: Mapping[str, Any]) -> str | None:
    """The reason of a teacher that is away from a batch; None if it is there."""
    return bytes(batch[AWAY].tolist()).decode() if AWAY in batch else None


def take_columns(inputs: dict[str, Any]) -> dict[str, Any]:
    """All of a batch, for the teachers; removes from `inputs` what only they read."""
    whole = dict(inputs)
    for name in whole:
        if name.startswith(PREFIX):
            del inputs[name]
    return whole


def map_rows(dataset: AnyDataset, function: Callable[..., dict], what: str, num_proc: int | None) -> AnyDataset:
    """`dataset.map` with the rows' numbers, and a progress bar called `what` where the rows are there already."""
    if isinstance(dataset, Dataset):
        return dataset.map(function, with_indices=True, num_proc=num_proc, desc=what)
    return dataset.map(function, with_indices=True)


def called(index: int, dataset_name: str) -> str:
    """The name of a prepared row in messages. Its number is the caller's unless rows were dropped or shuffled."""
    return f"row {index} of the prepared {dataset_name} dataset"


def own_columns(row: Row) -> tuple[str, str]:
    """The columns of tokens and labels that a teacher with the student's tokenizer reads of a prepared row."""
    prefix = PREFIX if f"{PREFIX}input_ids" in row else ""
    return f"{prefix}input_ids", f"{prefix}labels"


def has_label(row: Row) -> bool:
    """True if a tokenised row is trained on. A row without labels fills up a batch, and no teacher reads it."""
    return any(label != -100 for label in row.get("labels", row["input_ids"])[1:])


# ------------------------------------------------------------------------------- another prompt, same completion


def with_teacher_prompt(
    row: Row, index: int, tokenizer: PreTrainedTokenizerBase, positions: int | None, dataset_name: str
) -> dict[str, list[int]]:
    """The columns `teacher_input_ids` and `teacher_labels`: the row's `teacher_prompt` before the same completion.

    They are the student's tokens where the row has no `teacher_prompt`.

    Raises:
        `ValueError`: the row has no prompt to replace, another teacher's tokenizer has made other tokens of it, or the
            text is longer than the teacher's `positions`.
    """
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    if row.get("teacher_prompt"):
        name = called(index, dataset_name)
        start = next(i for i, label in enumerate(labels) if label != -100)
        if start == 0:
            raise ValueError(
                f"{name} has a 'teacher_prompt', but no prompt that it could stand for: it needs 'prompt' and "
                "'completion', and labels on the completion alone"
            )
        prompt = PromptCollator(tokenizer).teacher_prompt_ids(row, name)
        ids, labels = prompt + ids[start:], [-100] * len(prompt) + labels[start:]
        if list(map(int, row.get("teacher_input_ids", ids))) != ids:
            raise ValueError(
                f"the 'teacher_prompt' of {name} is for all teachers, but their chat templates or tokenizers make "
                "different tokens of it: give 'prompt' and 'teacher_prompt' as text, or take teachers that agree"
            )
        _refuse_length(ids, positions, "teacher_prompt and completion", name, "shorten them")
    return {"teacher_input_ids": ids, "teacher_labels": labels}


def collate_own_text(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The columns of [`with_teacher_prompt`] as tensors (B, Tt), padded on the right; nothing for rows without them.

    Raises:
        `ValueError`: a row has other label-bearing tokens for the teacher than for the student.
    """
    if "teacher_input_ids" not in rows[0]:
        return {}
    own_labels = []
    for row in rows:
        labels = row["teacher_labels"] if has_label(row) else [-100] * len(row["teacher_labels"])
        own_labels.append(labels)
        both = row.get("labels", row["input_ids"]), labels
        sides = [[int(i) for i in side[1:] if i != -100] for side in both]
        if sides[0] != sides[1]:
            raise ValueError(
                f"a row has {len(sides[0])} label-bearing tokens for the student and {len(sides[1])} for the teacher, "
                "or others: both have to end with the same completion"
            )
    ids, mask = pad([row["teacher_input_ids"] for row in rows], 0, "right")
    labels, _ = pad(own_labels, -100, "right")
    return {"teacher_input_ids": ids, "teacher_attention_mask": mask.long(), "teacher_labels": labels}


# -------------------------------------------------------------------------------------------- another tokenizer


def with_own_tokens(
    row: Row,
    index: int,
    *,
    prefix: str,
    tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    pieces: tuple[Sequence[Piece | None], Sequence[Piece | None]],
    positions: int | None,
    dataset_name: str,
) -> Row:
    """The text of a tokenised row in the teacher's tokens, and which of them cover which of the student's.

    The columns are `OWN_COLUMNS` after `prefix`. A group is compared if all of its tokens bear a label and are
    predicted by another token.

    Raises:
        `ValueError`: messages that are no text, or that the teacher's template refuses; more tokens than the teacher
            has `positions`, or one that it has no embedding for.
    """
    name = called(index, dataset_name)
    student_ids, labels = row["input_ids"], row["labels"]
    ids, contents = _own_ids(row, tokenizer, student_tokenizer, name)
    if max(ids, default=0) >= len(pieces[1]):
        raise ValueError(
            f"the teacher's tokenizer makes token {max(ids)} of {name}, but the teacher has only {len(pieces[1])}: "
            "they do not belong together"
        )
    _refuse_length(ids, positions, "the teacher's own tokens", name, "lower max_length")
    sides = [
        [piece if (piece := side[i]) is not None else "" for i in tokens]
        for side, tokens in zip(pieces, (student_ids, ids), strict=True)
    ]
    groups = align(sides[0], sides[1], contents)
    counts = [i > 0 and label != -100 for i, label in enumerate(labels)], [j > 0 for j in range(len(ids))]
    student_groups, teacher_groups = group_numbers(groups, *counts)
    kept = set(student_groups) - {-1}
    own = {
        "input_ids": ids,
        "labels": [-100 if group == -1 else token for token, group in zip(ids, teacher_groups, strict=True)],
        "groups": teacher_groups,
        "student_groups": student_groups,
        "exact": sum(len(groups[k].student) == len(groups[k].teacher) == 1 for k in kept),
    }
    return {prefix + column: value for column, value in own.items()}


def _own_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[int], list[str] | None]:
    """A row in the teacher's tokens, and the contents of its messages, between which nothing is compared.

    Conversations go through the teacher's own chat template. None stands for the contents of plain text.
    """
    student_ids, messages = row["input_ids"], _messages(row)
    text = student_tokenizer.decode(student_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ids: Any
    if messages is None:
        ids = tokenizer(text)["input_ids"]
        end = tokenizer.eos_token_id
        if student_ids[-1] == student_tokenizer.eos_token_id and end not in (None, *ids[-1:]):
            ids = [*ids, end]
        return ids, None
    try:
        whole: Any = tokenizer.apply_chat_template(messages, return_dict=True, **template_arguments(row))
        ids = whole["input_ids"]
    except TemplateError as error:
        raise ValueError(
            f"the chat template of the teacher's tokenizer refuses {name} ({error}): give it another, pass it as "
            "teacher_processing_class, or give the rows as text"
        ) from error
    contents = [message.get("content") or "" for message in messages]  # A tool call has none.
    if strange := [content for content in contents if not isinstance(content, str)]:
        raise ValueError(f"messages for a teacher with another tokenizer have to be text, got {strange[0]!r}")
    if not _has_in_order(text, contents):
        whole = student_tokenizer.apply_chat_template(messages, return_dict=True, **template_arguments(row))
        if len(whole["input_ids"]) > len(student_ids):
            return ids, None  # A row that has been cut is aligned by what is left of it.
    return ids, contents


def collate_own_tokens(rows: Sequence[Row], *, prefix: str) -> dict[str, Tensor]:
    """The columns of [`with_own_tokens`] as tensors (B, T) and (B, Tt), padded on the right; `exact` is (B,)."""
    columns = {name: [row[prefix + name] for row in rows] for name in OWN_COLUMNS}
    for i, row in enumerate(rows):
        if not has_label(row):
            columns["labels"][i], columns["exact"][i] = [-100] * len(columns["labels"][i]), 0
    padding = {"input_ids": 0, "labels": -100, "groups": -1, "student_groups": -1}
    batch = {name: pad(columns[name], value, "right")[0] for name, value in padding.items()}
    sides = ("groups", "student_groups")
    # No row has more groups than tokens of both sides.
    first = torch.arange(len(rows)).unsqueeze(1) * sum(batch[name].shape[1] for name in sides)  # (B, 1)
    batch |= {name: torch.where(batch[name] >= 0, batch[name] + first, -1) for name in sides}
    batch["attention_mask"] = pad(columns["input_ids"], 0, "right")[1].long()
    batch["exact"] = torch.tensor(columns["exact"])
    return {prefix + name: tensor for name, tensor in batch.items()}


def _has_in_order(text: Any, contents: Sequence[str]) -> bool:
    """True if a text has all contents, one after the other."""
    place = 0
    for content in map(str.strip, contents):
        place = text.find(content, place)
        if place == -1:
            return False
        place += len(content)
    return True


def lost_messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The roles whose messages are not in what the chat template makes of a row, as a whole."""
    messages = _messages(row) or []
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **template_arguments(row)) if messages else ""
    return [
        message["role"]
        for message in messages
        if any(said.strip() not in text for said in _said(message.get("content") or ""))
    ]


def _said(content: Any) -> list[str]:
    """The texts of a message, which beside pictures come in parts."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _refuse_length(ids: list[int], positions: int | None, what: str, name: str, remedy: str) -> None:
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"{what} of {name} take {len(ids)} tokens, the teacher has {positions} positions: {remedy}, or set "
            "drop_long_rows=True"
        )


def _messages(row: Row) -> list[dict[str, str]] | None:
    """The conversation that a row is, None for plain text."""
    if row.get("messages"):
        return row["messages"]
    parts = [part for part in (row.get("prompt"), row.get("completion")) if isinstance(part, list)]
    return [turn for part in parts for turn in part] if len(parts) == 2 else None
