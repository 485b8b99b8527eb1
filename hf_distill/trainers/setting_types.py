"""The types of settings: what Python, recipes and command lines give, as numbers, switches and texts."""

import math
from dataclasses import fields
from functools import cache
from numbers import Integral
from typing import Any, get_args, get_type_hints

import numpy as np

# transformers takes None for these, too, whatever their types say.
_MAY_BE_NONE = {"max_grad_norm"}


def take_types(settings: Any) -> None:
    """Gives the numbers and switches of a dataclass the types that its fields name.

    Raises:
        `ValueError`: a value of another type, also for a field that has a choice of texts.
    """
    hints = _hints(type(settings))
    for entry in fields(settings):
        value, kinds = getattr(settings, entry.name), hints[entry.name]
        if value is entry.default or (value is None and (type(None) in kinds or entry.name in _MAY_BE_NONE)):
            continue
        kinds = kinds - {type(None)}
        if convert := next((_CONVERSIONS[kind] for kind in _CONVERSIONS if kinds == {kind}), None):
            setattr(settings, entry.name, convert(entry.name, value))
        elif kinds == {str} and "choices" in entry.metadata and not isinstance(value, str):
            raise ValueError(f"{entry.name} has to be one of {', '.join(entry.metadata['choices'])}, got {value!r}")


def as_number(name: str, value: Any) -> float:
    """The value of a setting as a number, also of text; `ValueError` if it is none."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError("True and False are no numbers")
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} has to be a number, got {value!r}") from error


def as_whole_number(name: str, value: Any) -> int:
    """The value of a setting as a whole number, also of text and of 8.0; `ValueError` if it is none."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    try:
        number = as_number(name, value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} has to be a whole number, got {value!r}")
    return int(number)


def as_switch(name: str, value: Any) -> bool:
    """The value of a setting as True or False, also of 0 and 1; `ValueError` for others, text among them."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"{name} has to be True or False, got {value!r}")


def require_at_least(name: str, value: float | None, least: float) -> None:
    """Raises `ValueError` for a number below `least`, for infinity and NaN; None passes."""
    if value is not None and not least <= value < math.inf:
        finite = " and finite" if isinstance(least, float) else ""
        raise ValueError(f"{name} has to be at least {least:g}{finite}, got {value}")


_CONVERSIONS = {bool: as_switch, int: as_whole_number, float: as_number}


@cache
def _hints(kind: type) -> dict[str, set[Any]]:
    """The types that each field of a dataclass may have."""
    return {name: {*(get_args(hint) or (hint,))} for name, hint in get_type_hints(kind).items()}
