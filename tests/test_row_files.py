"""Files, folders and names that hold no rows: one line that says what it is and what to do."""

import bz2
import gzip
import json
import lzma

import pytest
from datasets import Dataset, DatasetDict

from hf_distill.row_files import load_rows, load_splits, take_split

GOOD = '{"text": "one"}\n{"text": "two"}\n'

REFUSED = {
    "an empty file": ("rows.jsonl", "", "is empty"),
    "an empty table": ("rows.csv", "", "is empty"),
    "an empty parquet file": ("rows.parquet", "", "is empty"),
    "blank lines": ("rows.jsonl", "\n\n", "has no rows"),
    "an empty list": ("rows.json", "[]", "has no rows"),
    "a header alone": ("rows.csv", "prompt,completion\n", "has no rows"),
    "a last line that is cut": (
        "rows.jsonl", GOOD + '{"text": "thr', r"line 3 is no JSON object: '\{\"text\": \"thr'"
    ),
    "a broken line in the middle": (
        "rows.jsonl", '{"text": "one"}\n{"text" "two"}\n{"text": "three"}\n', "line 2 is no JSON object"
    ),
    "plain text": ("rows.jsonl", "one\ntwo\n", "line 1 is no JSON object: 'one'"),
    "dicts of Python": ("rows.jsonl", "{'text': 'one'}\n", "line 1 is no JSON object"),
    "strings": ("rows.jsonl", '"one"\n"two"\n', "line 1 is no JSON object"),
    "numbers": ("rows.jsonl", "1\n2\n", "line 1 is no JSON object: '1'"),
    "lists": ("rows.jsonl", '["one"]\n["two"]\n', "line 1 is no JSON object"),
    "a broken list": ("rows.json", '[{"text": "one"}, {"text": "tw', "is no JSON: .*line 1"),
    "16 bits a letter": ("rows.jsonl", GOOD.encode("utf-16"), "is no text in UTF-8"),
    "zeros": ("rows.jsonl", b"\0" * 40, "line 1 is no JSON object"),
    "other bytes": ("rows.parquet", "one two three", "cannot be read as parquet: .*not a parquet file"),
    "a table with a longer line": ("rows.csv", "a,b\n1,2\n1,2,3\n", "cannot be read as csv: .*line 3, saw 3"),
    "a quote that does not end": ("rows.csv", 'text\n"one\n', "cannot be read as csv: .*EOF inside string"),
    "half an archive": (
        "rows.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:40], "is not a whole .gz file .*unpack it by hand"
    ),
    "text that is called an archive": ("rows.jsonl.gz", "one", "is not a whole .gz file"),
    "an archive of several files": ("rows.zip", b"PK\x05\x06" + b"\0" * 18, "unpack it"),
    "a rare archive": ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", "unpack it"),
    "tabs": ("rows.tsv", "a\tb\n1\t2\n", r"is a file that ends in \.tsv.*convert it to one of .jsonl, "),
    "text": ("rows.txt", "one", r"is a file that ends in \.txt.*convert it"),
    "no ending": ("rows", "one", "is a file without an ending.*convert it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_holds_no_rows_is_told_in_one_line(tmp_path, case):
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"dataset '{path}'.*({message})") as error:
        load_rows(str(path), "train")
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_rows_is_told_in_one_line(tmp_path):
    for name in ("empty", "other", "broken", "half", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "rows.bin").write_text("x")
    (tmp_path / "broken" / "train.jsonl").write_text('{"text":')
    (tmp_path / "half" / "state.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text("{}")
    cases = {
        "empty": "has no data files",
        "other": "has no data files",
        "broken": "cannot be read: its file train.jsonl is broken: line 1 is no JSON object",
        "half": "is a folder of save_to_disk that is not whole, or has a split without rows: write it again",
        "model": "has no data files",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=rf"dataset '{tmp_path / name}' {message}") as error:
            load_rows(str(tmp_path / name), "train")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["/nonexistent", "./nowhere", "../no/where", "a/b/c", "missing.jsonl", "~/missing.csv"]
)
def test_a_path_that_does_not_exist_is_told_as_one(name):
    with pytest.raises(ValueError, match=f"dataset '{name}' does not exist"):
        load_rows(name, "train")


def test_a_hub_id_that_cannot_be_reached_is_told_with_the_way_out():
    with pytest.raises(ValueError, match=r"'someone/rows' is no file or folder here, and .*[Hh]ub.*save_to_disk"):
        load_rows("someone/rows", "train")
    with pytest.raises(ValueError, match="dataset '' does not exist"):
        load_rows("", "train")


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.jsonl.gz", "rows.json.bz2", "rows.jsonl.xz", "rows.ndjson"])
def test_files_with_other_endings_of_the_same_formats_are_read(tmp_path, name):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(GOOD.encode()))
    assert load_rows(str(tmp_path / name), "train")["text"] == ["one", "two"]


def test_a_path_from_the_home_directory_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "one"}]))
    assert load_rows("~/rows.json", "train")["text"] == ["one"]


def test_a_part_without_rows_is_told(tmp_path):
    rows = Dataset.from_dict({"text": ["one", "two"]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    splits = load_splits(str(tmp_path / "saved"))
    for part in ("train[:0]", "train[2:]"):
        with pytest.raises(
            ValueError, match=r"dataset '.*saved' has no rows in the split '.*'; there are train with 2, test with 2"
        ):
            take_split(splits, str(tmp_path / "saved"), part)
    with pytest.raises(ValueError, match=r"has the splits train, test, not 'dev'.*train\[90%:\]"):
        take_split(splits, str(tmp_path / "saved"), "dev")
