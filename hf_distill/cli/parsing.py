"""Command line and recipe to instances of dataclasses, or to one line that says what is wrong with them."""

import difflib
import os
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

# Names that papers and other libraries have for our settings.
OTHER_NAMES = {
    "alpha": "kd_weight",
    "student": "model",
    "student_model": "model",
    "teacher": "teacher_model",
    "teacher_model_name_or_path": "teacher_model",
    "dataset_name": "dataset",
    "dataset_train_split": "train_split",
    "dataset_test_split": "eval_split",
    "beta": "divergence_params",
    "lmbda": "rollout_mix",
}


class CommandParser(HfArgumentParser):
    """Options on the command line, and before them those of a recipe, a YAML file given as `--config`.

    `None` unsets an option. Errors are one line: argparse would print the usage, some hundred options, before them.
    """

    def __init__(self, options: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(options, **kwargs)
        self.add_argument(
            "--config", help="A YAML file with options as `name: value`; options on the command line override it."
        )
        optional = {name for dtype in options for name in _optional_fields(dtype)}
        for action in self._actions:
            if action.dest in optional:
                _let_be_unset(action)

    def parse(self, argv: Iterable[str]) -> tuple[Any, ...]:
        """An instance of each dataclass, and a namespace of other words if some were added.

        Raises:
            `ValueError`: a recipe that cannot be read, an unknown option, or what the dataclasses refuse.
        """
        argv = list(argv)
        if path := self._recipe(argv):
            self._take_recipe(_read_recipe(path))
        found, rest = self.parse_known_args(argv)
        if rest and rest[0].startswith("-"):
            name = rest[0].partition("=")[0]
            raise ValueError(f"there is no option {name}{self._suggestion(name.lstrip('-'))}")
        if rest:
            raise ValueError(f"{rest[0]!r} belongs to no option: options begin with --, and --help lists them")
        # An option that takes a list is unset by a list of None.
        values = {name: None if value == [None] else value for name, value in vars(found).items() if name != "config"}
        parsed = [
            dtype(**{entry.name: values.pop(entry.name) for entry in fields(dtype) if entry.init})
            for dtype in self.dataclass_types
        ]
        return (*parsed, Namespace(**values)) if values else tuple(parsed)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all options)\n")

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
        actions = {action.dest: action for action in self._actions}
        for name, value in settings.items():
            if name not in actions:
                raise ValueError(f"the recipe has {name!r}, which is no option{self._suggestion(name)}")
            actions[name].default = value
            actions[name].required = False

    def _suggestion(self, name: str) -> str:
        names = [action.dest for action in self._actions]
        name = name.replace("-", "_")
        near = [other] if (other := OTHER_NAMES.get(name)) in names else difflib.get_close_matches(name, names, n=1)
        return f"; did you mean --{near[0]}?" if near else "; --help lists all options"


def _optional_fields(dtype: Any) -> list[str]:
    """Fields that may be None; for `report_to` None is a word of transformers, `none`."""
    return [
        name for name, kind in get_type_hints(dtype).items() if type(None) in get_args(kind) and name != "report_to"
    ]


def _let_be_unset(action: Action) -> None:
    convert: Callable[[str], Any] = action.type if callable(action.type) else str

    def read(text: str) -> Any:
        return None if text == "None" else convert(text)

    read.__name__ = getattr(convert, "__name__", "value")  # argparse says 'invalid float value'
    action.type = read
    if action.choices is not None:
        action.choices = [*action.choices, None]


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
