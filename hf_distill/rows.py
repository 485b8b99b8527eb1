"""Rows of a dataset: where they are, what templates make of their columns, and which tokens they are."""

import os
import reprlib
import string
from typing import Any

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """Rows of a hub dataset, a folder (of files, or written by `save_to_disk`) or a single file.

    `split` is a name, or parts and sums of splits as in `datasets`: `train[:20000]`, `train[90%:]+test`. A file and a
    folder written from a single data set have one split, `train`.

    Raises:
        `ValueError`: the file's kind is unknown, or the split does not exist.
    """
    extension = os.path.splitext(name)[1]
    if os.path.isfile(name):
        if extension not in FILE_FORMATS:
            raise ValueError(f"dataset {name!r} has to be one of {', '.join(FILE_FORMATS)}, a folder or a hub id")
        loaded = load_dataset(FILE_FORMATS[extension], data_files=name)
    elif extension in FILE_FORMATS:
        raise ValueError(f"dataset {name!r} does not exist")
    else:
        saved = any(os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))
        loaded = load_from_disk(name) if saved else load_dataset(name, config)
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({"train": loaded})
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({part: len(rows) for part, rows in loaded.items()})
    except ValueError as error:
        raise ValueError(f"dataset {name!r} has the splits {', '.join(map(str, loaded))}, not {split!r}") from error
    return concatenate_datasets([loaded[part.splitname].select(range(part.from_, part.to)) for part in parts])


def fill_templates(rows: Dataset, prompt_template: str, completion_template: str) -> Dataset:
    """Rows of `prompt` and `completion`, made of other columns by `str.format`; a backslash and an n are a new line.

    Raises:
        `ValueError`: a template names a column or a part of it that a row does not have, or that is empty (None).
    """
    templates = {"prompt": prompt_template, "completion": completion_template}
    templates = {name: template.replace("\\n", "\n") for name, template in templates.items()}

    def fill(row: dict[str, Any], index: int) -> dict[str, str]:
        found = {}
        for name, template in templates.items():
            try:
                found[name] = _RowFormatter().vformat(template, (), row)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                columns = ", ".join(f"{column}: {reprlib.repr(value)}" for column, value in row.items())
                raise ValueError(
                    f"{name}_template {template!r} does not fit row {index} ({type(error).__name__}: {error}), which "
                    f"has {columns}"
                ) from error
        return found

    return rows.map(fill, with_indices=True, remove_columns=rows.column_names)


class _RowFormatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("a value is None")
        return super().format_field(value, format_spec)


def tokenized_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """input_ids and labels of a row, and `seq_lengths` of a packed one; `ValueError` for one with unknown columns."""
    if "input_ids" in row:
        labels = row.get("labels") or row["input_ids"]
        return {"input_ids": row["input_ids"], "labels": labels, "seq_lengths": row.get("seq_lengths")}  # pyright: ignore
    if "prompt" in row and "completion" in row:
        prompt = _ids(row["prompt"], tokenizer, add_generation_prompt=True)
        ids = _ids(row["prompt"] + row["completion"], tokenizer)
        differing = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
        start = next(differing, min(len(prompt), len(ids)))
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}
    content = row.get("text", row.get("messages"))
    if content is None:
        raise ValueError(
            f"a row has the columns {', '.join(sorted(row))}; it needs 'text', 'messages', 'prompt' and 'completion', "
            "or 'input_ids'"
        )
    ids = _ids(content, tokenizer)
    return {"input_ids": ids, "labels": ids}


def _ids(content: str | list, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> list[int]:
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]  # pyright: ignore[reportReturnType]
    return tokenizer.apply_chat_template(content, add_generation_prompt=add_generation_prompt, return_dict=True)[  # pyright: ignore
        "input_ids"
    ]
