"""Every example, recipe and launch configuration runs or parses: what is shown to users works."""

import importlib.util
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_distill import KDConfig, KDTrainer, cli
from tests import vision
from tests.conftest import SENTENCES, make_tokenizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kd_is_a_drop_in_script(folder, tmp_path):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    run = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    data = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path)]
    trainer = load_example("kd").main([*models, *data, *run, "--use_peft", "--lora_target_modules", "q_proj", "v_proj"])
    assert trainer.state.global_step == 2
    assert (tmp_path / "adapter_model.safetensors").exists()


@vision.NEEDS_5_18
def test_vision_distils_on_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("student", 1), ("teacher", 2)):
        vision.make_vlm("idefics3", seed).save_pretrained(tmp_path / name)
        vision.make_processor("idefics3", do_image_splitting=name == "teacher").save_pretrained(tmp_path / name)
    write_picture_rows(tmp_path, vision.questions(10))
    run = ["--max_steps", "4", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    models = ["--model", "student", "--teacher_model", "teacher", "--dataset", "rows.jsonl", "--output_dir", "out"]
    trainer = load_example("vision").main([*models, *run, "--learning_rate", "0.01"])
    assert type(trainer.teacher).__name__ == "OwnViewTeacher"
    before, after = re.search(r"eval_kd: (\S+) -> (\S+)", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    assert (tmp_path / "out" / "processor_config.json").exists()


def test_kd_lora_describes_trains_and_merges(folder, tmp_path, capsys):
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    run = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    data = ["--dataset", str(folder / "rows.jsonl"), "--output_dir", str(tmp_path)]
    trainer = load_example("kd_lora").main([*models, *data, *run, "--learning_rate", "0.01"])
    text = capsys.readouterr().out
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trained:,} trainable parameters" in text
    assert "mlp.down_proj" in text[text.index("effective") :]
    ids = {"input_ids": torch.arange(2, 12).unsqueeze(0)}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, trainer.model.eval()(**ids).logits, rtol=1e-4, atol=1e-4)


def test_quantized_teacher_measures_what_the_bits_cost(folder, capsys):
    pytest.importorskip("bitsandbytes")
    options = ["--teacher", str(folder / "teacher"), "--data", str(folder / "rows.jsonl")]
    found = load_example("quantized_teacher").main(options)
    assert 0 < found["int8"]["kl"] < found["NF4"]["kl"]
    assert "| NF4 |" in capsys.readouterr().out


def test_several_teachers_by_name(folder, tmp_path):
    teachers = [f"first={folder / 'teacher'}", f"second={folder / 'student'}"]
    options = ["--student", str(folder / "student"), "--teachers", *teachers, "--data", str(folder / "rows.jsonl")]
    run = ["--weights", "3", "1", "--steps", "2", "--use_cpu", "--output_dir", str(tmp_path)]
    trainer = load_example("multi_teacher").main([*options, *run])
    assert trainer.teacher.name == "0.75 first + 0.25 second"
    assert (tmp_path / "model.safetensors").exists()


def test_cache_trains_two_students_from_one_store(folder, tmp_path, capsys):
    options = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    places = ["--store", str(tmp_path / "store"), "--output_dir", str(tmp_path / "out")]
    run = ["--data", str(folder / "rows.jsonl"), "--steps", "4", "--use_cpu"]
    results = load_example("cache").main([*options, *places, *run])
    assert results["before"]["kl"] > results["forward_kl"]["kl"]
    assert "hidden states, int8: " in capsys.readouterr().out
    assert (tmp_path / "out" / "reverse_kl" / "model.safetensors").exists()


def test_cross_tokenizer_shows_how_the_two_read_a_text(folder, tmp_path, capsys):
    make_tokenizer(corpus=[text[::-1] for text in SENTENCES]).save_pretrained(tmp_path / "teacher")
    AutoModelForCausalLM.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "teacher")
    options = ["--student", str(folder / "student"), "--teacher", str(tmp_path / "teacher")]
    run = ["--data", str(folder / "rows.jsonl"), "--steps", "2", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    trainer = load_example("cross_tokenizer").main([*options, *run])
    assert trainer.teacher.method == "aligned"
    assert "held out:" in capsys.readouterr().out


def test_layerwise_is_the_recipe_of_distilbert(folder, tmp_path, capsys):
    options = ["--teacher", str(folder / "teacher"), "--data", str(folder / "rows.jsonl"), "--steps", "2"]
    trainer = load_example("layerwise").main([*options, "--use_cpu", "--output_dir", str(tmp_path)])
    assert trainer.model.config.num_hidden_layers == 1
    assert "perplexity" in capsys.readouterr().out


def test_speculative_kd_is_a_drop_in_script(folder, tmp_path):
    Dataset.from_dict({"prompt": SENTENCES}).to_json(tmp_path / "prompts.jsonl")
    models = ["--model", str(folder / "student"), "--teacher_model", str(folder / "teacher")]
    run = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_new_tokens", "8"]
    data = ["--dataset", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "out")]
    trainer = load_example("speculative_kd").main([*models, *data, *run])
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_lupi_runs(capsys):
    table = load_example("lupi").main(["--teacher_steps", "2", "--steps", "1", "--facts", "4"])
    assert "control student" in capsys.readouterr().out
    assert table["teacher without knowledge"] == table["student before"] == 0.0


def test_kv_projection_compares_settings(folder, tmp_path):
    options = {"student": folder / "student", "teacher": folder / "teacher", "data": folder / "rows.jsonl"}
    options |= {"steps": 1, "batch_size": 2, "output_dir": tmp_path}
    arguments = [part for k, v in options.items() for part in (f"--{k}", str(v))]
    table = load_example("kv_projection").main([*arguments, "--use_cpu", "--only", "pure direction", "low capacity"])
    assert [row[""] for row in table] == ["pure direction", "low capacity"]
    assert (tmp_path / "low_capacity" / "projectors" / "projector.safetensors").exists()


@pytest.mark.slow
def test_lupi_teaches_what_only_the_teacher_may_read():
    table = load_example("lupi").main([])
    assert table["teacher with knowledge"] >= 0.9
    assert table["student after"] >= 0.8
    assert max(table[name] for name in ("teacher without knowledge", "student before", "control student")) <= 0.05


@pytest.mark.parametrize(("kd_weight", "temperature"), [(0.5, 1.0), (0.7, 2.0)])
def test_the_plain_loop_computes_what_the_trainer_computes(folder, tmp_path, kd_weight, temperature):
    options = {"student": folder / "student", "teacher": folder / "teacher", "data": folder / "rows.jsonl"}
    options |= {"kd_weight": kd_weight, "temperature": temperature, "steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    plain = load_example("kd_loop").main([part for k, v in options.items() for part in (f"--{k}", str(v))])
    args = KDConfig(
        output_dir=str(tmp_path), kd_weight=kd_weight, temperature=temperature, max_steps=2, logging_steps=1,
        per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    rows = Dataset.from_dict({"text": SENTENCES})
    trainer = KDTrainer(str(folder / "student"), str(folder / "teacher"), args, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(plain, rel=1e-4)


def test_the_plain_loop_names_the_column_it_needs(folder, tmp_path, capsys):
    Dataset.from_dict({"story": SENTENCES}).to_json(tmp_path / "rows.jsonl")
    options = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    with pytest.raises(SystemExit):
        load_example("kd_loop").main([*options, "--data", str(tmp_path / "rows.jsonl")])
    assert 'has the columns story; it needs "text"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with the splits and columns that the templates of the recipes name (SQuAD, Dolly)."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {
            "context": text, "question": f"What is in {i}?", "answers": {"text": [text.split()[1]]},
            "instruction": "Go on.", "response": text.split()[-1],
        }
        for i, text in enumerate(SENTENCES)
    ]  # fmt: skip
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_json(folder / f"{split}.jsonl")
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder with a model that sees, its processor, and rows with pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    vision.make_vlm("idefics3").save_pretrained(folder)
    vision.make_processor("idefics3").save_pretrained(folder)
    write_picture_rows(folder, vision.chats(8))
    return folder


def write_picture_rows(folder, rows):
    """rows.jsonl, and the pictures that it names, beside it."""
    lines = []
    for i, row in enumerate(rows):
        row["images"][0].save(folder / f"{i}.png")
        lines.append(json.dumps({**row, "images": [f"{i}.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))


def given_to(recipe, folder, questions, seeing, output_dir):
    """The command of a recipe and its options: only models, data, devices and the length of the run are replaced."""
    replaced = {
        "model": folder / "student",
        "teacher_model": folder / "teacher",
        "dataset": folder / "rows.jsonl",
        "output_dir": output_dir,
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    settings = yaml.safe_load(recipe.read_text())
    if "VL" in settings["model"]:
        replaced |= {"model": seeing, "teacher_model": seeing, "dataset": seeing / "rows.jsonl"}
    if "teacher_quantization" in settings:
        pytest.importorskip("bitsandbytes")
    if "teacher_device" in settings:
        replaced["teacher_device"] = "cpu"
    if "prompt_template" in settings:
        replaced["dataset"] = folder / "facts.jsonl" if "{answer}" in settings["completion_template"] else questions
    (command,) = re.findall(rf"#   hf-distill (\w+) --config {recipe.relative_to(ROOT)}", recipe.read_text())
    if command == "skd":  # the models of the tests have few positions
        replaced["dataset"], replaced["max_new_tokens"] = folder / "facts.jsonl", 8
    options = [part for name, value in replaced.items() for part in (f"--{name}", str(value))]
    return command, ["--config", str(recipe), *options]


def marked(recipes):
    """Parameters of a test; the recipe with pictures needs a transformers that loads the processor of its model."""
    needs = {"kd_vl_24gb": vision.NEEDS_5_18}
    return [pytest.param(path, marks=needs.get(path.stem, ()), id=path.stem) for path in recipes]


# Those of KAVA differ in two numbers, so one of them is run.
@pytest.mark.parametrize(
    "recipe", marked(path for path in RECIPES if path.parent.name != "kava" or path.stem == "high_capacity")
)
def test_every_recipe_runs_with_its_own_settings(folder, questions, seeing, tmp_path, recipe):
    command, options = given_to(recipe, folder, questions, seeing, tmp_path)
    cli.main([command, *options])
    assert (tmp_path / "README.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", marked(RECIPES))
def test_every_recipe_is_examined(folder, questions, seeing, tmp_path, recipe, capsys):
    command, options = given_to(recipe, folder, questions, seeing, tmp_path)
    with suppress(SystemExit):  # models without training may fail a check
        cli.main(["doctor", command, *options, "--rows", "8", "--json"])
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["construction"]["status"] == "ok"
    assert [each["line"] for each in findings.values() if "it stopped" in each["line"]] == []


def test_the_recipe_with_a_store_writes_it_and_trains_from_it(folder, tmp_path):
    recipe = ["--config", str(ROOT / "examples" / "recipes" / "cache_qwen2.5_0.5b.yaml"), "--use_cpu", "--bf16", "no"]
    models = ["--model", str(folder / "student"), "--dataset", str(folder / "rows.jsonl"), "--report_to", "none"]
    write = ["--teacher_model", str(folder / "teacher"), "--output_dir", str(tmp_path / "store")]
    cli.main(["cache", "write", *recipe, *models, *write])
    teacher = ["--teacher_model", f"cache:{tmp_path / 'store'}", "--max_steps", "1"]
    cli.main(["kd", *recipe, *models, *teacher, "--output_dir", str(tmp_path / "out")])
    assert "from a store: hidden states, float16" in (tmp_path / "out" / "README.md").read_text()


def test_settings_of_the_lora_recipes_are_those_of_their_page():
    columns = "learning_rate num_train_epochs lora_r lora_alpha kd_weight temperature".split()
    page = (ROOT / "docs" / "kd_lora.md").read_text()
    described = {name: [float(x) for x in cells.split("|")] for name, cells in re.findall(
        r"^\| (\w+) \|((?: [\d.e-]+ \|){5} [\d.]+) \|", page, re.MULTILINE
    )}  # fmt: skip
    recipes = [path for path in RECIPES if path.parent.name == "kd_lora"]
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in recipes}
    assert described == {name: [float(found[column]) for column in columns] for name, found in settings.items()}
    differing = {*columns, "output_dir"}
    common = [{k: v for k, v in found.items() if k not in differing} for found in settings.values()]
    assert len(common) == 8
    assert all(found == common[0] for found in common)


def test_settings_of_the_kava_recipes_are_those_of_their_page():
    columns = "projector_mlp_ratio direction_weight magnitude_weight".split()
    page = (ROOT / "docs" / "recipes.md").read_text()
    described = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES if path.parent.name == "kava"}
    found = {name: [float(recipe[column]) for column in columns] for name, recipe in settings.items()}
    assert {name: [float(number) for number in numbers] for name, *numbers in described} == found
    assert len(found) == 5
    common = [{k: v for k, v in recipe.items() if k not in (*columns, "output_dir")} for recipe in settings.values()]
    assert all(recipe == common[0] for recipe in common)


def test_the_page_of_recipes_names_all_of_them():
    page = (ROOT / "docs" / "recipes.md").read_text()
    for path in RECIPES:
        name = path.relative_to(ROOT / "examples" / "recipes").as_posix()
        assert f"`{name}`" in page or f"`{path.parent.name}/`" in page, name


def test_the_settings_to_compare_are_those_of_the_example():
    text = (ROOT / "examples" / "recipes" / "kava_8gb.yaml").read_text()
    found = {
        name.strip(): dict(re.findall(r"--(\w+) (\S+)", options))
        for name, options in re.findall(r"^#   ([a-z ]+): +(--.*)$", text, re.MULTILINE)
    }
    settings = load_example("kv_projection").SETTINGS
    assert found == {name: {key: str(value) for key, value in options.items()} for name, options in settings.items()}


@pytest.mark.parametrize(
    ("name", "distributed_type", "num_processes"),
    [
        ("single_gpu", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("zero2", "DEEPSPEED", 8),
        ("zero3", "DEEPSPEED", 8),
        ("multi_node", "MULTI_GPU", 16),
    ],
)
def test_accelerate_configurations_parse_to_what_they_are_called(name, distributed_type, num_processes):
    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert str(config.distributed_type).rsplit(".", 1)[-1] == distributed_type
    assert config.num_processes == num_processes
    if name == "fsdp2":
        assert int(config.fsdp_config["fsdp_version"]) == 2
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_the_guide_lists_every_file_of_the_package():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "hf_distill").rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "demo":
            assert f"{path.name} " in guide, path


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path
