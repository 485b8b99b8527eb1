"""The weighted sum of signals."""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from hf_distill.losses.head import Head
from hf_distill.losses.loop import ChunkedSignal, chunked_loss
from hf_distill.losses.objective import DistillationLoss, Objective, Signal, mean_over_these


class SumSignal(NamedTuple):
    """Several teachers, to each of which the student has a divergence of its own.

    The loss and all of its sums are the weighted sums of the members'. Each of them has the hard labels, so weights
    that sum to 1 count these once.
    """

    members: Sequence[tuple[float, Signal]]  # weights and signals

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """As in [`Signal.loss`]. Members that run through the loop share the student's products."""
        members = [(weight, signal) for weight, signal in self.members if weight]
        chunked = [(weight, signal) for weight, signal in members if isinstance(signal, ChunkedSignal)]
        parts: list[tuple[float, DistillationLoss]] = []
        if chunked:
            share = sum(weight for weight, _ in chunked)
            shares = [(weight / share, signal) for weight, signal in chunked]
            parts.append((share, chunked_loss(hidden, head, labels, objective, shares)))
        parts += [
            (weight, signal.loss(hidden, head, labels, objective))
            for weight, signal in members
            if not isinstance(signal, ChunkedSignal)
        ]
        if not parts:
            raise ValueError("a sum of signals needs one with a weight")
        sums = {
            name: _total(weight * getattr(part, name) for weight, part in parts)
            for name in DistillationLoss._fields
            if name != "more"
        }
        return DistillationLoss(**sums, more=mean_over_these(part.more for _, part in parts))


def _total(values: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, values)
