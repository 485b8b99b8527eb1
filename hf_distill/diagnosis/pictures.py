"""Rows with pictures: what the trainer's own collator makes of each, and what tells one picture from another."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_distill.picture_batches import PictureCollator, as_trl_reads
from hf_distill.picture_rows import as_entry
from hf_distill.rows import PICTURE, PICTURES
from hf_distill.teachers.kinds import own_views
from hf_distill.token_rows import has_label

TAKEN, TAKEN_BY_TEACHERS = "pictures", "teacher_pictures"  # numbers of tokens that stand for a row's pictures


def uncut_rows(trainer: Any) -> Dataset:
    """Token ids and labels of the training rows that have a label, uncut, and the tokens that their pictures take.

    Teachers with processors of their own may need other numbers of them than the student; the highest counts.
    """
    collator = copy.copy(trainer.data_collator)
    if isinstance(collator, PictureCollator):
        collator.max_length = None
    collate, views = trainer.teacher_rows.collator(collator), own_views(trainer.teacher_rows.teachers)
    found = []
    for row in trainer.first_rows(trainer.train_dataset, len(trainer.train_dataset)):
        batch = collate([row])
        number = int(collator.pictures(batch).sum())
        theirs = [int(view.spans(batch[f"{view.prefix}input_ids"]).sum()) for view in views]
        texts = {name: batch[name][0].tolist() for name in ("input_ids", "labels")}
        found.append({**texts, TAKEN: number, TAKEN_BY_TEACHERS: max(theirs, default=number)})
    return Dataset.from_list([row for row in found if has_label(row)])


def in_parts(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row without its pictures, whose messages have content in parts, as templates of processors take it."""
    found = as_trl_reads({column: cell for column, cell in row.items() if column not in (PICTURES, PICTURE)})
    for column in ("messages", "prompt", "completion"):
        if isinstance(found.get(column), list):
            found[column] = [{**message, "content": _parts(message.get("content"))} for message in found[column]]
    return found


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def picture_bytes(picture: Any) -> bytes:
    """The bytes of a picture's file, wherever they are, or its pixels where it has none."""
    if isinstance(picture, str | bytes):
        picture = as_entry(picture)
    if not isinstance(picture, Mapping):
        return picture.tobytes()
    data = picture.get("bytes")
    return Path(picture["path"]).read_bytes() if data is None else data
