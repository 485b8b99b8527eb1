"""`--baseline`, the same student on hard labels beside a distillation, and `hf-distill sft`, which does it alone."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_distill import HardLabelTrainer, cli
from hf_distill.report import verdict
from hf_distill.runs import read_run
from tests.test_cli import WRITTEN, options
from tests.test_page import read_page


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return all(first[name].equal(second[name]) for name in first)


def sft_options(folder, **changes):
    given = options(folder, **changes)
    at = given.index("--teacher_model")
    return given[:at] + given[at + 2 :]


@pytest.mark.parametrize("peft", [{}, {"use_peft": True, "lora_target_modules": "all-linear"}])
def test_the_baseline_is_the_training_without_a_teacher(folder, tmp_path, peft):
    """The same weights as `sft` with the same options makes, and the same numbers as a measurement of them."""
    run = {"eval_dataset": folder / "rows.jsonl", "max_steps": 4, "learning_rate": 1e-2, "seed": 3, **peft}
    cli.main(["kd", *options(folder, **run, output_dir=tmp_path / "kd", baseline=True)])
    cli.main(["sft", *sft_options(folder, **run, output_dir=tmp_path / "sft")])
    report, alone = report_of(tmp_path / "kd"), report_of(tmp_path / "sft")
    assert set(report) == {"before", "after", "baseline"}
    assert report_of(tmp_path / "kd" / "baseline") == {"before": report["before"], "after": report["baseline"]}
    assert report["baseline"]["num_tokens"] == report["after"]["num_tokens"] == alone["after"]["num_tokens"]
    if not peft:  # adapters begin with random numbers
        assert same(weights(tmp_path / "kd" / "baseline"), weights(tmp_path / "sft"))
        assert report["baseline"]["student_perplexity"] == pytest.approx(alone["after"]["student_perplexity"], rel=1e-4)
    assert report["baseline"]["kl"] != report["after"]["kl"]
    logged = [read_run(tmp_path / name).logged("num_tokens") for name in ("kd", "kd/baseline", "sft")]
    assert len(set(logged)) == 1


def test_the_student_of_a_run_is_its_own_with_and_without_a_baseline(folder, tmp_path):
    run = {"eval_dataset": folder / "rows.jsonl", "max_steps": 3, "learning_rate": 1e-2}
    for name, baseline in (("with", True), ("without", False)):
        cli.main(["kd", *options(folder, **run, output_dir=tmp_path / name, baseline=baseline)])
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    results = [report_of(tmp_path / name) for name in ("with", "without")]
    assert results[0]["after"] == results[1]["after"]


def test_table_picture_page_and_comparison_have_the_baseline(folder, tmp_path, capsys):
    run = {"eval_dataset": folder / "rows.jsonl", "max_steps": 2, "output_dir": tmp_path / "kd", "baseline": True}
    cli.main(["kd", *options(folder, **run)])
    said = capsys.readouterr().out
    assert "now the baseline, on hard labels alone" in said
    assert "Add --baseline" not in said
    sentence = verdict(report_of(tmp_path / "kd"))
    assert sentence.startswith("Compared with the baseline on hard labels, the student is ")
    for page in ("report.md", "README.md"):
        text = (tmp_path / "kd" / page).read_text()
        assert "| baseline |" in text, page
        assert sentence in text, page
    data, _ = read_page(tmp_path / "kd" / "report.html")
    assert [each["name"] for each in data["runs"]] == ["kd", "baseline"]
    assert {row[""] for row in data["tables"][0]["rows"]} == {"kd", "baseline", "before", "teacher"}
    assert data["tables"][0]["note"].startswith(sentence)
    assert data["settings"][0]["rows"][0] == {"": "kd_weight", "kd": "0.5", "baseline": "0"}
    assert [each["tokens"]["kl_is"] for each in data["runs"]] == ["exact", "exact"]
    cli.main(["compare", str(tmp_path / "kd"), "--output_dir", str(tmp_path / "out")])
    assert "| baseline |" in (tmp_path / "out" / "comparison.md").read_text()


def test_runs_that_only_a_trainer_can_evaluate_have_a_baseline(folder, tmp_path):
    teachers = {"teacher_model": folder / "teacher"}
    run = {"eval_dataset": folder / "rows.jsonl", "max_steps": 2, "output_dir": tmp_path, "baseline": True}
    given = options(folder, **teachers, **run)
    at = given.index("--teacher_model")
    cli.main(["kd", *given[: at + 2], str(folder / "student"), *given[at + 2 :]])
    report = report_of(tmp_path)
    assert set(report["baseline"]) == set(report["after"])
    assert report["baseline"]["eval_kd"] != report["after"]["eval_kd"]


def test_rollouts_have_a_baseline_on_the_given_completions(folder, tmp_path):
    facts = folder / "facts.jsonl"
    columns = {"prompt_column": "question", "completion_column": "answer", "as_chat": True}
    data = {"dataset": facts, "eval_dataset": facts, "output_dir": tmp_path, "max_eval_rows": 4, "max_steps": 2}
    cli.main(["skd", *options(folder, **data, **columns, **WRITTEN, baseline=True)])
    report = report_of(tmp_path)
    assert report["baseline"].keys() == report["after"].keys()
    del columns["completion_column"]
    with pytest.raises(SystemExit):
        cli.main(["skd", *options(folder, **data, **columns, **WRITTEN, baseline=True)])


def test_a_baseline_without_held_out_rows_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["kd", *options(folder, output_dir=tmp_path, baseline=True)])
    assert "--baseline needs held-out rows" in capsys.readouterr().err


def test_sft_measures_reports_and_needs_no_teacher(folder, tmp_path):
    run = {"eval_dataset": folder / "rows.jsonl", "max_steps": 8, "learning_rate": 1e-2, "output_dir": tmp_path}
    cli.main(["sft", *sft_options(folder, **run)])
    report = report_of(tmp_path)
    assert report["after"]["student_perplexity"] < report["before"]["student_perplexity"]
    data, _ = read_page(tmp_path / "report.html")
    (each,) = data["runs"]
    assert each["tokens"]["kl_is"] is None
    assert "There is no teacher" in each["tokens"]["notes"][0]
    cli.main(["compare", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_sft_trains_as_its_trainer_does(folder, tmp_path):
    from datasets import Dataset

    from hf_distill import HardLabelConfig
    from tests.conftest import SENTENCES

    cli.main(["sft", *sft_options(folder, output_dir=tmp_path / "cli", max_steps=3)])
    args = HardLabelConfig(
        output_dir=str(tmp_path / "own"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = HardLabelTrainer(str(folder / "student"), args, Dataset.from_dict({"text": SENTENCES}))
    trainer.train()
    trainer.save_model()
    assert same(weights(tmp_path / "cli"), weights(tmp_path / "own"))
