"""Distances between aligned vectors: hidden states, keys, values.

Each function takes vectors (..., F) of student and teacher with the same width, and a mask (...,) of the positions that
count, or None if all do: then the host does not wait for the device. It returns the sum over these positions divided by
`num_items`, and the mean cosine, detached. The teacher's vectors also get a gradient if they require one (they come
from a projector).
"""

import torch
from torch import Tensor


def mercator_loss(
    student_kv: Tensor,
    teacher_kv: Tensor,
    mask: Tensor | None = None,
    *,
    direction_weight: float = 1.0,
    magnitude_weight: float = 0.01,
    num_items: int | float | Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The distance in direction, as on Mercator's map, and, with its own weight, in the logarithm of the length.

    `sum over mask of direction_weight * (1 - cos) + magnitude_weight * (log|s| - log|t|)^2`, lengths at least `eps`.
    The distance in direction is 0 from a vector to 100 times itself, 1 for orthogonal and 2 for opposite vectors.

    Args:
        student_kv (`torch.Tensor` of shape `(..., F)`): vectors.
        teacher_kv (`torch.Tensor` of shape `(..., F)`): vectors of the same width.
        mask (`torch.Tensor` of shape `(...,)`, bool, *optional*): positions that count, by default all.
        num_items (*optional*): the divisor; by default the number of positions that count.
        eps (`float`): keeps value and gradient finite if a vector is 0 (in float32 or bfloat16).

    Returns:
        The loss, a scalar with gradient, and the mean cosine, detached.
    """
    student, teacher = _at(mask, student_kv, teacher_kv)
    cosine, student_norm, teacher_norm = _cosine(student, teacher, eps)
    magnitude = (student_norm.log() - teacher_norm.log()).square()
    loss = direction_weight * (1 - cosine) + magnitude_weight * magnitude
    return loss.sum() / _divisor(student, num_items), _mean(cosine)


def mse_loss(
    student_kv: Tensor, teacher_kv: Tensor, mask: Tensor | None = None, *, num_items: int | float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean squared difference over F, summed over positions. The rest is as in [`mercator_loss`]."""
    student, teacher = _at(mask, student_kv, teacher_kv)
    loss = (student - teacher).square().mean(-1)
    return loss.sum() / _divisor(student, num_items), _mean(_cosine(student, teacher, 1e-6)[0])


def normalized_l1_loss(
    student_kv: Tensor,
    teacher_kv: Tensor,
    mask: Tensor | None = None,
    *,
    num_items: int | float | Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The mean absolute difference in units of the teacher's standard deviation (normalised L1, KaVa, 2510.02312).

    The standard deviation is taken over the F numbers of each vector, so it does not depend on the batch. It has no
    gradient. The rest is as in [`mercator_loss`].
    """
    student, teacher = _at(mask, student_kv, teacher_kv)
    unit = teacher.detach()
    scale = (unit - unit.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt().clamp(min=eps)  # (N, 1)
    loss = ((student - teacher) / scale).abs().mean(-1)
    return loss.sum() / _divisor(student, num_items), _mean(_cosine(student, teacher, eps)[0])


def cosine_loss(
    student_kv: Tensor, teacher_kv: Tensor, mask: Tensor | None = None, *, num_items: int | float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One minus the cosine, DistilBERT's loss for hidden states (1910.01108). The rest is as in [`mercator_loss`]."""
    return mercator_loss(student_kv, teacher_kv, mask, magnitude_weight=0.0, num_items=num_items)


def normalized_mse_loss(
    student_kv: Tensor,
    teacher_kv: Tensor,
    mask: Tensor | None = None,
    *,
    num_items: int | float | Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The squared distance in units of the teacher's squared length, `|s - t|^2 / |t|^2`; 1 for a student at 0.

    Layers of a network differ in scale by orders of magnitude. With this distance, each layer has the same weight. The
    rest is as in [`mercator_loss`].
    """
    student, teacher = _at(mask, student_kv, teacher_kv)
    loss = (student - teacher).square().sum(-1) / teacher.detach().square().sum(-1).clamp(min=eps)
    return loss.sum() / _divisor(student, num_items), _mean(_cosine(student, teacher, eps)[0])


FEATURE_LOSSES = {"mercator": mercator_loss, "mse": mse_loss, "normalized_l1": normalized_l1_loss}
HIDDEN_LOSSES = {"mse": mse_loss, "cosine": cosine_loss, "normalized_mse": normalized_mse_loss}


def _at(mask: Tensor | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors (N, F) at the positions of the mask, in float32 or better."""
    if student.shape != teacher.shape or (mask is not None and mask.shape != student.shape[:-1]):
        raise ValueError(
            f"student and teacher have to have one shape (..., F) and the mask (...,), got {tuple(student.shape)}, "
            f"{tuple(teacher.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if mask is None:
        return student.to(dtype).flatten(0, -2), teacher.to(dtype).flatten(0, -2)
    return student[mask].to(dtype), teacher[mask].to(dtype)


def _cosine(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    student_norm, teacher_norm = (x.norm(dim=-1).clamp(min=eps) for x in (student, teacher))  # (N,)
    return (student * teacher).sum(-1) / (student_norm * teacher_norm), student_norm, teacher_norm


def _divisor(vectors: Tensor, num_items: int | float | Tensor | None) -> int | float | Tensor:
    return max(len(vectors), 1) if num_items is None else num_items


def _mean(cosine: Tensor) -> Tensor:
    return cosine.detach().sum() / max(len(cosine), 1)


def centered_cosine(x: Tensor, y: Tensor, eps: float = 1e-6) -> Tensor:
    """The mean cosine of features (N, F) after subtracting their means over the N tokens.

    Keys share a large mean, so any two keys look alike without this.
    """
    return _cosine(x - x.mean(0), y - y.mean(0), eps)[0].mean()


def effective_rank(features: Tensor) -> Tensor:
    """`exp` of the entropy of the normalised singular values of centred features (N, F) (Roy and Vetterli, 2007)."""
    return effective_rank_of(torch.linalg.svdvals(features - features.mean(0)))


def effective_rank_of(singular_values: Tensor) -> Tensor:
    """`exp` of the entropy of normalised singular values (..., r); 0 where all of them are 0."""
    totals = singular_values.sum(-1, keepdim=True)
    shares = singular_values / totals.clamp(min=1e-30)
    return torch.special.entr(shares).sum(-1).exp() * (totals.squeeze(-1) > 0)
