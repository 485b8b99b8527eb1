"""The tables of docs/settings.md, made when the site is built, from the table of options that `--help` is made of."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.helping import GROUPS, INHERITED, REFUSED
from hf_distill.cli.options import Option, described_options

MARK = "<!-- settings -->"
# Classes that may have a setting in Python; the first that has it is named.
CONFIGS = {
    "SFTConfig": "trl:SFTConfig",
    "HardLabelConfig": "hf_distill.trainers.hard_label_config:HardLabelConfig",
    "KDConfig": "hf_distill.trainers.config:KDConfig",
    "KVProjectionConfig": "hf_distill.trainers.kv_projection_config:KVProjectionConfig",
    "SpeculativeKDConfig": "hf_distill.trainers.speculative_kd_config:SpeculativeKDConfig",
}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of a page, with the tables in the place of their mark; mkdocs calls it for each page."""
    return markdown.replace(MARK, settings()) if page.file.src_uri == "settings.md" else markdown


def settings() -> str:
    """All settings in Markdown: those of training by topic, then those of each other command."""
    training = {name: _options(name) for name, command in COMMANDS.items() if command.inherits}
    parts = [_topic(title, names.split(), training) for title, names in GROUPS.items()]
    others = {name: _options(name) for name, command in COMMANDS.items() if not command.inherits and command.options}
    parts += [_section(f"`hf-distill {name}`", map(_row, found.values()), []) for name, found in others.items()]
    seen: set[str] = set()
    return re.sub(r'<a id="(\w+)"></a>', lambda anchor: _first(anchor, seen), "\n\n".join(parts))


def _first(anchor: re.Match[str], seen: set[str]) -> str:
    """An anchor where it stands for the first time, and nothing afterwards."""
    is_new = anchor[1] not in seen
    seen.add(anchor[1])
    return anchor[0] if is_new else ""


def _options(command: str) -> dict[str, Option]:
    refused = REFUSED.get(command, "").split()
    options = described_options(COMMANDS[command].options)
    return {name: option for name, option in options.items() if name not in refused}


def _topic(title: str, names: Iterable[str], training: Mapping[str, Mapping[str, Option]]) -> str:
    configs = {config: described_options([path]) for config, path in CONFIGS.items()}
    rows = []
    for name in names:
        kinds: list[tuple[Option, list[str]]] = []  # a setting may have another default in another command
        for command in training:
            if (option := training[command].get(name)) is None:
                continue
            same = next((commands for kind, commands in kinds if kind == option), None)
            kinds.append((option, [command])) if same is None else same.append(command)
        for option, commands in kinds:
            shown = [command for command in commands if not command.startswith("plan ")] or commands
            config = next((config for config, found in configs.items() if found.get(name) == option), "")
            rows.append([*_row(option), ", ".join(shown), f"`{config}`" if config else ""])
    return _section(title, rows, ["commands", "in Python"])


def _row(option: Option) -> list[str]:
    text = option.help or INHERITED.get(option.name, "")
    if option.choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in option.choices)}."
    is_told = option.default not in (None, "", False)
    default = "required" if option.is_required else f"`{option.default}`" if is_told else ""
    return [f'<a id="{option.name}"></a>`{option.name}`', _plain(text), default]


def _plain(text: str) -> str:
    """A help text in a cell of a table, where brackets are no links and bars no borders."""
    return re.sub(r"([\[\]|<])", r"\\\1", text.replace("%%", "%"))


def _section(title: str, rows: Iterable[list[str]], more: list[str]) -> str:
    lines = [["setting", "meaning", "default", *more], ["---"] * (3 + len(more)), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title[0].upper()}{title[1:]}\n\n{table}"
