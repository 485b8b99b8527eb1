"""Results as a table in the terminal, as Markdown and as a picture."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from hf_distill.metrics import more_is_better

# Titles and number formats of the results of evaluate_fidelity.
FIDELITY_COLUMNS = {
    "student_perplexity": ("perplexity", "{:.3f}"),
    "teacher_perplexity": ("teacher's", "{:.3f}"),
    "kl": ("KL, nats", "{:.4f}"),
    "agreement": ("agreement", "{:.1%}"),
    "expected_acceptance": ("acceptance", "{:.1%}"),
}
# The same for the evaluation of a trainer, with several teachers or one with another tokenizer.
EVALUATION_COLUMNS = {
    "eval_ce": ("hard labels, nats", "{:.4f}"),
    "eval_kd": ("divergence, nats", "{:.4f}"),
    "eval_agreement": ("agreement", "{:.1%}"),
}
# The same for `SpeculativeKDTrainer.evaluate`, whose completions are generated.
ROLLOUT_COLUMNS = {
    "eval_kd": ("divergence, nats", "{:.4f}"),
    "eval_agreement": ("agreement", "{:.1%}"),
    "eval_rollout/acceptance_rate": ("accepted", "{:.1%}"),
}
# Columns of a comparison of runs.
COMPARED_COLUMNS = {key: FIDELITY_COLUMNS[key] for key in ("student_perplexity", "kl", "agreement")}
# Logged terms in the histories of a picture, each with its own line style.
LOSS_TERMS = ("loss", "kd", "ce", "hidden", "kv", "aux_loss")
LINE_STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
# Terms in other units than nats.
OTHER_UNITS = {"hidden", "kv", "aux_loss"}
# Files of a finished run of the command line: its options, its logs, its results.
RUN_FILES = ("settings.json", "trainer_state.json", "report.json")
# Settings that say where a run writes; they do not tell runs apart.
PLACES = {"output_dir", "run_name", "hub_model_id", "run_files"}


def result_rows(
    results: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS
) -> list[dict[str, str]]:
    """One row of text per named result, by default of `evaluate_fidelity`, in the order given."""
    return [
        {"": name, **{title: form.format(values[key]) for key, (title, form) in columns.items() if key in values}}
        for name, values in results.items()
    ]


def measured_on(results: Mapping[str, Mapping[str, float]], num_rows: int | None = None) -> str:
    """The number of rows and tokens that were measured, as "500 rows, 25,312 tokens"; empty if nobody knows.

    They are the `num_rows` and `num_tokens` of the results, which `evaluate_fidelity` counts, or else `num_rows`.
    """
    counts = {
        unit: {int(values[f"num_{unit}s"]) for values in results.values() if f"num_{unit}s" in values}
        for unit in ("row", "token")
    }
    if num_rows is not None and not counts["row"]:
        counts["row"] = {num_rows}
    return ", ".join(
        f"{' to '.join(f'{count:,}' for count in sorted({min(found), max(found)}))} {unit}{'s' * (max(found) != 1)}"
        for unit, found in counts.items()
        if found
    )


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A `rich` table of rows with the same keys; the first column is text, the others are aligned as numbers.

    On a narrow terminal titles break into two lines, so that none is cut.
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


def _markdown_measured(rows: Sequence[Mapping[str, Any]], sizes: str, note: str = "") -> str:
    notes = ([f"Measured on {sizes}."] if sizes else []) + ([note] if note else [])
    return markdown(rows) + "".join(f"\n{text}\n" for text in notes)


def save_report(
    folder: str | PathLike[str],
    results: Mapping[str, Mapping[str, float]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    title: str = "student against teacher, held-out rows",
    columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS,
    num_rows: int | None = None,
    note: str = "",
) -> None:
    """Prints the table and writes it to `report.md`, the numbers to `report.json` and the picture to `report.png`.

    Table and picture say how many rows and tokens were measured ([`measured_on`]); a `note` follows the table.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows, sizes = result_rows(results, columns), measured_on(results, num_rows)
    Console().print(table(rows, title=f"{title}, measured on {sizes}" if sizes else title))
    if note:
        Console().print(note)
    (folder / "report.md").write_text(_markdown_measured(rows, sizes, note), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    save_picture(folder / "report.png", histories, results, columns, num_rows=num_rows)


def save_picture(
    path: str | PathLike[str],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    results: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS,
    terms: Sequence[str] = LOSS_TERMS,
    num_rows: int | None = None,
) -> None:
    """A PNG: the loss terms over the steps, and a bar per model for each measure of fidelity.

    Args:
        path: the file to write.
        histories: for each run its `trainer.state.log_history`.
        results: for each model what `evaluate_fidelity` returned, or other numbers with their `columns`.
        terms: the terms of the histories to draw, where they were logged.
        num_rows: the rows that were measured.
    """
    measured = set.intersection(*(set(values) for values in results.values()))
    drawn_columns = {key: column for key, column in columns.items() if key in measured and key != "teacher_perplexity"}
    figure = Figure(figsize=(14, 4), layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(drawn_columns), width_ratios=[2.6, *[1] * len(drawn_columns)])
    colors = {name: f"C{i}" for i, name in enumerate([*results, *(run for run in histories if run not in results)])}
    _draw_terms(curves, histories, colors, terms)
    for axes, (key, (title, form)) in zip(bars, drawn_columns.items(), strict=True):
        heights = [values[key] for values in results.values()]
        drawn = axes.bar(list(results), heights, color=[colors[name] for name in results])
        axes.bar_label(drawn, labels=[form.format(height) for height in heights], fontsize=7)
        positive = [height for height in heights if height > 0]
        if not more_is_better(key) and positive and max(positive) > 10 * min(positive):
            axes.set_yscale("log")  # or the bar of an untrained model would hide the others
            axes.set_ylim(bottom=min(positive) / 3)
        axes.set_title(f"{title}\n({'more' if more_is_better(key) else 'less'} is better)", fontsize=9)
        axes.tick_params(axis="x", rotation=35, labelsize=7)
        axes.margins(y=0.15)
    if sizes := measured_on(results, num_rows):
        figure.suptitle(f"measured on {sizes}", fontsize=8, x=0.99, horizontalalignment="right")
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


def _draw_terms(
    axes: Axes, histories: Mapping[str, Sequence[Mapping[str, float]]], colors: Mapping[str, str], terms: Sequence[str]
) -> None:
    for run, history in histories.items():
        for term, style in zip(terms, LINE_STYLES, strict=False):
            points = [(entry["step"], entry[term]) for entry in history if term in entry and "step" in entry]
            if points:
                label = ": ".join([run] * (len(histories) > 1) + [term] * (len(terms) > 1))
                axes.plot(*zip(*points, strict=True), linestyle=style, color=colors[run], label=label)
    title = "loss terms (kd without the factor T^2)" if len(terms) > 1 else f"{terms[0]} on training rows"
    logged = {term for history in histories.values() for entry in history for term in entry}
    others = [term for term in terms if term in OTHER_UNITS & logged]
    unit = f"nats per token; {', '.join(others)}: a distance" if others else "nats per token"
    axes.set(xlabel="step", ylabel=unit, title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


class Run(NamedTuple):
    """A finished run of the command line, read from the folder that it wrote."""

    settings: dict[str, Any]
    history: list[dict[str, float]]  # `trainer.state.log_history`
    measures: dict[str, float]  # of the student at the end

    def logged(self, name: str) -> float | None:
        """The last value that was logged under this name."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)


def load_run(folder: str | PathLike[str]) -> Run:
    """Reads the folder of a finished run.

    Raises:
        `ValueError`: a file is missing, because there was no run, it has not ended or it measured nothing; or a file
            belongs to another run.
    """
    if missing := [name for name in RUN_FILES if not (Path(folder) / name).is_file()]:
        raise ValueError(
            f"run folder {str(folder)!r} has no {' and no '.join(missing)}: it needs a finished run of hf-distill kd, "
            "kv or skd with held-out rows (--eval_dataset)"
        )
    settings, state, report = (json.loads((Path(folder) / name).read_text("utf-8")) for name in RUN_FILES)
    written = settings.pop("run_files", {})  # older versions wrote none
    if other := [name for name, digest in _digests(folder).items() if written.get(name, digest) != digest]:
        raise ValueError(
            f"run folder {str(folder)!r} holds files of different runs: {' and '.join(other)} changed after "
            "settings.json was written. Compare runs that have a folder of their own"
        )
    return Run(settings, state["log_history"], report["after"])


def save_settings(folder: str | PathLike[str], settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`, for people and for `compare_runs`; values that JSON does not know become text.

    Call it last: it also records which other files belong to the run.
    """
    settings = {**settings, "run_files": _digests(folder)}
    Path(folder, "settings.json").write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")


def _digests(folder: str | PathLike[str]) -> dict[str, str]:
    """SHA-256 of the files of a run beside its settings."""
    paths = [Path(folder, name) for name in RUN_FILES if name != "settings.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def compare_runs(folders: Sequence[str | PathLike[str]]) -> list[dict[str, Any]]:
    """A row per run, sorted by the student's distance from its teacher.

    Every row has the same columns: `run`; the settings that differ between runs (None if a run has no such setting);
    the measures of the student at the end, `COMPARED_COLUMNS` or, for runs of `skd`, `ROLLOUT_COLUMNS`; `num_tokens`
    trained on, as logged last, and `seconds` of training (None if they were not logged).

    Raises:
        `ValueError`: a folder without a finished run, or runs measured on held-out rows beside runs of `skd`.
    """
    runs = _named_runs(folders)
    names = {name: None for run in runs.values() for name in run.settings}  # a set that keeps the order
    differing = [
        name
        for name in names
        if name not in PLACES and len({json.dumps(run.settings.get(name)) for run in runs.values()}) > 1
    ]
    columns = _columns(runs)
    rows = [
        {"run": name}
        | {setting: run.settings.get(setting) for setting in differing}
        | {measure: run.measures.get(measure) for measure in columns}
        | {"num_tokens": run.logged("num_tokens"), "seconds": run.logged("train_runtime")}
        for name, run in runs.items()
    ]
    divergence = "kl" if "kl" in columns else "eval_kd"
    return sorted(rows, key=lambda row: math.inf if row[divergence] is None else row[divergence])


def save_comparison(folder: str | PathLike[str], folders: Sequence[str | PathLike[str]]) -> None:
    """Prints the rows of `compare_runs`, and writes them to `comparison.md`, `.json` and, with curves, `.png`."""
    rows, runs = compare_runs(folders), _named_runs(folders)
    columns = _columns(runs)
    forms = {**columns, "num_tokens": ("tokens", "{:,.0f}"), "seconds": ("seconds", "{:.0f}")}

    def written(row: dict[str, Any]) -> dict[str, str]:
        cells = {}
        for key, value in row.items():
            title, form = forms.get(key, (key, "{:g}" if isinstance(value, float) else "{}"))
            cells[title] = "" if value is None else form.format(value)
        return cells

    # Settings and measures in one table would not fit a terminal. Names break into lines at spaces.
    measures = [{key: row[key] for key in ("run", *forms)} for row in rows]
    settings = [{key.replace("_", " "): value for key, value in row.items() if key not in forms} for row in rows]
    sizes = measured_on({row["run"]: runs[row["run"]].measures for row in rows})
    for part, title in ((measures, f"measured on {sizes}" if sizes else None), (settings, None)):
        Console().print(table([written(row) for row in part], title=title))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(_markdown_measured([written(row) for row in rows], sizes), "utf-8")
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    save_picture(
        folder / "comparison.png",
        {row["run"]: runs[row["run"]].history for row in rows},
        {row["run"]: runs[row["run"]].measures for row in rows},
        columns,
        terms=("ce",),  # the only term whose meaning does not depend on the settings
    )
    print(f"comparison.md, comparison.json and comparison.png are in {folder}")


def _named_runs(folders: Sequence[str | PathLike[str]]) -> dict[str, Run]:
    """Runs by the last part of their path, or by the whole path if last parts are equal."""
    paths = [Path(folder) for folder in folders]
    is_unique = len({path.resolve().name for path in paths}) == len(paths)
    return {path.resolve().name if is_unique else str(path): load_run(path) for path in paths}


def _columns(runs: Mapping[str, Run]) -> Mapping[str, tuple[str, str]]:
    """Columns of the measures that the runs have."""
    written = {name: "student_perplexity" not in run.measures for name, run in runs.items()}
    if len(set(written.values())) > 1:
        mixed = ", ".join(name for name, is_written in written.items() if is_written)
        raise ValueError(f"{mixed}: measured on text that the models write, not on held-out rows; compare by itself")
    return ROLLOUT_COLUMNS if any(written.values()) else COMPARED_COLUMNS
