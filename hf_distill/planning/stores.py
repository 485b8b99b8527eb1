"""The bytes of a label-bearing token in each kind of store, from the formats themselves."""

import numpy as np

from hf_distill.store.formats import HiddenFormat, TopKFormat
from hf_distill.target_bytes import id_bits, pack_bits, pack_targets

# The default number of entries, half of which are exact where a sample is counted; the entropy of a position.
ENTRIES, EXACT, ENTROPY = 12, 6, 2
POSITIONS = 1024


def store_bytes(width: int, vocab_size: int) -> dict[str, float]:
    """The bytes of a position by the kind of store; index and, of hidden states, the head come on top."""
    return {
        "hidden, float16": hidden_bytes("float16", width),
        "hidden, int8": hidden_bytes("int8", width),
        f"sampled, {ENTRIES} entries": sampled_bytes(vocab_size),
        f"top-k, {ENTRIES} entries": top_k_bytes(vocab_size),
    }


def hidden_bytes(dtype: str, width: int) -> float:
    """The bytes of a position's hidden states in "float16" or "int8"."""
    return float(sum(stream.num_bytes for stream in HiddenFormat(dtype, width, "bfloat16").streams.values()))


def sampled_bytes(vocab_size: int) -> float:
    """The bytes of a sample of 12 entries, 6 of them exact."""
    entries = min(ENTRIES, vocab_size)
    exact = min(EXACT, entries)
    ids = np.tile(np.arange(vocab_size - entries, vocab_size), (POSITIONS, 1))
    weights = np.full((POSITIONS, entries), 0.05, dtype=np.float32)
    weights[:, :exact] = 0.7 / exact
    return pack_targets(ids, weights, np.full(POSITIONS, exact), vocab_size).nbytes / POSITIONS + ENTROPY


def top_k_bytes(vocab_size: int) -> float:
    """The bytes of the 12 most likely tokens and of the probability of all others."""
    entries = min(ENTRIES, vocab_size)
    fixed = TopKFormat(vocab_size, entries).streams.values()
    ids = pack_bits(np.zeros(POSITIONS * entries, np.int64), id_bits(vocab_size)).nbytes / POSITIONS
    return float(ids + sum(stream.num_bytes for stream in fixed if not stream.ragged))
