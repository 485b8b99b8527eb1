"""The curves of a report as data: charts, and the series in each of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hf_distill.metric_names import metric_name, more_is_better
from hf_distill.report import teacher_results
from hf_distill.runs import Run, with_ends

MAX_POINTS = 300  # of a series


class Chart(NamedTuple):
    """A chart: its title, its unit, the logged names that it shows, and those on a second axis."""

    title: str
    unit: str
    names: tuple[str, ...]
    right: tuple[str, ...] = ()
    is_percent: bool = False


def _both(*names: str) -> tuple[str, ...]:
    """Names with those of the held-out rows."""
    return tuple(name for each in names for name in (each, f"eval_{each}"))


CHARTS = (
    Chart("Hard labels (ce)", "nats per token", _both("ce")),
    Chart("Divergence (kd)", "nats per token", (*_both("kd"), "eval_kl")),
    Chart("Loss", "nats per token", _both("loss")),
    Chart("Same most likely token", "share of tokens", _both("agreement"), is_percent=True),
    Chart("Keys and values", "cosine", _both("kv/cosine", "kv/centered_cosine", "kv/cka"), ("eval_kd", "eval_kl")),
    Chart("Distance of keys and values (kv)", "distance", _both("kv")),
    Chart("Distance of hidden states (hidden)", "distance", _both("hidden")),
    Chart("Load balancing (aux_loss)", "", _both("aux_loss")),
    Chart(
        "Rollouts: accepted by the teacher", "share",
        _both("rollout/acceptance_rate", "rollout/first_token_acceptance", "rollout/full_block_rate"), is_percent=True,
    ),
    Chart(
        "Rollouts: tokens of a log", "tokens",
        ("rollout/tokens_drafted", "rollout/tokens_accepted", "rollout/tokens_corrected"),
    ),
    Chart("Rollouts: tokens of a draft", "tokens", ("rollout/draft_length_mean",)),
    Chart("Value of the knowledge", "nats per token", _both("rollout/value_of_privilege")),
    Chart("Student's entropy", "nats per token", _both("student_entropy")),
    Chart("Learning rate", "", ("learning_rate",)),
    Chart("Norm of the gradient", "", ("grad_norm",)),
)  # fmt: skip


def chart_data(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The charts that the runs have points for.

    Returns:
        Dicts with `title`, `unit`, `right_unit` of the second axis (or None), `is_percent`, `better` ("less", "more" or
        None), `series`, dicts with `run`, `name`, `is_held_out`, `is_right`, `steps` and `values`, of at most
        `MAX_POINTS` points, and `lines`, dicts with `name` and `value`.
    """
    histories = {name: with_ends(run) for name, run in runs.items()}
    logged = {key for history in histories.values() for entry in history for key in entry}
    own = tuple(
        Chart(f"Perplexity, {name.partition('/')[2]}", "", (name,))
        for name in sorted(logged)
        if name[:11] == "perplexity/"
    )
    charts = []
    for chart in (*CHARTS[:4], *own, *CHARTS[4:]):
        series = list(_series(chart, histories))
        if any(not each["is_right"] for each in series):
            known = metric_name(chart.names[0]) is not None
            direction = more_is_better(chart.names[0]) if known else None
            better = None if direction is None else "more" if direction else "less"
            is_two = any(each["is_right"] for each in series)
            lines = _lines(runs) if chart.names[0] == "ce" else []
            charts.append(
                {
                    "title": chart.title, "unit": chart.unit, "right_unit": "nats per token" if is_two else None,
                    "is_percent": chart.is_percent, "better": better, "series": series, "lines": lines,
                }
            )  # fmt: skip
    return charts


def _series(chart: Chart, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[dict[str, Any]]:
    for run, history in histories.items():
        for name in (*chart.names, *chart.right):
            points = [
                (entry["step"], entry[name])
                for entry in history
                if "step" in entry and isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
            ]
            if points:
                steps, values = zip(*_thinned(points), strict=True)
                yield {
                    "run": run, "name": name.removeprefix("eval_"), "is_held_out": name.startswith("eval_"),
                    "is_right": name in chart.right, "steps": steps, "values": [float(f"{v:.6g}") for v in values],
                }  # fmt: skip


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Some of the points: the first, the last, and evenly many between them."""
    if len(points) <= MAX_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def _lines(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """The teacher's own cross-entropy on the held-out rows, if it is the same for all runs."""
    found = teacher_results({f"{name}/{key}": each for name, run in runs.items() for key, each in run.results.items()})
    value = math.log(found["student_perplexity"]) if found else math.nan
    return [{"name": "teacher, held-out", "value": value}] if math.isfinite(value) else []
