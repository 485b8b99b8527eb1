"""The loop over chunks of positions that owns the student: its products, its hard labels, and its gradients.

The logits of a language model, (N, V), are its largest tensor by far: 1,024 positions of a 152k-row vocabulary are
0.6 GB in float32, and a plain distillation loss holds ten of them. Here they exist for one chunk of positions at a
time. The gradient is computed in the forward pass, while a chunk's logits are at hand, so nothing is projected twice:
three matrix products for the student, or two with a frozen head, are all there is, whatever the number of signals.

A signal takes part with a `Step`. Hard labels alone are the loop without a step (`losses/hard.py`).

Shapes: N label-bearing positions, n of them in a chunk or a block of it, Ds hidden width, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hf_distill.losses.divergence import DIVERGENCE_TERMS, Terms, log_softmax
from hf_distill.losses.head import Head, HeadGradients, block_rows, default_chunk_size, even_chunks
from hf_distill.losses.objective import DistillationLoss, Objective, Signal, check_tokens, mean_over_these


class Constants(NamedTuple):
    """The numbers of an `Objective` that the element-wise part needs."""

    terms: Callable[..., Terms]  # of the divergence
    params: dict[str, Any]
    kd_factor: float
    ce_weight: float
    temperature: float


class Predictions(NamedTuple):
    """The student's predictions at n positions. Not to be overwritten."""

    logits: Tensor  # (n, V)
    log_probs: Tensor  # (n, V), at the temperature of the divergence
    probs: Tensor  # (n, V), their exponentials


class StepResult(NamedTuple):
    """The result of a step at n positions."""

    gradient: Tensor  # (n, V), of the weighted divergence with respect to the student's logits; it may be overwritten
    kd: Tensor  # scalar, the sum of token_weights * divergence
    agreement: Tensor | None  # scalar, the number of positions with the same most likely token; None: not known


class Step(Protocol):
    """A signal's part in the loop: its inputs at a chunk of positions, and the gradient and the sums they lead to.

    A new signal is one class, a `NamedTuple` of its tensors and of the numbers that it needs. For targets of K ids and
    weights at each position, with the cross-entropy `-sum_k w_k log q_k` as the divergence:

        class SparseStep(NamedTuple):
            ids: Tensor  # (N, K)
            weights: Tensor  # (N, K)
            num_buffers = num_paired = 0
            more = {}

            def inputs_(self, chunk, buffers, constants):
                return self.ids[chunk], self.weights[chunk]

            def differentiate_(self, student, inputs, token_weights, constants):
                ids, weights = inputs
                kd = -(weights * student.log_probs.gather(-1, ids)).sum(-1)
                scale = (token_weights * (constants.kd_factor / constants.temperature)).unsqueeze(-1)
                gradient = student.probs * (scale * weights.sum(-1, keepdim=True))
                gradient.scatter_add_(-1, ids, -scale * weights)
                return StepResult(gradient, (kd * token_weights).sum(), None)

    Its signal ([`ChunkedSignal`]) checks shapes and settings, moves its tensors and makes the step in `step`, and its
    `loss` is `chunked_loss(hidden, head, labels, objective, [(1.0, self)])`.
    """

    @property
    def num_buffers(self) -> int:
        """The number of buffers (n, V) that `inputs_` writes into; all chunks and steps share them."""
        ...

    @property
    def num_paired(self) -> int | Tensor:
        """The number of positions at which the most likely token of the teacher is known."""
        ...

    @property
    def more(self) -> Mapping[str, Tensor]:
        """Sums over the N positions for the log that only this signal knows ([`DistillationLoss.more`])."""
        ...

    def inputs_(self, chunk: slice, buffers: Sequence[Tensor], constants: Constants) -> tuple[Tensor, ...]:
        """The inputs (n, ...) of `differentiate_` at a chunk of positions; `buffers` may be overwritten.

        Not compiled: products of the teacher belong here.
        """
        ...

    def differentiate_(
        self, student: Predictions, inputs: tuple[Tensor, ...], token_weights: Tensor, constants: Constants
    ) -> StepResult:
        """The gradient and the sums, from some rows of `inputs`, which may be overwritten.

        Element-wise work in plain torch, called with blocks of rows, or compiled together with the loop's part of it.
        So it reads no tensor of its own with a row for each position. `token_weights` are (n,).
        """
        ...


@runtime_checkable
class ChunkedSignal(Signal, Protocol):
    """A signal that runs through the loop; several of them share the student's products."""

    def step(self, num_rows: int, vocab_size: int, device: torch.device, objective: Objective) -> Step:
        """The step at N = `num_rows` positions over the true vocabulary, with its tensors on `device`.

        Raises:
            `ValueError`: tensors that do not fit these numbers, or a setting that this signal cannot follow.
        """
        ...


def chunked_loss(
    hidden: Tensor, head: Head, labels: Tensor, objective: Objective, signals: Sequence[tuple[float, ChunkedSignal]]
) -> DistillationLoss:
    """The weighted sum of the losses of signals, over one copy of the student's products.

    Each of these losses includes the hard labels, so with weights that sum to 1 they count once. Without signals, the
    loss is that of the hard labels alone.

    Args:
        hidden (`torch.Tensor` of shape `(N, D)`): as in [`Signal.loss`].
        head ([`Head`]): as there.
        labels (`torch.Tensor` of shape `(N,)`, int64): as there.
        objective ([`Objective`]): as there.
        signals: weights that sum to 1, and signals.
    """
    device = head.weight.device
    hidden, labels = hidden.to(device), labels.to(device)
    num_rows, token_weights = len(hidden), objective.token_weights
    vocab_size = len(head.weight) if objective.vocab_size is None else objective.vocab_size
    check_side("student", hidden, head, vocab_size)
    for name, tensor in (("labels", labels), ("token_weights", token_weights)):
        if tensor is not None and len(tensor) != num_rows:
            raise ValueError(f"{name} has {len(tensor)} rows, student_hidden has {num_rows}")
    steps = [(float(weight), signal.step(num_rows, vocab_size, device, objective)) for weight, signal in signals]
    if not objective.checked:
        check_tokens("labels", labels, vocab_size, allowed=-100)
    if token_weights is None:
        token_weights = hidden.new_ones(num_rows, dtype=torch.float32)
    constants = Constants(
        DIVERGENCE_TERMS[objective.divergence], objective.params, objective.kd_factor, objective.hard_weight,
        objective.temperature,
    )  # fmt: skip
    student = head.truncated(vocab_size).with_product_dtype(hidden)
    chunk_size = objective.chunk_size or default_chunk_size(device, vocab_size)
    loss, sums = _ChunkedLoss.apply(
        hidden, head.weight, head.bias, labels, token_weights.detach().to(device), student, steps, constants,
        objective.divisor(num_rows, device), chunk_size, objective.compiled, torch.is_grad_enabled(),
    )  # fmt: skip
    paired = ((weight, step.num_paired) for weight, step in steps)
    num_paired = sum(weight * (number.to(sums) if isinstance(number, Tensor) else number) for weight, number in paired)
    more = mean_over_these(step.more for _, step in steps)
    return DistillationLoss(loss, *sums[1:].unbind(), num_paired=sums.new_zeros(()) + num_paired, more=more)


def compare(
    student: Predictions, teacher_log_probs: Tensor, token_weights: Tensor, constants: Constants
) -> tuple[Tensor, Tensor]:
    """The divergence between two distributions over the same outcomes, at n positions.

    Returns:
        Its gradient (n, V), with weights and factors, with respect to the student's logits, and its weighted sum.
    """
    term, gradient = constants.terms(student.log_probs, teacher_log_probs, **constants.params)
    kd = (term.sum(-1) * token_weights).sum()
    # d kd / d logits = w * (g - p * sum(g)) / T
    scale = (token_weights * (constants.kd_factor / constants.temperature)).unsqueeze(-1)  # (n, 1)
    gradient = gradient.mul_(scale)
    return gradient.addcmul_(student.probs, -gradient.sum(-1, keepdim=True)), kd


def agreeing(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The number of rows (n, V) in which a token is the most likely one of both sides.

    It is where both are 0 below their maximum. On a CPU, finding the place of a maximum takes ten times as long.
    """
    below, other = (x - x.amax(-1, keepdim=True) for x in (student_logits, teacher_logits))
    return (below.add_(other).amax(-1) == 0).sum()


def check_side(side: str, hidden: Tensor, head: Head, vocab_size: int) -> None:
    """Raises `ValueError` for hidden states and a head that do not fit each other, or not the true vocabulary."""
    weight = head.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden has to be (N, D) and {side}_head (V, D), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size={vocab_size} does not fit {side}_head, which has {weight.shape[0]} rows")


class _ChunkedLoss(torch.autograd.Function):
    """Loss and sums in the forward, together with the gradients that the backward only has to hand out."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, token_weights, student: Head, steps: list[tuple[float, Step]],
        constants: Constants, divisor, chunk_size: int, compiled: bool, grad_enabled: bool,
    ):  # fmt: skip
        needed = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(student, (hidden, weight, bias), needed)
        num_rows, vocab_size = len(hidden), len(student.weight)
        block = block_rows(hidden.device, chunk_size, vocab_size)
        chunk_size = even_chunks(num_rows, chunk_size)
        sums = hidden.new_zeros(5, dtype=gradients.sum_dtype)

        def buffers(number: int) -> list[Tensor]:
            return [sums.new_empty(min(chunk_size, num_rows), vocab_size) for _ in range(number)]

        # Of several steps, each overwrites a copy of the student's products with its gradient, and these are summed.
        (logits,) = buffers(1)
        products, total = buffers(2) if len(steps) > 1 else (logits, logits)
        of_steps = buffers(max((step.num_buffers for _, step in steps), default=0))

        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_rows, chunk_size):
                chunk = slice(start, min(start + chunk_size, num_rows))
                part = hidden[chunk].to(gradients.dtype)  # (n, Ds)
                if len(part) < len(logits):
                    logits, products, total, *of_steps = (x[: len(part)] for x in (logits, products, total, *of_steps))
                rows = labels[chunk], token_weights[chunk].to(sums.dtype)
                student.project_(products, part)
                for index, (weight, step) in enumerate(steps or [(1.0, None)]):
                    if products is not logits:
                        logits.copy_(products)
                    inputs = () if step is None else step.inputs_(chunk, of_steps, constants)
                    sums += weight * _differentiate_chunk_(
                        (logits, *rows, *inputs), student, step, constants, compiled=compiled, block=block
                    )
                    if total is not logits:
                        torch.mul(logits, weight, out=total) if index == 0 else total.add_(logits, alpha=weight)
                gradients.add_(chunk, part, total)

        ctx.gradients, ctx.divisor = gradients, divisor
        ctx.mark_non_differentiable(sums)
        return sums[0] / divisor, sums

    @staticmethod
    def backward(ctx, *gradients):
        return *ctx.gradients.handed_out(gradients[0] / ctx.divisor), *(None,) * 9


def _differentiate_(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *inputs: Tensor,
    student: Head,
    step: Step | None,
    constants: Constants,
) -> Tensor:
    """Overwrites `logits` with the gradient of the loss and returns its sum and those of `DistillationLoss`, (5,).

    The element-wise half of the loss, in plain torch. `logits` (n, V) come as bare products `hidden @ weight.T`.
    """
    logits = student.finish_logits_(logits)
    log_probs = log_softmax(logits)
    probs = log_probs.exp()
    student_entropy = -(probs * log_probs).sum()

    has_label = labels != -100
    target = labels.clamp(min=0).unsqueeze(-1)  # (n, 1)
    ce = -(log_probs.gather(-1, target).squeeze(-1) * has_label).sum()
    ce_scale = (has_label.to(probs.dtype) * constants.ce_weight).unsqueeze(-1)  # (n, 1)

    # d loss / d logits = the step's + ce_weight * (p - one_hot(label))
    if step is None:
        kd = agreement = torch.zeros_like(ce)
        gradient = probs.mul_(ce_scale)
    else:
        predictions = Predictions(logits, log_probs, probs)
        if constants.temperature != 1:
            tempered = log_softmax(logits / constants.temperature)
            predictions = Predictions(logits, tempered, tempered.exp())
        gradient, kd, agreement = step.differentiate_(predictions, inputs, token_weights, constants)
        gradient.addcmul_(probs, ce_scale)
    gradient.scatter_add_(-1, target, -ce_scale)
    logits.copy_(student.products_gradient(gradient, logits))
    total = constants.kd_factor * kd + constants.ce_weight * ce
    agreement = torch.zeros_like(total) if agreement is None else agreement.to(total.dtype)
    return torch.stack([total, kd, ce, agreement, student_entropy])


@functools.cache
def _compiled_differentiate_() -> Callable[..., Tensor]:
    # Not `dynamic=True`: rows become dynamic by themselves, while constants stay the plain numbers that the divergences
    # check; as symbols they would break the graph, and chunk-sized tensors would be written between its parts. Several
    # settings in one process need more than torch's 8 graphs. Past the limit nothing is compiled any more.
    limits = torch._dynamo.config.patch(recompile_limit=64, specialize_float=True)
    compiled = limits(torch.compile(_differentiate_))

    def from_their_start(*rows: Tensor, **options: Any) -> Tensor:
        # A view into the middle of a tensor would need a graph of its own.
        return compiled(*(x.clone() if x.storage_offset() else x for x in rows), **options)

    return from_their_start


def _differentiate_chunk_(
    rows: tuple[Tensor, ...], student: Head, step: Step | None, constants: Constants, *, compiled: bool, block: int
) -> Tensor:
    """`_differentiate_` without copies of a whole chunk: in fused kernels on CUDA, else `block` rows at a time."""
    options = {"student": student, "step": step, "constants": constants}
    if compiled and rows[0].is_cuda:
        return _compiled_differentiate_()(*rows, **options)
    blocks = zip(*(x.split(block) for x in rows), strict=True)
    return torch.stack([_differentiate_(*each, **options) for each in blocks]).sum(0)
