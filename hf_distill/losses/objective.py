"""The settings of a loss, its result, and the protocol of what a teacher says: a signal that knows its own loss.

Shapes: N label-bearing positions, Ds width of the student. Losses are in nats.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_distill.losses.divergence import check_divergence, check_temperature, temperature_factor
from hf_distill.losses.head import Head


@dataclass(frozen=True, eq=False)
class Objective:
    """`(kd_weight * T^2 * sum_i w_i D_T(i) + ce_weight * sum_i CE_1(i)) / num_items`: the settings of a loss.

    The hard-label loss is always taken at temperature 1. The factor is T for `total_variation`, T^2 otherwise.

    Args:
        kd_weight (`float`): weight of the divergence, in [0, 1].
        ce_weight (`float`, *optional*): weight of the hard labels, 0 or more; `1 - kd_weight` by default.
        temperature (`float`): T, of the divergence, in [1e-4, 1e5].
        divergence (`str`): a name in `DIVERGENCES`.
        divergence_params (mapping, *optional*): its parameters.
        token_weights (`torch.Tensor` of shape `(N,)`, *optional*): w, weights of the divergence; 1 by default.
        num_items (`int`, `float` or scalar tensor, *optional*): the divisor, N by default. Below 1 it counts as 1.
        vocab_size (`int`, *optional*):
            The true vocabulary, by default the rows of the student's head. Rows of the heads past it are padding: they
            get no probability and no gradient.
        chunk_size (`int`, *optional*): positions per chunk; by default as many as fit `CHUNK_BYTES`.
        compiled (`bool`):
            Whether to compile the element-wise part on CUDA. It is compiled again whenever a number above changes.
        checked (`bool`):
            Whether labels, and the ids of a signal, have been checked already. A check makes the host wait for the
            device.

    Raises:
        `ValueError`: an unknown divergence or parameter, or a number out of its range.
    """

    kd_weight: float = 0.5
    ce_weight: float | None = None
    temperature: float = 1.0
    divergence: str = "forward_kl"
    divergence_params: Mapping[str, Any] | None = None
    token_weights: Tensor | None = None
    num_items: int | float | Tensor | None = None
    vocab_size: int | None = None
    chunk_size: int | None = None
    compiled: bool = True
    checked: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight has to lie in [0, 1], got {self.kd_weight}")
        if not 0 <= self.hard_weight < math.inf:
            raise ValueError(f"ce_weight has to be at least 0 and finite, got {self.ce_weight}")
        check_temperature(self.temperature)
        check_divergence(self.divergence, self.params)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size has to be at least 1, got {self.chunk_size}")

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the divergence."""
        return dict(self.divergence_params or {})

    @property
    def kd_factor(self) -> float:
        """The factor of the divergence's sum: its weight and its power of the temperature."""
        return self.kd_weight * temperature_factor(self.divergence, self.temperature)

    @property
    def hard_weight(self) -> float:
        """The factor of the hard-label losses' sum."""
        return 1 - self.kd_weight if self.ce_weight is None else self.ce_weight

    def divisor(self, num_rows: int, device: torch.device | None = None) -> int | float | Tensor:
        """The divisor of sums over N = `num_rows` positions; a tensor is moved to `device`."""
        num_items = num_rows if self.num_items is None else self.num_items
        return num_items.to(device=device).clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)


class DistillationLoss(NamedTuple):
    """The loss and what is logged of it. `loss` carries the gradient; the rest are detached sums."""

    loss: Tensor  # scalar, nats per item
    kd: Tensor  # sum of token_weights * divergence, without the temperature factor
    ce: Tensor  # sum of the hard-label losses
    agreement: Tensor  # number of positions at which student and teacher have the same most likely token
    student_entropy: Tensor  # sum of the student's entropies at temperature 1
    num_paired: Tensor  # number of positions that `agreement` counts; 0 where nothing is known of it
    more: Mapping[str, Tensor] = MappingProxyType({})  # sums that only some signals know, by their names in the log


class Signal(Protocol):
    """A teacher's answer at the N label-bearing positions of a batch."""

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """The loss of a student, computed on the device of its head, to which all other tensors are moved.

        Args:
            hidden (`torch.Tensor` of shape `(N, Ds)`), head (`Head`):
                The student's last hidden states, after its final norm, and its head. They get gradients if they
                require some.
            labels (`torch.Tensor` of shape `(N,)`, int64):
                The hard labels; -100 drops only the hard label of a position.
            objective (`Objective`): the settings.

        Raises:
            `ValueError`: shapes that do not fit, a label that is no token, a setting that this signal cannot follow.
        """
        ...


def mean_over_these(known: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """For each name, the mean over those that know it: `DistillationLoss.more` of several signals."""
    found: dict[str, list[Tensor]] = {}
    for name, value in itertools.chain.from_iterable(more.items() for more in known):
        found.setdefault(name, []).append(value)
    return {name: functools.reduce(operator.add, values) / len(values) for name, values in found.items()}


def check_tokens(name: str, tokens: Tensor, vocab_size: int, allowed: int | None = None) -> None:
    """Raises `ValueError` for ids (N,) or (N, K) that are neither `allowed` nor from 0 to `vocab_size - 1`."""
    strange = (tokens < 0) | (tokens >= vocab_size)
    strange = strange if allowed is None else strange & (tokens != allowed)
    if strange.any():
        place = tuple(strange.nonzero()[0].tolist())
        besides = "" if allowed is None else f"{allowed} and "
        raise ValueError(f"{name}{list(place)} is {int(tokens[place])}; {besides}0 to {vocab_size - 1} are possible")
