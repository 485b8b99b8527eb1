"""Hard labels and any divergence to dense distributions, straight from the hidden states and heads of both sides.

The teacher's logits are made like the student's, for one chunk of positions at a time (`losses/loop.py`): one more
matrix product for each teacher. Several teachers are one mixture, over the logits of one of them at a time.

Shapes: N label-bearing positions, n of them in a chunk, Ds and Dt hidden widths, V vocabulary. Losses are in nats.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.divergence import log_softmax
from hf_distill.losses.head import Head, default_chunk_size
from hf_distill.losses.loop import (
    Constants,
    Predictions,
    Step,
    StepResult,
    agreeing,
    check_side,
    chunked_loss,
    compare,
)
from hf_distill.losses.objective import DistillationLoss, Objective

__all__ = [
    "DistillationLoss", "Head", "MixtureSignal", "Objective", "TeacherSignal", "default_chunk_size",
    "fused_linear_distillation_loss",
]  # fmt: skip


class TeacherSignal(NamedTuple):
    """A teacher's answer at N positions: its hidden states, and the head that turns them into logits."""

    hidden: Tensor  # (N, Dt), last hidden states, without gradient
    head: Head
    weight: float | Tensor = 1.0  # in a mixture: its share, or one (N,) for each position
    layers: Mapping[int, Tensor] | None = None  # (N, Dt) of the inner layers asked for

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """The divergence to this teacher, and hard labels ([`Signal.loss`])."""
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows: int, vocab_size: int, device: torch.device, objective: Objective) -> Step:
        """As in [`ChunkedSignal.step`]."""
        return _dense_step([self], num_rows, vocab_size, device)


class MixtureSignal(NamedTuple):
    """Several teachers as one: the mixture of their distributions, each at the temperature.

    Weights are taken as they are: over all teachers of a position they have to sum to 1. With ones and zeros for each
    position they are routing.
    """

    signals: Sequence[TeacherSignal]

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """One divergence to the mixture, and hard labels ([`Signal.loss`])."""
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows: int, vocab_size: int, device: torch.device, objective: Objective) -> Step:
        """As in [`ChunkedSignal.step`]."""
        return _dense_step(self.signals, num_rows, vocab_size, device)


class _DenseStep(NamedTuple):
    """Teachers whose tensors are on the device of the loss, and the head that finishes what they are mixed to."""

    teachers: Sequence[TeacherSignal]
    head: Head

    more = MappingProxyType({})

    @property
    def num_paired(self) -> int:
        return len(self.teachers[0].hidden)

    @property
    def num_buffers(self) -> int:
        return 1 if len(self.teachers) == 1 else 2  # for a mixture, and the logits of one teacher at a time

    def inputs_(self, chunk: slice, buffers: Sequence[Tensor], constants: Constants) -> tuple[Tensor]:
        if len(self.teachers) == 1:
            hidden, head = self.teachers[0].hidden, self.teachers[0].head
            head.project_(buffers[0], hidden[chunk].to(head.product_dtype(hidden)))
        else:
            _mix_(buffers[0], chunk, self.teachers, constants.temperature, buffers[1])
        return (buffers[0],)

    def differentiate_(
        self, student: Predictions, inputs: tuple[Tensor, ...], token_weights: Tensor, constants: Constants
    ) -> StepResult:
        (teacher_logits,) = inputs
        teacher_logits = self.head.finish_logits_(teacher_logits)  # (n, V)
        agreement = agreeing(student.logits, teacher_logits)
        if constants.temperature != 1:
            teacher_logits = teacher_logits.div_(constants.temperature)
        teacher_log_probs = log_softmax(teacher_logits)
        gradient, kd = compare(student, teacher_log_probs, token_weights, constants)
        return StepResult(gradient, kd, agreement)


def _dense_step(teachers: Sequence[TeacherSignal], num_rows: int, vocab_size: int, device: torch.device) -> _DenseStep:
    """The step of a mixture of teachers, as it is in `ChunkedSignal.step`."""
    ready = []
    for teacher in teachers:
        hidden, head, weight = teacher.hidden.to(device).detach(), teacher.head.to(device), teacher.weight
        check_side("teacher", hidden, head, vocab_size)
        if len(hidden) != num_rows:
            raise ValueError(f"teacher_hidden has {len(hidden)} rows, student_hidden has {num_rows}")
        head = head.truncated(vocab_size).with_product_dtype(hidden)
        ready.append(TeacherSignal(hidden, head, weight.to(device) if isinstance(weight, Tensor) else weight))
    return _DenseStep(ready, ready[0].head if len(ready) == 1 else Head(ready[0].head.weight))


def _mix_(out: Tensor, chunk: slice, teachers: Sequence[TeacherSignal], temperature: float, scratch: Tensor) -> None:
    """Overwrites `out` (n, V) with logits whose softmax at the temperature is the teachers' mixture at a chunk.

    `scratch` (n, V) holds the logits of one teacher at a time.
    """
    out.fill_(-torch.inf)
    for teacher in teachers:
        hidden, head, weight = teacher.hidden[chunk], teacher.head, teacher.weight
        if isinstance(weight, Tensor):
            weight = weight[chunk]
            rows = weight.nonzero().squeeze(1)  # where a teacher has no say, it is not asked
            hidden, log_weight = hidden[rows], weight[rows].log().unsqueeze(1)
        else:
            rows, log_weight = slice(None), math.log(weight) if weight else -torch.inf
        logits = scratch[: len(hidden)]
        head.project_(logits, hidden.to(head.product_dtype(hidden)))
        logits = head.finish_logits_(logits).div_(temperature)
        logits.sub_(logits.logsumexp(-1, keepdim=True) - log_weight)
        out[rows] = torch.logaddexp(out[rows], logits)
    out.mul_(temperature)


def fused_linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    divergence_params: dict | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
) -> DistillationLoss:
    """`(kd_weight * T^2 * sum_i w_i D_T(i) + (1 - kd_weight) * sum_i CE_1(i)) / num_items` without [N x V] logits.

    The hard-label loss is always taken at temperature 1. The factor is T for `total_variation`, T^2 otherwise. Products
    of half-precision inputs are accumulated in float32, as is everything element-wise; float64 stays float64.

    Args:
        student_hidden (`torch.Tensor` of shape `(N, Ds)`):
            Last hidden states of the student, after its final norm. Gets a gradient if it requires one.
        student_head (`torch.Tensor` of shape `(V, Ds)`):
            Weight of the student's output layer. A frozen head costs no gradient.
        teacher_hidden (`torch.Tensor` of shape `(N, Dt)`), teacher_head (`torch.Tensor` of shape `(Vt, Dt)`):
            The same of the teacher, on the student's device. Never gets a gradient.
        labels (`torch.Tensor` of shape `(N,)`, int64):
            The token that follows each position, below `vocab_size`; -100 drops only the hard label there. To drop a
            position, do not pass it.
        kd_weight (`float`): weight of the divergence, in [0, 1]; hard labels get `1 - kd_weight`.
        temperature (`float`): of the divergence, in [1e-4, 1e5].
        divergence (`str`): a name in `DIVERGENCES`.
        divergence_params (`dict`, *optional*): its parameters.
        token_weights (`torch.Tensor` of shape `(N,)`, *optional*): weights of the divergence term.
        num_items (`int`, `float` or scalar tensor, *optional*):
            The divisor, N by default. Below 1 it counts as 1.
        vocab_size (`int`, *optional*):
            The true vocabulary. Rows of the heads past it are padding: they get no probability and no gradient.
        student_bias (`torch.Tensor` of shape `(Vs,)`, *optional*): bias of the head.
        teacher_bias (`torch.Tensor` of shape `(Vt,)`, *optional*): the same of the teacher.
        student_logit_scale (`float`): factor of the logits (Cohere, Granite).
        teacher_logit_scale (`float`): the same of the teacher.
        student_softcap (`float`, *optional*): logits become `c * tanh(logits / c)` (Gemma 2).
        teacher_softcap (`float`, *optional*): the same of the teacher.
        chunk_size (`int`, *optional*): positions per chunk; by default as many as fit `CHUNK_BYTES`.

    Raises:
        `ValueError`: shapes that do not fit, an unknown divergence or parameter, a number out of its range, a label
            that is no token.
    """
    objective = Objective(
        kd_weight=kd_weight, temperature=temperature, divergence=divergence, divergence_params=divergence_params,
        token_weights=token_weights, num_items=num_items, vocab_size=vocab_size, chunk_size=chunk_size,
    )  # fmt: skip
    student = Head(student_head, student_bias, student_logit_scale, student_softcap)
    teacher = Head(teacher_head, teacher_bias, teacher_logit_scale, teacher_softcap)
    if vocab_size is None and len(teacher_head) != len(student_head):
        raise ValueError(
            f"the student's head has {len(student_head)} rows and the teacher's {len(teacher_head)}: pass vocab_size, "
            "the number of tokens that both tokenizers share"
        )
    return TeacherSignal(teacher_hidden, teacher).loss(student_hidden, student, labels, objective)
