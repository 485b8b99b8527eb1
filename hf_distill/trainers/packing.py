"""Texts that share a row must not see each other: tried out on every model that reads joined rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.modeling import causal_lm, evaluating, last_hidden_states, trying

LENGTH = 8  # tokens of each of the two texts
# Where texts are apart nothing at all moves (5e-7 in mixtures of experts); measured leaks move 1e-2 and more.
TOLERANCE = 1e-4
# The same text in two places of a row: rounding in bf16 makes 2e-2 of it, a wrong position 1e-1 and more.
PLACE_TOLERANCE = 5e-2


def check_packing(trainer: Any, dataset: Any) -> None:
    """Tries student and teachers with two texts in one row, if the trainer's collator joins rows of this dataset.

    The second text has to read the same whatever the first one is. Its place stays, so the hidden states are equal in
    any precision; a comparison with the text read alone would drown in the noise of 4-bit weights. Only rounding that
    depends on the whole batch (8-bit layers) moves them: it is measured on the same texts in rows of their own. Where
    both texts are the same, they have to read the same.

    Args:
        trainer ([`KDTrainer`]): with student, teachers and collator.
        dataset: prepared rows.

    Raises:
        `ValueError`: a model's attention or recurrence crosses the border between texts, or the model cannot read such
            rows at all.
    """
    rows = trainer.first_rows(dataset, 2)
    is_packed = bool(rows) and "seq_lengths" in rows[0]
    if is_packed in trainer.tried_packings or not _joins(trainer.data_collator, rows):
        return
    batches = joined_rows(trainer.data_collator, is_packed, trainer.vocab_size)
    student, device = trainer.student, trainer.args.device
    batches = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
    positions = torch.arange(2 * LENGTH, device=device)

    def student_reads(batch: dict[str, Any]) -> Tensor:
        with trainer.trying_out(), evaluating(student):
            return last_hidden_states(student, **batch).flatten(0, 1)[: len(positions)]  # without padding

    refuse_leaks(student_reads, batches, "student", student)
    for name, teacher in trainer.teachers.items():
        called, model = "teacher" if len(trainer.teachers) == 1 else f"teacher {name}", causal_lm(teacher.model)
        refuse_leaks(lambda batch, teacher=teacher: teacher(batch, positions)[0].hidden, batches, called, model)
    trainer.tried_packings.add(is_packed)


def _joins(collator: Any, rows: Sequence[Mapping[str, Any]]) -> bool:
    """True if rows hold several texts, or become one row of a batch."""
    if not rows or "input_ids" not in rows[0]:
        return False
    return "seq_lengths" in rows[0] or len(collator(list(rows)).get("input_ids", rows)) < len(rows)


def joined_rows(collator: Any, is_packed: bool, vocab_size: int) -> list[dict[str, Any]]:
    """Two batches of one row (1, 16) of two texts: the same one twice, and another one before it."""
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
    """Raises `ValueError` if `read`, hidden states (16, D) of a batch, lets the two texts of [`joined_rows`] mix."""
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
        raise ValueError(f"{who} does not begin anew to count positions with the second text of a row. {remedy}")


def _moved(same: Tensor, other: Tensor) -> float:
    """The largest difference between the second texts of two (16, D), relative to the largest number of the first."""
    return ((same - other)[LENGTH:].abs().max() / same[LENGTH:].abs().max()).item()
