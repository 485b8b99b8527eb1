"""A store for reading: what is in it, and the arrays of its documents.

Shapes: n documents.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils import tqdm

from hf_distill.store.shards import Shard, Stream, shard_names

logger = logging.getLogger(__name__)

OPEN_SHARDS = 128  # that a process keeps mapped


class Store:
    """The documents of a folder. It can be pickled, and files are opened in the process that reads them.

    Args:
        folder: of the store.
        streams: the arrays that a document has, as its method defines them.
        shards: the names of those to read; all by default.

    Raises:
        `ValueError`: a damaged index.
    """

    def __init__(self, folder: Path, streams: Mapping[str, Stream], shards: Sequence[str] | None = None) -> None:
        self.folder, self.streams = folder, streams
        self._names = shard_names(folder) if shards is None else list(shards)
        self._load()

    def _load(self) -> None:
        self.shards = [Shard(self.folder, name, self.streams) for name in self._names]
        self._opened: dict[int, None] = {}  # in the order of their last use
        keys = [shard.keys for shard in self.shards]
        self._shard = np.repeat(np.arange(len(keys)), [len(each) for each in keys])  # of each document
        self._place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in keys)])
        both = np.concatenate([np.zeros((0, 16), np.uint8), *keys]).view("<u8")  # (n, 2)
        order = np.lexsort((both[:, 1], both[:, 0]))
        self._keys, self._shard, self._place = both[order], self._shard[order], self._place[order]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "streams": self.streams, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The numbers (m,) of the documents with keys (m, 16); -1 for those that are not there."""
        wanted = np.ascontiguousarray(keys).view("<u8")  # (m, 2)
        found = np.full(len(wanted), -1)
        places = np.searchsorted(self._keys[:, 0], wanted[:, 0])
        for _ in range(2):  # Two keys with the same first half are next to impossible, but they would be neighbours.
            inside = np.flatnonzero((places < len(self)) & (found < 0))
            same = (self._keys[places[inside]] == wanted[inside]).all(-1)
            found[inside[same]] = places[inside[same]]
            places = places + 1
        return found

    def require(self, numbers: np.ndarray) -> None:
        """Raises `ValueError` if a file that these documents need is missing or cut off."""
        for shard in np.unique(self._shard[numbers]):
            self.shards[shard].check_size()

    def read(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The arrays of documents, as they lie on the disk; not to be written to.

        Raises:
            `ValueError`: a damaged shard, by name.
        """
        return [self._opened_shard(int(self._shard[i])).read(int(self._place[i])) for i in numbers]

    def _opened_shard(self, number: int) -> Shard:
        self._opened.pop(number, None)
        self._opened[number] = None
        if len(self._opened) > OPEN_SHARDS:
            oldest = next(iter(self._opened))
            del self._opened[oldest]
            self.shards[oldest].close()
        return self.shards[number]

    def counts(self) -> dict[str, int]:
        """The number of documents, of their label-bearing positions, and of the bytes of their files."""
        positions = int(sum(shard.num_labels.sum() for shard in self.shards))
        size = sum(shard.num_bytes for shard in self.shards)
        return {"documents": len(self), "positions": positions, "bytes": size}


def damages(folder: Path, streams: Mapping[str, Stream]) -> dict[str, str]:
    """The shards that are damaged, and what is wrong with each. Reads all of them, with a progress bar."""
    found = {}
    for name in tqdm(shard_names(folder), desc="Checking the store", unit=" shards", leave=False):
        try:
            Shard(folder, name, streams).check()
        except ValueError as error:
            found[name] = str(error)
    return found


def remove_damaged(folder: Path, streams: Mapping[str, Stream]) -> None:
    """Removes damaged shards, and what a writer that was killed has left half done."""
    for name, problem in damages(folder, streams).items():
        logger.warning("%s; its documents are written again", problem.partition(": ")[0])
        (folder / f"index-{name}.safetensors").unlink()
    whole = {f"{kind}-{name}.safetensors" for name in shard_names(folder) for kind in ("data", "index")}
    for path in folder.glob("*-*-*.safetensors*"):
        if path.name not in whole:
            path.unlink()
