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
from hf_distill.store.shards import FILE, PART, Shard, Stream, counts_of, shard_names

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
        self.shards = {i: Shard(folder, name, streams) for i, name in enumerate(self._names)}
        self._opened: dict[int, None] = {}  # in the order of their last use
        keys = [shard.keys for shard in self.shards.values()]
        shard = np.repeat(np.arange(len(keys), dtype=np.int32), [len(each) for each in keys])  # of each document
        place = np.concatenate([np.zeros(0, np.int32), *(np.arange(len(each), dtype=np.int32) for each in keys)])
        unsorted = as_bytes(np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *keys]))
        order = np.argsort(unsorted)
        self._keys, self._shard, self._place = unsorted[order], shard[order], place[order]

    def __getstate__(self) -> dict[str, Any]:
        """All but the shards: another process opens those that it reads."""
        return {**self.__dict__, "shards": {}, "_opened": {}}

    def shard(self, number: int) -> Shard:
        """A shard by its number; its index is read if this process has not done so."""
        if number not in self.shards:
            self.shards[number] = Shard(self.folder, self._names[number], self.streams)
        return self.shards[number]

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
        shards = [self.shard(int(i)) for i in np.unique(self._shard[numbers])]
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
            self.shard(oldest).close()
        return self.shard(number)

    def counts(self) -> dict[str, int]:
        """The number of documents, of their label-bearing positions, and of the bytes of their files."""
        return counts_of(self.shard(i) for i in range(len(self._names)))


def damages(
    folder: Path, streams: Mapping[str, Stream], names: Sequence[str] | None = None, *, hide: bool = False
) -> dict[str, str]:
    """The shards that are damaged, and what is wrong with each. Reads all of them, with a progress bar.

    Args:
        names: of the shards to look at; all by default.
        hide: no progress bar.
    """
    found = {}
    names = shard_names(folder) if names is None else names
    for name in tqdm(names, desc="Checking the store", unit=" shards", leave=False, disable=hide or None):
        try:
            Shard(folder, name, streams).check()
        except ValueError as error:
            found[name] = str(error)
    return found


def remove_damaged(
    folder: Path, streams: Mapping[str, Stream], names: Sequence[str] | None = None, *, hide: bool = False
) -> None:
    """Removes the indices of damaged shards, so that only their data stays; the arguments are those of `damages`."""
    for name, problem in damages(folder, streams, names, hide=hide).items():
        logger.warning("%s; its documents are written again", problem.partition(": ")[0])
        (folder / f"index-{name}.safetensors").unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes the files of shards that are not whole: data without an index, and parts of files."""
    whole = set(shard_names(folder))
    for path in list(folder.iterdir()):
        file = FILE.fullmatch(path.name.removesuffix(PART))
        if file and (path.suffix == PART or file[2] not in whole):
            path.unlink()
