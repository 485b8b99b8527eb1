"""Numbers as a person wants them: a table in the terminal, Markdown, a picture."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

# What the results of evaluate_fidelity are called, how they are written, and whether more is better.
FIDELITY_COLUMNS = {
    "student_perplexity": ("perplexity", "{:.3f}", False),
    "teacher_perplexity": ("teacher's", "{:.3f}", False),
    "kl": ("KL, nats", "{:.4f}", False),
    "agreement": ("agreement", "{:.1%}", True),
    "expected_acceptance": ("acceptance", "{:.1%}", True),
}
# The same for `SpeculativeKDTrainer.evaluate`, whose rows are written by the models themselves.
ROLLOUT_COLUMNS = {
    "eval_kd": ("divergence, nats", "{:.4f}", False),
    "eval_agreement": ("agreement", "{:.1%}", True),
    "eval_rollout/acceptance_rate": ("accepted", "{:.1%}", True),
}
LOSS_TERMS = ("loss", "kd", "ce")


def result_rows(
    results: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str, bool]] = FIDELITY_COLUMNS
) -> list[dict[str, str]]:
    """One row of text per named result, by default of `evaluate_fidelity`, in the order given."""
    return [
        {"": name, **{title: form.format(values[key]) for key, (title, form, _) in columns.items() if key in values}}
        for name, values in results.items()
    ]


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A `rich` table of rows with the same keys; the first column is text, the others are aligned as numbers.

    On a narrow terminal titles break into two lines; cut short, nobody could tell what a number is.
    """
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(rows[0]):
        view.add_column(name, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows:
        view.add_row(*(str(value) for value in row.values()))
    return view


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows as a Markdown table."""
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *([str(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def save_report(
    folder: str | PathLike[str],
    results: Mapping[str, Mapping[str, float]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    title: str = "student against teacher, held-out rows",
    columns: Mapping[str, tuple[str, str, bool]] = FIDELITY_COLUMNS,
) -> None:
    """Prints the table and writes it to `report.md`, the numbers to `report.json` and the picture to `report.png`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = result_rows(results, columns)
    Console().print(table(rows, title=title))
    (folder / "report.md").write_text(markdown(rows), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    save_picture(folder / "report.png", histories, results, columns)


def save_picture(
    path: str | PathLike[str],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    results: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, str, bool]] = FIDELITY_COLUMNS,
) -> None:
    """A PNG: the loss terms over the steps, and a bar per model for each measure of fidelity.

    Args:
        path: the file to write.
        histories: for each run its `trainer.state.log_history`.
        results: for each model what `evaluate_fidelity` returned, or other numbers with their `columns`.
    """
    measured = set.intersection(*(set(values) for values in results.values()))
    drawn_columns = {key: column for key, column in columns.items() if key in measured and key != "teacher_perplexity"}
    figure = Figure(figsize=(14, 4), layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(drawn_columns), width_ratios=[2.6, *[1] * len(drawn_columns)])
    colors = {name: f"C{i}" for i, name in enumerate([*results, *(run for run in histories if run not in results)])}
    _draw_terms(curves, histories, colors)
    for axes, (key, (title, form, more_is_better)) in zip(bars, drawn_columns.items(), strict=True):
        heights = [values[key] for values in results.values()]
        drawn = axes.bar(list(results), heights, color=[colors[name] for name in results])
        axes.bar_label(drawn, labels=[form.format(height) for height in heights], fontsize=7)
        positive = [height for height in heights if height > 0]
        if not more_is_better and positive and max(positive) > 10 * min(positive):
            axes.set_yscale("log")  # an untrained model would leave nothing to see of the others
            axes.set_ylim(bottom=min(positive) / 3)
        axes.set_title(f"{title}\n({'more' if more_is_better else 'less'} is better)", fontsize=9)
        axes.tick_params(axis="x", rotation=35, labelsize=7)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=130)


def save_curve(
    path: str | PathLike[str], points: Sequence[tuple[float, float]], title: str, bands: Mapping[float, str]
) -> None:
    """A PNG: values over the steps, with a named band below each of the limits in `bands`."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    bottom = min(0.0, *(value for _, value in points))
    for i, (limit, name) in enumerate(bands.items()):
        axes.axhspan(bottom, limit, color="C0", alpha=0.04 + 0.05 * i, linewidth=0)
        axes.text(1.01, (bottom + limit) / 2, name, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        bottom = limit
    axes.plot(*zip(*points, strict=True), color="C1", marker="." if len(points) < 50 else "")
    axes.set(xlabel="step", title=title, ylim=(min(0.0, *(value for _, value in points)), bottom))
    figure.savefig(path, dpi=130)


def _draw_terms(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, float]]], colors: Mapping[str, str]) -> None:
    for run, history in histories.items():
        for term, style in zip(LOSS_TERMS, ("-", "--", ":"), strict=True):
            points = [(entry["step"], entry[term]) for entry in history if term in entry and "step" in entry]
            if points:
                label = f"{run}: {term}" if len(histories) > 1 else term
                axes.plot(*zip(*points, strict=True), style, color=colors[run], label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="loss terms (kd without the factor T^2)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
