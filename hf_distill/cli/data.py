"""Rows of `kd`, `kv` and `skd`, as the options say."""

import json
import os
from dataclasses import fields

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_distill.cli.arguments import KDArguments, SKDArguments
from hf_distill.collators import LUPICollator
from hf_distill.rows import fill_templates, first_rows, load_rows


def load_datasets(arguments: KDArguments) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where there are any, with the templates filled in.

    Raises:
        `ValueError`: rows that cannot be loaded, or one template without the other.
    """
    train_rows = load_rows(arguments.dataset, arguments.train_split, arguments.dataset_config)
    eval_rows = _held_out_rows(arguments)
    if arguments.prompt_template is None and arguments.completion_template is None:
        return train_rows, eval_rows
    if arguments.prompt_template is None or arguments.completion_template is None:
        raise ValueError("prompt_template and completion_template go together: give both or neither")
    templates = arguments.prompt_template, arguments.completion_template
    return fill_templates(train_rows, *templates), eval_rows and fill_templates(eval_rows, *templates)


def _held_out_rows(arguments: KDArguments) -> Dataset | None:
    if arguments.eval_dataset is not None:
        only_split = "train" if os.path.isfile(arguments.eval_dataset) else "test"
        rows = load_rows(arguments.eval_dataset, arguments.eval_split or only_split)
    elif arguments.eval_split is not None:
        rows = load_rows(arguments.dataset, arguments.eval_split, arguments.dataset_config)
    elif os.path.isfile(arguments.dataset):
        return None
    else:
        try:
            rows = load_rows(arguments.dataset, "test", arguments.dataset_config)
        except ValueError:
            return None  # a dataset without a test split, and none was asked for
    return first_rows(rows, arguments.max_eval_rows)


def with_prompts(rows: Dataset, arguments: SKDArguments) -> Dataset:
    """Rows with the columns `prompt` and `completion`, whatever they are called in the file."""
    names = {arguments.prompt_column: "prompt", arguments.completion_column: "completion"}
    for column, name in names.items():
        if column not in (None, name):
            rows = rows.rename_column(column, name)

    def as_chat(row: dict[str, str]) -> dict[str, list]:
        roles = {"prompt": "user", "completion": "assistant"}
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items() if name in row}

    return rows.map(as_chat) if arguments.as_chat else rows


def refuse_ignored(arguments: SKDArguments) -> None:
    """Raises `ValueError` for options of `skd` that belong to the other kind of rows."""
    lupi = ("query_column", "system_prompt", "few_shot", "knowledge_template", "allow_missing_knowledge")
    lupi = (*lupi, "max_prompt_length")
    plain = ("prompt_column", "as_chat", "prompt_template", "completion_template")
    ignored = lupi if arguments.knowledge_column is None else plain
    defaults = {entry.name: entry.default for entry in fields(SKDArguments)}
    if given := [name for name in ignored if getattr(arguments, name) != defaults[name]]:
        need = "needs" if arguments.knowledge_column is None else "does not go together with"
        raise ValueError(f"--{given[0]} {need} --knowledge_column")
    renamed = [name for name in ("prompt_column", "completion_column") if getattr(arguments, name) != defaults[name]]
    if renamed and arguments.prompt_template is not None:
        raise ValueError(f"--{renamed[0]} does not go together with --prompt_template, which makes the columns itself")


def lupi_collator(arguments: SKDArguments, tokenizer: PreTrainedTokenizerBase) -> LUPICollator:
    """The collator of `skd` with `--knowledge_column`."""
    few_shot = ()
    if arguments.few_shot is not None:
        if not os.path.isfile(arguments.few_shot):
            raise ValueError(f"few_shot file {arguments.few_shot!r} does not exist")
        with open(arguments.few_shot, encoding="utf-8") as file:
            few_shot = json.load(file)
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
