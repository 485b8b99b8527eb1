"""`hf-distill cache write`, `info` and `verify`, and `kd` from what they have written."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from hf_distill import cli
from hf_distill.store.manifest import read_manifest
from tests.conftest import SENTENCES
from tests.test_cli import error_of, options

METHODS = {
    "hidden": ["--store_dtype", "int8"],
    "sampled": ["--entries", "20"],
    "topk": ["--entries", "16"],
}
KINDS = {
    "hidden": "hidden states, int8",
    "sampled": "sampled, threshold, 20 entries",
    "topk": "top-k, 16 entries",
}


def written(folder, store, capsys, method="hidden", **changes):
    """What stands on the screen after a writing."""
    words = options(folder, output_dir=store, store=method, **changes)
    cli.main(["cache", "write", *METHODS[method], *words])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    """A store of hidden states; not to be changed."""
    place = tmp_path_factory.mktemp("stores") / "hidden"
    cli.main(["cache", "write", *options(folder, output_dir=place)])
    return place


def cells(printed):
    """The rows of a table on the screen with two columns."""
    return dict(re.findall(r"^ ?(\S.*?) {2,}(\S.*?) *$", printed, re.MULTILINE))


@pytest.mark.parametrize("method", METHODS)
def test_a_store_is_written_shown_verified_and_trained_from(folder, tmp_path, capsys, method):
    place = tmp_path / "store"
    printed = written(folder, place, capsys, method, eval_dataset=folder / "rows.jsonl")
    assert f"--teacher_model cache:{place}" in printed
    assert cells(printed)["store"] == KINDS[method]

    cli.main(["cache", "info", str(place)])
    shown = cells(capsys.readouterr().out)
    assert shown["texts"] == str(len(SENTENCES))
    assert shown["max_length"] == "1024"
    size = sum(path.stat().st_size for path in place.glob("*-*-*.safetensors"))
    positions = int(shown["label-bearing positions"])
    assert float(shown["bytes of a position"]) == pytest.approx(size / positions, abs=0.06)
    assert ("head, apart" in shown) == (method == "hidden")

    cli.main(["cache", "verify", str(place)])
    assert "1 shards and all else are whole" in capsys.readouterr().out

    cli.main(["kd", *next_words(printed), *RUN, "--output_dir", str(tmp_path / "out")])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["after"]["student_perplexity"] < report["before"]["student_perplexity"]
    assert ("kl" in report["after"]) == (method != "topk")
    for page in ("report.md", "README.md"):
        assert f"from a store: {KINDS[method]}" in (tmp_path / "out" / page).read_text(), page
    fingerprint = read_manifest(place).fingerprint
    assert f"| fingerprint of the store | `{fingerprint}` |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((place / "manifest.json").read_text())["digest"].startswith(fingerprint)


RUN = ["--max_steps", "8", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
RUN += ["--learning_rate", "0.01", "--per_device_train_batch_size", "2"]


def next_words(printed):
    """The options of the command that a writing shows at its end."""
    (line,) = re.findall(r"^  hf-distill kd (.*) --output_dir out$", printed, re.MULTILINE)
    return line.split()


def test_a_run_from_a_store_is_measured_and_compared_as_one_with_its_teacher(folder, tmp_path, capsys, store):
    run = {"eval_dataset": folder / "rows.jsonl", "learning_rate": 0.01, "max_steps": 4}
    sampled = tmp_path / "sampled"
    written(folder, sampled, capsys, "sampled", entries=255)
    teachers = {"online": folder / "teacher", "stored": f"cache:{store}", "sample": f"cache:{sampled}"}
    for name, teacher in teachers.items():
        cli.main(["kd", *options(folder, output_dir=tmp_path / name, teacher_model=teacher, **run)])
    measured = {name: json.loads((tmp_path / name / "report.json").read_text()) for name in teachers}
    for when in ("before", "after"):
        online, stored, sample = (found[when] for found in measured.values())
        assert stored == pytest.approx(online, rel=1e-3)
        assert sample["num_tokens"] == online["num_tokens"]
        assert sample["student_perplexity"] == pytest.approx(online["student_perplexity"], rel=0.02)
        assert sample["kl"] == pytest.approx(online["kl"], rel=0.02)
    capsys.readouterr()
    cli.main(["compare", *(str(tmp_path / name) for name in teachers), "--output_dir", str(tmp_path / "both")])
    rows = json.loads((tmp_path / "both" / "comparison.json").read_text())
    found = {row["run"]: row["teacher_outputs"] for row in rows}
    sources = {"stored": "a store: hidden states, float16", "sample": "a store: sampled, threshold, 255 entries"}
    assert found == {"online": None, **sources}


def test_a_dry_run_shows_every_store_and_writes_nothing(folder, tmp_path, capsys):
    cli.main(["cache", "write", *options(folder, output_dir=tmp_path / "store"), "--dry_run"])
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert f"{len(SENTENCES)} different texts" in printed
    for kind in (
        "hidden states, float16",
        "hidden states, int8",
        "sampled, threshold, 12 entries",
        "top-k, 12 entries",
    ):
        assert kind in printed, kind
    assert "nothing has been written" in printed


def test_the_command_to_go_on_with_has_the_options_that_rows_depend_on(folder, tmp_path, capsys):
    changes = {"max_length": 9, "dataset": folder / "facts.jsonl", "prompt_template": "{query}?"}
    printed = written(folder, tmp_path / "store", capsys, completion_template=" {answer}", **changes)
    assert "--max_length 9" in printed
    assert "--prompt_template '{query}?' --completion_template ' {answer}'" in printed
    assert "--use_cpu True --bf16 False" in printed
    assert "--learning_rate" not in printed


def test_a_damaged_file_is_named_and_the_exit_code_is_1(folder, tmp_path, capsys):
    written(folder, tmp_path, capsys)
    files = tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "manifest.json"
    for path in (*tmp_path.glob("*.safetensors"), *files):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(SystemExit) as stopped:
            cli.main(["cache", "verify", str(tmp_path)])
        assert stopped.value.code == 1
        named = path.parent if path.name == "tokenizer.json" else path
        assert str(named) in capsys.readouterr().out
        path.write_bytes(content)
    next(tmp_path.glob("index-*")).unlink()
    with pytest.raises(SystemExit):
        cli.main(["cache", "verify", str(tmp_path)])
    assert f"had {len(SENTENCES)} texts when it was written, and has 0" in capsys.readouterr().out


def test_a_damaged_shard_is_written_again(folder, tmp_path, capsys):
    written(folder, tmp_path, capsys)
    (shard,) = tmp_path.glob("data-*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    written(folder, tmp_path, capsys)
    cli.main(["cache", "verify", str(tmp_path)])
    (shard,) = tmp_path.glob("data-*")
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": "logits"}, "store has to be one of hidden, sampled, topk, got 'logits'"),
        ({"store_dtype": "int4"}, "dtype has to be one of float16, int8, got 'int4'"),
        ({"entries": 7}, "--entries is for --store sampled and topk, not for hidden"),
        ({"sampler": "multinomial", "store": "topk"}, "--sampler is for --store sampled, not for topk"),
        ({"entries": 0, "store": "topk"}, "entries has to be a whole number from 1"),
        ({"write_batch_size": 0}, "--write_batch_size has to be at least 1, got 0"),
        ({"resume_from_checkpoint": "true"}, "the same `cache write` goes on by itself"),
        ({"divergence": "reverse_kl", "store": "sampled"}, "divergence='reverse_kl' cannot be computed"),
        ({"temperature": 2, "store": "topk"}, "temperature=2 cannot be had"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts texts"),
        ({"teacher_model": "./nowhere"}, "teacher_model='./nowhere' cannot be loaded"),
        ({"sampller": "threshold"}, "there is no option --sampller; did you mean --sampler?"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(folder, tmp_path, capsys, changes, message):
    words = options(folder, output_dir=tmp_path / "store", **changes)
    assert message in error_of(capsys, words, "cache write")
    assert not (tmp_path / "store").exists()


def test_a_folder_is_needed_to_write_and_none_to_look(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--output_dir is missing" in error_of(capsys, options(folder), "cache write")
    cli.main(["cache", "write", *options(folder), "--dry_run"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_and_another_store_are_refused(folder, tmp_path, capsys, store):
    (tmp_path / "thesis.tex").write_text("Introduction")
    error = error_of(capsys, options(folder, output_dir=tmp_path), "cache write")
    assert "holds something else than a store (thesis.tex)" in error
    error = error_of(capsys, options(folder, output_dir=store, teacher_model=folder / "student"), "cache write")
    assert "was written with teacher weights" in error
    for command in ("cache info", "cache verify"):
        assert "is no store of a teacher's outputs" in error_of(capsys, [str(tmp_path)], command)


def test_stores_are_shown_beside_each_other(folder, tmp_path, capsys, store):
    written(folder, tmp_path, capsys, "sampled")
    cli.main(["cache", "info", str(store), str(tmp_path)])
    printed = capsys.readouterr().out
    for expected in ("hidden states", "sampled", store.name, "probability of exact entries"):
        assert expected in printed, expected


def test_a_writing_that_has_not_ended_is_shown_as_such(folder, tmp_path, capsys):
    written(folder, tmp_path, capsys)
    (tmp_path / "writing.json").write_text(json.dumps({"run": 1, "before": [], "key": ""}))
    cli.main(["cache", "info", str(tmp_path)])
    assert "unfinished" in capsys.readouterr().out
