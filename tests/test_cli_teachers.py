"""`hf-distill kd` with several teachers, with another tokenizer, and with the student's own base model."""

import json
from itertools import pairwise

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


def across(student_side, teacher_side, rows, **changes):
    """A trainer of models that bring no tokenizer of their own."""
    models = make_model(seed=0), make_model(seed=1, **changes.pop("teacher", {}))
    args = KDConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], save_strategy="no", **changes)
    return KDTrainer(
        models[0], models[1], args, rows, processing_class=student_side, teacher_processing_class=teacher_side
    )


@pytest.fixture
def foreign():
    return make_tokenizer(corpus=[sentence[::-1] for sentence in SENTENCES])


def conversations(system=True):
    turns = [{"role": "system", "content": "Be brief."}] * system
    return Dataset.from_list(
        [
            {"messages": [*turns, {"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in pairwise(SENTENCES)
        ]
    )


def test_conversations_need_a_template_on_the_teachers_side_too(tmp_path, tokenizer, foreign):
    foreign.chat_template = None
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's tokenizer has no chat template.*teacher_proc"):
        across(tokenizer, foreign, conversations())


def test_a_template_that_refuses_a_row_is_named(tmp_path, tokenizer, foreign):
    foreign.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(ValueError, match=r"tokenizer refuses row 0 of the prepared train dataset \(no system"):
        across(tokenizer, foreign, conversations())


def test_messages_that_the_teacher_does_not_read_are_told(tmp_path, tokenizer, foreign, caplog):
    across(tokenizer, foreign, conversations())
    assert "leaves out" not in caplog.text
    assert "100% are compared at all" in caplog.text
    foreign.chat_template = foreign.chat_template.replace("in messages", "in messages if message['role'] != 'system'")
    across(tokenizer, foreign, conversations())
    assert "LlamaForCausalLM leaves out or changes messages of system in the train dataset" in caplog.text
    caplog.clear()
    foreign.chat_template = "Well."
    across(tokenizer, foreign, conversations())
    assert "more than half of the train dataset says nothing about LlamaForCausalLM" in caplog.text


def test_texts_longer_than_the_teacher_can_read_are_refused(tmp_path, tokenizer, foreign):
    rows = Dataset.from_dict({"text": SENTENCES})
    with pytest.raises(ValueError, match=r"take \d+ tokens, the teacher has 16 positions: lower max_length"):
        across(tokenizer, foreign, rows, teacher={"max_position_embeddings": 16})
    prompts = [{"prompt": "Hi", "completion": text, "teacher_prompt": "Well, " * 20} for text in SENTENCES]
    with pytest.raises(ValueError, match=r"teacher_prompt and completion of row 0 of .* take \d+ tokens"):
        across(tokenizer, tokenizer, Dataset.from_list(prompts), teacher={"max_position_embeddings": 16})


def test_uld_says_that_the_divergence_has_no_part(tmp_path, tokenizer, foreign, caplog):
    rows = Dataset.from_dict({"text": SENTENCES})
    trainer = across(tokenizer, foreign, rows, cross_tokenizer="uld", divergence="reverse_kl")
    assert "divergence='reverse_kl' has no part in it" in caplog.text
    assert trainer.describe()["other tokenizers"] == "LlamaForCausalLM: uld"


def test_one_tokenizer_for_several_teachers_is_for_those_that_bring_none(folder, tmp_path, tokenizer):
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], teacher_combination="sum")
    teachers = {"own": str(folder / "foreign"), "none": make_model(seed=2)}
    trainer = KDTrainer(
        str(folder / "student"), teachers, args, Dataset.from_dict({"text": SENTENCES}),
        teacher_processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.describe()["other tokenizers"] == "own: aligned"
