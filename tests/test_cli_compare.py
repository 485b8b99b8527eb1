"""`hf-distill compare`: what finished runs leave, and what is read from it."""

import json

import pytest

from hf_distill import KDTrainer, cli
from hf_distill.report import COMPARED_COLUMNS, RUN_FILES, compare_runs, save_comparison, save_settings
from tests.conftest import SENTENCES
from tests.test_cli import options

MEASURES = {
    "student_perplexity": 8.0,
    "teacher_perplexity": 5.0,
    "kl": 0.5,
    "agreement": 0.75,
    "expected_acceptance": 0.875,
    "num_tokens": 1000,
}
HISTORY = [
    {"step": 5, "loss": 3.0, "ce": 4.0, "num_tokens": 100.0},
    {"step": 10, "loss": 2.0, "ce": 3.5, "num_tokens": 200.0},
    {"step": 10, "train_runtime": 12.5, "train_loss": 2.5},
]


def make_run(folder, settings, history=HISTORY, **measures):
    """A run folder, written by hand."""
    folder.mkdir(parents=True)
    report = {"before": MEASURES, "after": MEASURES | measures}
    contents = {"settings.json": settings, "trainer_state.json": {"log_history": history}, "report.json": report}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_settings_that_differ_and_the_measures_are_there_and_nothing_else(tmp_path):
    common = {"kd_weight": 0.5, "lora_target_modules": ["q_proj"]}
    a = make_run(tmp_path / "a", {**common, "learning_rate": 1e-3, "seed": 0, "output_dir": "a"})
    b = make_run(tmp_path / "b", {**common, "learning_rate": 2e-3, "seed": 0, "output_dir": "b"}, kl=0.25)
    measures = {key: MEASURES[key] for key in COMPARED_COLUMNS}
    logged = {"num_tokens": 200.0, "seconds": 12.5}
    assert compare_runs([a, str(b)]) == [  # b is closer to its teacher
        {"run": "b", "learning_rate": 2e-3, **measures, "kl": 0.25, **logged},
        {"run": "a", "learning_rate": 1e-3, **measures, **logged},
    ]


def test_a_report_of_another_run_is_not_shown_as_this_ones(tmp_path):
    a, b = make_run(tmp_path / "a", {"seed": 0}), make_run(tmp_path / "b", {"seed": 1})
    save_settings(a, {"seed": 0})
    assert [row["run"] for row in compare_runs([a, b])] == ["a", "b"]
    assert set(compare_runs([a, b])[0]) == {"run", "seed", *COMPARED_COLUMNS, "num_tokens", "seconds"}
    for name in ("report.json", "trainer_state.json"):
        before = (a / name).read_text()
        (a / name).write_text(before + "\n")
        with pytest.raises(ValueError, match=f"holds files of different runs: {name} changed after settings.json"):
            compare_runs([a, b])
        (a / name).write_text(before)


def test_runs_that_know_different_settings_and_log_different_things_have_the_same_columns(tmp_path):
    a = make_run(tmp_path / "a", {"kd_weight": 0.5}, history=[])
    b = make_run(tmp_path / "b", {"kd_weight": 0.5, "kv_weight": 1e-3 * 3}, kl=0.75)
    rows = compare_runs([b, a])
    assert [list(row) for row in rows] == [list(rows[0])] * 2
    assert [row["kv_weight"] for row in rows] == [None, 0.003]
    assert [row["seconds"] for row in rows] == [None, 12.5]
    save_comparison(tmp_path / "out", [b, a])
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("| run | kv_weight | perplexity |")
    assert lines[2] == "| a |  | 8.000 | 0.5000 | 75.0% |  |  |"
    assert lines[3] == "| b | 0.003 | 8.000 | 0.7500 | 75.0% | 200 | 12 |"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [make_run(tmp_path / name / "out", {"seed": seed}) for seed, name in enumerate("ab")]
    assert [row["run"] for row in compare_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("missing", RUN_FILES)
def test_a_folder_without_a_finished_run_is_refused_by_name(tmp_path, missing, capsys):
    folders = [make_run(tmp_path / name, {"seed": 0}) for name in ("good", "bad")]
    (folders[1] / missing).unlink()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *map(str, folders), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-distill compare: error: run folder ")
    assert f"{folders[1]!s}' has no {missing}: " in error
    assert not (tmp_path / "out").exists()


def test_what_was_measured_on_different_text_is_not_put_side_by_side(tmp_path):
    a = make_run(tmp_path / "a", {"seed": 0})
    b = make_run(tmp_path / "b", {"seed": 1})
    written = {"eval_kd": 0.5, "eval_agreement": 0.5, "eval_rollout/acceptance_rate": 0.5}
    (b / "report.json").write_text(json.dumps({"before": written, "after": written}))
    with pytest.raises(ValueError, match="b: measured on text that the models write"):
        compare_runs([a, b])
    assert compare_runs([b])[0] == {"run": "b", **written, "num_tokens": 200.0, "seconds": 12.5}


def test_finished_runs_are_compared_from_the_command_line(folder, tmp_path, capsys):
    """What `kd` leaves is what `compare` reads; the better run comes first."""
    held_out = {"eval_dataset": folder / "rows.jsonl", "use_peft": True, "lora_target_modules": "all-linear"}
    for name, rate in (("slow", 1e-5), ("fast", 3e-2)):
        run = {"output_dir": tmp_path / name, "learning_rate": rate, "max_steps": 6, "kd_weight": 1.0}
        cli.main(["kd", *options(folder, **held_out, **run)])
        assert all((tmp_path / name / file).is_file() for file in RUN_FILES)
    capsys.readouterr()
    cli.main(["compare", str(tmp_path / "slow"), str(tmp_path / "fast"), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.index("fast") < printed.index("slow")
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["run"], row["learning_rate"]) for row in rows] == [("fast", 3e-2), ("slow", 1e-5)]
    assert set(rows[0]) == {"run", "learning_rate", *COMPARED_COLUMNS, "num_tokens", "seconds"}
    report = json.loads((tmp_path / "fast" / "report.json").read_text())["after"]
    assert {key: rows[0][key] for key in COMPARED_COLUMNS} == {key: report[key] for key in COMPARED_COLUMNS}
    assert rows[0]["num_tokens"] == rows[1]["num_tokens"] > 0
    assert f"measured on {len(SENTENCES)} rows, {report['num_tokens']:,} tokens" in " ".join(printed.split())
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((tmp_path / "fast" / "settings.json").read_text())
    assert settings["lora_target_modules"] == "all-linear"
    assert settings["dataset"] == str(folder / "rows.jsonl")


def test_an_unfinished_run_leaves_no_settings(folder, tmp_path, monkeypatch):
    def stop(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(KDTrainer, "training_step", stop)
    with pytest.raises(SystemExit):
        cli.main(["kd", *options(folder, output_dir=tmp_path)])
    assert not (tmp_path / "settings.json").exists()
