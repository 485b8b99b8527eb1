"""Hidden states as bytes: half precision or 8-bit integers, and the head that reads them.

A teacher's last hidden states, and its head, say all that a model says: every divergence, temperature and sum can be
taken of them. A hidden state takes D numbers of one or two bytes, and a scale. Integers lose less in another basis, so
hidden states are multiplied by a matrix before they are rounded, and the head by its inverse: nothing has to be undone.

Shapes: n positions, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_distill.losses.divergence import forward_kl, log_softmax
from hf_distill.losses.head import Head, default_chunk_size

# The largest stored number. That of float16 is a power of two, so that its scales are: nothing is rounded twice.
LARGEST = {"float16": 2.0**15, "int8": 127.0}
# Rows of a product with the transform. There are always as many, so that a row's bytes do not depend on the others.
BLOCK = 256


class Rounding(NamedTuple):
    """A way to store hidden states (n, D): `hidden @ transform`, then a scale per position, then `dtype`.

    A transform cannot be computed again, because it depends on a probe: a store that is written in several runs
    saves the two tensors. Who only reads needs none of it, but the folded head.
    """

    dtype: str  # "float16" or "int8"
    name: str  # for people
    transform: Tensor | None = None  # (D, D) or, if it is diagonal, (D,); float32; None: the identity
    inverse: Tensor | None = (
        None  # of its transpose, so that (hidden @ transform) @ (weight @ inverse).T are the logits
    )


def round_hidden(hidden: Tensor, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, D) of `rounding.dtype` and scales (n,), float32, of hidden states (n, D).

    In float16 the scale is a power of two: hidden states in bfloat16 are stored exactly, but for those below 2^-31 of
    the largest of their position. A position's bytes do not depend on the other rows.

    Raises:
        `ValueError`: a hidden state that is not finite.
    """
    with torch.no_grad():
        hidden = _applied(_finite(hidden), rounding.transform)
        largest = hidden.abs().amax(-1)
        if rounding.dtype == "float16":
            exponents = torch.frexp(largest / LARGEST["float16"]).exponent.clamp(min=-115)
            scales = torch.ldexp(torch.ones_like(largest), exponents)
            values = hidden / scales.unsqueeze(-1)
        else:
            scales = (largest / LARGEST["int8"]).float()
            values = (hidden / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_()
        values = values.to(getattr(torch, rounding.dtype))
        return values.cpu().numpy(), torch.where(largest > 0, scales, 0).float().cpu().numpy()


def restore_hidden(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states (n, D) in `dtype`, in the basis of the folded head, from what `round_hidden` gave."""
    return (values.to(scales.dtype) * scales.unsqueeze(-1)).to(dtype)


def folded_head(head: Head, rounding: Rounding) -> Head:
    """The head whose logits of stored hidden states are those of `head`, in the dtype of its weight."""
    if rounding.inverse is None:
        return head
    weight = torch.empty_like(head.weight, requires_grad=False)
    with torch.no_grad():
        for part, rows in _slices(head.weight):
            weight[part] = _applied(rows, rounding.inverse).to(weight.dtype)
    return head._replace(weight=weight)


def fidelity(hidden: Tensor, head: Head, rounding: Rounding, *, vocab_size: int) -> dict[str, float]:
    """The difference between a teacher and what is stored of it, over hidden states (n, D).

    Returns:
        "kl" and "largest_kl", the mean and the largest KL(teacher || stored) of a position in nats; "angle", the mean
        angle in degrees between the gradients of the logits of a student that knows nothing (the uniform one);
        "agreement", the share of positions whose most likely token stays.
    """
    values, scales = (torch.from_numpy(x).to(hidden.device) for x in round_hidden(hidden, rounding))
    stored_head, head = folded_head(head, rounding).truncated(vocab_size), head.truncated(vocab_size)
    size = max(1, default_chunk_size(hidden.device, vocab_size) // 4)
    parts = []
    with torch.no_grad():
        for chunk in (slice(start, start + size) for start in range(0, len(hidden), size)):
            restored = restore_hidden(values[chunk], scales[chunk], hidden.dtype)
            teacher, stored = head.logits(hidden[chunk]), stored_head.logits(restored)
            agreement = (teacher.argmax(-1) == stored.argmax(-1)).double()
            teacher, stored = log_softmax(teacher), log_softmax(stored)
            kl = forward_kl(stored, teacher)[0].sum(-1)
            t, s = (x.exp_().sub_(1 / vocab_size) for x in (teacher, stored))
            distance = (t / t.norm(dim=-1, keepdim=True) - s / s.norm(dim=-1, keepdim=True)).norm(dim=-1)
            angle = 2 * torch.asin((distance / 2).clamp(max=1))
            parts.append(torch.stack([kl.double(), angle.double().rad2deg(), agreement]))
    kl, angle, agreement = torch.cat(parts, 1)
    return {
        "kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "angle": angle.mean().item(),
        "agreement": agreement.mean().item(),
    }


def choose_rounding(
    hidden: Tensor, head: Head, dtype: str, *, vocab_size: int, seed: int
) -> tuple[Rounding, dict[str, float]]:
    """The way to store hidden states in `dtype` that loses least on a probe (n, D), and its `fidelity` there.

    Args:
        hidden: of 2,048 positions of several documents, or more.
        dtype (`str`): "float16" or "int8".
        vocab_size (`int`): of the tokens that count, the first ones of the head.
        seed (`int`): of the random rotation.

    Raises:
        `ValueError`: another dtype, no positions, or a hidden state that is not finite.
    """
    if dtype not in LARGEST:
        raise ValueError(f"hidden states are stored in {' or '.join(LARGEST)}, got {dtype!r}")
    if not len(hidden):
        raise ValueError("a rounding is chosen on hidden states of some positions, got none")
    best = Rounding(dtype, "token")
    return best, fidelity(hidden, head, best, vocab_size=vocab_size)


def _finite(hidden: Tensor) -> Tensor:
    """Hidden states in float32 or better."""
    hidden = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    if not bool(hidden.isfinite().all()):
        rows = (~hidden.isfinite().all(-1)).nonzero().flatten().tolist()
        raise ValueError(f"the teacher's hidden states are not finite at {len(rows)} of {len(hidden)} positions")
    return hidden


def _applied(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """`rows @ matrix` for a matrix that may be a diagonal, in blocks that are all of one size."""
    if matrix is None:
        return rows
    matrix = matrix.to(rows.device, torch.promote_types(rows.dtype, matrix.dtype))
    rows = rows.to(matrix.dtype)
    if matrix.ndim == 1:
        return rows * matrix
    out = torch.empty_like(rows)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            filled = (
                block if len(block) == BLOCK else torch.cat([block, block.new_zeros(BLOCK - len(block), rows.shape[1])])
            )
            out[start : start + BLOCK] = (filled @ matrix)[: len(block)]
    return out


def _slices(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in float32 or better, some at a time."""
    for start in range(0, len(weight), 16 * BLOCK):
        part = slice(start, start + 16 * BLOCK)
        yield part, weight[part].to(torch.promote_types(weight.dtype, torch.float32))
