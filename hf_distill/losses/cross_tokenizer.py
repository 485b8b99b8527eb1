"""Losses between two vocabularies, on groups of tokens that cover the same text, straight from hidden states and heads.

At the start of a group both models have read the same text and say how it goes on, each in tokens of its own. What they
say is compared as two distributions over texts that both can begin with.

**Outcomes.** The student writes a group's text w as tokens s_1 .. s_m with next-token probabilities q, the teacher as
t_1 .. t_n with p; by the chain rule with the probabilities Q = q(s_1) q(s_2 | s_1) .. and P = p(t_1) p(t_2 | t_1) .. .
A *name* is a token of both vocabularies. Every token has a name: its own text, or the longest name that this begins
with, or none. The outcomes of the student are

    w           Q
    name k      the sum of q(v) over the tokens v with name k, minus Q if s_1 is one of them
    unnamed v   q(v), minus Q if v = s_1

and the teacher's likewise with p and P: on each side probabilities that sum to 1. Where one side writes w as a single
token which is a name, w and that name are one outcome.

**aligned** adds two terms per group, the first of them in nats:

    D(names, w, all that is unnamed) + sum_i |q_(i) - p_(i)| over what is unnamed

with any divergence D (`losses/divergence.py`) and the loss below. It is >= 0, and 0 only where the outcomes are equally
likely on both sides, and the unnamed ones by rank. Where only one side has unnamed tokens, the other has nothing to
compare with: they are left out, and it is 0 where names and w are equally likely among the rest, whatever that side
gives to unnamed tokens. With equal tokenizers every group is one token, every token a name, and what remains D of the
next-token distributions. (GOLD, TRL's `GOLDTrainer`, multiplies the distribution at a group's first token by the
probabilities of the others, so that a group's probabilities do not sum to 1.) The longest shared beginning is also the
teacher's target in Byte-Prefix Marginalization (2607.22334), there for the student's vocabulary only.

**uld** is Universal Logit Distillation (Boizard et al., 2402.12030): `sum_i |q_(i) - p_(i)|` over both vocabularies in
descending order, the smaller one filled up with zeros; no token has to mean anything to both sides. The paper compares
the i-th tokens of both answers; here it is the first tokens of a group, which follow the same text.

Markers that only one side has, and ids that are no token, are left out, too: both distributions are conditional on the
rest. The factor of a temperature T is T^2 for divergences, T for total variation and sorted probabilities, whose
gradients shrink by T only.

Shapes: N positions of the student, M of the teacher, G groups, Vs and Vt vocabularies, K names, Ds and Dt widths.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.divergence import DIVERGENCES, LOG_ZERO
from hf_distill.losses.groups import (
    Later,
    Side,
    Starts,
    group_starts,
    hit_and_miss,
    is_single,
    side_of,
    starts_first,
    tempered,
)
from hf_distill.losses.head import Head, HeadGradients, block_rows, default_chunk_size
from hf_distill.losses.objective import DistillationLoss, Objective, check_tokens
from hf_distill.token_alignment import SharedTokens

METHODS = ("aligned", "uld")
# Blocks on a CPU are larger than those of the loop: autograd's calls for a block cost more than the cache saves.
CACHES_PER_BLOCK = 8


class Spans(NamedTuple):
    """The tokens that follow the positions of both sides, and the group of each: any number, or -1 for none.

    A group holds all of its tokens, in order, on both sides; one that is missing on a side is not compared.
    """

    student_tokens: Tensor  # (N,) int64; not the labels: a token counts here whether it is a hard label or not
    student_groups: Tensor  # (N,) int64
    teacher_tokens: Tensor  # (M,) int64
    teacher_groups: Tensor  # (M,) int64


class AlignedSignal(NamedTuple):
    """The answer of a teacher with another tokenizer, at M positions of its own."""

    hidden: Tensor  # (M, Dt), last hidden states, without gradient
    head: Head
    spans: Spans
    shared: SharedTokens
    method: str = "aligned"  # or "uld"
    num_exact: Tensor | None = None  # label-bearing tokens of the student that face exactly one of the teacher's
    weight: float = 1.0  # its share among several teachers

    def loss(self, hidden: Tensor, head: Head, labels: Tensor, objective: Objective) -> DistillationLoss:
        """`(kd_weight * T^2 * sum over groups + ce_weight * sum_i CE_1(i)) / num_items` ([`Signal.loss`]).

        Logits exist for one chunk of positions at a time, and the gradient is computed with them in the forward. Rows
        of the heads past the tokens that `shared` knows are padding; `vocab_size` plays no part.

        Returns:
            [`DistillationLoss`]. `kd` (without factors of the temperature) is a sum over groups. `agreement` is the
            number of groups with the same most likely token on both sides, counted among the `num_paired` in which one
            token faces one token; only there do both say what comes next in the same pieces. `more` has the numbers of
            the student's tokens that face one token (`alignment/exact_fraction`) and that are compared at all
            (`alignment/compared_fraction`).

        Raises:
            `ValueError`: shapes that do not fit, an unknown method, token weights, a token or label that is none.
        """
        device = head.weight.device
        hidden, labels = hidden.to(device), labels.to(device)
        signal = self._replace(
            hidden=self.hidden.detach().to(device), head=self.head.to(device),
            spans=Spans(*(x.to(device) for x in self.spans)), shared=SharedTokens(*(x.to(device) for x in self.shared)),
        )  # fmt: skip
        _check_arguments(hidden, head, labels, signal, objective)
        loss, sums, num_paired = _cross_tokenizer_loss(hidden, head, labels, signal, objective)
        more = {"alignment/compared_fraction": (signal.spans.student_groups >= 0).sum()}
        if self.num_exact is not None:
            more["alignment/exact_fraction"] = self.num_exact
        return DistillationLoss(loss, *sums[1:].unbind(), num_paired=num_paired, more=more)


def uld(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """Wasserstein-1 distance (...,) of probabilities (..., Vs) and (..., Vt) without regard to which token has them.

    `sum_i |q_(i) - p_(i)|` in descending order, the smaller vocabulary filled up with zeros, in [0, 2] (Universal Logit
    Distillation, 2402.12030, where moving probability costs the same between any two tokens).
    """
    width = max(student_probs.shape[-1], teacher_probs.shape[-1])
    student, teacher = (
        F.pad(probs.sort(dim=-1, descending=True).values, (0, width - probs.shape[-1]))
        for probs in (student_probs, teacher_probs)
    )
    return (student - teacher).abs().sum(-1)


def cross_tokenizer_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    spans: Spans,
    shared: SharedTokens,
    *,
    method: str = "aligned",
    **settings: Any,
) -> DistillationLoss:
    """[`~hf_distill.losses.fused_linear.fused_linear_distillation_loss`] for two tokenizers: `AlignedSignal.loss`.

    Args:
        student_hidden (`torch.Tensor` of shape `(N, Ds)`), student_head ([`Head`]):
            The student's last hidden states, after its final norm, and its head. They get gradients if they require
            some. Rows of the head past the tokens that `shared` knows are padding.
        teacher_hidden (`torch.Tensor` of shape `(M, Dt)`), teacher_head ([`Head`]):
            The same of the teacher. Never gets a gradient.
        labels (`torch.Tensor` of shape `(N,)`, int64): the student's hard labels, -100 for none.
        spans ([`Spans`]): the tokens that follow the positions, and which of them cover the same text.
        shared ([`~hf_distill.token_alignment.SharedTokens`]): what both vocabularies have in common.
        method (`str`): "aligned" or "uld".
        settings: those of [`~hf_distill.losses.objective.Objective`], except for token weights.

    Returns and raises what [`AlignedSignal.loss`] does.
    """
    signal = AlignedSignal(teacher_hidden, teacher_head, spans, shared, method)
    return signal.loss(student_hidden, student_head, labels, Objective(**settings))


def _cross_tokenizer_loss(
    hidden: Tensor, head: Head, labels: Tensor, signal: AlignedSignal, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the sums (5,) as `_CrossTokenizer` has them, and the number of paired groups."""
    spans = signal.spans
    student_ids, teacher_ids, student_names, teacher_names = signal.shared
    student = side_of(head.with_product_dtype(hidden), student_ids, student_names)
    teacher = side_of(signal.head.with_product_dtype(signal.hidden), teacher_ids, teacher_names)
    vocab_size = max(len(student_names), len(teacher_names))
    chunk_size = objective.chunk_size or default_chunk_size(hidden.device, vocab_size)
    block = block_rows(hidden.device, chunk_size, vocab_size, caches=CACHES_PER_BLOCK)

    groups = spans.student_groups
    numbers = torch.unique(groups[torch.isin(groups, spans.teacher_groups) & (groups >= 0)])  # (G,)
    order, later_groups = starts_first(spans.student_groups, numbers)  # (N,), (N - G,)
    teacher_order, teacher_later_groups = starts_first(spans.teacher_groups, numbers)  # (M,), (M - G,)
    student_hidden, teacher_hidden = hidden[order], signal.hidden[teacher_order]
    tokens, teacher_tokens = spans.student_tokens[order], spans.teacher_tokens[teacher_order]
    is_paired = is_single(later_groups, len(numbers)) & is_single(teacher_later_groups, len(numbers))  # (G,)
    if signal.method == "uld":
        # Only first tokens are compared.
        later_groups, teacher_later_groups = (torch.full_like(x, -1) for x in (later_groups, teacher_later_groups))
    settings = objective.temperature, chunk_size, block
    with torch.autocast(hidden.device.type, enabled=False):
        starts, later = group_starts(student_hidden.detach(), tokens, later_groups, student, *settings)
        teacher_starts, _ = group_starts(teacher_hidden, teacher_tokens, teacher_later_groups, teacher, *settings)
        loss, sums = _CrossTokenizer.apply(
            student_hidden, head.weight, head.bias, labels[order], tokens, later, starts, teacher_hidden,
            teacher_starts, is_paired, student, teacher, signal.method, objective, chunk_size, block,
            torch.is_grad_enabled(),
        )  # fmt: skip
    return loss, sums, is_paired.sum()


def _outcomes(log_probs: Tensor, starts: Starts, targets: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the names and, last, of a text that is no name (g, K + 1), and of unnamed tokens (g, R).

    Args:
        log_probs (`torch.Tensor` of shape `(g, V)`): of the groups' first tokens.
        targets (`torch.Tensor` of shape `(g,)`): the outcome that is the group's text, a name or K.
    """
    log_probs = log_probs.clamp(min=LOG_ZERO)
    tokens, targets = starts.tokens.unsqueeze(-1), targets.unsqueeze(-1)  # (g, 1)
    log_first = log_probs.gather(-1, tokens)
    log_text = log_first + starts.log_continuation.unsqueeze(-1)
    log_other = (log_first + starts.log_other.unsqueeze(-1)).clamp(min=LOG_ZERO)  # the first token, then another text
    moves = side.names[tokens] != targets  # The text is another outcome than what its first token counts to.
    log_probs = log_probs.scatter(-1, tokens, torch.where(moves, log_other, log_first))
    named = log_probs.index_select(-1, side.ids)  # (g, K)
    if len(side.others):
        names = side.names[side.others].expand(len(named), -1)
        others = log_probs.index_select(-1, side.others)
        largest = named.detach().scatter_reduce(-1, names, others.detach(), "amax")  # (g, K)
        shares = (named - largest).exp().scatter_add(-1, names, (others - largest.gather(-1, names)).exp())
        named = shares.log() + largest
    outcomes = F.pad(named, (0, 1), value=LOG_ZERO)  # (g, K + 1)
    text = torch.logaddexp(outcomes.gather(-1, targets), torch.where(moves, log_text, LOG_ZERO))
    return outcomes.scatter(-1, targets, text), log_probs.index_select(-1, side.unnamed)


def _of_outcomes(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence (g,) of log-probabilities (g, outcomes), of which both sides may lack the same."""
    function = functools.partial(DIVERGENCES[objective.divergence], **objective.params)
    if objective.divergence != "alpha_beta":
        return function

    def of_outcomes(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        # Powers of 0 may be infinite. Any two equal probabilities add nothing, so it can be 1 instead.
        lacking = torch.maximum(student_log_probs, teacher_log_probs) < LOG_ZERO / 2
        return function(student_log_probs.masked_fill(lacking, 0.0), teacher_log_probs.masked_fill(lacking, 0.0))

    return of_outcomes


def _compare(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    student_starts: Starts,
    teacher_starts: Starts,
    student: Side,
    teacher: Side,
    divergence: Callable[[Tensor, Tensor], Tensor] | None,  # None: uld
) -> tuple[Tensor, Tensor]:
    """The two terms of each group (g,), from log-probabilities (g, Vs) and (g, Vt) of its first tokens."""
    if divergence is None:
        distance = uld(student_log_probs.exp(), teacher_log_probs.exp())
        return torch.zeros_like(distance), distance
    targets = torch.minimum(student_starts.text_names, teacher_starts.text_names)
    outcomes, unnamed = zip(
        _outcomes(student_log_probs, student_starts, targets, student),
        _outcomes(teacher_log_probs, teacher_starts, targets, teacher),
        strict=True,
    )
    if len(student.unnamed) and len(teacher.unnamed):
        rest = (x.logsumexp(-1, keepdim=True) for x in unnamed)
        value = divergence(*(torch.cat(pair, -1) for pair in zip(outcomes, rest, strict=True)))
        return value, uld(*(x.exp() for x in unnamed))
    # Outcomes that only one side can produce are left out: the divergence would not be finite.
    outcomes = [x.log_softmax(-1) if rest.shape[-1] else x for x, rest in zip(outcomes, unnamed, strict=True)]
    value = divergence(*outcomes)
    return value, torch.zeros_like(value)


def _group_terms(
    student_logits: Tensor, teacher_logits: Tensor, student_starts: Starts, teacher_starts: Starts,
    is_paired: Tensor, student: Side, teacher: Side, divergence: Callable[[Tensor, Tensor], Tensor] | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The weighted loss of a block of groups, the sum of its terms, and how many paired ones both would begin alike.

    Args:
        is_paired (`torch.Tensor` of shape `(g,)`, bool): where one token faces one token.
        student_logits (`torch.Tensor` of shape `(g, Vs)`), teacher_logits (`torch.Tensor` of shape `(g, Vt)`):
            Of the groups' first tokens.
    """
    student_logits = tempered(student_logits, student, objective.temperature)
    teacher_logits = tempered(teacher_logits, teacher, objective.temperature)
    # Two most likely tokens that merely begin with the same name are different texts, and do not count as agreement.
    student_name, teacher_name = student.own[student_logits.argmax(-1)], teacher.own[teacher_logits.argmax(-1)]
    agreement = (is_paired & (student_name == teacher_name) & (student_name < len(student.ids))).sum()
    value, distance = _compare(
        student_logits.log_softmax(-1), teacher_logits.log_softmax(-1),
        student_starts, teacher_starts, student, teacher, divergence,
    )  # fmt: skip
    value, distance = value.sum(), distance.sum()
    loss = objective.kd_factor * value + objective.kd_weight * objective.temperature * distance
    return loss, value + distance, agreement


def _hard_terms(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the hard-label losses and of the entropies of positions with `logits` (n, V)."""
    log_probs = logits.log_softmax(-1)
    ce = F.nll_loss(log_probs, labels, ignore_index=-100, reduction="sum")
    log_probs = log_probs.detach().clamp(min=LOG_ZERO)
    return ce, -(log_probs.exp() * log_probs).sum()


class _CrossTokenizer(torch.autograd.Function):
    """Loss and sums in the forward, together with the gradients that the backward only has to hand out.

    The first G positions are those at which groups begin. They tell how much the probability of each group's other
    tokens counts, which is the gradient of the positions after them.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, labels, tokens, later: Later, starts: Starts, teacher_hidden,
        teacher_starts: Starts, is_paired, student: Side, teacher: Side, method: str, objective: Objective,
        chunk_size: int, block: int, grad_enabled: bool,
    ):  # fmt: skip
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(student.head, (hidden, weight, bias), needs)
        sum_dtype = gradients.sum_dtype
        sums = hidden.new_zeros(5, dtype=sum_dtype)
        divergence = _of_outcomes(objective) if method == "aligned" else None
        # (G,): the gradients of these two are handed on to the later positions.
        of_groups = starts.log_continuation.requires_grad_(), starts.log_other.requires_grad_()
        group_gradients = [torch.zeros_like(x) for x in of_groups]

        def differentiate(rows: slice, terms: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> None:
            """Adds up the sums of `terms(logits, rows)`, of which the first is the loss, and the loss's gradients."""
            logits = student.head.logits(hidden[rows])  # (n, Vs)
            for part in _slices(0, len(logits), block):
                with torch.set_grad_enabled(any(needs)):
                    leaf = logits[part].detach().requires_grad_(any(needs))
                    loss, *others = terms(leaf, slice(rows.start + part.start, rows.start + part.stop))
                sums.add_(torch.stack([x.detach().to(sum_dtype) for x in (loss, *others)]))
                if any(needs):
                    of_logits, *others = torch.autograd.grad(loss, (leaf, *of_groups), allow_unused=True)
                    for total, gradient in zip(group_gradients, others, strict=True):
                        if gradient is not None:
                            total.add_(gradient)
                    logits[part] = student.head.products_gradient(of_logits, leaf.detach())
            gradients.add_(rows, hidden[rows].to(gradients.dtype), logits)

        def group_chunk(rows: slice) -> None:
            teacher_logits = teacher.head.logits(teacher_hidden[rows])  # (n, Vt)

            def terms(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
                ce, entropy = _hard_terms(logits, labels[part])
                loss, kd, agreement = _group_terms(
                    logits, teacher_logits[part.start - rows.start : part.stop - rows.start],
                    Starts(*(x[part] for x in starts)), Starts(*(x[part] for x in teacher_starts)),
                    is_paired[part], student, teacher, divergence, objective,
                )  # fmt: skip
                return loss + objective.hard_weight * ce, kd, ce, agreement, entropy

            differentiate(rows, terms)

        def later_terms(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
            ce, entropy = _hard_terms(logits, labels[part])
            groups, as_first_miss, as_hit = (x[part.start - num_groups : part.stop - num_groups] for x in later)
            log_probs = tempered(logits, student, objective.temperature).log_softmax(-1)
            hit, miss = hit_and_miss(log_probs, tokens[part])
            # The 0 at the end is that of no group, -1.
            of_continuation, of_other = (F.pad(gradient, (0, 1))[groups] for gradient in group_gradients)
            for_gradient = ((of_continuation + of_other * as_hit) * hit + of_other * as_first_miss * miss).sum()
            loss = objective.hard_weight * ce + for_gradient - for_gradient.detach()
            return loss, none, ce, none, entropy

        num_groups, none = len(starts.tokens), sums.new_zeros(())
        for rows in _slices(0, num_groups, chunk_size):
            group_chunk(rows)
        for rows in _slices(num_groups, len(labels), chunk_size):
            differentiate(rows, later_terms)

        ctx.gradients, ctx.divisor = gradients, objective.divisor(len(labels), hidden.device)
        ctx.mark_non_differentiable(sums)
        return sums[0] / ctx.divisor, sums

    @staticmethod
    def backward(ctx, *gradients):
        return *ctx.gradients.handed_out(gradients[0] / ctx.divisor), *(None,) * 14


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def _check_arguments(hidden: Tensor, head: Head, labels: Tensor, signal: AlignedSignal, objective: Objective) -> None:
    shared, spans = signal.shared, signal.spans
    sides = (("student", hidden, head), ("teacher", signal.hidden, signal.head))
    for (side, states, of_side), ids, names in zip(sides, shared[:2], shared[2:], strict=True):
        weight = of_side.weight
        if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{side}_hidden has to be (n, D) and the weight of {side}_head (V, D), "
                f"got {tuple(states.shape)} and {tuple(weight.shape)}"
            )
        if len(names) > len(weight):
            raise ValueError(
                f"shared has names for {len(names)} tokens of the {side}, its head has {len(weight)} rows: leave "
                "tokens that the model does not have out of vocabulary_pieces"
            )
        if len(ids) != len(shared[0]):
            raise ValueError(f"shared has {len(shared[0])} tokens of the student for {len(ids)} of the teacher")
    for name, tensor in {"labels": labels, **spans._asdict()}.items():
        num_rows = len(signal.hidden if name.startswith("teacher") else hidden)
        if tensor.shape != (num_rows,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the hidden states have {num_rows} rows")
    if signal.method not in METHODS:
        raise ValueError(f"method has to be one of {', '.join(METHODS)}, got {signal.method!r}")
    if objective.token_weights is not None:
        raise ValueError("token_weights weigh positions; with another tokenizer, groups are compared: pass None")
    if not objective.checked:
        sizes = len(shared.student_names), len(shared.teacher_names)
        check_tokens("labels", labels, sizes[0], allowed=-100)
        check_tokens("student_tokens", spans.student_tokens, sizes[0])
        check_tokens("teacher_tokens", spans.teacher_tokens, sizes[1])
