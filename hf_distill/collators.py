"""Collators of prompts: each row becomes the student's prompt and the teacher's.

`encode` turns one row into token ids: `student_prompt_ids`, `teacher_prompt_ids` and `completion_ids`, which are empty
if the row has no completion. A collator is called on rows, encoded or not. It returns the keyword arguments of
[`~hf_distill.speculative.rollout`], padded on the left, and `completion_ids` and `completion_mask`, on the right.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template

from hf_distill.rows import need_chat_template, refuse_other_form, refuse_other_tools, token_ids, with_messages
from hf_distill.token_rows import pad

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class PromptCollator:
    """One prompt for both sides, from rows with a `prompt` (text or messages) and maybe a `completion`, or `messages`.

    The last of the `messages` is the completion if its role is assistant. A row may have another prompt for the
    teacher, in `teacher_prompt`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): needs a chat template for rows with messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, row: Row, name: str = "a row") -> Row:
        """Token ids of a row, called `name` in errors.

        Raises:
            `ValueError`: no prompt, an empty one, or messages without a chat template.
        """
        refuse_other_form(row, ("messages",) if row.get("messages") else (), name)
        refuse_other_tools(row.get("tools"), name)
        row = with_messages(row, name)
        if row.get("messages"):
            messages = row["messages"]
            answered = messages[-1]["role"] == "assistant"
            parts = {"prompt": messages[:-1], "completion": messages[-1:]} if answered else {"prompt": messages}
            row = {**row, "messages": None, **parts}
        prompt, completion = row.get("prompt"), row.get("completion")
        if not prompt:
            raise ValueError(
                f"{name} has no prompt: it needs a 'prompt' (text or messages) or 'messages', and has the columns "
                f"{', '.join(row)}; rename one, or pass a LUPICollator for queries with knowledge"
            )
        given = {"prompt": prompt, "completion": completion or None}
        refuse_other_form(given, given, name)
        if is_chat := not isinstance(prompt, str):
            need_chat_template(self.tokenizer)
            turns = {"prompt": prompt, **({"completion": completion} if completion else {})}
            try:
                texts = apply_chat_template(turns, self.tokenizer, **template_arguments(row))
            except (TemplateError, ValueError) as error:
                raise ValueError(f"the chat template of the tokenizer refuses {name} ({error})") from error
            prompt, completion = texts["prompt"], texts.get("completion")
        ids = prompt_ids(self.tokenizer, prompt, add_special_tokens=not is_chat)
        answer = completion_ids(self.tokenizer, prompt, completion, ids, ends=is_chat) if completion else []
        teacher_ids = self.teacher_prompt_ids(row, name) if row.get("teacher_prompt") else ids
        return {"student_prompt_ids": ids, "teacher_prompt_ids": teacher_ids, "completion_ids": answer}

    def teacher_prompt_ids(self, row: Row, name: str) -> list[int]:
        """Token ids of a row's `teacher_prompt`, with the row's tools."""
        prompt = row["teacher_prompt"]
        if row.get("prompt") and isinstance(prompt, str) != isinstance(row["prompt"], str):
            raise ValueError(
                f"'prompt' and 'teacher_prompt' of {name} have to be both text or both messages: change one"
            )
        own = {"prompt": prompt, "completion": None, "messages": None, "teacher_prompt": None}
        return self.encode({**row, **own}, f"the teacher_prompt of {name}")["student_prompt_ids"]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return pad_prompts([encoded(self, row, i) for i, row in enumerate(rows)], self.tokenizer)


class LUPICollator:
    """Two prompts for one query: the student reads the query, the teacher also reads knowledge about it.

    This is learning using privileged information (LUPI; Vapnik and Vashist, 2009) for language models. The teacher's
    prompt has system prompt, few-shot turns, knowledge and query, the student's the query alone. Both go through the
    chat template with a generation prompt, so that the same completion continues both.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): needs a chat template.
        query_column (`str`): column of the question.
        knowledge_column (`str`): column of the text that only the teacher reads.
        system_prompt (`str`, *optional*): the teacher's first message.
        few_shot (sequence of `dict`, *optional*):
            Dicts with `query`, `knowledge` and `answer`, turns that the teacher reads before the query.
        knowledge_template (`str`): the teacher's message, a text with `{knowledge}` and `{query}`.
        completion_column (`str`, *optional*): column of reference answers, for the source "dataset" of a rollout mix.
        allow_missing_knowledge (`bool`): whether the teacher of a row without knowledge reads the bare query.
        max_prompt_length (`int`, *optional*):
            Tokens of a prompt at most. A longer prompt loses the end of its knowledge, never a part of its query.

    Raises:
        `ValueError`: at construction for a tokenizer without a chat template, a knowledge template without its two
            fields, or few-shot turns without theirs; from `encode` for an empty query, missing knowledge, a query that
            contains its knowledge, or one that is too long for `max_prompt_length`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query_column: str = "query",
        knowledge_column: str = "knowledge",
        system_prompt: str | None = None,
        few_shot: Sequence[dict[str, str]] = (),
        knowledge_template: str = "[Background Knowledge]\n{knowledge}\n\n{query}",
        completion_column: str | None = None,
        allow_missing_knowledge: bool = False,
        max_prompt_length: int | None = None,
    ) -> None:
        need_chat_template(tokenizer, "queries become messages")
        if missing := [field for field in ("{knowledge}", "{query}") if field not in knowledge_template]:
            raise ValueError(f"knowledge_template has to contain {' and '.join(missing)}, got {knowledge_template!r}")
        for i, turn in enumerate(few_shot):
            if not isinstance(turn, Mapping):
                raise ValueError(f"few_shot[{i}] has to be a dict with query, knowledge and answer, got {turn!r}")
            if missing := {"query", "knowledge", "answer"} - {key for key, text in turn.items() if text}:
                raise ValueError(f"few_shot[{i}] has no {', '.join(sorted(missing))}")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"max_prompt_length has to be at least 1, got {max_prompt_length}")
        self.tokenizer = tokenizer
        self.query_column = query_column
        self.knowledge_column = knowledge_column
        self.knowledge_template = knowledge_template
        self.completion_column = completion_column
        self.allow_missing_knowledge = allow_missing_knowledge
        self.max_prompt_length = max_prompt_length
        self._beginning = [] if system_prompt is None else [_message("system", system_prompt)]
        for turn in few_shot:
            self._beginning += [
                _message("user", self._question(turn["query"], turn["knowledge"])),
                _message("assistant", turn["answer"]),
            ]

    def encode(self, row: Row, name: str = "a row") -> Row:
        """Token ids of a row, called `name` in errors, and `knowledge_truncated`: whether its knowledge was cut.

        Raises:
            `ValueError`: see [`LUPICollator`].
        """
        query, knowledge = self._text(row, self.query_column, name), self._text(row, self.knowledge_column, name)
        if not query.strip():
            raise ValueError(f"{name} has no {self.query_column!r}")
        if not knowledge.strip() and not self.allow_missing_knowledge:
            raise ValueError(
                f"{name} has no {self.knowledge_column!r}; remove the row, or let its teacher read the bare query with "
                "allow_missing_knowledge=True"
            )
        if knowledge.strip() and re.search(rf"(?<!\w){re.escape(_squeezed(knowledge))}(?!\w)", _squeezed(query)):
            raise ValueError(
                f"the student's prompt of {name} holds a copy of its {self.knowledge_column!r}: there is nothing left "
                "that only the teacher knows"
            )
        student_ids = self._ids(self._render([_message("user", query)]))
        self._check_length(student_ids, "query", name)
        teacher_ids = self._teacher_ids(query, knowledge)
        limit = len(teacher_ids) if self.max_prompt_length is None else self.max_prompt_length
        truncated = len(teacher_ids) > limit
        if truncated:
            teacher_ids = self._truncated_ids(query, knowledge, limit, name)
        answer = []
        if self.completion_column is not None:
            completion = self._text(row, self.completion_column, name)
            if not completion:
                raise ValueError(f"{name} has no {self.completion_column!r}")
            turns = {"prompt": [_message("user", query)], "completion": [_message("assistant", completion)]}
            texts = apply_chat_template(turns, self.tokenizer)
            answer = completion_ids(self.tokenizer, texts["prompt"], texts["completion"], student_ids, ends=True)
        return {
            "student_prompt_ids": student_ids, "teacher_prompt_ids": teacher_ids, "completion_ids": answer,
            "knowledge_truncated": truncated,
        }  # fmt: skip

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        rows = [encoded(self, row, i) for i, row in enumerate(rows)]
        warn_of_truncation(sum(row.get("knowledge_truncated", False) for row in rows), len(rows), "batch")
        return pad_prompts(rows, self.tokenizer)

    def _text(self, row: Row, column: str, name: str) -> str:
        if column not in row and not (column == self.knowledge_column and self.allow_missing_knowledge):
            raise ValueError(f"{name} has no column {column!r}; its columns are {', '.join(row)}")
        text = row.get(column) or ""
        if not isinstance(text, str):
            raise ValueError(f"{column!r} of {name} has to be text, got {type(text).__name__}; join its parts first")
        return text

    def _question(self, query: str, knowledge: str) -> str:
        if not knowledge.strip():
            return query
        # Not str.format: queries and templates may have braces of their own.
        texts = {"{query}": query, "{knowledge}": knowledge}
        return re.sub("{query}|{knowledge}", lambda field: texts[field[0]], self.knowledge_template)

    def _teacher_ids(self, query: str, knowledge: str) -> list[int]:
        return self._ids(self._render([*self._beginning, _message("user", self._question(query, knowledge))]))

    def _truncated_ids(self, query: str, knowledge: str, limit: int, name: str) -> list[int]:
        """The teacher's prompt with as many words of the knowledge as `limit` tokens allow."""
        ends = [i for i in range(1, len(knowledge) + 1) if i == len(knowledge) or knowledge[i].isspace()]
        # Texts without spaces between words are cut between characters.
        ends = ends if len(ends) > len(knowledge) / 50 else list(range(1, len(knowledge) + 1))
        fitting, too_long = 0, len(ends)  # how many of `ends` fit; bisection
        best = self._teacher_ids(query, "")
        self._check_length(best, "query, system prompt and few-shot turns", name)
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            ids = self._teacher_ids(query, knowledge[: ends[middle - 1]])
            if len(ids) <= limit:
                fitting, best = middle, ids
            else:
                too_long = middle
        if fitting == 0 and not self.allow_missing_knowledge:
            raise ValueError(
                f"max_prompt_length={limit} leaves no room for {self.knowledge_column!r} of {name}: "
                "raise it, shorten system prompt and few-shot turns, or set allow_missing_knowledge=True"
            )
        return best

    def _check_length(self, ids: list[int], what: str, name: str) -> None:
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise ValueError(
                f"{what} of {name} take {len(ids)} tokens, more than max_prompt_length={self.max_prompt_length}; only "
                "knowledge is truncated"
            )

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text, add_special_tokens=False)


def template_arguments(row: Row) -> dict[str, Any]:
    """A row's own arguments of its chat template: its tools, which may be JSON, and `chat_template_kwargs`."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def encoded(collator: Any, row: Row, index: int) -> Row:
    """The row as `collator` encodes it, or as it is if it is encoded."""
    return row if "teacher_prompt_ids" in row else collator.encode(row, f"row {index}")


def pad_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A batch of encoded rows: prompts padded on the left, and, if all rows have one, completions on the right."""
    # Any id would do: the masks leave padding out, and it is never read.
    pad_id: Any = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch: dict[str, Tensor] = {}
    for name, side in {"student_prompt": "left", "teacher_prompt": "left", "completion": "right"}.items():
        if name != "completion" or all(row.get("completion_ids") for row in rows):
            batch[f"{name}_ids"], batch[f"{name}_mask"] = pad([row[f"{name}_ids"] for row in rows], pad_id, side)
    return batch


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt, without the end of text that some tokenizers add on their own."""
    encoding: Any = tokenizer(prompt, add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
    ids, added = list(encoding["input_ids"]), encoding["special_tokens_mask"]
    return ids[:-1] if add_special_tokens and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, prefix: list[int], *, ends: bool
) -> list[int]:
    """Token ids of a completion after those of its prompt (`prefix`), with an end of text unless it `ends` itself.

    If a token would span the end of the prompt, the completion is tokenised alone: the prompt keeps its tokens.
    """
    ids = prompt_ids(tokenizer, prompt + completion, add_special_tokens=not ends)
    if ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    else:
        ids = token_ids(tokenizer, completion, add_special_tokens=False)
    eos: Any = tokenizer.eos_token_id
    if not ends and ids[-1:] != [eos]:
        if eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token to end a completion: set tokenizer.eos_token")
        ids.append(eos)
    return ids


def warn_of_truncation(count: int, total: int, name: str) -> None:
    """Says how many rows have lost a part of their knowledge, if there are any."""
    if count:
        logger.warning("the knowledge of %d of %d rows of the %s is cut at max_prompt_length", count, total, name)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _squeezed(text: str) -> str:
    return " ".join(text.split())
