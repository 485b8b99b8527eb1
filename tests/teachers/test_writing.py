"""Writing a store: it holds what the teacher says, and nothing that happens on the way changes a byte."""

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from filelock import FileLock
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer
from hf_distill.store import shards
from hf_distill.store.documents import Documents
from hf_distill.store.formats import format_of
from hf_distill.store.head import read_head
from hf_distill.store.manifest import NAME, read_manifest
from hf_distill.store.reader import Store, damages
from hf_distill.store.shards import shard_names
from hf_distill.teachers import writing
from hf_distill.teachers.writing import LOCK, Method
from hf_distill.trainers.caching import store_writer
from tests.conftest import SENTENCES, make_model, make_tokenizer

METHODS = {
    "float16": Method(),
    "int8": Method(dtype="int8"),
    "threshold": Method("sampled", entries=6),
    "multinomial": Method("sampled", entries=9, sampler="multinomial"),
    "topk": Method("topk", entries=5),
    "all": Method("topk", entries=384),
}


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=1, hidden_size=48)


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Eight ragged tokenised rows of which some tokens have no label, and one without any."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": [*ids, ids[0]], "labels": [*labels, [-100] * len(ids[0])]})


def make(folder, teacher, rows, tokenizer, *, student=None, eval_rows=None, peft_config=None, **changes):
    settings = {
        "output_dir": f"{folder}-run", "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "per_device_eval_batch_size": 3, **changes,
    }  # fmt: skip
    return KDTrainer(
        student or make_model(seed=2), teacher, KDConfig(**settings), rows, eval_rows, tokenizer,
        teacher_processing_class=None if isinstance(teacher, str) else tokenizer, peft_config=peft_config,
    )  # fmt: skip


def write(folder, trainer, method=METHODS["float16"], **settings):
    """With small shards, of which there are several."""
    return store_writer(trainer, method, **settings).write(Path(folder), shard_bytes=300)


def stored(folder, rows, *columns):
    """The signal of a store at the label-bearing positions of rows."""
    manifest = read_manifest(folder)
    format = format_of(manifest)
    store = Store(folder, format.streams)
    documents = Documents.of_rows([*rows], *columns).with_labels()
    found = store.find(documents.keys())
    assert (found >= 0).all()
    head = None if manifest.head is None else read_head(folder, manifest.head)
    return format.signal(format.collate(store.read(found.tolist())), head)


@torch.no_grad()
def answers(model, rows, ids="input_ids", labels="labels") -> torch.Tensor:
    """Logits (N, V) of the label-bearing positions, every row read alone."""
    found = []
    for row in rows:
        mask = torch.tensor(row[labels][1:]) != -100
        found.append(model(input_ids=torch.tensor([row[ids]])).logits[0, :-1][mask].double())
    return torch.cat(found)


def kl(teacher, signal):
    """The largest KL(teacher || stored) of a position, in nats."""
    found = signal.head.logits(signal.hidden).double()
    return (teacher.softmax(-1) * (teacher.log_softmax(-1) - found.log_softmax(-1))).sum(-1).max().item()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- the content


@pytest.mark.parametrize("name", METHODS)
def test_a_store_holds_what_the_teacher_says(tmp_path, teacher, rows, tokenizer, name):
    folder, method = tmp_path / "store", METHODS[name]
    manifest = write(folder, make(folder, teacher, rows, tokenizer), method)
    assert manifest == read_manifest(folder)
    assert manifest.counts["documents"] == len(rows) - 1
    assert manifest.counts["positions"] == sum(label != -100 for row in rows for label in row["labels"][1:])
    files = {path.name: path.stat().st_size for path in folder.glob("*-*-*.safetensors")}
    assert manifest.counts["bytes"] == sum(files.values())
    expected = {*files, NAME, "tokenizer"} | ({"head.safetensors", "rounding.safetensors"} if manifest.head else set())
    assert {path.name for path in folder.iterdir()} == expected
    assert len(shard_names(folder)) > 1
    assert damages(folder, format_of(manifest).streams) == {}

    logits, signal = answers(teacher, rows), stored(folder, rows)
    probs = logits.softmax(-1)
    if method.store == "hidden":
        assert 0 <= kl(logits, signal) < (1e-6 if method.dtype == "float16" else 3e-2)
        assert manifest.fidelity["largest_kl"] == pytest.approx(kl(logits, signal), rel=1e-2, abs=1e-8)
    elif method.store == "topk":
        log_probs = logits.log_softmax(-1).gather(-1, signal.ids.long())
        assert torch.allclose(signal.log_probs.double(), log_probs, rtol=2**-10, atol=1e-5)
        assert torch.equal(signal.ids[:, 0].long(), logits.argmax(-1))
    else:
        entropy = -(probs * probs.log()).sum(-1)
        assert torch.allclose(signal.entropy.double(), entropy, rtol=2**-9)
        for ids, weights, known, own in zip(signal.ids, signal.weights, signal.num_exact, probs, strict=True):
            assert torch.allclose(weights[1:known].double(), own[ids[1:known].long()], rtol=2**-10)
        # Measured on another sample of the same positions.
        entries = (signal.weights > 0).sum(-1).double().mean().item()
        assert manifest.fidelity["entries"] == pytest.approx(entries, rel=0.05)


def test_packed_rows_and_streams_write_the_same_store(tmp_path, teacher, rows, tokenizer):
    labelled = rows.select(range(8))
    write(tmp_path / "rows", make(tmp_path, teacher, labelled, tokenizer))
    write(tmp_path / "packed", make(tmp_path, teacher, labelled, tokenizer, packing=True, max_length=64))
    stream = labelled.to_iterable_dataset()
    write(tmp_path / "stream", make(tmp_path, teacher, stream, tokenizer, max_steps=1))
    assert isinstance(stream, IterableDataset)
    expected = answers(teacher, labelled)
    for name in ("rows", "packed", "stream"):
        manifest = read_manifest(tmp_path / name)
        assert manifest.counts["documents"] == 8
        assert kl(expected, stored(tmp_path / name, labelled)) < 1e-6


def test_all_data_sets_are_written(tmp_path, teacher, rows, tokenizer):
    held_out = {"a": rows.select([2, 3]), "b": rows.select([3, 5, 6])}
    trainer = make(tmp_path, teacher, rows.select([0, 1]), tokenizer, eval_rows=held_out, eval_strategy="no")
    manifest = write(tmp_path / "store", trainer)
    assert manifest.counts["documents"] == 6
    written = rows.select([0, 1, 2, 3, 5, 6])
    assert kl(answers(teacher, written), stored(tmp_path / "store", written)) < 1e-6


def test_texts_are_tokenised_as_for_training(tmp_path, teacher, text_dataset, tokenizer):
    trainer = make(tmp_path, teacher, text_dataset, tokenizer, max_length=9)
    trainer.write_cache(tmp_path / "store")
    assert [rows["max_length"] for rows in read_manifest(tmp_path / "store").rows] == [9]
    assert kl(answers(teacher, trainer.train_dataset), stored(tmp_path / "store", trainer.train_dataset)) < 1e-6


# -------------------------------------------------------------------------------------------------- kinds of teachers


def test_the_students_base_is_written(tmp_path, rows, tokenizer):
    student = make_model(seed=2)
    expected = answers(student, rows)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make(tmp_path, "base", rows, tokenizer, student=student, peft_config=config)
    write(tmp_path / "store", trainer)
    assert kl(expected, stored(tmp_path / "store", rows)) < 1e-6
    # The same weights as a teacher of its own may go on with it.
    write(tmp_path / "store", make(tmp_path, make_model(seed=2), rows, tokenizer))


def test_a_quantised_teacher_is_written_and_told_from_the_whole_one(tmp_path, rows, tokenizer):
    pytest.importorskip("bitsandbytes")
    name = str(tmp_path / "teacher")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(name)
    tokenizer.save_pretrained(name)
    trainer = make(tmp_path, name, rows, tokenizer, teacher_quantization="4bit")
    write(tmp_path / "store", trainer)
    manifest = read_manifest(tmp_path / "store")
    assert manifest.teacher["quantization"] == "4bit"
    assert kl(answers(trainer.teacher.model, rows), stored(tmp_path / "store", rows)) < 1e-5
    with pytest.raises(ValueError, match=r"was written with teacher (weights|quantization)"):
        write(tmp_path / "store", make(tmp_path, name, rows, tokenizer))


def test_an_offloaded_teacher_is_the_same_one(tmp_path, rows, tokenizer):
    name = str(tmp_path / "teacher")
    make_model(seed=4).save_pretrained(name)
    tokenizer.save_pretrained(name)
    write(tmp_path / "store", make(tmp_path, name, rows.select(range(4)), tokenizer))
    manifest = write(tmp_path / "store", make(tmp_path, name, rows, tokenizer, teacher_device="offload"))
    assert manifest.counts["documents"] == 8
    assert kl(answers(make_model(seed=4), rows), stored(tmp_path / "store", rows)) < 1e-6


def test_a_teacher_with_another_tokenizer_is_written_in_its_own_tokens(tmp_path, tokenizer):
    name = str(tmp_path / "teacher")
    other = make_tokenizer(330, corpus=[text.upper() for text in SENTENCES] + SENTENCES[:3])
    model = make_model(seed=4, vocab_size=len(other))
    model.save_pretrained(name)
    other.save_pretrained(name)
    texts = Dataset.from_dict({"text": SENTENCES})
    trainer = make(tmp_path, name, texts, tokenizer)
    manifest = write(tmp_path / "store", trainer)
    assert manifest.vocab_size == len(other)
    assert manifest.tokenizer["own"] != manifest.tokenizer["student"]
    columns = trainer.teacher.columns
    expected = answers(model, trainer.train_dataset, *columns)
    assert kl(expected, stored(tmp_path / "store", trainer.train_dataset, *columns)) < 1e-6
    for method in (METHODS["threshold"], METHODS["topk"]):
        with pytest.raises(ValueError, match=f"store='{method.store}' has nothing that can be aligned: take store='hi"):
            store_writer(trainer, method)


def test_the_students_mixed_precision_changes_no_byte(tmp_path, teacher, rows, tokenizer):
    for name in ("float16", "threshold", "topk"):
        for half in (True, False):
            write(tmp_path / f"{name}-{half}", make(tmp_path, teacher, rows, tokenizer, bf16=half), METHODS[name])
        assert contents(tmp_path / f"{name}-True") == contents(tmp_path / f"{name}-False")


@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_in_bfloat16_is_written(tmp_path, rows, tokenizer, name):
    model = make_model(seed=1).bfloat16()
    manifest = write(tmp_path / "store", make(tmp_path, model, rows, tokenizer), METHODS[name])
    assert manifest.teacher["dtype"] == "bfloat16"
    signal = stored(tmp_path / "store", rows)
    if METHODS[name].store == "hidden":
        # A batch has other last bits than a row alone.
        assert kl(answers(model, rows), signal) < 3e-2
        assert signal.hidden.dtype == signal.head.weight.dtype == torch.bfloat16


def test_prompts_of_the_teachers_own_are_what_is_read(tmp_path, teacher, prompt_dataset, tokenizer):
    own = [f"Hint: {text}" if i % 2 else None for i, text in enumerate(prompt_dataset["prompt"])]
    trainer = make(tmp_path, teacher, prompt_dataset.add_column("teacher_prompt", own), tokenizer)
    write(tmp_path / "store", trainer)
    prepared = trainer.train_dataset
    assert prepared[1]["teacher_input_ids"] != prepared[1]["input_ids"]
    columns = "teacher_input_ids", "teacher_labels"
    assert kl(answers(teacher, prepared, *columns), stored(tmp_path / "store", prepared, *columns)) < 1e-6


# --------------------------------------------------------------------------------------------------- a second writing


@pytest.mark.parametrize("name", ["int8", "threshold", "topk"])
def test_a_second_writing_adds_what_is_missing_and_touches_nothing_else(tmp_path, teacher, rows, tokenizer, name):
    folder = tmp_path / "store"
    write(folder, make(tmp_path, teacher, rows.select([0, 3, 6]), tokenizer), METHODS[name])
    before = contents(folder)
    manifest = write(folder, make(tmp_path, teacher, rows, tokenizer), METHODS[name])
    after = contents(folder)
    assert manifest.counts["documents"] == 8
    assert {path for path in before if before[path] != after[path]} == {NAME}
    assert {path[:10] for path in after.keys() - before.keys()} == {"data-0002-", "index-0002"}
    assert len(stored(folder, rows).step.__self__[0]) == manifest.counts["positions"]
    # A third one finds nothing to do.
    write(folder, make(tmp_path, teacher, rows.select([5, 2]), tokenizer), METHODS[name])
    assert contents(folder) == after


def test_another_teacher_or_method_is_refused_by_name(tmp_path, teacher, rows, tokenizer):
    folder = tmp_path / "store"
    write(folder, make(tmp_path, teacher, rows, tokenizer), METHODS["threshold"])
    before = contents(folder)
    changed = make_model(seed=1, hidden_size=48)
    changed.model.layers[1].mlp.up_proj.weight.data[:, ::2] += 1e-3
    half, small = make_model(seed=1, hidden_size=48).bfloat16(), make_model(seed=2, vocab_size=383)
    cases = [
        (make(tmp_path, changed, rows, tokenizer), METHODS["threshold"], "teacher weights"),
        (make(tmp_path, half, rows, tokenizer), METHODS["threshold"], "teacher (weights|dtype)"),
        (make(tmp_path, teacher, rows, tokenizer), METHODS["float16"], "method 'sampled', and this run has 'hidden'"),
        (make(tmp_path, teacher, rows, tokenizer), METHODS["multinomial"], "sampler 'threshold', and this run has"),
        (make(tmp_path, teacher, rows, tokenizer), Method("sampled", entries=7), "entries 6, and this run has 7"),
        (make(tmp_path, teacher, rows, tokenizer), Method("sampled", entries=6, seed=1), "seed 0, and this run has 1"),
        (make(tmp_path, teacher, rows, tokenizer, temperature=2.0), METHODS["threshold"], "temperature 1.0, and this"),
        (make(tmp_path, teacher, rows, tokenizer, student=small), METHODS["threshold"], "vocab_size 384, and this run"),
    ]  # fmt: skip
    for trainer, method, words in cases:
        with pytest.raises(ValueError, match=rf"the store in {folder} was written with {words}"):
            write(folder, trainer, method)
        assert contents(folder) == before


def test_the_same_teacher_may_lie_elsewhere(tmp_path, rows, tokenizer):
    for name in ("one", "two"):
        make_model(seed=4).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write(tmp_path / "store", make(tmp_path, str(tmp_path / "one"), rows.select([0, 1]), tokenizer))
    manifest = write(tmp_path / "store", make(tmp_path, str(tmp_path / "two"), rows, tokenizer))
    assert manifest.teacher["name"] == "one"
    assert manifest.counts["documents"] == 8


# ------------------------------------------------------------------------------------------------------- interruptions


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["int8", "threshold", "topk"])
def test_an_interrupted_writing_goes_on_to_the_same_bytes(tmp_path, teacher, rows, tokenizer, monkeypatch, name):
    trainer = make(tmp_path, teacher, rows, tokenizer)
    write(tmp_path / "whole", trainer, METHODS[name])
    original = shards.write_file
    number = 0
    for number in range(1, 100):
        calls = 0

        def write_file(path, data, number=number):
            nonlocal calls
            calls += 1
            if calls == number:
                path.with_name(path.name + ".part").write_bytes(data[: len(data) // 2])
                raise Stopped
            original(path, data)

        for module in ("store.shards", "store.plan", "store.head", "store.manifest", "teachers.writing"):
            monkeypatch.setattr(f"hf_distill.{module}.write_file", write_file)
        folder = tmp_path / f"stopped-{number}"
        try:
            write(folder, trainer, METHODS[name])
        except Stopped:
            monkeypatch.undo()
            write(folder, trainer, METHODS[name])
            assert contents(folder) == contents(tmp_path / "whole"), number
        else:
            break
    assert number > 8


def test_a_damaged_shard_is_written_again(tmp_path, teacher, rows, tokenizer, caplog):
    folder = tmp_path / "store"
    trainer = make(tmp_path, teacher, rows, tokenizer)
    write(folder, trainer)
    names = shard_names(folder)
    data = folder / f"data-{names[0]}.safetensors"
    data.write_bytes(data.read_bytes()[:-7] + bytes(7))
    (folder / f"index-{names[1]}.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        write(folder, trainer)
    for path in (data, folder / f"index-{names[1]}.safetensors"):
        assert path.name in caplog.text
    assert shard_names(folder) == [*names[2:], *(name for name in shard_names(folder) if name.startswith("0002"))]
    assert kl(answers(teacher, rows), stored(folder, rows)) < 1e-6
    assert read_manifest(folder).counts["documents"] == 8


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"\0" * 99)])
def test_a_damaged_head_is_written_again(tmp_path, teacher, rows, tokenizer, damage):
    folder = tmp_path / "store"
    trainer = make(tmp_path, teacher, rows, tokenizer)
    write(folder, trainer, METHODS["int8"])
    before = contents(folder)
    damage(folder / "head.safetensors")
    write(folder, trainer, METHODS["int8"])
    assert contents(folder) == before


def test_without_its_rounding_nothing_is_added_to_a_store(tmp_path, teacher, rows, tokenizer):
    folder = tmp_path / "store"
    write(folder, make(tmp_path, teacher, rows.select([0, 1]), tokenizer), METHODS["int8"])
    (folder / "rounding.safetensors").unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=r"rounding\.safetensors is missing or damaged, and nothing can be added"):
        write(folder, make(tmp_path, teacher, rows, tokenizer), METHODS["int8"])
    assert contents(folder) == before


def test_two_writers_do_not_meet(tmp_path, teacher, rows, tokenizer):
    folder = tmp_path / "store"
    trainer = make(tmp_path, teacher, rows, tokenizer)
    folder.mkdir()
    with FileLock(folder / LOCK):
        with pytest.raises(ValueError, match=f"another process is writing into {folder}: wait for it"):
            write(folder, trainer)
        assert (folder / LOCK).exists()
    write(folder, trainer)
    assert not (folder / LOCK).exists()
    (folder / LOCK).touch()  # of a writer that was killed
    write(folder, trainer)
    assert not (folder / LOCK).exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, teacher, rows, tokenizer):
    trainer = make(tmp_path, teacher, rows, tokenizer)
    for name in ("notes.txt", "tokenizer_config.json", "data-0001-00000.safetensors"):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=re.escape(f"{folder} holds something else than a store ({name})")):
            write(folder, trainer)
        assert contents(folder) == {name: b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path / 'file'} is a file: take another output_dir"):
        write(tmp_path / "file", trainer)
    folder = tmp_path / "of an app"
    folder.mkdir()
    (folder / NAME).write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match=r"holds something else than a store \(manifest.json\)"):
        write(folder, trainer)
    assert contents(folder) == {NAME: b'{"name": "an app"}'}


def test_a_full_disk_loses_nothing(tmp_path, teacher, rows, tokenizer, monkeypatch):
    trainer = make(tmp_path, teacher, rows, tokenizer)
    write(tmp_path / "whole", trainer)
    folder, calls, original = tmp_path / "store", [], os.fsync

    def fsync(file):
        calls.append(file)
        if len(calls) > 10:
            raise OSError(28, "No space left on device")
        original(file)

    monkeypatch.setattr(shards.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"-0001-00001\.safetensors could not be written: No space left") as error:
        write(folder, trainer)
    assert "What was written before stays: make room on the disk, and run the same again" in str(error.value)
    monkeypatch.undo()
    there = contents(folder)
    assert not any(name.endswith(".part") for name in there)
    assert len(shard_names(folder)) == 1
    write(folder, trainer)
    assert contents(folder) == contents(tmp_path / "whole")
    assert all(contents(folder)[name] == there[name] for name in there if name.startswith("index"))


def test_a_disk_that_is_full_of_the_tokenizer_is_told_by_name(tmp_path, teacher, rows, tokenizer, monkeypatch):
    """The tokenizer's own library would raise an error without a class or a file."""
    trainer = make(tmp_path, teacher, rows, tokenizer)
    folder, original = tmp_path / "store", os.replace

    def replace(part, path):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        original(part, path)

    monkeypatch.setattr(shards.os, "replace", replace)
    with pytest.raises(OSError, match=r"tokenizer/tokenizer\.json could not be written: No space left.*: make room"):
        write(folder, trainer)
    monkeypatch.undo()
    write(folder, trainer)
    write(tmp_path / "whole", trainer)
    assert contents(folder) == contents(tmp_path / "whole")


def test_room_is_looked_for_before_anything_is_written(tmp_path, teacher, rows, tokenizer, monkeypatch):
    trainer = make(tmp_path, teacher, rows, tokenizer)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=40_000))
    with pytest.raises(ValueError, match=r"the store needs about .*, and 39\.06 KB are free in .*: make room, or take"):
        write(tmp_path / "store", trainer)
    assert contents(tmp_path / "store") == {}
    write(tmp_path / "sampled", trainer, METHODS["threshold"])  # has no head, and takes less
    monkeypatch.undo()
    write(tmp_path / "store", trainer)


def test_estimates_are_close_to_what_is_written(tmp_path, teacher, rows, tokenizer):
    trainer = make(tmp_path, teacher, rows, tokenizer, temperature=2.0)
    estimates = store_writer(trainer, Method(entries=6)).estimates()
    assert [each["store"] for each in estimates] == [
        "hidden states, float16", "hidden states, int8", "sampled, threshold, 6 entries", "top-k, 6 entries",
    ]  # fmt: skip
    for each, name in zip(estimates, ("float16", "int8", "threshold", "topk"), strict=True):
        method = Method("topk", entries=6) if name == "topk" else METHODS[name]
        manifest = store_writer(trainer, method).write(tmp_path / name)
        header = 1200 * len(shard_names(tmp_path / name))
        assert each["bytes"] == pytest.approx(manifest.counts["bytes"] - header / 2, abs=header / 2 + 200)
        assert each["head_bytes"] == pytest.approx(manifest.counts["head_bytes"], abs=200)
        assert each["seconds"] > 0
        assert not (tmp_path / "store").exists()
    assert read_manifest(tmp_path / "threshold").temperature == 2.0


def test_a_teacher_that_is_not_finite_is_refused(tmp_path, rows, tokenizer):
    model = make_model(seed=1)
    trainer = make(tmp_path, model, rows, tokenizer)
    model.model.norm.weight.data[:] = float("nan")
    for name, method in METHODS.items():
        with pytest.raises(ValueError, match="not finite"):
            write(tmp_path / name, trainer, method)


def test_probes_are_spread_over_the_data(tmp_path, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(writing, "PROBE_POSITIONS", 50)
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 300, length).tolist() for length in rng.integers(2, 9, 200)]
    writer = store_writer(
        make(tmp_path, teacher, Dataset.from_dict({"input_ids": ids, "labels": ids}), tokenizer), Method()
    )
    chosen = writer._probe_documents()
    positions = writer.documents.num_labels[chosen].sum()
    assert 50 <= positions <= 150
    assert len(writer.probe().hidden) == positions
    assert np.diff(chosen).max() <= 2 * np.diff(chosen).min() + 1
    assert (chosen[0], chosen[-1]) == (0, len(writer.documents) - 1)


def test_a_probe_lies_where_the_head_is(tmp_path, teacher, rows, tokenizer):
    """The body may be on other devices, and the head is always on the student's."""
    writer = store_writer(make(tmp_path, teacher, rows, tokenizer), Method())
    writer.teacher.head = writer.teacher.head.to(torch.device("meta"))
    assert writer.probe().hidden.device.type == "meta"
