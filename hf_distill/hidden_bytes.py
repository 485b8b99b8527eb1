"""Hidden states as bytes: half precision or 8-bit integers, and the head that reads them.

A teacher's last hidden states, and its head, say all that a model says: every divergence, temperature and sum can be
taken of them. A hidden state takes D numbers of one or two bytes, and a scale. Integers lose less in another basis, so
hidden states are multiplied by a matrix before they are rounded, and the head by its inverse.

**The basis of integers.** Rounding adds the same noise to all D numbers of a position, in proportion to the largest.
Let A be the transform, C = E[h h^T] the second moment of hidden states, and F the Hessian of KL(teacher || .) by the
hidden state: `F = E[W^T (diag(t) - t t^T) W]` for the head W and the teacher's probabilities t. After a random rotation
the largest number is a constant times the norm of `h A`, so the divergence is proportional to

    tr(A^T C A) * tr(A^-1 F A^-T)

It is smallest where `M = A A^T` solves `M C M = F`: with C = L L^T and L^T F L = Q diag(l) Q^T that is
`A = L^-T Q diag(l)^(1/4)`. Large directions are made small, and those on which the prediction depends are made large,
as far as both gain from it. On 768 tokens of SmolLM2-135M the mean KL in nats is 6e-3 with a scale per position alone,
5e-4 with a scale per channel as well, 3e-4 rotated, and 6e-5 in this basis.

Shapes: n positions, D hidden width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_distill.losses.divergence import forward_kl, log_softmax
from hf_distill.losses.head import Head, add_product_, default_chunk_size

# The largest stored number. That of float16 is a power of two, so that its scales are: nothing is rounded twice.
LARGEST = {"float16": 2.0**15, "int8": 127.0}
# Rows of a product with a transform. There are always as many, so that a row's bytes do not depend on the others.
BLOCK = 256
# Shares of the identity in C and F: directions that the probe lacks, or the head, are rounded as well.
HIDDEN_SHRINKAGE, HESSIAN_SHRINKAGE = 0.1, 0.01


class Rounding(NamedTuple):
    """A way to store hidden states (n, D): `hidden @ transform`, then a scale per position, then `dtype`.

    The transform depends on a probe and cannot be computed again: a store that is written in several runs saves it.
    `inverse` is only needed for the folded head. Whoever reads needs the folded head alone.
    """

    dtype: str  # "float16" or "int8"
    name: str  # for people: "token", a scale per position alone, or "balanced"
    transform: Tensor | None = None  # (D, D) float32; None: the identity
    inverse: Tensor | None = None  # of the transpose: (hidden @ transform) @ (weight @ inverse).T are the logits

    def to(self, device: torch.device) -> "Rounding":
        """The rounding with its tensors on `device`; itself, if they are there."""
        return self._replace(**{name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)})


def round_hidden(hidden: Tensor, rounding: Rounding) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, D) of `rounding.dtype` and scales (n,), float32, of hidden states (n, D).

    In float16 the scale is a power of two: hidden states in bfloat16 are stored exactly, but for those below 2^-31 of
    the largest of their position. A position's bytes do not depend on the other rows.

    Raises:
        `ValueError`: a hidden state that is not finite in float32.
    """
    with torch.no_grad():
        hidden = _applied(_widened(hidden), rounding.transform)
        largest = hidden.abs().amax(-1).float()
        _check_finite(largest)
        if rounding.dtype == "float16":
            exponents = torch.frexp(largest / LARGEST["float16"]).exponent
            scales = torch.ldexp(torch.ones_like(largest), exponents)
        else:
            scales = largest / LARGEST["int8"]
        scales.clamp_(min=torch.finfo(torch.float32).tiny)
        values = hidden / scales.unsqueeze(-1)
        if rounding.dtype == "int8":
            values.round_()
        values = values.to(getattr(torch, rounding.dtype))
        return values.cpu().numpy(), scales.masked_fill_(largest == 0, 0).cpu().numpy()


def restore_hidden(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states (n, D) in `dtype`, in the basis of the folded head, from what `round_hidden` gave."""
    return (values.to(scales.dtype) * scales.unsqueeze(-1)).to(dtype)


def folded_head(head: Head, rounding: Rounding) -> Head:
    """The head whose logits of stored hidden states are those of `head`, in the dtype of its weight."""
    if rounding.transform is None:
        return head
    assert rounding.inverse is not None, "a transform alone rounds hidden states; its inverse makes the head"
    weight = torch.empty_like(head.weight, requires_grad=False)
    with torch.no_grad():
        for part, rows in head.weight_slices(torch.promote_types(weight.dtype, torch.float32)):
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
    parts = []
    with torch.no_grad():
        restored = restore_hidden(values, scales, head.weight.dtype)
        for rows, stored_rows in zip(_chunks(hidden, vocab_size), _chunks(restored, vocab_size), strict=True):
            teacher, stored = head.logits(rows), stored_head.logits(stored_rows)
            agreement = (teacher.argmax(-1) == stored.argmax(-1)).double()
            teacher, stored = log_softmax(teacher), log_softmax(stored)
            kl = forward_kl(stored, teacher)[0].sum(-1).double()
            parts.append(torch.stack([kl, _angle(teacher, stored), agreement]))
    kl, angle, agreement = torch.cat(parts, 1)
    return {
        "kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "angle": angle.mean().item(),
        "agreement": agreement.mean().item(),
    }


def _angle(teacher: Tensor, stored: Tensor) -> Tensor:
    """The angle (n,) between probabilities minus 1 / V, in degrees. Overwrites log-probabilities (n, V) with them."""
    directions = [x.exp_().sub_(1 / x.shape[-1]) for x in (teacher, stored)]
    first, second = (x.div_(x.norm(dim=-1, keepdim=True)) for x in directions)
    # The arc cosine of nearly 1 would lose small angles.
    return 2 * torch.asin((first.sub_(second).norm(dim=-1) / 2).clamp(max=1)).double().rad2deg()


def choose_rounding(
    hidden: Tensor, head: Head, dtype: str, *, vocab_size: int, seed: int
) -> tuple[Rounding, dict[str, float]]:
    """The way to store hidden states in `dtype` that loses least, and its `fidelity`.

    Every other position makes the candidates, and the rest measures them. One copy of the head exists at a time.

    Args:
        hidden: of 2,048 positions of several documents, or more.
        dtype (`str`): "float16" or "int8".
        vocab_size (`int`): of the tokens that count, the first ones of the head.
        seed (`int`): of the random rotation.

    Raises:
        `ValueError`: another dtype, no positions, or a hidden state that is not finite in float32.
    """
    if dtype not in CANDIDATES:
        raise ValueError(f"hidden states are stored in {' or '.join(CANDIDATES)}, got {dtype!r}")
    if not len(hidden):
        raise ValueError("a rounding is chosen on hidden states of some positions, got none")
    _check_finite(hidden.float().abs().amax(-1))
    probe, measured = hidden[::2], hidden[1::2] if len(hidden) > 1 else hidden
    found = []
    with torch.no_grad():
        for name, candidate in CANDIDATES[dtype].items():
            rounding = Rounding(dtype, name, *candidate(probe, head.truncated(vocab_size), seed))
            found.append((rounding, fidelity(measured, head, rounding, vocab_size=vocab_size)))
    return min(found, key=lambda pair: pair[1]["kl"])


Transform = tuple[Tensor | None, Tensor | None]


def _identity(hidden: Tensor, head: Head, seed: int) -> Transform:
    return None, None


def _balanced(hidden: Tensor, head: Head, seed: int) -> Transform:
    """The basis of the module's docstring, then a random rotation.

    D = 4,096 takes a minute of one CPU core, and three seconds more for every thousand tokens of the vocabulary.
    """
    factor = torch.linalg.cholesky(_shrunk(hidden.double().t() @ hidden.double(), HIDDEN_SHRINKAGE))
    hessian = _shrunk(_hessian(hidden, head), HESSIAN_SHRINKAGE)
    values, vectors = torch.linalg.eigh(factor.t() @ hessian @ factor)
    root = values.clamp(min=1e-8 * values.amax()) ** 0.25
    rotation = random_rotation(hidden.shape[-1], seed).to(hidden.device)
    transform = torch.linalg.solve_triangular(factor.t(), vectors * root, upper=True) @ rotation
    return transform.float(), (factor @ (vectors / root) @ rotation).float()


CANDIDATES: dict[str, dict[str, Callable[[Tensor, Head, int], Transform]]] = {
    "float16": {"token": _identity},
    "int8": {"token": _identity, "balanced": _balanced},
}


def _hessian(hidden: Tensor, head: Head) -> Tensor:
    """The sum over positions of `W^T (diag(t) - t t^T) W`, (D, D) in float64, but for the factor of a soft-cap."""
    mean = hidden.new_zeros(len(head.weight), dtype=torch.float64)  # (V,), of t
    total = hidden.new_zeros((hidden.shape[-1],) * 2, dtype=torch.float64)
    for chunk in _chunks(hidden, len(head.weight)):
        probs = head.logits(chunk).softmax(-1)
        mean += probs.sum(0)
        expected = torch.zeros_like(chunk, dtype=probs.dtype)  # W^T t
        for part, weight in head.weight_slices(probs.dtype):
            add_product_(expected, probs[:, part], weight)
        total -= expected.double().t() @ expected.double()
    for part, weight in head.weight_slices(torch.float64):
        total += (weight * mean[part].unsqueeze(-1)).t() @ weight
    return total


def _shrunk(matrix: Tensor, share: float) -> Tensor:
    """A semidefinite matrix (D, D), scaled to a mean eigenvalue of 1, plus a share of the identity: invertible."""
    mean = matrix.diagonal().mean().clamp(min=torch.finfo(matrix.dtype).tiny)
    return matrix * ((1 - share) / mean) + share * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def random_rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix (D, D) in float64 that spreads each vector evenly: random signs, then a cosine transform.

    It is made in D^2 steps, for every width, and rounds as well as one of a QR decomposition, which takes D^3.
    """
    signs = torch.randint(2, (width, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    places = torch.arange(width, dtype=torch.float64)
    cosines = torch.cos(math.pi / width * (places.unsqueeze(-1) + 0.5) * places) * math.sqrt(2 / width)
    cosines[:, 0] /= math.sqrt(2)
    return signs * cosines


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _check_finite(largest: Tensor) -> None:
    """Checks the largest number (n,) of each position."""
    lost = len(largest) - int(largest.isfinite().sum())
    if lost:
        raise ValueError(
            f"the teacher's hidden states are not finite in float32 at {lost} of {len(largest)} positions: "
            "load it in another dtype (float16 overflows where bfloat16 does not), or look for NaN in its weights"
        )


def _chunks(rows: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Rows whose logits, and a few tensors of their size, fit into memory."""
    yield from rows.split(max(1, default_chunk_size(rows.device, vocab_size) // 4))


def _applied(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """`rows @ matrix`, in blocks that are all of one size."""
    if matrix is None:
        return rows
    matrix = matrix.to(rows.device, rows.dtype)
    filled = torch.cat([rows, rows.new_zeros(-len(rows) % BLOCK, rows.shape[-1])])
    with torch.autocast(rows.device.type, enabled=False):
        for block in filled.split(BLOCK):
            block.copy_(block @ matrix)
    return filled[: len(rows)]
