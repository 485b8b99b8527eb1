"""What pages say of each other and of the code: links, messages. `make docs` checks the links of the site."""

import ast
import importlib.util
import re
import types
from dataclasses import fields
from pathlib import Path

import pytest
from trl import SFTConfig

from hf_distill import HardLabelConfig, KDConfig, KVProjectionConfig, SpeculativeKDConfig
from hf_distill.cli import arguments
from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.options import described_options

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)


def text_of(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The fragments that GitHub gives to the headings of a page."""
    found, seen = set(), {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", text_of(page), re.MULTILINE):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("*", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = seen.setdefault(slug, 0)
        seen[slug] += 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# `KL` & more: *here*\n## Twice\n```\n# a comment\n```\n## Twice\n## [A link](x.md), 2.5\n")
    assert anchors(page) == {"kl--more-here", "twice", "twice-1", "a-link-25"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_the_options_that_pages_give_them(page):
    known = "|".join(sorted(COMMANDS, key=len, reverse=True))
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        for line in block[0].replace("\\\n", " ").splitlines():
            found = re.search(rf"(?:hf-distill|hf_distill\.cli) ({known})\b(.*)", line)
            if found is None:
                continue
            options = {"config", "help", "help-all", *described_options(COMMANDS[found[1]].options)}
            given = re.findall(r"(?<![\w-])--([\w-]+)", found[2].partition(" #")[0])
            assert not set(given) - options, line


def messages():
    """All texts in the code of the package, with a zero character in place of what differs from run to run."""
    for path in (ROOT / "hf_distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[-+.\d]*[sdgfr]", "\0", node.value)


def test_troubleshooting_quotes_messages_as_they_are():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [line for block in re.findall(r"^```text\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    said = [*messages()]
    assert len(quoted) > 20
    for message in quoted:
        parts = [part.strip(" .,:;()") for part in message.split("...")]
        assert any(all(part in text for part in parts) for text in said), message


def load_hook(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook


def test_the_reference_links_the_objects_that_it_has():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="reference.md"))
    html = '<h2 id="hf_distill.KDConfig"></h2> [<code>KDConfig</code>], [<code>~hf_distill.named.name_of</code>], [1]'
    assert load_hook("references").on_page_content(html, page=page).partition("</h2> ")[2] == (
        '<a href="#hf_distill.KDConfig"><code>KDConfig</code></a>, <code>name_of</code>, [1]'
    )


def test_the_page_of_settings_has_every_field_with_its_help():
    hook = load_hook("settings")
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").count(hook.MARK) == 1
    tables = re.sub(r"\\([\[\]|<])", r"\1", hook.settings())
    inherited = {entry.name for entry in fields(SFTConfig)}
    configs = [HardLabelConfig, KDConfig, KVProjectionConfig, SpeculativeKDConfig]
    commands = [
        getattr(arguments, name) for name in ("StagedArguments", "KVArguments", "SKDArguments", "CacheArguments")
    ]
    for entry in (entry for kind in [*configs, *commands] for entry in fields(kind)):
        if entry.name not in inherited:
            assert f'id="{entry.name}"' in tables, entry.name
            assert entry.metadata["help"].replace("%%", "%") in tables, entry.name
