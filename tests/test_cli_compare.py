"""`hf-distill compare`: what finished runs leave, and what is read from it."""

import json
import math

import pytest

from hf_distill import KDTrainer, cli, report
from hf_distill.comparison import COMPARED_COLUMNS, compare_runs, save_comparison
from hf_distill.runs import RUN_FILES, save_settings
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
    assert lines[0] == "|  | perplexity | KL, nats | agreement | tokens | seconds |"
    assert lines[2] == "| a | 8.000 | 0.5000 | 75.0% |  |  |"
    assert lines[3] == "| b | 8.000 | 0.7500 | 75.0% | 200 | 12 |"
    assert "| kv_weight | - | 0.003 |" in lines


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


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_folder_that_does_not_exist_is_said_not_to_exist(tmp_path, command, capsys):
    good, absent = make_run(tmp_path / "good", {"seed": 0}), tmp_path / "absent"
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(good), str(absent)])
    assert stopped.value.code == 2
    assert f"run folder '{absent}' does not exist" in capsys.readouterr().err.splitlines()[-1]


def test_what_was_measured_on_different_text_is_not_put_side_by_side(tmp_path):
    a = make_run(tmp_path / "a", {"seed": 0})
    b = make_run(tmp_path / "b", {"seed": 1})
    written = {"eval_kd": 0.5, "eval_agreement": 0.5, "eval_rollout/acceptance_rate": 0.5}
    (b / "report.json").write_text(json.dumps({"before": written, "after": written}))
    with pytest.raises(ValueError, match="b: measured on text that the models write"):
        compare_runs([a, b])
    assert compare_runs([b])[0] == {"run": "b", **written, "num_tokens": 200.0, "seconds": 12.5}


@pytest.mark.draws
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
    assert f"Measured on {len(SENTENCES)} rows, {report['num_tokens']:,} tokens" in " ".join(printed.split())
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


def written(tmp_path, runs):
    save_comparison(tmp_path / "out", runs)
    return (tmp_path / "out" / "comparison.md").read_text()


def test_settings_without_an_effect_are_not_shown(tmp_path):
    without = {"use_peft": False, "lora_r": 8, "save_steps": 10, "logging_steps": 1, "max_steps": 5}
    a = make_run(tmp_path / "a", {**without, "num_train_epochs": 1, "kd_weight": 0.5})
    b = make_run(tmp_path / "b", {**without, "lora_r": 16, "save_steps": 20, "num_train_epochs": 3, "kd_weight": 0.5})
    assert set(compare_runs([a, b])[0]) == {"run", *COMPARED_COLUMNS, "num_tokens", "seconds"}
    c = make_run(tmp_path / "c", {**without, "use_peft": True, "kd_weight": 0.5})
    rows = {row["run"]: row for row in compare_runs([a, c])}
    assert (rows["a"]["lora_r"], rows["c"]["lora_r"]) == (None, 8)
    assert "save_steps" not in rows["a"]


def test_settings_of_projectors_are_shown(tmp_path):
    common = {"kv_weight": 1.0, "hidden_weight": None, "project": "trackers"}
    a = make_run(tmp_path / "a", {**common, "projector": "linear", "projector_learning_rate": 0.1, "project": "other"})
    b = make_run(tmp_path / "b", {**common, "projector": "pca", "projector_learning_rate": 0.2})
    rows = {row["run"]: row for row in compare_runs([a, b])}
    assert (rows["a"]["projector"], rows["b"]["projector_learning_rate"]) == ("linear", 0.2)
    assert "project" not in rows["a"]


def test_runs_of_different_held_out_rows_are_not_ranked_together(tmp_path, capsys):
    settings = {"kd_weight": 1.0, "teacher_model": ["t"]}
    folders = [
        make_run(tmp_path / "a", {**settings, "held_out": "first"}, kl=0.75),
        make_run(tmp_path / "b", {**settings, "held_out": "other"}, kl=0.25, num_tokens=900),
        make_run(tmp_path / "c", {**settings, "held_out": "first"}, kl=0.5),
    ]
    assert [row["run"] for row in compare_runs(folders)] == ["c", "a", "b"]
    text = written(tmp_path, folders)
    first, second = text.split("| b |")[0], text.split("| b |")[1]
    assert first.index("| c |") < first.index("| a |")
    assert "Measured on 1,000 tokens. Other held-out rows than those of the other tables" in first
    assert "Measured on 900 tokens." in second
    assert "their numbers do not compare" in " ".join(capsys.readouterr().out.split())


def test_runs_with_different_teachers_are_ranked_by_perplexity(tmp_path):
    a = make_run(tmp_path / "a", {"teacher_model": ["t"]}, student_perplexity=7.0, kl=0.5)
    b = make_run(tmp_path / "b", {"teacher_model": ["u"]}, student_perplexity=9.0, kl=0.1)
    assert [row["run"] for row in compare_runs([b, a])] == ["a", "b"]


def test_students_before_baselines_and_teachers_have_rows_of_their_own(tmp_path):
    a = make_run(tmp_path / "a", {"seed": 0}, kl=0.25)
    b = make_run(tmp_path / "b", {"seed": 1}, kl=0.5)
    report = json.loads((b / "report.json").read_text())
    report["baseline"] = MEASURES | {"kl": 0.625}
    (b / "report.json").write_text(json.dumps(report))
    lines = written(tmp_path, [a, b]).splitlines()[2:7]
    assert lines == [
        "| a | 8.000 | 0.2500 | 75.0% | 200 | 12 |",
        "| b | 8.000 | 0.5000 | 75.0% | 200 | 12 |",
        "| before | 8.000 | 0.5000 | 75.0% |  |  |",
        "| baseline, b | 8.000 | 0.6250 | 75.0% |  |  |",
        "| teacher | 5.000 | 0.0000 | 100.0% |  |  |",
    ]


def test_many_runs_with_many_settings_are_readable_at_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("learning_rate", "kd_weight", "temperature", "lora_r", "per_device_train_batch_size", "seed")
    folders = [
        make_run(tmp_path / f"run_{i}", {"use_peft": True, **dict.fromkeys(names, i), "model": "HuggingFaceTB/Sm" * i})
        for i in range(7)
    ]
    save_comparison(tmp_path / "out", folders)
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[:-1])) <= 80  # the last line names the folder
    for word in (*names, "run_6", "perplexity", "agreement", "seconds"):
        assert any(word in line for line in printed), word


def test_the_picture_has_held_out_curves_the_teacher_percent_and_whole_steps(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    a = make_run(tmp_path / "a", {"seed": 0}, history=[*HISTORY, {"step": 5, "eval_ce": 2.0}], student_perplexity=6.0)
    b = make_run(tmp_path / "b", {"seed": 1})
    save_comparison(tmp_path / "out", [a, b])
    curves, perplexity, _, agreement = figures[0].axes
    lines = {line.get_label(): line for line in curves.lines}
    steps, values = lines["a: held-out ce"].get_data()
    assert list(steps) == [0, 5, 10]
    assert list(values) == pytest.approx([math.log(8.0), 2.0, math.log(6.0)])
    assert list(lines["teacher, held-out ce"].get_ydata()) == pytest.approx([math.log(5.0)] * 2)
    assert list(perplexity.lines[0].get_ydata()) == [5.0, 5.0]
    assert agreement.yaxis.get_major_formatter()(0.75, 0) == "75%"
    assert all(float(tick).is_integer() for tick in curves.xaxis.get_major_locator()())
