"""The manifest of a store: written, read, refused."""

import json
from dataclasses import replace

import pytest

from hf_distill.store.manifest import FORMAT, NAME, DamagedManifest, Manifest, is_store, read_manifest

TEACHER = {"name": "teacher", "revision": None, "weights": "abc", "dtype": "float32", "quantization": None}
MANIFEST = Manifest(
    method="sampled",
    parameters={"sampler": "threshold", "entries": 12},
    teacher={**TEACHER, "precision": "no"},
    tokenizer={"own": "1", "student": "2"},
    vocab_size=384,
    temperature=1.0,
    seed=0,
    chosen={"tau": 0.01},
    rows=[{"max_length": 512}],
    counts={"documents": 3},
    versions={"torch": "2"},
)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    assert not is_store(tmp_path)
    MANIFEST.write(tmp_path)
    assert is_store(tmp_path)
    assert is_store(str(tmp_path))
    assert read_manifest(tmp_path) == MANIFEST
    replace(MANIFEST, counts={}).write(tmp_path)
    assert read_manifest(tmp_path).counts == {}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("thing", [None, 3, ["a"], {"a": 1}, "no/such/folder", object()])
def test_what_is_no_folder_with_a_manifest_is_no_store(thing):
    assert not is_store(thing)


VALUES = {"format": FORMAT, **MANIFEST.__dict__}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no manifest of a store, or damaged"),
        ("{", "is no manifest of a store, or damaged"),
        ("[]", "is no manifest of a store, or damaged"),
        ("3", "is no manifest of a store, or damaged"),
        ("null", "is no manifest of a store, or damaged"),
        ("\udcff", "is no manifest of a store, or damaged"),
        ('{"name": "an app", "icons": []}', "is no manifest of a store, or damaged"),
        (json.dumps({**VALUES, "format": FORMAT + 1}), f"has format {FORMAT + 1}, and this version of hf_distill"),
        (json.dumps({**VALUES, "format": FORMAT + 1}), "update hf_distill"),
        (json.dumps({**VALUES, "format": 0, "whatever": 1}), "write the store again"),
        (json.dumps({**VALUES, "digest": "0" * 32}), 'not as it was written: .* if you edited it, remove its "digest"'),
        (json.dumps({**VALUES, "format": "1"}), "is no manifest of a store, or damaged"),
        (json.dumps({**VALUES, "format": None}), "is no manifest of a store, or damaged"),
        (json.dumps({**VALUES, "more": 1}), "damaged: look at more"),
        (json.dumps({name: VALUES[name] for name in VALUES if name != "seed"}), "damaged: look at seed"),
        (json.dumps({**VALUES, "method": "projected"}), "damaged: look at method"),
        (json.dumps({**VALUES, "parameters": 3}), "damaged: look at parameters"),
        (json.dumps({**VALUES, "temperature": "warm"}), "damaged: look at temperature"),
        (json.dumps({**VALUES, "vocab_size": 1.5}), "damaged: look at vocab_size"),
        (json.dumps({**VALUES, "teacher": None}), "damaged: look at teacher"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_by_name(tmp_path, text, words):
    (tmp_path / NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=words) as error:
        read_manifest(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_flipped_bit_of_a_manifest_is_told(tmp_path):
    MANIFEST.write(tmp_path)
    path = tmp_path / NAME
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert is_store(tmp_path), (place, bit)
            with pytest.raises(DamagedManifest, match=f"{tmp_path}.*damaged"):
                read_manifest(tmp_path)


def test_an_edited_manifest_without_its_digest_is_read(tmp_path):
    MANIFEST.write(tmp_path)
    path = tmp_path / NAME
    values = json.loads(path.read_text())
    values["teacher"]["name"] = "another name"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{path} is not as it was written: it is damaged, or was edited"):
        read_manifest(tmp_path)
    del values["digest"]
    path.write_text(json.dumps(values))
    assert read_manifest(tmp_path) == replace(MANIFEST, teacher=values["teacher"])


def test_a_manifest_of_format_1_is_read(tmp_path):
    rows = {"max_length": 512, "eos_token": None, "chat_template_path": "t.jinja", "packing_strategy": "bfd"}
    (tmp_path / NAME).write_text(json.dumps({**VALUES, "format": 1, "rows": rows}))
    assert read_manifest(tmp_path) == MANIFEST


def test_settings_of_each_writing_are_kept_once():
    other = replace(MANIFEST, rows=[{"max_length": 9}], teacher={})
    both = MANIFEST.with_rows_of(other)
    assert both == replace(MANIFEST, rows=[{"max_length": 512}, {"max_length": 9}])
    assert both.with_rows_of(other) == both.with_rows_of(MANIFEST) == both


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"{folder} is no store of a teacher's outputs: it has no {NAME}"):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "topk"}, "written with method 'sampled', and this run has 'topk'"),
        ({"parameters": {"sampler": "multinomial", "entries": 12}}, "sampler 'threshold', and this run has 'multinom"),
        ({"parameters": {"sampler": "threshold", "entries": 8}}, "entries 12, and this run has 8"),
        ({"teacher": {**TEACHER, "precision": "bf16"}}, "teacher precision 'no', and this run has 'bf16'"),
        ({"teacher": {**MANIFEST.teacher, "weights": "x"}}, "teacher weights 'abc', and this run has 'x'"),
        ({"teacher": {**MANIFEST.teacher, "dtype": "bfloat16"}}, "teacher dtype 'float32', and this run has"),
        ({"teacher": {**MANIFEST.teacher, "quantization": "4bit"}}, "quantization None, and this run has '4bit'"),
        ({"tokenizer": {"own": "1", "student": "3"}}, "tokenizer student '2', and this run has '3'"),
        ({"vocab_size": 380}, "vocab_size 384, and this run has 380"),
        ({"temperature": 2.0}, "temperature 1.0, and this run has 2.0"),
        ({"seed": 1}, "seed 0, and this run has 1"),
    ],
)
def test_documents_of_another_run_are_refused_by_what_differs(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        MANIFEST.refuse_other(replace(MANIFEST, **changes), tmp_path)
    assert "take another output_dir" in str(error.value)


def test_documents_of_the_same_run_elsewhere_may_be_added(tmp_path):
    elsewhere = {**MANIFEST.teacher, "name": "copy", "revision": "f00"}
    other = replace(
        MANIFEST, teacher=elsewhere, rows=[{"max_length": 9}], versions={}, chosen={}, fidelity={}, counts={}
    )
    MANIFEST.refuse_other(other, tmp_path)


SAMPLED, TOP = MANIFEST, replace(MANIFEST, method="topk", parameters={"entries": 20})
WHOLE = replace(TOP, parameters={"entries": 384})
HIDDEN = replace(MANIFEST, method="hidden", parameters={"dtype": "int8"})


@pytest.mark.parametrize(
    ("manifest", "divergence", "temperatures", "words"),
    [
        (SAMPLED, "forward_kl", [1.0], None),
        (SAMPLED, "reverse_kl", [1.0], "divergence='reverse_kl' cannot be computed from the sample in"),
        (SAMPLED, "forward_kl", [2.0], "temperature=2 cannot be had from the store in .*, whose .* at 1:"),
        (SAMPLED, "forward_kl", [1.0, 1.5], "temperature=1.5 cannot be had"),
        (replace(SAMPLED, temperature=2.0), "forward_kl", [2.0], None),
        (TOP, "reverse_kl", [1.0], None),
        (TOP, "reverse_kl", [2.0], "temperature=2 cannot be had"),
        (WHOLE, "reverse_kl", [2.0, 1.0], None),
        (HIDDEN, "jensen_shannon", [4.0, 1.0], None),
    ],
)
def test_losses_that_cannot_be_had_are_refused(tmp_path, manifest, divergence, temperatures, words):
    if words is None:
        manifest.refuse_loss(divergence, temperatures, tmp_path)
        return
    with pytest.raises(ValueError, match=words):
        manifest.refuse_loss(divergence, temperatures, tmp_path)


def test_kinds_are_named_for_people():
    assert SAMPLED.kind == "sampled, threshold, 12 entries"
    assert TOP.kind == "top-k, 20 entries"
    assert HIDDEN.kind == "hidden states, int8"
