"""`hf-distill prune`, the stages of `kd`, `merge` and the same as an example, with a tiny model from first to last."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import cli, evaluate_fidelity
from hf_distill.pruning import original_layers, rank_layers, restore_layers
from tests.conftest import SENTENCES, make_model
from tests.test_examples import load_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model of six layers, rows, and the model pruned to three of them with bundles B (1, 4) and C (3)."""
    folder = tmp_path_factory.mktemp("prune")
    make_model(num_hidden_layers=6).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    Dataset.from_dict({"text": SENTENCES}).to_json(folder / "rows.jsonl")
    groups = ["--layers", "3", "1", "4", "--groups", '{"B": [1, 4], "C": [3]}']
    cli.main(["prune", "--model", str(folder / "teacher"), "--output_dir", str(folder / "pruned"), *groups])
    return folder


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def kd_options(folder, **changes):
    settings = {
        "model": folder / "pruned", "teacher_model": folder / "teacher", "dataset": folder / "rows.jsonl",
        "eval_dataset": folder / "rows.jsonl", "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
        "kd_weight": 1.0,
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "gradient_checkpointing": False, "use_peft": True, "lora_r": 4, "lora_target_modules": "q_proj", **changes,
    }  # fmt: skip
    return [
        part for name, value in settings.items() if value is not None for part in (f"--{name}", *str(value).split())
    ]


def adapted_layers(adapter):
    return {int(name.split(".layers.")[1].split(".")[0]) for name in load_file(adapter / "adapter_model.safetensors")}


def error_of(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-distill {arguments[0]}: error: ")
    return error


def test_prune_drops_what_ranks_first_and_says_so(folder, tmp_path, capsys, tokenizer):
    options = {"model": folder / "teacher", "dataset": folder / "rows.jsonl", "num_layers": 2, "max_rows": 5}
    options |= {"batch_size": 2, "output_dir": tmp_path}
    cli.main(["prune", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])
    rows = Dataset.from_dict({"text": SENTENCES[:5]})
    teacher, student = load(folder / "teacher"), load(tmp_path)
    spans = rank_layers(teacher, rows, tokenizer, 2)
    assert original_layers(student) == [i for i in range(6) if i not in spans[0].layers]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    fidelity = evaluate_fidelity(student, teacher, rows, tokenizer)
    assert (tmp_path / "report.html").exists()
    report = (tmp_path / "pruning.md").read_text()
    lines = [f"| {' '.join(map(str, span.layers))} | {span.distance:.4f} |" for span in spans]
    assert "\n".join(lines) in report
    assert f"| pruned | {fidelity['student_perplexity']:.3f} |" in report
    assert f"| B | {spans[0].start}-{spans[0].start + 1} |" in report
    share = student.num_parameters() / teacher.num_parameters()
    assert f"{share:.1%} of the parameters are kept" in report
    assert "distance" in capsys.readouterr().out
    whole = restore_layers(student, tmp_path / "bundles").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in teacher.state_dict().items())


def test_prompts_and_completions_of_other_columns_rank_layers(folder, tmp_path, tokenizer):
    halves = [text.split(" ", 3) for text in SENTENCES]
    table = [{"instruction": " ".join(words[:3]), "output": words[3]} for words in halves]
    Dataset.from_list(table).to_json(tmp_path / "table.jsonl")
    templates = ["--prompt_template", "{instruction}", "--completion_template", " {output}"]
    options = ["--model", str(folder / "teacher"), "--dataset", str(tmp_path / "table.jsonl"), "--num_layers", "3"]
    cli.main(["prune", *options, *templates, "--output_dir", str(tmp_path / "out")])
    rows = Dataset.from_list([{"prompt": row["instruction"], "completion": " " + row["output"]} for row in table])
    spans = rank_layers(load(folder / "teacher"), rows, tokenizer, 3)
    report = (tmp_path / "out" / "pruning.md").read_text()
    expected = [f"| {' '.join(map(str, span.layers))} | {span.distance:.4f} |" for span in spans]
    assert "\n".join(expected) in report


def test_recovery_in_stages_ends_with_the_whole_model(folder, tmp_path):
    """A, then A+B, then A+B+C: adapters are on the restored layers alone, each stage goes on from the one before."""
    teacher, bundles = load(folder / "teacher"), folder / "pruned" / "bundles"
    cli.main(["kd", *kd_options(folder, output_dir=tmp_path / "A_adapter")])
    cli.main(["merge", "--adapter", str(tmp_path / "A_adapter"), "--output_dir", str(tmp_path / "A")])
    assert adapted_layers(tmp_path / "A_adapter") == {0, 1, 2}
    stages = {"B": ("A", [0, 1, 2, 4, 5], {1, 3}, ["C"]), "C": ("AB", [0, 1, 2, 3, 4, 5], {3}, [])}
    for stage, (model, layers, restored, missing) in stages.items():
        adapter, merged = tmp_path / f"{stage}_adapter", tmp_path / f"A{'B' * (stage == 'C')}{stage}"
        targets = {"lora_target_modules": "q_proj" if stage == "B" else "q_proj down_proj"}
        options = {"model": tmp_path / model, "stage": stage, "bundle_dir": bundles, "output_dir": adapter, **targets}
        cli.main(["kd", *kd_options(folder, **options)])
        assert adapted_layers(adapter) == restored
        base = load(adapter / "restored")
        assert original_layers(base) == layers
        cli.main(["merge", "--adapter", str(adapter), "--output_dir", str(merged)])
        before, after = base.state_dict(), load(merged).state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        parts = targets["lora_target_modules"].split()
        assert {name.split(".")[2] for name in changed} == set(map(str, restored))
        assert {name.split(".")[-2] for name in changed} == set(parts)
        report = json.loads((adapter / "report.json").read_text())
        assert list(report) == [f"without {stage}", "before", "after", *(f"with {name} untrained" for name in missing)]
        assert report["after"]["kl"] < report["before"]["kl"]
    assert [part.name for part in tmp_path.iterdir() if part.name.startswith("ABC")] == ["ABC"]
    assert load(tmp_path / "ABC").config.num_hidden_layers == teacher.config.num_hidden_layers
    # What no stage has trained is still the teacher's.
    found = load(tmp_path / "ABC").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in teacher.state_dict().items() if "v_proj" in name)


def test_a_stage_is_merged_from_another_working_directory_and_keeps_its_model(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"stage": "B", "bundle_dir": folder / "pruned" / "bundles", "output_dir": "out", "eval_dataset": None}
    cli.main(["kd", *kd_options(folder, **options)])
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main(["merge", "--adapter", "../out", "--output_dir", "merged"])
    assert original_layers(load("merged")) == [0, 1, 2, 4, 5]
    monkeypatch.chdir(tmp_path)
    assert "restored is the model that the adapter in out belongs to" in error_of(
        capsys, ["kd", *kd_options(folder, **options)]
    )


def test_pruning_moves_an_earlier_run_aside_and_never_writes_over_the_model(folder, tmp_path, capsys):
    for name in ("adapter_config.json", "report.md", "model-00001-of-00002.safetensors", "rows.jsonl"):
        (tmp_path / name).write_text("{}")
    cli.main(["prune", "--model", str(folder / "teacher"), "--output_dir", str(tmp_path), "--layers", "1"])
    assert {path.name for path in (tmp_path / "_earlier-1").iterdir()} == {
        "adapter_config.json", "report.md", "model-00001-of-00002.safetensors"
    }  # fmt: skip
    assert original_layers(load(tmp_path)) == [0, 2, 3, 4, 5]
    command = ["prune", "--model", str(folder / "teacher"), "--output_dir", str(folder / "teacher"), "--layers", "1"]
    assert "is the folder of the model" in error_of(capsys, command)


def test_every_model_of_a_stage_is_measured_as_what_it_is(folder, tmp_path, tokenizer):
    bundles = folder / "pruned" / "bundles"
    options = {"stage": "B", "bundle_dir": bundles, "output_dir": tmp_path, "lora_target_modules": "all-linear"}
    cli.main(["kd", *kd_options(folder, **options)])
    assert adapted_layers(tmp_path) == {1, 3}
    report = json.loads((tmp_path / "report.json").read_text())
    student = load(folder / "pruned")
    with_b = restore_layers(student, bundles, ["B"])
    trained = PeftModel.from_pretrained(load(tmp_path / "restored"), tmp_path).merge_and_unload()
    with_c = restore_layers(trained, bundles, ["C"])
    rows, teacher = Dataset.from_dict({"text": [text + "<eos>" for text in SENTENCES]}), load(folder / "teacher")
    models = {"without B": student, "before": with_b, "after": trained, "with C untrained": with_c}
    for name, model in models.items():
        expected = evaluate_fidelity(model, teacher, rows, tokenizer)
        assert report[name] == pytest.approx(expected, rel=1e-3), name


def test_a_stage_without_held_out_rows_trains_all_the_same(folder, tmp_path):
    options = {"stage": "C", "bundle_dir": folder / "pruned" / "bundles", "output_dir": tmp_path, "eval_dataset": None}
    cli.main(["kd", *kd_options(folder, **options)])
    assert adapted_layers(tmp_path) == {2}
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "B"}, "--stage and --bundle_dir go together"),
        ({"bundle_dir": "bundles"}, "--stage and --bundle_dir go together"),
        ({"stage": "B", "bundle_dir": "bundles", "use_peft": False}, "it needs --use_peft"),
        ({"stage": "B", "bundle_dir": "bundles", "lora_modules_to_save": "lm_head"}, "neither --lora_modules_to_save"),
        ({"stage": "B", "bundle_dir": "nowhere"}, "nowhere/manifest.json is not a readable list of bundles"),
        ({"stage": "D", "bundle_dir": "bundles"}, "there is no bundle 'D'"),
        ({"stage": "B", "bundle_dir": "bundles", "model": "teacher"}, "the model has no pruned_from"),
        ({"stage": "B", "bundle_dir": "bundles", "model": "nowhere"}, "no model with a tokenizer in the folder"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_in_one_line(folder, tmp_path, capsys, changes, message):
    if "bundle_dir" in changes:
        changes = {**changes, "bundle_dir": folder / "pruned" / changes["bundle_dir"]}
    if "model" in changes:
        changes = {**changes, "model": folder / changes["model"]}
    assert message in error_of(capsys, ["kd", *kd_options(folder, output_dir=tmp_path, **changes)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give either --layers, or --num_layers and --dataset"),
        ("--layers 1 --num_layers 2", "give either --layers, or --num_layers and --dataset"),
        ("--num_layers 2", "--num_layers needs --dataset"),
        ('--num_layers 2 --dataset rows.jsonl --groups {"B":[1,2]}', "it needs --layers"),
        ("--layers 1 9", "there is no layer 9"),
        ("--layers 1 --groups B", "groups have to be JSON such as"),
        ('--layers 1 2 --groups {"B":[1]}', "groups have to hold each of the layers [1, 2] once"),
        ("--num_layers 6 --dataset rows.jsonl", "num_layers has to be at least 1 and below 6"),
        ("--num_layers 2 --dataset rows.jsonl --prompt_template {text}", "completion_template go together"),
        ("--layers 1 --prompt_template {text} --completion_template x", "--prompt_template needs --dataset"),
        ("--num_layers 1 --dataset missing.jsonl", "'missing.jsonl' does not exist"),
        ("--layers 1 --model nowhere", "model 'nowhere' cannot be loaded with its tokenizer"),
        ("--layers 1 --output_dir pruned", "pruned/bundles has bundles already"),
    ],
)
def test_a_pruning_that_cannot_be_is_refused_in_one_line(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    options = ["--model", "teacher", "--output_dir", str(tmp_path / "out"), *options.split()]
    assert message in error_of(capsys, ["prune", *options])
    assert not (tmp_path / "out").exists()


def test_merge_refuses_in_one_line(folder, tmp_path, capsys):
    options = ["--adapter", str(folder / "pruned"), "--output_dir", str(tmp_path)]
    assert "has no adapter" in error_of(capsys, ["merge", *options])


def test_the_example_prunes_and_recovers_in_stages(folder, tmp_path):
    options = {"model": folder / "teacher", "dataset": folder / "rows.jsonl", "num_layers": 3, "output_dir": tmp_path}
    options |= {"kd_weight": 1.0, "learning_rate": 3e-3, "max_steps": 4, "per_device_train_batch_size": 4}
    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    fidelity = load_example("prune_and_recover").main(arguments)
    assert fidelity["A"] > fidelity["B"] > fidelity["C"] > 0
    layers = {stage: original_layers(load(tmp_path / stage)) for stage in "ABC"}
    assert [len(layers[stage]) for stage in "ABC"] == [3, 5, 6]
    assert set(layers["A"]) < set(layers["B"])
