"""A store for reading: what is in it, and the arrays of its documents.

Shapes: n documents.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils import tqdm

from hf_distill.store.documents import KEY_BYTES, as_bytes
from hf_distill.store.shards import FILE, PART, Shard, Stream, shard_names

logger = logging.getLogger(__name__)

OPEN_SHARDS = 128  # that a process keeps mapped


class Store:
    """The documents of a folder. It can be pickled, and files are opened in the process that reads them.

    Args:
        folder: of the store.
        streams: the arrays that a document has, as its method defines them.
        shards: the names of those to read; all by default.
        fetch: downloads the data of shards, by name.

    Raises:
        `ValueError`: a damaged index.
    """

    def __init__(
        self,
        folder: Path,
        streams: Mapping[str, Stream],
        shards: Sequence[str] | None = None,
        fetch: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.folder, self.streams, self.fetch = folder, streams, fetch
        self._names = shard_names(folder) if shards is None else list(shards)
        self._load()

    def _load(self) -> None:
        self.shards = [Shard(self.folder, name, self.streams) for name in self._names]
        self._opened: dict[int, None] = {}  # in the order of their last use
        keys = [shard.keys for shard in self.shards]
        self._shard = np.repeat(np.arange(len(keys)), [len(each) for each in keys])  # of each document
        self._place = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in keys)])
        unsorted = as_bytes(np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *keys]))
        order = np.argsort(unsorted)
        self._keys, self._shard, self._place = unsorted[order], self._shard[order], self._place[order]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "streams": self.streams, "fetch": self.fetch, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The numbers (m,) of the documents with keys (m, 16); -1 for those that are not there."""
        if not len(self):
            return np.full(len(keys), -1)
        wanted = as_bytes(keys)
        places = np.searchsorted(self._keys, wanted).clip(max=len(self) - 1)
        return np.where(self._keys[places] == wanted, places, -1)

    def require(self, numbers: np.ndarray) -> None:
        """Gets the files that these documents need; raises `ValueError` if one is missing or cut off."""
        shards = [self.shards[i] for i in np.unique(self._shard[numbers])]
        missing = [shard.name for shard in shards if not shard.path.exists()]
        if missing and self.fetch is not None:
            self.fetch(missing)
        for shard in shards:
            shard.check_size()

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
    whole = set(shard_names(folder))
    for path in list(folder.iterdir()):
        file = FILE.fullmatch(path.name.removesuffix(PART))
        if file and (path.suffix == PART or file[2] not in whole):
            path.unlink()
