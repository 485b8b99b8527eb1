"""Groups of tokens that cover the same text, on one side: where they start, and how likely their other tokens are.

The words are those of `losses/cross_tokenizer.py`.

Shapes: n positions of a side, G groups, V vocabulary, K names, D width.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.divergence import LOG_ZERO
from hf_distill.losses.head import Head
from hf_distill.metrics import sum_dtype
from hf_distill.token_alignment import OUTSIDE, UNNAMED


class Side(NamedTuple):
    """One model's head and vocabulary, V token ids."""

    head: Head
    names: Tensor  # (V,) the name of each token, UNNAMED or OUTSIDE
    ids: Tensor  # (K,) the token that is the name
    own: Tensor  # (V,) the name that a token is, K if it is none
    others: Tensor  # ids of tokens that only begin with their name
    unnamed: Tensor
    outside: Tensor


class Starts(NamedTuple):
    """The facts about one side's groups that are known before their first positions are projected."""

    tokens: Tensor  # (G,) the first token
    log_continuation: Tensor  # (G,) log-probability of the other tokens
    log_other: Tensor  # (G,) log-probability of anything else in their place
    text_names: Tensor  # (G,) the name that the group's text is, K if it is none


class Later(NamedTuple):
    """The tokens after the first ones, in the order of `starts_first`: their part in a side's groups."""

    groups: Tensor  # (n,) index of the group, -1 for none
    as_first_miss: Tensor  # (n,) derivative of `log_other` with respect to the log-probability of another token there
    as_hit: Tensor  # (n,) derivative of `log_other` with respect to their own log-probability


def places_of(mask: Tensor, number: int) -> Tensor:
    """The indices (number,) of the True entries of a mask (n,), in order; the host does not wait for the device."""
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:number]


def side_of(head: Head, ids: Tensor, names: Tensor) -> Side:
    """A side from its head and two of the tensors of `SharedTokens`: the ids of the names, and the names of the ids."""
    return Side(head.truncated(len(names)), names, ids, *_kinds(ids, names))


@lru_cache(maxsize=8)  # by identity: a training asks with the same tensors in each micro-batch
def _kinds(ids: Tensor, names: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`own`, `others`, `unnamed` and `outside` of a [`Side`]."""
    own = torch.full_like(names, len(ids))
    own[ids] = torch.arange(len(ids), device=ids.device)
    kinds = (names >= 0) & (own == len(ids)), names == UNNAMED, names == OUTSIDE
    others, unnamed, outside = (kind.nonzero().squeeze(-1) for kind in kinds)
    return own, others, unnamed, outside


def starts_first(groups: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """An order of positions, and the groups of all but the first G of them, as an index into `numbers` or -1.

    The first G are the first positions of the groups, in the order of `numbers` (sorted).
    """
    index = torch.searchsorted(numbers, groups)
    index = torch.where(torch.isin(groups, numbers), index, -1)
    positions = torch.arange(len(groups), device=groups.device)
    first = numbers.new_full((len(numbers) + 1,), len(groups))  # with a place at the end for -1
    first = first.scatter_reduce(0, index % len(first), positions, "amin")[:-1]
    later = places_of(~torch.isin(positions, first), len(groups) - len(numbers))
    return torch.cat([first, later]), index[later]


def is_single(later_groups: Tensor, num_groups: int) -> Tensor:
    """The groups without another token than their first, (G,) bool."""
    single = later_groups.new_ones(num_groups + 1, dtype=torch.bool)
    single[later_groups] = False  # -1 is the place at the end
    return single[:-1]


def group_starts(
    hidden: Tensor, tokens: Tensor, later_groups: Tensor, side: Side, temperature: float, chunk_size: int, block: int
) -> tuple[Starts, Later]:
    """One side's predictions for its groups, without their first positions.

    Args:
        hidden (`torch.Tensor` of shape `(n, D)`), tokens (`torch.Tensor` of shape `(n,)`):
            In the order of `starts_first`.
        later_groups (`torch.Tensor` of shape `(n - G,)`): the groups of all positions but the first G.
        chunk_size (`int`), block (`int`): positions that are projected, and that are looked at, at a time.
    """
    num_groups = len(tokens) - len(later_groups)
    later = (later_groups >= 0).nonzero().squeeze(-1)
    later = later[later_groups[later].argsort(stable=True)]  # group by group
    found = [hidden.new_zeros(2, 0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    for positions in (num_groups + later).split(chunk_size):
        logits = side.head.logits(hidden[positions])  # (n, V)
        for part, targets in zip(logits.split(block), tokens[positions].split(block), strict=True):
            log_probs = tempered(part, side, temperature).log_softmax(-1)
            found.append(torch.stack(hit_and_miss(log_probs, targets)))
    hit, miss = torch.cat(found, 1).to(sum_dtype(hidden.device))
    groups = later_groups[later]
    log_continuation = hit.new_zeros(num_groups).index_add(0, groups, hit)
    # Another text has its first other token at one of the places: 1 - prod p_i = sum_i (1 - p_i) prod_(j < i) p_j.
    starts = torch.searchsorted(groups, groups)
    before = hit.cumsum(0) - hit
    first_miss = miss + before - before[starts]
    largest = hit.new_full((num_groups,), LOG_ZERO).scatter_reduce(0, groups, first_miss, "amax")
    sums = torch.zeros_like(largest).index_add(0, groups, (first_miss - largest[groups]).exp())
    log_other = (sums.log() + largest).clamp(min=LOG_ZERO)
    shares = (first_miss - log_other[groups]).exp()
    before = shares.cumsum(0) - shares
    after = 1 - (before - before[starts]) - shares
    in_order = (x.new_zeros(len(later_groups)).index_copy(0, later, x) for x in (shares, after))
    text_names = torch.where(is_single(later_groups, num_groups), side.own[tokens[:num_groups]], len(side.ids))
    dtype = found[0].dtype
    starts = Starts(tokens[:num_groups], log_continuation.to(dtype), log_other.to(dtype), text_names)
    return starts, Later(later_groups, *(x.to(dtype) for x in in_order))


def hit_and_miss(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (n,), and of all other tokens together in their place.

    The second is summed up from the other tokens, because 1 - p has no digits where p is close to 1.
    """
    log_probs, tokens = log_probs.clamp(min=LOG_ZERO), tokens.unsqueeze(-1)
    others = log_probs.scatter(-1, tokens, LOG_ZERO).logsumexp(-1)
    return log_probs.gather(-1, tokens).squeeze(-1), others


def tempered(logits: Tensor, side: Side, temperature: float) -> Tensor:
    """Logits (n, V) at the temperature, minus infinity for ids that do not take part; a copy, if it changes any."""
    logits = logits if temperature == 1 else logits / temperature
    return logits.index_fill(-1, side.outside, -torch.inf) if len(side.outside) else logits
