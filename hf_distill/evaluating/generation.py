"""Answers that a model generates: greedy, in batches, the same whatever the batch size.

Shapes: B prompts of a batch, P tokens of the longest of them, T tokens with what was generated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import tqdm
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.evaluation import on_device_of
from hf_distill.modeling import (
    causal_lm,
    evaluating,
    is_vision_language,
    keep_4bit_weights,
    num_positions,
    num_token_ids,
    public_name,
)
from hf_distill.picture_batches import asked, naming_row, prompt_batch, with_padding
from hf_distill.token_rows import pad


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> list[str]:
    """The texts that a model generates after prompts, greedily: the most likely token follows, as the model says it.

    The model's own settings of generation (sampling, beams, penalties) play no part, except for the tokens that end a
    text. Prompts are padded on the left; those of similar length share a batch.

    Args:
        model (`PreTrainedModel`): may be a PEFT model.
        tokenizer (`PreTrainedTokenizerBase`): decodes what was generated, without special tokens.
        prompts: token ids, as `encode` of a collator makes them.
        batch_size (`int`): prompts at once.
        max_new_tokens (`int`): tokens of an answer at most.
        stop (sequence of `str`): texts that end an answer, and are no part of it, as "\\nQuestion:".

    Returns:
        One text per prompt, in their order.

    Raises:
        `ValueError`: a prompt without tokens, or with more of them than leave room for the answer.
    """
    check_lengths(model, [len(prompt) for prompt in prompts], max_new_tokens)
    model = causal_lm(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    ends = _end_tokens(model, tokenizer)
    bar = tqdm(total=len(prompts), desc="generating", unit="answer", leave=False)
    with torch.no_grad(), evaluating(model), _plainly_greedy(model, ends, max_new_tokens):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            # Any readable id would do: the mask leaves padding out.
            ids, mask = pad([prompts[i] for i in chosen], ends[0] if ends else 0, "left")  # (B, P)
            found = _generated(model, tokenizer, {"input_ids": ids, "attention_mask": mask.long()}, ends, stop)
            for i, text in zip(chosen, found, strict=True):
                texts[i] = text
            bar.update(len(chosen))
    bar.close()
    return texts


def generate_about_pictures(
    model: PreTrainedModel,
    processor: Any,
    rows: Dataset,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> list[str]:
    """As [`generate_answers`], to the prompts of rows with pictures, in their order. Other arguments are as there.

    Args:
        processor (`ProcessorMixin`): the model's; it makes tokens and pixels of prompts.
        rows (`Dataset`): as of [`~hf_distill.evaluating.questions.PictureQuestions`].

    Raises:
        `ValueError`: a model that reads text alone; a row that the processor refuses, or one that is too long.
    """
    refuse_blind(model)
    processor, whole = with_padding(processor), causal_lm(model)
    tokenizer = processor.tokenizer
    ends = _end_tokens(whole, tokenizer)
    texts: list[str] = []
    bar = tqdm(total=len(rows), desc="generating", unit="answer", leave=False)
    with torch.no_grad(), evaluating(whole), _plainly_greedy(whole, ends, max_new_tokens):
        for batch in _prompt_batches(processor, rows, batch_size):
            check_lengths(model, _lengths(batch), max_new_tokens, first=len(texts))
            texts += _generated(whole, tokenizer, batch, ends, stop)
            bar.update(len(texts) - bar.n)
    bar.close()
    return texts


def _prompt_batches(processor: Any, rows: Dataset, batch_size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), batch_size):
        some = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        with naming_row(f"one of the rows {start} to {start + len(some) - 1}" if len(some) > 1 else f"row {start}"):
            batch = prompt_batch(processor, [asked(row, f"row {start + i}") for i, row in enumerate(some)])
        yield batch


def _lengths(batch: Mapping[str, Tensor]) -> list[int]:
    return batch["attention_mask"].sum(1).tolist()


def refuse_blind(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model that reads text alone, of which questions about pictures are asked."""
    if not is_vision_language(causal_lm(model)):
        raise ValueError(
            f"the rows have pictures, and {public_name(model)} reads text alone: remove the column of pictures"
        )


def picture_prompt_lengths(processor: Any, rows: Dataset) -> list[int]:
    """The tokens of each row's prompt, those of its pictures among them; a progress bar shows how far it is.

    Raises:
        `ValueError`: a row that the processor refuses.
    """
    batches = _prompt_batches(with_padding(processor), rows, 1)
    return [_lengths(batch)[0] for batch in tqdm(batches, total=len(rows), desc="reading prompts", leave=False)]


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], max_new_tokens: int, first: int = 0) -> None:
    """Raises `ValueError` for a length of a prompt after which a model cannot generate so many tokens.

    Args:
        first (`int`): the number of the first row.
    """
    limit = num_positions(model)
    for i, length in enumerate(lengths, first):
        if not length:
            raise ValueError(f"row {i} has a prompt without tokens: there is nothing to generate an answer to")
        if limit is not None and length + max_new_tokens > limit:
            raise ValueError(
                f"row {i} has a prompt of {length:,} tokens, and an answer of {max_new_tokens:,} would go beyond "
                f"the {limit:,} positions of {type(causal_lm(model)).__name__}: lower max_new_tokens, or drop the row"
            )


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    ends: list[int],
    stop: Sequence[str],
) -> list[str]:
    """The texts that follow the prompts of a batch, which are padded on the left."""
    options: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    generate: Any = model.generate
    found = generate(**on_device_of(model, inputs), **options)[:, inputs["input_ids"].shape[1] :].tolist()
    texts = (str(tokenizer.decode(_before(ids, ends), skip_special_tokens=True)) for ids in found)
    return [_until(text, stop) for text in texts]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's settings, and the tokenizer's."""
    config: Any = getattr(model, "generation_config", None) or model.config.get_text_config()
    own = config.eos_token_id
    found = [*(own if isinstance(own, list | tuple) else [own]), tokenizer.eos_token_id]
    return sorted({end for end in found if end is not None and 0 <= end < num_token_ids(model)})


@contextmanager
def _plainly_greedy(model: PreTrainedModel, ends: list[int], max_new_tokens: int) -> Iterator[None]:
    """Generation without the model's own settings, which would fill what a caller's settings leave open."""
    keep_4bit_weights(model)
    before: Any = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        model.generation_config = before


def _before(ids: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]
