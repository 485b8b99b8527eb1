"""Sparse targets as bytes, and back: whole-array operations, without a loop over positions.

A position takes, for K entries of which j have probabilities of their own:

    K * ceil(log2 V) bits   its ids, the j first
    14 j bits               float16 values: tau, which all other entries weigh, then the second of the j to the last
    2 bytes                 the numbers K and j

Numbers in [0, 1] need 14 of the 16 bits of a float16: its pattern is 0x3C00 or less.

The largest probability is what is missing to 1. If it were stored, and tau left to be computed, a sure teacher's
0.9999 would be 1 in float16, with nothing left for the other entries.

Shapes: n positions, K entries at most of one of them.
"""

from typing import NamedTuple

import numpy as np

VALUE_BITS = 14
ONE = 0x3C00  # the bits of 1 in float16


class PackedTargets(NamedTuple):
    """The targets of n positions. Slices of a memory map are enough to read them: nothing is written to."""

    ids: np.ndarray  # uint8, the bits of all ids one after the other
    values: np.ndarray  # uint8, the bits of all values one after the other
    num_entries: np.ndarray  # (n,) uint8
    num_values: np.ndarray  # (n,) uint8

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)


def id_bits(vocab_size: int) -> int:
    """The bits of an id: those of the largest one, and no less than 4."""
    return max(4, (vocab_size - 1).bit_length())


def pack_targets(ids: np.ndarray, weights: np.ndarray, num_values: np.ndarray, vocab_size: int) -> PackedTargets:
    """The targets of n positions as bytes.

    Args:
        ids, weights (`np.ndarray` of shape `(n, K)`): with entries of weight 0 at the end of a row, which are none.
        num_values (`np.ndarray` of shape `(n,)`):
            How many entries of a row have a weight of their own. They come first, and the others share what is missing
            to 1 equally. All entries of a row can be such.
        vocab_size (`int`): ids are below it.

    Raises:
        `ValueError`: more entries in a row than a byte can count, an id that is no token, or a weight that is no
        probability.
    """
    ids, weights, num_values = np.asarray(ids), np.asarray(weights, np.float32), np.asarray(num_values, np.int64)
    places = np.arange(ids.shape[1])
    num_entries = (weights > 0).sum(-1)
    if ids.size and num_entries.max() > 255:
        raise ValueError(f"a position has at most 255 entries, got {num_entries.max()}")
    is_entry, has_value = places < num_entries[:, None], places < num_values[:, None]
    kept = ids[is_entry]
    if kept.size and not 0 <= kept.min() <= kept.max() < vocab_size:
        raise ValueError(f"ids range from {kept.min()} to {kept.max()}; 0 to {vocab_size - 1} are possible")
    values = np.where(has_value, weights, 0).astype(np.float16)
    shared = np.take_along_axis(weights, np.minimum(num_values, ids.shape[1] - 1)[:, None], 1)[:, 0]
    values[:, 0] = np.where(num_values < num_entries, shared, 0)
    values = values[has_value].view(np.uint16)
    if values.max(initial=0) > ONE:
        raise ValueError(f"weights are probabilities in [0, 1], got up to {weights.max():g}")
    counts = num_entries.astype(np.uint8), num_values.astype(np.uint8)
    return PackedTargets(pack_bits(kept, id_bits(vocab_size)), pack_bits(values, VALUE_BITS), *counts)


def unpack_targets(packed: PackedTargets, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n, K), int32, and weights (n, K), float32, of `pack_targets`, K the largest number of entries.

    Weights are those that were packed to within the rounding of float16, and sum to 1.
    """
    num_entries, num_values = (x.astype(np.int64)[:, None] for x in (packed.num_entries, packed.num_values))
    places = np.arange(num_entries.max(initial=1))
    is_entry, has_value = places < num_entries, places < num_values
    ids = np.zeros(is_entry.shape, dtype=np.int32)
    ids[is_entry] = unpack_bits(packed.ids, id_bits(vocab_size), int(num_entries.sum()))
    weights = np.zeros(is_entry.shape, dtype=np.float32)
    values = unpack_bits(packed.values, VALUE_BITS, int(num_values.sum()))
    weights[has_value] = values.astype(np.uint16).view(np.float16)
    shared = np.where(num_values > 0, weights[:, :1], 1 / np.maximum(num_entries, 1)).astype(np.float32)
    weights = np.where(has_value, weights, shared) * is_entry
    weights[:, 0] = np.where(num_values[:, 0] > 0, 1 - weights[:, 1:].sum(-1), weights[:, 0])
    return ids, weights


def pack_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Whole numbers (m,) below `2 ** width` as ceil(m * width / 8) bytes, lowest bits first; `width` is 4 to 25."""
    num_groups = -(-len(numbers) // 8)  # of 8 numbers, which are `width` bytes
    groups = np.zeros((num_groups, 8), dtype=np.uint32)
    groups.reshape(-1)[: len(numbers)] = numbers
    packed = np.zeros((num_groups + 1) * width + 4, dtype=np.uint8)
    for place, (words, shift) in enumerate(_words(packed, width, num_groups)):
        words |= groups[:, place] << shift
    return packed[: -(-len(numbers) * width // 8)]


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first `count` numbers (count,), int32, of `pack_bits`."""
    num_groups = -(-count // 8)
    padded = np.zeros((num_groups + 1) * width + 4, dtype=np.uint8)
    used = -(-count * width // 8)
    padded[:used] = packed[:used]
    groups = np.empty((num_groups, 8), dtype=np.int32)
    for place, (words, shift) in enumerate(_words(padded, width, num_groups)):
        groups[:, place] = (words >> shift) & np.uint32((1 << width) - 1)
    return groups.reshape(-1)[:count]


def _words(data: np.ndarray, width: int, num_groups: int) -> list[tuple[np.ndarray, np.uint32]]:
    """For each of the 8 numbers of a group, the words of 4 bytes that hold it, and its lowest bit there."""
    starts = [divmod(place * width, 8) for place in range(8)]
    return [(np.ndarray(num_groups, "<u4", data.data, byte, strides=(width,)), np.uint32(bit)) for byte, bit in starts]
