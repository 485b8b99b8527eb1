"""Command line and recipe to instances of dataclasses, or to one line that says what is wrong with them."""

import difflib
import os
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml

from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.helping import help_text, whole_help_text
from hf_distill.cli.options import Option, described_options, is_current, may_be_inherited, options_of

# Names that papers and other libraries have for our settings.
OTHER_NAMES = {
    "alpha": "kd_weight",
    "student": "model",
    "student_model": "model",
    "teacher": "teacher_model",
    "teacher_model_name_or_path": "teacher_model",
    "dataset_name": "dataset",
    "dataset_train_split": "train_split",
    "train_split": "split",
    "dataset_test_split": "eval_split",
    "beta": "divergence_params",
    "lmbda": "rollout_mix",
}


def read_command(name: str, argv: Iterable[str]) -> tuple[Any, ...]:
    """The arguments of a command's `start`: an instance of each dataclass, and a namespace of its words if it has some.

    The options are read first: a wrong one is found before the modules of the dataclasses are imported.

    Raises:
        `ValueError`: a recipe that cannot be read, an unknown option, or what the dataclasses refuse.
    """
    command, argv = COMMANDS[name], list(argv)
    if command.inherits and not is_current():
        CommandParser(name, described_options(command.options)).refuse_what_nothing_knows(argv)
    values = CommandParser(name, options_of(command.options)).parse(argv)
    with resolve_name(command.parsing)() if command.parsing else nullcontext():
        parsed = [_instance(resolve_name(each), values) for each in command.options]
    words = Namespace(**{word: values[word] for word in command.words})
    return (*parsed, words) if command.words else tuple(parsed)


def _instance(dtype: Any, values: dict[str, Any]) -> Any:
    names = [entry.name for entry in fields(dtype) if entry.init]
    try:
        return dtype(**{name: values[name] for name in names if name in values})
    except ValueError as error:
        if "use_cpu" in str(error):  # transformers', where no GPU computes in bfloat16, which TRL turns on
            raise ValueError(f"{error} On a CPU, add --use_cpu --bf16 false") from error
        raise


class CommandParser(ArgumentParser):
    """Options on the command line, and before them those of a recipe, a YAML file given as `--config`.

    `None` unsets an option. Errors are one line: argparse would print the usage before them.
    """

    def __init__(self, name: str, options: Mapping[str, Option]) -> None:
        super().__init__(prog=f"hf-distill {name}", add_help=False, argument_default=SUPPRESS)
        command = COMMANDS[name]
        self._required: dict[str, str] = {}
        for option in options.values():
            self._add_option(option)
        self.add_argument("--config")
        self.add_argument("-h", "--help", action=_Show, show=lambda: help_text(name))
        if command.inherits:
            self.add_argument("--help-all", "--help_all", action=_Show, show=lambda: whole_help_text(name))
        for word in command.words:
            self.add_argument(word, nargs="+")

    def parse(self, argv: Iterable[str]) -> dict[str, Any]:
        """The values of the options and words that are given.

        Raises:
            `ValueError`: a recipe that cannot be read, or an unknown option.
        """
        argv = list(argv)
        if path := self._recipe(argv):
            self._take_recipe(_read_recipe(path))
        found, rest = self.parse_known_args(argv)
        if not path and hasattr(found, "config"):
            raise ValueError("--config has to be written in full, or its recipe would not be read")
        if rest and rest[0].startswith("-"):
            name = rest[0].partition("=")[0]
            raise ValueError(f"there is no option {name}{self._suggestion(name.lstrip('-'))}")
        if rest:
            raise ValueError(f"{rest[0]!r} belongs to no option: options begin with --, and --help lists them")
        if missing := [flags for name, flags in self._required.items() if not hasattr(found, name)]:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        # An option that takes a list is unset by a list of None.
        return {name: None if value == [None] else value for name, value in vars(found).items() if name != "config"}

    def refuse_what_nothing_knows(self, argv: list[str]) -> None:
        """Raises `ValueError` for a name of an option that neither this parser nor an installed library has.

        For a parser of the table, where other versions of the libraries are installed: their own names are read after
        this, from their dataclasses. It also shows help.
        """
        if {"-h", "--help"}.intersection(argv):
            self.parse_known_args(["--help"])
        flags = [word.partition("=")[0] for word in argv if word.startswith("--") and " " not in word]
        for flag in flags:
            name = flag.lstrip("-").replace("-", "_")
            is_known = any(known.startswith(flag) for known in self._option_string_actions)
            if not is_known and not may_be_inherited(name.removeprefix("no_")):
                raise ValueError(f"there is no option {flag}{self._suggestion(name)}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")

    def _add_option(self, option: Option) -> None:
        choices = [*option.choices, *([None] if option.may_be_none else [])] if option.choices else None
        self.add_argument(
            *_flags(option.name), dest=option.name, type=_conversion(option), choices=choices, nargs=option.nargs,
            const=True if option.nargs == "?" else None,
        )  # fmt: skip
        if option.is_required:  # looked at after unknown options, which argparse would not name before
            self._required[option.name] = "/".join(_flags(option.name))
        if option.kind == "bool" and option.default is True:
            self.add_argument(*_flags(f"no_{option.name}"), dest=option.name, action="store_false", default=SUPPRESS)

    @staticmethod
    def _recipe(argv: list[str]) -> str | None:
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--config")
        try:
            return parser.parse_known_args(argv)[0].config
        except ArgumentError as error:
            raise ValueError("--config needs the path of a YAML file") from error

    def _take_recipe(self, settings: dict[str, Any]) -> None:
        """Makes the settings the defaults of their options, and sets the environment variables in `env`."""
        variables = settings.pop("env", {})
        if not isinstance(variables, dict):
            raise ValueError(f"env in a recipe has to hold environment variables as `name: value`, got {variables!r}")
        os.environ.update({name: str(value) for name, value in variables.items()})
        actions = {action.dest: action for action in reversed(self._actions)}  # of two, the one with a type
        for name, value in settings.items():
            if name not in actions:
                raise ValueError(f"the recipe has {name!r}, which is no option{self._suggestion(name)}")
            # A single value of an option that takes several; None and its word unset the option.
            is_single = actions[name].nargs == "+" and not isinstance(value, list) and value not in (None, "None")
            actions[name].default = [value] if is_single else value

    def _suggestion(self, name: str) -> str:
        own = {action.dest: action.dest for action in self._actions}
        names = own | {other: name for other, name in OTHER_NAMES.items() if name in own and other not in own}
        others = {each: [*described_options(command.options)] for each, command in COMMANDS.items()}
        name = name.replace("-", "_")
        nearest = difflib.get_close_matches(name, {*names}.union(*others.values()), n=1, cutoff=0.9)
        if nearest and nearest[0] not in names:
            having = [f"`{each}`" for each, options in others.items() if nearest[0] in options]
            return f"; --{nearest[0]} is an option of {', '.join(having)}"
        near = difflib.get_close_matches(name, names, n=1)
        return f"; did you mean --{names[near[0]]}?" if near else "; --help lists the options"


class _Show(Action):
    """An option that prints a text and ends the program."""

    def __init__(self, option_strings: Sequence[str], show: Callable[[], str], **_: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0)
        self.show = show

    def __call__(self, parser: ArgumentParser, *_: Any) -> NoReturn:
        print(self.show(), end="")
        parser.exit()


def _flags(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _conversion(option: Option) -> Callable[[str], Any]:
    """The function from a word to a value; its name is a part of argparse's messages ('invalid float value')."""
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str, "int": int, "float": float, "bool": _switch, "object": _refuse_text
    }  # fmt: skip
    convert = kinds[option.kind]

    def read(text: str) -> Any:
        return None if text == "None" else convert(text)

    read.__name__ = convert.__name__
    return read if option.may_be_none else convert


def _refuse_text(text: str) -> NoReturn:
    raise ArgumentTypeError(f"cannot be given as text, got {text!r}; a recipe may hold a mapping")


def _switch(text: str) -> bool:
    words = {True: ("yes", "true", "t", "y", "1"), False: ("no", "false", "f", "n", "0")}
    for value, known in words.items():
        if text.lower() in known:
            return value
    raise ArgumentTypeError(f"has to be true or false, got {text!r}")


def _read_recipe(path: str) -> dict[str, Any]:
    """The settings in a YAML file; `ValueError` for a file that holds none."""
    if not os.path.exists(path):
        raise ValueError(f"recipe {path!r} does not exist; --config takes the path of a YAML file")
    if not os.path.isfile(path):
        raise ValueError(f"recipe {path!r} is a folder; --config takes the path of a YAML file")
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path!r} is no text in UTF-8: save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path!r} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path!r} has to hold settings as `name: value`, one a line")
    return settings
