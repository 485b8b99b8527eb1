"""Rows of tokens against loops over single values, and the speed of that."""

import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets

from hf_distill.token_rows import (
    ROWS_PER_BLOCK,
    Cut,
    Limits,
    Room,
    check_row,
    check_rows,
    count_cut,
    has_label,
    longest_text,
    pad,
    rows_with_label,
    without_long_rows,
)

VOCAB = 50
LIMITS = Limits(VOCAB, teacher_ids=VOCAB + 2)


def random_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 0 to 6 tokens, about half of whose labels are masked."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(0, 7, count):
        ids = random.integers(0, VOCAB, length)
        rows.append({"input_ids": ids.tolist(), "labels": np.where(random.random(length) < 0.5, -100, ids).tolist()})
    return rows


def labelled(rows) -> list[bool]:
    return [any(label != -100 for label in row["labels"][1:]) for row in rows]


ROWS = random_rows(ROWS_PER_BLOCK + 100)
# However a data set keeps its rows.
KINDS = {
    "int64": lambda rows: Dataset.from_list(rows),
    "int32": lambda rows: Dataset.from_list(
        rows, features=Features({name: List(Value("int32")) for name in ("input_ids", "labels")})
    ),
    "large lists": lambda rows: Dataset.from_list(
        rows, features=Features({name: LargeList(Value("int64")) for name in ("input_ids", "labels")})
    ),
    "chosen": lambda rows: Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1)),
    "joined": lambda rows: concatenate_datasets([Dataset.from_list(rows[:1000]), Dataset.from_list(rows[1000:])]),
    "torch": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "transform": lambda rows: Dataset.from_list(rows).with_transform(lambda batch: batch),
    "arrays": lambda rows: Dataset.from_list(rows).with_transform(
        lambda batch: {name: [np.array(cell, dtype=np.int64) for cell in cells] for name, cells in batch.items()}
    ),
    "tensors": lambda rows: Dataset.from_list(rows).with_transform(
        lambda batch: {name: [torch.tensor(cell, dtype=torch.long) for cell in cells] for name, cells in batch.items()}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_a_label_are_those_that_a_loop_finds(kind):
    dataset = KINDS[kind](ROWS)
    check_rows(dataset, "train", LIMITS, num_threads=2)
    found = rows_with_label(dataset, "train", LIMITS, num_threads=2)
    assert found.tolist() == labelled(ROWS) == [has_label(row) for row in ROWS]
    assert 0 < found.sum() < len(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_those_that_a_loop_finds(kind, caplog):
    rooms = [Room("the student", 5), Room("the teacher", 4), Room("the crowd", None), Room("the label", 3, "labels")]
    kept = without_long_rows(KINDS[kind](ROWS), "train", rooms[:3], num_threads=2)
    assert [list(map(int, row["input_ids"])) for row in kept] == [r["input_ids"] for r in ROWS if len(r["labels"]) <= 4]
    dropped = f"{len(ROWS) - len(kept)} of {len(ROWS)} train rows have more than 4 tokens for the teacher and are"
    assert dropped in caplog.text
    assert len(without_long_rows(KINDS[kind](ROWS), "train", rooms)) == sum(len(r["labels"]) <= 3 for r in ROWS)
    assert "more than 4 tokens for the teacher or more than 3 tokens for the label and" in caplog.text
    lengths = [len(row["input_ids"]) for row in ROWS]
    by_arrow = kind not in ("transform", "arrays", "tensors")  # whose rows are not known before they are asked for
    assert longest_text(KINDS[kind](ROWS)) == ((6, lengths.index(6)) if by_arrow else (0, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_row_with_what_is_no_token_is_named_however_it_is_kept(kind):
    index = next(i for i in range(ROWS_PER_BLOCK, len(ROWS)) if len(ROWS[i]["labels"]) == 4)
    wrong = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, -1, 8]}
    dataset = KINDS[kind]([*ROWS[:index], wrong, *ROWS[index + 1 :]])
    with pytest.raises(ValueError, match=rf"row {index} of the train dataset has the label -1 at place 2"):
        rows_with_label(dataset, "train", LIMITS, num_threads=2)


@pytest.mark.parametrize("column", ["labels", "input_ids"])
@pytest.mark.parametrize("value", [-101, -100, -1, 0, VOCAB - 1, VOCAB, 9999])
def test_labels_are_tokens_or_masked_and_ids_are_tokens(column, value):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(3)]
    rows[1][column] = [5, value, 7]
    dataset = Dataset.from_list(rows)
    if 0 <= value < VOCAB or (column, value) == ("labels", -100):
        check_rows(dataset, "train", LIMITS)
        return check_row(rows[1], "row 7", LIMITS)
    what = "the label" if column == "labels" else "token id"
    with pytest.raises(ValueError, match=rf"row 1 of the train dataset has {what} {value} at place 1"):
        check_rows(dataset, "train", LIMITS)
    with pytest.raises(ValueError, match=rf"row 7 has {what} {value} at place 1"):
        check_row(rows[1], "row 7", LIMITS)
    return None


GOOD = {
    "whole": {"input_ids": [5, 6, 7]},
    "empty": {"input_ids": [], "labels": []},
    "labels of other tokens": {"input_ids": [5, 6, 7], "labels": [-100, 8, 9]},
    "padding on the right": {"input_ids": [5, 6, 0], "labels": [5, 6, -100], "attention_mask": [1, 1, 0]},
    "packed": {"input_ids": [5, 6, 7], "seq_lengths": [1, 2], "position_ids": [0, 0, 1]},
    "positions": {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]},
    "masks": {"input_ids": [5, 6], "completion_mask": [0, 1], "assistant_masks": [0, 1]},
    "masks of true and false": {"input_ids": [5, 6], "labels": [-100, 6], "completion_mask": [False, True]},
    "teacher's own": {
        "input_ids": [5, 6, 7], "labels": [-100, 6, 7],
        "teacher_input_ids": [51, 9, 6, 7], "teacher_labels": [-100, -100, 6, 7],
    },
}  # fmt: skip
OWN = GOOD["teacher's own"]
BAD = {
    "shorter labels": ({"input_ids": [5, 6, 7], "labels": [6, 7]}, "3 input_ids and 2 labels"),
    "longer labels": ({"input_ids": [5, 6], "labels": [5, 6, 7]}, "2 input_ids and 3 labels"),
    "no labels": ({"input_ids": [5, 6], "labels": []}, "2 input_ids and 0 labels"),
    "shorter mask": ({"input_ids": [5, 6], "attention_mask": [1]}, "2 input_ids and 1 attention_mask"),
    "other mask": ({"input_ids": [5, 6], "completion_mask": [1]}, "2 input_ids and 1 completion_mask"),
    "trained padding": ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "padding .attention_mask 0 at place 1"),
    "padding on the left": (
        {"input_ids": [0, 5, 6], "labels": [-100, 5, 6], "attention_mask": [0, 1, 1]}, "padding .* at place 0"
    ),
    "lengths": ({"input_ids": [5, 6, 7], "seq_lengths": [1, 1]}, "3 input_ids, but seq_lengths of 2 tokens"),
    "an empty document": ({"input_ids": [5, 6], "seq_lengths": [2, 0]}, "seq_lengths"),
    "positions": ({"input_ids": [5, 6, 7], "position_ids": [0, 0, 1]}, "position_ids that do not count from 0"),
    "teacher's label": (OWN | {"teacher_labels": [-100, -100, 6, 8]}, "2 label-bearing .* and 2 for the teacher"),
    "teacher's labels": (OWN | {"teacher_labels": [-100, 9, 6, 7]}, "2 label-bearing tokens .* and 3 for the teacher"),
    "teacher's length": (OWN | {"teacher_labels": [6, 7]}, "4 teacher_input_ids and 2 teacher_labels"),
    "teacher's token": (OWN | {"teacher_input_ids": [52, 9, 6, 7]}, "teacher token id 52 .* the ids below 52"),
    "teacher's wrong label": (OWN | {"teacher_labels": [-1, -100, 6, 7]}, "teacher label -1 at place 0"),
    "numbers": ({"input_ids": [5.0, 6.5]}, "input_ids that are not integers"),
    "true and false": ({"input_ids": [5, 6], "labels": [False, True]}, "labels that are not integers"),
    "labels that a mask leaves out": (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "completion_mask": [0, 0, 1]}, "label at place 1, which its"
    ),
    "none among them": ({"input_ids": [5, None]}, "None among its input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_rows_that_can_be_trained_on_pass(case):
    check_rows(Dataset.from_list([GOOD[case]] * 2), "train", LIMITS)
    check_row(GOOD[case], "a row", LIMITS)


@pytest.mark.parametrize("case", BAD)
def test_rows_that_would_be_trained_on_otherwise_are_refused(case):
    row, message = BAD[case]
    with pytest.raises(ValueError, match=rf"row 3 .*{message}"):
        check_row(row, "row 3", LIMITS)
    fine = OWN if "teacher" in case else {name: [] for name in row}
    rows = (
        [row] if case in ("numbers", "true and false") else [fine, fine, row]
    )  # all rows of a data set have numbers of one kind
    with pytest.raises(ValueError, match=rf"row {len(rows) - 1} of the train dataset .*{message}"):
        check_rows(Dataset.from_list(rows), "train", LIMITS)


def test_row_without_labels_among_others_that_have_some_is_named():
    dataset = Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], None]})
    with pytest.raises(ValueError, match=r"row 1 of the train dataset has no labels \(None\)"):
        check_rows(dataset, "train", LIMITS)


def test_row_that_would_be_cut_on_one_side_alone_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens, and max_length=2 would cut them"):
        check_row(OWN, "a row", LIMITS._replace(max_length=2))
    check_row(GOOD["whole"], "a row", LIMITS._replace(max_length=2))


@pytest.mark.slow
def test_50_000_rows_of_200_tokens_take_no_second_of_two_cores():
    random, count = np.random.default_rng(0), 100_000
    lengths = random.integers(100, 301, count)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = random.integers(0, VOCAB, starts[-1])
    labels = np.where(random.random(len(ids)) < 0.3, -100, ids)
    columns = {"input_ids": ids, "labels": labels}
    dataset = Dataset(
        pa.table({name: pa.ListArray.from_arrays(pa.array(starts), pa.array(x)) for name, x in columns.items()})
    )
    before = time.process_time()  # of all threads; others use the machine, too
    check_rows(dataset, "train", LIMITS, num_threads=2)
    assert rows_with_label(dataset, "train", num_threads=2).all()
    assert 2 * count / (time.process_time() - before) >= 50_000


def test_rows_are_padded_on_the_side_that_is_asked_for():
    rows = [[], [5], [1, 2, 3]]
    found, is_row = pad(rows, -100)
    assert found.tolist() == [[-100] * 3, [5, -100, -100], [1, 2, 3]]
    assert is_row.tolist() == [[False] * 3, [True, False, False], [True] * 3]
    found, is_row = pad(rows, 0, "left")
    assert found.tolist() == [[0] * 3, [0, 0, 5], [1, 2, 3]]
    assert is_row.tolist() == [[False] * 3, [False, False, True], [True] * 3]
    assert found.dtype == torch.long  # also where the first row has no token
    assert pad([[]], 0)[0].shape == (1, 0)


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 5, 100])
def test_labels_that_a_cut_loses_are_those_of_a_loop(max_length, keep_end):
    expected = Cut(0, 0, 0, 0, 0)._asdict()
    for row in ROWS:
        part = slice(-max_length, None) if keep_end else slice(None, max_length)
        before, after = (sum(label != -100 for label in labels[1:]) for labels in (row["labels"], row["labels"][part]))
        expected["labels"] += before
        expected["unlabelled"] += before == 0
        expected["filled"] += before > 0 and after == 0
        expected["shortened"] += 0 < after < before
        expected["lost"] += before - after if after else 0
    assert count_cut(Dataset.from_list(ROWS), "train", max_length, keep_end=keep_end)._asdict() == expected
    assert count_cut(Dataset.from_list(ROWS[:0]), "train", max_length) == Cut(0, 0, 0, 0, 0)
