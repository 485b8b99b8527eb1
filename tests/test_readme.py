"""The README and its translations: the code prints what they say, and no translation is of an older text."""

import json
import re
import shlex
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_distill import HardLabelConfig, HardLabelTrainer, cli
from tests.conftest import make_model

ROOT = Path(__file__).parent.parent
TRANSLATIONS = ["README.ko.md", "README.zh.md"]


def sections(name):
    """Titles and texts of a README; the languages' links and hashes are left out."""
    text = (ROOT / name).read_text(encoding="utf-8")
    parts = re.split(r"^(?=#{1,2} )", text, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], part) for part in parts]


def code(name):
    (found,) = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return found


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_each_section_translates_the_english_one_as_it_is(name):
    english, own = sections("README.md"), sections(name)
    assert len(own) == len(english)
    for (title, text), (own_title, own_text) in zip(english, own, strict=True):
        digest = blake2b(text.strip().encode(), digest_size=6).hexdigest()
        assert f"<!-- translates: {digest} -->" in own_text, (
            f"{name}, {own_title!r}: the English section {title!r} has changed; translate it again, then write {digest}"
        )


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_translations_have_the_same_code_commands_and_links(name):
    without_comments = [re.sub(r"  # .*", "", code(each)) for each in (name, "README.md")]
    assert without_comments[0] == without_comments[1]
    own, english = ((ROOT / each).read_text(encoding="utf-8") for each in (name, "README.md"))
    commands = [
        re.findall(r"^((?:hf-distill|accelerate) .*?)(?: +#.*)?$", text, re.MULTILINE) for text in (own, english)
    ]
    assert commands[0] == commands[1]
    links = [{*re.findall(r"\]\(([^)]+)\)", text)} - {"README.md", *TRANSLATIONS} for text in (own, english)]
    assert links[0] == links[1]


@pytest.mark.parametrize("name", ["README.md", *TRANSLATIONS])
def test_links_lead_to_files(name):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_code_prints_what_it_is_said_to_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (expected,) = re.findall(r"^```\n(eval_kd.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    torch.manual_seed(0)
    exec(code("README.md"), {})
    printed = capsys.readouterr().out.splitlines()[-2:]
    for line, said in zip(printed, expected.splitlines(), strict=True):
        assert line.split(":")[0] == said.split(":")[0]
        numbers, told = ([float(x) for x in re.findall(r"\d\.\d+", text)] for text in (line, said))
        assert numbers == pytest.approx(told, abs=0.003)


def own_rows():
    """The section on rows of one's own, and the lines of its two blocks: columns, and forms of a conversation."""
    (section,) = [text for title, text in sections("README.md") if title == "## Your own rows"]
    blocks = re.findall(r"^```json\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return section, *(block.splitlines() for block in blocks)


def test_the_commands_for_own_rows_train_and_measure_on_the_rows_that_are_shown(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    section, rows, _ = own_rows()
    Path("rows.jsonl").write_text("\n".join(rows * 10))
    models = {"Qwen/Qwen2.5-0.5B": str(folder / "student"), "Qwen/Qwen2.5-7B": str(folder / "teacher")}
    run = ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    kd, evaluate = re.findall(r"^hf-distill (.*)$", section, re.MULTILINE)
    for command, more in ((kd, run), (evaluate, ["--device", "cpu"])):
        cli.main([*(models.get(word, word) for word in shlex.split(command)), *more])
    report = json.loads(Path("out/report.json").read_text())
    assert {"before", "after", "baseline"} <= {*report}
    evaluation = json.loads(Path("out/evaluation.json").read_text())
    held_out = 2  # of 20 rows
    assert report["after"]["num_rows"] == evaluation["measures"]["perplexity"]["num_rows"] == held_out
    assert {*evaluation["models"]} == {"base", "student", "teacher"}


def test_conversations_bear_the_labels_that_are_said(tmp_path, tokenizer):
    def share(row, **settings):
        args = HardLabelConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
        rows = Dataset.from_list([json.loads(row)])
        trainer = HardLabelTrainer(make_model(), args, train_dataset=rows, processing_class=tokenizer)
        (batch,) = trainer.get_train_dataloader()
        return (batch["labels"] != -100).float().mean().item()

    _, _, (halves, whole) = own_rows()
    assert share(whole) == 1
    assert share(halves) == share(whole, assistant_only_loss=True) < 0.7
