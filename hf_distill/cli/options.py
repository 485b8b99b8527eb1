"""The options of commands: fields of dataclasses, from a table that is read without importing torch or TRL.

`options.json` is written by `python -m hf_distill.cli.options`, and a test holds it equal to the dataclasses. If other
versions of transformers or TRL are installed than it was written with, options are read from their dataclasses instead.
"""

import json
import re
from argparse import Action
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distribution, version
from inspect import get_annotations
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

TABLE = Path(__file__).with_name("options.json")
# The files whose dataclasses options are inherited from.
SOURCES = {
    "transformers": ("transformers/training_args.py",),
    "trl": ("trl/trainer/sft_config.py", "trl/trainer/base_config.py", "trl/trainer/model_config.py"),
}
KINDS = ("str", "int", "float", "bool", "object")


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        name: of the field; on the command line also with hyphens.
        kind: of each value, one of `KINDS`; an object cannot be given as text.
        default: for people; only options that are given are passed to the dataclass.
        help: one or two sentences; "" for most fields that are inherited from other libraries.
        choices: the values that it may have.
        nargs: "+" for a list; "?" for a switch that needs no value.
        is_required: if it has no default.
        may_be_none: if the word None unsets it.
    """

    name: str
    kind: str = "str"
    default: Any = None
    help: str = ""
    choices: tuple[Any, ...] = ()
    nargs: str | None = None
    is_required: bool = False
    may_be_none: bool = False


def options_of(classes: Iterable[str]) -> dict[str, Option]:
    """The options of dataclasses such as `hf_distill.cli.arguments:KDArguments`, from the table if it is current.

    It always is for those that inherit nothing of other libraries.
    """
    found: dict[str, Option] = {}
    for each in classes:
        found |= _of_table(each) if is_current() or _is_ours(each) else _of_installed(each)
    return found


def described_options(classes: Iterable[str]) -> dict[str, Option]:
    """The options of dataclasses from the table, whatever is installed: our own ones do not depend on it."""
    return {name: option for each in classes for name, option in _of_table(each).items()}


def installed_options(classes: Iterable[str]) -> dict[str, Option]:
    """The options of dataclasses, from these themselves, with the help of inherited ones."""
    return {name: option for each in classes for name, option in _of_installed(each).items()}


@cache
def is_current() -> bool:
    """True if the table was written with the installed versions of transformers and TRL."""
    return all(version(name) == written for name, written in _table()["versions"].items())


def may_be_inherited(name: str) -> bool:
    """True unless the files of the installed libraries, which are read as text, surely have no option of this name."""
    for package, files in SOURCES.items():
        for file in files:
            path = Path(str(distribution(package).locate_file(file)))
            if not path.is_file() or re.search(rf"^    {re.escape(name)}\w*:", path.read_text("utf-8"), re.MULTILINE):
                return True
    return False


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _is_ours(name: str) -> bool:
    """True for a dataclass that has no base in another library."""
    return name.startswith("hf_distill.") and (not (base := _table()["classes"][name]["base"]) or _is_ours(base))


def _of_table(name: str) -> dict[str, Option]:
    """The options of a dataclass: those of its base, then its own, which may replace some of them."""
    entry = _table()["classes"][name]
    own = {row["name"]: Option(**{**row, "choices": tuple(row.get("choices", ()))}) for row in entry["options"]}
    return {**(_of_table(entry["base"]) if entry["base"] else {}), **own}


# ------------------------------------------------------------------------------------- from dataclasses, with libraries


def _of_installed(name: str) -> dict[str, Option]:
    from transformers import HfArgumentParser

    dtype = resolve_name(name)
    optional = _optional_fields(dtype)
    actions: list[Action] = HfArgumentParser(dtype, add_help=False)._actions
    # nargs is 0 for `--no_x`, which a parser adds to every switch that is on by default.
    return {action.dest: _option(action, action.dest in optional) for action in actions if action.nargs != 0}


def _option(action: Action, may_be_none: bool) -> Option:
    default = getattr(action.default, "value", action.default)  # of an Enum
    return Option(
        action.dest,
        _kind(action.type),
        default,
        action.help or "",
        tuple(action.choices or ()),
        action.nargs,  # pyright: ignore[reportArgumentType]
        action.required,
        may_be_none,
    )


def _kind(convert: Any) -> str:
    if getattr(convert, "__name__", "") == "string_to_bool":
        return "bool"
    if convert in (int, float):
        return convert.__name__
    # A choice is made by a function from its text; Enums of transformers are texts.
    return "object" if isinstance(convert, type) and not issubclass(convert, str) else "str"


def _optional_fields(dtype: Any) -> set[str]:
    """Fields that may be None; for `report_to` None is a word of transformers, `none`."""
    hints = get_type_hints(dtype)
    return {name for name, kind in hints.items() if type(None) in get_args(kind) and name != "report_to"}


def describe(classes: Iterable[str]) -> dict[str, Any]:
    """The table of these dataclasses and their bases. Of other libraries' it has no help, which is theirs to change."""
    entries: dict[str, Any] = {}
    waiting = list(classes)
    while waiting:
        name = waiting.pop()
        if name in entries:
            continue
        dtype = resolve_name(name)
        is_ours = dtype.__module__.startswith("hf_distill.")
        base = dtype.__mro__[1] if is_ours and dtype.__mro__[1] is not object else None
        base_name = None if base is None else _name_of(base)
        own = {*get_annotations(dtype)} if is_ours else {*dtype.__dataclass_fields__}
        own |= {field for other in dtype.__bases__[1:] if is_ours for field in other.__dataclass_fields__}
        found = [option for option in _of_installed(name).values() if option.name in own]
        entries[name] = {"base": base_name, "options": [_row(option, is_ours) for option in found]}
        waiting += [base_name] if base_name else []
    versions = {name: version(name) for name in ("transformers", "trl")}
    return {"versions": versions, "classes": dict(sorted(entries.items()))}


def _name_of(dtype: Any) -> str:
    module = dtype.__module__ if dtype.__module__.startswith("hf_distill.") else dtype.__module__.partition(".")[0]
    return f"{module}:{dtype.__name__}"


def _row(option: Option, has_help: bool) -> dict[str, Any]:
    """The fields of an option that differ from the defaults of `Option`, for JSON."""
    defaults = asdict(Option(option.name))
    row = {name: value for name, value in asdict(option).items() if name == "name" or value != defaults[name]}
    if not has_help:
        row.pop("help", None)
    return json.loads(json.dumps(row))


def written(table: Mapping[str, Any]) -> str:
    """The text of the table, one option a line."""
    lines = [f'{{"versions": {json.dumps(table["versions"])}, "classes": {{']
    entries = []
    for name, entry in table["classes"].items():
        rows = ",\n    ".join(json.dumps(row) for row in entry["options"])
        entries.append(f'  {json.dumps(name)}: {{"base": {json.dumps(entry["base"])}, "options": [\n    {rows}\n  ]}}')
    return "\n".join([*lines, ",\n".join(entries), "}}"]) + "\n"


if __name__ == "__main__":
    from hf_distill.cli.commands import COMMANDS

    TABLE.write_text(written(describe({name for command in COMMANDS.values() for name in command.options})), "utf-8")
