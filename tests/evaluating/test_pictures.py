"""Rows with pictures that are measured without a trainer, against the models' own logits and a trainer's evaluation."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer, cli
from hf_distill.evaluating.models import evaluate_models
from hf_distill.evaluation import evaluate_fidelity, perplexity, row_sums
from tests.conftest import make_model
from tests.conftest import make_tokenizer as make_text_tokenizer
from tests.trainers.test_kd import settings
from tests.vision import NEEDS_5_18, VOCAB, chats, make_processor, make_vlm, questions


def dense(student, teacher, rows, processor):
    """Nats, KL, agreement and acceptance (R, 4) of each row, by logits of a row alone; completions count."""
    found = []
    for row in rows:
        asked, answer = (row[name][0]["content"] for name in ("prompt", "completion"))
        text = f"<|user|><image>{asked}<eos><|assistant|>{answer}<eos>"
        batch = processor(images=[row["images"]], text=[text], return_tensors="pt")
        number = len(processor.tokenizer(f"{answer}<eos>")["input_ids"])
        with torch.no_grad():
            ours, its = (model(**batch).logits[0, -number - 1 : -1].log_softmax(-1) for model in (student, teacher))
        labels = batch["input_ids"][0, -number:, None]
        found.append([
            -ours.gather(1, labels).sum(), (its.exp() * (its - ours)).sum(),
            (ours.argmax(1) == its.argmax(1)).sum(), torch.minimum(ours.exp(), its.exp()).sum(),
        ])  # fmt: skip
    return np.array(found, dtype=float)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["idefics3", "llava_onevision"])
def test_sums_of_rows_are_those_of_the_models_own_logits(family, batch_size):
    student, teacher, rows, processor = make_vlm(family, 1), make_vlm(family, 2), questions(4), make_processor(family)
    sums = row_sums((student,), teacher, rows, processor, batch_size=batch_size)
    found = np.stack([sums.students[0][name] for name in ("ce", "kl", "agreement", "acceptance")], 1)
    np.testing.assert_allclose(found, dense(student, teacher, rows, processor), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_the_numbers_are_those_of_a_trainers_evaluation(tmp_path):
    student, teacher, processor = make_vlm("idefics3", 1), make_vlm("idefics3", 2), make_processor("idefics3")
    trainer = KDTrainer(
        student, teacher, KDConfig(**settings(tmp_path)), train_dataset=chats(4), eval_dataset=chats(5, seed=7),
        processing_class=processor,
    )  # fmt: skip
    expected = trainer.evaluate()
    found = evaluate_fidelity(student, teacher, chats(5, seed=7), processor, batch_size=2)
    assert found["kl"] == pytest.approx(expected["eval_kd"], rel=1e-4)
    assert np.log(found["student_perplexity"]) == pytest.approx(expected["eval_ce"], rel=1e-4)
    assert found["agreement"] == pytest.approx(expected["eval_agreement"])
    assert found["num_rows"] == 5


def test_a_teacher_reads_pictures_through_its_own_processor(tmp_path):
    student, teacher = make_vlm("idefics3", 1), make_vlm("idefics3", 2)
    processors = make_processor("idefics3"), make_processor("idefics3", do_image_splitting=True)  # into 5 tiles
    rows = chats(5, seed=7)
    trainer = KDTrainer(
        student, teacher, KDConfig(**settings(tmp_path)), train_dataset=chats(4), eval_dataset=rows,
        processing_class=processors[0], teacher_processing_class=processors[1],
    )  # fmt: skip
    expected = trainer.evaluate()
    found = evaluate_fidelity(
        student, teacher, rows, processors[0], batch_size=2, teacher_processing_class=processors[1]
    )
    assert found["kl"] == pytest.approx(expected["eval_kd"], rel=1e-4)
    # Its perplexity is that of it alone.
    alone = row_sums((teacher,), None, rows, processors[1])
    assert np.log(found["teacher_perplexity"]) == pytest.approx(alone.students[0]["ce"].sum() / alone.num_tokens.sum())


def test_three_models_stand_side_by_side():
    models = {name: make_vlm("idefics3", seed) for seed, name in enumerate(("base", "student", "teacher"))}
    found = evaluate_models(models, {"student": make_processor("idefics3")}, rows=questions(4))
    assert [measure.name for measure in found.measures] == ["perplexity", "kl", "agreement", "acceptance"]
    assert all(set(measure.values) == set(models) for measure in found.measures)


def test_a_row_without_a_label_counts_for_nothing():
    student, processor, rows = make_vlm("idefics3", 1), make_processor("idefics3"), questions(3)
    whole = row_sums((student,), None, rows, processor, max_length=15)
    assert whole.num_tokens.tolist() == [2, 1]  # their labels begin at tokens 13, 14 and 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": make_processor("idefics3").tokenizer}, "pass the student's processor"),
        ({"teacher": make_model(vocab_size=VOCAB)}, "reads text alone: remove the column of pictures"),
        ({"dataset": chats(2).remove_columns("messages").add_column("text", ["<image> a", "<image><image> b"])},
         "one of the rows 0 to 1 cannot be made a batch of"),
        ({"max_length": 5}, "would cut them: raise max_length"),
        ({"dataset": Dataset.from_dict({"images": [["nowhere.png"]], "messages": chats(1)["messages"]})},
         "picture 0 of row 0 of the held-out dataset is 'nowhere.png', and there is no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(change, message):
    given = {
        "student": make_vlm("idefics3", 1), "teacher": make_vlm("idefics3", 2), "dataset": chats(2),
        "tokenizer": make_processor("idefics3"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate_fidelity(**given | change)


def test_windows_are_for_text_alone():
    with pytest.raises(ValueError, match="has pictures, and rows of text alone are measured here"):
        perplexity(make_vlm("idefics3"), chats(1), make_processor("idefics3").tokenizer)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student and teachers with the same and another processor, and rows that name their pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    for name, seed in (("student", 1), ("teacher", 2), ("other", 2)):
        make_vlm("idefics3", seed).save_pretrained(folder / name)
        make_processor("idefics3", do_image_splitting=name == "other").save_pretrained(folder / name)
    make_model(vocab_size=VOCAB).save_pretrained(folder / "blind")
    make_text_tokenizer().save_pretrained(folder / "blind")
    lines = []
    for i, row in enumerate(questions(5)):
        row["images"][0].save(folder / f"{i}.png")
        text = {"question": row["prompt"][0]["content"], "answer": row["completion"][0]["content"]}
        lines.append((json.dumps({**row, "images": [f"{i}.png"]}), json.dumps({**text, "image": f"{i}.png"})))
    for name, column in (("rows.jsonl", 0), ("table.jsonl", 1)):
        (folder / name).write_text("\n".join(line[column] for line in lines))
    return folder


def evaluated(models, capsys, *more, teacher="teacher", rows="rows.jsonl"):
    words = ["--model", models / "student", "--teacher_model", models / teacher, "--dataset", models / rows]
    cli.main(["evaluate", *map(str, words), "--device", "cpu", "--json", *more])
    return json.loads(capsys.readouterr().out)


@NEEDS_5_18
def test_the_command_measures_rows_with_pictures(models, capsys, tmp_path):
    data = evaluated(models, capsys, "--output_dir", str(tmp_path))
    student, teacher = make_vlm("idefics3", 1), make_vlm("idefics3", 2)
    expected = evaluate_fidelity(student, teacher, questions(5), make_processor("idefics3"))
    assert data["measures"]["kl"]["values"]["student"] == pytest.approx(expected["kl"], rel=1e-4)
    assert data["measures"]["perplexity"]["values"]["student"] == pytest.approx(
        expected["student_perplexity"], rel=1e-4
    )
    templates = ["--prompt_template", "{question}", "--completion_template", "{answer}"]
    again = evaluated(models, capsys, *templates, "--output_dir", str(tmp_path), rows="table.jsonl")
    assert again["measures"]["kl"]["values"] == data["measures"]["kl"]["values"]


@NEEDS_5_18
def test_the_command_lets_each_model_see_in_its_own_way(models, capsys, tmp_path):
    data = evaluated(models, capsys, "--output_dir", str(tmp_path), teacher="other")
    same = evaluated(models, capsys, "--output_dir", str(tmp_path))
    values = [each["measures"]["perplexity"]["values"] for each in (data, same)]
    assert values[0]["student"] == values[1]["student"]
    assert values[0]["teacher"] != pytest.approx(values[1]["teacher"], rel=1e-3)
    assert data["notes"] == []


@NEEDS_5_18
def test_a_base_found_by_itself_that_reads_text_alone_is_left_out(models, capsys, tmp_path):
    student = tmp_path / "run"
    shutil.copytree(models / "student", student)
    (student / "settings.json").write_text(json.dumps({"model": str(models / "blind")}))
    words = ["--model", student, "--dataset", models / "rows.jsonl", "--device", "cpu", "--json"]
    cli.main(["evaluate", *map(str, words), "--output_dir", str(tmp_path / "out")])
    data = json.loads(capsys.readouterr().out)
    assert list(data["models"]) == ["student"]
    assert data["notes"] == [f"The student began as {models / 'blind'}, which is left out: it reads text alone."]


@NEEDS_5_18
def test_a_student_that_reads_text_alone_is_measured_on_the_words(models, capsys, tmp_path):
    words = ["--model", models / "blind", "--dataset", models / "rows.jsonl", "--device", "cpu", "--json"]
    cli.main(["evaluate", *map(str, words), "--output_dir", str(tmp_path)])
    assert (
        "The student reads text alone: the pictures of the rows are left out."
        in (json.loads(capsys.readouterr().out)["notes"])
    )


@NEEDS_5_18
def test_a_question_that_is_too_long_is_found_before_anything_is_measured(models, capsys, tmp_path):
    lines = [json.loads(line) for line in (models / "rows.jsonl").read_text().splitlines()]
    for row in lines:
        row["images"] = [str(models / row["images"][0])]
    lines[4]["prompt"][0]["content"] = "what " * 240
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit):
        evaluated(models, capsys, "--generate", "--max_new_tokens", "30", "--output_dir", str(tmp_path), rows=rows)
    assert "row 4 has a prompt of" in capsys.readouterr().err
    assert not (tmp_path / "evaluation-unfinished").exists()


LUPI = ["--generate", "--knowledge_column", "prompt", "--query_column", "prompt", "--answer_column", "prompt"]


@NEEDS_5_18
@pytest.mark.parametrize(
    ("more", "teacher", "message"),
    [
        (LUPI, "teacher", "--knowledge_column makes prompts of text alone"),
        ([], "blind", "reads text alone"),
        (["--generate", "--answer_column", "nothing"], "teacher", "row 0 has no column 'nothing'"),
        (["--generate", "--max_new_tokens", "250"], "teacher", "an answer of 250 would go beyond the 256 positions"),
    ],
)
def test_the_command_refuses_what_pictures_do_not_go_with(models, capsys, tmp_path, more, teacher, message):
    with pytest.raises(SystemExit):
        cli.main([
            "evaluate", "--model", str(models / "student"), "--teacher_model", str(models / teacher), "--dataset",
            str(models / "rows.jsonl"), "--device", "cpu", "--output_dir", str(tmp_path), *more,
        ])  # fmt: skip
    assert message in capsys.readouterr().err
