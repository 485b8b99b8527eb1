"""Rows with prompts to batches with two views of them: what the student reads, and what the teacher reads.

`encode` turns one row into token ids: `student_prompt_ids`, `teacher_prompt_ids` and `completion_ids`, which are empty
where the row has no completion. A collator called on rows, encoded or not, returns the keyword arguments of
[`~hf_distill.speculative.rollout`], left-padded, and `completion_ids` and `completion_mask`, right-padded.
"""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template

from hf_distill.rows import refuse_other_form, with_messages
from hf_distill.token_alignment import Piece, align, group_numbers

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# What only the teachers see of a row or a batch: which of them it is for, and a text that differs from the student's.
TEACHER_COLUMNS = ("teacher_index", "teacher_input_ids", "teacher_labels", "teacher_attention_mask")
# With another tokenizer, under names that begin with `teacher_<index>_`: the teacher's tokens, and for each token of
# both sides the number of its group, -1 for none; how many of the student's tokens face exactly one of the teacher's.
OWN_COLUMNS = ("input_ids", "labels", "groups", "student_groups", "exact")


class PromptCollator:
    """Rows with `prompt` (text or messages) and maybe `completion`, or with `messages`; one prompt for both sides.

    The last message of `messages` is the completion if it is the assistant's. A row with a `teacher_prompt` has another
    one for the teacher.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template, for rows with messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, row: Row, name: str = "a row") -> Row:
        """Token ids of a row, called `name` in errors.

        Raises:
            `ValueError`: no prompt, an empty one, or messages without a chat template.
        """
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
            check_chat_template(self.tokenizer)
            turns = {"prompt": prompt, **({"completion": completion} if completion else {})}
            texts = apply_chat_template(turns, self.tokenizer, **_template_arguments(row))
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
    """Two prompts for one query: the student's holds the query alone, the teacher's also what is known about it.

    Learning using privileged information (Vapnik and Vashist, 2009) for language models: the teacher reads system
    prompt, few-shot turns, knowledge and query; the student, the query. Both prompts go through the chat template with
    a generation prompt, so that the same completion continues both.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        query_column, knowledge_column (`str`): where a row has its question, and what only the teacher may read.
        system_prompt (`str`, *optional*): the teacher's first message.
        few_shot (sequence of `dict`, *optional*):
            Turns with `query`, `knowledge` and `answer`, shown to the teacher before the query.
        knowledge_template (`str`): the teacher's message, with `{knowledge}` and `{query}` in it.
        completion_column (`str`, *optional*): reference answers, for the "dataset" share of a rollout mix.
        allow_missing_knowledge (`bool`): whether the teacher of a row without knowledge reads the bare query.
        max_prompt_length (`int`, *optional*):
            Tokens of a prompt. A longer one loses the end of its knowledge, never a part of its query.

    Raises:
        `ValueError`: at construction, a tokenizer without a chat template, a knowledge template without its two fields,
            or few-shot turns without theirs; from a row: an empty query, missing knowledge, knowledge that the
            student's prompt holds a copy of, or a query too long for `max_prompt_length`.
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
        check_chat_template(tokenizer)
        if missing := [field for field in ("{knowledge}", "{query}") if field not in knowledge_template]:
            raise ValueError(f"knowledge_template has to contain {' and '.join(missing)}, got {knowledge_template!r}")
        for i, turn in enumerate(few_shot):
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
        """Token ids of a row, called `name` in errors; `knowledge_truncated` says whether its knowledge was too long.

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
        truncated = self.max_prompt_length is not None and len(teacher_ids) > self.max_prompt_length
        if truncated:
            teacher_ids = self._truncated_ids(query, knowledge, name)
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

    def _truncated_ids(self, query: str, knowledge: str, name: str) -> list[int]:
        """The teacher's prompt with as many words of the knowledge as fit."""
        ends = [i for i in range(1, len(knowledge) + 1) if i == len(knowledge) or knowledge[i].isspace()]
        # Texts without spaces between words are cut between characters.
        ends = ends if len(ends) > len(knowledge) / 50 else list(range(1, len(knowledge) + 1))
        fitting, too_long = 0, len(ends)  # how many of `ends` fit; bisection
        best = self._teacher_ids(query, "")
        self._check_length(best, "query, system prompt and few-shot turns", name)
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            ids = self._teacher_ids(query, knowledge[: ends[middle - 1]])
            if len(ids) <= self.max_prompt_length:  # pyright: ignore[reportOperatorIssue]
                fitting, best = middle, ids
            else:
                too_long = middle
        if fitting == 0 and not self.allow_missing_knowledge:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for {self.knowledge_column!r} of {name}: "
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
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # pyright: ignore

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


class TeacherColumnsCollator:
    """Adds `TEACHER_COLUMNS` to the batches of another collator, padded on the right.

    Args:
        collator: makes batches of `input_ids` and `labels`, row by row; not one that joins rows.
        num_teachers (`int`): how many may have tokens of their own.
    """

    def __init__(self, collator: Any, num_teachers: int = 1) -> None:
        self.collator = collator
        self.num_teachers = num_teachers

    def __call__(self, rows: Sequence[Row]) -> Row:
        """A batch. `ValueError` for a row with other label-bearing tokens for the teacher than for the student."""
        batch = self.collator([{k: v for k, v in row.items() if not k.startswith("teacher_")} for row in rows])
        for index in range(self.num_teachers):
            if f"teacher_{index}_input_ids" in rows[0]:
                batch |= _own_tokens(rows, index)
        if "teacher_index" in rows[0]:
            index = torch.tensor([row["teacher_index"] for row in rows])
            if strange := [i for i in index.tolist() if not 0 <= i < self.num_teachers]:
                raise ValueError(f"a row has teacher_index {strange[0]}; there are {self.num_teachers} teachers")
            batch["teacher_index"] = index
        if "teacher_input_ids" in rows[0]:
            for row in rows:
                both = row.get("labels", row["input_ids"]), row["teacher_labels"]
                sides = [[int(i) for i in labels[1:] if i != -100] for labels in both]
                if sides[0] != sides[1]:
                    raise ValueError(
                        f"a row has {len(sides[0])} label-bearing tokens for the student and {len(sides[1])} for the "
                        "teacher, or others: both have to end with the same completion"
                    )
            ids, mask = _pad([row["teacher_input_ids"] for row in rows], 0, "right")
            batch |= {"teacher_input_ids": ids, "teacher_attention_mask": mask.long()}
            batch["teacher_labels"], _ = _pad([row["teacher_labels"] for row in rows], -100, "right")
        return batch


def with_teacher_prompt(
    row: Row, tokenizers: Sequence[PreTrainedTokenizerBase], positions: int | None, dataset_name: str
) -> Row:
    """What the teachers read of a tokenised row: its `teacher_prompt`, if there is one, before the same completion.

    Raises:
        `ValueError`: the row has no prompt that the teacher's could stand for, or it is another for each tokenizer, or
            the teachers have not so many `positions`.
    """
    ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
    if row.get("teacher_prompt"):
        start = next(i for i, label in enumerate(labels) if label != -100)
        if start == 0:
            raise ValueError(
                f"a row of the {dataset_name} dataset has a 'teacher_prompt', but no prompt that it could stand for: "
                "it needs 'prompt' and 'completion', and labels on the completion alone"
            )
        name = f"a row of the {dataset_name} dataset"
        prompt, *others = (PromptCollator(tokenizer).teacher_prompt_ids(row, name) for tokenizer in tokenizers)
        if any(other != prompt for other in others):
            raise ValueError(
                f"the 'teacher_prompt' of {name} is for all teachers, but their chat templates or tokenizers make "
                "different tokens of it: give 'prompt' and 'teacher_prompt' as text, or take teachers that agree"
            )
        ids, labels = prompt + ids[start:], [-100] * len(prompt) + labels[start:]
        _refuse_length(ids, positions, "teacher_prompt and completion", name, "shorten it")
    return {"teacher_input_ids": ids, "teacher_labels": labels}


def with_own_tokens(
    row: Row,
    *,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    pieces: tuple[Sequence[Piece | None], Sequence[Piece | None]],
    positions: int | None,
    dataset_name: str,
) -> Row:
    """What the `index`-th teacher reads of a tokenised row, and which of its tokens cover which of the student's.

    Conversations go through the teacher's own chat template; only what was said is compared. Groups count whose tokens
    all bear a label and are predicted by another token.

    Raises:
        `ValueError`: messages that are no text, or that the teacher's template refuses; more tokens than the teacher
            has `positions`, or one that it has no embedding for.
    """
    name = f"a row of the {dataset_name} dataset"
    student_ids, labels = row["input_ids"], row["labels"]
    ids: Any
    messages = _messages(row)
    text = student_tokenizer.decode(student_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if messages is None:
        ids = tokenizer(text)["input_ids"]
        end = tokenizer.eos_token_id
        if student_ids[-1] == student_tokenizer.eos_token_id and end not in (None, *ids[-1:]):
            ids = [*ids, end]
        contents = None
    else:
        try:
            ids = tokenizer.apply_chat_template(messages, return_dict=True, **_template_arguments(row))["input_ids"]  # pyright: ignore
        except TemplateError as error:
            raise ValueError(
                f"the chat template of the teacher's tokenizer refuses {name} ({error}): give it another, pass it as "
                "teacher_processing_class, or give the rows as text"
            ) from error
        contents = [message.get("content") or "" for message in messages]  # A tool call has none.
        if strange := [content for content in contents if not isinstance(content, str)]:
            raise ValueError(f"messages for a teacher with another tokenizer have to be text, got {strange[0]!r}")
        if not _has_in_order(text, contents):
            whole: Any = student_tokenizer.apply_chat_template(messages, return_dict=True, **_template_arguments(row))
            if len(whole["input_ids"]) > len(student_ids):
                contents = None  # A row that has been cut is aligned by what is left of it.
    if max(ids, default=0) >= len(pieces[1]):
        raise ValueError(
            f"the teacher's tokenizer makes token {max(ids)} of {name}, but the teacher has only {len(pieces[1])}: "
            "they do not belong together"
        )
    _refuse_length(ids, positions, "the teacher's own tokens", name, "lower max_length or drop long rows")
    sides = [
        ["" if side[i] is None else side[i] for i in tokens]
        for side, tokens in zip(pieces, (student_ids, ids), strict=True)
    ]
    groups = align(sides[0], sides[1], contents)
    counts = [i > 0 and label != -100 for i, label in enumerate(labels)], [j > 0 for j in range(len(ids))]
    student_groups, teacher_groups = group_numbers(groups, *counts)
    kept = set(student_groups) - {-1}
    view = {
        "input_ids": ids,
        "labels": [-100 if group == -1 else token for token, group in zip(ids, teacher_groups, strict=True)],
        "groups": teacher_groups,
        "student_groups": student_groups,
        "exact": sum(len(groups[k].student) == len(groups[k].teacher) == 1 for k in kept),
    }
    return {f"teacher_{index}_{name}": value for name, value in view.items()}


def _has_in_order(text: Any, contents: Sequence[str]) -> bool:
    """Whether a text has all contents, one after the other."""
    place = 0
    for content in map(str.strip, contents):
        place = text.find(content, place)
        if place == -1:
            return False
        place += len(content)
    return True


def lost_messages(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The roles whose messages are not in what the chat template makes of a row, as a whole."""
    messages = _messages(row) or []
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **_template_arguments(row)) if messages else ""
    return [message["role"] for message in messages if (message.get("content") or "").strip() not in text]


def _refuse_length(ids: list[int], positions: int | None, what: str, name: str, remedy: str) -> None:
    if positions is not None and len(ids) > positions:
        raise ValueError(f"{what} of {name} take {len(ids)} tokens, the teacher has {positions} positions: {remedy}")


def _template_arguments(row: Row) -> dict[str, Any]:
    """What a row brings for its chat template: its tools, which may be JSON, and arguments of its own."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def _messages(row: Row) -> list[dict[str, str]] | None:
    """The conversation that a row is, None for plain text."""
    if row.get("messages"):
        return row["messages"]
    parts = row.get("prompt"), row.get("completion")
    return [turn for part in parts for turn in part] if all(isinstance(part, list) for part in parts) else None  # pyright: ignore


def _own_tokens(rows: Sequence[Row], index: int) -> dict[str, Tensor]:
    """The columns of [`with_own_tokens`] as tensors (B, T) and (B, Tt), padded on the right; `exact` is (B,)."""
    columns = {name: [row[f"teacher_{index}_{name}"] for row in rows] for name in OWN_COLUMNS}
    padding = {"input_ids": 0, "labels": -100, "groups": -1, "student_groups": -1}
    batch = {name: _pad(columns[name], value, "right")[0] for name, value in padding.items()}
    sides = ("groups", "student_groups")
    # No row has more groups than tokens of both sides.
    first = torch.arange(len(rows)).unsqueeze(1) * sum(batch[name].shape[1] for name in sides)  # (B, 1)
    batch |= {name: torch.where(batch[name] >= 0, batch[name] + first, -1) for name in sides}
    batch["attention_mask"] = _pad(columns["input_ids"], 0, "right")[1].long()
    batch["exact"] = torch.tensor(columns["exact"])
    return {f"teacher_{index}_{name}": tensor for name, tensor in batch.items()}


def encoded(collator: Any, row: Row, index: int) -> Row:
    """A row as `collator` encodes it, unless it is encoded."""
    return row if "teacher_prompt_ids" in row else collator.encode(row, f"row {index}")


def pad_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Encoded rows as one batch: prompts padded on the left, completions, if all rows have one, on the right."""
    # Without any of them, 0: what the masks leave out is never read.
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch: dict[str, Tensor] = {}
    for name, side in {"student_prompt": "left", "teacher_prompt": "left", "completion": "right"}.items():
        if name != "completion" or all(row.get("completion_ids") for row in rows):
            batch[f"{name}_ids"], batch[f"{name}_mask"] = _pad([row[f"{name}_ids"] for row in rows], pad, side)  # pyright: ignore
    return batch


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt, without the end of text that some tokenizers add on their own."""
    encoded = tokenizer(prompt, add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]  # pyright: ignore[reportArgumentType]
    return ids[:-1] if add_special_tokens and added[-1] and ids[-1] == tokenizer.eos_token_id else ids  # pyright: ignore


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, prefix: list[int], *, ends: bool
) -> list[int]:
    """Token ids of a completion as they follow those of its prompt; it gets an end of text unless it `ends` itself.

    A token that would span the end of the prompt is taken apart: the prompt stays as it is when it stands alone.
    """
    ids = prompt_ids(tokenizer, prompt + completion, add_special_tokens=not ends)
    if ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    else:
        ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])  # pyright: ignore
    if not ends and ids[-1:] != [tokenizer.eos_token_id]:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token to end a completion: set tokenizer.eos_token")
        ids.append(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    return ids


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` where messages cannot become text."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, and messages need one: set tokenizer.chat_template, use the tokenizer "
            "of an instruction-tuned model, or give prompts as text"
        )


def warn_of_truncation(count: int, total: int, name: str) -> None:
    if count:
        logger.warning("the knowledge of %d of %d rows of the %s is cut at max_prompt_length", count, total, name)


def _pad(sequences: list[list[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    places = torch.arange(ids.shape[1])
    return ids, places >= ids.shape[1] - lengths if side == "left" else places < lengths


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _squeezed(text: str) -> str:
    return " ".join(text.split())
