"""A probe on every model that reads packed rows: texts that share a row must not see each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.modeling import trying

LENGTH = 8  # tokens of each of the two texts
# The largest relative change without a leak: it is 0, or 5e-7 in mixtures of experts. Measured leaks are 1e-2 and more.
TOLERANCE = 1e-4
# The largest relative difference of one text at two positions in a row: 2e-2 by rounding in bf16. A wrong position
# makes 1e-1 and more.
PLACE_TOLERANCE = 5e-2


def check_packing(
    readers: Sequence[tuple[Any, ...]],
    collator: Any,
    is_packed: bool,
    vocab_size: int,
    device: torch.device,
) -> None:
    """Probes models with two texts in one row, as the collator joins them.

    The hidden states of the second text must not depend on the first text. Both probes have the second text at the same
    position, so its hidden states are equal in any precision. A comparison with the text read alone would be hidden by
    the noise of 4-bit weights. Only rounding that depends on the whole batch (8-bit layers) changes the hidden states;
    this change is measured on the same texts in separate rows. If both texts are equal, their hidden states have to be
    equal, too.

    Args:
        readers: for each model, its name, the model, and a function from a batch to hidden states (n, D) of all tokens.
        collator: the trainer's collator.
        is_packed (`bool`): true if the rows of the dataset already hold several texts.
        vocab_size (`int`): token ids below this can be read.

    Raises:
        `ValueError`: a model's attention or recurrence crosses the border between texts, or the model cannot read such
            rows.
    """
    batches = joined_rows(collator, is_packed, vocab_size)
    batches = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    for name, model, read, *_ in readers:
        refuse_leaks(lambda batch, read=read: read(batch)[: 2 * LENGTH], batches, name, model)  # without padding


def joins(collator: Any, rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if a row holds several texts, or if the collator joins rows into one."""
    if not rows or "input_ids" not in rows[0]:
        return False
    return "seq_lengths" in rows[0] or len(collator(list(rows)).get("input_ids", rows)) < len(rows)


def joined_rows(collator: Any, is_packed: bool, vocab_size: int) -> list[dict[str, Any]]:
    """Two batches of one row (1, 16) of two texts. First the same text twice, then another text before it."""
    second = [(5 * i + 37) % vocab_size for i in range(LENGTH)]
    batches = []
    for first in (second, [(token + 1 + vocab_size // 2) % vocab_size for token in second]):
        texts = [[*first, *second]] if is_packed else [first, second]
        examples: list[dict[str, Any]] = [{"input_ids": ids, "labels": ids} for ids in texts]
        if is_packed:
            examples[0]["seq_lengths"] = [LENGTH, LENGTH]
        batches.append({name: value for name, value in collator(examples).items() if name != "labels"})
    return batches


def refuse_leaks(
    read: Callable[[dict[str, Any]], Tensor], batches: Sequence[dict[str, Any]], called: str, model: PreTrainedModel
) -> None:
    """Raises `ValueError` if `read`, the hidden states (16, D) of a batch, shows that the two texts see each other."""
    who = f"the {called} ({type(model).__name__})"
    remedy = (
        "Set packing, eval_packing and padding_free to False, or load the model with an attn_implementation that "
        "keeps packed texts apart (flash_attention_2)"
    )
    with torch.no_grad(), trying(f"{who} cannot read several texts in one row, as packing and padding_free make them"):
        same, other = (read(dict(batch)).float() for batch in batches)  # (16, D)
        apart = [batch["input_ids"][:, : 2 * LENGTH].view(2, LENGTH) for batch in batches]
        noise = _moved(*(read({"input_ids": ids}).float() for ids in apart))
    moved = _moved(same, other)
    if not moved <= max(TOLERANCE, 2 * noise):
        raise ValueError(
            f"{who} lets texts that share a row see each other: another first text moves the hidden states of the "
            f"second by {moved:.1%}. {remedy}"
        )
    place = (same[:LENGTH] - same[LENGTH:]).abs().max() / same[LENGTH:].abs().max()
    if not place <= PLACE_TOLERANCE:
        raise ValueError(f"{who} does not restart its positions at the second text of a row. {remedy}")


def _moved(same: Tensor, other: Tensor) -> float:
    """The largest difference between the second texts of two (16, D), relative to the largest value of the first."""
    return ((same - other)[LENGTH:].abs().max() / same[LENGTH:].abs().max()).item()
