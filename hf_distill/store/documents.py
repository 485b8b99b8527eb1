"""Documents: texts as a teacher reads them, and the keys that they have in a store.

Shapes: n documents.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
from datasets import Dataset

from hf_distill.token_rows import ROWS_PER_BLOCK, over_blocks, ragged

KEY_BYTES = 16


class Documents:
    """n documents, one after the other in two flat arrays.

    Args:
        ids (`np.ndarray` of int32): the tokens of all documents.
        bears_label (`np.ndarray` of bool): whether a token is trained on. The first token of a document never is.
        starts (`np.ndarray` of shape `(n + 1,)`): where documents begin, and the end of the last one.
        rows (`np.ndarray` of shape `(n,)`): the row of the data set or of the batch that a document belongs to.
    """

    def __init__(self, ids: np.ndarray, bears_label: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        self.ids, self.bears_label, self.starts, self.rows = ids, bears_label, starts, rows

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any], ids: str = "input_ids", labels: str = "labels") -> "Documents":
        """The documents in columns of tokenised rows, each a list of lists or an Arrow column.

        A row with `seq_lengths` has been packed, and holds several. A row that has no label for the student fills up a
        batch: it has none for a teacher.

        Args:
            ids, labels: the columns of the teacher's own text, or the student's.
        """
        tokens = ragged(columns[ids], ids)
        own = ragged(columns.get(labels, columns[ids]), labels)
        students = ragged(columns.get("labels", columns["input_ids"]), "labels")
        is_trained = students.counts(students.bears_label()) > 0  # (R,)
        bears = (own.values != -100) & np.repeat(is_trained, own.lengths)
        if "seq_lengths" in columns:
            lengths = ragged(columns["seq_lengths"], "seq_lengths")
            counts, lengths = lengths.lengths, lengths.values
        else:
            counts, lengths = np.ones(len(tokens.lengths), np.int64), tokens.lengths
        starts = np.cumsum([0, *lengths])
        bears[starts[:-1][lengths > 0]] = False  # nothing predicts a first token
        return cls(tokens.values.astype(np.int32), bears, starts, np.repeat(np.arange(len(counts)), counts))

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], ids: str = "input_ids", labels: str = "labels") -> "Documents":
        """The documents in tokenised rows, which all have the same columns."""
        names = {ids, labels, "input_ids", "labels", "seq_lengths"} & rows[0].keys()
        return cls.of_columns({name: [row[name] for row in rows] for name in names}, ids, labels)

    @classmethod
    def of_dataset(cls, dataset: Iterable[Any], ids: str = "input_ids", labels: str = "labels") -> "Documents":
        """The documents in all rows of a data set, or of a stream, which is read to its end."""
        if isinstance(dataset, Dataset):
            blocks = _of_blocks(dataset, ids, labels, lambda documents: documents)
        else:
            rows = iter(dataset)
            some = iter(lambda: list(islice(rows, ROWS_PER_BLOCK)), [])
            blocks = [cls.of_rows(block, ids, labels) for block in some]
        return joined(blocks, [ROWS_PER_BLOCK * i for i in range(len(blocks))])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (T,) of a document, and which of them bear a label (T,)."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.bears_label[part]

    @property
    def num_tokens(self) -> np.ndarray:
        """(n,)"""
        return np.diff(self.starts)

    @property
    def num_labels(self) -> np.ndarray:
        """(n,), of tokens that bear a label."""
        return np.diff(np.searchsorted(np.flatnonzero(self.bears_label), self.starts))

    def keys(self) -> np.ndarray:
        """(n, 16) uint8: a hash of the tokens and of which bear a label."""
        found = bytearray()
        ids = self.ids.astype("<i4", copy=False)
        for start, end in pairwise(self.starts.tolist()):
            digest = hashlib.blake2b(ids[start:end].tobytes(), digest_size=KEY_BYTES)
            digest.update(np.packbits(self.bears_label[start:end]).tobytes())
            found += digest.digest()
        return np.frombuffer(bytes(found), np.uint8).reshape(-1, KEY_BYTES)

    def take(self, chosen: np.ndarray) -> "Documents":
        """The documents at some indices, in that order."""
        parts = [slice(self.starts[i], self.starts[i + 1]) for i in chosen]
        empty = slice(0, 0)
        ids, bears = (np.concatenate([side[p] for p in (empty, *parts)]) for side in (self.ids, self.bears_label))
        return Documents(ids, bears, np.cumsum([0, *self.num_tokens[chosen]]), self.rows[chosen])

    def with_labels(self) -> "Documents":
        """The documents that are trained on. A store keeps nothing of the others."""
        has_label = self.num_labels > 0
        return self if has_label.all() else self.take(np.flatnonzero(has_label))

    def distinct(self) -> "Documents":
        """Each document once, in the order in which they come first."""
        _, first = np.unique(as_bytes(self.keys()), return_index=True)
        return self if len(first) == len(self) else self.take(np.sort(first))


def keys_of_dataset(dataset: Dataset, ids: str = "input_ids", labels: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """The keys (n, 16) of the documents of a data set that are trained on, and the row (n,) that each is in.

    Only these are held in memory, 24 bytes of a document; texts are read block by block.
    """

    def read(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
        documents = documents.with_labels()
        return documents.keys(), documents.rows

    blocks = _of_blocks(dataset, ids, labels, read)
    keys, rows = np.zeros((0, KEY_BYTES), np.uint8), np.zeros(0, np.int64)
    return (
        np.concatenate([keys, *(block[0] for block in blocks)]),
        np.concatenate([rows, *(block[1] + ROWS_PER_BLOCK * i for i, block in enumerate(blocks))]),
    )


def _of_blocks(dataset: Dataset, ids: str, labels: str, function: Callable[[Documents], Any]) -> list[Any]:
    """Results of a function of the documents of each `ROWS_PER_BLOCK` rows, in order."""

    def read(columns: Mapping[str, Any], _: int) -> Any:
        return function(Documents.of_columns(columns, ids, labels))

    return over_blocks(dataset, {ids, labels, "input_ids", "labels", "seq_lengths"}, read, "Hashing rows", None)


def as_bytes(keys: np.ndarray) -> np.ndarray:
    """Keys (n, 16) as strings of 16 bytes (n,), which can be sorted and compared."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()


def joined(parts: Sequence[Documents], first_rows: Sequence[int]) -> Documents:
    """All documents of some parts; `first_rows` are added to the rows of each."""
    offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
    starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
    rows = [part.rows + first for part, first in zip(parts, first_rows, strict=True)]
    none = np.zeros(0, np.int64)
    return Documents(
        np.concatenate([none.astype(np.int32), *(part.ids for part in parts)]),
        np.concatenate([none.astype(bool), *(part.bears_label for part in parts)]),
        np.concatenate([none, *starts, offsets[-1:]]),
        np.concatenate([none, *rows]),
    )
