"""Data sets on their way into a trainer: which of their columns are read, in which format, and which rows count."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import nested_truncate
from transformers.trainer_utils import PredictionOutput
from trl import SFTConfig
from trl.data_utils import get_dataset_column_names

from hf_distill.rows import (
    ALIASES,
    CHAT_COLUMNS,
    KNOWN_ROLES,
    PICTURE,
    PICTURES,
    is_chat,
    is_conversation,
    need_chat_template,
    refuse_other_form,
    refuse_other_tools,
    used_format,
    with_messages,
)
from hf_distill.teachers.columns import OWN_COLUMNS
from hf_distill.token_rows import (
    COLUMNS,
    PEEKED_ROWS,
    Cut,
    Limits,
    check_row,
    check_rows,
    count_cut,
    has_label,
    rows_with_label,
)
from hf_distill.trainers.checks import AnyDataset

logger = logging.getLogger(__name__)

# Columns that are a format of TRL's, or a part of one. Of several, one is used, and the rest would disturb it.
FORMAT_COLUMNS = {"prompt", "completion", "messages", "conversations", "chosen", "rejected"}
# Columns that are read beside those of a format.
READ_BESIDE = {
    "input_ids": {"labels", "completion_mask", "assistant_masks", "seq_lengths"},
    "text": {"tools", "chat_template_kwargs", PICTURES, PICTURE},
}
READ_BY_TEACHERS = {"teacher_prompt", "teacher_index", "teacher_input_ids", "teacher_labels"}
# Columns whose owner expects that they change the training.
EXPECTED_TO_COUNT = {
    "system",
    "system_prompt",
    "teacher",
    "teacher_index",
    "weight",
    "weights",
    "sample_weight",
    "loss_mask",
    "loss_weight",
}


def over_datasets(function: Callable[[AnyDataset, str], AnyDataset], train: Any, evaluation: Any) -> tuple[Any, Any]:
    """`function(data set, name)` of the training rows and of all held-out ones."""
    if isinstance(evaluation, dict):
        return function(train, "train"), {name: function(rows, name) for name, rows in evaluation.items()}
    return function(train, "train"), evaluation if evaluation is None else function(evaluation, "eval")


def check_columns(dataset: AnyDataset, name: str, args: Any, has_formatting: bool) -> None:
    """Raises `ValueError` for a dataset without rows or text, or with columns that nobody would follow."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"the {name} dataset is empty")
    columns = set(row)
    text_field = args.dataset_text_field
    if not has_formatting and not used_format(columns, text_field):
        raise ValueError(
            f"the {name} dataset has the columns {', '.join(sorted(columns))}; it needs {text_field!r}, 'messages', "
            "'prompt' and 'completion', or 'input_ids'. Rename a column, set dataset_text_field, or make a text of "
            "other columns: with --prompt_template and --completion_template of the command line, or formatting_func"
        )
    refuse_unread(columns, name, READ_BY_TEACHERS)
    for_tokens = columns & {"labels", "completion_mask", "assistant_masks"}
    is_prepared = args.skips_preparation
    if for_tokens and not is_prepared and "input_ids" not in columns:
        raise ValueError(
            f"the {name} dataset has {sorted(for_tokens)[0]!r}, which speaks of tokens, but no 'input_ids': remove or "
            "rename it, or give the tokens"
        )
    if "completion_mask" in columns and "labels" not in columns and args.completion_only_loss is None:
        raise ValueError(
            f"the completion_mask of the {name} dataset is read with completion_only_loss=True alone: set it, or set "
            "it to False to train on all tokens"
        )
    if "seq_lengths" in columns and not args.keeps_documents_apart:
        raise ValueError(
            f"the rows of the {name} dataset are packed (seq_lengths), and their documents would see each other: set "
            "packing=True, or padding_free=True with max_length=None"
        )


def check_chat_template(
    dataset: AnyDataset, name: str, args: Any, tokenizer: PreTrainedTokenizerBase, whose: str, setting: str
) -> None:
    """Raises `ValueError` for conversations that the tokenizer cannot turn into text; `setting` gives it a template."""
    row = next(iter(dataset))
    read = {*(used_format(set(row), args.dataset_text_field) or CHAT_COLUMNS), "teacher_prompt"}
    chats = "input_ids" not in row and any(is_chat(row.get(column)) for column in read)
    if chats:
        need_chat_template(tokenizer, f"the {name} dataset has conversations", whose, setting)


def refuse_unread(columns: set[str], name: str, read: set[str]) -> None:
    """Raises `ValueError` for a column that is called as if it were the teacher's, and that nothing reads."""
    made = re.compile(rf"teacher_\d+_({'|'.join(OWN_COLUMNS)})")
    if unread := [c for c in sorted(columns - read) if c.startswith("teacher_") and not made.fullmatch(c)]:
        raise ValueError(
            f"the {name} dataset has a column {unread[0]!r}, which nothing reads: what the teacher says is computed. "
            f"Remove or rename it; of the teacher's columns there are {', '.join(sorted(read))}"
        )


def tell_columns(dataset: AnyDataset, name: str, args: Any) -> None:
    """Says in one line which columns are read and which are not; a warning if one looks as if it should count."""
    columns = set(next(iter(dataset)))
    used = set(used_format(columns, args.dataset_text_field))
    read = used | READ_BESIDE["input_ids" if "input_ids" in used else "text"]
    combination = getattr(args, "teacher_combination", None)  # a trainer on hard labels has no teacher
    if combination is not None:
        read |= READ_BY_TEACHERS | {"teacher"} if combination == "route" else READ_BY_TEACHERS - {"teacher_index"}
    if left := sorted(c for c in columns - read if not re.match(r"teacher_\d+_", c)):
        level = logging.WARNING if EXPECTED_TO_COUNT & set(left) else logging.INFO
        logger.log(level, "of the %s dataset %s is read; not read: %s", name, ", ".join(sorted(used)), ", ".join(left))


def tell_conversations(dataset: AnyDataset, name: str, args: Any) -> None:
    """Warns of roles that templates may not know, and that conversations are trained on as a whole."""
    columns = set(get_dataset_column_names(dataset))
    used = used_format(columns, args.dataset_text_field)
    if unknown := sorted(_roles(dataset, used) - KNOWN_ROLES):
        logger.warning(
            "messages of the %s dataset have the role %s: a chat template that does not know it may leave the message "
            "out, or write it as it is", name, " and ".join(map(repr, unknown)),
        )  # fmt: skip
    if name == "train" and is_conversation(columns, args.dataset_text_field) and not args.assistant_only_loss:
        logger.warning(
            "every token of the conversations is trained on, those of system prompts and questions too: "
            "assistant_only_loss=True, or rows with 'prompt' and 'completion', leaves the labels to the answers"
        )


def brought(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """[`one_format`] of what the caller brings; says once which columns are read, and what is in them."""
    tell_columns(dataset, name, args)
    dataset = one_format(dataset, name, args)
    tell_conversations(dataset, name, args)
    return _with_assistant(dataset, name, args) if args.assistant_only_loss else dataset


def _with_assistant(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """Rows in which the assistant says something; TRL would end the run at another one. A warning counts those."""
    used = used_format(set(get_dataset_column_names(dataset)), args.dataset_text_field)
    kept = dataset.filter(partial(_has_assistant, used=used))
    if isinstance(dataset, Dataset) and isinstance(kept, Dataset) and len(kept) < len(dataset):
        logger.warning(
            "%d of %d %s rows have no message of the assistant, so with assistant_only_loss no label: they are dropped",
            len(dataset) - len(kept), len(dataset), name,
        )  # fmt: skip
        refuse_no_label(kept, name, args)
    return kept


def _has_assistant(row: Mapping[str, Any], used: Sequence[str]) -> bool:
    cells = [row[column] for column in used if is_chat(row[column])]
    return not cells or any(message.get("role") == "assistant" for cell in cells for message in cell)


def one_format(dataset: AnyDataset, name: str, args: Any) -> AnyDataset:
    """A data set with the columns of one format, whose conversations are messages with `role` and `content`.

    TRL takes columns of several formats for what comes first, and appends the end of text to another one.

    Raises:
        `ValueError`: a row without a text in these columns, or with a role that no template knows.
    """
    columns = set(get_dataset_column_names(dataset))
    used = used_format(columns, args.dataset_text_field)
    if used in ((), ("input_ids",)):
        return dataset
    if others := sorted(columns & (FORMAT_COLUMNS | {args.dataset_text_field}) - set(used)):
        logger.warning(
            "the rows of the %s dataset are read from %s; left out: %s", name, ", ".join(used), ", ".join(others)
        )
        dataset = dataset.remove_columns(others)
    all_columns = ", ".join(sorted(columns))
    function = partial(_one_format, used=used, name=name, all_columns=all_columns)
    gone = ["conversations"] if used == ("conversations",) else None
    if not isinstance(dataset, Dataset):
        return dataset.map(function, with_indices=True, remove_columns=gone)
    if dataset.format["type"] == "custom":
        return dataset  # TRL refuses it in words
    _refuse_missing(dataset, used, name, all_columns)
    # Arrow has one form for all rows, unless they are JSON.
    rows: Any = dataset.select_columns(list(used)) if any(_is_json(dataset, c) for c in used) else [dataset[0]]
    for index, row in enumerate(rows):
        refuse_other_form(row, used, f"row {index} of the {name} dataset")
    if "tools" in dataset.column_names and not pa.types.is_list(dataset.data.column("tools").type):
        for index, cell in enumerate(dataset["tools"]):
            refuse_other_tools(cell, f"row {index} of the {name} dataset")
    if not gone and not any(_has_other_roles(dataset, column) for column in CHAT_COLUMNS):
        return dataset
    what = f"Converting {name} dataset to messages"
    with args.main_process_first(desc=what):
        return dataset.map(function, with_indices=True, remove_columns=gone, num_proc=args.dataset_num_proc, desc=what)


def formatted(dataset: AnyDataset, name: str, args: Any, formatting_func: Callable[..., str]) -> AnyDataset:
    """A data set with the text that `formatting_func` makes of each row, in the place of columns that are a format."""
    columns = set(get_dataset_column_names(dataset))
    # TRL would leave these, and read them rather than the text.
    gone = sorted(columns & (FORMAT_COLUMNS - {args.dataset_text_field}))
    function = partial(_formatted, formatting_func=formatting_func, text_field=args.dataset_text_field)
    if not isinstance(dataset, Dataset):
        return dataset.map(function, remove_columns=gone)
    if dataset.format["type"] == "custom":
        return dataset  # TRL refuses it in words
    what = f"Applying formatting function to {name} dataset"
    with args.main_process_first(desc=what):
        return dataset.map(function, remove_columns=gone, num_proc=args.dataset_num_proc, desc=what)


def checked(dataset: AnyDataset, name: str, limits: Limits, args: SFTConfig) -> AnyDataset:
    """The same rows; `ValueError` for one that is not what [`Limits`] allow, of a stream when it comes to it."""
    if isinstance(dataset, Dataset):
        check_rows(dataset, name, limits, args.dataset_num_proc)
        return dataset
    return dataset.filter(partial(_is_allowed, name=name, limits=limits), with_indices=True)


def with_label(dataset: AnyDataset, name: str, limits: Limits | None, args: SFTConfig) -> AnyDataset:
    """The rows that have a label; with `limits`, also [`checked`]."""
    if not isinstance(dataset, Dataset):
        return dataset.filter(partial(_is_trained, name=name, limits=limits), with_indices=True)
    found = rows_with_label(dataset, name, limits, args.dataset_num_proc)
    return dataset if found.all() else dataset.select(np.flatnonzero(found))


def as_they_are(dataset: AnyDataset, name: str, limits: Limits, args: SFTConfig) -> AnyDataset:
    """Rows that are trained on unprepared; `ValueError` for what [`checked`] and [`refuse_no_label`] refuse."""
    first = dataset if isinstance(dataset, Dataset) else dataset.take(PEEKED_ROWS)
    kept = with_label(first, name, limits, args)
    refuse_no_label(kept, name, args, is_stream=not isinstance(dataset, Dataset))
    return dataset if isinstance(dataset, Dataset) else checked(dataset, name, limits, args)


def cut_labels(dataset: Dataset, name: str, args: SFTConfig) -> Cut | None:
    """The labels that `max_length` cuts off tokenised rows; None for rows that a collator of their own prepares."""
    if "input_ids" not in dataset.column_names or args.max_length is None:
        return None
    keep_end = args.truncation_mode == "keep_end"
    return count_cut(dataset, name, args.max_length, keep_end=keep_end, num_threads=args.dataset_num_proc)


def refuse_no_label(
    kept: AnyDataset, name: str, args: SFTConfig, cut: Cut | None = None, *, is_stream: bool = False
) -> None:
    """Raises `ValueError` if no row has been kept, of a stream none of the first `PEEKED_ROWS`."""
    if next(iter(kept), None) is None:
        which = f"none of the first {PEEKED_ROWS:,} rows" if is_stream else "no row"
        filled = "" if cut is None or not cut.filled else f" ({_filled(cut.filled, args)})"
        raise ValueError(
            f"{which} of the {name} dataset has a label left to train on{filled}; check max_length "
            f"({args.max_length}), completion_only_loss, assistant_only_loss and the chat template"
        )


def refuse_too_few(dataset: Any, args: SFTConfig) -> None:
    """Raises `ValueError` if dropping the rows that fill no batch (`dataloader_drop_last`) leaves no training row."""
    accelerator: Any = args.accelerator_config
    rows = args.train_batch_size * (1 if accelerator.split_batches else args.world_size)
    if args.train_sampling_strategy == "batch_rebalance":  # which balances whole updates
        rows *= args.gradient_accumulation_steps
    if args.dataloader_drop_last and isinstance(dataset, Dataset) and len(dataset) < rows:
        raise ValueError(
            f"the train dataset has {len(dataset)} rows, and dataloader_drop_last=True drops what does not fill "
            f"{rows} rows, a batch for every process: nothing would be trained on. Set it to False, or "
            "per_device_train_batch_size to less"
        )


def tell_lost_labels(num_rows: int, num_dropped: int, name: str, cut: Cut | None, args: SFTConfig) -> None:
    """Warns of rows that are dropped because they have no label, with the reason, and of rows that lose some."""
    if num_dropped:
        filled = 0 if cut is None else cut.filled
        reasons = [_filled(filled, args)] if filled else []
        if others := num_dropped - filled:
            reasons.append(
                f"{others} have none at any length (see their labels and masks, completion_only_loss and "
                "assistant_only_loss)"
            )
        logger.warning(
            "%d of %d %s rows have no label and are dropped: %s", num_dropped, num_rows, name, "; ".join(reasons)
        )
    if cut is not None and cut.shortened:
        logger.warning(
            "%d of %d %s rows are longer than max_length=%s and cut: they lose %.1f%% of all label-bearing tokens, the "
            "%s of their answers among them. Raise max_length, or shorten the rows",
            cut.shortened, num_rows, name, args.max_length, 100 * cut.lost / cut.labels,
            "beginnings" if args.truncation_mode == "keep_end" else "ends",
        )  # fmt: skip


def tell_uncounted(name: str, num_rows: int, args: SFTConfig) -> None:
    """Says of a stream that its rows are dropped and cut as they come, and that the first ones alone are counted."""
    cut = "" if args.max_length is None else f", and rows longer than max_length={args.max_length} are cut"
    logger.warning(
        "the %s dataset is a stream: rows without a label are dropped%s, as they come; its first %d rows alone are "
        "counted", name, cut, num_rows,
    )  # fmt: skip


def tell_cut_completions(cut: Iterable[bool], name: str, limit: int) -> None:
    """Warns of completions, one value each, that are cut at `max_new_tokens`."""
    found = [*cut]
    if any(found):
        logger.warning("%d of %d %s end at max_new_tokens=%d", sum(found), len(found), name, limit)


def filled_up(dataset: AnyDataset, size: int, filler: Callable[[dict[str, Any]], dict[str, Any] | None]) -> AnyDataset:
    """A data set of a multiple of `size` rows: without it accelerate would repeat rows, which then count.

    Rows that count for nothing are added at its end; `filler` makes one of the first row, or None.
    """
    if not isinstance(dataset, Dataset) or (missing := -len(dataset) % size) == 0:
        return dataset
    if (row := filler(dataset[0])) is None:
        return dataset
    return concatenate_datasets([dataset, Dataset.from_list([row] * missing, features=dataset.features)])


def without_fillers(found: PredictionOutput, dataset: AnyDataset) -> PredictionOutput:
    """Predictions without those of the rows that fill up the batches of several processes."""
    if not isinstance(dataset, Dataset):
        return found
    cut = partial(nested_truncate, limit=len(dataset))
    parts = {name: getattr(found, name) for name in ("predictions", "label_ids")}
    return found._replace(**{name: cut(part) for name, part in parts.items() if part is not None})


def _filled(count: int, args: SFTConfig) -> str:
    if args.truncation_mode == "keep_end":
        return f"the labels of {count} lie before the last max_length={args.max_length} tokens: raise it"
    return f"the prompts of {count} fill max_length={args.max_length}: raise it, or shorten the prompts"


def _is_allowed(row: Mapping[str, Any], index: int, name: str, limits: Limits) -> bool:
    if missing := [column for column in COLUMNS if column in row and row[column] is None]:
        raise ValueError(f"row {index} of the {name} dataset has no {missing[0]} (None)")
    check_row(row, f"row {index} of the {name} dataset", limits)
    return True


def _is_trained(row: Mapping[str, Any], index: int, name: str, limits: Limits | None) -> bool:
    if row.get("input_ids") is None:
        return True  # of a data set that is prepared by its own collator
    if limits is not None:
        _is_allowed(row, index, name, limits)
    return has_label(row)


def _formatted(row: dict[str, Any], formatting_func: Callable[..., str], text_field: str) -> dict[str, str]:
    return {text_field: formatting_func(row)}


def _one_format(row: dict[str, Any], index: int, used: tuple[str, ...], name: str, all_columns: str) -> dict[str, Any]:
    for column in used:
        _refuse_missing_cell(row.get(column), column, index, name, all_columns)
    refuse_other_form(row, used, f"row {index} of the {name} dataset")
    refuse_other_tools(row.get("tools"), f"row {index} of the {name} dataset")
    return with_messages(row, f"row {index} of the {name} dataset")


def _refuse_missing(dataset: Dataset, used: tuple[str, ...], name: str, all_columns: str) -> None:
    for column in used:
        cells = dataset.data.column(column)  # of all rows that are kept, chosen or not
        is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
        if cells.null_count or (is_list and any(0 in chunk.value_lengths().to_pylist() for chunk in cells.chunks)):
            for index, cell in enumerate(dataset[column]):
                _refuse_missing_cell(cell, column, index, name, all_columns)


def _refuse_missing_cell(cell: Any, column: str, index: int, name: str, all_columns: str) -> None:
    if cell is None or (isinstance(cell, list) and not cell):
        raise ValueError(
            f"row {index} of the {name} dataset has no {column!r}, from which the rows of this data set are read (it "
            f"has the columns {all_columns}): bring rows of several formats to one before they are joined, or drop "
            "this one"
        )


def _is_json(dataset: Dataset, column: str) -> bool:
    """True for a column whose cells may have different types: datasets keeps them as JSON."""
    return isinstance(dataset.data.column(column).type, pa.BaseExtensionType)


def _has_other_roles(dataset: Dataset, column: str) -> bool:
    """True if messages have `from` and `value`, no text, or roles under names that templates do not know."""
    if column not in dataset.column_names:
        return False
    cells = dataset.data.column(column)
    kind = getattr(cells.type, "value_type", None)
    if kind is None or not pa.types.is_struct(kind):  # JSON, in which messages may have different keys
        cells = dataset[column] if is_chat(dataset[0][column]) else ()
        return any(_is_other(message) for cell in cells for message in cell or ())
    names = {field.name for field in kind}
    if not names >= {"role", "content"} or names & {"from", "value"}:
        return True
    chunks = [chunk.flatten() for chunk in cells.chunks]
    contents = [chunk.field("content") for chunk in chunks]
    if any(chunk.field("role").null_count for chunk in chunks):
        return True
    if any(c.null_count or not (pa.types.is_string(c.type) or pa.types.is_large_string(c.type)) for c in contents):
        return True
    return any(ALIASES & set(chunk.field("role").unique().to_pylist()) for chunk in chunks)


def _roles(dataset: AnyDataset, columns: Sequence[str]) -> set[str]:
    """The roles of the messages in these columns, of a stream those of its first rows; none of texts."""
    first = next(iter(dataset))
    chats = [column for column in columns if is_chat(first[column])]
    if not chats:
        return set()
    if not isinstance(dataset, Dataset) or any(_is_json(dataset, column) for column in chats):
        rows: Any = dataset if isinstance(dataset, Dataset) else dataset.take(100)
        return {message["role"] for row in rows for column in chats for message in row[column]}
    tables: Any = dataset.select_columns(chats).with_format("arrow").iter(10_000)
    cells = (table.column(column).combine_chunks().flatten() for table in tables for column in chats)
    return {role for messages in cells for role in messages.field("role").unique().to_pylist()}


def _is_other(message: Any) -> bool:
    if not isinstance(message, Mapping) or message.get("role") is None:
        return True
    has_text = isinstance(message.get("content"), str)
    return not has_text or bool({"from", "value"} & message.keys()) or message.get("role") in ALIASES
