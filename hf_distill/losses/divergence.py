"""Divergences between two next-token distributions, each written once.

A divergence is the sum over the vocabulary of one term per token id. Every function below is given natural
log-probabilities and returns that term beside its derivative with respect to `log p_student`; nothing else about a
divergence is ever needed, because the gradient with respect to the student's logits is
`(g - p_student * sum(g)) / temperature` for all of them. `DIVERGENCES` turns each into an ordinary differentiable
function; the fused loss reads the same terms without building an autograd graph.

Shapes: `(..., V)` in, `(..., V)` for the term and its derivative, `(...)` for the divergence. Unit: nats.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Terms = tuple[Tensor, Tensor]

# Stands for log(0): exp() of it is exactly 0 in every dtype, and its products with 0 are finite.
LOG_ZERO = -1e4


def forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """KL(teacher || student), the soft-label loss of Hinton et al. (1503.02531). It covers all the teacher's modes."""
    teacher_probs = teacher_log_probs.exp()
    return teacher_probs * (teacher_log_probs - student_log_probs), -teacher_probs


def reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """KL(student || teacher), the loss of MiniLLM (2306.08543). It keeps to the modes that the student can hold."""
    student_probs = student_log_probs.exp()
    log_ratio = student_log_probs - teacher_log_probs
    return student_probs * log_ratio, student_probs * (log_ratio + 1)


def jensen_shannon(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float = 0.5) -> Terms:
    """`beta * KL(teacher || m) + (1 - beta) * KL(student || m)`, `m = beta * p_teacher + (1 - beta) * p_student`.

    The generalised Jensen-Shannon divergence of GKD (2306.13649, eq. 1), for `beta` in (0, 1). At 0 and at 1 it is
    identically zero, so both are refused: use `forward_kl` or `reverse_kl`, its limits after division by `beta` or
    `1 - beta`.
    """
    _require(0 < beta < 1, f"jensen_shannon needs beta in (0, 1), got {beta}; its limits are forward_kl and reverse_kl")
    student_probs, teacher_probs = student_log_probs.exp(), teacher_log_probs.exp()
    log_mixture = _log_mixture(teacher_log_probs, student_log_probs, beta)
    student_term = (1 - beta) * student_probs * (student_log_probs - log_mixture)
    return beta * teacher_probs * (teacher_log_probs - log_mixture) + student_term, student_term


def skew_forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Terms:
    """KL(teacher || skew * p_teacher + (1 - skew) * p_student), `skew` in [0, 1): DistiLLM (2402.03898, 3.1)."""
    _require(0 <= skew < 1, f"skew_forward_kl needs skew in [0, 1), got {skew}")
    teacher_probs = teacher_log_probs.exp()
    log_mixture = _log_mixture(teacher_log_probs, student_log_probs, skew)
    student_share = (math.log1p(-skew) + student_log_probs - log_mixture).exp()
    return teacher_probs * (teacher_log_probs - log_mixture), -teacher_probs * student_share


def skew_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, skew: float = 0.1) -> Terms:
    """KL(student || skew * p_student + (1 - skew) * p_teacher), `skew` in [0, 1): DistiLLM (2402.03898, 3.1)."""
    _require(0 <= skew < 1, f"skew_reverse_kl needs skew in [0, 1), got {skew}")
    student_probs = student_log_probs.exp()
    log_mixture = _log_mixture(student_log_probs, teacher_log_probs, skew)
    log_ratio = student_log_probs - log_mixture
    student_share = skew * log_ratio.exp()
    return student_probs * log_ratio, student_probs * (log_ratio + 1 - student_share)


def total_variation(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Terms:
    """`1/2 * sum |p_teacher - p_student|`, in [0, 1]: one minus the acceptance rate of the student as a draft."""
    student_probs = student_log_probs.exp()
    gap = student_probs - teacher_log_probs.exp()
    return 0.5 * gap.abs(), 0.5 * gap.sign() * student_probs


def alpha_beta(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Terms:
    """The alpha-beta divergence of ABKD (2505.04560), with its limits where `alpha`, `beta` or their sum is 0.

    `-1/(alpha beta) * sum(p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta))` with
    p the teacher and q the student: (1, 0) is `forward_kl`, (0, 1) `reverse_kl`, (0.5, 0.5) four times the squared
    Hellinger distance `1/2 * sum (sqrt p - sqrt q)^2`.
    """
    _require(math.isfinite(alpha) and math.isfinite(beta), f"alpha_beta needs finite numbers, got {alpha} and {beta}")
    total = alpha + beta
    if alpha == 0 and beta == 0:
        log_ratio = student_log_probs - teacher_log_probs
        return 0.5 * log_ratio.square(), log_ratio
    if beta == 0:
        student_power, teacher_power = (alpha * student_log_probs).exp(), (alpha * teacher_log_probs).exp()
        log_ratio = alpha * (teacher_log_probs - student_log_probs)
        term = (teacher_power * log_ratio - teacher_power + student_power) / alpha**2
        return term, (student_power - teacher_power) / alpha
    if alpha == 0:
        student_power, teacher_power = (beta * student_log_probs).exp(), (beta * teacher_log_probs).exp()
        log_ratio = beta * (student_log_probs - teacher_log_probs)
        return (student_power * log_ratio - student_power + teacher_power) / beta**2, student_power * log_ratio / beta
    if total == 0:
        log_ratio = alpha * (student_log_probs - teacher_log_probs)
        return (log_ratio + torch.expm1(-log_ratio)) / alpha**2, -torch.expm1(-log_ratio) / alpha
    cross = (alpha * teacher_log_probs + beta * student_log_probs).exp()
    student_power, teacher_power = (total * student_log_probs).exp(), (total * teacher_log_probs).exp()
    term = (alpha * teacher_power + beta * student_power) / (alpha * beta * total) - cross / (alpha * beta)
    return term, (student_power - cross) / alpha


def adaptive_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, head: float = 0.5) -> Terms:
    """Forward and reverse KL, weighted by how far the student is off on the head and on the tail (AKL, 2404.02657).

    The head is the smallest set of the teacher's most likely tokens whose mass reaches `head`, in (0, 1), as the paper
    defines it (its released code stops one token earlier, before the mass is reached). The weight
    of the forward KL is the share of `sum |p_teacher - p_student|` that lies in the head, the reverse KL has the
    rest; the weights carry no gradient. Costs a sort of the vocabulary, several times the price of the others.
    """
    _require(0 < head < 1, f"adaptive_kl needs head in (0, 1), got {head}")
    sorted_probs, order = teacher_log_probs.exp().sort(dim=-1, descending=True)
    mass_before = sorted_probs.cumsum(-1) - sorted_probs
    in_head = torch.zeros_like(sorted_probs).scatter_(-1, order, (mass_before < head).to(sorted_probs.dtype))
    gap = (teacher_log_probs.exp() - student_log_probs.exp()).abs()
    head_gap, total_gap = (gap * in_head).sum(-1, keepdim=True), gap.sum(-1, keepdim=True)
    # Equal distributions have no gap to divide; any weight is right, since both divergences are zero.
    weight = torch.where(total_gap > 0, head_gap / total_gap.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)
    forward, forward_gradient = forward_kl(student_log_probs, teacher_log_probs)
    reverse, reverse_gradient = reverse_kl(student_log_probs, teacher_log_probs)
    return torch.lerp(reverse, forward, weight), torch.lerp(reverse_gradient, forward_gradient, weight)


def taid(student_log_probs: Tensor, teacher_log_probs: Tensor, t: float = 0.5) -> Terms:
    """KL(m || student), `m` in proportion to `p_student^(1-t) * p_teacher^t`, `t` in [0, 1]: TAID (2501.16937, eq. 3).

    `m` lies between student and teacher, as a mean of their logits, and carries no gradient. With `t` rising to 1 over
    the training, the student follows a teacher that is never far ahead of it.
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
    """The factor that keeps the size of the gradient when the temperature changes: T^2, and T for total variation.

    Dividing logits by T shrinks the gradient of the others by T^2 (1503.02531, section 2), of total variation by T.
    """
    return temperature if divergence == "total_variation" else temperature**2


def check_divergence(divergence: str, params: dict | None) -> dict:
    """The parameters of a divergence as a dict, after a trial on one token.

    Raises:
        `ValueError`: the divergence does not exist, does not have such a parameter, or the value is out of range.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} does not exist; choose one of {', '.join(sorted(DIVERGENCES))}")
    params = dict(params or {})
    terms = DIVERGENCE_TERMS[divergence]
    allowed = terms.__code__.co_varnames[2 : terms.__code__.co_argcount]
    if unknown := sorted(set(params) - set(allowed)):
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
    def backward(ctx, grad_output: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
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


def _log_mixture(first_log_probs: Tensor, second_log_probs: Tensor, weight: float) -> Tensor:
    """log(weight * p_first + (1 - weight) * p_second), exact at weight 0."""
    if weight == 0:
        return second_log_probs
    return torch.logaddexp(first_log_probs + math.log(weight), second_log_probs + math.log1p(-weight))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
