"""`hf-distill kd` with several teachers, with another tokenizer, and with the student's own base model."""

import json

import pytest
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer, cli
from tests.conftest import SENTENCES, make_model, make_tokenizer

RUN = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, two teachers with its tokenizer, one with another, and rows."""
    folder = tmp_path_factory.mktemp("models")
    other = make_tokenizer(corpus=[sentence[::-1] for sentence in SENTENCES])
    for seed, name in enumerate(("student", "first", "second", "foreign")):
        make_model(seed=seed).save_pretrained(folder / name)
        (other if name == "foreign" else make_tokenizer()).save_pretrained(folder / name)
    Dataset.from_dict({"text": SENTENCES}).to_json(folder / "rows.jsonl")
    return folder


CASES = {
    "two teachers": (["first", "second"], [], "0.5 first + 0.5 second"),
    "with weights": (["first", "second"], ["--teacher_weights", "3", "1"], "0.75 first + 0.25 second"),
    "another tokenizer": (["foreign"], [], "foreign"),
    "both, as a sum": (["first", "foreign"], ["--teacher_combination", "sum"], "0.5 first + 0.5 foreign"),
    "its own base": (
        ["base"], ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"], "student without adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_teachers_are_named_on_the_command_line_and_measured_by_the_trainer(folder, tmp_path, case):
    teachers, options, name = CASES[case]
    teachers = [teacher if teacher == "base" else str(folder / teacher) for teacher in teachers]
    rows = ["--dataset", str(folder / "rows.jsonl"), "--eval_dataset", str(folder / "rows.jsonl")]
    models = ["--model", str(folder / "student"), "--teacher_model", *teachers]
    cli.main(["kd", *models, *rows, *RUN, *options, "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "report.json").read_text())
    assert "divergence, nats" in (tmp_path / "report.md").read_text()
    assert "eval_kd" in json.dumps(results)
    assert name in (tmp_path / "README.md").read_text()


def test_teachers_in_a_file(folder, tmp_path):
    lines = [
        f"model: {folder / 'student'}", f"teacher_model: [{folder / 'first'}, {folder / 'second'}]",
        f"dataset: {folder / 'rows.jsonl'}", f"output_dir: {tmp_path / 'out'}", "max_steps: 1", "use_cpu: true",
        "bf16: false", "report_to: none", "save_strategy: 'no'",
    ]  # fmt: skip
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    cli.main(["kd", "--config", str(tmp_path / "run.yaml")])
    assert "0.5 first + 0.5 second" in (tmp_path / "out" / "README.md").read_text()


def test_what_does_not_go_together_is_one_line(folder, tmp_path, capsys):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "first"), str(folder / "foreign")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["kd", *models, "--dataset", str(folder / "rows.jsonl"), *RUN, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "foreign has another tokenizer" in capsys.readouterr().err


def across_trainer(folder, tmp_path, rows, **changes):
    args = KDConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_eval_batch_size=4, **changes,
    )  # fmt: skip
    return KDTrainer(str(folder / "student"), str(folder / "foreign"), args, rows, rows)


def test_padding_further_changes_nothing_across_tokenizers(folder, tmp_path):
    rows = Dataset.from_dict({"text": SENTENCES})
    found = [across_trainer(folder, tmp_path, rows, pad_to_multiple_of=n).evaluate() for n in (None, 8, 64)]
    assert found[0]["eval_kd"] > 0
    for other in found[1:]:
        assert other["eval_kd"] == pytest.approx(found[0]["eval_kd"], rel=1e-5)
        assert other["eval_alignment/exact_fraction"] == found[0]["eval_alignment/exact_fraction"]


def test_a_prompt_of_its_own_is_refused_for_a_teacher_with_another_tokenizer(folder, tmp_path):
    rows = [{"prompt": "Hi", "completion": text, "teacher_prompt": "Well, hello"} for text in SENTENCES]
    with pytest.raises(ValueError, match=r"foreign has another tokenizer.*remove 'teacher_prompt'"):
        across_trainer(folder, tmp_path, Dataset.from_list(rows))
