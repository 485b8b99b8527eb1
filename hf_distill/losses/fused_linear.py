"""Hard labels and any divergence, straight from hidden states and heads.

The logits of a language model, (N, V), are its largest tensor by far: 1,024 positions of a 152k-row vocabulary are
0.6 GB in float32, and a plain distillation loss holds ten of them. Here they exist for one chunk of positions at a
time. The gradient is computed in the forward pass, while a chunk's logits are at hand, so nothing is projected twice:
three matrix products for the student and one for each teacher are all there is.

Shapes: N label-bearing positions, Ds and Dt hidden widths, V vocabulary, K teachers. Losses are in nats.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.divergence import (
    DIVERGENCE_TERMS,
    Terms,
    check_divergence,
    check_temperature,
    log_softmax,
    temperature_factor,
)

# Bytes of one chunk's logits in float32. Large enough for matrix products at full speed, small beside a model.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
# Where the element-wise part is not compiled it runs on blocks of rows, and holds up to 30 tensors of a block's size:
# together they are no larger than one chunk. On the CPU a block also stays in the cache: about this many logits.
BLOCKS_PER_CHUNK = 32
CACHE_BLOCK = 2**19
# Rows of a head that are multiplied at a time: on the CPU what stays in the cache (an eighth faster than the whole head
# for chunks of 192 positions), on CUDA the whole head, unless it has to be converted to another dtype.
HEAD_ROWS = {"cpu": 2**11, "cuda": 2**14}

COMBINATIONS = ("mixture", "sum")


class DistillationLoss(NamedTuple):
    """What `fused_linear_distillation_loss` returns. `.loss` carries the gradient; the rest are detached sums."""

    loss: Tensor  # scalar, nats per item
    kd: Tensor  # sum of token_weights * divergence, without the temperature factor
    ce: Tensor  # sum of the hard-label losses
    agreement: Tensor  # number of positions at which student and teacher have the same most likely token
    student_entropy: Tensor  # sum of the student's entropies at temperature 1
    num_paired: Tensor  # number of positions that `agreement` counts: N, less with another tokenizer


class Head(NamedTuple):
    """The output layer of a language model: `softcap(logit_scale * (hidden @ weight.T + bias))`, a (V, D) weight."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None  # of products, where `with_product_dtype` has settled it

    def truncated(self, vocab_size: int) -> "Head":
        """The head of the first `vocab_size` tokens, a view."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)

    def with_product_dtype(self, hidden: Tensor) -> "Head":
        """The head with the dtype that products with `hidden` have now, for where autocast is switched off."""
        return self._replace(dtype=self.product_dtype(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 or better of hidden states (..., D)."""
        dtype = self.product_dtype(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = flat.new_empty(len(flat), len(self.weight), dtype=torch.promote_types(dtype, torch.float32))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            self.project_(logits, flat.to(dtype))
            return self.finish_logits_(logits).view(*hidden.shape[:-1], len(self.weight))

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which hidden states and weight are multiplied; results are never below float32."""
        if self.dtype is not None:
            return self.dtype
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # Only CUDA can multiply in half precision and keep float32 sums; elsewhere the result would be rounded too.
        return dtype if device == "cuda" else torch.promote_types(dtype, torch.float32)

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`, `HEAD_ROWS` at a time, with the vocabulary slice that they stand for."""
        whole = self.weight.is_cuda and self.weight.dtype == dtype
        rows = len(self.weight) if whole else HEAD_ROWS.get(self.weight.device.type, HEAD_ROWS["cuda"])
        for start in range(0, len(self.weight), rows):
            part = slice(start, min(start + rows, len(self.weight)))
            yield part, self.weight[part].to(dtype)

    def project_(self, out: Tensor, hidden: Tensor) -> None:
        """Overwrites `out` (n, V) with `hidden @ weight.T`, multiplied in the dtype of `hidden`."""
        for part, weight in self.weight_slices(hidden.dtype):
            _add_product_(out[:, part], hidden, weight.t(), beta=0)

    def finish_logits_(self, products: Tensor) -> Tensor:
        """Turns `hidden @ weight.T` into logits, in place."""
        if self.bias is not None:
            products.add_(self.bias)
        if self.logit_scale != 1:
            products.mul_(self.logit_scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def products_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient with respect to `hidden @ weight.T` from the one with respect to the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.logit_scale == 1 else gradient * self.logit_scale


class TeacherSignal(NamedTuple):
    """What a teacher says at N positions, on the device of the loss."""

    hidden: Tensor  # (N, Dt), last hidden states, without gradient
    head: Head  # turns them into logits
    weight: float | Tensor = 1.0  # its share among several teachers, or one (N,) for each position
    layers: Mapping[int, Tensor] | None = None  # (N, Dt) of the inner layers asked for


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
        divergence (`str`), divergence_params (`dict`, *optional*): a name in `DIVERGENCES`, and its parameters.
        token_weights (`torch.Tensor` of shape `(N,)`, *optional*): weights of the divergence term.
        num_items (`int` or scalar tensor, *optional*): the divisor, N by default.
        vocab_size (`int`, *optional*):
            The true vocabulary. Rows of the heads past it are padding: they get no probability and no gradient.
        student_bias, teacher_bias (`torch.Tensor` of shape `(V,)`, *optional*): biases of the heads.
        student_logit_scale, teacher_logit_scale (`float`): factors of the logits (Cohere, Granite).
        student_softcap, teacher_softcap (`float`, *optional*): logits become `c * tanh(logits / c)` (Gemma 2).
        chunk_size (`int`, *optional*): positions per chunk; by default as many as fit `CHUNK_BYTES`.

    Raises:
        `ValueError`: shapes that do not fit, an unknown divergence or parameter, a number out of its range, a label
            that is no token.
    """
    student = Head(student_head, student_bias, student_logit_scale, student_softcap)
    teacher = Head(teacher_head, teacher_bias, teacher_logit_scale, teacher_softcap)
    if vocab_size is None and len(teacher_head) != len(student_head):
        raise ValueError(
            f"the student's head has {len(student_head)} rows and the teacher's {len(teacher_head)}: pass vocab_size, "
            "the number of tokens that both tokenizers share"
        )
    return fused_distillation_loss(
        student_hidden, student, [TeacherSignal(teacher_hidden, teacher)], labels,
        kd_weight=kd_weight, temperature=temperature, divergence=divergence, divergence_params=divergence_params,
        token_weights=token_weights, num_items=num_items, vocab_size=vocab_size, chunk_size=chunk_size,
    )  # fmt: skip


def fused_distillation_loss(
    student_hidden: Tensor,
    student: Head,
    teachers: Sequence[TeacherSignal],
    labels: Tensor,
    *,
    combination: str = "mixture",
    kd_weight: float = 0.5,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    divergence_params: dict | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    compiled: bool = True,
    checked: bool = False,
) -> DistillationLoss:
    """[`fused_linear_distillation_loss`] for whole heads and any number of teachers; never holds the logits of two.

    Args:
        student_hidden (`torch.Tensor` of shape `(N, Ds)`), student (`Head`): the student's side.
        teachers (sequence of `TeacherSignal`):
            Weights are taken as they are: over all teachers of a position they have to sum to 1.
        combination (`str`):
            "mixture": one divergence, to the mixture of the teachers' distributions (each at the temperature).
            "sum": the weighted sum of the divergences to each of them; the weights are numbers then. For `forward_kl`
            both have the same gradient, because they differ by a constant.
        vocab_size (`int`, *optional*): by default the rows of the smallest head.
        compiled (`bool`): on CUDA, whether to compile the element-wise part; anew whenever a number below changes.
        checked (`bool`): whether labels are known to be allowed; to look at them, the host waits for the device.
        labels, kd_weight, temperature, divergence, divergence_params, token_weights, num_items, chunk_size:
            As in [`fused_linear_distillation_loss`].

    Raises:
        `ValueError`: as there, or an unknown combination.
    """
    params = check_divergence(divergence, divergence_params)
    num_rows = student_hidden.shape[0]
    if vocab_size is None:
        vocab_size = min(len(student.weight), *(len(teacher.head.weight) for teacher in teachers))
    if combination not in COMBINATIONS:
        raise ValueError(f"combination has to be one of {', '.join(COMBINATIONS)}, got {combination!r}")
    _check_arguments(
        student_hidden, student, teachers, labels, token_weights, kd_weight, temperature, vocab_size, chunk_size
    )
    if not checked:
        check_tokens("labels", labels, vocab_size, allowed=-100)
    if chunk_size is None:
        chunk_size = default_chunk_size(student_hidden.device, vocab_size)
    if num_items is None:
        num_items = max(num_rows, 1)
    whole, student = student, student.truncated(vocab_size).with_product_dtype(student_hidden)
    teachers = [
        t._replace(hidden=t.hidden.detach(), head=t.head.truncated(vocab_size).with_product_dtype(t.hidden))
        for t in teachers
    ]
    factor = kd_weight * temperature_factor(divergence, temperature)
    if token_weights is None:
        token_weights = student_hidden.new_ones(num_rows, dtype=torch.float32)
    objective = _Objective(DIVERGENCE_TERMS[divergence], params, factor, 1 - kd_weight, temperature)
    loss, sums = _FusedLinearDistillation.apply(
        student_hidden, whole.weight, whole.bias, labels, token_weights.detach(), student,
        _passes(teachers, combination), objective, num_items, chunk_size, compiled, torch.is_grad_enabled(),
    )  # fmt: skip
    return DistillationLoss(loss, *sums[1:].unbind(), num_paired=sums.new_full((), num_rows))


def default_chunk_size(device: torch.device, vocab_size: int) -> int:
    """How many positions' logits fit `CHUNK_BYTES` in float32: a multiple of 64, which products are fastest with."""
    rows = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    return rows if rows < 64 else rows - rows % 64


def block_rows(device: torch.device, chunk_size: int, vocab_size: int) -> int:
    """How many positions the element-wise part works on at a time, where it is not compiled."""
    rows = chunk_size // BLOCKS_PER_CHUNK
    if device.type == "cpu":
        rows = min(rows, CACHE_BLOCK // vocab_size)
    return max(1, rows)


def _passes(teachers: list[TeacherSignal], combination: str) -> list[tuple[float, list[TeacherSignal]]]:
    """Weights that sum to 1, and of which teachers' mixture each of them weighs the divergence."""
    if combination == "mixture" or len(teachers) == 1:
        return [(1.0, teachers)]
    return [(float(teacher.weight), [teacher]) for teacher in teachers]


class _Objective(NamedTuple):
    terms: Callable[..., Terms]
    params: dict[str, float]
    kd_factor: float
    ce_weight: float
    temperature: float


def _differentiate_(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    student: Head,
    teacher: Head,
    objective: _Objective,
) -> Tensor:
    """Overwrites `student_logits` with the gradient of the loss and returns the five sums of `DistillationLoss`.

    The element-wise half of the loss, in plain torch. Both logits come as bare products `hidden @ weight.T`.
    """
    temperature = objective.temperature
    student_logits = student.finish_logits_(student_logits)  # (n, V)
    teacher_logits = teacher.finish_logits_(teacher_logits)  # (n, V)
    log_probs = log_softmax(student_logits)
    probs = log_probs.exp()
    agreement = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    student_entropy = -(probs * log_probs).sum()

    has_label = labels != -100
    target = labels.clamp(min=0).unsqueeze(-1)  # (n, 1)
    ce = -(log_probs.gather(-1, target).squeeze(-1) * has_label).sum()

    teacher_log_probs = log_softmax(teacher_logits.div_(temperature))
    if temperature == 1:
        tempered_log_probs, tempered_probs = log_probs, probs
    else:
        tempered_log_probs = log_softmax(student_logits / temperature)
        tempered_probs = tempered_log_probs.exp()
    term, gradient = objective.terms(tempered_log_probs, teacher_log_probs, **objective.params)
    kd = (term.sum(-1) * token_weights).sum()

    # d loss / d logits = kd_factor * w * (g - p_T * sum(g)) / T + ce_weight * (p_1 - one_hot(label))
    kd_scale = (token_weights * (objective.kd_factor / temperature)).unsqueeze(-1)  # (n, 1)
    ce_scale = (has_label.to(probs.dtype) * objective.ce_weight).unsqueeze(-1)  # (n, 1)
    gradient = gradient.mul_(kd_scale)
    gradient.addcmul_(tempered_probs, -gradient.sum(-1, keepdim=True))
    gradient.addcmul_(probs, ce_scale)
    gradient.scatter_add_(-1, target, -ce_scale)
    student_logits.copy_(student.products_gradient(gradient, student_logits))
    total = objective.kd_factor * kd + objective.ce_weight * ce
    return torch.stack([total, kd, ce, agreement.to(total.dtype), student_entropy])


@functools.cache
def _compiled_differentiate_() -> Callable[..., Tensor]:
    # Not `dynamic=True`: rows become dynamic by themselves, while settings stay the plain numbers that the divergences
    # check; as symbols they would break the graph, and chunk-sized tensors would be written between its parts.
    return torch.compile(_differentiate_)


def _differentiate_chunk_(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, token_weights: Tensor, *rest,
    compiled: bool, block: int,
) -> Tensor:  # fmt: skip
    """`_differentiate_` without copies of a whole chunk: in fused kernels on CUDA, else `block` rows at a time."""
    if compiled and student_logits.is_cuda:
        return _compiled_differentiate_()(student_logits, teacher_logits, labels, token_weights, *rest)
    blocks = zip(*(x.split(block) for x in (student_logits, teacher_logits, labels, token_weights)), strict=True)
    return torch.stack([_differentiate_(*each, *rest) for each in blocks]).sum(0)


def _mix_(out: Tensor, chunk: slice, teachers: list[TeacherSignal], temperature: float, scratch: Tensor | None) -> Head:
    """Overwrites `out` (n, V) with the teachers' logits at a chunk of positions; returns the head that finishes them.

    Of several teachers they are such that their softmax at the temperature is the mixture. `scratch` (n, V) holds the
    logits of one of them at a time.
    """
    if len(teachers) == 1:
        hidden, head = teachers[0].hidden, teachers[0].head
        head.project_(out, hidden[chunk].to(head.product_dtype(hidden)))
        return head
    assert scratch is not None
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
    return Head(teachers[0].head.weight)


class HeadGradients:
    """Gradients of hidden states (N, D), of a head's weight and of its bias, summed up in float32 chunk by chunk.

    Args:
        head (`Head`): truncated to the V tokens that count.
        inputs: hidden states, weight and bias as autograd knows them; rows of the last two past V get no gradient.
        needed: which of the three need one.
    """

    def __init__(self, head: Head, inputs: tuple[Tensor, Tensor, Tensor | None], needed: Sequence[bool]) -> None:
        self.head = head
        self.dtype = head.product_dtype(inputs[0])
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self._dtypes = [None if x is None else x.dtype for x in inputs]
        self._sums: list[Tensor | None] | None = [
            torch.zeros_like(x, dtype=self.sum_dtype) if need and x is not None else None
            for x, need in zip(inputs, needed, strict=True)
        ]

    def add_(self, rows: slice, hidden: Tensor, gradient: Tensor) -> None:
        """Adds those of some positions: hidden states (n, D) in `dtype`, and the gradient (n, V) of their products."""
        assert self._sums is not None
        of_hidden, of_weight, of_bias = self._sums
        rounded, vocab_size = gradient.to(self.dtype), len(self.head.weight)
        if of_hidden is not None:
            for part, weight in self.head.weight_slices(self.dtype):
                _add_product_(of_hidden[rows], rounded[:, part], weight)
        if of_weight is not None:
            _add_product_(of_weight[:vocab_size], rounded.t(), hidden)
        if of_bias is not None:
            of_bias[:vocab_size] += gradient.sum(0)

    def handed_out(self, scale: Tensor) -> list[Tensor | None]:
        """The three, times `scale`, in the dtypes of the inputs; they are given away, so this works once."""
        if self._sums is None:
            raise RuntimeError("the loss can be differentiated once; compute it again")
        sums, self._sums = self._sums, None
        # Scaled last and in float32: a scaled logit gradient would lose its small entries in half precision.
        return [None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(sums, self._dtypes, strict=True)]


def _add_product_(out: Tensor, left: Tensor, right: Tensor, *, beta: int = 1) -> None:
    """`out = beta * out + left @ right`, without rounding the product to the dtype of its factors."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)


class _FusedLinearDistillation(torch.autograd.Function):
    """Loss and sums in the forward, together with the gradients that the backward only has to hand out."""

    @staticmethod
    def forward(
        ctx, student_hidden, student_head, student_bias, labels, token_weights, student: Head, passes,
        objective: _Objective, num_items, chunk_size: int, compiled: bool, grad_enabled: bool,
    ):  # fmt: skip
        needed = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(student, (student_hidden, student_head, student_bias), needed)
        dtype, sum_dtype = gradients.dtype, gradients.sum_dtype
        num_rows, vocab_size = student_hidden.shape[0], student.weight.shape[0]

        def buffer(needed: bool = True) -> Any:
            shape = min(chunk_size, num_rows), vocab_size
            return student_hidden.new_empty(shape, dtype=sum_dtype) if needed else None

        # Of several passes, one overwrites a copy of the student's products, and their gradients are summed.
        buffers = buffer(), buffer(), *(buffer(len(passes) > 1) for _ in range(2)), buffer(len(passes[0][1]) > 1)
        block = block_rows(student_hidden.device, chunk_size, vocab_size)
        sums = student_hidden.new_zeros(5, dtype=sum_dtype)

        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, num_rows, chunk_size):
                chunk = slice(start, min(start + chunk_size, num_rows))
                hidden = student_hidden[chunk].to(dtype)  # (n, Ds)
                rows: Any = (x if x is None else x[: len(hidden)] for x in buffers)
                logits, teacher_logits, products, total, scratch = rows  # (n, V) each
                student.project_(logits if products is None else products, hidden)
                for index, (weight, teachers) in enumerate(passes):
                    if products is not None:
                        logits.copy_(products)
                    head = _mix_(teacher_logits, chunk, teachers, objective.temperature, scratch)
                    found = _differentiate_chunk_(
                        logits, teacher_logits, labels[chunk], token_weights[chunk].to(sum_dtype), student, head,
                        objective, compiled=compiled, block=block,
                    )  # fmt: skip
                    sums += weight * found
                    if total is not None:
                        torch.mul(logits, weight, out=total) if index == 0 else total.add_(logits, alpha=weight)
                gradients.add_(chunk, hidden, logits if total is None else total)

        ctx.gradients, ctx.num_items = gradients, num_items
        ctx.mark_non_differentiable(sums)
        return sums[0] / num_items, sums

    @staticmethod
    def backward(ctx, grad_loss, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.gradients.handed_out(grad_loss / ctx.num_items), *(None,) * 9


def _check_arguments(
    student_hidden, student, teachers, labels, token_weights, kd_weight, temperature, vocab_size, chunk_size
) -> None:
    num_rows = student_hidden.shape[0]
    sides = [("student", student_hidden, student.weight), *(("teacher", t.hidden, t.head.weight) for t in teachers)]
    for side, hidden, head in sides:
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{side}_hidden has to be (N, D) and {side}_head (V, D), "
                f"got {tuple(hidden.shape)} and {tuple(head.shape)}"
            )
        if not 0 < vocab_size <= head.shape[0]:
            raise ValueError(f"vocab_size={vocab_size} does not fit {side}_head, which has {head.shape[0]} rows")
    lengths = {"labels": labels, "token_weights": token_weights}
    for name, tensor in [*(("teacher_hidden", t.hidden) for t in teachers), *lengths.items()]:
        if tensor is not None and tensor.shape[0] != num_rows:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, student_hidden has {num_rows}")
    check_settings(kd_weight, temperature, chunk_size)


def check_tokens(name: str, tokens: Tensor, vocab_size: int, allowed: int | None = None) -> None:
    """Raises `ValueError` for ids (N,) that are neither `allowed` nor from 0 to `vocab_size - 1`."""
    strange = (tokens < 0) | (tokens >= vocab_size)
    strange = strange if allowed is None else strange & (tokens != allowed)
    if strange.any():
        row = int(strange.nonzero()[0])
        besides = "" if allowed is None else f"{allowed} and "
        raise ValueError(f"{name}[{row}] is {int(tokens[row])}; {besides}0 to {vocab_size - 1} are possible")


def check_settings(kd_weight: float, temperature: float, chunk_size: int | None) -> None:
    """Raises `ValueError` for a number out of its range."""
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight has to lie in [0, 1], got {kd_weight}")
    check_temperature(temperature)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size has to be at least 1, got {chunk_size}")
