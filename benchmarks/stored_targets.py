"""The outputs of a teacher as stores keep them: each written as bytes and read back, with its size and its error.

| store | what it keeps of a position |
|---|---|
| hidden, float16 or int8 | the last hidden state, rounded as is best on a probe; the head is saved once |
| threshold | K entries: those above a weight tau exactly, a systematic sample of the others at tau |
| threshold, one tau | as many entries as one tau for the whole text leads to, K in the mean |
| multinomial | the tokens of as many independent draws as lead to K different ones in the mean |
| top-k renormalised | the most likely tokens, their probabilities divided by their sum: what is common |
| top-k with its tail | the most likely tokens, and the probability of all others together |

A size K is one of threshold's numbers of entries. Both kinds of top-k have as many entries as fit its bytes.

Shapes: n positions, D hidden width, V vocabulary, K entries.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.hidden_bytes import Rounding, restore_hidden, round_hidden
from hf_distill.losses.divergence import LOG_ZERO
from hf_distill.losses.fused_linear import Head, TeacherSignal
from hf_distill.losses.sparse import SparseSignal, TopKSignal
from hf_distill.samplers import SparseTarget, likeliest, multinomial, tau_for, threshold
from hf_distill.target_bytes import id_bits, pack_targets, unpack_targets

MOST_ENTRIES = 255  # of a position with one tau: a byte counts them
ROWS = 16  # positions that are sampled at a time: their tensors fit the cache


class Stored(NamedTuple):
    """The content of a store at n positions, as it is read back."""

    signal: SparseSignal | TopKSignal | TeacherSignal
    num_bytes: float  # of all n positions
    num_entries: int  # of all n positions


class Sizes(NamedTuple):
    """The numbers of each store at a size K, as a probe of the text leads to them."""

    tau: float  # of the whole text
    num_draws: int
    num_likeliest: int


Store = Callable[[Tensor, int], Stored]  # from a teacher's logits (n, V), and a seed


def sizes_for(logits: Tensor, num_entries: int) -> Sizes:
    """The numbers that lead to `num_entries` entries in the mean, or to as many bytes, on a probe (n, V)."""
    probs = torch.cat([likeliest(rows, MOST_ENTRIES) for rows in logits.split(ROWS)])
    num_bytes = write_threshold(logits, num_entries, seed=0).num_bytes / len(logits)
    # Both kinds of top-k have as many entries, so one of them lacks the two bytes of its tail.
    entry = (id_bits(logits.shape[-1]) + 16) / 8
    num_likeliest = max(1, round((num_bytes - 2) / entry))
    return Sizes(tau_for(probs, num_entries), draws_for(logits, num_entries), min(num_likeliest, logits.shape[-1]))


def draws_for(logits: Tensor, num_entries: int) -> int:
    """The number of draws that have `num_entries` different tokens, in the mean over positions (n, V).

    A token of probability t is among N draws with probability `1 - (1 - t)^N`. More than 10,000 draws are 10,000.
    """
    log_others = [torch.log1p(-rows.double().softmax(-1)) for rows in logits.split(ROWS)]
    low, high = 1, 10_000
    while low < high:
        middle = (low + high) // 2
        number = sum(-torch.expm1(middle * rows).sum().item() for rows in log_others) / len(logits)
        low, high = (middle + 1, high) if number < num_entries else (low, middle)
    return low


def make_stores(sizes: Mapping[int, Sizes]) -> dict[str, Store]:
    """All stores by name, of each of these sizes K."""
    stores: dict[str, Store] = {}
    for k, (tau, num_draws, num_likeliest) in sizes.items():
        stores |= {
            f"threshold, K = {k}": lambda logits, seed, k=k: write_threshold(logits, k, seed),
            f"threshold, one tau, K = {k}": lambda logits, seed, tau=tau: write_threshold(
                logits, MOST_ENTRIES, seed, tau=tau
            ),
            f"multinomial, K = {k}": lambda logits, seed, draws=num_draws: write_multinomial(logits, draws, seed),
            f"top-k renormalised, K = {k}": lambda logits, seed, top=num_likeliest: write_renormalised(logits, top),
            f"top-k with its tail, K = {k}": lambda logits, seed, top=num_likeliest: write_top_k(logits, top),
        }
    return stores


def write_hidden(hidden: Tensor, rounding: Rounding, head: Head) -> Stored:
    """Hidden states (n, D) as `hidden_bytes` rounds them, and the head folded for that rounding."""
    values, scales = round_hidden(hidden, rounding)
    restored = restore_hidden(torch.from_numpy(values), torch.from_numpy(scales), torch.float32)
    return Stored(TeacherSignal(restored, head), values.nbytes + scales.nbytes, 0)


def write_threshold(logits: Tensor, num_entries: int, seed: int, *, tau: float = 0.0) -> Stored:
    """[`threshold`] as `target_bytes` packs it, with the entropy in float16; one tau for all positions, or none."""
    uniforms = _uniforms(seed, len(logits))
    parts = [
        threshold(rows, num_entries, u, tau=tau)
        for rows, u in zip(logits.split(ROWS), uniforms.split(ROWS), strict=True)
    ]
    target = SparseTarget(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    vocab_size = logits.shape[-1]
    packed = pack_targets(target.ids.numpy(), target.weights.numpy(), target.num_exact.numpy(), vocab_size)
    ids, weights = map(torch.from_numpy, unpack_targets(packed, vocab_size))
    signal = SparseSignal(ids, weights, target.entropy.half().float(), target.num_exact)
    return Stored(signal, packed.nbytes + 2 * len(logits), int(packed.num_entries.sum()))


def write_multinomial(logits: Tensor, num_draws: int, seed: int) -> Stored:
    """[`multinomial`]: an id and a count of draws for each entry, their number, and the entropy in float16."""
    uniforms = _uniforms(seed, len(logits), num_draws)
    parts = [multinomial(rows, num_draws, u) for rows, u in zip(logits.split(ROWS), uniforms.split(ROWS), strict=True)]
    target = SparseTarget(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    num_entries = int((target.weights > 0).sum())
    bits = id_bits(logits.shape[-1]) + num_draws.bit_length()
    longest = int((target.weights > 0).sum(-1).max())
    ids, weights = target.ids[:, :longest].int(), target.weights[:, :longest].float()
    signal = SparseSignal(ids, weights, target.entropy.half().float())
    return Stored(signal, num_entries * bits / 8 + 3 * len(logits), num_entries)


def write_renormalised(logits: Tensor, num_likeliest: int) -> Stored:
    """The most likely tokens with probabilities that sum to 1, an id and a float16 for each, and nothing else."""
    probs, ids = _top(logits, num_likeliest)
    weights = (probs / probs.sum(-1, keepdim=True)).half().float()
    weights /= weights.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return Stored(SparseSignal(ids, weights, entropy), _top_bytes(ids, logits.shape[-1]), ids.numel())


def write_top_k(logits: Tensor, num_likeliest: int) -> Stored:
    """The log-probabilities of the most likely tokens in float16, and that of all others together."""
    probs, ids = _top(logits, num_likeliest)
    log_tail = logits.scatter(-1, ids.long(), -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    signal = TopKSignal(ids, _half_log(probs.log()), _half_log(log_tail))
    return Stored(signal, _top_bytes(ids, logits.shape[-1]) + 2 * len(ids), ids.numel())


def squared_error(stored: Stored, probs: Tensor, squares: float) -> float:
    """`sum_v (w_v - t_v)^2` of a sparse store, summed over positions; tokens that it does not have count as 0.

    Args: the teacher's probabilities t (n, V), and the sum of their squares.
    """
    signal = stored.signal
    assert not isinstance(signal, TeacherSignal)
    weights = signal.weights if isinstance(signal, SparseSignal) else signal.log_probs.exp()
    # Entries of weight 0 are none, and repeat the id of another.
    known = probs.gather(-1, signal.ids.long()).masked_fill(weights == 0, 0).double()
    return ((weights - known).square().sum() - known.square().sum()).item() + squares


def _uniforms(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _top(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities (n, number) in descending order, and their tokens, int32."""
    top, ids = logits.topk(number)
    return (top - logits.logsumexp(-1, keepdim=True)).exp(), ids.int()


def _top_bytes(ids: Tensor, vocab_size: int) -> float:
    return ids.numel() * (id_bits(vocab_size) + 16) / 8


def _half_log(log_probs: Tensor) -> Tensor:
    """Log-probabilities that have been float16; the smallest of that dtype stands for less, and for none."""
    return log_probs.clamp(min=torch.finfo(torch.float16).min).half().float().clamp(min=LOG_ZERO)
