"""`hf-distill kd` with pictures: files of rows, folders, what a run leaves, and commands that take text alone."""

import base64
import io
import json

import pytest
import torch
from datasets import load_dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from hf_distill import KDConfig, KDTrainer, cli
from hf_distill.row_files import load_rows
from hf_distill.runs import rows_digest
from tests.trainers.test_kd import settings
from tests.vision import NEEDS_5_18, chats, make_processor, make_vlm, picture

RUN = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--save_strategy", "no"]
RUN = [*RUN, "--per_device_train_batch_size", "2", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Student, teacher and rows: as lines with paths and with base64, and as a folder of pictures."""
    folder = tmp_path_factory.mktemp("vision")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_vlm("idefics3", seed).save_pretrained(folder / name)
        make_processor("idefics3").save_pretrained(folder / name)
    rows, lines, texts = list(chats(6)), [], []
    (folder / "pictures").mkdir()
    for i, row in enumerate(rows):
        row["images"][0].save(folder / "pictures" / f"{i}.png")
        file = io.BytesIO()
        row["images"][0].save(file, "PNG")
        question, answer = (message["content"] for message in row["messages"])
        lines.append({"images": [f"pictures/{i}.png"], "messages": row["messages"]})
        texts.append({"image": base64.b64encode(file.getvalue()).decode(), "question": question, "answer": answer})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, texts)))
    metadata = [{"file_name": f"{i}.png", "messages": row["messages"]} for i, row in enumerate(rows)]
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    return folder


def kd(folder, out, dataset, *more, command="kd"):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--kd_weight", "1"]
    models = models[:2] if command == "sft" else models
    held_out = ["--eval_dataset", str(folder / dataset), "--max_eval_rows", "3"]
    arguments = [command, *models, "--dataset", str(folder / dataset), *held_out, "--output_dir", str(out), *RUN, *more]
    return cli.main(arguments)


@NEEDS_5_18
def test_a_run_with_pictures_leaves_a_student_and_a_page(folder, tmp_path):
    out = tmp_path / "out"
    kd(folder, out, "rows.jsonl", "--baseline")
    for name in ("model.safetensors", "processor_config.json", "report.md", "report.html", "README.md"):
        assert (out / name).exists(), name
    tokens = json.loads((out / "tokens.json").read_text())
    assert tokens["kl_is"] == "exact"
    assert [len(row["pictures"]) for row in tokens["rows"]] == [1, 1, 1]
    shown = base64.b64decode(tokens["rows"][0]["pictures"][0].partition(",")[2])
    assert Image.open(io.BytesIO(shown)).convert("RGB").tobytes() == picture(0).tobytes()
    row = tokens["rows"][0]
    texts = [row["pieces"].get(str(i), tokens["texts"][index]) for i, index in enumerate(row["tokens"])]
    assert texts[:3] == ["<|user|>", "[picture]", "what"]  # one for all tokens of a picture
    assert row["num_pictures"] == 1
    assert "<image>" not in texts
    assert "data:image/png;base64," in (out / "report.html").read_text()
    results = json.loads((out / "report.json").read_text())
    assert {"before", "after", "baseline"} <= results.keys()
    assert results["after"]["eval_kd"] < results["before"]["eval_kd"]


@NEEDS_5_18
def test_the_values_of_the_tokens_are_those_of_the_evaluation(folder, tmp_path):
    kd(folder, tmp_path, "rows.jsonl")
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    values = [value for row in tokens["rows"] for value in row["kl"]]
    results = json.loads((tmp_path / "report.json").read_text())
    assert sum(values) / len(values) == pytest.approx(results["after"]["eval_kd"], abs=2e-4)


@NEEDS_5_18
def test_questions_and_answers_of_templates_are_messages(folder, tmp_path):
    templates = ["--prompt_template", "{question}", "--completion_template", "{answer}"]
    kd(folder, tmp_path, "questions.jsonl", *templates, "--max_length", "None")
    assert (tmp_path / "model.safetensors").exists()
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    row = tokens["rows"][0]
    said = [tokens["texts"][row["tokens"][place]] for place in row["places"]]
    assert "".join(said) == chats(1)[0]["messages"][1]["content"] + "<eos>"


@NEEDS_5_18
def test_a_folder_of_pictures_is_read(folder, tmp_path):
    kd(folder, tmp_path, "pictures", "--eval_split", "train")
    assert (tmp_path / "model.safetensors").exists()


@NEEDS_5_18
def test_hard_labels_alone_take_pictures(folder, tmp_path):
    kd(folder, tmp_path, "rows.jsonl", command="sft")
    assert (tmp_path / "tokens.json").exists()


@pytest.mark.parametrize("command", [["skd"], ["kv"], ["cache", "write"]])
def test_commands_for_text_say_so(folder, tmp_path, command, capsys):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    rows = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    rows = [*rows, "--use_cpu", "--bf16", "false", "--report_to", "none"]
    with pytest.raises(SystemExit):
        cli.main([*command, *models, *rows])
    assert "pictures" in capsys.readouterr().err


@NEEDS_5_18
def test_a_run_with_pictures_is_examined(folder, tmp_path, capsys):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    rows = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), "--rows", "4"]
    cli.main(["doctor", "kd", *models, *rows, "--use_cpu", "--bf16", "false", "--report_to", "none", "--json"])
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["label share"]["numbers"]["pictures"] == 4 * 7
    assert findings["start"]["numbers"]["teacher"]["kl"] > 0
    assert not (tmp_path / "out").exists()


def test_a_plan_says_that_it_does_not_count_pictures(folder, capsys):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    cli.main(["plan", "kd", *models, "--gpu", "24GB", "--output_dir", "out"])
    said = " ".join(capsys.readouterr().out.split())
    assert "reads pictures, and rows of text alone are counted: --picture_tokens" in said


def test_layers_of_a_model_that_sees_are_not_pruned(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "--model", str(folder / "student"), "--layers", "0", "--output_dir", str(tmp_path / "out")])
    assert "reads pictures, and prune is for models of text alone" in capsys.readouterr().err


@pytest.mark.parametrize("family", [pytest.param("idefics3", marks=NEEDS_5_18), "gemma3"])
def test_a_merged_student_sees_as_the_one_with_its_adapter(tmp_path, family):
    make_vlm(family, 1).save_pretrained(tmp_path / "base")
    make_processor(family).save_pretrained(tmp_path / "base")
    trainer = KDTrainer(
        str(tmp_path / "base"), make_vlm(family, 2), KDConfig(**settings(tmp_path / "adapter", learning_rate=1.0)),
        chats(), peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    batch = {name: each for name, each in trainer.batch_collator()(list(chats())).items() if "teacher" not in name}
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found, expected = merged(**batch).logits, trainer.student.eval()(**batch).logits
        assert (found - make_vlm(family, 1)(**batch).logits).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "merged"), ProcessorMixin)


def test_other_pictures_are_other_rows(folder):
    rows = load_dataset("imagefolder", data_dir=str(folder / "pictures"), split="train")
    again = load_rows(str(folder / "pictures"), "train")
    assert rows_digest(rows) == rows_digest(again)
    assert rows_digest(rows) != rows_digest(rows.select([1, 0, 2, 3, 4, 5]))
