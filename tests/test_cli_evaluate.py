import json

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_distill import cli, evaluate_fidelity
from hf_distill.cli import evaluating
from hf_distill.cli.evaluating import _base_of
from hf_distill.demo import TEACHER
from hf_distill.named import load_tokenizer
from hf_distill.teachers.loading import load_teacher
from tests.conftest import SENTENCES, make_model


def evaluate(folder, output, capsys, **changes):
    options = {"model": folder / "student", "dataset": folder / "rows.jsonl", "output_dir": output, **changes}
    words = [part for name, value in options.items() for part in (f"--{name}", *map(str, as_words(value)))]
    capsys.readouterr()
    cli.main(["evaluate", *words])
    return capsys.readouterr().out


def as_words(value):
    return value if isinstance(value, list) else [value]


def written(output):
    return json.loads((output / "evaluation.json").read_text())


def test_a_table_has_base_student_and_teacher_and_a_file_the_numbers(folder, tokenizer, tmp_path, capsys):
    base = make_model(seed=5)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = {"teacher_model": folder / "teacher", "base": tmp_path / "base", "batch_size": 3}
    printed = evaluate(folder, tmp_path / "out", capsys, **changes)
    for word in ("base", "student", "teacher", "perplexity", "kl"):
        assert word in printed
    models = {"base": base, **{name: make_model(seed=seed) for name, seed in (("student", 1), ("teacher", 2))}}
    rows = Dataset.from_dict({"text": SENTENCES})
    measures = written(tmp_path / "out")["measures"]
    for name in ("base", "student"):
        expected = evaluate_fidelity(models[name], models["teacher"], rows, tokenizer)
        assert measures["kl"]["values"][name] == pytest.approx(expected["kl"], rel=1e-4)
        assert measures["perplexity"]["values"][name] == pytest.approx(expected["student_perplexity"], rel=1e-4)
    assert measures["kl"]["num_rows"] == len(SENTENCES)
    assert written(tmp_path / "out")["models"]["base"] == str(tmp_path / "base")


def test_an_offloaded_teacher_is_measured_and_answers(folder, tmp_path, capsys):
    Dataset.from_list([{"prompt": "The sun", "completion": " was warm."}]).to_json(tmp_path / "rows.jsonl")
    found = []
    for device in ("cpu", "offload"):
        changes = {"teacher_model": folder / "teacher", "teacher_device": device, "generate": True, "max_new_tokens": 4}
        evaluate(folder, tmp_path / device, capsys, dataset=tmp_path / "rows.jsonl", **changes)
        found.append({name: each["values"] for name, each in written(tmp_path / device)["measures"].items()})
    assert found[0].keys() == found[1].keys() >= {"kl", "f1"}
    for name in found[0]:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)


def test_the_split_is_held_out_if_there_is_such_a_one_and_is_told(folder, tmp_path, capsys):
    texts = Dataset.from_dict({"text": SENTENCES})
    DatasetDict(train=texts, validation=texts.select([0, 1])).save_to_disk(tmp_path / "both")
    DatasetDict(train=texts).save_to_disk(tmp_path / "train")
    evaluate(folder, tmp_path / "out", capsys, dataset=tmp_path / "both")
    found = written(tmp_path / "out")
    assert (found["split"], found["measures"]["perplexity"]["num_rows"], found["notes"]) == ("validation", 2, [])
    printed = evaluate(folder, tmp_path / "out", capsys, dataset=tmp_path / "train")
    assert "these are rows of its split train" in " ".join(printed.split())
    evaluate(folder, tmp_path / "out", capsys, dataset=tmp_path / "train", split="train[:3]")
    assert (written(tmp_path / "out")["split"], written(tmp_path / "out")["notes"]) == ("train[:3]", [])
    evaluate(folder, tmp_path / "out", capsys)  # a file
    assert written(tmp_path / "out")["notes"] == []


def test_messages_are_measured_beside_a_column_of_prompts(folder, tmp_path, capsys):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    Dataset.from_list([{"prompt": "Who?", "messages": messages}] * 2).to_json(tmp_path / "rows.jsonl")
    evaluate(folder, tmp_path, capsys, dataset=tmp_path / "rows.jsonl")
    alone = written(tmp_path)["measures"]["perplexity"]["values"]
    evaluate(folder, tmp_path, capsys, dataset=tmp_path / "rows.jsonl", generate=True, max_new_tokens=2)
    assert written(tmp_path)["measures"]["perplexity"]["values"] == alone
    Dataset.from_list([{"prompt": "Who?", "answer": "Ada."}]).to_json(tmp_path / "prompts.jsonl")
    prompts = {"dataset": tmp_path / "prompts.jsonl", "answer_column": "answer", "generate": True, "max_new_tokens": 2}
    assert "The rows are prompts alone" in evaluate(folder, tmp_path, capsys, **prompts)


def test_json_is_the_file_and_nothing_else_is_printed(folder, tmp_path, capsys):
    printed = evaluate(folder, tmp_path, capsys, json=True, max_rows=2)
    assert json.loads(printed) == written(tmp_path)
    assert list(json.loads(printed)["models"]) == ["student"]


def test_the_packaged_teacher_finishes_its_stories_and_its_answers_are_written(tmp_path, capsys):
    """Its own continuations are the right answers, so it is right everywhere."""
    from hf_distill.evaluating.generation import generate_answers

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER), load_tokenizer(TEACHER, None, False)
    prompts = ["One day, a girl", "Tom had a dog", "The sun was"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    answers = generate_answers(teacher, tokenizer, ids, max_new_tokens=12)
    assert all(answers)
    rows = [{"story": prompt, "end": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    printed = evaluate(
        tmp_path, tmp_path / "out", capsys, model=TEACHER, teacher_model=TEACHER, generate=True, max_new_tokens=12,
        prompt_column="story", answer_column="end", metrics=["exact_match", "f1", "squad"],
    )  # fmt: skip
    assert printed.count("100.0%") == 8
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["student"]["text"] for line in lines] == answers


def test_templates_and_the_columns_of_squad_and_gsm8k_make_questions(folder, tmp_path, capsys):
    rows = [
        {"context": "Ada was born in 1815.", "question": "When?", "answers": {"text": ["1815", "in 1815"]}},
        {"context": "Bo is 7.", "question": "How old?", "answers": {"text": ["7"]}},
    ]
    Dataset.from_list(rows).to_json(tmp_path / "squad.jsonl")
    evaluate(
        folder, tmp_path, capsys, dataset=tmp_path / "squad.jsonl", generate=True, answer_column="answers",
        prompt_template="Context: {context}\\nQuestion: {question}\\nAnswer:", completion_template=" {context}",
        metrics=["squad", "number"], max_new_tokens=4, stop="\\nQuestion:",
    )  # fmt: skip
    assert list(written(tmp_path)["measures"]) == ["perplexity", "squad_exact_match", "squad_f1", "number"]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["answers"] == ["1815", "in 1815"]


def test_rows_with_knowledge_are_answered_without_it(folder, tmp_path, capsys):
    printed = evaluate(
        folder, tmp_path, capsys, dataset=folder / "facts.jsonl", teacher_model=folder / "teacher", generate=True,
        knowledge_column="knowledge", answer_column="answer", max_new_tokens=4,
    )  # fmt: skip
    assert list(written(tmp_path)["measures"]) == ["exact_match", "f1"]
    assert "perplexity" not in printed


def test_the_base_of_an_adapter_is_found_and_its_page_shows_the_table(folder, tmp_path, capsys):
    run = ["--model", folder / "student", "--teacher_model", folder / "teacher", "--dataset", folder / "rows.jsonl"]
    run += ["--eval_dataset", folder / "rows.jsonl", "--output_dir", tmp_path / "run", "--max_steps", 1, "--use_peft"]
    run += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    cli.main(["kd", *map(str, run)])
    evaluate(folder, tmp_path / "run", capsys, model=tmp_path / "run", teacher_model=folder / "teacher", max_rows=4)
    found = written(tmp_path / "run")
    assert found["models"]["base"] == str(folder / "student")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "hf-distill evaluate, on 4 rows" in page
    cli.main(["report", str(tmp_path / "run"), "--output_file", str(tmp_path / "page.html")])
    assert "hf-distill evaluate, on 4 rows" in (tmp_path / "page.html").read_text()


def test_adapters_without_a_tokenizer_are_read_with_their_base_models(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    evaluate(folder, tmp_path / "out", capsys, model=tmp_path / "adapter", max_rows=2)
    values = written(tmp_path / "out")["measures"]["perplexity"]["values"]
    assert values["base"] == pytest.approx(values["student"])  # LoRA begins at its base


def other_model(folder, seed=5):
    """A model with as many token ids as the others, which mean something else."""
    make_model(seed=seed).save_pretrained(folder)
    load_tokenizer(TEACHER, None, False).save_pretrained(folder)
    return folder


def test_a_base_of_another_vocabulary_is_refused_or_left_out(folder, tmp_path, capsys):
    other = other_model(tmp_path / "other")
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys, base=other)
    assert "has another vocabulary than the student" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(folder / "student").save_pretrained(tmp_path / "run")
    load_tokenizer(str(folder / "student"), None, False).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"model": str(other)}))
    evaluate(folder, tmp_path / "out", capsys, model=tmp_path / "run", max_rows=2)
    found = written(tmp_path / "out")
    assert list(found["models"]) == ["student"]
    assert "which is left out: its vocabulary is another one" in found["notes"][0]


def test_a_teacher_without_a_tokenizer_is_told(folder, tmp_path, capsys):
    make_model(seed=2).save_pretrained(tmp_path / "teacher")
    evaluate(folder, tmp_path, capsys, teacher_model=tmp_path / "teacher", max_rows=2)
    assert written(tmp_path)["notes"] == ["The teacher has no tokenizer: it reads with the student's."]


def test_a_run_that_continued_an_adapter_began_as_this_adapter(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    for name in ("first", "second"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    assert _base_of(str(tmp_path / "second")) == str(folder / "student")
    (tmp_path / "second" / "settings.json").write_text(json.dumps({"model": str(tmp_path / "first")}))
    assert _base_of(str(tmp_path / "second")) == str(tmp_path / "first")


def test_code_of_a_model_is_run_where_this_is_wanted_and_errors_name_the_option(folder, tmp_path, capsys, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options["trust_remote_code"])
        raise ValueError("seen")

    monkeypatch.setattr(evaluating, "load_teacher", load)
    for options in ({}, {"trust_remote_code": True}):
        with pytest.raises(SystemExit):
            evaluate(folder, tmp_path, capsys, **options)
    assert asked == [False, True]
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"--model '.*nothing' cannot be loaded"):
        load_teacher(str(tmp_path / "nothing"), device=None, called="--model ")


def test_what_was_measured_before_an_error_is_written(folder, tmp_path, capsys, monkeypatch):
    measure = evaluating.evaluate_models

    def fail_in_tasks(*models, tasks=None, **options):
        if tasks is not None:
            raise ValueError("no such question")
        return measure(*models, **options)

    monkeypatch.setattr(evaluating, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluating, "evaluate_models", fail_in_tasks)
    evaluate(folder, tmp_path, capsys, max_rows=3)
    whole = written(tmp_path)
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys, tasks="a_task", max_rows=2)
    place = tmp_path / "evaluation-unfinished"
    assert f"tasks: no such question (what was measured before is in {place})" in capsys.readouterr().err
    assert list(written(place)["measures"]) == ["perplexity"]
    assert written(place)["notes"] == ["The measuring has not finished: tasks are missing."]
    assert written(tmp_path) == whole  # an earlier evaluation stays
    evaluate(folder, tmp_path, capsys, max_rows=2)
    assert written(tmp_path) != whole
    assert not place.exists() or written(place)["notes"]


def test_the_base_of_a_stage_is_its_restored_model_and_that_of_a_continued_adapter_is_the_adapter(tmp_path):
    def adapter(name, base, model):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / base)}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "settings.json").write_text(json.dumps({"model": str(tmp_path / model)}))
        return folder

    for name in ("restored", "pruned"):
        (tmp_path / name).mkdir()
    stage = adapter("stage", "restored", "pruned")
    assert _base_of(str(stage)) == str(tmp_path / "restored")
    assert _base_of(str(adapter("continued", "restored", "stage"))) == str(stage)


@pytest.mark.parametrize("device", ["sharded", "paired"])
def test_layouts_of_several_processes_are_refused(folder, tmp_path, capsys, device):
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys, teacher_model=folder / "teacher", teacher_device=device)
    assert f"--teacher_device {device} is for several processes" in capsys.readouterr().err


def test_tasks_need_the_chat_template_that_they_go_through(folder, tmp_path, capsys):
    make_model(seed=1).save_pretrained(tmp_path / "plain")
    tokenizer = load_tokenizer(str(folder / "student"), None, False)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys, model=tmp_path / "plain", tasks="arc_easy", apply_chat_template=True)
    assert "the student's tokenizer has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at/all"}, "--model 'nowhere/at/all': there is no such folder"),
        ({"base": "nowhere/at/all"}, "--base 'nowhere/at/all': there is no such folder"),
        ({"teacher_model": "cache:store"}, "is no model that can be loaded"),
        ({"teacher_model": "http://host/v1"}, "is no model that can be loaded"),
        ({"generate": True, "metrics": "bleu"}, "there is no metric 'bleu'"),
        ({"generate": True}, "row 0 has no text as its completion"),
        ({"generate": True, "answer_column": "text"}, "row 0 has no prompt"),
        ({"prompt_column": "text"}, "prompts without completions, so there is nothing to measure"),
        ({"knowledge_column": "knowledge"}, "it needs --generate"),
        ({"answer_column": "text"}, "--answer_column needs --generate"),
        ({"query_column": "text"}, "--query_column needs --knowledge_column"),
        ({"prompt_template": "{text}"}, "go together"),
        ({"tasks": "arc_easy", "teacher_device": "offload"}, "--tasks needs the teacher whole on a device"),
        ({"device": "gpu:7"}, "--device 'gpu:7' is no device of this machine"),
        ({"max_rows": 0}, "batch_size and max_rows have to be at least 1"),
        ({"teacher_quantization": "2bit"}, "teacher_quantization has to be one of"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys, **changes)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_several_processes_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        evaluate(folder, tmp_path, capsys)
    assert "evaluate runs in one process" in capsys.readouterr().err
