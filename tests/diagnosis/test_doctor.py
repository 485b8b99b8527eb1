"""The command `doctor`: what it prints, its JSON, its exit code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from hf_distill import cli
from hf_distill.diagnosis import CHECKS, Diagnosis
from hf_distill.diagnosis.findings import ok, warning
from tests.conftest import SENTENCES

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"


def options(folder, tmp_path, **changes):
    settings = {
        "model": folder / "student", "teacher_model": folder / "teacher", "dataset": folder / "rows.jsonl",
        "use_cpu": True, "bf16": False, "report_to": "none", "output_dir": tmp_path / "out", "rows": 8,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, **changes,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_the_command_prints_each_check_and_exits_with_0(folder, tmp_path, capsys):
    cli.main(["doctor", "kd", *options(folder, tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    for name in CHECKS:
        assert name in printed, name
    assert not (tmp_path / "out").exists()


def test_a_failure_exits_with_1_and_is_in_the_json(folder, tmp_path, capsys):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8, -100]}] * 8
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "kd", *options(folder, tmp_path, dataset=tmp_path / "rows.jsonl"), "--json"])
    assert exit_.value.code == 1
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert list(findings) == list(CHECKS)
    assert findings["labels"]["status"] == "failure"
    assert findings["labels"]["remedy"]


def test_settings_that_cannot_be_read_exit_with_2(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "kd", *options(folder, tmp_path, kd_weight=7)])
    assert exit_.value.code == 2


def test_doctor_skd_takes_its_own_rows(folder, tmp_path, capsys):
    Dataset.from_dict({"question": SENTENCES}).to_json(tmp_path / "rows.jsonl")
    changes = {"dataset": tmp_path / "rows.jsonl", "prompt_column": "question", "max_new_tokens": 8}
    cli.main(["doctor", "skd", *options(folder, tmp_path, **changes), "--json"])
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["start"]["status"] == "ok"


def test_a_diagnosis_shows_each_finding_with_its_remedy():
    found = Diagnosis((replace(warning("a <s> | b", "try c"), check="labels"), ok("fine")), 4, 2.0)
    assert "| labels | warning | a &lt;s&gt; \\| b<br>do: try c |\n|  | ok | fine |" in found._repr_markdown_()
    assert "do: try c" in repr(found)
    assert repr(found).endswith("1 ok, 1 warning; 4 rows, 2 s")


def test_each_check_has_a_line_on_its_page():
    page = DOCS.read_text()
    for name in CHECKS:
        assert f"| {name} |" in page, name
