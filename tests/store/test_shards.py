"""Shards on the disk: what is written is read, and what is damaged is named."""

import shutil

import numpy as np
import pytest

from hf_distill.store import shards as module
from hf_distill.store.reader import damages, remove_damaged, remove_leftovers
from hf_distill.store.shards import Shard, Stream, checksums, shard_names, write_file, write_shard

STREAMS = {
    "hidden": Stream("float16", (3,)),
    "ids": Stream("uint8", ragged=True),
    "scale": Stream("float32"),
    "values": Stream("int8", (2,), ragged=True),
}
NAME = "0001-00000"


def random_documents(counts=(3, 0, 1, 5), seed=0):
    """Keys, and the arrays of documents with `counts` positions."""
    rng = np.random.default_rng(seed)
    documents = [
        {
            "hidden": rng.normal(size=(count, 3)).astype(np.float16),
            "ids": rng.integers(0, 256, rng.integers(0, 9), dtype=np.uint8),
            "scale": rng.random(count, dtype=np.float32),
            "values": rng.integers(-128, 128, (rng.integers(0, 4), 2), dtype=np.int8),
        }
        for count in counts
    ]
    return rng.integers(0, 256, (len(counts), 16), dtype=np.uint8), documents


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name


@pytest.fixture
def folder(tmp_path):
    write_shard(tmp_path, NAME, *random_documents(), STREAMS)
    return tmp_path


def read_all(folder):
    """All arrays of all documents of the shard; the size and every document are checked, as a reader does it."""
    shard = Shard(folder, NAME, STREAMS)
    shard.check_size()
    return shard.keys.copy(), [shard.read(i) for i in range(len(shard.keys))]


@pytest.mark.parametrize("counts", [(3, 0, 1, 5), (1,), (0,)])
def test_documents_are_read_as_they_were_written(tmp_path, counts):
    keys, documents = random_documents(counts)
    size = write_shard(tmp_path, NAME, keys, documents, STREAMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{k}-{NAME}.safetensors" for k in ("data", "index")]
    shard = Shard(tmp_path, NAME, STREAMS)
    assert np.array_equal(shard.keys, keys)
    assert shard.num_labels.tolist() == list(counts)
    assert size == shard.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    for i in reversed(range(len(counts))):
        same(shard.read(i), documents[i])
    shard.close()
    same(shard.read(0), documents[0])


def test_documents_of_many_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    keys, documents = random_documents([40] * 20)
    write_shard(tmp_path, NAME, keys, documents, STREAMS)
    assert len(Shard(tmp_path, NAME, STREAMS)._checksums) > 100
    for found, expected in zip(read_all(tmp_path)[1], documents, strict=True):
        same(found, expected)


def test_what_is_read_cannot_be_written_to(folder):
    array = Shard(folder, NAME, STREAMS).read(0)["hidden"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_checksums_are_of_each_block(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    # CRC-32 of "123456789" is the check value of the algorithm.
    assert checksums(b"").tolist() == []
    assert [len(checksums(bytes(n))) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    monkeypatch.setattr(module, "BLOCK", 9)
    assert checksums(b"123456789" * 2).tolist() == [0xCBF43926] * 2


def problem(folder):
    """What a reader says of the shard; nothing, if all of it is as it was."""
    try:
        keys, documents = read_all(folder)
    except ValueError as error:
        return str(error)
    expected = random_documents()
    assert np.array_equal(keys, expected[0])
    for own, wanted in zip(documents, expected[1], strict=True):
        same(own, wanted)
    return ""


@pytest.mark.parametrize("kind", ["data", "index"])
def test_each_flipped_byte_is_noticed_or_changes_nothing(folder, kind):
    path = folder / f"{kind}-{NAME}.safetensors"
    whole = path.read_bytes()
    noticed = 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= (0x01, 0x80, 0xFF)[place % 3]
        path.write_bytes(broken)
        if words := problem(folder):
            noticed += 1
            assert NAME in words
            assert "hf-distill cache write" in words
            assert NAME in damages(folder, STREAMS)
    assert noticed == len(whole) or (kind == "index" and noticed > 0.75 * len(whole))


@pytest.mark.parametrize("kind", ["data", "index"])
def test_each_cut_is_noticed(folder, kind):
    path = folder / f"{kind}-{NAME}.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 3), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=NAME):
            read_all(folder)
        assert NAME in damages(folder, STREAMS)
    path.write_bytes(whole + b"\0")
    if kind == "data":
        with pytest.raises(ValueError, match=f"{path.name} has {len(whole) + 1:,} bytes of {len(whole):,}"):
            read_all(folder)


def test_only_what_is_read_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    keys, documents = random_documents([40] * 20)
    write_shard(tmp_path, NAME, keys, documents, STREAMS)
    path = tmp_path / f"data-{NAME}.safetensors"
    broken = bytearray(path.read_bytes())
    broken[-1] ^= 1
    path.write_bytes(broken)
    shard = Shard(tmp_path, NAME, STREAMS)
    same(shard.read(0), documents[0])
    block = (len(broken) - 1) // 64 * 64
    with pytest.raises(ValueError, match=f"data-{NAME}.safetensors is damaged near byte {block:,}"):
        shard.read(19)
    with pytest.raises(ValueError, match="damaged near byte"):
        shard.check()


def test_missing_data_is_named(folder):
    (folder / f"data-{NAME}.safetensors").unlink()
    shard = Shard(folder, NAME, STREAMS)
    for action in (shard.check_size, shard.check, lambda: shard.read(0)):
        with pytest.raises(ValueError, match=f"data-{NAME}.safetensors is missing: run `hf-distill cache write`"):
            action()
    assert [*damages(folder, STREAMS)] == [NAME]


def test_whole_shards_have_no_damages_and_are_in_order(folder):
    for name in ("0002-00000", "0001-00011", "0001-00002"):
        write_shard(folder, name, *random_documents(), STREAMS)
    assert shard_names(folder) == [NAME, "0001-00002", "0001-00011", "0002-00000"]
    assert damages(folder, STREAMS) == {}


def test_damaged_shards_and_half_files_are_removed_and_nothing_else(folder, caplog):
    write_shard(folder, "0001-00001", *random_documents(), STREAMS)
    write_shard(folder, "0001-00002", *random_documents(), STREAMS)
    data, index = ((folder / f"{kind}-0001-00001.safetensors") for kind in ("data", "index"))
    data.write_bytes(data.read_bytes()[:-1])
    (folder / "index-0001-00002.safetensors").unlink()
    for name in ("data-0001-00003.safetensors.part", "index-0001-00003.safetensors.part"):
        (folder / name).write_bytes(b"half")
    others = ["model-00001-of-00002.safetensors", "index-of-all.safetensors", "data-mine.safetensors", "notes.txt"]
    for name in others:
        (folder / name).write_bytes(b"of the user's")
    remove_damaged(folder, STREAMS)
    remove_leftovers(folder)
    kept = {path.name for path in folder.iterdir()}
    assert kept == {*others, f"data-{NAME}.safetensors", f"index-{NAME}.safetensors"}
    assert f"{data} has" in caplog.text
    assert "written again" in caplog.text
    assert shard_names(folder) == [NAME]
    assert not index.exists()


def test_processes_that_share_the_shards_check_all_of_them(folder):
    for i in range(1, 5):
        write_shard(folder, f"0001-{i:05d}", *random_documents(), STREAMS)
    names = shard_names(folder)
    damaged = [names[0], names[3], names[4]]
    for name in damaged:
        path = folder / f"data-{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    assert [*damages(folder, STREAMS, names[:2])] == damaged[:1]
    for rank in range(2):
        remove_damaged(folder, STREAMS, names[rank::2])
    assert shard_names(folder) == [names[1], names[2]]
    assert len([*folder.glob("data-*")]) == 5
    remove_leftovers(folder)
    assert len([*folder.glob("data-*")]) == 2


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_file(path, b"two")
    assert error.value.errno == 28
    assert str(path) in str(error.value)
    assert "make room" in str(error.value)
    assert path.read_bytes() == b"one"
    assert [*tmp_path.iterdir()] == [path]


def test_a_disk_that_fills_up_in_the_middle_of_a_shard_leaves_no_shard(folder, monkeypatch):
    original, calls = module.os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(*args)

    monkeypatch.setattr(module.os, "replace", replace)
    with pytest.raises(OSError, match=r"index-0001-00001\.safetensors"):
        write_shard(folder, "0001-00001", *random_documents(), STREAMS)
    assert shard_names(folder) == [NAME]
    remove_damaged(folder, STREAMS)
    remove_leftovers(folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"{k}-{NAME}.safetensors" for k in ("data", "index")]


def test_a_copy_elsewhere_is_the_same_shard(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("copy") / "store"
    shutil.copytree(folder, other)
    for found, expected in zip(read_all(other)[1], read_all(folder)[1], strict=True):
        same(found, expected)
