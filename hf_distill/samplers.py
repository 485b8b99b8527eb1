"""Random samples of next-token distributions: a few ids and weights for each, whose mean is the distribution.

A store of a teacher's outputs cannot keep V probabilities for each token of a text. It keeps a target w of K entries,
with E[w] = t for the teacher's distribution t. Then what is linear in t stays right in the mean: the gradient of the
forward KL (`losses/sparse.py`).

- `threshold` keeps the tokens with t_v >= tau at their exact probability. Of the others it keeps each with probability
  t_v / tau, at the weight tau. tau is such that K entries are kept: sum_v min(1, t_v / tau) = K. The squared error,
  `sum_v t_v (tau - t_v)+`, is the smallest that K entries can have in the mean.
- `multinomial` draws K times with replacement; the weight of a token is its share of the draws. This is Random Sampling
  Knowledge Distillation (2503.16870).

**How many entries a position needs** differs: a sure teacher is described by one, and a hundred may be too few at the
start of a sentence. The derivative of the squared error by K is -tau^2. So of all ways to spend the same number of
entries on a text, the one with the same tau everywhere has the smallest error. `threshold(..., tau=...)` spends them in
this way, and `tau_for` finds the tau that leads to a mean number of entries.

Nothing here is random: the uniform numbers are arguments, so that a store decides what they depend on. Logits come in
chunks. On a CPU, 16 positions at a time are three times as fast as 64, whose tensors fit no cache (V = 151,936).

Shapes: n positions, V vocabulary, K entries, B blocks of the vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.metrics import sum_dtype

# Tokens of a block. Sums over blocks are enough to find the block of a random number; only there is each token looked
# at. So the vocabulary is read a few times, and never sorted or summed up token by token.
BLOCK = 256
# A token this close to tau is kept for sure. The sample is right in the mean either way, and no rounding can select a
# token twice.
CLOSE = 1 - 2**-16
# Logits this far below the largest one have a probability of exactly 0 in every dtype, and no infinity to multiply.
LOWEST = -1e4


class SparseTarget(NamedTuple):
    """K entries for each of n distributions. Weights sum to 1; entries of weight 0 at the end are none."""

    ids: Tensor  # (n, K) int64; the exact entries first, in descending order
    weights: Tensor  # (n, K)
    entropy: Tensor  # (n,), of the distribution, in nats
    num_exact: Tensor  # (n,) int64, the number of entries whose weight is their probability


def threshold(logits: Tensor, num_entries: int, uniforms: Tensor, *, tau: float = 0.0) -> SparseTarget:
    """The likeliest tokens at their probability, and of the others a systematic sample at one weight.

    The sample is taken in the order of the vocabulary: the probabilities t_v / tau are laid end to end, and the tokens
    at u, u + 1, u + 2, ... are selected. That needs one uniform number for each position, and selects exactly K' =
    min(K, tokens of positive probability) different tokens.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): over the true vocabulary, divided by the temperature.
        num_entries (`int`): K, or with `tau` the most of them; more than V are V.
        uniforms (`torch.Tensor` of shape `(n,)`): in [0, 1). In float64 the rarest tokens have their due as well.
        tau (`float`): a position has as few entries as lead to a weight of no more than this, if K are enough.
    """
    _check(num_entries, uniforms, logits.shape[:1])
    mass, entropy = _masses(logits)
    total = mass.sum((-2, -1)).unsqueeze(-1)  # (n, 1)
    top, ids, left, sums = _split_(mass, min(num_entries, logits.shape[-1]))
    number = _num_entries(top, left, tau * total)  # (n, 1), K
    places = torch.arange(top.shape[-1], device=top.device)
    taus = left[:, :-1] / (number - places).clamp(min=1)  # if all before it are exact
    # The last entry stands for all that is left.
    is_exact = (top > 0) & (top >= CLOSE * taus) & ((places < number - 1) | (left[:, 1:] == 0))
    num_exact = is_exact.cumprod(-1).sum(-1, keepdim=True)  # (n, 1), j
    is_exact = places < num_exact

    sampled = top.masked_fill(is_exact, 0)
    mass.flatten(1).scatter_(-1, ids, sampled)
    sums.scatter_add_(-1, ids // BLOCK, sampled)
    num_parts = number - num_exact  # of what is left, each of tau
    positions = (uniforms.unsqueeze(-1).to(sum_dtype(top.device)) + places) / num_parts.clamp(min=1)
    selected = _tokens_at(mass, sums, positions, places < num_parts)  # (n, K)
    selected = selected.gather(-1, (places - num_exact).clamp(min=0))
    weights = torch.where(is_exact, top, taus.gather(-1, num_exact.clamp(max=len(places) - 1)))
    weights = weights.masked_fill(places >= number, 0) / total
    ids = torch.where(is_exact, ids, selected).masked_fill_(weights == 0, 0)
    return SparseTarget(ids, weights, entropy, num_exact.squeeze(-1))


def multinomial(logits: Tensor, num_draws: int, uniforms: Tensor) -> SparseTarget:
    """The share of each token in `num_draws` independent draws, as many entries as different tokens, the largest first.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): over the true vocabulary, divided by the temperature.
        num_draws (`int`): K.
        uniforms (`torch.Tensor` of shape `(n, num_draws)`): in [0, 1).
    """
    _check(num_draws, uniforms, (len(logits), num_draws))
    mass, entropy = _masses(logits)
    drawn = _tokens_at(mass, mass.sum(-1), uniforms, torch.ones_like(uniforms, dtype=torch.bool)).sort(-1).values
    is_new = torch.ones_like(drawn)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    entries = is_new.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add_(-1, entries, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter_(-1, entries, drawn)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    return SparseTarget(
        ids.gather(-1, order), counts.to(entropy.dtype) / num_draws, entropy, torch.zeros_like(entries[:, 0])
    )


def _masses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, B, BLOCK), but for a factor of each row, in float32 or better; and the entropies (n,)."""
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // BLOCK)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    below = logits.new_full((num_rows, num_blocks * BLOCK), LOWEST)
    torch.sub(logits, logits.amax(-1, keepdim=True), out=below[:, :vocab_size]).clamp_(min=LOWEST)
    mass = below.exp()
    total = mass.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(mass, below) / total
    return mass.unflatten(-1, (num_blocks, BLOCK)), entropy


def likeliest(logits: Tensor, num_entries: int) -> Tensor:
    """The probabilities (n, K + 1) of the K most likely tokens in descending order, and of all others together."""
    mass, _ = _masses(logits)
    total = mass.sum((-2, -1)).unsqueeze(-1)
    top, _, left, _ = _split_(mass, min(num_entries, logits.shape[-1]))
    return torch.cat([top, left[:, -1:]], -1) / total


def tau_for(probs: Tensor, num_entries: float) -> float:
    """The `tau` of [`threshold`] at which positions have `num_entries` entries in the mean, or a few less.

    Args:
        probs (`torch.Tensor` of shape `(n, K + 1)`): what [`likeliest`] returns for a sample of the text, with the K of
            [`threshold`]. Where even K entries at each position are fewer in the mean, the result is 0.
    """
    top, left = probs[:, :-1], probs.flip(-1).cumsum(-1).flip(-1)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        is_more = _num_entries(top, left, torch.full_like(top[:, :1], middle)).double().mean().item() > num_entries
        low, high = (middle, high) if is_more else (low, middle)
    return low if low == 0 else high


def _num_entries(top: Tensor, left: Tensor, tau: Tensor) -> Tensor:
    """The number of entries (n, 1), of K at most, of which those that are not exact have a weight of no more than tau.

    Args: as `_split_` returns them, and tau (n, 1), all in the same unit.
    """
    num_exact = (top >= tau).sum(-1, keepdim=True)
    rest = left.gather(-1, num_exact)
    parts = torch.where(rest > 0, (rest / tau).ceil(), 0).clamp(max=top.shape[-1])
    return (num_exact + parts.long()).clamp(1, top.shape[-1])


def _split_(mass: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes the k largest out of (n, B, BLOCK).

    Returns:
        These in descending order and their tokens (n, k); what is left from each of them on and after all (n, k + 1);
        and what is left of each block (n, B).
    """
    top, ids = _largest(mass, k)
    mass.flatten(1).scatter_(-1, ids, 0)
    sums = mass.sum(-1)  # (n, B)
    # Summed up from the smallest: 1 minus the others would have no digits.
    left = torch.cat([top, sums.sum(-1, keepdim=True)], -1).flip(-1).cumsum(-1).flip(-1)
    return top, ids, left, sums


def _largest(mass: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of (n, B, BLOCK) in descending order, and their tokens (n, k)."""
    if mass.shape[1] <= k:
        return mass.flatten(1).topk(k)
    blocks = mass.amax(-1).topk(k).indices  # (n, k); they hold the k largest
    inside = mass.gather(1, blocks.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)  # (n, k * BLOCK)
    top, places = inside.topk(k)
    return top, blocks.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def _tokens_at(mass: Tensor, sums: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """The tokens (n, k) at `positions` (n, k), in [0, 1), of masses that are laid end to end.

    Args:
        mass (`torch.Tensor` of shape `(n, B, BLOCK)`), sums (`torch.Tensor` of shape `(n, B)`): the sums of its blocks.
        wanted (`torch.Tensor` of shape `(n, k)`, bool): elsewhere the result is 0.
    """
    # In float32, the end of a rare token that comes late would often be the end of the one before.
    dtype = sum_dtype(mass.device)
    ends = sums.to(dtype).cumsum(-1)  # (n, B)
    goals = positions.to(dtype) * ends[:, -1:]  # (n, k)
    last = torch.searchsorted(ends, ends[:, -1:].contiguous())  # with any mass
    blocks = torch.minimum(torch.searchsorted(ends, goals, right=True), last)
    goals = (goals - F.pad(ends, (1, 0)).gather(-1, blocks)) / sums.gather(-1, blocks)  # of the block's own mass
    rows, blocks, goals = wanted.nonzero()[:, 0], blocks[wanted], goals[wanted].unsqueeze(-1)
    ends = mass[rows, blocks].to(dtype).cumsum(-1)  # (m, BLOCK)
    places = torch.minimum((ends <= goals * ends[:, -1:]).sum(-1), (ends < ends[:, -1:]).sum(-1))
    return torch.zeros_like(wanted, dtype=torch.int64).masked_scatter_(wanted, blocks * BLOCK + places)


def _check(num_entries: int, uniforms: Tensor, shape: tuple[int, ...]) -> None:
    if num_entries < 1:
        raise ValueError(f"a target needs at least one entry, got {num_entries}")
    if uniforms.shape != shape:
        raise ValueError(f"uniforms have to be {tuple(shape)}, got {tuple(uniforms.shape)}")
