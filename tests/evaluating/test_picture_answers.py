"""Answers about pictures, against a loop of single forwards of one row, without padding or cache."""

import copy
import json

import pytest
import torch
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer, cli
from hf_distill.callbacks import EvaluateCallback
from hf_distill.evaluating.generation import generate_about_pictures
from hf_distill.evaluating.models import Scoring, evaluate_models
from hf_distill.evaluating.questions import picture_questions
from tests.conftest import make_model
from tests.trainers.test_kd import settings
from tests.vision import NEEDS_5_18, PROCESSED, VOCAB, chats, make_processor, make_vlm, picture, questions

LENGTH = 6
SCORING = Scoring(["exact_match", "f1"], max_new_tokens=LENGTH)


def by_hand(model, processor, row):
    """The text after a row's prompt, each token by a forward over all before it."""
    mark = "<boi>" if "Gemma" in type(model).__name__ else "<image>"
    text = f"<|user|>{mark * len(row['images'])}{row['prompt'][0]['content']}<eos><|assistant|>"
    inputs = dict(processor(images=[row["images"]] if row["images"] else None, text=[text], return_tensors="pt"))
    start = inputs["input_ids"].shape[1]
    for _ in range(LENGTH):
        with torch.no_grad():
            token = model(**inputs).logits[:, -1:].argmax(-1)
        if token.item() == processor.tokenizer.eos_token_id:
            break
        filler = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        if "cross_attention_mask" in inputs:
            filler["cross_attention_mask"] = inputs["cross_attention_mask"][:, -1:]
        for name, each in inputs.items():
            if name in filler or name.endswith("token_type_ids"):
                inputs[name] = torch.cat([each, filler.get(name, torch.zeros_like(token))], 1)
    return processor.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", PROCESSED)
def test_answers_are_those_of_single_forwards_for_any_batch_size(family):
    model, processor, rows = make_vlm(family, 3), make_processor(family), questions(5)
    expected = [by_hand(model, processor, row) for row in rows]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 8):
        assert generate_about_pictures(model, processor, rows, batch_size=batch_size, max_new_tokens=LENGTH) == expected


def test_an_answer_depends_on_the_picture_of_its_row_alone():
    model, processor, rows = make_vlm("idefics3", 3), make_processor("idefics3"), questions(4)
    before = generate_about_pictures(model, processor, rows, max_new_tokens=LENGTH)
    others = [{**row, "images": [picture(900)] if i == 1 else row["images"]} for i, row in enumerate(rows)]
    rows = Dataset.from_list(others, features=rows.features)
    after = generate_about_pictures(model, processor, rows, max_new_tokens=LENGTH)
    assert [i for i in range(4) if before[i] != after[i]] == [1]


def test_rows_without_a_picture_are_asked_among_others():
    model, processor, rows = make_vlm("idefics3", 3), make_processor("idefics3"), questions(4)
    rows = rows.map(lambda row, i: {"images": row["images"] if i % 2 else []}, with_indices=True)
    expected = [by_hand(model, processor, row) for row in rows]
    assert generate_about_pictures(model, processor, rows, max_new_tokens=LENGTH) == expected


def test_messages_prompts_and_parts_are_the_same_questions():
    processor, pairs = make_processor("idefics3"), questions(3)
    in_parts = []
    for row in pairs:
        content = [{"type": "image", "text": None}, {"type": "text", "text": row["prompt"][0]["content"]}]
        asked = {"images": row["images"], "prompt": [{"role": "user", "content": content}]}
        in_parts.append({**asked, "answer": row["completion"][0]["content"]})
    found = [picture_questions(pairs, processor), picture_questions(chats(3), processor)]
    found.append(picture_questions(Dataset.from_list(in_parts), processor, answer_column="answer"))
    whole = [row["completion"][0]["content"] for row in pairs]
    for each in found:
        assert each.answers == [[text] for text in whole]
        assert each.prompts_as_texts(processor) == found[0].prompts_as_texts(processor)
    assert found[0].prompts_as_texts(processor)[0] == "<|user|><image>what is in<eos><|assistant|>"
    model = make_vlm("idefics3", 3)
    answers = [generate_about_pictures(model, processor, each.rows, max_new_tokens=LENGTH) for each in found]
    assert answers[0] == answers[1] == answers[2]


def test_each_model_reads_through_its_own_processor_and_is_scored():
    processors = {"student": make_processor("idefics3"), "teacher": make_processor("idefics3", do_image_splitting=True)}
    models = {"student": make_vlm("idefics3", 1), "teacher": make_vlm("idefics3", 2)}
    rows = questions(4)
    said = {name: [by_hand(models[name], processors[name], row) for row in rows] for name in models}
    assert said["teacher"] != [by_hand(models["teacher"], processors["student"], row) for row in rows]
    right = [said["student"][i] if i < 2 else said["teacher"][i] for i in range(4)]
    rows = rows.add_column("answer", right)
    asked = picture_questions(rows, processors["student"], answer_column="answer")
    found = evaluate_models(models, processors, questions=asked, scoring=SCORING)
    assert [[row[name]["text"] for row in found.generated] for name in models] == list(said.values())
    exact = next(measure for measure in found.measures if measure.name == "exact_match")
    assert exact.values == {name: sum(a == b for a, b in zip(said[name], right, strict=True)) / 4 for name in models}


def test_a_callback_asks_about_pictures_while_a_student_is_trained(tmp_path):
    processor, rows = make_processor("idefics3"), questions(3, seed=7)
    student = make_vlm("idefics3", 1)
    before = copy.deepcopy(student)
    trainer = KDTrainer(
        student, make_vlm("idefics3", 2), KDConfig(**settings(tmp_path)), chats(4), processing_class=processor
    )
    asked = picture_questions(rows, processor)
    trainer.add_callback(EvaluateCallback(trainer, questions=asked, scoring=SCORING))
    trainer.train()
    expected = evaluate_models({"student": before}, {"student": processor}, questions=asked, scoring=SCORING)
    logged = next(entry for entry in trainer.state.log_history if "evaluate/f1" in entry)
    assert logged["evaluate/f1"] == next(m.values["student"] for m in expected.measures if m.name == "f1")


@NEEDS_5_18
def test_the_command_generates_answers(tmp_path, capsys):
    for name, seed in (("student", 1), ("teacher", 2)):
        make_vlm("idefics3", seed).save_pretrained(tmp_path / name)
        make_processor("idefics3", do_image_splitting=name == "teacher").save_pretrained(tmp_path / name)
    lines = []
    for i, row in enumerate(questions(3)):
        row["images"][0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": row["prompt"][0]["content"], "label": f"right {i}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    cli.main([
        "evaluate", "--model", str(tmp_path / "student"), "--teacher_model", str(tmp_path / "teacher"), "--dataset",
        str(tmp_path / "rows.jsonl"), "--device", "cpu", "--json", "--generate", "--prompt_template", "{question}",
        "--completion_template", "{label}", "--max_new_tokens", str(LENGTH), "--batch_size", "2", "--output_dir",
        str(tmp_path / "out"), "--answer_column", "label",
    ])  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    assert set(data["measures"]) == {"perplexity", "kl", "agreement", "acceptance", "exact_match", "f1"}
    found = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    expected = [by_hand(make_vlm("idefics3", 1), make_processor("idefics3"), row) for row in questions(3)]
    assert [row["student"]["text"] for row in found] == expected
    assert [row["answers"] for row in found] == [[f"right {i}"] for i in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": make_model(vocab_size=VOCAB)}, "reads text alone: remove the column of pictures"),
        ({"max_new_tokens": 250}, "row 0 has a prompt of .* an answer of 250 would go beyond the 256 positions"),
        ({"rows": chats(2).remove_columns("messages").add_column("text", ["<image> a"] * 2)}, "row 0 has no prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, message):
    given = {"model": make_vlm("idefics3"), "processor": make_processor("idefics3"), "rows": questions(2)}
    with pytest.raises(ValueError, match=message):
        generate_about_pictures(**given | change)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (questions(2).remove_columns("completion"), "row 0 has no text as its completion"),
        (questions(2).remove_columns("prompt"), "row 0 has no prompt"),
        (questions(2).select([]), "there are no rows"),
        (Dataset.from_dict({"images": [["nowhere.png"]], "messages": chats(1)["messages"]}), "no such file"),
    ],
)
def test_rows_that_are_no_questions_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        picture_questions(rows, make_processor("idefics3"))
