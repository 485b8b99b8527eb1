"""What is written in which shard and in which batch, fixed before the first forward.

A teacher's last bits depend on the batch that a document is in. So an interrupted writing ends in the same bytes as one
without a break only if its batches are the same: they are made of all documents that were missing when it began.

Shapes: n documents.
"""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_distill.store.documents import Documents
from hf_distill.store.shards import PLAN, shard_names, write_file

SHARD_BYTES = 32 * 2**20
MOST_SHARDS = 10_000  # of one writing, where shards of SHARD_BYTES would be more


class Plan(NamedTuple):
    """A writing of documents.

    Args:
        run: its number, from 1; a store that has been added to has several.
        before: the shards that were there when it began.
        documents: those to write, the longest first.
        shards: for each shard its batches, for each batch the indices of its documents.
    """

    run: int
    before: list[str]
    documents: Documents
    shards: list[list[np.ndarray]]

    def name(self, shard: int) -> str:
        """The name of a shard's files."""
        return f"{self.run:04d}-{shard:05d}"

    def to_do(self, folder: Path, rank: int, num_processes: int) -> list[int]:
        """The shards that a process still has to write."""
        there = set(shard_names(folder))
        return [i for i in range(rank, len(self.shards), num_processes) if self.name(i) not in there]


def divided(
    documents: Documents, *, batch_size: int, position_bytes: float, shard_bytes: int, num_processes: int
) -> tuple[Documents, list[list[np.ndarray]]]:
    """Documents, the longest first, and their batches in shards.

    The longest come first: what does not fit into memory is known at once, and no batch has much padding.

    Args:
        batch_size: documents of a forward.
        position_bytes: about what a label-bearing position takes.
        shard_bytes: of a shard at least, unless there would be none for some process. All processes have as many
            shards, of about one size.
    """
    order = np.argsort(-documents.num_tokens, kind="stable")
    documents = documents.take(order)
    before = np.concatenate([[0], documents.num_labels.cumsum()])  # label-bearing positions of earlier documents
    total = int(before[-1])
    number = int(min(position_bytes * total / shard_bytes, MOST_SHARDS)) // num_processes * num_processes
    number = max(number, num_processes)
    indices = np.arange(len(documents))
    batches = [indices[start : start + batch_size] for start in range(0, len(documents), batch_size)]
    shards = groupby(batches, lambda batch: int(before[batch[0]]) * number // total)
    return documents, [list(shard) for _, shard in shards]


def begun(folder: Path, key_of: Callable[[Sequence[str]], str]) -> dict[str, Any]:
    """The writing that goes on in a folder, or a new one: its number, the shards before it, and its key.

    Args:
        key_of: a hash of all that bytes depend on, if the shards of these names are there already.
    """
    try:
        found = json.loads((folder / PLAN).read_text())
        if found["key"] == key_of(found["before"]):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, one that was cut off while it was begun, or one whose shards are gone
    there = shard_names(folder)
    run = max((int(name.split("-")[0]) for name in there), default=0) + 1
    found = {"run": run, "before": there, "key": key_of(there)}
    write_file(folder / PLAN, json.dumps(found).encode())
    return found
