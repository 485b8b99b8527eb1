"""The number of label-bearing tokens of a batch, counted for all micro-batches of an update at once.

The loss takes sizes from this number, so the host needs it, and waits until the device has done all that it was asked.
Before the first micro-batch that is the last step of the optimizer at most.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.token_rows import check_batch, look_at_batch

Batch = Mapping[str, Any]


class LabelCounts:
    """The number N of label-bearing tokens of a batch, remembered for the batches of an update.

    Autograd counts what writes to a tensor, and a batch that was written to is counted again. It does not see writes
    through `.data` or a NumPy view: code that changes labels so has to make new tensors.

    Args:
        arguments: makes those of [`~hf_distill.token_rows.check_batch`] of a batch.
    """

    def __init__(self, arguments: Callable[[Batch], tuple[Batch, str, int, int, int | None]]) -> None:
        self._arguments = arguments
        self._known: list[tuple[list[tuple[Tensor, float]], int]] = []

    def look_at(self, batches: Sequence[Batch]) -> None:
        """Remembers N of these batches, in place of all others; the host waits for the device once.

        A batch that has a fault is refused where it is used.
        """
        self._known, looked = [], []
        for batch in batches:
            try:
                looked.append((batch, look_at_batch(*self._arguments(batch))[0]))
            except ValueError:
                continue
        if looked:
            numbers = torch.stack([found for _, found in looked]).tolist()
            self._known = [
                (_tensors(batch), number) for (batch, _), (number, bad) in zip(looked, numbers, strict=True) if not bad
            ]

    def __call__(self, batch: Batch) -> int:
        """N of a batch. What is remembered holds for the same tensors, unchanged since; any other batch is checked."""
        mine = _tensors(batch)
        for known, number in self._known:
            if len(known) == len(mine) and all(a is b and i == j for (a, i), (b, j) in zip(known, mine, strict=True)):
                return number
        return self._check(batch)

    def _check(self, batch: Batch) -> int:
        return check_batch(*self._arguments(batch))


def _tensors(batch: Batch) -> list[tuple[Tensor, float]]:
    """The tensors that N depends on, each with the number of writes to it.

    For an inference tensor this number is not known. It is nan then, which equals nothing, so the batch is checked.
    """
    found = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    return [(tensor, math.nan if tensor.is_inference() else tensor._version) for tensor in found if tensor is not None]
