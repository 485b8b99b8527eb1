"""Shards: the documents of a store in pairs of files, an index and its data, and how they are read.

A shard is there when its index is: data comes first, and both are written beside their place and renamed. So a process
that is killed leaves whole shards, and one file that is not looked at.

Shapes: n documents of a shard, S streams.
"""

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_bytes

BLOCK = 2**16  # bytes with a checksum of their own
PLAN = "writing.json"  # there while a store is written
PART = ".part"  # the end of the name of a file that is being written
FILE = re.compile(r"(data|index)-(\d{4}-\d{5})\.safetensors")
INDEX = ("keys", "lengths", "checksums")  # the arrays of an index
REMEDY = "run `hf-distill cache write` again with the settings that made the store: it writes what is missing"


@dataclass(frozen=True)
class Stream:
    """An array that a document has in a shard: its dtype, and the shape of one entry.

    Of a ragged stream a document has any number of entries, of others one for each of its label-bearing positions.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    ragged: bool = False

    @property
    def num_bytes(self) -> int:
        """Of one entry."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


def write_shard(
    folder: Path,
    name: str,
    keys: np.ndarray,
    documents: Sequence[Mapping[str, np.ndarray]],
    streams: Mapping[str, Stream],
) -> int:
    """Writes a shard of n documents under a name such as 0001-00000; returns its bytes.

    Args:
        keys (`np.ndarray` of shape `(n, 16)`): their keys.
        documents: their arrays, for each stream.
        streams: what each of them is.
    """
    data = to_bytes(
        {
            stream: np.concatenate([document[stream] for document in documents]).astype(kind.dtype, copy=False)
            for stream, kind in streams.items()
        }
    )
    one = next(stream for stream, kind in streams.items() if not kind.ragged)  # as many entries as positions
    counted = [one, *(stream for stream, kind in streams.items() if kind.ragged)]
    lengths = np.array([[len(document[stream]) for stream in counted] for document in documents], np.int32)  # (n, ...)
    arrays = {"keys": np.ascontiguousarray(keys), "lengths": lengths, "checksums": checksums(data)}
    about = {"bytes": len(data), "checksum": index_checksum(arrays, len(data))}
    index = to_bytes(arrays, metadata={"shard": json.dumps(about)})
    write_file(folder / f"data-{name}.safetensors", data)
    write_file(folder / f"index-{name}.safetensors", index)
    return len(data) + len(index)


def checksums(data: bytes) -> np.ndarray:
    """CRC-32 of each block of 64 KB, uint32."""
    view = memoryview(data)
    return np.array([zlib.crc32(view[start : start + BLOCK]) for start in range(0, len(view), BLOCK)], np.uint32)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, which is there as a whole or not at all.

    Raises:
        `OSError`: a full disk, or one that cannot be written to; the name of the file, and what to do.
    """
    beside = path.with_name(path.name + PART)
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        problem = f"{path} could not be written: {error.strerror or error}. What was written before stays"
        raise OSError(error.errno, f"{problem}: make room on the disk, and run the same again") from error


def shard_names(folder: Path) -> list[str]:
    """The names of all shards that are there, in order."""
    found = (FILE.fullmatch(path.name) for path in folder.glob("index-*.safetensors"))
    return sorted(match[2] for match in found if match)


def counts_of(shards: Iterable["Shard"]) -> dict[str, int]:
    """The number of documents of shards, of their label-bearing positions, and of the bytes of their files."""
    found = [(len(shard.keys), int(shard.num_labels.sum()), shard.num_bytes) for shard in shards]
    sums = [sum(each) for each in zip(*found, strict=True)] or [0, 0, 0]
    return dict(zip(("documents", "positions", "bytes"), sums, strict=True))


class Shard:
    """A shard for reading. Its data is mapped when it is first asked for, and each block checked when it is first used.

    Raises:
        `ValueError`: a damaged file; its name, and what to do.
    """

    def __init__(self, folder: Path, name: str, streams: Mapping[str, Stream]) -> None:
        self.name, self.path, self.streams = name, folder / f"data-{name}.safetensors", streams
        self.index_path = folder / f"index-{name}.safetensors"
        try:
            arrays, metadata = parse(np.fromfile(self.index_path, np.uint8))
            about = json.loads(metadata["shard"])
            self.keys, self.lengths, self._checksums = (arrays[part] for part in INDEX)
            self._data_bytes = about["bytes"]
            if index_checksum(arrays, self._data_bytes) != about["checksum"]:
                raise ValueError("its checksum differs")
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.index_path} is damaged: {REMEDY}") from error
        ragged = [stream for stream, kind in streams.items() if kind.ragged]
        ends = np.pad(np.cumsum(self.lengths, 0, dtype=np.int64), ((1, 0), (0, 0)))
        self._ends = {stream: ends[:, 1 + ragged.index(stream) if stream in ragged else 0] for stream in streams}
        self._checked = np.zeros(len(self._checksums), bool)
        self._data: np.ndarray | None = None

    @property
    def num_labels(self) -> np.ndarray:
        """(n,), of the label-bearing positions of each document."""
        return self.lengths[:, 0]

    @property
    def num_bytes(self) -> int:
        """Of both files."""
        return self._data_bytes + self.index_path.stat().st_size

    def read(self, document: int) -> dict[str, np.ndarray]:
        """The arrays of a document, as they lie in the file."""
        data = self._open()
        found = {}
        for stream, kind in self.streams.items():
            start, (a, b) = self._starts[stream], self._ends[stream][document : document + 2].tolist()
            first, last = start + a * kind.num_bytes, start + b * kind.num_bytes
            self._check(data, first, last)
            found[stream] = data[first:last].view(kind.dtype).reshape(-1, *kind.shape)
        return found

    def check_size(self) -> None:
        """Raises `ValueError` if the data is missing or cut off."""
        if not self.path.exists():
            raise ValueError(f"{self.path} is missing: {REMEDY}")
        if (size := self.path.stat().st_size) != self._data_bytes:
            raise ValueError(f"{self.path} has {size:,} bytes of {self._data_bytes:,}: {REMEDY}")

    def check(self) -> None:
        """Raises `ValueError` if anything in the file is damaged; reads all of it."""
        data = self._open()
        self._checked[:] = False
        self._check(data, 0, len(data))

    def close(self) -> None:
        """Lets the file go. It is opened again when it is needed."""
        self._data = None

    def _open(self) -> np.ndarray:
        if self._data is None:
            self.check_size()
            data = np.memmap(self.path, np.uint8, mode="r")
            self._check(data, 0, 8)
            header = 8 + int(data[:8].view("<u8")[0])
            self._check(data, 0, header)
            about = json.loads(bytes(data[8:header]))
            self._starts = {stream: header + about[stream]["data_offsets"][0] for stream in self.streams}
            self._data = data.view(np.ndarray)
        return self._data

    def _check(self, data: np.ndarray, first: int, last: int) -> None:
        """Raises `ValueError` if a block of these bytes is damaged."""
        blocks = range(first // BLOCK, -(-last // BLOCK))
        for block in blocks:
            if not self._checked[block]:
                if zlib.crc32(data[block * BLOCK : (block + 1) * BLOCK].data) != self._checksums[block]:
                    raise ValueError(f"{self.path} is damaged near byte {block * BLOCK:,}: {REMEDY}")
                self._checked[block] = True


def parse(data: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of the bytes of a safetensors file."""
    header = 8 + int(data[:8].view("<u8")[0])
    about = json.loads(bytes(data[8:header]))
    metadata = about.pop("__metadata__", {})
    kinds = {"U8": "u1", "I32": "<i4", "U32": "<u4"}
    arrays = {}
    for name, tensor in about.items():
        a, b = tensor["data_offsets"]
        arrays[name] = data[header + a : header + b].view(kinds[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays, metadata


def index_checksum(arrays: Mapping[str, np.ndarray], data_bytes: int) -> int:
    """CRC-32 of the arrays of an index, and of the number of bytes of its data."""
    return zlib.crc32(b"".join([*(arrays[part].tobytes() for part in INDEX), str(data_bytes).encode()]))
