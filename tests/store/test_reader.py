"""Documents of a store: found by their keys, read from any number of shards, in any process."""

import multiprocessing
import pickle

import numpy as np
import pytest

from hf_distill.store import reader as module
from hf_distill.store.reader import Store
from hf_distill.store.shards import Shard, Stream, write_shard

STREAMS = {"scale": Stream("float32"), "ids": Stream("uint8", ragged=True)}


def document(number):
    """Arrays that tell which document they are of."""
    return {"scale": np.full(number % 3 + 1, number, np.float32), "ids": np.full(number % 5, number % 256, np.uint8)}


def write(folder, keys, name="0001-00000", first=0):
    write_shard(folder, name, keys, [document(first + i) for i in range(len(keys))], STREAMS)


def random_keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def numbers(store, keys):
    """The numbers that the documents of keys were written with."""
    found = store.find(keys)
    assert (found >= 0).all()
    arrays = store.read(found.tolist())
    for each in arrays:
        expected = document(int(each["scale"][0]))
        assert all(np.array_equal(each[name], expected[name]) for name in STREAMS)
    return [int(each["scale"][0]) for each in arrays]


def test_documents_are_found_by_their_keys_in_any_order(tmp_path):
    keys = random_keys(500)
    for i in range(10):
        write(tmp_path, keys[50 * i : 50 * (i + 1)], f"0001-{i:05d}", 50 * i)
    store = Store(tmp_path, STREAMS)
    assert len(store) == 500
    order = np.random.default_rng(1).permutation(500)
    assert numbers(store, keys[order]) == order.tolist()
    assert (store.find(random_keys(100, seed=2)) == -1).all()
    assert store.find(keys[:0]).shape == (0,)
    assert store.read([]) == []


def test_an_empty_store_has_no_document(tmp_path):
    store = Store(tmp_path, STREAMS)
    assert len(store) == 0
    assert store.find(random_keys(3)).tolist() == [-1] * 3
    assert store.counts() == {"documents": 0, "positions": 0, "bytes": 0}
    store.require(store.find(random_keys(0)))


def test_keys_that_share_a_half_or_end_in_zeros_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    half = rng.integers(0, 256, (1, 8), dtype=np.uint8)
    keys = np.concatenate(
        [
            np.hstack([np.repeat(half, 9, 0), rng.integers(0, 256, (9, 8), dtype=np.uint8)]),
            np.hstack([rng.integers(0, 256, (9, 8), dtype=np.uint8), np.repeat(half, 9, 0)]),
            np.tril(np.ones((16, 16), np.uint8)),  # 1 0 0 ..., 1 1 0 ...
            np.triu(np.full((16, 16), 255, np.uint8)),
            np.zeros((1, 16), np.uint8),
        ]
    )
    unique = np.unique(keys, axis=0)
    inside, outside = unique[::2], unique[1::2]
    write(tmp_path, inside)
    store = Store(tmp_path, STREAMS)
    assert numbers(store, inside) == [*range(len(inside))]
    assert (store.find(outside) == -1).all()


def test_a_document_that_is_there_twice_is_read_once(tmp_path):
    keys = random_keys(4)
    write(tmp_path, keys, "0001-00000")
    write(tmp_path, keys[::-1], "0002-00000", 100)
    found = numbers(Store(tmp_path, STREAMS), keys)
    assert all(number in (i, 103 - i) for i, number in enumerate(found))


def test_only_the_shards_that_are_named_are_read(tmp_path):
    keys = random_keys(4)
    write(tmp_path, keys[:2], "0001-00000")
    write(tmp_path, keys[2:], "0001-00001", 2)
    store = Store(tmp_path, STREAMS, ["0001-00001"])
    assert (store.find(keys) >= 0).tolist() == [False, False, True, True]
    assert (Store(tmp_path, STREAMS, []).find(keys) == -1).all()
    assert (pickle.loads(pickle.dumps(store)).find(keys) >= 0).tolist() == [False, False, True, True]


def test_more_shards_are_read_than_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 3)
    keys = random_keys(20)
    for i in range(20):
        write(tmp_path, keys[i : i + 1], f"0001-{i:05d}", i)
    store = Store(tmp_path, STREAMS)
    for order in (range(20), [0, 1, 2, 0, 3, 0, 4, 0], np.random.default_rng(0).integers(0, 20, 200)):
        order = np.asarray(order)
        assert numbers(store, keys[order]) == order.tolist()
        assert sum(shard._data is not None for shard in store.shards.values()) <= 3
    kept = store.read(store.find(keys[:1]).tolist())[0]["scale"]
    numbers(store, keys[10:])
    assert kept.tolist() == [0.0]  # what was read outlives its shard


def find_in(store, keys, queue):
    queue.put(numbers(store, keys))


def test_a_store_is_read_in_other_processes(tmp_path):
    keys = random_keys(7)
    write(tmp_path, keys)
    store = Store(tmp_path, STREAMS)
    assert numbers(store, keys[:2]) == [0, 1]  # opened before
    assert len(pickle.dumps(store)) < 2000
    assert numbers(pickle.loads(pickle.dumps(store)), keys) == [*range(7)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=find_in, args=(store, keys, queue))
    process.start()
    assert queue.get(timeout=60) == [*range(7)]
    process.join()


def test_another_process_sorts_nothing_and_opens_only_what_it_reads(tmp_path, monkeypatch):
    keys = random_keys(40)
    for i in range(8):
        write(tmp_path, keys[5 * i : 5 * (i + 1)], f"0001-{i:05d}", 5 * i)
    there = pickle.dumps(Store(tmp_path, STREAMS))
    opened = []
    monkeypatch.setattr(module, "Shard", lambda *args: opened.append(args[1]) or Shard(*args))
    monkeypatch.setattr(module.np, "argsort", None)
    store = pickle.loads(there)
    assert (store.find(random_keys(9, seed=1)) == -1).all()
    assert opened == []
    assert numbers(store, keys[[12, 13, 38]]) == [12, 13, 38]
    assert opened == ["0001-00002", "0001-00007"]
    assert store.counts()["documents"] == 40
    assert len(opened) == 8


def test_counts_are_those_of_the_files(tmp_path):
    write(tmp_path, random_keys(6), "0001-00000")
    write(tmp_path, random_keys(1, seed=1), "0002-00000", 2)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert Store(tmp_path, STREAMS).counts() == {"documents": 7, "positions": 12 + 3, "bytes": size}


def test_files_that_documents_need_have_to_be_whole(tmp_path):
    keys = random_keys(4)
    write(tmp_path, keys[:2], "0001-00000")
    write(tmp_path, keys[2:], "0001-00001", 2)
    (tmp_path / "data-0001-00001.safetensors").unlink()
    store = Store(tmp_path, STREAMS)
    store.require(store.find(keys[:2]))
    with pytest.raises(ValueError, match=r"data-0001-00001\.safetensors is missing"):
        store.require(store.find(keys))
    assert numbers(store, keys[:2]) == [0, 1]


def test_a_damaged_index_is_named_when_the_store_is_opened(tmp_path):
    write(tmp_path, random_keys(2))
    (tmp_path / "index-0001-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index-0001-00000\.safetensors is damaged: run `hf-distill cache write`"):
        Store(tmp_path, STREAMS)
