"""Hard labels and a divergence to what is kept of a teacher: K tokens at each position, as a sample or the most likely.

**A sample** w of the teacher's distribution t ([`SparseSignal`]) serves forward KL. With E[w] = t, the gradient is
unbiased, because the divergence is linear in t but for its entropy H, which no student changes:

    sum_v t_v log(t_v / q_v) = E[-sum_k w_k log q_k] - H(t)

No other divergence has that property, and no temperature but the one at which t was sampled. `hf_distill/samplers.py`
draws such targets.

**The K most likely tokens** ([`TopKSignal`]) serve every divergence, over K + 1 outcomes: all other tokens together are
one outcome, on both sides. To put tokens together makes a KL, a skewed KL, the Jensen-Shannon divergence and total
variation smaller, never larger. Without that outcome, or with probabilities that are normalised over the K tokens, the
student would learn to give nothing to the others.

Shapes: N label-bearing positions, n of them in a chunk, K entries at each, V vocabulary. Losses are in nats.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.divergence import LOG_ZERO, log_softmax
from hf_distill.losses.head import Head
from hf_distill.losses.loop import Constants, Predictions, Step, StepResult, agreeing, chunked_loss, compare
from hf_distill.losses.objective import DistillationLoss, Objective, check_tokens

# In the log: the share of the teacher's probability that belongs to tokens whose own probability is known.
EXACT_MASS = "teacher/exact_mass"
# Numbers with a larger sum are no probabilities. Probabilities that were rounded to bfloat16 may have the sum 1.01.
LARGEST_MASS = 1.05


class SparseSignal(NamedTuple):
    """A sparse target at N positions: K tokens of a teacher and their weights.

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
            raise ValueError(_another_vocabulary("probabilities of the sparse target", self.vocab_size, vocab_size))
        ids, weights = self.ids.to(device), self.weights.to(device).detach()
        entropy = weights.new_zeros(num_rows) if self.entropy is None else self.entropy.to(device).detach()
        num_exact = None if self.num_exact is None else self.num_exact.to(device)
        check_entries("weights", ids, weights, num_rows)
        for name, tensor in (("entropy", entropy), ("num_exact", num_exact)):
            if tensor is not None and tensor.shape != (num_rows,):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, student_hidden has {num_rows} rows")
        if not objective.checked:
            check_tokens("ids", ids, vocab_size)
        return _SampledStep(ids.long(), weights, entropy, num_exact)


class TopKSignal(NamedTuple):
    """The log-probabilities of K tokens at N positions, the teacher's most likely one among them.

    If K is the whole vocabulary, this is the dense loss: the log-probabilities are normalised, and any temperature is
    possible. Otherwise they are not normalised: 1 minus their sum is the probability of all other tokens together.
    """

    ids: Tensor  # (N, K), integers, each once; -1 for no entry, but not in the first column
    log_probs: Tensor  # (N, K), in nats, at temperature 1
    log_tail: Tensor | None = None  # (N,), of all other tokens together, where it is known better than from log_probs
    vocab_size: int | None = None  # over which they are a distribution; None: that of the loss, whatever it is

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """The divergence to this teacher over K + 1 outcomes, and hard labels ([`Signal.loss`]).

        `more` has the sum over positions of the K probabilities.
        """
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows: int, vocab_size: int, device: torch.device, objective: Objective) -> Step:
        """As in [`ChunkedSignal.step`]; ids and log-probabilities are looked at unless `objective.checked`."""
        ids, log_probs = self.ids.to(device), self.log_probs.to(device).detach()
        log_tail = None if self.log_tail is None else self.log_tail.to(device).detach()
        check_entries("log_probs", ids, log_probs, num_rows)
        if self.vocab_size not in (None, vocab_size):
            raise ValueError(_another_vocabulary("log_probs", self.vocab_size, vocab_size))
        if log_tail is not None and log_tail.shape != (num_rows,):
            raise ValueError(f"log_tail is {tuple(log_tail.shape)}, student_hidden has {num_rows} rows")
        num_entries = ids.shape[1]
        if num_entries > vocab_size:
            raise ValueError(f"ids has {num_entries} entries a row, and there are {vocab_size} tokens")
        if objective.temperature != 1 and num_entries < vocab_size:
            raise ValueError(
                f"temperature={objective.temperature} needs the log-probabilities of all {vocab_size} tokens, and "
                f"there are {num_entries}: how the rest divides among the others is not known; take temperature=1"
            )
        if not objective.checked:
            _check_top(ids, log_probs, vocab_size)
        ids = ids.long()
        if num_entries == vocab_size:
            return _WholeStep(ids, log_probs)
        lacking, eps = ids < 0, torch.finfo(log_probs.dtype).eps
        log_probs = _widened(log_probs.masked_fill(lacking, -torch.inf))
        log_tail = log_tail_of(log_probs, eps) if log_tail is None else _widened(log_tail)
        return _TopKStep(ids.where(~lacking, ids[:, :1]), lacking, log_probs, log_tail)


class _SampledStep(NamedTuple):
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
        agreement = _num_agreeing(student.logits, *likeliest) if likeliest else None
        return StepResult(gradient, (kd * token_weights).sum(), agreement)


class _TopKStep(NamedTuple):
    """The tensors of a [`TopKSignal`] on the device of the loss. Where an entry lacks, its id repeats the first one."""

    ids: Tensor
    lacking: Tensor  # (N, K), bool
    log_probs: Tensor  # LOG_ZERO where an entry lacks
    log_tail: Tensor

    num_buffers = 0

    @property
    def num_paired(self) -> int:
        return len(self.ids)

    @property
    def more(self) -> Mapping[str, Tensor]:
        return {EXACT_MASS: -torch.expm1(self.log_tail).sum()}

    def inputs_(self, chunk: slice, buffers: Sequence[Tensor], constants: Constants) -> tuple[Tensor, ...]:
        teacher = torch.cat([self.log_probs[chunk], self.log_tail[chunk].unsqueeze(-1)], -1)  # (n, K + 1)
        return self.ids[chunk], self.lacking[chunk], teacher

    def differentiate_(
        self, student: Predictions, inputs: tuple[Tensor, ...], token_weights: Tensor, constants: Constants
    ) -> StepResult:
        ids, lacking, teacher = inputs
        agreement = _num_agreeing(student.logits, ids.gather(-1, teacher[:, :-1].argmax(-1, keepdim=True)).squeeze(-1))
        outcomes, others = coarse_outcomes(student.log_probs, ids, lacking)
        outcomes = Predictions(student.logits, outcomes, outcomes.exp())
        gradient, kd = compare(outcomes, teacher.to(outcomes.log_probs.dtype), token_weights, constants)
        # That of the last outcome is divided among its tokens as its probability is.
        spread = others.softmax(-1).mul_(gradient[:, -1:])
        return StepResult(spread.scatter_add_(-1, ids, gradient[:, :-1]), kd, agreement)


class _WholeStep(NamedTuple):
    """The tensors of a [`TopKSignal`] that has all tokens, on the device of the loss."""

    ids: Tensor
    log_probs: Tensor

    num_buffers = 1

    @property
    def num_paired(self) -> int:
        return len(self.ids)

    @property
    def more(self) -> Mapping[str, Tensor]:
        return {EXACT_MASS: torch.tensor(float(len(self.ids)), device=self.ids.device)}

    def inputs_(self, chunk: slice, buffers: Sequence[Tensor], constants: Constants) -> tuple[Tensor]:
        return (buffers[0].scatter_(-1, self.ids[chunk], self.log_probs[chunk].to(buffers[0].dtype)),)

    def differentiate_(
        self, student: Predictions, inputs: tuple[Tensor, ...], token_weights: Tensor, constants: Constants
    ) -> StepResult:
        (teacher,) = inputs  # (n, V)
        agreement = agreeing(student.logits, teacher)
        teacher_log_probs = log_softmax(teacher.div_(constants.temperature))
        gradient, kd = compare(student, teacher_log_probs, token_weights, constants)
        return StepResult(gradient, kd, agreement)


def _num_agreeing(logits: Tensor, likeliest: Tensor) -> Tensor:
    """The number of rows of `logits` (n, V) with their largest one at `likeliest` (n,), where that is not -1."""
    # `amax` takes a quarter of the time of `argmax` on a CPU.
    agrees = logits.gather(-1, likeliest.clamp(min=0).unsqueeze(-1)).squeeze(-1) == logits.amax(-1)
    return (agrees & (likeliest >= 0)).sum()


def coarse_outcomes(log_probs: Tensor, ids: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities (n, K + 1) of K tokens and of all others together, and those (n, V) of the others alone.

    Where an entry is `lacking` (n, K), its id is that of another one.
    """
    # Summed up, and not 1 minus the others: so it has all its digits, however little is left.
    others = log_probs.scatter(-1, ids, -torch.inf)  # (n, V)
    known = log_probs.gather(-1, ids).masked_fill(lacking, LOG_ZERO)
    return torch.cat([known, others.logsumexp(-1, keepdim=True)], -1), others


def log_tail_of(log_probs: Tensor, eps: float) -> Tensor:
    """`log(1 - sum of probabilities)` (N,), where at least `eps`, the rounding of the sum, is left.

    Without this minimum, the rounding would decide a divergence that contains this logarithm.
    """
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - eps))


def _widened(log_probs: Tensor) -> Tensor:
    """Log-probabilities in float32 or better, none below `LOG_ZERO`."""
    return log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)).clamp(min=LOG_ZERO)


def check_entries(name: str, ids: Tensor, values: Tensor, num_rows: int) -> None:
    """Raises `ValueError` unless ids and what belongs to them are (N, K), with K of at least 1."""
    if ids.dim() != 2 or ids.shape != values.shape or ids.shape[1] == 0:
        raise ValueError(f"ids and {name} have to be (N, K), got {tuple(ids.shape)} and {tuple(values.shape)}")
    if ids.is_floating_point():
        raise ValueError(f"ids have to be integers, got {ids.dtype}")
    if len(ids) != num_rows:
        raise ValueError(f"ids has {len(ids)} rows, student_hidden has {num_rows}")


def _check_top(ids: Tensor, log_probs: Tensor, vocab_size: int) -> None:
    """Raises `ValueError` for ids that are no tokens or come twice, and for what is no log-probability."""
    check_tokens("ids", ids, vocab_size, allowed=-1 if ids.shape[1] < vocab_size else None)
    lacking, ordered = ids < 0, ids.sort(-1).values
    if lacking[:, 0].any():
        raise ValueError(
            f"ids[{int(lacking[:, 0].nonzero()[0])}, 0] is -1; a row needs at least one entry, and it first"
        )
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(f"ids[{row}] has {int(ordered[row, column])} twice")
    mass = log_probs.float().masked_fill(lacking, -torch.inf).exp().sum(-1)
    wrong = ~(mass <= LARGEST_MASS)  # NaN among them
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"log_probs[{row}] are the logarithms of numbers that sum to {mass[row]:.4g}, not 1 at most")


def _another_vocabulary(name: str, theirs: int | None, students: int) -> str:
    return f"{name} are over {theirs} tokens, and the student has {students}"
