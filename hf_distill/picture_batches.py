"""Batches of rows with pictures: pixels and tokens by a processor, through TRL's collator, and labels on text alone.

Shapes: B rows of a batch, T tokens of its longest row.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import ProcessorMixin

from hf_distill.modeling import PictureSpans, picture_tokens, tokenizer_of
from hf_distill.picture_rows import AnyDataset, Row, content_of, has_transform, pictures_of, rgb
from hf_distill.rows import ALIASES, PICTURE, PICTURES, ROLES, is_chat

FILLER = "is_filler"  # a column of rows that fill up a batch and count for nothing


def as_trl_reads(row: Mapping[str, Any]) -> Row:
    """A row with `images` in RGB, and messages with `role` and `content`. It is new, because TRL's collator changes it.

    Arrow gives all parts of messages the same keys: those without a value are left out. Where a row marks its places
    for pictures, all its content is in parts: TRL would put them before the first content that is text once more.
    """
    found = {name: cell for name, cell in row.items() if name not in (PICTURE, FILLER)}
    found[PICTURES] = [rgb(picture) for picture in pictures_of(row)]
    if is_chat(found.get("conversations")):
        found["messages"] = found.pop("conversations")
    sides = [column for column in ("messages", "prompt", "completion") if is_chat(found.get(column))]
    contents = [content_of(message) for column in sides for message in found[column]]
    in_parts = any(isinstance(each, list | tuple) for each in contents)
    for column in sides:
        found[column] = [_message(message, in_parts) for message in found[column]]
    return found


def _message(message: Mapping[str, Any], in_parts: bool) -> Row:
    role, content = message.get("role") or message.get("from"), content_of(message)
    if isinstance(content, str) and in_parts:
        content = [{"type": "text", "text": content}]
    if isinstance(content, list | tuple):
        content = [{key: value for key, value in part.items() if value is not None} for part in content]
    kept = {key: value for key, value in message.items() if key not in ("role", "from", "value", "content")}
    return {"role": ROLES[role] if role in ALIASES else role, "content": content, **kept}


def with_ends(row: Row, text_field: str, tokenizer: Any) -> Row:
    """A row whose plain text has the tokens at its ends that it would have without pictures; TRL gives it none."""
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    first, last = ("prompt", "completion") if "completion" in row else (text_field, text_field)
    if isinstance(row.get(last), str) and end and not row[last].endswith(end):
        row[last] += end
    has_begin = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if isinstance(row.get(first), str) and has_begin and not row[first].startswith(begin):
        row[first] = begin + row[first]
    return row


def with_fillers(dataset: AnyDataset, size: int) -> AnyDataset:
    """Rows of a multiple of `size`: at their end copies of the first one that count for nothing."""
    if not isinstance(dataset, Dataset) or (missing := -len(dataset) % size) == 0:
        return dataset
    how, rows = dataset.format, dataset.with_format(None)
    copies = rows.select([0] * missing).add_column(FILLER, [True] * missing)  # pyright: ignore[reportCallIssue]
    filled = concatenate_datasets([rows, copies])  # the others have None there
    if has_transform(dataset):
        how["format_kwargs"] = {"transform": partial(_beside_fillers, transform=how["format_kwargs"]["transform"])}
    columns = [*how["columns"], FILLER]
    return filled.with_format(how["type"], columns, how["output_all_columns"], **how["format_kwargs"])


def _beside_fillers(batch: Row, transform: Callable[[Row], Row]) -> Row:
    fillers = batch.pop(FILLER)
    return {**transform(batch), FILLER: fillers}


def asked(row: Mapping[str, Any], name: str) -> Row:
    """The prompt of a row, called `name` in errors, and its pictures: all before the last answer of a conversation.

    Raises:
        `ValueError`: the row has no prompt.
    """
    found = as_trl_reads(row)
    turns = found.get("messages") or []
    prompt = found.get("prompt") or (turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns)
    if not prompt:
        raise ValueError(
            f"{name} has no prompt, to which an answer could be generated: it needs a 'prompt' or 'messages', and has "
            f"the columns {', '.join(row)}"
        )
    return {"prompt": prompt, PICTURES: found[PICTURES]}


def prompt_texts(processor: Any, rows: Sequence[Row]) -> list[str]:
    """The prompts of [`asked`] rows as texts that end where an answer begins."""
    from trl.data_utils import prepare_multimodal_messages

    texts = []
    for row in rows:
        if isinstance(prompt := row["prompt"], str):
            texts.append(with_ends({"prompt": prompt, "completion": ""}, "text", processor.tokenizer)["prompt"])
        else:
            messages = prepare_multimodal_messages(prompt, images=row[PICTURES])
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return texts


def prompt_batch(processor: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Prompts (B, T) of [`asked`] rows, padded on the left, as a trainer's collator makes those before completions."""
    pictures = [row[PICTURES] for row in rows]
    batch = processor(
        images=pictures if any(pictures) else None, text=prompt_texts(processor, rows), padding=True,
        padding_side="left", add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    return {name: each for name, each in batch.items() if isinstance(each, Tensor)}


class MaskedPictures:
    """Batches of a collator, without labels on tokens that stand for pictures, and in rows that fill up a batch.

    Args:
        collator (`Callable`): makes batches (B, T).
        spans: tells which tokens stand for pictures.
    """

    def __init__(self, collator: Any, spans: PictureSpans) -> None:
        self.collator = collator
        self.spans = spans

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = dict(self.collated([{name: cell for name, cell in row.items() if name != FILLER} for row in rows]))
        labels, ids = batch.get("labels"), batch.get("input_ids")
        if not (isinstance(labels, Tensor) and isinstance(ids, Tensor)):
            return batch
        labels = labels.masked_fill(self.pictures(batch), -100)
        fillers = torch.tensor([bool(row.get(FILLER)) for row in rows])
        if fillers.any():
            if len(labels) != len(rows):
                raise ValueError(
                    f"data_collator makes {len(labels)} rows of {len(rows)}, of which some fill up the last batch of "
                    "several processes and must not count: make one row of each"
                )
            labels[fillers] = -100
        return {"input_ids": ids, **batch, "labels": labels}  # accelerate counts the rows of what comes first

    def collated(self, rows: list[Row]) -> Mapping[str, Any]:
        """The collator's batch of rows."""
        return self.collator(rows)

    def pictures(self, batch: Mapping[str, Any]) -> Tensor:
        """True for tokens (B, T) of a batch that stand for a picture; padding never does, whatever its token."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        is_row = isinstance(mask, Tensor) and mask.shape == ids.shape
        return self.spans(ids.masked_fill(mask == 0, -1) if is_row else ids)


class PictureCollator(MaskedPictures):
    """Batches of rows with pictures, through a collator of TRL's; only text is cut at `max_length`.

    Args:
        collator: `trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling`, without a `max_length`. What it says
            of completions and of answers counts for rows that are of this format.
        spans: as in [`MaskedPictures`].
        max_length (`int`, *optional*): the tokens that are kept of a row.
    """

    def __init__(self, collator: Any, spans: PictureSpans, max_length: int | None = None) -> None:
        super().__init__(collator, spans)
        self.max_length = max_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        batch = super().__call__(rows)
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            batch = self._cut(batch, self.max_length)
        return batch

    def collated(self, rows: list[Row]) -> Mapping[str, Any]:
        """TRL's batch of rows, which are of one format."""
        collator = self.collator
        has_answers = {"prompt", "completion"} <= set(rows[0])
        if has_answers:
            refuse_begun_completions(collator.processor)
        others = ("messages", "conversations", collator.dataset_text_field) if has_answers else ("completion",)
        texts = [as_trl_reads({name: cell for name, cell in row.items() if name not in others}) for row in rows]
        texts = [with_ends(row, collator.dataset_text_field, collator.processor.tokenizer) for row in texts]
        if not has_answers:
            collator = replace(collator, completion_only_loss=False)
        elif collator.assistant_only_loss:
            collator = replace(collator, assistant_only_loss=False)
        return collator(texts)

    def _cut(self, batch: dict[str, Any], length: int) -> dict[str, Any]:
        is_picture = self.pictures(batch)
        if is_picture[:, length:].any():
            last = int(is_picture.any(0).nonzero().max()) + 1
            raise ValueError(
                f"the pictures of a row end at token {last}, and max_length={length} would cut them: raise max_length, "
                "take fewer or smaller pictures, or set max_length to None"
            )
        shape = batch["input_ids"].shape
        return {n: v[:, :length] if isinstance(v, Tensor) and v.shape == shape else v for n, v in batch.items()}


def refuse_begun_completions(processor: Any) -> None:
    """Raises `ValueError` for a processor that begins each text with a token: completions would begin with it, too."""
    ids: Any = processor(text=["a"], add_special_tokens=False)["input_ids"][0]
    plain = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    if len(ids) > len(plain):
        begin = processor.tokenizer.decode(ids[: len(ids) - len(plain)])
        raise ValueError(
            f"{type(processor).__name__} puts {begin!r} before each text, completions among them: give the rows as "
            "'messages', with assistant_only_loss=True if their answers alone are to be learned"
        )


def spans_of(processing_class: Any, *configs: Any) -> PictureSpans:
    """The tokens that stand for pictures, as a processor and configurations name them."""
    tokenizer = tokenizer_of(processing_class)
    processor = processing_class if processing_class is not tokenizer else None
    return PictureSpans(picture_tokens(processor, *configs, tokenizer=tokenizer), tokenizer)


@contextmanager
def naming_row(name: str):
    """Turns errors of a processor into a `ValueError` that names the row."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be made a batch of: {text} ({type(error).__name__})") from error


def with_padding(processor: ProcessorMixin) -> ProcessorMixin:
    """The processor, or a copy of it whose tokenizer pads with the end of text if it has no token for that."""
    if processor.tokenizer.pad_token is None:
        processor = copy.deepcopy(processor)
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def picture_collator(processor: ProcessorMixin, spans: PictureSpans, max_length: int | None = None) -> PictureCollator:
    """The collator of rows that are measured without a trainer: it reads them as one with default settings does."""
    # The module of a trainer takes seconds to import.
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(with_padding(processor), completion_only_loss=True)
    return PictureCollator(collator, spans, max_length)
