"""Files for people, beside a student: rows token by token, settings, a page."""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_distill import __version__
from hf_distill.report import markdown, measured_on, rows_with_teacher, verdict
from hf_distill.runs import TOKENS_FILE, may_matter, rows_digest, save_settings
from hf_distill.store.hub import CACHE
from hf_distill.teachers.remote import is_address

logger = logging.getLogger(__name__)

PAGE = "report.html"
# Values that TRL and transformers put in the place of defaults.
DERIVED = {"bf16": True, "activation_checkpointing": True, "pad_to_multiple_of": None}


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings of hf_distill while it lasts: rows that are cut or dropped, tokenizers that differ."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("hf_distill")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@contextmanager
def optional(what: str, folder: str) -> Iterator[None]:
    """Turns errors of what is written after a training into a message: the student is there."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a page is not worth the measures that are written after it
        logger.error(
            "%s is not written (%s: %s); the student is saved in %s", what, type(error).__name__, error, folder
        )


def write_tokens(trainer: Any, folder: str | None = None) -> None:
    """Writes what both sides say of the held-out rows, token by token, into a folder, by default that of the run.

    The main process alone comes here. Nothing is written where a part of the student is in other processes.
    """
    from hf_distill.token_comparison import compare_tokens
    from hf_distill.token_data import comparison_data

    if trainer.engine not in ("none", "DDP"):
        return
    rows, marks = _generated_rows(trainer) if hasattr(trainer, "eval_rows") else (trainer.eval_dataset, None)
    student, teacher = trainer.accelerator.unwrap_model(trainer.model), getattr(trainer, "teacher", None)
    own = {"collator": trainer.collated, "spans": trainer.picture_spans} if trainer.has_pictures else {}
    comparison = compare_tokens(
        student, teacher, rows, trainer.tokenizer,
        batch_size=trainer.args.per_device_eval_batch_size, vocab_size=trainer.vocab_size, **own,
    )  # fmt: skip
    text = json.dumps(comparison_data(comparison, marks=marks), separators=(",", ":"))
    Path(folder or trainer.args.output_dir, TOKENS_FILE).write_text(text, encoding="utf-8")


def write_card(
    trainer: Any, results: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]]
) -> None:
    """Writes the model card again, with results, in the main process alone."""
    sizes = measured_on(results, _length(trainer.eval_dataset))
    notes = [verdict(results, columns, advice=False), f"Measured on {sizes}, held out." if sizes else ""]
    text = markdown(rows_with_teacher(results, columns)) + "".join(f"\n{note}\n" for note in notes if note)
    trainer.card_facts = replace(trainer.card_facts, results=text, picture="report.png")
    folder = str(trainer.args.output_dir)
    with optional("the model card", folder):
        trainer.create_model_card(os.path.basename(os.path.normpath(folder)))


SECRETS = ("hub_token", "push_to_hub_token")
# Options that change nothing in the training, but the numbers that a card shows.
MEASURING = ("eval_dataset", "eval_split", "max_eval_rows", "baseline")


def command_line(command: str, options: Sequence[Any]) -> str:
    """The command with the options that are not the defaults, for others: without places, secrets and whole paths.

    Args:
        command: its name.
        options: an instance of each of its dataclasses.
    """
    words = [f"hf-distill {command}"]
    for each in options:
        for entry in fields(each):
            value = getattr(each, entry.name)
            is_shown = entry.init and (may_matter(entry.name) or entry.name in MEASURING) and entry.name not in SECRETS
            usual = entry.default if entry.default_factory is MISSING else entry.default_factory()
            usual = [usual, DERIVED.get(entry.name, usual)]
            if is_shown and value not in usual and isinstance(value, str | int | float | list | tuple | dict | None):
                words.append(f"--{entry.name} {_shell_words(value)}")
    return " \\\n    ".join([*words, "--output_dir out"])


def _shell_words(value: Any) -> str:
    """A value as the words of a shell."""
    if isinstance(value, list | tuple):
        return " ".join(map(_shell_words, value))
    value = _public(value)
    return shlex.quote(value if isinstance(value, str) else "None" if value is None else json.dumps(value, default=str))


def without_secrets(value: Any) -> Any:
    """The value of an option; what mappings inside of it have under names such as `token` is masked."""
    if isinstance(value, dict):
        return {k: "***" if str(k).endswith("token") else without_secrets(each) for k, each in value.items()}
    return [without_secrets(each) for each in value] if isinstance(value, list | tuple) else value


def _public(value: Any) -> Any:
    """A value of an option without keys and servers, and with the last parts of paths of this machine."""
    value = without_secrets(getattr(value, "value", value))  # of an Enum
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(?<=://)[^/]+", "SERVER", value) if is_address(value) else _without_folders(value)
    return value


def _without_folders(text: str) -> str:
    """A name, or the last part of a path, also of a store (`cache:path`) and of a source of rows with its weight."""
    if text.startswith(CACHE):
        return CACHE + _without_folders(text.removeprefix(CACHE))
    path, _, weight = text.rpartition(":")
    if not os.path.exists(text) and os.path.exists(path):
        return f"{_without_folders(path)}:{weight}"
    return os.path.basename(os.path.normpath(text)) if os.path.exists(text) or os.path.isabs(text) else text


def record(trainer: Any, settings: Mapping[str, Any], command: str, warnings: list[str], folder: str) -> None:
    """Writes the settings of a run that has ended, with what the run says of itself, in the main process alone."""
    held_out = trainer.eval_dataset
    recorded = {
        "command": command,
        "held_out": None if held_out is None else rows_digest(held_out),
        "num_rows": {
            "training": _length(trainer.train_dataset), "held-out": None if held_out is None else _length(held_out)
        },
        "versions": {"hf_distill": __version__} | {name: version(name) for name in ("torch", "transformers", "trl")},
        "warnings": warnings,
    }  # fmt: skip
    save_settings(folder, {**settings, **{name: value for name, value in recorded.items() if value is not None}})


def finish(trainer: Any, settings: Mapping[str, Any], command: str, warnings: list[str]) -> None:
    """Writes settings and page of a run that has ended, in the main process alone."""
    from hf_distill.page import save_page

    folder = str(trainer.args.output_dir)
    record(trainer, settings, command, warnings, folder)
    with optional("the page", folder):
        save_page(os.path.join(folder, PAGE), [folder])


def _length(rows: Any) -> int | None:
    return len(rows) if isinstance(rows, Dataset) else None


def _generated_rows(trainer: Any) -> tuple[Dataset, dict[int, str]]:
    """The texts of the last evaluation as rows, and by their numbers who has written their tokens."""
    rows, marks = [], {}
    for number, row in enumerate(trainer.eval_rows):
        completion = row.completion_ids
        found = {}
        for prefix, prompt in (("", row.student_prompt_ids), ("teacher_", row.teacher_prompt_ids)):
            found |= {f"{prefix}input_ids": prompt + completion}
            found |= {f"{prefix}labels": [-100] * len(prompt) + completion}
        rows.append(found)
        if row.source == "speculative":
            marks[number] = "".join("d" if is_draft else "c" for is_draft in row.drafted)
        else:
            marks[number] = {"student": "s", "teacher": "t", "dataset": "g"}[row.source] * len(completion)
    return Dataset.from_list(rows), marks
