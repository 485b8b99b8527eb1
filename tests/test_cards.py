"""Model cards: their metadata as the hub reads it, and their text."""

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from trl.trainer.utils import generate_model_card

from hf_distill.cards import CardFacts, complete_card
from hf_distill.cli.parsing import read_command
from hf_distill.cli.reporting import command_line

NO_FACTS = CardFacts()


def made(tmp_path, base_model="org/base", facts=NO_FACTS, **changes):
    """A card as TRL writes it, completed, saved and read again: its metadata and its text."""
    card = generate_model_card(
        base_model=base_model, model_name="out", hub_model_id=None, dataset_name=None, tags=["hf_distill"],
        wandb_url="https://wandb.ai/run", trackio_url=None, trainer_name="KD", paper_title="A paper",
        paper_id="1503.02531",
    )  # fmt: skip
    options = {
        "name": "out", "base": "org/base", "hub_id": None, "title": "Distillation",
        "settings": {"teacher": "big", "a": "b|c"}, "has_chat_template": False,
    }  # fmt: skip
    complete_card(card, **{**options, **changes}, facts=facts)
    card.save(tmp_path / "README.md")
    return metadata_load(tmp_path / "README.md"), ModelCard.load(tmp_path / "README.md").text


def test_a_card_names_base_teacher_data_results_command_and_versions(tmp_path):
    facts = CardFacts(
        ["org/rows"], "hf-distill kd \\\n    --model org/base", "|  | kl |\n| --- | ---: |\n", "report.png"
    )
    data, text = made(tmp_path, facts=facts)
    assert data["base_model"] == "org/base"
    assert data["datasets"] == ["org/rows"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["model_name"] == "out"
    assert "hf_distill" in data["tags"]
    for part in (
        "[org/base](https://huggingface.co/org/base)", "the student of `big`", "/datasets/org/rows)", "| kl |",
        "![out: losses and results](report.png)", "--model org/base", "- hf_distill: ", "- TRL: ", "wandb.ai/run",
        "papers/1503.02531", "@software{", 'model="out"', "| a | b\\|c |",
    ):  # fmt: skip
        assert part in text, part
    assert "None" not in text
    assert text.count("```") % 2 == 0
    assert not re.search(r"\n\n\n", text.partition("## Versions")[0])


def test_names_of_this_machine_have_no_link_and_are_no_metadata(tmp_path):
    (tmp_path / "private").mkdir()
    facts = CardFacts([str(tmp_path / "private" / "rows.jsonl"), "more.json.gz"])
    data, text = made(tmp_path, base_model=None, base="student", facts=facts)
    assert "base_model" not in data
    assert "datasets" not in data
    assert "This model is `student`, trained" in text
    assert "on `rows.jsonl` and `more.json.gz`." in text
    assert str(tmp_path) not in text
    assert "None" not in text


def test_what_the_hub_would_refuse_as_a_base_is_left_out(tmp_path):
    for base in ("/models/that/are/gone", "../student", "a b"):
        assert "base_model" not in made(tmp_path, base_model=base, base="student")[0]


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_the_first_lines_of_code_can_be_run(tmp_path, has_chat_template):
    _, text = made(tmp_path, hub_id="me/out", has_chat_template=has_chat_template)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert 'model="me/out"' in code
    assert ('"role"' in code) == has_chat_template


def test_a_run_without_results_or_settings_has_no_empty_sections(tmp_path):
    _, text = made(tmp_path, settings={})
    assert not {"## Results", "## Command", "## Distillation"} & set(text.splitlines())


@dataclass
class Options:
    """Options of each kind."""

    model: str = "m"
    dataset: list[str] = field(default_factory=list)
    teacher_model: str | None = "t"
    rate: float = 1.0
    init: Any = None
    hub_token: str | None = None
    save_steps: int = 1
    schedule: Any = None


def test_the_command_repeats_a_run_and_tells_neither_folders_nor_keys(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "store").mkdir()
    options = Options(
        model="/gone/before/student", dataset=[f"{tmp_path / 'rows.jsonl'}:0.7", "org/rows:0.3"], rate=0.5,
        teacher_model=f"cache:{tmp_path / 'store'}", init={"token": "hf_secret", "dtype": "auto"},
        hub_token="hf_secret", save_steps=7, schedule={"rate": [0, 1]},
    )  # fmt: skip
    text = command_line("kd", [options])
    assert text.split(" \\\n    ") == [
        "hf-distill kd", "--model student", "--dataset rows.jsonl:0.7 org/rows:0.3", "--teacher_model cache:store",
        "--rate 0.5", """--init '{"token": "***", "dtype": "auto"}'""", """--schedule '{"rate": [0, 1]}'""",
        "--output_dir out",
    ]  # fmt: skip
    assert command_line("kd", [Options(teacher_model=None)]).split(" \\\n    ")[1] == "--teacher_model None"
    server = command_line("kd", [Options(teacher_model="http://user:password@10.0.0.7:8000/v1")])
    assert "--teacher_model http://SERVER/v1 " in server
    (tmp_path / "models").mkdir()
    inside = command_line(
        "kd", [Options(init={"cache_dir": str(tmp_path), "deep": [{"dir": str(tmp_path / "models")}]})]
    )
    assert str(tmp_path) not in inside


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("kd", {"lr_scheduler_type": "cosine", "optim": "adafactor", "hidden_weight": 0.5, "eos_token": "<end>"}),
        ("kd", {"eval_dataset": "held.jsonl", "eval_split": "validation", "max_eval_rows": 20, "baseline": True}),
        ("kv", {"projector": "mlp", "projector_learning_rate": 0.03, "projector_freeze_after": 7}),
    ],
)
def test_the_command_gives_the_settings_of_the_run_again(command, given):
    words = ["--model", "m", "--dataset", "d", "--teacher_model", "t", "--output_dir", "out", "--bf16", "false"]
    words += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    options = read_command(command, words)
    text = command_line(command, options)
    again = read_command(command, shlex.split(text.replace("\\\n", " "))[2:])
    before, after = ({name: value for each in both for name, value in vars(each).items()} for both in (options, again))
    assert [after[name] for name in given] == [before[name] for name in given]
    assert all(f"--{name} " in text for name in given)
