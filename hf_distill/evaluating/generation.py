"""Answers that a model generates: greedy, in batches, the same whatever the batch size.

Shapes: B prompts of a batch, P tokens of the longest of them, T tokens with what was generated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets.utils import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.modeling import causal_lm, evaluating, input_device, keep_4bit_weights, num_positions, num_token_ids
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
    check_prompts(model, prompts, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    model = causal_lm(model)
    ends = _end_tokens(model, tokenizer)
    bar = tqdm(total=len(prompts), desc="generating", unit="answer", leave=False)
    with torch.no_grad(), evaluating(model), _plainly_greedy(model, ends, max_new_tokens):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = _generated(model, tokenizer, [prompts[i] for i in chosen], ends, stop)
            for i, ids in zip(chosen, found, strict=True):
                text = str(tokenizer.decode(_before(ids, ends), skip_special_tokens=True))
                texts[i] = _until(text, stop)
            bar.update(len(chosen))
    bar.close()
    return texts


def check_prompts(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises `ValueError` for a prompt after which a model cannot generate so many tokens."""
    limit = num_positions(model)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"row {i} has a prompt without tokens: there is nothing to generate an answer to")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"row {i} has a prompt of {len(prompt):,} tokens, and an answer of {max_new_tokens:,} would go beyond "
                f"the {limit:,} positions of {type(causal_lm(model)).__name__}: lower max_new_tokens, or drop the row"
            )


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    ends: list[int],
    stop: Sequence[str],
) -> list[list[int]]:
    """Token ids that follow the prompts of a batch, with whatever stands after their ends."""
    device = input_device(model)
    # Any readable id would do: the mask leaves padding out.
    ids, mask = pad(prompts, ends[0] if ends else 0, "left")  # (B, P)
    options: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    generate: Any = model.generate
    found = generate(input_ids=ids.to(device), attention_mask=mask.long().to(device), **options)  # (B, T)
    return found[:, ids.shape[1] :].tolist()


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
