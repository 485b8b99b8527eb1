"""Comparisons token by token as plain JSON, for a page: a table of texts, and numbers that point into it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_distill.token_texts import shown, texts_of_row

PICTURE = "[picture]"  # in the place of its tokens


def comparison_data(comparison: Any, *, marks: Mapping[int, str] | None = None) -> dict[str, Any]:
    """A [`~hf_distill.token_comparison.TokenComparison`] as JSON values.

    Args:
        comparison (`TokenComparison`): the numbers.
        marks: by a row's number, a letter for each of its label-bearing tokens: "d" for one that the student drafted
            and the teacher accepted, "c" for the teacher's correction, "s" and "t" for one of a completion that the
            student or the teacher wrote alone, "g" for one that was given.

    Returns:
        A dict with

            - `texts`: strings, the most frequent first;
            - `kl_is` and `notes`, as they are in the comparison;
            - `num_rows` of the data set, None if it is a stream;
            - `rows`: dicts with `number`, `length` (tokens of the whole row), `tokens` (indices into `texts`), `pieces`
              (by index of a token, the text that it adds, where that is not its own), `places` (indices of the n tokens
              that were predicted), `kl` (n nats to 4 digits; `surprise`, -log p of the token, where nothing has a KL),
              `student` and `teacher`: `ids` (5n indices into `texts`, -1 for none, the most likely first), `probs` (5n,
              in thousandths) and `own` (n, those of the token itself); `marks`, and `pictures` (addresses that hold the
              first ones) with `num_pictures`, if there are some.
              None stands for a number that is not known.
    """
    table = _Table(comparison)
    rows = []
    for row in comparison.rows:
        found = _row(row, table, comparison)
        if row.pictures:
            found |= {"pictures": list(row.pictures), "num_pictures": row.num_pictures}
        if marks is not None and row.number in marks:
            found["marks"] = marks[row.number][: len(row.places)]
        rows.append(found)
    return {
        "kl_is": comparison.kl_is,
        "notes": comparison.notes,
        "num_rows": comparison.num_rows,
        "texts": table.texts,
        "rows": rows,
    }


class _Table:
    """The texts of all tokens that are shown, and the place of each of them in it."""

    def __init__(self, comparison: Any) -> None:
        self.sides = {"student": comparison.student_texts, "teacher": comparison.teacher_texts}
        self.is_shared = comparison.teacher_texts is comparison.student_texts
        counts: Counter[Any] = Counter()
        for row in comparison.rows:
            counts.update(self._key("student", index) for index in row.input_ids)
            for side in self.sides:
                ids = getattr(row, side).ids.ravel().tolist()
                counts.update(self._key(side, index) for index in ids if index >= 0)
        keys = [key for key, _ in counts.most_common()]
        self.places = {key: place for place, key in enumerate(keys)}
        self.texts = [self._text("student", key) if isinstance(key, int) else key for key in keys]

    def place(self, side: str, index: int) -> int:
        """The index into `texts` of a token of one side; -1 for none."""
        return self.places[self._key(side, index)] if index >= 0 else -1

    def _key(self, side: str, index: int) -> int | str:
        # Two vocabularies have their texts in common, one vocabulary its ids.
        return index if self.is_shared else self._text(side, index)

    def _text(self, side: str, index: int) -> str:
        texts = self.sides[side]
        return shown(texts[index]) if index < len(texts) else ""


def _row(row: Any, table: _Table, comparison: Any) -> dict[str, Any]:
    tokens = [table.place("student", index) for index in row.input_ids]
    pieces = list(texts_of_row(row.input_ids, comparison.student_texts))
    for place in row.picture_places:
        pieces[place] = PICTURE  # whatever the family's own mark is
    found: dict[str, Any] = {
        "number": row.number,
        "length": row.length,
        "tokens": tokens,
        "pieces": {str(i): text for i, text in enumerate(pieces) if text != table.texts[tokens[i]]},
        "places": row.places.tolist(),
    }
    if comparison.kl_is is None:
        found["surprise"] = _rounded(-np.log(np.maximum(row.student.own, 1e-9)))
    else:
        found["kl"] = _rounded(row.kl)
    for name in ("student", "teacher"):
        side = getattr(row, name)
        found[name] = {
            "ids": [table.place(name, index) for index in side.ids.ravel().tolist()],
            "probs": _thousandths(side.probs.ravel()),
            "own": _thousandths(side.own),
        }
    return found


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _thousandths(values: np.ndarray) -> Sequence[int | None]:
    return [None if math.isnan(value) else round(1000 * value) for value in values.tolist()]
