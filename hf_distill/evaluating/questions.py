"""Rows as questions: prompts of student and teacher, and the answers that are right."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

from datasets import Dataset

from hf_distill.collators import LUPICollator, PromptCollator
from hf_distill.picture_batches import as_trl_reads, asked, prompt_texts
from hf_distill.picture_rows import (
    check_picture_rows,
    columns_of,
    has_transform,
    pictures_of,
    unread,
    with_pictures,
)
from hf_distill.rows import PICTURES, is_chat, used_format, with_messages

Row = dict[str, Any]


class Questions(NamedTuple):
    """R questions."""

    prompts: list[list[int]]  # token ids that student and base read
    teacher_prompts: list[list[int]]  # those of the teacher, in its own tokens, with knowledge if there is some
    answers: list[list[str]]  # the right ones of each, at least one


class PictureQuestions(NamedTuple):
    """R questions about pictures. Tokens and pixels are made of them when an answer is generated."""

    rows: Dataset
    answers: list[list[str]]  # the right ones of each, at least one

    def prompts_as_texts(self, processor: Any) -> list[str]:
        """The prompts as a processor's chat template writes them, with one mark for each picture."""
        return [
            prompt_texts(processor, [{**asked({**row, PICTURES: []}, f"row {i}"), PICTURES: pictures_of(row)}])[0]
            for i, row in enumerate(_unopened(self.rows))
        ]


def picture_questions(rows: Dataset, processor: Any, *, answer_column: str | None = None) -> PictureQuestions:
    """Questions from rows with pictures: `prompt`, with a `completion` or without, or `messages`.

    Args:
        rows: as `evaluate_fidelity` takes them, or with prompts alone.
        processor: the student's, which is tried on the first row.
        answer_column (`str`, *optional*): as in [`questions_of`].

    Raises:
        `ValueError`: a row without a prompt or an answer, or whose pictures and words do not belong together.
    """
    rows = cast(Dataset, with_pictures(rows, "held-out"))
    columns = set(columns_of(rows))
    used = used_format(columns, "text") or tuple(columns & {"prompt"})
    check_picture_rows(rows, "held-out", used, "text")
    answers = []
    for number, row in enumerate(_unopened(rows)):
        text = as_trl_reads({**row, PICTURES: []})
        asked(text, f"row {number}")
        text |= {column: _in_words(cell) for column, cell in text.items() if is_chat(cell)}
        if used == ("prompt", "completion"):
            text.pop("messages", None)
        answers.append(right_answers(text, answer_column, f"row {number}"))
    if not answers:
        raise ValueError("there are no rows to generate answers to")
    found = PictureQuestions(rows, answers)
    found._replace(rows=rows.select([0])).prompts_as_texts(processor)
    return found


def _unopened(rows: Dataset) -> Iterable[Row]:
    """The rows, with pictures as bytes and paths."""
    return rows if has_transform(rows) else unread(rows)  # pyright: ignore[reportReturnType]


def _in_words(messages: Any) -> list[Row]:
    """Messages whose content is text, without the places of their pictures."""
    parts = [message["content"] if isinstance(message.get("content"), list) else None for message in messages]
    return [
        message if part is None else {**message, "content": "".join(each.get("text") or "" for each in part)}
        for message, part in zip(messages, parts, strict=True)
    ]


def questions_of(
    rows: Dataset | Iterable[Row],
    collator: PromptCollator | LUPICollator,
    teacher_collator: PromptCollator | LUPICollator | None = None,
    *,
    answer_column: str | None = None,
) -> Questions:
    """Questions from rows with prompts or, by a `LUPICollator`, from queries with knowledge.

    Args:
        rows: rows as the collators take them; prompts of messages go through the chat template.
        collator ([`~hf_distill.collators.PromptCollator`] or [`~hf_distill.collators.LUPICollator`]): the student's.
        teacher_collator (the same, *optional*): with the teacher's tokenizer; by default the student's collator.
        answer_column (`str`, *optional*):
            Column of the right answers: a text, a list of texts, or a dict that has them as `text`, as SQuAD's. By
            default `completion`, or the assistant's last message.

    Raises:
        `ValueError`: a row without a prompt or without an answer, by its number.
    """
    found = Questions([], [], [])
    row: Any  # a dict
    for number, row in enumerate(rows):
        name = f"row {number}"
        found.answers.append(right_answers(row, answer_column, name))
        encoded = collator.encode(row, name)
        other = teacher_collator.encode(row, name) if teacher_collator else encoded
        found.prompts.append(encoded["student_prompt_ids"])
        found.teacher_prompts.append(other["teacher_prompt_ids"])
    if not found.prompts:
        raise ValueError("there are no rows to generate answers to")
    return found


def right_answers(row: Mapping[str, Any], column: str | None, name: str) -> list[str]:
    """The right answers of a row, called `name` in errors."""
    if column is not None and column not in row:
        raise ValueError(f"{name} has no column {column!r} with its right answers; its columns are {', '.join(row)}")
    cell = row[column] if column is not None else _last_message(row, name)
    if isinstance(cell, Mapping):
        cell = cell.get("text")
    if isinstance(cell, list | tuple) and not cell:
        raise ValueError(
            f"{name} has an empty list of right answers, as questions without an answer have in SQuAD v2: drop such "
            "rows, or give the text that is right there"
        )
    cells = [cell] if isinstance(cell, str | int | float) else cell if isinstance(cell, list | tuple) else []
    answers = [str(each) for each in cells if isinstance(each, str | int | float)]
    if not answers or len(answers) < len(cells):
        where = f"in its column {column!r}" if column else "as its completion: name the column of the right answers"
        raise ValueError(f"{name} has no text {where}")
    return answers


def _last_message(row: Mapping[str, Any], name: str) -> Any:
    """What the assistant says last in the messages of a row, which collators prefer, or its completion."""
    whole = with_messages(dict(row), name)
    cell: Any = whole.get("messages")
    if not is_chat(cell) or (whole.get("completion") and cell[-1]["role"] != "assistant"):
        cell = whole.get("completion")
    if not is_chat(cell):
        return cell
    return cell[-1].get("content") if cell[-1]["role"] == "assistant" else None
