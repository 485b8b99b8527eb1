"""What is written where: every document once, whatever happens in between."""

import json

import numpy as np
import pytest

from hf_distill.store import plan as plan_module
from hf_distill.store.documents import Documents
from hf_distill.store.plan import PLAN, Plan, begun, divided
from hf_distill.store.shards import Stream, write_shard

STREAMS = {"scale": Stream("float32")}


def random_documents(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = [{"input_ids": rng.integers(0, 99, length).tolist()} for length in rng.integers(2, 60, count)]
    return Documents.of_rows(rows)


def plan_of(documents, **changes):
    settings = {"batch_size": 4, "position_bytes": 10.0, "shard_bytes": 2000, "num_processes": 1, **changes}
    return divided(documents, **settings)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_every_document_is_written_once_by_one_process(num_processes, batch_size, shard_bytes):
    documents = random_documents(101)
    ordered, shards = plan_of(documents, batch_size=batch_size, shard_bytes=shard_bytes, num_processes=num_processes)
    assert sorted(map(bytes, ordered.keys())) == sorted(map(bytes, documents.keys()))
    flat = np.concatenate([batch for shard in shards for batch in shard])
    assert flat.tolist() == [*range(len(documents))]
    assert (np.diff(ordered.num_tokens) <= 0).all()
    sizes = [len(batch) for shard in shards for batch in shard]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_documents_of_one_length_stay_in_order():
    documents = Documents.of_rows([{"input_ids": [i, 0, 0]} for i in range(9)])
    assert np.array_equal(plan_of(documents)[0].keys(), documents.keys())


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
def test_shards_are_as_large_as_asked_for_and_alike_for_all_processes(num_processes):
    documents = random_documents(400)
    ordered, shards = plan_of(documents, num_processes=num_processes, shard_bytes=5000)
    sizes = [10.0 * sum(ordered.num_labels[batch].sum() for batch in shard) for shard in shards]
    largest_batch = 10.0 * 4 * 60
    assert len(shards) % num_processes == 0
    assert min(sizes) > 5000 - largest_batch
    assert max(sizes) < 2 * 5000 * num_processes
    assert max(sizes) - min(sizes) <= 2 * largest_batch


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_every_process_has_a_shard_if_there_are_batches_enough(num_processes):
    _, shards = plan_of(random_documents(400), num_processes=num_processes, shard_bytes=10**9)
    assert len(shards) == num_processes


def test_a_writing_has_no_more_shards_than_can_be_opened(monkeypatch):
    monkeypatch.setattr(plan_module, "MOST_SHARDS", 30)
    _, shards = plan_of(random_documents(100), batch_size=1, shard_bytes=1)
    assert len(shards) == 30


def test_no_documents_are_no_shards():
    documents, shards = plan_of(random_documents(3).take(np.array([], np.int64)), num_processes=2)
    assert (len(documents), shards) == (0, [])


def test_processes_share_what_is_not_there_yet(tmp_path):
    documents, shards = plan_of(random_documents(100), num_processes=2)
    plan = Plan(3, [], documents, shards)
    assert plan.name(7) == "0003-00007"
    assert sorted(plan.to_do(tmp_path, 0, 2) + plan.to_do(tmp_path, 1, 2)) == [*range(len(shards))]
    for i in (0, 3):
        keys = documents.keys()[:1]
        write_shard(tmp_path, plan.name(i), keys, [{"scale": np.ones(1, np.float32)}], STREAMS)
    left = [plan.to_do(tmp_path, rank, 2) for rank in range(2)]
    assert sorted(left[0] + left[1]) == [i for i in range(len(shards)) if i not in (0, 3)]
    assert {i % 2 for i in left[1]} == {1}


def written(folder, *names):
    for name in names:
        write_shard(folder, name, np.zeros((1, 16), np.uint8), [{"scale": np.ones(1, np.float32)}], STREAMS)


def test_a_writing_goes_on_as_long_as_its_key_is_the_same(tmp_path):
    written(tmp_path, "0001-00000")
    first = begun(tmp_path, lambda shards: f"a {len(shards)}")
    assert first == {"run": 2, "before": ["0001-00000"], "key": "a 1"}
    written(tmp_path, "0002-00000")
    assert begun(tmp_path, lambda shards: f"a {len(shards)}") == first
    other = begun(tmp_path, lambda shards: f"b {len(shards)}")
    assert other == {"run": 3, "before": ["0001-00000", "0002-00000"], "key": "b 2"}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"key": "a"}', '{"key": "a", "before": 3}', "\0"])
def test_a_writing_that_cannot_be_read_is_begun_anew(tmp_path, text):
    (tmp_path / PLAN).write_text(text)
    found = begun(tmp_path, lambda shards: f"a {len(shards)}")
    assert found == {"run": 1, "before": [], "key": "a 0"}
    assert json.loads((tmp_path / PLAN).read_text()) == found


def test_a_writing_whose_earlier_shards_are_gone_is_begun_anew(tmp_path):
    def key_of(shards):
        for name in shards:
            (tmp_path / f"index-{name}.safetensors").read_bytes()
        return "a"

    written(tmp_path, "0001-00000", "0001-00001")
    assert begun(tmp_path, key_of)["run"] == 2
    written(tmp_path, "0002-00000")
    (tmp_path / "index-0001-00001.safetensors").unlink()
    assert begun(tmp_path, key_of) == {"run": 3, "before": ["0001-00000", "0002-00000"], "key": "a"}
