"""Stores that are written of a server: what it said, found again, whoever trains from it."""

import copy
import json

import pytest
import torch

from hf_distill.servers import TeacherAway
from hf_distill.store.manifest import read_manifest
from hf_distill.teachers.writing import Method
from tests.conftest import make_model
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub
from tests.remote.test_remote_teacher import ROWS, make_trainer, worst

TOP = Method("topk", entries=9)


@pytest.fixture(scope="module")
def teacher():
    model = make_model(seed=1)
    model.lm_head.weight.data.mul_(8)
    return model


@pytest.fixture
def stub(teacher, tiny):
    with Stub(ServedModel(teacher, tiny.tokenizer, name="t"), max_logprobs=20) as stub:
        yield stub


def writing(folder, url, tokenizer, **settings):
    return make_trainer(folder, url, tokenizer, ROWS.select(range(12)), teacher_logprobs=9, **settings)


def test_a_store_of_a_server_is_that_of_its_model(tmp_path, teacher, stub, tiny):
    manifest = writing(tmp_path / "a", stub.url, tiny.tokenizer).write_cache(tmp_path / "server", TOP)
    local = make_trainer(tmp_path / "b", copy.deepcopy(teacher), tiny.tokenizer, ROWS.select(range(12)))
    local.write_cache(tmp_path / "model", TOP)
    trained = []
    for name in ("server", "model"):
        trainer = make_trainer(tmp_path / name[0], f"cache:{tmp_path / name}", tiny.tokenizer, ROWS.select(range(12)))
        trainer.train()
        trained.append(trainer)
    assert worst(*trained) < 1e-4
    assert manifest.teacher["server"].startswith("vLLM")
    assert "127.0.0.1" not in (tmp_path / "server" / "manifest.json").read_text()
    assert 0 < manifest.fidelity["known_mass"] < 1
    assert manifest.fidelity["entries"] == 9


def test_a_writing_that_lost_its_server_goes_on(tmp_path, stub, tiny):
    whole = writing(tmp_path / "a", stub.url, tiny.tokenizer)
    whole.write_cache(tmp_path / "whole", TOP, batch_size=2)
    trainer = writing(tmp_path / "b", stub.url, tiny.tokenizer, teacher_timeout=1.0)
    stub.fail("status", status=503, times=None, after=4)
    with pytest.raises(TeacherAway, match="has not answered"):
        trainer.write_cache(tmp_path / "store", TOP, batch_size=2)
    stub.heal()
    writing(tmp_path / "c", stub.url, tiny.tokenizer).write_cache(tmp_path / "store", TOP, batch_size=2)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "store")
    ]
    assert list(files[0].values()) == list(files[1].values())


def test_another_model_may_not_add_to_a_store(tmp_path, stub, tiny):
    writing(tmp_path / "a", stub.url, tiny.tokenizer).write_cache(tmp_path / "store", TOP)
    again = make_trainer(tmp_path / "b", stub.url, tiny.tokenizer, teacher_logprobs=9)
    counts = again.write_cache(tmp_path / "store", TOP).counts
    assert counts["documents"] > 12 or counts["documents"] == len(set(ROWS["text"]))
    other = make_model(seed=7)
    other.lm_head.weight.data.mul_(8)
    stub.served = ServedModel(other, tiny.tokenizer, name="t")
    with pytest.raises(ValueError, match="the store was written by another model"):
        writing(tmp_path / "c", stub.url, tiny.tokenizer).write_cache(tmp_path / "store", TOP)
    assert read_manifest(tmp_path / "store").counts == counts


@pytest.mark.parametrize("method", [Method(), Method("sampled"), Method("topk", entries=12)])
def test_what_a_server_does_not_tell_is_refused(tmp_path, stub, tiny, method):
    with pytest.raises(ValueError, match=r"tells the 9 most likely tokens: take store='topk' with at most 9 entries"):
        writing(tmp_path, stub.url, tiny.tokenizer).write_cache(tmp_path / "store", method)


def test_tokens_of_a_padded_head_leave_an_entry_without_probability(tmp_path, tiny):
    padded = make_model(seed=1, vocab_size=400)
    padded.lm_head.weight.data.mul_(8)
    with Stub(ServedModel(padded, tiny.tokenizer, name="t"), max_logprobs=-1) as stub:
        trainer = make_trainer(tmp_path, stub.url, tiny.tokenizer, ROWS.select(range(6)), teacher_logprobs=40)
        batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 6))
        signal = trainer.teacher(batch, trainer.take_labels(batch)[1])
        trainer.write_cache(tmp_path / "store", Method("topk", entries=40))
    stored = make_trainer(tmp_path / "b", f"cache:{tmp_path / 'store'}", tiny.tokenizer, ROWS.select(range(6)))
    batch = stored.batch_collator()(stored.first_rows(stored.train_dataset, 6))
    again = stored.teacher(batch, stored.take_labels(batch)[1])
    assert (signal.ids < 0).any()
    known = signal.ids >= 0
    assert (again.ids[known] == signal.ids[known]).all()
    torch.testing.assert_close(again.log_probs[known], signal.log_probs[known], atol=0.01, rtol=1e-3)
    assert again.log_probs[~known].max() < -1000
    assert all(len(set(row)) == 40 for row in again.ids.tolist())


def test_the_estimate_is_of_the_one_store_that_can_be_had(tmp_path, stub, tiny):
    from hf_distill.trainers.caching import store_writer

    (found,) = store_writer(writing(tmp_path, stub.url, tiny.tokenizer), TOP).estimates()
    assert found["store"] == "top-k, 9 entries"
    assert found["bytes"] > 0 < found["seconds"]
    assert json.dumps(found)
