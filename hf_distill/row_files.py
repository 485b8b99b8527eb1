"""Files, folders and hub ids to the rows that they hold, or to one line that says why they hold none."""

import bz2
import gzip
import json
import lzma
import os
import reprlib
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

FILE_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_OPEN: dict[str, Any] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARCHIVES = (".zip", ".tar", ".tgz", ".zst", ".7z", ".rar", ".lz4")
# The errors of loading for a name or a file that holds no rows, IndexError for the empty name.
_FAILURES = (
    OSError, ValueError, TypeError, RuntimeError, NotImplementedError, StopIteration, EOFError, IndexError,
    DatasetsError, HfHubHTTPError, pa.ArrowException,
)  # fmt: skip


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """Rows of one split, or of parts and sums of splits: [`load_splits`], then [`take_split`]."""
    return take_split(load_splits(name, config), name, split)


def load_splits(name: str, config: str | None = None) -> DatasetDict:
    """The splits of a hub dataset, a folder (of files, or written by `save_to_disk`) or a single file.

    A file, and a folder written from a single `Dataset`, have one split, `train`.

    Raises:
        `ValueError`: there is nothing of this name, or it cannot be read.
    """
    place = os.path.expanduser(name)
    if os.path.isfile(place):
        return _load_file(name, place)
    if os.path.isdir(place):
        return _load_folder(name, place, config)
    if not name or _is_path(name):
        raise ValueError(f"dataset {name!r} does not exist: there is no such file or folder")
    try:
        return _splits(load_dataset(name, config))
    except _FAILURES as error:
        if "Config name is missing" in str(error):
            raise ValueError(f"dataset {name!r} has several configurations: {_reason(error)}") from error
        raise ValueError(
            f"dataset {name!r} is no file or folder here, and the hub does not give it ({_reason(error)}): check the "
            "name; without a network pass a file, or a folder written by save_to_disk"
        ) from error


def take_split(splits: DatasetDict, name: str, split: str) -> Dataset:
    """Rows of a split of the dataset called `name` in errors.

    `split` is a name, or parts and sums of splits as in `datasets`: `train[:20000]`, `train[90%:]+test`.

    Raises:
        `ValueError`: there is no such split, or the part has no rows.
    """
    lengths = {part: len(rows) for part, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise ValueError(
            f"dataset {name!r} has the splits {', '.join(map(str, lengths))}, not {split!r}; a part of a split is "
            "written as train[90%:]"
        ) from error
    found = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts if part.from_ < part.to]
    if not found:
        there_are = ", ".join(f"{part} with {length}" for part, length in lengths.items())
        raise ValueError(f"dataset {name!r} has no rows in the split {split!r}; there are {there_are}")
    return concatenate_datasets(found)


def first_rows(rows: Dataset, number: int) -> Dataset:
    """The first rows, all of them where there are fewer: `Dataset.take` of datasets 4 fails past the end."""
    return rows.select(range(min(number, len(rows))))


def _is_path(name: str) -> bool:
    """True if a name can only be a path: a hub id has one slash at most, and no ending of a file."""
    return name.startswith((".", "~", "/", "\\")) or name.count("/") > 1 or _ending(name)[0] in FILE_FORMATS


def _ending(name: str) -> tuple[str, str]:
    """The ending that names the format, and that of the compression: `(".jsonl", ".gz")`."""
    path = Path(name.lower())
    if path.suffix in _OPEN and path.suffix:
        return path.with_suffix("").suffix, path.suffix
    return path.suffix, ""


def _load_file(name: str, place: str) -> DatasetDict:
    ending, compression = _ending(place)
    if ending in ARCHIVES or (compression and ending not in FILE_FORMATS):
        raise ValueError(f"dataset {name!r} is an archive: unpack it and pass what is in it")
    if ending not in FILE_FORMATS:
        kind = f"that ends in {ending}" if ending else "without an ending"
        raise ValueError(
            f"dataset {name!r} is a file {kind}, which says no known format: convert it to one of "
            f"{', '.join(FILE_FORMATS)} (compressed or not), or pass a folder or a hub id"
        )
    if not os.path.getsize(place):
        raise ValueError(f"dataset {name!r} is empty")
    try:
        return _splits(load_dataset(FILE_FORMATS[ending], data_files=place))
    except _FAILURES as error:
        raise ValueError(f"dataset {name!r} {_problem(place, error)}") from error


def _load_folder(name: str, place: str, config: str | None) -> DatasetDict:
    is_saved = any(os.path.exists(os.path.join(place, file)) for file in ("state.json", "dataset_dict.json"))
    try:
        return _splits(load_from_disk(place) if is_saved else load_dataset(place, config))
    except _FAILURES as error:
        if is_saved:
            raise ValueError(
                f"dataset {name!r} is a folder of save_to_disk that is not whole, or has a split without rows: write "
                f"it again ({_reason(error)})"
            ) from error
        files = [path for path in sorted(Path(place).rglob("*")) if _ending(path.name)[0] in FILE_FORMATS]
        if not files or isinstance(error, FileNotFoundError):
            raise ValueError(
                f"dataset {name!r} has no data files: a folder needs files that end in {', '.join(FILE_FORMATS)}, or "
                "has to be written by save_to_disk"
            ) from error
        for path in files:
            if FILE_FORMATS[_ending(path.name)[0]] == "json" and (problem := _json_problem(str(path))):
                raise ValueError(f"dataset {name!r} cannot be read: its file {path.name} {problem}") from error
        raise ValueError(f"dataset {name!r} cannot be read: {_reason(error)}") from error


def _splits(loaded: Dataset | DatasetDict) -> DatasetDict:
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({"train": loaded})
    return loaded


# ------------------------------------------------------------------------------------------- why a file cannot be read


def _problem(place: str, error: BaseException) -> str:
    """Why a file cannot be read, as the end of a sentence that starts with its name."""
    ending, _ = _ending(place)
    if "corresponds to no data" in str(error):  # of blank lines, and of a header alone
        return "has no rows"
    if FILE_FORMATS[ending] == "json" and (problem := _json_problem(place)):
        return problem
    return f"cannot be read as {FILE_FORMATS[ending]}: {_reason(error)}"


def _json_problem(place: str) -> str | None:
    """The first line of a JSON file that is no JSON object, or what is wrong with the whole; None if nothing is."""
    ending, compression = _ending(place)
    try:
        with _OPEN[compression](place, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError:
        return "is no text in UTF-8: save it as UTF-8"
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        return f"is not a whole {compression} file ({_reason(error)}): unpack it by hand, or pack it again"
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        return "has no rows"
    if ending == ".json" and not _is_object(lines[0][1]):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"is no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        return None
    number, line = next(((number, line) for number, line in lines if not _is_object(line)), (0, ""))
    return f"is broken: line {number} is no JSON object: {reprlib.repr(line)}" if number else None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _reason(error: BaseException) -> str:
    """The innermost cause on one line: datasets raises 'An error occurred' around it."""
    while isinstance(error, DatasetsError) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split())[:300] or type(error).__name__
