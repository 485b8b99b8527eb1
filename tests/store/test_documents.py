"""Documents of rows: against a loop over single rows."""

import hashlib
import itertools
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_distill.store.documents import Documents, joined, keys_of_dataset
from hf_distill.token_rows import ROWS_PER_BLOCK

LENGTHS = [5, 1, 12, 2, 9, 7, 3]


def random_rows(lengths=LENGTHS, seed=0):
    """Rows of one document each; the third has no label, that of the fourth is on its first token."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = rng.integers(0, 384, length)
        labels = np.where(rng.random(length) < 0.6, ids, -100)
        if i == 2:
            labels[:] = -100
        if i == 3:
            labels[:] = [ids[0], -100]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def packed(rows, sizes):
    """The same documents with `sizes` of them in a row."""
    rows = iter(rows)
    found = []
    for part in (list(itertools.islice(rows, size)) for size in sizes):
        row = {name: [value for each in part for value in each[name]] for name in ("input_ids", "labels")}
        found.append({**row, "seq_lengths": [len(each["input_ids"]) for each in part]})
    return found


def by_hand(ids, labels):
    """Which tokens bear a label, and the key: a hash of the tokens, four bytes each, and of the bits."""
    bears = [False, *(label != -100 for label in labels[1:])]
    bits = bytearray(-(-len(bears) // 8))
    for i, bit in enumerate(bears):
        bits[i // 8] |= bit << (7 - i % 8)
    data = b"".join(int(token).to_bytes(4, "little") for token in ids) + bytes(bits)
    return bears, hashlib.blake2b(data, digest_size=16).digest()


def same(found, expected):
    assert found.ids.dtype == np.int32
    assert found.bears_label.dtype == bool
    for name in ("ids", "bears_label", "starts", "rows"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_documents_are_those_of_a_loop_over_rows():
    rows = random_rows()
    documents = Documents.of_rows(rows)
    assert len(documents) == len(rows)
    assert documents.rows.tolist() == [*range(len(rows))]
    assert documents.num_tokens.tolist() == LENGTHS
    for i, row in enumerate(rows):
        bears, key = by_hand(row["input_ids"], row["labels"])
        ids, found = documents[i]
        assert ids.tolist() == row["input_ids"]
        assert found.tolist() == bears
        assert documents.num_labels[i] == sum(bears)
        assert documents.keys()[i].tobytes() == key


def test_packing_changes_nothing_but_the_row_of_a_document():
    rows = random_rows([5, 1, 12, 2, 9, 7, 3])
    # In a packed row another document of it may have the labels.
    rows[2]["labels"][4] = rows[2]["input_ids"][4]
    rows[3]["labels"][1] = rows[3]["input_ids"][1]
    rows[1]["labels"] = rows[1]["input_ids"]
    alone = Documents.of_rows(rows)
    for sizes in ([7], [2, 2, 3], [1, 6], [1] * 7):
        found = Documents.of_rows(packed(rows, sizes))
        assert np.array_equal(found.keys(), alone.keys())
        assert found.rows.tolist() == np.repeat(range(len(sizes)), sizes).tolist()


def test_every_form_of_the_columns_has_the_same_documents():
    rows = random_rows()
    expected = Documents.of_rows(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    forms = [
        columns,
        {name: pa.chunked_array([pa.array(cells[:3]), pa.array(cells[3:])]) for name, cells in columns.items()},
        {name: pa.chunked_array([pa.array(cells, pa.large_list(pa.int32()))]) for name, cells in columns.items()},
        *(
            {name: [np.array(cell, dtype) for cell in cells] for name, cells in columns.items()}
            for dtype in (np.int16, np.int32, np.int64)
        ),
        {name: [torch.tensor(cell) for cell in cells] for name, cells in columns.items()},
    ]
    for form in forms:
        same(Documents.of_columns(form), expected)
    dataset = Dataset.from_list(rows)
    for form in (dataset, dataset.with_format("torch"), dataset.with_format("numpy"), dataset.to_iterable_dataset()):
        same(Documents.of_dataset(form), expected)
    same(Documents.of_dataset(dataset.with_transform(lambda batch: batch)), expected)
    same(Documents.of_dataset(IterableDataset.from_generator(lambda: iter(rows))), expected)


def test_slices_of_a_dataset_have_their_own_documents():
    dataset = Dataset.from_list(random_rows())
    same(Documents.of_dataset(dataset.select(range(3, 7))), Documents.of_rows(random_rows()[3:]))
    same(Documents.of_dataset(dataset.select([4, 1])), Documents.of_rows([random_rows()[i] for i in (4, 1)]))


def test_rows_count_over_blocks():
    rows = [{"input_ids": [i, 1], "labels": [-100, 1]} for i in range(ROWS_PER_BLOCK + 3)]
    for dataset in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        documents = Documents.of_dataset(dataset)
        assert documents.rows.tolist() == [*range(len(rows))]
        assert documents.ids[::2].tolist() == [*range(len(rows))]


def test_keys_of_a_data_set_are_those_of_its_documents_with_labels():
    rows = [row for i in range(1000) for row in random_rows()[i % 3 :]]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(packed(rows[:100], [40, 60]))):
        documents = Documents.of_dataset(dataset).with_labels()
        keys, places = keys_of_dataset(dataset)
        assert np.array_equal(keys, documents.keys())
        assert np.array_equal(places, documents.rows)
    keys, places = keys_of_dataset(Dataset.from_dict({"input_ids": []}))
    assert (keys.shape, places.shape) == ((0, 16), (0,))


def test_keys_of_a_data_set_take_little_memory_however_long_texts_are(monkeypatch):
    for place in ("token_rows", "store.documents"):
        monkeypatch.setattr(f"hf_distill.{place}.ROWS_PER_BLOCK", 64)
    dataset = Dataset.from_dict({"input_ids": np.arange(2**21, dtype=np.int32).reshape(4096, 512)})
    peaks = []
    for function in (Documents.of_dataset, keys_of_dataset):
        tracemalloc.start()
        function(dataset)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 5 * 2**21  # four bytes of a token, and one of its label
    assert peaks[1] < peaks[0] / 4


def test_without_labels_all_tokens_but_the_first_are_trained():
    rows = [{"input_ids": row["input_ids"]} for row in random_rows()]
    documents = Documents.of_rows(rows)
    assert documents.num_labels.tolist() == [length - 1 for length in LENGTHS]
    same(Documents.of_dataset(Dataset.from_list(rows)), documents)


def test_a_row_without_a_label_of_the_students_has_none_for_a_teacher():
    own = {"teacher_input_ids": [7, 8, 9], "teacher_labels": [-100, 8, 9]}
    rows = [
        {"input_ids": [1, 2], "labels": [-100, 2], **own},
        {"input_ids": [1, 2], "labels": [1, -100], **own},  # a filler: nothing predicts a first token
    ]
    documents = Documents.of_rows(rows, "teacher_input_ids", "teacher_labels")
    assert documents.num_tokens.tolist() == [3, 3]
    assert documents.num_labels.tolist() == [2, 0]
    assert np.array_equal(documents.with_labels().keys(), documents.keys()[:1])
    same(Documents.of_dataset(Dataset.from_list(rows), "teacher_input_ids", "teacher_labels"), documents)


def test_a_key_depends_on_each_token_on_each_label_and_on_the_length_alone():
    ids, labels = [3, 1, 4, 1, 5, 9, 2, 6, 5], [-100, 1, 4, 1, 5, 9, 2, 6, 5]
    changed = [{"input_ids": ids, "labels": labels}]
    for i in range(1, 9):
        changed.append({"input_ids": ids, "labels": [*labels[:i], -100, *labels[i + 1 :]]})
        changed.append({"input_ids": [*ids[:i], 77, *ids[i + 1 :]], "labels": labels})
        changed.append({"input_ids": ids[:i], "labels": labels[:i]})
    keys = Documents.of_rows(changed).keys()
    assert len({key.tobytes() for key in keys}) == len(changed)
    # The first label is never learned from, and the value of a label is the token.
    again = Documents.of_rows([{"input_ids": ids, "labels": [3, *labels[1:]]}])
    assert np.array_equal(again.keys()[0], keys[0])


def test_taken_documents_are_in_the_order_asked_for():
    documents = Documents.of_rows(packed(random_rows(), [3, 4]))
    found = documents.take(np.array([5, 0, 5]))
    assert np.array_equal(found.keys(), documents.keys()[[5, 0, 5]])
    assert found.rows.tolist() == [1, 0, 1]
    assert found.num_labels.tolist() == documents.num_labels[[5, 0, 5]].tolist()


def test_distinct_documents_come_once_in_the_order_of_their_first_place():
    rows = random_rows()
    documents = Documents.of_rows([rows[4], rows[0], rows[4], rows[5], rows[0], rows[2]]).distinct()
    assert np.array_equal(documents.keys(), Documents.of_rows([rows[4], rows[0], rows[5], rows[2]]).keys())
    assert documents.distinct() is documents


def test_documents_without_labels_are_left_out():
    documents = Documents.of_rows(random_rows())
    found = documents.with_labels()
    chosen = [i for i, row in enumerate(random_rows()) if any(by_hand(row["input_ids"], row["labels"])[0])]
    assert 1 < len(chosen) < len(LENGTHS)
    assert np.array_equal(found.keys(), documents.keys()[chosen])
    assert found.with_labels() is found


def test_joined_parts_keep_their_documents():
    rows = random_rows()
    parts = [Documents.of_rows(rows[:2]), Documents.of_rows(packed(rows[2:6], [3, 1])), Documents.of_rows(rows[6:])]
    found = joined(parts, [0, 10, 20])
    assert np.array_equal(found.keys(), Documents.of_rows(rows).keys())
    assert found.rows.tolist() == [0, 1, 10, 10, 10, 11, 20]


@pytest.mark.parametrize(
    "documents",
    [joined([], []), Documents.of_dataset([]), Documents.of_columns({"input_ids": [], "labels": []})],
    ids=["no parts", "no rows", "no cells"],
)
def test_nothing_has_no_documents(documents):
    assert len(documents) == 0
    assert documents.keys().shape == (0, 16)
    assert len(documents.distinct().with_labels()) == 0
    assert documents.num_labels.shape == documents.num_tokens.shape == (0,)
    assert len(joined([documents, Documents.of_rows(random_rows())], [0, 0])) == len(LENGTHS)


def test_empty_documents_of_a_packed_row_take_no_place():
    row = {"input_ids": [4, 5, 6], "labels": [4, 5, 6], "seq_lengths": [0, 2, 0, 1, 0]}
    documents = Documents.of_rows([row, {name: [] for name in row}])
    assert documents.num_tokens.tolist() == [0, 2, 0, 1, 0]
    assert documents.num_labels.tolist() == [0, 1, 0, 0, 0]
    assert np.array_equal(documents.with_labels().keys(), Documents.of_rows([{"input_ids": [4, 5]}]).keys())
