"""Checks of rows of token ids and labels, in blocks: values that no model can read or learn, rows without a label.

A column of lists is one array of all its values and one array of the offsets where rows start, as in Arrow. Comparing
all values at once takes less time than a loop over a single row.

Shapes: R rows, n values of all rows together; B rows of a batch, T tokens of its longest row.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ROWS_PER_BLOCK = 4096
MAX_THREADS = 8
# A stream has to have a usable row within these.
PEEKED_ROWS = 1000
# Columns with one value per token of `input_ids`. The same names with `teacher_` belong to the teacher's own text.
PER_TOKEN = ("labels", "attention_mask", "completion_mask", "assistant_masks")
COLUMNS = ("input_ids", *PER_TOKEN, "seq_lengths", "position_ids", "teacher_input_ids", "teacher_labels")


class Limits(NamedTuple):
    """The ids, labels and lengths that rows may have."""

    vocab_size: int  # labels are -100 or below this
    num_ids: int | None = None  # token ids that can be read are below this; by default `vocab_size`
    teacher_ids: int | None = None  # the same for the teacher's own text; by default `vocab_size`
    max_length: int | None = None  # the length to which rows are cut
    known_to: str = "student and teacher share only"  # for messages: who knows the ids below `num_ids`
    completion_masks: bool = True  # whether `completion_mask` selects the trained tokens (completion_only_loss)


class Room(NamedTuple):
    """The largest number of tokens that a model can read."""

    reader: str  # for messages
    tokens: int | None  # None for no limit
    column: str = "input_ids"  # the tokens that it reads


class Ragged(NamedTuple):
    """A column of lists."""

    values: np.ndarray  # (n,)
    starts: np.ndarray  # (R + 1,)

    @property
    def lengths(self) -> np.ndarray:
        """(R,)"""
        return np.diff(self.starts)

    def first(self, wrong: np.ndarray) -> tuple[int, int]:
        """The row of the first value that is `wrong` (n,), and its index in that row."""
        index = int(wrong.argmax())
        row = int(np.searchsorted(self.starts, index, side="right")) - 1
        return row, index - int(self.starts[row])

    def places(self) -> np.ndarray:
        """The index of each value in its row, (n,)."""
        return np.arange(len(self.values)) - np.repeat(self.starts[:-1], self.lengths)

    def bears_label(self) -> np.ndarray:
        """True for labels that are predicted, (n,). Nothing predicts the first token of a row."""
        bears = self.values != -100
        bears[self.starts[:-1][self.lengths > 0]] = False
        return bears

    def counts(self, which: np.ndarray) -> np.ndarray:
        """The number of values per row that `which` (n,) marks, (R,)."""
        return np.diff(np.concatenate([[0], np.cumsum(which)])[self.starts])


class Cut(NamedTuple):
    """The rows of a dataset, or of a block of it, whose labels are cut off at a length."""

    unlabelled: int  # rows without a label at any length
    filled: int  # rows that have labels, all of them past the length: their prompts fill it
    shortened: int  # rows that keep some of their labels and lose others
    lost: int  # label-bearing tokens that these keep no longer
    labels: int  # label-bearing tokens of all rows, before they are cut


class RowProblem(Exception):
    """A row of a block is refused; the message says why."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


def check_row(row: Mapping[str, Any], name: str, limits: Limits) -> None:
    """Raises `ValueError` for a row that violates [`Limits`]; the message calls it `name`."""
    _check({column: [row[column]] for column in COLUMNS if row.get(column) is not None}, lambda _: name, limits)


def has_label(row: Mapping[str, Any]) -> bool:
    """True if a tokenised row has a label after its first token."""
    labels = row["labels"] if row.get("labels") is not None else row["input_ids"]
    return any(label != -100 for label in labels[1:])


def check_rows(dataset: Dataset, name: str, limits: Limits, num_threads: int | None = None) -> None:
    """Raises `ValueError` for the first row of a dataset that violates [`Limits`]; `name` is that of the dataset."""

    def check(columns: Mapping[str, Any], start: int) -> None:
        _check(columns, lambda row: f"row {start + row} of the {name} dataset", limits)

    over_blocks(dataset, COLUMNS, check, f"Checking {name} dataset", num_threads)


def longest_text(dataset: Dataset, column: str = "input_ids") -> tuple[int, int]:
    """The number of tokens of the longest text in a column of tokenised rows, and the number of its row.

    Of packed rows each document counts for itself.
    """
    if column not in dataset.column_names or dataset.format["type"] == "custom":
        return 0, 0

    def longest(columns: Mapping[str, Any], start: int) -> tuple[int, int]:
        lengths = _text_lengths(columns, column)
        row = int(lengths.argmax())
        return int(lengths[row]), start + row

    found = over_blocks(dataset, [column, "seq_lengths"], longest, "Measuring rows", None)
    return max(found, key=lambda block: block[0], default=(0, 0))


def without_long_rows(
    dataset: Dataset | IterableDataset, name: str, rooms: Iterable[Room], num_threads: int | None = None
) -> Any:
    """The rows that have no more tokens than each of the `rooms` allows; a warning counts those that are dropped.

    Of packed rows each document counts for itself. A stream drops rows as they come; its first `PEEKED_ROWS` alone are
    counted.

    Args:
        dataset: tokenised rows.
        name (`str`): that of the dataset, for messages.

    Raises:
        `ValueError`: no row is left, of a stream none of the first `PEEKED_ROWS`.
    """
    readers: dict[str, tuple[int, str]] = {}  # the least room of each column, and whose it is
    for reader, tokens, column in rooms:
        if tokens is not None:
            readers[column] = min(readers.get(column, (tokens, reader)), (tokens, reader))
    if not readers:
        return dataset
    limits = {column: tokens for column, (tokens, _) in readers.items()}
    if isinstance(dataset, Dataset):
        too_long = _too_long(dataset, name, limits, num_threads)
        fits = ~np.any(list(too_long.values()), axis=0)
        kept = dataset if fits.all() else dataset.select(np.flatnonzero(fits))
        which, is_empty = f"all rows of the {name} dataset", not fits.any()
        longer = _longer(readers, [column for column, found in too_long.items() if found.any()])
        if (count := len(dataset) - len(kept)) > 0:
            logger.warning("%d of %d %s rows have %s and are dropped", count, len(dataset), name, longer)
    else:
        function = partial(_has_room, limits=limits)
        fits = np.array([function(row) for row in dataset.take(PEEKED_ROWS)], dtype=bool)
        kept = dataset.filter(function)
        which, is_empty = f"the first {PEEKED_ROWS:,} rows of the {name} dataset", not fits.any()
        longer = _longer(readers, readers)
        logger.warning(
            "%s rows that have %s are dropped as they come; of the stream's first %d rows it is %d",
            name, longer, len(fits), int((~fits).sum()),
        )  # fmt: skip
    if is_empty:
        raise ValueError(
            f"{which} have {longer}, and drop_long_rows=True leaves none of them: lower max_length, or shorten the rows"
        )
    return kept


def _longer(readers: Mapping[str, tuple[int, str]], columns: Iterable[str]) -> str:
    return " or ".join("more than {} tokens for {}".format(*readers[column]) for column in columns)


def _too_long(dataset: Dataset, name: str, limits: Mapping[str, int], num_threads: int | None) -> dict[str, np.ndarray]:
    """For each column, True for rows whose text is longer than its limit, (R,)."""

    def find(columns: Mapping[str, Any], start: int) -> list[np.ndarray]:
        none = np.zeros(min(ROWS_PER_BLOCK, len(dataset) - start), dtype=bool)
        return [_text_lengths(columns, c) > limits[c] if c in columns else none for c in limits]

    if dataset.format["type"] != "custom" and not limits.keys() & {*dataset.column_names}:
        return dict.fromkeys(limits, np.zeros(len(dataset), dtype=bool))  # the dataset's own collator makes the tokens
    found = over_blocks(dataset, ("seq_lengths", *limits), find, f"Measuring {name} dataset", num_threads)
    return dict(zip(limits, map(np.concatenate, zip(*found, strict=True)), strict=True))


def _has_room(row: Mapping[str, Any], limits: Mapping[str, int]) -> bool:
    columns = {name: [row[name]] for name in ("seq_lengths", *limits) if row.get(name) is not None}
    return all(_text_lengths(columns, name)[0] <= limits[name] for name in limits.keys() & columns.keys())


def _text_lengths(columns: Mapping[str, Any], column: str) -> np.ndarray:
    """The number of tokens of each row's text, of a packed row that of its longest document, (R,)."""
    if column == "input_ids" and "seq_lengths" in columns:
        documents = ragged(columns["seq_lengths"], "seq_lengths")
        parts = np.split(documents.values, documents.starts[1:-1])
        return np.array([part.max(initial=0) for part in parts])
    return ragged(columns[column], column).lengths


def rows_with_label(
    dataset: Dataset, name: str, limits: Limits | None = None, num_threads: int | None = None
) -> np.ndarray:
    """True for rows that have a label, (R,). With `limits`, the rows are also checked, as by [`check_rows`]."""

    def find(columns: Mapping[str, Any], start: int) -> np.ndarray:
        if limits is not None:
            _check(columns, lambda row: f"row {start + row} of the {name} dataset", limits)
        if "input_ids" not in columns:  # the dataset's own collator makes them
            return np.ones(min(ROWS_PER_BLOCK, len(dataset) - start), dtype=bool)
        labels = ragged(columns.get("labels", columns["input_ids"]), "labels")
        return labels.counts(labels.bears_label()) > 0

    if "input_ids" not in dataset.column_names and dataset.format["type"] != "custom":
        return np.ones(len(dataset), dtype=bool)
    columns = COLUMNS if limits is not None else ("input_ids", "labels")
    found = over_blocks(dataset, columns, find, f"Checking labels of {name} dataset", num_threads)
    return np.concatenate([np.zeros(0, dtype=bool), *found])


def count_cut(
    dataset: Dataset, name: str, max_length: int, *, keep_end: bool = False, num_threads: int | None = None
) -> Cut:
    """The rows of tokenised `dataset` that lose labels when they are cut at `max_length`, at their end or start."""

    def count(columns: Mapping[str, Any], _: int) -> Cut:
        labels = ragged(columns.get("labels", columns["input_ids"]), "labels")
        bears, places = labels.bears_label(), labels.places()
        if keep_end:
            start = labels.lengths - max_length
            # Nothing predicts the first token that is left.
            kept = (places > np.repeat(start, labels.lengths)) & bears
        else:
            kept = (places < max_length) & bears
        before, after = labels.counts(bears), labels.counts(kept)
        loses = after < before
        return Cut(
            int((before == 0).sum()), int((loses & (after == 0)).sum()), int((loses & (after > 0)).sum()),
            int((before - after)[after > 0].sum()), int(before.sum()),
        )  # fmt: skip

    blocks = over_blocks(dataset, ("input_ids", "labels"), count, f"Measuring {name} dataset", num_threads)
    return Cut(*(sum(counts) for counts in zip(*blocks, strict=True))) if blocks else Cut(0, 0, 0, 0, 0)


def over_blocks(
    dataset: Dataset, names: Iterable[str], function: Callable[..., Any], what: str, num_threads: int | None
) -> list[Any]:
    """Results of `function(columns, first row)` of all blocks, in order; in threads (numpy and Arrow free the GIL)."""
    if dataset.format["type"] == "custom":
        num_threads = 1  # a transform makes the rows, and it may not be thread-safe
    else:
        present = [name for name in names if name in dataset.column_names]
        dataset = dataset.select_columns(present).with_format("arrow")
    threads = max(1, num_threads or min(os.cpu_count() or 1, MAX_THREADS))

    def run(start: int) -> Any:
        block: Any = dataset[start : start + ROWS_PER_BLOCK]
        found = block.column_names if isinstance(block, pa.Table) else block
        return function({name: block[name] for name in found if name in names}, start)

    results = []
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(dataset), desc=what, unit=" rows", delay=1) as bar:
        for start, result in zip(starts := range(0, len(dataset), ROWS_PER_BLOCK), pool.map(run, starts), strict=True):
            results.append(result)
            bar.update(min(ROWS_PER_BLOCK, len(dataset) - start))
    return results


def _check(columns: Mapping[str, Any], name_of: Callable[[int], str], limits: Limits) -> None:
    try:
        found = {name: ragged(cells, name) for name, cells in columns.items()}
        if "input_ids" in found:
            _check_values(found, "", limits.num_ids or limits.vocab_size, limits)
            _check_places(found, limits)
        if "teacher_input_ids" in found and "teacher_labels" in found:
            _check_values(found, "teacher_", limits.teacher_ids or limits.vocab_size, limits)
            if "input_ids" in found:
                _check_same_completion(found, limits)
    except RowProblem as problem:
        raise ValueError(f"{name_of(problem.row)} {problem}") from None


def _check_values(found: Mapping[str, Ragged], side: str, num_ids: int, limits: Limits) -> None:
    ids = found[f"{side}input_ids"]
    for column in (f"{side}{name}" for name in PER_TOKEN):
        if column in found and (differs := found[column].lengths != ids.lengths).any():
            row = int(differs.argmax())
            lengths = f"{ids.lengths[row]} {side}input_ids and {found[column].lengths[row]} {column}"
            raise RowProblem(row, f"has {lengths}: there has to be one for each token")
    strange = (ids.values < 0) | (ids.values >= num_ids)
    if strange.any():
        row, place = ids.first(strange)
        value = ids.values[ids.starts[row] + place]
        known_to = "the teacher has only" if side else limits.known_to
        raise RowProblem(
            row,
            f"has {side.replace('_', ' ')}token id {value} at place {place}, but {known_to} the ids below {num_ids}. "
            "Use tokens (eos_token, chat template) that both know",
        )
    if f"{side}labels" in found:
        labels = found[f"{side}labels"]
        strange = ((labels.values < 0) & (labels.values != -100)) | (labels.values >= limits.vocab_size)
        if strange.any():
            row, place = labels.first(strange)
            value = labels.values[labels.starts[row] + place]
            raise RowProblem(
                row,
                f"has the {side.replace('_', ' ')}label {value} at place {place}; a label is -100, which masks its "
                f"token, or a token id from 0 to {limits.vocab_size - 1}",
            )


def _check_places(found: Mapping[str, Ragged], limits: Limits) -> None:
    """Checks masks, `position_ids` and `seq_lengths`. The trainers take positions from `seq_lengths` alone."""
    ids = found["input_ids"]
    if "attention_mask" in found:
        mask = found["attention_mask"]
        masked = mask.values == 0
        labels = found.get("labels", ids)
        before = masked & np.append(~masked[1:], False)  # a token that is read follows
        before[mask.starts[1:][mask.lengths > 0] - 1] = False
        if (wrong := before | (masked & (labels.values != -100))).any():
            row, place = mask.first(wrong)
            raise RowProblem(
                row,
                f"has padding (attention_mask 0 at place {place}) that would be read or trained on. Remove "
                "padding from the rows: batches are padded when they are made",
            )
    masks = {"completion_mask", "assistant_masks"} if limits.completion_masks else {"assistant_masks"}
    for name in masks & found.keys() if "labels" in found else ():
        if (wrong := (found[name].values == 0) & (found["labels"].values != -100)).any():
            row, place = found[name].first(wrong)
            raise RowProblem(
                row, f"has a label at place {place}, which its {name} leaves out. Only labels are read: make both agree"
            )
    if "seq_lengths" in found:
        lengths = found["seq_lengths"]
        sums = np.diff(np.concatenate([[0], np.cumsum(lengths.values)])[lengths.starts])
        wrong = (sums != ids.lengths) | (lengths.counts(lengths.values < 1) > 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise RowProblem(
                row, f"has {ids.lengths[row]} input_ids, but seq_lengths of {sums[row]} tokens: cut both or neither"
            )
    elif "position_ids" in found:
        positions = found["position_ids"]
        if (wrong := positions.values != positions.places()).any():
            raise RowProblem(
                positions.first(wrong)[0],
                "has position_ids that do not count from 0, and position_ids are not read: give the lengths of the "
                "documents of a packed row as 'seq_lengths'",
            )
    cut = [name for name in ("seq_lengths", "teacher_input_ids") if name in found]
    if cut and limits.max_length is not None and (longer := ids.lengths > limits.max_length).any():
        row = int(longer.argmax())
        raise RowProblem(
            row,
            f"has {ids.lengths[row]} tokens, and max_length={limits.max_length} would cut them, but not its {cut[0]}: "
            "raise max_length, or shorten the row",
        )


def _check_same_completion(found: Mapping[str, Ragged], limits: Limits) -> None:
    labels = [found.get("labels", found["input_ids"]), found["teacher_labels"]]
    bearing = [side.bears_label() for side in labels]
    counts = [side.counts(bears) for side, bears in zip(labels, bearing, strict=True)]
    if (differs := counts[0] != counts[1]).any():
        row = int(differs.argmax())
    else:
        student, teacher = (side.values[bears] for side, bears in zip(labels, bearing, strict=True))
        if not (differs := student != teacher).any():
            return
        row = int(np.searchsorted(np.cumsum(counts[0]), int(differs.argmax()), side="right"))
    raise RowProblem(
        row,
        f"has {counts[0][row]} label-bearing tokens for the student and {counts[1][row]} for the teacher, "
        "and they differ: both texts have to end with the same completion",
    )


def ragged(cells: Any, name: str) -> Ragged:
    """A column of Arrow, or a list of lists, arrays or tensors, as [`Ragged`]. Raises [`RowProblem`] for others."""
    if isinstance(cells, pa.ChunkedArray):
        array: Any = cells.combine_chunks()
    else:
        parts = []
        for row, cell in enumerate(cells):
            if cell is None:
                raise RowProblem(row, f"has no {name} (None)")
            part = np.asarray(cell)
            if part.ndim != 1:
                raise RowProblem(row, f"has {name} that is not a list")
            if len(part) and part.dtype == object:
                raise RowProblem(row, f"has None among its {name}, or a non-integer")
            parts.append(part)
        present = [part for part in parts if len(part)]  # numpy gives an empty list a floating-point dtype
        values = np.concatenate(present) if present else np.zeros(0, dtype=np.int64)
        return Ragged(_integers(values, name), np.cumsum([0, *map(len, parts)]))
    if not pa.types.is_list(array.type) and not pa.types.is_large_list(array.type):
        if not pa.types.is_fixed_size_list(array.type):
            raise RowProblem(0, f"has {name} that is not a list ({array.type})")
        array = array.cast(pa.list_(array.type.value_type))
    if array.null_count:
        raise RowProblem(int(np.asarray(array.is_null()).argmax()), f"has no {name} (None)")
    flat, starts = array.flatten(), np.asarray(array.offsets)
    starts = starts - starts[0]
    if flat.null_count:
        row = int(np.searchsorted(starts, int(np.asarray(flat.is_null()).argmax()), side="right")) - 1
        raise RowProblem(row, f"has None among its {name}")
    return Ragged(_integers(flat.to_numpy(zero_copy_only=False), name), starts)


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows as one tensor (B, T), padded on the `side` "left" or "right", and the mask (B, T) of their tokens."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)  # (B, 1)
    places = torch.arange(padded.shape[1])
    return padded, places >= padded.shape[1] - lengths if side == "left" else places < lengths


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    kinds = "iub" if name.endswith(("mask", "masks")) else "iu"  # True and False are not tokens
    if values.dtype.kind not in kinds and len(values):
        raise RowProblem(0, f"has {name} that are not integers ({values.dtype})")
    return values.astype(np.int8) if values.dtype.kind == "b" else values


def look_at_batch(
    batch: Mapping[str, Any], prefix: str, num_ids: int, vocab_size: int, pad_token_id: int | None
) -> tuple[Tensor, Tensor]:
    """The numbers (2,) of label-bearing tokens and of impossible labels and ids, and where these are (2, B, T).

    They are on the batch's device, and the host does not wait for it.

    Args:
        batch: the output of a collator.
        prefix (`str`): prefix of the tensor names of one side: "" or "teacher_".
        num_ids (`int`): token ids have to be below this, except masked ids and padding.
        vocab_size (`int`): labels are -100 or below this.

    Raises:
        `ValueError`: there are no ids or labels, or they are not (B, T), or they come shifted.
    """
    names = [prefix + name for name in ("input_ids", "labels", "attention_mask")]
    ids, labels, mask = (batch.get(name) for name in names)
    if ids is None or labels is None:
        raise ValueError(f"a batch has no {names[0 if ids is None else 1]!r}: the data collator has to make them")
    if f"{prefix}shift_labels" in batch:
        raise ValueError("a batch has 'shift_labels', but labels are shifted by the trainer: leave them out")
    if labels.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"a batch has {names[1]} of shape {tuple(labels.shape)} and {names[0]} of shape {tuple(ids.shape)}: both "
            "have to be (B, T), a label for each token"
        )
    bad_labels = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    bad_ids = (ids < 0) | (ids >= num_ids)
    if pad_token_id is not None:
        bad_ids = bad_ids & (ids != pad_token_id)
    if mask is not None and mask.shape == ids.shape:
        bad_ids = bad_ids & (mask != 0)
    bad = torch.stack([bad_labels, bad_ids])
    return torch.stack([(labels[:, 1:] != -100).sum(), bad.sum()]), bad


def check_batch(batch: Mapping[str, Any], prefix: str, num_ids: int, vocab_size: int, pad_token_id: int | None) -> int:
    """The number of label-bearing tokens; `ValueError` for a batch whose labels or token ids cannot be trained on.

    The arguments are those of [`look_at_batch`].
    """
    found, bad = look_at_batch(batch, prefix, num_ids, vocab_size, pad_token_id)
    number, num_bad = found.tolist()  # the host waits for the device
    if num_bad:
        labels, ids = batch[f"{prefix}labels"], batch[f"{prefix}input_ids"]
        side, *place = bad.nonzero()[0].tolist()
        value = (labels, ids)[side][tuple(place)].item()
        limits = f"-100 and 0 to {vocab_size - 1} are" if side == 0 else f"0 to {num_ids - 1} are"
        raise ValueError(f"a batch has the {prefix}{('label', 'token id')[side]} {value}; {limits} possible")
    return number
