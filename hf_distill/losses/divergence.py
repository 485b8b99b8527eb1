"""Divergences between two next-token distributions, each written once.

A divergence is a sum over the vocabulary of one term per token id. Every function below takes natural log-probabilities
and returns this term and its derivative `g` with respect to `log p_student`. Nothing else is needed, because the
gradient with respect to the student's logits is `(g - p_student * sum(g)) / temperature` for every divergence.
`DIVERGENCES` turns each function into an ordinary differentiable one. The fused loss uses the same terms without an
autograd graph.

A term of KL(p || q) is `p log(p/q) - p + q`. The added `q - p` sums to 0, because p and q sum to 1. It makes each term
at least 0 and of second order in `log q - log p`. So rounded logarithms of nearly equal probabilities (a student that
has learned, a high temperature) still give an accurate divergence. Without it, the first order cancels only in the sum.

Shapes: `(..., V)` in, `(..., V)` for the term and its derivative, `(...)` for the divergence. Unit: nats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]

# Replaces log(0). Its exp() is exactly 0 in every dtype, and its products with 0 are finite. The log-probabilities of
# float32 logits are never below it, even at a temperature of 0.001.
LOG_ZERO = -1e6
# Its exp() is finite in float32, and so large that 1 is negligible beside it.
LARGE = 50.0


def forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """KL(teacher || student), the soft-label loss of Hinton et al. (1503.02531). It covers all modes of the teacher."""
    teacher_probs, log_ratio, gap = _compared(teacher_log_probs, student_log_probs)
    return torch.addcmul(gap, teacher_probs, log_ratio, value=-1), gap


def reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """KL(student || teacher), the loss of MiniLLM (2306.08543). It concentrates on modes that the student can fit."""
    student_probs, log_ratio, gap = _compared(student_log_probs, teacher_log_probs)
    gradient = log_ratio.mul_(student_probs).neg_()
    return gap.add_(gradient), gradient


def jensen_shannon(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float = 0.5) -> Terms:
    """`beta * KL(teacher || m) + (1 - beta) * KL(student || m)`, `m = beta * p_teacher + (1 - beta) * p_student`.

    The generalised Jensen-Shannon divergence of GKD (2306.13649, eq. 1), for `beta` in (0, 1). At 0 and at 1 it is
    identically zero, so both values are refused. Use `forward_kl` or `reverse_kl` instead: they are its limits after
    division by `beta` or `1 - beta`.
    """
    _require(0 < beta < 1, f"jensen_shannon needs beta in (0, 1), got {beta}; its limits are forward_kl and reverse_kl")
    teacher_ratio, student_ratio = _mixture_ratios(teacher_log_probs, student_log_probs, beta)
    student_term = student_ratio.mul_(student_log_probs.exp()).mul_(beta - 1)
    return torch.addcmul(student_term, teacher_log_probs.exp(), teacher_ratio, value=-beta), student_term


def skew_forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Terms:
    """KL(teacher || skew * p_teacher + (1 - skew) * p_student), `skew` in [0, 1): DistiLLM (2402.03898, 3.1)."""
    _require(0 <= skew < 1, f"skew_forward_kl needs skew in [0, 1), got {skew}")
    teacher_ratio, student_ratio = _mixture_ratios(teacher_log_probs, student_log_probs, skew)
    teacher_probs, _, gap = _compared(teacher_log_probs, student_log_probs)
    gap.mul_(1 - skew)  # p_mixture - p_teacher
    student_share = (math.log1p(-skew) - student_ratio).exp_()
    return torch.addcmul(gap, teacher_probs, teacher_ratio, value=-1), student_share.mul_(gap)


def skew_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Terms:
    """KL(student || skew * p_student + (1 - skew) * p_teacher), `skew` in [0, 1): DistiLLM (2402.03898, 3.1)."""
    _require(0 <= skew < 1, f"skew_reverse_kl needs skew in [0, 1), got {skew}")
    if skew == 0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    student_ratio, _ = _mixture_ratios(student_log_probs, teacher_log_probs, skew)
    student_probs, _, gap = _compared(student_log_probs, teacher_log_probs)
    gap.mul_(1 - skew)  # p_mixture - p_student
    student_share = (math.log(skew) - student_ratio).exp_()
    log_term = student_ratio.mul_(student_probs).neg_()
    return log_term + gap, log_term.addcmul_(student_share, gap)


def total_variation(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """`1/2 * sum |p_teacher - p_student|`, in [0, 1]: one minus the acceptance rate of the student as a draft."""
    student_probs, _, gap = _compared(student_log_probs, teacher_log_probs)
    return _distance(student_probs, gap).mul_(0.5), gap.sign_().mul_(student_probs).mul_(-0.5)


def alpha_beta(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Terms:
    """The alpha-beta divergence of ABKD (2505.04560), with its limits where `alpha`, `beta` or their sum is 0.

    `-1/(alpha beta) * sum(p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta))` with
    p the teacher and q the student. (1, 0) is `forward_kl`, (0, 1) is `reverse_kl`, and (0.5, 0.5) is four times the
    squared Hellinger distance `1/2 * sum (sqrt p - sqrt q)^2`. Negative powers of small probabilities are unbounded.
    They are clipped at about 1e32 (float32), so that value and gradient stay finite.
    """
    _require(math.isfinite(alpha) and math.isfinite(beta), f"alpha_beta needs finite numbers, got {alpha} and {beta}")
    total = alpha + beta
    log_ratio = student_log_probs - teacher_log_probs
    if alpha == 0 and beta == 0:
        return 0.5 * log_ratio.square(), log_ratio
    if beta == 0:
        term, gap = _power_terms(alpha * teacher_log_probs, alpha * log_ratio)
        return term / alpha**2, gap / alpha
    if alpha == 0:
        term, _ = _power_terms(beta * student_log_probs, -beta * log_ratio)
        return term / beta**2, _power(beta * student_log_probs) * log_ratio
    if abs(total) < 1e-6:
        term, gap = _power_terms(torch.zeros_like(log_ratio), -alpha * log_ratio)
        return term / alpha**2, gap / -alpha
    # All three powers are close if p and q are close, so their differences are computed from their logarithms.
    cross = _power(torch.add(beta * student_log_probs, teacher_log_probs, alpha=alpha))
    teacher_gap = _gap(cross, log_ratio * -beta, _power(total * teacher_log_probs))
    student_gap = _gap(cross, log_ratio.mul_(alpha), _power(total * student_log_probs))
    term = teacher_gap.div_(beta * total).add_(student_gap, alpha=1 / (alpha * total))
    # If powers are clipped, the largest one may be the negative one.
    return term.clamp_(min=0) if min(alpha, beta, total) < 0 else term, student_gap.div_(alpha)


def adaptive_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, head: float = 0.5) -> Terms:
    """Forward and reverse KL, weighted by the student's error on the head and the tail (AKL, 2404.02657).

    The head is the smallest set of the teacher's most likely tokens whose mass reaches `head`, in (0, 1). This is the
    paper's definition; its released code stops one token earlier, before the mass is reached. The weight of the forward
    KL is the share of `sum |p_teacher - p_student|` that lies in the head. The reverse KL has the remaining weight. The
    weights carry no gradient. The vocabulary has to be sorted, which costs several times as much as other divergences.
    """
    _require(0 < head < 1, f"adaptive_kl needs head in (0, 1), got {head}")
    sorted_probs, order = teacher_log_probs.exp().sort(dim=-1, descending=True)
    mass_before = sorted_probs.cumsum(-1) - sorted_probs
    in_head = torch.zeros_like(sorted_probs).scatter_(-1, order, (mass_before < head).to(sorted_probs.dtype))
    forward, gap = forward_kl(student_log_probs, teacher_log_probs)
    reverse, reverse_gradient = reverse_kl(student_log_probs, teacher_log_probs)
    distance = _distance(student_log_probs.exp(), gap)
    head_gap, total_gap = (distance * in_head).sum(-1, keepdim=True), distance.sum(-1, keepdim=True)
    # Equal distributions have no gap to divide. Any weight is right, because both divergences are zero.
    weight = torch.where(total_gap > 0, head_gap / total_gap.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)
    return torch.lerp(reverse, forward, weight), torch.lerp(reverse_gradient, gap, weight)


def taid(student_log_probs: Tensor, teacher_log_probs: Tensor, t: float = 0.5) -> Terms:
    """KL(m || student), `m` in proportion to `p_student^(1-t) * p_teacher^t`, `t` in [0, 1]: TAID (2501.16937, eq. 3).

    `m` lies between student and teacher, as a mean of their logits, and carries no gradient. If `t` rises to 1 during
    training, the student follows a target that is never far ahead of it.
    """
    _require(0 <= t <= 1, f"taid needs t in [0, 1], got {t}")
    log_target = torch.lerp(student_log_probs, teacher_log_probs, t).log_softmax(-1)
    return forward_kl(student_log_probs, log_target)


DIVERGENCE_TERMS: dict[str, Callable[..., Terms]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "taid": taid,
}


def temperature_factor(divergence: str, temperature: float) -> float:
    """The factor that keeps the size of the gradient when the temperature changes: T, or T^2.

    Dividing the logits by T shrinks the gradient of total variation by T, and that of all other divergences by T^2
    (1503.02531, section 2).
    """
    return temperature if divergence == "total_variation" else temperature**2


# Outside this range, float32 logits cannot be compared: all probabilities are 0 and 1, or 1 / V up to rounding.
TEMPERATURES = (1e-4, 1e5)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raises `ValueError` for a temperature outside `TEMPERATURES`, also for infinity and NaN."""
    lowest, highest = TEMPERATURES
    _require(
        lowest <= temperature <= highest,
        f"{name} has to be above 0 and finite, got {temperature}; take one in [{lowest:g}, {highest:g}]",
    )


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities (..., V). Ids that are masked by a logit of minus infinity get `LOG_ZERO`."""
    return logits.log_softmax(-1).clamp_(min=LOG_ZERO)


def check_divergence(divergence: str, params: dict | None) -> dict:
    """The parameters of a divergence as a dict, checked by a trial on one token.

    Raises:
        `ValueError`: the divergence or the parameter does not exist, or a value is out of range.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} does not exist; choose one of {', '.join(sorted(DIVERGENCES))}")
    params = dict(params or {})
    terms = DIVERGENCE_TERMS[divergence]
    allowed = terms.__code__.co_varnames[2 : terms.__code__.co_argcount]
    if unknown := sorted(map(str, set(params) - set(allowed))):
        names = f"has only {', '.join(allowed)}" if allowed else "has no parameters"
        raise ValueError(f"divergence_params has {', '.join(unknown)}, but {divergence} {names}")
    for name, value in params.items():
        _require(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"divergence_params[{name!r}] has to be a number, got {value!r}",
        )
    terms(torch.zeros(1), torch.zeros(1), **params)
    return params


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_log_probs: Tensor, teacher_log_probs: Tensor, terms, params: dict) -> Tensor:
        dtype = torch.promote_types(student_log_probs.dtype, torch.float32)
        student = student_log_probs.to(dtype).clamp(min=LOG_ZERO)
        teacher = teacher_log_probs.to(dtype).clamp(min=LOG_ZERO)
        term, gradient = terms(student, teacher, **params)
        ctx.save_for_backward(gradient.to(student_log_probs.dtype))
        return term.sum(-1)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        (gradient,), (grad_output,) = ctx.saved_tensors, grad_outputs
        return gradient * grad_output.unsqueeze(-1).to(gradient.dtype), None, None, None


def _differentiable(terms: Callable[..., Terms]) -> Callable[..., Tensor]:
    def divergence(student_log_probs: Tensor, teacher_log_probs: Tensor, **params: float) -> Tensor:
        return _Divergence.apply(student_log_probs, teacher_log_probs, terms, params)

    divergence.__name__ = divergence.__qualname__ = terms.__name__
    divergence.__doc__ = terms.__doc__
    return divergence


# name -> f(student_log_probs, teacher_log_probs, **params) -> (...,) float32 (float64 for float64 input), one value per
# token, differentiable in the student's. Log-probabilities below LOG_ZERO (masked ids at -inf) count as probability 0.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    name: _differentiable(terms) for name, terms in DIVERGENCE_TERMS.items()
}


def _compared(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, `log q - log p` and `q - p`. If p and q are close, `q - p` is exact, because it is not computed from both."""
    p, log_ratio = log_p.exp(), log_q - log_p
    return p, log_ratio, _gap(p, log_ratio, log_q.exp())


def _gap(p: Tensor, log_ratio: Tensor, q: Tensor) -> Tensor:
    """`q - p`. If q < e p, it is computed from p and `log_ratio` alone. Overwrites q."""
    return log_ratio.clamp(max=1).expm1_().mul_(p).add_(q.sub_(p, alpha=math.e).relu_())


def _distance(probs: Tensor, gap: Tensor) -> Tensor:
    """|gap| of probabilities. If both round to 1, their own gap is lost; it follows from the others (the sum is 0)."""
    return torch.where(probs > 0.5, gap - gap.sum(-1, keepdim=True), gap).abs_()


def _mixture_ratios(log_p: Tensor, log_q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """`log m - log p` and `log m - log q` of the mixture `m = weight * p + (1 - weight) * q`."""
    if weight > 0.5:
        of_q, of_p = _mixture_ratios(log_q, log_p, 1 - weight)
        return of_p, of_q
    log_ratio = log_p - log_q
    if weight == 0:
        return -log_ratio, torch.zeros_like(log_ratio)
    bounded = log_ratio.clamp(max=LARGE)  # above it, m is weight * p
    of_q = bounded.expm1().mul_(weight).log1p_()
    return of_q - bounded, of_q.add_(log_ratio.sub_(bounded))


def _power_terms(log_p: Tensor, log_ratio: Tensor) -> Terms:
    """`p * (expm1(x) - x)` and `p * expm1(x)`, x = log q - log p, for p and q that may overflow or underflow."""
    growth, decay = log_ratio.expm1(), (-log_ratio).expm1()
    is_less = log_ratio < 1
    largest = _power(torch.where(is_less, log_p, log_p + log_ratio))
    term = torch.where(is_less, growth - log_ratio, -decay - log_ratio * (decay + 1))
    return largest * term, largest * torch.where(is_less, growth, -decay)


def _power(exponent: Tensor) -> Tensor:
    """exp, clipped to a value that can still be multiplied and summed."""
    return exponent.clamp(max=0.85 * math.log(torch.finfo(exponent.dtype).max)).exp_()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
