"""The table of bytes in docs/cache.md, from the formats; `python -m tests.store.test_bytes_table` prints it."""

from pathlib import Path

import numpy as np

from hf_distill.store.formats import HiddenFormat, TopKFormat
from hf_distill.target_bytes import id_bits, pack_bits, pack_targets

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"
TEACHERS = {  # hidden size and vocabulary, from their config.json
    "SmolLM2-1.7B": (2048, 49_152),
    "Qwen2.5-7B": (3584, 152_064),
    "Llama-3.1-8B": (4096, 128_256),
    "Gemma-2-27B": (4608, 256_000),
    "Llama-3.1-70B": (8192, 128_256),
}
ENTRIES, EXACT, POSITIONS = 12, 6, 1024
TOKENS = (10**6, 10**8, 10**9)
ENTROPY = 2  # bytes of a position in a sample


def hidden_bytes(dtype, width):
    return sum(stream.num_bytes for stream in HiddenFormat(dtype, width, "bfloat16").streams.values())


def sampled_bytes(vocab_size):
    """Packed targets of 12 entries, 6 of them exact, as a store has them."""
    ids = np.tile(np.arange(vocab_size - ENTRIES, vocab_size), (POSITIONS, 1))
    weights = np.full((POSITIONS, ENTRIES), 0.05, dtype=np.float32)
    weights[:, :EXACT] = 0.7 / EXACT
    return pack_targets(ids, weights, np.full(POSITIONS, EXACT), vocab_size).nbytes / POSITIONS + ENTROPY


def top_k_bytes(vocab_size):
    fixed = TopKFormat(vocab_size, ENTRIES).streams.values()
    ids = pack_bits(np.zeros(POSITIONS * ENTRIES, np.int64), id_bits(vocab_size)).nbytes / POSITIONS
    return ids + sum(stream.num_bytes for stream in fixed if not stream.ragged)


def size(num_bytes):
    """Three digits and a decimal unit."""
    power = max(0, min(4, (len(f"{num_bytes:.0f}") - 1) // 3))
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def cell(num_bytes):
    shown = f"{num_bytes:,.1f}".removesuffix(".0")
    return f"{shown}: {' / '.join(size(num_bytes * count) for count in TOKENS)}"


def bytes_table():
    lines = [
        "| teacher | width, vocabulary | hidden, float16 | hidden, int8 | sampled | top-k | head |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (width, vocab_size) in TEACHERS.items():
        stores = hidden_bytes("float16", width), hidden_bytes("int8", width), sampled_bytes(vocab_size)
        cells = [cell(num_bytes) for num_bytes in (*stores, top_k_bytes(vocab_size))]
        head = size(2 * width * vocab_size)
        lines.append(f"| {' | '.join([name, f'{width:,}, {vocab_size:,}', *cells, head])} |")
    return "\n".join(lines)


def test_the_table_is_what_the_formats_take():
    assert bytes_table() in PAGE.read_text()


if __name__ == "__main__":
    print(bytes_table())
