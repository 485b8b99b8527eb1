"""Schedules: settings that change over the training, from value to value on straight lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_distill.losses.divergence import TEMPERATURES, check_divergence

# TAID moves from the student's distribution to the teacher's, so its parameter has to change.
TAID = {"t": [0.4, 1.0]}


def with_default(schedule: dict[str, Any] | None, divergence: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schedule with the one that the divergence brings, unless the settings give its parameter a value."""
    if divergence == "taid" and "t" not in {**params, **(schedule or {})}:
        return {**(schedule or {}), **TAID}
    return schedule


def check_schedule(
    schedule: Mapping[str, Any], scheduled: Sequence[str], divergence: str, params: Mapping[str, Any]
) -> None:
    """Checks names and values of a schedule.

    Args:
        schedule: the values of each setting, from first to last.
        scheduled: the settings that may change, beside the parameters of the divergence.
        params: the parameters of the divergence that do not change.

    Raises:
        `ValueError`: a setting that has to stay as it is, or values that are no list of numbers in its range.
    """
    ranges = {"kd_weight": (0, 1), "temperature": TEMPERATURES}
    for name, values in schedule.items():
        if name in params:
            raise ValueError(f"schedule and divergence_params both have {name!r}: remove one of them")
        is_list = isinstance(values, list | tuple) and len(values) > 0
        if not is_list or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise ValueError(f"schedule[{name!r}] has to be a list of numbers, from first to last, got {values!r}")
        lowest, highest = ranges.get(name, (0, 1e9))
        for value in values:
            if name not in scheduled:
                try:
                    check_divergence(divergence, {**params, name: value})
                except ValueError as error:
                    raise ValueError(
                        f"schedule has {name!r}: {value}; it takes {', '.join(scheduled)} and parameters of the "
                        f"divergence: {error}"
                    ) from error
            elif not lowest <= value <= highest:
                raise ValueError(f"schedule[{name!r}] has {value}, which is out of the range of {name}")


def value_at(values: Sequence[float], progress: float) -> float:
    """The value at `progress`, from 0 in the first update to 1 in the last, of evenly spaced `values`."""
    place = min(max(progress, 0.0), 1.0) * (len(values) - 1)
    before = int(place)
    after = min(before + 1, len(values) - 1)
    return values[before] + (place - before) * (values[after] - values[before])
