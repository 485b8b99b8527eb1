"""Every divergence once more, naively, in float64, straight from the definitions. Slow, and obviously right."""

import torch


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def alpha_beta(p, q, alpha, beta):
    both = alpha + beta
    inner = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
    return -inner.sum(-1) / (alpha * beta)


def adaptive_kl(p, q, head):
    weights = []
    for p_row, q_row in zip(p.detach(), q.detach(), strict=True):
        mass, chosen = 0.0, []
        for index in p_row.argsort(descending=True).tolist():
            if mass >= head:
                break
            chosen.append(index)
            mass += p_row[index].item()
        gap = (p_row - q_row).abs()
        weights.append(gap[chosen].sum() / gap.sum())
    weight = torch.stack(weights)
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


def taid(p, q, t):
    target = q.detach() ** (1 - t) * p**t
    return kl(target / target.sum(-1, keepdim=True), q)


# name -> f(p_teacher, p_student) on probabilities, with the default parameters
ORACLE = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "skew_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "alpha_beta": lambda p, q: alpha_beta(p, q, 0.5, 0.5),
    "adaptive_kl": lambda p, q: adaptive_kl(p, q, 0.5),
    "taid": lambda p, q: taid(p, q, 0.5),
}


def distillation_loss(
    student_logits, teacher_logits, labels, *, kd_weight, temperature, divergence, token_weights=None, num_items=None
):
    """The loss of the design's definition, from dense logits (N, V)."""
    q = (student_logits / temperature).softmax(-1)
    p = (teacher_logits / temperature).softmax(-1)
    per_token = ORACLE[divergence](p, q)
    if token_weights is not None:
        per_token = per_token * token_weights
    factor = temperature if divergence == "total_variation" else temperature**2
    ce = torch.nn.functional.cross_entropy(student_logits, labels, ignore_index=-100, reduction="sum")
    return (kd_weight * factor * per_token.sum() + (1 - kd_weight) * ce) / (num_items or len(labels))
