import json

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from hf_distill import KDTrainer, cli
from hf_distill.cli import training
from tests.conftest import SENTENCES


@pytest.fixture(scope="module")
def folder(folder):
    """A student and a teacher on disk, and their rows in every kind of file."""
    rows = Dataset.from_dict({"text": SENTENCES})
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(folder / "saved_rows")
    DatasetDict({"train": rows, "test": rows.select(range(4))}).save_to_disk(folder / "saved")
    (folder / "files").mkdir()
    rows.to_json(folder / "files" / "train.jsonl")
    rows.select(range(4)).to_json(folder / "files" / "test.jsonl")
    return folder


def options(folder, **changes):
    settings = {
        "model": folder / "student",
        "teacher_model": folder / "teacher",
        "dataset": folder / "rows.jsonl",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("dataset", ["rows.jsonl", "rows.parquet", "saved", "saved_rows", "files"])
def test_kd_distils_from_every_kind_of_dataset_and_saves_a_plain_student(folder, tmp_path, dataset):
    cli.main(["kd", *options(folder, dataset=folder / dataset, output_dir=tmp_path)])
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "forward_kl" in (tmp_path / "README.md").read_text()
    # Training rows are never measured as held-out ones: only two of these have any.
    assert (tmp_path / "report.png").exists() == (dataset in ("saved", "files"))


def test_kd_reports_the_student_before_and_after_on_held_out_rows(folder, tmp_path, capsys):
    held_out = folder / "rows.parquet"
    cli.main(["kd", *options(folder, output_dir=tmp_path, eval_dataset=held_out, max_steps=8, learning_rate=1e-2)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["kl"] < report["before"]["kl"]
    printed = capsys.readouterr().out
    assert "before" in printed
    assert "acceptance" in printed
    card = (tmp_path / "README.md").read_text()
    for name, form in (("kl", "{:.4f}"), ("student_perplexity", "{:.3f}")):
        assert form.format(report["after"][name]) in card
    for part in ("| before |", "| teacher |", "![", "report.png", "This model is `student`", "on `rows.jsonl`"):
        assert part in card, part
    command = card.partition("```bash\n")[2].partition("```")[0]
    assert "hf-distill kd" in command
    assert "--learning_rate 0.01" in command
    assert "--teacher_model teacher" in command
    assert str(folder) not in card


def test_a_recipe_is_read_and_the_command_line_has_the_last_word(folder, tmp_path):
    recipe = {"divergence": "jensen_shannon", "divergence_params": '{"beta": 0.3}', "kd_weight": 0.9, "use_peft": True}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]})
    )
    arguments = options(folder, output_dir=tmp_path / "out", kd_weight=0.2)
    cli.main(["kd", "--config", str(tmp_path / "recipe.yaml"), *arguments])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "jensen_shannon, beta 0.3" in card
    assert "| weight of the divergence (`kd_weight`) | 0.2 |" in card
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_kv_shows_the_phase_and_saves_the_projector_beside_the_student(folder, tmp_path, capsys, caplog):
    run = {"output_dir": tmp_path, "eval_dataset": folder / "rows.parquet", "max_steps": 4, "cosine_steps": 2}
    cli.main(["kv", *options(folder, kv_layers="[[0, 0], [-1, -1]]", projector="pca", **run)])
    printed = capsys.readouterr().out
    for expected in ("[Step 0002] loss", "[Step 0004] loss", "| cosine", "before"):
        assert expected in printed, expected
    assert "student's layer <- teacher's: 0 <- 0 (100%); 1 <- " in caplog.text
    for name in ("projectors/projector.safetensors", "cosine.png", "report.png"):
        assert (tmp_path / name).exists(), name
    card = (tmp_path / "README.md").read_text()
    assert "mercator, weight 1, projector pca" in card
    assert not any("projector" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())


WRITTEN = {"max_new_tokens": 8, "top_k": 60, "eval_steps": 1}


def test_skd_reports_what_is_written_from_held_out_prompts(folder, tmp_path, capsys):
    held_out = folder / "facts.jsonl"
    columns = {"prompt_column": "question", "completion_column": "answer", "as_chat": True, "samples_steps": 4}
    mix = {"rollout_mix": '{"speculative": 0.5, "dataset": 0.5}'}
    run = {"output_dir": tmp_path, "max_steps": 8, "learning_rate": 1e-2, "max_eval_rows": 4, **WRITTEN}
    data = {"dataset": held_out, "eval_dataset": held_out}
    cli.main(["skd", *options(folder, **data, **columns, **mix, **run)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["after"]["eval_kd"] < report["before"]["eval_kd"]
    printed = capsys.readouterr().out
    for expected in ("before", "accepted", "rollout/samples, step 8", "Which is sentence"):
        assert expected in printed, expected
    assert (tmp_path / "report.png").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_skd_gives_knowledge_to_the_teacher_alone(folder, tmp_path, monkeypatch):
    few_shot = [{"query": "Who?", "knowledge": "Tom ran.", "answer": "Tom."}]
    (tmp_path / "few_shot.json").write_text(json.dumps(few_shot))
    trainers = []
    monkeypatch.setattr(training, "run_skd", trainers.append)
    lupi = {"knowledge_column": "knowledge", "system_prompt": "Read.", "few_shot": tmp_path / "few_shot.json"}
    lupi |= {"knowledge_template": "{query} ({knowledge})", "completion_column": "answer", "max_prompt_length": 200}
    cli.main(["skd", *options(folder, dataset=folder / "facts.jsonl", output_dir=tmp_path, **lupi, **WRITTEN)])
    tokenizer, row = trainers[0].processing_class, trainers[0].train_dataset[0]
    assert tokenizer.decode(row["student_prompt_ids"]) == "<|user|>Where is 0?<eos><|assistant|>"
    assert tokenizer.decode(row["teacher_prompt_ids"]) == (
        "<|system|>Read.<eos><|user|>Who? (Tom ran.)<eos><|assistant|>Tom.<eos>"
        f"<|user|>Where is 0? ({SENTENCES[0]})<eos><|assistant|>"
    )
    assert tokenizer.decode(row["completion_ids"]).startswith(SENTENCES[0][:10])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system_prompt": "Read."}, "--system_prompt needs --knowledge_column"),
        ({"knowledge_column": "knowledge", "as_chat": True}, "--as_chat does not go together with --knowledge_column"),
        ({"knowledge_column": "knowledge", "few_shot": "none.json"}, "few_shot file 'none.json' does not exist"),
        ({"prompt_column": "question", "model": "./nowhere"}, "no model with a tokenizer in the folder"),
        ({"prompt_column": "question", "teacher_model": "./nowhere"}, "teacher_model='./nowhere' cannot be loaded"),
    ],
)
def test_skd_refuses_in_one_line_and_ignores_no_option(folder, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        cli.main(["skd", *options(folder, dataset=folder / "facts.jsonl", output_dir=tmp_path, **changes, **WRITTEN)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "missing.jsonl"}, "does not exist"),
        ({"model": "./nowhere"}, "no model with a tokenizer in the folder or under the hub id './nowhere'"),
        ({"resume_from_checkpoint": "true"}, "there is no checkpoint to resume from"),
        ({"resume_from_checkpoint": "nowhere"}, "there is no checkpoint 'nowhere'"),
        ({"kd_weight": 2}, "kd_weight"),
        ({"divergence_params": '{"beta": 0.5}'}, "no parameters"),
    ],
)
def test_a_wrong_setting_is_told_in_words_without_a_traceback(folder, tmp_path, capsys, changes, message):
    assert message in error_of(capsys, options(folder, output_dir=tmp_path, **changes))


def error_of(capsys, arguments, command="kd") -> str:
    """The one line that the command line ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-distill {command}: error: ")
    return error


def test_an_unknown_setting_in_a_recipe_is_told_in_words(folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("no_such_setting: 3\n")
    arguments = options(folder, output_dir=tmp_path / "out", config=tmp_path / "recipe.yaml")
    assert "no_such_setting" in error_of(capsys, arguments)


def test_an_error_of_the_training_itself_keeps_its_traceback(folder, tmp_path, monkeypatch):
    def fail(self, *_, **__):
        raise ValueError("in the middle")

    monkeypatch.setattr(KDTrainer, "training_step", fail)
    with pytest.raises(ValueError, match="in the middle"):
        cli.main(["kd", *options(folder, output_dir=tmp_path)])


def test_a_missing_split_names_those_there_are(folder, tmp_path, capsys):
    arguments = options(folder, dataset=folder / "saved", train_split="dev", output_dir=tmp_path)
    assert "splits train, test, not 'dev'" in error_of(capsys, arguments)


def test_held_out_rows_that_were_asked_for_have_to_exist(folder, tmp_path, capsys):
    arguments = options(folder, dataset=folder / "saved", eval_split="held_out", output_dir=tmp_path)
    assert "splits train, test, not 'held_out'" in error_of(capsys, arguments)
    arguments = options(folder, eval_dataset=folder / "saved_rows", output_dir=tmp_path)
    assert "splits train, not 'test'" in error_of(capsys, arguments)


@pytest.mark.parametrize(
    ("words", "listed"), [([], ["demo", "kd", "plan kd"]), (["plan", "--help"], ["plan kd", "plan kv", "plan skd"])]
)
def test_commands_are_listed_where_none_is_named(capsys, words, listed):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in listed)
    assert ("demo" in shown) == ("demo" in listed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kdd"], "there is no command 'kdd'; did you mean kd?"),
        (["plan", "--gpu", "24GB"], "there is no command 'plan'; did you mean plan kd or plan kv or plan skd?"),
        (["cache"], "there is no command 'cache'; did you mean cache write or cache info or cache verify?"),
        (["cache", "writ", "--model", "x"], "there is no command 'cache writ'; did you mean cache write?"),
        (
            ["cache", "show"],
            "there is no command 'cache show'; did you mean cache write or cache info or cache verify?",
        ),
        (["xyzzy"], "there is no command 'xyzzy'; --help lists them"),
        (["--alpha"], "the following arguments are required: COMMAND"),
    ],
)
def test_an_unknown_command_is_refused_in_words(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hf-distill: error: {message}"
