"""Hard labels and the cross-entropy to a sparse target: ids and weights of K tokens at each position.

A sample of a teacher's distribution t is such a target w. With E[w] = t, the gradient of the forward KL is unbiased:

    sum_v t_v log(t_v / q_v) = E[-sum_k w_k log q_k] - H(t)

The left side is linear in t but for its entropy H, which no student changes. No other divergence has that property, and
no temperature but the one at which t was sampled. `hf_distill/samplers.py` draws such targets.

Shapes: N label-bearing positions, n of them in a chunk, K entries of a target, V vocabulary. Losses are in nats.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.head import Head
from hf_distill.losses.loop import Constants, Predictions, Step, StepResult, chunked_loss
from hf_distill.losses.objective import DistillationLoss, Objective, check_tokens

# In the log: the share of the teacher's probability whose tokens have their exact probability.
EXACT_MASS = "teacher/exact_mass"


class SparseSignal(NamedTuple):
    """What is kept of a teacher at N positions: K tokens and their weights.

    A target with fewer entries has weights of 0 at the end, beside any token. Weights that sum to 1 are a target for
    the forward KL; nothing is renormalised.
    """

    ids: Tensor  # (N, K), integers; the exact entries first, and the most likely token first of all
    weights: Tensor  # (N, K)
    entropy: Tensor | None = None  # (N,), of the teacher, in nats; without it `kd` is the cross-entropy
    num_exact: Tensor | None = None  # (N,), the number of entries whose weight is the teacher's probability
    temperature: float = 1.0  # of the distribution that was sampled
    vocab_size: int | None = None  # over which it was a distribution; None: that of the loss, whatever it is

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """The forward KL to this target, and hard labels ([`Signal.loss`]).

        Returns:
            [`DistillationLoss`]. `kd` may be negative, because a target is not its mean. `agreement` is counted where
            an entry is exact, since there the most likely token is known. `more` has the sum of the exact weights.
        """
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows: int, vocab_size: int, device: torch.device, objective: Objective) -> Step:
        """As in [`ChunkedSignal.step`]; ids are looked at unless `objective.checked`."""
        if objective.divergence != "forward_kl":
            raise ValueError(
                f"divergence={objective.divergence!r} cannot be computed from a sparse target, which is unbiased for "
                "forward_kl only; take forward_kl, or hidden states or all probabilities of the teacher"
            )
        if objective.temperature != self.temperature:
            raise ValueError(
                f"temperature={objective.temperature} differs from that of the sparse target, {self.temperature}; the "
                "probabilities of the other tokens, which a change would need, are not known"
            )
        if self.vocab_size not in (None, vocab_size):
            raise ValueError(
                f"the sparse target is a distribution over {self.vocab_size} tokens, and the student's has {vocab_size}"
            )
        ids, weights = self.ids.to(device), self.weights.to(device).detach()
        entropy = weights.new_zeros(num_rows) if self.entropy is None else self.entropy.to(device).detach()
        num_exact = None if self.num_exact is None else self.num_exact.to(device)
        check_entries("weights", ids, weights, num_rows)
        for name, tensor in (("entropy", entropy), ("num_exact", num_exact)):
            if tensor is not None and tensor.shape != (num_rows,):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, student_hidden has {num_rows} rows")
        if not objective.checked:
            check_tokens("ids", ids, vocab_size)
        return _SparseStep(ids.long(), weights, entropy, num_exact)


class _SparseStep(NamedTuple):
    """The tensors of a [`SparseSignal`] on the device of the loss."""

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    num_exact: Tensor | None

    num_buffers = 0

    @property
    def num_paired(self) -> int | Tensor:
        return 0 if self.num_exact is None else (self.num_exact > 0).sum()

    @property
    def more(self) -> Mapping[str, Tensor]:
        if self.num_exact is None:
            return {}
        is_exact = torch.arange(self.ids.shape[1], device=self.ids.device) < self.num_exact.unsqueeze(-1)  # (N, K)
        return {EXACT_MASS: (self.weights * is_exact).sum(dtype=torch.float32)}

    def inputs_(self, chunk: slice, buffers: Sequence[Tensor], constants: Constants) -> tuple[Tensor, ...]:
        inputs = self.ids[chunk], self.weights[chunk], self.entropy[chunk]
        if self.num_exact is None:
            return inputs
        return *inputs, self.ids[chunk, 0].where(self.num_exact[chunk] > 0, -1)

    def differentiate_(
        self, student: Predictions, inputs: tuple[Tensor, ...], token_weights: Tensor, constants: Constants
    ) -> StepResult:
        ids, weights, entropy, *likeliest = inputs
        weights = weights.to(student.log_probs.dtype)
        kd = -(weights * student.log_probs.gather(-1, ids)).sum(-1) - entropy
        # d kd / d logits = w * (p * sum(weights) - weights) / T
        scale = (token_weights * (constants.kd_factor / constants.temperature)).unsqueeze(-1)  # (n, 1)
        gradient = student.probs * (scale * weights.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, ids, -scale * weights)
        agreement = (student.logits.argmax(-1) == likeliest[0]).sum() if likeliest else None
        return StepResult(gradient, (kd * token_weights).sum(), agreement)


def check_entries(name: str, ids: Tensor, values: Tensor, num_rows: int) -> None:
    """Raises `ValueError` unless ids and what belongs to them are (N, K), with K of at least 1."""
    if ids.dim() != 2 or ids.shape != values.shape or ids.shape[1] == 0:
        raise ValueError(f"ids and {name} have to be (N, K), got {tuple(ids.shape)} and {tuple(values.shape)}")
    if ids.is_floating_point():
        raise ValueError(f"ids have to be integers, got {ids.dtype}")
    if len(ids) != num_rows:
        raise ValueError(f"ids has {len(ids)} rows, student_hidden has {num_rows}")
