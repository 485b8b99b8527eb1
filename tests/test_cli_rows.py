"""Which rows the command line reads, and what templates make of them; from SQuAD's rows to its scores."""

import json

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from hf_distill import cli
from hf_distill.cli import training
from hf_distill.evaluate_metrics import Squad
from hf_distill.row_files import first_rows, load_rows
from hf_distill.rows import fill_templates
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.test_cli import error_of, options

PROMPT = "Context: {context}\nQuestion: {question}\nAnswer:"
COMPLETION = " {answers[text][0]}"


def squad_row(index, context, question, answer):
    answers = {"text": [answer, "something else"], "answer_start": [context.index(answer), 0]}
    return {"id": str(index), "context": context, "question": question, "answers": answers}


ROWS = [
    squad_row(0, SENTENCES[0], "Where did the dog run?", "to the river"),
    squad_row(1, SENTENCES[1], "What did Tom give?", "three red apples"),
    squad_row(2, SENTENCES[3], "Where did the bird sit?", "on the fence"),
    squad_row(3, SENTENCES[5], "When does the train leave?", "at nine"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten numbered rows and two more in another split, in every kind of place."""
    folder = tmp_path_factory.mktemp("rows")
    train, test = (Dataset.from_dict({"n": list(numbers)}) for numbers in (range(10), range(10, 12)))
    (folder / "folder").mkdir()
    for name, rows in (("train", train), ("test", test)):
        rows.to_json(folder / "folder" / f"{name}.jsonl")
    train.to_json(folder / "file.jsonl")
    train.save_to_disk(folder / "saved")
    DatasetDict({"train": train, "test": test}).save_to_disk(folder / "saved_splits")
    return folder


@pytest.mark.parametrize("place", ["file.jsonl", "folder", "saved", "saved_splits"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[-2:]", range(8, 10)),
        ("train[20%:50%]", range(2, 5)),
        ("train[:20000]", range(10)),
        ("train[:2]+train[9:]", [0, 1, 9]),
    ],
)
def test_parts_of_a_split_are_taken_from_every_kind_of_place(files, place, split, expected):
    assert load_rows(str(files / place), split)["n"] == list(expected)


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (2, 2), (3, 3), (500, 3)])
def test_the_first_rows_are_all_where_there_are_fewer(number, expected):
    """`Dataset.take` of datasets 4.7 fails past the end."""
    rows = first_rows(Dataset.from_dict({"text": ["a", "b", "c"]}), number)
    assert rows["text"][:] == ["a", "b", "c"][:expected]


def test_splits_add_up_and_a_missing_or_broken_one_names_those_there_are(files):
    assert load_rows(str(files / "saved_splits"), "test+train[:1]")["n"] == [10, 11, 0]
    for split in ("dev[:2]", "train[:x]", ""):
        with pytest.raises(ValueError, match="has the splits train, test, not"):
            load_rows(str(files / "folder"), split)


def test_one_file_is_cut_into_training_and_held_out_rows(folder, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(training, "run_kd", trainers.append)
    parts = {"train_split": "train[:5]", "eval_split": "train[5:]", "max_eval_rows": 2}
    cli.main(["kd", *options(folder, output_dir=tmp_path, **parts)])
    assert len(trainers[0].train_dataset) == 5
    texts = [trainers[0].processing_class.decode(row["input_ids"]) for row in trainers[0].eval_dataset]
    assert [text.removesuffix("<eos>") for text in texts] == SENTENCES[5:7]


def test_templates_make_prompts_and_completions_of_squad_and_dolly_rows():
    rows = fill_templates(Dataset.from_list(ROWS), PROMPT, COMPLETION)
    assert rows.column_names == ["prompt", "completion"]
    assert rows[3] == {
        "prompt": "Context: The train to the city leaves at nine, and we must not be late.\n"
        "Question: When does the train leave?\nAnswer:",
        "completion": " at nine",
    }
    dolly = {"instruction": "Name a {colour}.", "context": "", "response": "Red.", "category": "brainstorming"}
    (row,) = fill_templates(Dataset.from_list([dolly]), "{instruction}\n{context}\n{{}}", " {response}")
    assert row == {"prompt": "Name a {colour}.\n\n{}", "completion": " Red."}  # the rows' own braces stay


def test_a_backslash_and_an_n_are_a_new_line_as_a_shell_hands_them_over():
    shell = fill_templates(Dataset.from_list(ROWS), PROMPT.replace("\n", "\\n"), COMPLETION)
    assert shell["prompt"] == fill_templates(Dataset.from_list(ROWS), PROMPT, COMPLETION)["prompt"]


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("{contxt}", COMPLETION, r"prompt_template '\{contxt\}' does not fit row 0 \(KeyError: 'contxt'\)"),
        (PROMPT, "{answers[texts][0]}", r"completion_template .* row 0 \(KeyError: 'texts'\)"),
        (PROMPT, "{answers[text][2]}", r"completion_template .* row 0 \(IndexError"),
        (PROMPT, "{answers[text][first]}", r"completion_template .* row 0 \(TypeError"),
        ("{}", COMPLETION, r"prompt_template '\{\}' does not fit row 0 \(IndexError"),
        ("{context", COMPLETION, r"prompt_template .* row 0 \(ValueError"),
        ("{context.text}", COMPLETION, r"prompt_template .* row 0 \(AttributeError"),
        ("{nothing}", COMPLETION, r"row 0 \(ValueError: a value is None\)"),
    ],
)
def test_a_template_that_does_not_fit_shows_the_row_in_one_line(prompt, completion, message):
    rows = Dataset.from_list([{**row, "nothing": None} for row in ROWS])
    with pytest.raises(
        ValueError, match=rf"{message}.*which has id: .*context: .*question: .*answers: .*'text': .*nothing: None$"
    ) as error:
        fill_templates(rows, prompt, completion)
    assert "\n" not in str(error.value)


def test_the_row_that_does_not_fit_is_named():
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "answers": {"text": [], "answer_start": []}}])
    with pytest.raises(ValueError, match=r"does not fit row 4 \(IndexError"):
        fill_templates(rows, PROMPT, COMPLETION)


@pytest.mark.parametrize("command", ["kd", "kv", "skd"])
def test_every_command_reads_templates_from_a_recipe(folder, tmp_path, monkeypatch, command):
    """Escapes in a double-quoted YAML string are new lines; held-out rows go through the templates too."""
    Dataset.from_list(ROWS).to_json(tmp_path / "squad.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        r'prompt_template: "Context: {context}\nQuestion: {question}\nAnswer:"'
        f"\n{yaml.safe_dump({'completion_template': COMPLETION})}"
    )
    trainers = []
    for name in ("run_kd", "run_skd"):
        monkeypatch.setattr(training, name, trainers.append)
    data = {"dataset": tmp_path / "squad.jsonl", "eval_dataset": tmp_path / "squad.jsonl", "config": recipe}
    extra = {"max_new_tokens": 8} if command == "skd" else {}
    cli.main([command, *options(folder, output_dir=tmp_path / "out", **data, **extra)])
    for rows in (trainers[0].train_dataset, trainers[0].eval_dataset):
        row = rows[1]
        ids = row.get("input_ids") or row["student_prompt_ids"] + row["completion_ids"]
        assert trainers[0].processing_class.decode(ids).removesuffix("<eos>") == (
            f"Context: {SENTENCES[1]}\nQuestion: What did Tom give?\nAnswer: three red apples"
        )
        if "labels" in row:
            labelled = [label for label in row["labels"] if label != -100]
            assert trainers[0].processing_class.decode(labelled) == " three red apples<eos>"


def test_one_template_alone_is_refused_and_so_is_a_column_beside_it(folder, tmp_path, capsys):
    arguments = options(folder, output_dir=tmp_path, prompt_template="{text}")
    assert "prompt_template and completion_template go together" in error_of(capsys, arguments)
    both = {"prompt_template": "{query}", "completion_template": "{knowledge}", "dataset": folder / "facts.jsonl"}
    for changes, message in (
        ({"prompt_column": "query"}, "--prompt_column does not go together with --prompt_template"),
        ({"knowledge_column": "knowledge"}, "--prompt_template does not go together with --knowledge_column"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["skd", *options(folder, output_dir=tmp_path, **both, **changes)])
        assert message in capsys.readouterr().err


def test_from_squad_rows_to_squad_scores_with_lora_and_a_4bit_teacher(tmp_path, tokenizer):
    """The whole way: templates, `hf-distill kd`, answers of the saved student, exact match and F1.

    The student learns the four answers by heart, so the scores are known: they were zero before.
    """
    pytest.importorskip("bitsandbytes")
    Dataset.from_list(ROWS).to_json(tmp_path / "squad.jsonl")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed=seed, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    run = {"output_dir": tmp_path / "out", "eval_dataset": tmp_path / "squad.jsonl", "learning_rate": 2e-2}
    run |= {"teacher_quantization": "4bit", "kd_weight": 0.0, "use_peft": True, "lora_target_modules": "all-linear"}
    run |= {"prompt_template": PROMPT, "completion_template": COMPLETION, "dataset": tmp_path / "squad.jsonl"}
    run |= {"max_steps": 60, "per_device_train_batch_size": 4, "lora_r": 16, "logging_steps": 20, "seed": 0}
    cli.main(["kd", *options(tmp_path, **run)])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["after"]["student_perplexity"] < report["before"]["student_perplexity"] / 10
    rows = fill_templates(Dataset.from_list(ROWS), PROMPT, COMPLETION)
    student = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    scores = []
    for model in (make_model(seed=1, hidden_size=64, intermediate_size=128), student):
        predictions = [
            {"id": row["id"], "prediction_text": answer(model, tokenizer, prompt)}
            for row, prompt in zip(ROWS, rows["prompt"], strict=True)
        ]
        references = [{"id": row["id"], "answers": row["answers"]} for row in ROWS]
        metric = Squad(cache_dir=str(tmp_path))
        scores.append(metric.compute(predictions=predictions, references=references))
    assert scores == [{"exact_match": 0.0, "f1": 0.0}, {"exact_match": 100.0, "f1": 100.0}]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def answer(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_questions_and_answers_reach_a_pair_of_28_and_24_layers(tmp_path):
    """GSM8K's columns and the depths of Qwen2.5's 1.5B and 0.5B, with grouped-query attention and tied heads."""
    shapes = {"teacher": (28, 48, 6, 2), "student": (24, 32, 4, 1)}
    for seed, (name, (layers, width, heads, kv_heads)) in enumerate(shapes.items()):
        model = make_model(
            "qwen2", seed=seed, num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        )  # fmt: skip
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"question": text, "answer": f"{text}\n#### {i}"} for i, text in enumerate(SENTENCES)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    models = ["--model", str(tmp_path / "student"), "--teacher_model", str(tmp_path / "teacher")]
    data = ["--dataset", str(tmp_path / "rows.jsonl"), "--eval_dataset", str(tmp_path / "rows.jsonl")]
    templates = ["--prompt_template", "{question}\\n", "--completion_template", "{answer}"]
    run = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    cli.main(["kv", *models, *data, *templates, *run, "--logging_steps", "1", "--output_dir", str(tmp_path / "out")])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    cosines = {key for log in state["log_history"] for key in log if key.startswith("kv/cosine_layer_")}
    assert len(cosines) == 24
    assert (tmp_path / "out" / "projectors" / "projector.safetensors").exists()
