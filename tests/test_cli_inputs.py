"""Options, recipes and files that a command cannot use: one line on the screen, before anything is loaded."""

import json
import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import training_args

from hf_distill import cli
from hf_distill.cli.parsing import read_command
from tests.test_cli import error_of, options

RECIPES = {
    "no mapping": ("- kd_weight\n", "has to hold settings as `name: value`, one a line"),
    "nothing": ("", "has to hold settings as `name: value`, one a line"),
    "a tab": ("kd_weight:\n\t- 1\n", "is no YAML: .*line 2"),
    "a bracket that does not end": ("teacher_model: [a, b\nkd_weight: 1\n", "is no YAML: .*line 2"),
    "other letters": ("model: M\xe9moire\n".encode("latin-1"), "is no text in UTF-8"),
    "an unknown name": ("kd_wieght: 0.3\n", "the recipe has 'kd_wieght', which is no option; did you mean --kd_weight"),
    "the name of another library": ("alpha: 0.3\n", "'alpha', which is no option; did you mean --kd_weight"),
    "a word as a number": ("kd_weight: much\n", "kd_weight.*'much'"),
    "env that is a list": ("env: [A]\n", "env in a recipe has to hold environment variables as `name: value`, got"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_used_is_told_in_one_line(tmp_path, capsys, case):
    content, message = RECIPES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = only_line_of(capsys, ["--config", str(recipe), "--model", "a", "--teacher_model", "b", "--dataset", "c"])
    assert_says(error, message)


def test_a_recipe_that_is_no_file_is_told_in_one_line(tmp_path, capsys):
    for place, message in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder")):
        for words in (["--config", str(place)], [f"--config={place}"]):
            assert_says(only_line_of(capsys, words), f"recipe '{place}' {message}")
    assert_says(only_line_of(capsys, ["--model", "a", "--config"]), "--config needs the path of a YAML file")
    (tmp_path / "recipe.yaml").write_text("kd_weight: 0.3\n")
    short = ["--model", "a", "--teacher_model", "b", "--dataset", "c", "--conf", str(tmp_path / "recipe.yaml")]
    assert_says(only_line_of(capsys, short), "--config has to be written in full")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "0.3"], "there is no option --alpha; did you mean --kd_weight?"),
        (["--alfa", "0.3"], "there is no option --alfa; did you mean --kd_weight?"),
        (["--learning-rte", "1"], "there is no option --learning-rte; did you mean --learning_rate?"),
        (["--student", "a"], "there is no option --student; did you mean --model?"),
        (["--dataset_name", "a"], "there is no option --dataset_name; did you mean --dataset?"),
        (
            ["--picture_token", "3"],
            "--picture_token; --picture_tokens is an option of `plan kd`, `plan kv`, `plan skd`",
        ),
        (["--rollout_compile"], "--rollout_compile; --rollout_compile is an option of `skd`, `plan skd`, `doctor skd`"),
        (["--zzzz"], r"there is no option --zzzz; .*--help"),
        (["--seed", "1", "word"], "'word' belongs to no option"),
        (["--kd_weight", "much"], "argument --kd_weight/--kd-weight: invalid float value: 'much'"),
        (["--divergence", "wasserstein"], "invalid choice: 'wasserstein'"),
    ],
)
def test_an_option_that_cannot_be_used_is_told_in_one_line(capsys, words, message):
    given = ["--model", "a", "--teacher_model", "b", "--dataset", "c", *words]
    assert_says(only_line_of(capsys, given), message)


def test_a_machine_without_a_gpu_is_told_both_options(capsys, monkeypatch):
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: False)
    given = ["--model", "a", "--teacher_model", "b", "--dataset", "c"]
    assert_says(only_line_of(capsys, given), "--use_cpu --bf16 false")


def test_options_that_are_missing_are_told_in_one_line(capsys):
    assert_says(only_line_of(capsys, []), "required: --model, --dataset, --teacher_model/--teacher-model")


def test_none_unsets_what_a_recipe_has_set(tmp_path):
    set_by_recipe = {
        "teacher_quantization": "8bit", "teacher_weights": [1, 2], "loss_chunk_size": 4, "completion_only_loss": True,
        "eval_split": "dev", "hub_model_id": "a/b",
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**set_by_recipe, "model": "a", "teacher_model": "b", "dataset": "c"}))
    words = [
        "--config",
        str(recipe),
        "--use_cpu",
        "--bf16",
        "False",
        *(w for n in set_by_recipe for w in (f"--{n}", "None")),
    ]
    arguments, args, _ = read_command("kd", words)
    for name in set_by_recipe:
        assert [getattr(side, name) for side in (arguments, args) if hasattr(side, name)] == [None], name
    recipe.write_text("teacher_quantization: None\nmodel: a\nteacher_model: b\ndataset: c\n")
    _, args, _ = read_command("kd", ["--config", str(recipe), "--use_cpu", "--bf16", "no"])
    assert args.teacher_quantization is None


def test_a_single_value_in_a_recipe_is_a_list_of_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('model: m\nstop: "\\nQ:"\nmetrics: number\ntasks: arc_easy\ninclude_path: None\n')
    (arguments,) = read_command("evaluate", ["--config", str(recipe)])
    assert (arguments.stop, arguments.metrics, arguments.tasks) == (["\nQ:"], ["number"], ["arc_easy"])
    assert arguments.include_path is None
    recipe.write_text("model: m\noutput_dir: out\nlayers: 3\n")
    assert read_command("prune", ["--config", str(recipe)])[0].layers == [3]


FEW_SHOT = {
    "broken": ('[{"query": "Who?"', "is no JSON: Expecting ',' delimiter"),
    "an object": ('{"query": "Who?"}', "has to hold a list of turns"),
    "a list of words": ('["Who?"]', "has to hold a list of turns"),
    "other letters": ("M\xe9moire".encode("latin-1"), "is no JSON"),
}


@pytest.mark.parametrize("case", FEW_SHOT)
def test_a_file_of_turns_that_cannot_be_used_is_told(folder, tmp_path, capsys, case):
    content, message = FEW_SHOT[case]
    (tmp_path / "turns.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    changes = {"knowledge_column": "knowledge", "few_shot": tmp_path / "turns.json", "output_dir": tmp_path / "out"}
    error = error_of(capsys, options(folder, dataset=folder / "facts.jsonl", **changes), "skd")
    assert_says(error, f"few_shot file '.*turns.json' {message}")


def test_columns_that_are_not_there_or_twice_are_told(folder, tmp_path, capsys):
    Dataset.from_dict({"prompt": ["a"], "question": ["b"]}).to_json(tmp_path / "rows.jsonl")
    for changes, message in (
        ({"prompt_column": "quest"}, "--prompt_column 'quest' is no column; the rows have prompt, question"),
        ({"completion_column": "answer"}, "--completion_column 'answer' is no column; the rows have prompt, question"),
        ({"prompt_column": "question"}, "--prompt_column 'question': the rows have a column 'prompt' as well"),
    ):
        words = options(folder, dataset=tmp_path / "rows.jsonl", output_dir=tmp_path / "out", **changes)
        assert_says(error_of(capsys, words, "skd"), message)


def test_rows_that_cannot_be_read_are_told_by_every_command(folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    for changes in ({"dataset": tmp_path / "rows.jsonl"}, {"eval_dataset": tmp_path / "rows.jsonl"}):
        for command in ("kd", "kv", "skd"):
            error = error_of(capsys, options(folder, output_dir=tmp_path / "out", **changes), command)
            assert_says(error, "rows.jsonl' is broken: line 2 is no JSON object")
    prune = [
        "--model",
        "a",
        "--num_layers",
        "1",
        "--dataset",
        tmp_path / "rows.jsonl",
        "--output_dir",
        tmp_path / "out",
    ]
    assert_says(error_of(capsys, map(str, prune), "prune"), "rows.jsonl' is broken: line 2 is no JSON object")


def test_a_folder_of_adapters_is_trained_on_and_takes_no_others(folder, tmp_path, capsys):
    lora = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2", "--learning_rate", "0.01"]
    cli.main(["kd", *options(folder, output_dir=tmp_path / "first"), *lora])
    second = options(folder, model=tmp_path / "first", output_dir=tmp_path / "second", learning_rate=0.01)
    cli.main(["kd", *second])
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert_says(error_of(capsys, [*second, *lora]), "the student has adapters already.*leave peft_config out")


def only_line_of(capsys, words) -> str:
    """What stands on the screen when `hf-distill kd` has ended with an error: one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["kd", *words])
    assert stopped.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and "warnings.warn" not in line
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("hf-distill kd: error: ")
    return lines[0]


def assert_says(line: str, pattern: str) -> None:
    assert re.search(pattern, line), line
