"""The README and its translations: the code prints what they say, and no translation is of an older text."""

import re
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

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
