"""Rows of a dataset: what templates make of their columns, their conversations, and their tokens."""

import json
import reprlib
import string
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

# Columns that may hold a conversation.
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "teacher_prompt")
PICTURES, PICTURE = "images", "image"  # columns of several pictures of a row, or of one
# Names of roles in messages with `from` and `value`, and the roles that chat templates know.
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "chatbot", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
KNOWN_ROLES = {*ROLES.values(), "developer"}
# Names that no template knows. They are renamed in messages with `role` and `content`, too.
ALIASES = {"human", "gpt", "chatgpt", "bing", "bard"}


def fill_templates(
    rows: Dataset, prompt_template: str, completion_template: str, keep: Iterable[str | None] = ()
) -> Dataset:
    """Rows of `prompt` and `completion`, formatted from other columns by `str.format`, and of the columns to `keep`.

    The two characters \\n are a new line, as a shell passes them.

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

    others = [name for name in rows.column_names if name not in keep]
    return rows.map(fill, with_indices=True, remove_columns=others)


class _RowFormatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("a value is None")
        return super().format_field(value, format_spec)


def is_chat(cell: Any) -> bool:
    """True for a list of messages, whatever their keys are called."""
    return isinstance(cell, list | tuple) and len(cell) > 0 and isinstance(cell[0], dict)


def chat(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, of a row called `name` in errors; `from` and `value` are renamed.

    Raises:
        `ValueError`: a message that is no dict, has no role or one that no template knows, or content that is no text.
    """
    found = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(
                f"a message of {name} is {reprlib.repr(message)}; messages are dicts with 'role' and 'content'"
            )
        role, is_renamed = message.get("role"), message.get("role") is None
        role = message.get("from") if is_renamed else role
        if role is None or (is_renamed and role not in ROLES):
            has = f"the role {role!r}" if role is not None else f"no role, but the keys {', '.join(message)}"
            raise ValueError(
                f"a message of {name} has {has}; messages need 'role' and 'content', or 'from', one of "
                f"{', '.join(ROLES)}, and 'value'. Rename the role, or drop the row"
            )
        kept = {key: value for key, value in message.items() if key not in ("role", "from", "value")}
        if "value" in message and (message["value"] is not None or "content" not in message):
            kept["content"] = message["value"]
        if "content" in kept:
            kept["content"] = _joined_parts(kept["content"], name)
        if kept.get("content") is None and not any(kept.values()):
            raise ValueError(
                f"a message of {name} has no content, but the keys {', '.join(message)}: templates would make an empty "
                "text of it, or the word None. Messages need 'content' or 'value'"
            )
        if not isinstance(kept.get("content"), str | None):
            raise ValueError(
                f"a message of {name} has {reprlib.repr(kept['content'])} as its content, which has to be text"
            )
        found.append({"role": ROLES[role] if is_renamed or role in ALIASES else role, **kept})
    return found


def _joined_parts(content: Any, name: str) -> Any:
    """Content that comes in parts as one text: templates of language models print a list as a list."""
    if not isinstance(content, list | tuple):
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise ValueError(
            f"a message of {name} has content in parts that are no text: hf_distill trains language models on text only"
        )
    return "".join(texts)


def refuse_other_form(row: Mapping[str, Any], used: Iterable[str], name: str) -> None:
    """Raises `ValueError` for a cell of the `used` columns that is neither a text nor, where it may be, messages."""
    cells = {column: row[column] for column in used if row.get(column) is not None}
    forms = {column: "messages" if is_chat(cell) else "text" for column, cell in cells.items()}
    for column, cell in cells.items():
        allowed = ["messages"] if column in ("messages", "conversations") else ["text"]
        allowed = ["text", "messages"] if column in CHAT_COLUMNS and "messages" not in allowed else allowed
        if forms[column] not in allowed or not (is_chat(cell) or isinstance(cell, str)):
            raise ValueError(
                f"{name} has {reprlib.repr(cell)} as its {column!r}, which has to be {' or '.join(allowed)}"
                + ("; conversations go to a column 'messages'" if is_chat(cell) else "")
            )
    if len(set(forms.values())) > 1:
        found = " and ".join(f"{column!r} as {form}" for column, form in forms.items())
        raise ValueError(f"{name} has {found}: take text for both, or messages for both")


def refuse_other_tools(cell: Any, name: str) -> None:
    """Raises `ValueError` for text in the column `tools` of a row that is no JSON."""
    if not isinstance(cell, str):
        return
    try:
        json.loads(cell)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} has {reprlib.repr(cell)} as its 'tools', which has to be a list of tools, or one as JSON ({error})"
        ) from error


def with_messages(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A row, called `name` in errors, whose conversations are messages with `role` and `content`."""
    row = dict(row)
    if is_chat(row.get("conversations")) and not row.get("messages"):
        row["messages"] = row.pop("conversations")
    return {**row, **{key: chat(row[key], name) for key in CHAT_COLUMNS if is_chat(row.get(key))}}


def tokenized_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str = "a row") -> dict[str, list[int]]:
    """input_ids and labels of a row, and `seq_lengths` of a packed one; `ValueError` for one with unknown columns."""
    if row.get("input_ids") is not None:
        return _given_tokens(row)
    row = with_messages(row, name)
    formats = (("prompt", "completion"), ("messages",), ("text",))
    used = next((used for used in formats if all(row.get(column) for column in used)), ())
    refuse_other_form(row, used, name)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _ids(row["prompt"], tokenizer, add_generation_prompt=True)
        ids = _ids(row["prompt"] + row["completion"], tokenizer)
        differing = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
        start = next(differing, min(len(prompt), len(ids)))
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}
    content = row["messages"] if row.get("messages") else row.get("text")
    if content is None:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(row))}; it needs 'text', 'messages', 'prompt' and 'completion', "
            "or 'input_ids'"
        )
    ids = _ids(content, tokenizer)
    return {"input_ids": ids, "labels": ids}


def used_format(columns: set[str], text_field: str) -> tuple[str, ...]:
    """The columns that are the text of a data set's rows: the first of the formats that it has; empty for none."""
    formats = [("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), (text_field,)]
    return next((wanted for wanted in formats if columns.issuperset(wanted)), ())


def is_conversation(columns: set[str], text_field: str) -> bool:
    """True for rows that are whole conversations, in which every token bears a label."""
    return used_format(columns, text_field) in (("messages",), ("conversations",))


def refuse_pictures(row: Mapping[str, Any], name: str) -> None:
    """Raises `ValueError` for a row with pictures, for a model that sees: its tokens are not all that it was asked."""
    if any(row.get(column) not in (None, []) for column in (PICTURES, PICTURE)):
        raise ValueError(
            f"{name} has pictures, and rows of text alone are measured here: take evaluate_fidelity and a processor, "
            "or remove the column of pictures"
        )


def _given_tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tokens that a row brings, as lists whatever its format; without labels, its masks make them."""
    masks = ("completion_mask", "assistant_masks")
    names = ("input_ids", "labels", "seq_lengths", "attention_mask", *masks)
    found = {name: row[name] for name in names if row.get(name) is not None}
    found = {name: cell.tolist() if hasattr(cell, "tolist") else cell for name, cell in found.items()}
    if "labels" not in found:
        given = zip(found["input_ids"], *(found[name] for name in masks if name in found), strict=False)
        found["labels"] = [token if all(bits) else -100 for token, *bits in given]
    return found


def _ids(content: str | list, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> list[int]:
    if isinstance(content, str):
        return token_ids(tokenizer, content)
    found: Any = tokenizer.apply_chat_template(content, add_generation_prompt=add_generation_prompt, return_dict=True)
    return found["input_ids"]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Token ids of a text; `options` are the tokenizer's own."""
    encoding: Any = tokenizer(text, **options)  # its type is a union of all that the options can give
    return encoding["input_ids"]


def need_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    rows: str = "the rows have messages",
    whose: str = "the",
    setting: str = "tokenizer.chat_template",
) -> None:
    """Raises `ValueError` for a tokenizer without a chat template, which `rows` need to become text.

    `whose` tokenizer it is, and the `setting` that gives it a template, are words of the message.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{rows}, but {whose} tokenizer has no chat template: set {setting}, use the tokenizer of an "
            "instruction-tuned model, or give the rows as text"
        )
