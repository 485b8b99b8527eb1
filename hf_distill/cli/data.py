"""Rows of `kd`, `kv`, `skd` and `evaluate`, as the options say."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from hf_distill.cli.arguments import PromptArguments, SFTArguments, TemplateArguments
from hf_distill.cli.mixing import Source, mixed, read_sources
from hf_distill.collators import LUPICollator
from hf_distill.picture_rows import picture_column, relative_to
from hf_distill.row_files import first_rows, load_rows, load_splits, take_split
from hf_distill.rows import fill_templates, used_format
from hf_distill.trainers.hard_label_config import HardLabelConfig


def refuse_one_template(arguments: SFTArguments | TemplateArguments) -> None:
    """Raises `ValueError` for a template of prompts without one of completions, or the reverse."""
    if (arguments.prompt_template is None) != (arguments.completion_template is None):
        raise ValueError("prompt_template and completion_template go together: give both or neither")


def load_datasets(arguments: SFTArguments, args: HardLabelConfig) -> tuple[Dataset, Dataset | None]:
    """Training rows, of several sources a mix, and held-out rows if there are any, with the templates filled in.

    Raises:
        `ValueError`: rows that cannot be loaded or mixed, or one template without the other.
    """
    refuse_one_template(arguments)
    sources = read_sources(arguments.dataset)
    if len(sources) > 1:
        _refuse_for_several(arguments)
    splits = {source: load_splits(source.name, arguments.dataset_config) for source in sources}
    parts = {
        source: filled(placed(take_split(found, source.name, arguments.train_split), source.name), arguments)
        for source, found in splits.items()
    }
    if len(sources) == 1:
        (source,) = sources
        return parts[source], _held_out_rows(arguments, source.name, splits[source])
    _refuse_other_columns(arguments, parts, args.dataset_text_field)
    eval_rows = _held_out_rows(arguments)
    return mixed(parts, args.seed if args.data_seed is None else args.data_seed), eval_rows


def _held_out_rows(arguments: SFTArguments, name: str = "", splits: DatasetDict | None = None) -> Dataset | None:
    """Rows of `eval_dataset`; without it the `eval_split` or the split `test` of the one dataset to train on."""
    if arguments.eval_dataset is not None:
        only_split = "train" if os.path.isfile(os.path.expanduser(arguments.eval_dataset)) else "test"
        rows = placed(load_rows(arguments.eval_dataset, arguments.eval_split or only_split), arguments.eval_dataset)
    elif splits is not None and (arguments.eval_split is not None or "test" in splits):
        rows = placed(take_split(splits, name, arguments.eval_split or "test"), name)
    else:
        return None
    return filled(first_rows(rows, arguments.max_eval_rows), arguments)


def filled(rows: Dataset, arguments: SFTArguments | TemplateArguments) -> Dataset:
    """Rows with the templates of the command filled in, beside their pictures."""
    if arguments.prompt_template is None or arguments.completion_template is None:
        return rows
    pictures = picture_column(rows.column_names)
    keep = [pictures, getattr(arguments, "answer_column", None)]
    rows = fill_templates(rows, arguments.prompt_template, arguments.completion_template, keep=keep)
    if pictures is None:
        return rows

    # As messages: a text by itself would need the mark that its processor has for a picture.
    def as_messages(prompt: str, completion: str) -> dict[str, list[dict[str, str]]]:
        found = {"prompt": ("user", prompt), "completion": ("assistant", completion)}
        return {name: [{"role": role, "content": text}] for name, (role, text) in found.items()}

    return rows.map(as_messages, input_columns=["prompt", "completion"])


def placed(rows: Dataset, name: str) -> Dataset:
    """Rows whose pictures are found beside the file that names them."""
    place = os.path.expanduser(name)
    return relative_to(rows, os.path.dirname(os.path.abspath(place))) if os.path.isfile(place) else rows


def _refuse_for_several(arguments: SFTArguments) -> None:
    """Raises `ValueError` for options that mean one source."""
    if arguments.dataset_config is not None:
        raise ValueError("--dataset_config is for one source of --dataset: of several, save this one's rows to a file")
    if arguments.eval_split is not None and arguments.eval_dataset is None:
        raise ValueError("--eval_split of several sources needs --eval_dataset: the source of the held-out rows")


def _refuse_other_columns(arguments: SFTArguments, parts: Mapping[Source, Dataset], text_field: str) -> None:
    """Raises `ValueError` for sources whose rows would be read from different columns."""
    read = {source.name: _read_columns(arguments, {*part.column_names}, text_field) for source, part in parts.items()}
    if len(set(read.values())) > 1:
        found = "; ".join(f"{name}: {', '.join(columns) or 'none'}" for name, columns in read.items())
        raise ValueError(
            f"the sources of --dataset would be read from different columns ({found}): give them the same ones"
        )


def _read_columns(arguments: SFTArguments, columns: set[str], text_field: str) -> tuple[str, ...]:
    if not isinstance(arguments, PromptArguments):
        return used_format(columns, text_field)
    question = arguments.prompt_column if arguments.knowledge_column is None else arguments.query_column
    return tuple(name for name in (question, "messages", arguments.completion_column) if name in columns)


def with_prompts(rows: Dataset, arguments: PromptArguments) -> Dataset:
    """Rows with the columns `prompt` and `completion`, whatever they are called in the file."""
    names = {arguments.prompt_column: "prompt", arguments.completion_column: "completion"}
    for column, name in names.items():
        if column in (None, name):
            continue
        if column not in rows.column_names:
            raise ValueError(f"--{name}_column {column!r} is no column; the rows have {', '.join(rows.column_names)}")
        if name in rows.column_names:
            raise ValueError(
                f"--{name}_column {column!r}: the rows have a column {name!r} as well; rename or remove it in the file"
            )
        rows = rows.rename_column(column, name)

    def as_chat(row: dict[str, str]) -> dict[str, list]:
        roles = {"prompt": "user", "completion": "assistant"}
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items() if name in row}

    return rows.map(as_chat) if arguments.as_chat else rows


def refuse_ignored(arguments: Any) -> None:
    """Raises `ValueError` for options of `skd` and `evaluate` that belong to the other kind of rows."""
    lupi = ("query_column", "system_prompt", "few_shot", "knowledge_template", "allow_missing_knowledge")
    lupi = (*lupi, "max_prompt_length")
    plain = ("prompt_column", "as_chat", "prompt_template", "completion_template")
    ignored = lupi if arguments.knowledge_column is None else plain
    defaults = {entry.name: entry.default for entry in fields(arguments)}
    if given := [name for name in ignored if getattr(arguments, name) != defaults[name]]:
        need = "needs" if arguments.knowledge_column is None else "does not go together with"
        raise ValueError(f"--{given[0]} {need} --knowledge_column")
    renamed = [name for name in ("prompt_column", "completion_column") if getattr(arguments, name) != defaults[name]]
    if renamed and arguments.prompt_template is not None:
        raise ValueError(f"--{renamed[0]} does not go together with --prompt_template, which makes the columns itself")


def lupi_collator(arguments: PromptArguments, tokenizer: PreTrainedTokenizerBase) -> LUPICollator:
    """The collator of `skd` and `evaluate` with `--knowledge_column`."""
    few_shot = ()
    if arguments.few_shot is not None:
        few_shot = _read_turns(arguments.few_shot)
    template = {} if arguments.knowledge_template is None else {"knowledge_template": arguments.knowledge_template}
    return LUPICollator(
        tokenizer,
        query_column=arguments.query_column,
        knowledge_column=str(arguments.knowledge_column),
        system_prompt=arguments.system_prompt,
        few_shot=few_shot,
        completion_column=arguments.completion_column,
        allow_missing_knowledge=arguments.allow_missing_knowledge,
        max_prompt_length=arguments.max_prompt_length,
        **template,
    )


def _read_turns(path: str) -> list[dict[str, str]]:
    if not os.path.isfile(path):
        raise ValueError(f"few_shot file {path!r} does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            turns = json.load(file)
    except ValueError as error:
        raise ValueError(f"few_shot file {path!r} is no JSON: {error}") from error
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"few_shot file {path!r} has to hold a list of turns, each an object with query, knowledge and answer"
        )
    return turns
