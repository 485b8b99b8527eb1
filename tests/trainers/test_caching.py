"""Stores that cannot be written: tables of (what is asked for, words of the error)."""

import math
import re

import pytest
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.store.documents import Documents
from hf_distill.teachers.writing import Method, StoreWriter
from hf_distill.trainers.caching import store_writer
from tests.conftest import SENTENCES

METHODS = [
    ({"store": "projected"}, "store has to be one of hidden, sampled, topk, got 'projected'"),
    ({"store": None}, "store has to be one of hidden, sampled, topk, got None"),
    ({"store": ["hidden"]}, "store has to be one of hidden, sampled, topk, got ['hidden']"),
    ({"dtype": "int4"}, "dtype has to be one of float16, int8, got 'int4'"),
    ({"dtype": None}, "dtype has to be one of float16, int8, got None"),
    ({"store": "sampled", "sampler": "nucleus"}, "sampler has to be one of threshold, multinomial, got 'nucleus'"),
    ({"store": "sampled", "entries": 0}, "entries has to be a number from 1 to 255, got 0"),
    ({"store": "sampled", "entries": 0.5}, "entries has to be a number from 1 to 255, got 0.5"),
    ({"store": "sampled", "entries": 256}, "entries has to be a number from 1 to 255, got 256"),
    ({"store": "sampled", "entries": math.nan}, "entries has to be a number from 1 to 255, got nan"),
    ({"store": "sampled", "entries": "many"}, "entries has to be a number from 1 to 255, got 'many'"),
    ({"store": "sampled", "entries": None}, "entries has to be a number from 1 to 255, got None"),
    ({"store": "sampled", "entries": True}, "entries has to be a number from 1 to 255, got True"),
    (
        {"store": "sampled", "entries": 12.5, "sampler": "multinomial"},
        "entries has to be a whole number from 1 to 255, got 12.5",
    ),
    ({"store": "topk", "entries": 12.5}, "entries has to be a whole number from 1, got 12.5"),
    ({"store": "topk", "entries": -3}, "entries has to be a whole number from 1, got -3"),
    ({"store": "topk", "entries": math.inf}, "entries has to be a whole number from 1, got inf"),
    ({"seed": -1}, "seed has to be a whole number from 0 to 2**63 - 1, got -1"),
    ({"seed": 2**63}, "seed has to be a whole number from 0 to 2**63 - 1"),
    ({"seed": 1.5}, "seed has to be a whole number from 0 to 2**63 - 1, got 1.5"),
    ({"seed": None}, "seed has to be a whole number from 0 to 2**63 - 1, got None"),
]


@pytest.mark.parametrize(("settings", "words"), METHODS, ids=[str(settings) for settings, _ in METHODS])
def test_methods_that_cannot_be_meant_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Method(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"store": "sampled", "entries": 12.5},
        {"store": "sampled", "entries": 255},
        {"store": "sampled", "entries": 1.0, "sampler": "multinomial"},
        {"store": "topk", "entries": 10**6},
        {"seed": 2**63 - 1},
    ],
)
def test_methods_that_can_be_meant_are_taken(settings):
    found = Method(**settings)
    assert all(getattr(found, name) == value for name, value in settings.items())


@pytest.fixture(scope="module")
def store(tmp_path_factory, folder):
    """A store of the teacher in the folder of models."""
    path = tmp_path_factory.mktemp("stores") / "store"
    make(path, folder, "teacher").write_cache(path)
    return path


def make(output_dir, folder, *teachers, rows=None, **changes):
    settings = {"output_dir": f"{output_dir}-run", "use_cpu": True, "bf16": False, "report_to": [], **changes}
    teachers = [name if str(name).startswith("/") else str(folder / name) for name in teachers]
    rows = Dataset.from_dict({"text": SENTENCES}) if rows is None else rows
    return KDTrainer(str(folder / "student"), teachers, KDConfig(**settings), rows)


def test_several_teachers_are_written_one_by_one(tmp_path, folder):
    trainer = make(tmp_path, folder, "teacher", "student")
    with pytest.raises(ValueError, match=r"\(EnsembleTeacher\) is none\. Of several teachers write a store each"):
        trainer.write_cache(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_store_is_not_written_of_a_store(tmp_path, folder, store):
    trainer = make(tmp_path, folder, str(store))
    with pytest.raises(
        ValueError, match=r"one teacher that is a model, here or behind an address; .*Stored.*Teacher\) is none"
    ):
        trainer.write_cache(tmp_path / "store")


def test_texts_that_are_cut_wherever_a_row_ends_are_no_documents(tmp_path, folder):
    trainer = make(tmp_path, folder, "teacher", packing=True, packing_strategy="wrapped", max_length=32)
    with pytest.raises(ValueError, match="packing_strategy='wrapped' cuts texts wherever a row ends: take 'bfd'"):
        store_writer(trainer, Method())


def test_text_that_is_generated_later_is_no_document(tmp_path, folder, prompt_dataset):
    args = SpeculativeKDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_new_tokens=8)
    trainer = SpeculativeKDTrainer(str(folder / "student"), str(folder / "teacher"), args, prompt_dataset)
    with pytest.raises(ValueError, match="the train dataset has no tokens before training, so a teacher cannot be ask"):
        store_writer(trainer, Method())


def test_rows_without_labels_are_nothing_to_write(tmp_path, folder):
    writer = store_writer(make(tmp_path, folder, "teacher"), Method())
    for rows in ([], [{"input_ids": [1, 2], "labels": [1, -100]}], [{"input_ids": [1]}]):
        with pytest.raises(ValueError, match="no row has a label-bearing token, so there is nothing to write"):
            StoreWriter(
                writer.teacher, Documents.of_dataset(rows), Method(), writer.accelerator, about=writer.about,
                tokenizer=writer.tokenizer, vocab_size=384, temperature=1.0, batch_size=2,
            )  # fmt: skip


@pytest.mark.parametrize("batch_size", [0, -2, 1.5])
def test_a_batch_has_a_text_or_more(tmp_path, folder, batch_size):
    with pytest.raises(ValueError, match=f"batch_size has to be a whole number from 1, got {batch_size}"):
        make(tmp_path, folder, "teacher").write_cache(tmp_path / "store", batch_size=batch_size)
