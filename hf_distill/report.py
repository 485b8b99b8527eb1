"""Results as a table in the terminal and in a notebook, as Markdown and as a picture."""

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text

from hf_distill.metric_names import more_is_better

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
# The same without a teacher.
HARD_LABEL_COLUMNS = {
    "student_perplexity": FIDELITY_COLUMNS["student_perplexity"],
    "eval_ce": EVALUATION_COLUMNS["eval_ce"],
}
# The same for `SpeculativeKDTrainer.evaluate`, whose completions are generated.
ROLLOUT_COLUMNS = {
    "eval_kd": ("divergence, nats", "{:.4f}"),
    "eval_agreement": ("agreement", "{:.1%}"),
    "eval_rollout/acceptance_rate": ("accepted", "{:.1%}"),
}
# Logged terms in the histories of a picture, each with its own line style.
LOSS_TERMS = ("loss", "kd", "ce", "hidden", "kv", "aux_loss")
LINE_STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
# Terms in other units than nats.
OTHER_UNITS = {"hidden", "kv", "aux_loss"}


def size_text(num_bytes: float) -> str:
    """A number of bytes for people, such as 1.5 GB; a KB has 1,024."""
    unit, suffix = pick_unit_and_suffix(int(num_bytes), ["bytes", "KB", "MB", "GB", "TB"], 1024)
    return f"{num_bytes / unit:.4g} {suffix}"


def result_rows(
    results: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS
) -> list[dict[str, str]]:
    """One row of text per named result, by default of `evaluate_fidelity`, in the order given."""
    return [
        {"": name, **{title: form.format(values[key]) for key, (title, form) in columns.items() if key in values}}
        for name, values in results.items()
    ]


def rows_with_teacher(
    results: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS
) -> list[dict[str, str]]:
    """The same with the teacher as a row of its own, where all results have one teacher; every row has all columns."""
    columns = {key: column for key, column in columns.items() if key != "teacher_perplexity"}
    teacher = teacher_results(results)
    rows = result_rows({**results, **({"teacher": teacher} if teacher else {})}, columns)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return [{title: row.get(title, "") for title in titles} for row in rows]


def evaluation_rows(measures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row of text per measure of `evaluation.json`: base, student and teacher, and the gap recovered."""
    models = [
        name for name in ("base", "student", "teacher") if any(name in each["values"] for each in measures.values())
    ]
    rows = []
    for name, measure in measures.items():
        values, gap = measure["values"], measure["gap_recovered"]
        row = {
            "": name,
            **{model: measure["format"].format(values[model]) if model in values else "" for model in models},
        }
        if len(models) == 3:
            row["gap recovered"] = f"{gap['share']:z.0%} ({gap['low']:z.0%} to {gap['high']:z.0%})" if gap else ""
        rows.append(row)
    return rows


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


# Claims about a student beside another one (better, worse, as good), by the first of these measures that both have.
_CLAIMS = {
    ("kl", "eval_kd"): ("is closer to the teacher", "is further from the teacher", "is as close to the teacher"),
    ("student_perplexity", "eval_ce"): (
        "predicts the held-out rows better", "predicts the held-out rows worse", "predicts the held-out rows as well"
    ),
}  # fmt: skip
_AS_GOOD = 0.02  # nats that differ by a smaller part of the larger one are called as good: seeds differ by as much

_NOTHING = 1e-4  # nats
_NO_NUMBER = 1e12  # a perplexity above it says nothing


def verdict(
    results: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, str]] = FIDELITY_COLUMNS,
    *,
    advice: bool = True,
) -> str:
    """The outcome of a run in words: the student beside its baseline, or beside its state before the training.

    Results are named `after` and, where they are known, `before` and `baseline`; other names, and numbers that are not
    finite, are left out of it. Empty where there is nothing to compare.

    Args:
        advice (`bool`): whether to say what to do next, too.
    """
    student, other = results.get("after", {}), results.get("baseline") or results.get("before", {})
    claims, compared = [], set()
    for keys, (better, worse, same) in _CLAIMS.items():
        key = next((key for key in keys if key in columns and key in student and key in other), None)
        if key is None or not all(math.isfinite(v[key]) and v[key] < _NO_NUMBER for v in (student, other)):
            continue
        title, form = columns[key]
        mine, theirs = _nats(key, student[key]), _nats(key, other[key])
        gain = (theirs - mine) / max(abs(theirs), abs(mine), 1e-12)
        is_same = abs(gain) < _AS_GOOD or abs(theirs - mine) < _NOTHING
        claim = same if is_same else better if gain > 0 else worse
        claims.append(f"{claim} ({title}: {form.format(student[key])} against {form.format(other[key])})")
        compared.add(key)
    if not claims:
        return ""
    has_baseline = bool(results.get("baseline"))
    against = "the baseline on hard labels" if has_baseline else "its state before the training"
    sentences = [f"Compared with {against}, the student {' and '.join(claims)}."]
    if advice and not has_baseline and compared & {"kl", "eval_kd"}:
        sentences.append("Add --baseline to see whether the teacher helped.")
    teacher, best = student.get("teacher_perplexity", math.inf), student.get("student_perplexity", math.inf)
    best = min(best, other.get("student_perplexity", math.inf))
    if advice and math.isfinite(teacher) and math.log(teacher / best) > _AS_GOOD:
        form = columns.get("teacher_perplexity", ("", "{:.3f}"))[1]
        sentences.append(
            f"The teacher itself predicts these rows worse ({form.format(teacher)}): they may have a form that it does "
            "not use. `hf-distill doctor` looks for other reasons."
        )
    return " ".join(sentences)


def _nats(key: str, value: float) -> float:
    """A measure in nats per token; a perplexity is their exponential."""
    return math.log(value) if key == "student_perplexity" and value > 0 else value


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A `rich` table of rows with the same keys.

    The first column is text, and others whose cells are `Text`; the rest is aligned as numbers.

    On a narrow terminal titles break into two lines, so that none is cut.
    """
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(rows[0]):
        view.add_column(name, justify="left" if _is_text(rows, i) else "right", no_wrap=not i, overflow="fold")
    for row in rows:
        view.add_row(*(value if isinstance(value, Text) else str(value) for value in row.values()))
    return view


def _is_text(rows: Sequence[Mapping[str, Any]], column: int) -> bool:
    return not column or isinstance(list(rows[0].values())[column], Text)


def _escaped(value: Any) -> str:
    return html.escape(str(value), quote=False)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows as a Markdown table; cells may have any characters."""
    cells = [[_escaped(v).replace("|", "\\|").replace("\n", "<br>") for v in row.values()] for row in rows]
    rule = ["---" if _is_text(rows, i) else "---:" for i in range(len(rows[0]))]
    lines = [list(rows[0]), rule, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# A line, or the rows of a table and its title.
Part = str | Text | tuple[Sequence[Mapping[str, Any]], str | None]


class Shown:
    """A result that shows itself as tables and lines: printed, and as the last line of a notebook's cell.

    Its class has the method `shown`.
    """

    def shown(self) -> list[Part]:
        """The tables and lines, from top to bottom."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self.shown():
            yield table(*part) if isinstance(part, tuple) else part if isinstance(part, Text) else Text(part)

    def __repr__(self) -> str:
        def text(part: Part) -> str:
            if not isinstance(part, tuple):
                return str(part)
            console = Console(file=io.StringIO(), force_jupyter=False, color_system=None)
            with console.capture() as capture:
                console.print(table(*part))
            return capture.get().rstrip()

        return "\n".join(map(text, self.shown()))

    def _repr_markdown_(self) -> str:
        def paragraph(part: Part) -> str:
            if not isinstance(part, tuple):
                return _escaped(part)
            rows, title = part
            return (f"**{title}**\n\n" if title else "") + markdown(rows)

        return "\n\n".join(map(paragraph, self.shown()))


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
    is_one_set: bool = True,
) -> None:
    """A PNG: the loss terms over the steps, and a bar per model for each measure of fidelity.

    Dots are held-out rows. A line across shows the teacher, if all results have the same one.

    Args:
        path: the file to write.
        histories: for each run its `trainer.state.log_history`.
        results: for each model what `evaluate_fidelity` returned, or other numbers with their `columns`.
        terms: the terms of the histories to draw, where they were logged.
        num_rows: the rows that were measured.
        is_one_set: whether all results are of the same rows; the picture says it if they are not.
    """
    measured = set.intersection(*(set(values) for values in results.values()))
    drawn_columns = {key: column for key, column in columns.items() if key in measured and key != "teacher_perplexity"}
    figure = Figure(figsize=(14, 4), layout="constrained")
    curves, *bars = figure.subplots(1, 1 + len(drawn_columns), width_ratios=[2.6, *[1] * len(drawn_columns)])
    colors = {name: f"C{i}" for i, name in enumerate([*results, *(run for run in histories if run not in results)])}
    teacher = teacher_results(results)
    _draw_terms(curves, histories, colors, terms, teacher if "ce" in terms else {})
    for axes, (key, column) in zip(bars, drawn_columns.items(), strict=True):
        heights = {name: values[key] for name, values in results.items()}
        _draw_bars(axes, heights, colors, key, column, teacher.get(key))
    sizes = measured_on(results, num_rows)
    if not is_one_set:
        figure.suptitle("measured on different held-out rows", fontsize=8, x=0.99, horizontalalignment="right")
    elif sizes:
        figure.suptitle(f"measured on {sizes}", fontsize=8, x=0.99, horizontalalignment="right")
    figure.savefig(path, dpi=130)


def teacher_results(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The teacher's own measures, under the names of a student's, if all results have the same teacher."""
    found = {values.get("teacher_perplexity") for values in results.values()}
    known = [value for value in found if value is not None]
    if len(found) != len(known) or not known or max(known) > 1.0001 * min(known):  # devices round differently
        return {}
    return {"student_perplexity": known[0], "kl": 0.0, "agreement": 1.0, "expected_acceptance": 1.0}


def _draw_bars(
    axes: Axes,
    heights: Mapping[str, float],
    colors: Mapping[str, str],
    key: str,
    column: tuple[str, str],
    teacher: float | None,
) -> None:
    title, form = column
    drawn = axes.bar(list(heights), list(heights.values()), color=[colors[name] for name in heights])
    axes.bar_label(drawn, labels=[form.format(height) for height in heights.values()], fontsize=7)
    positive = [height for height in heights.values() if height > 0]
    better = more_is_better(key)
    if teacher and not better:  # a line at 0, or at 100 %, is the axis
        axes.axhline(teacher, color="0.4", linewidth=1, linestyle="--")
        axes.annotate(
            "teacher", (1.02, teacher), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=7
        )
        positive.append(teacher)
    if not better and positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")  # or the bar of an untrained model would hide the others
        axes.set_ylim(min(positive) / 3, 2 * max(positive))  # room for the number above the highest bar
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if "%" in form:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(f"{title}\n({'more' if better else 'less'} is better)", fontsize=9)
    axes.tick_params(axis="x", rotation=35, labelsize=7)
    axes.margins(y=0.15)


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)


def _draw_terms(
    axes: Axes,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    colors: Mapping[str, str],
    terms: Sequence[str],
    teacher: Mapping[str, float],
) -> None:
    for run, history in histories.items():
        for term, style in zip(terms, LINE_STYLES, strict=False):
            for name, prefix, marker in ((term, "", ""), (f"eval_{term}", "held-out ", "o")):
                points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
                if points:
                    label = ": ".join([run] * (len(histories) > 1) + [prefix + term] * (len(terms) > 1 or bool(prefix)))
                    axes.plot(
                        *zip(*points, strict=True), linestyle=style, color=colors[run], label=label, marker=marker,
                        markersize=4, alpha=1.0 if prefix else 0.7,
                    )  # fmt: skip
    title = "loss terms (kd without the factor T^2)" if len(terms) > 1 else f"{terms[0]} on training rows"
    logged = {term for history in histories.values() for entry in history for term in entry}
    if len(terms) == 1 and f"eval_{terms[0]}" in logged:
        title += "; dots: held-out rows"
    others = [term for term in terms if term in OTHER_UNITS & logged]
    unit = f"nats per token; {', '.join(others)}: a distance" if others else "nats per token"
    if teacher and "eval_ce" in logged:
        nats = math.log(teacher["student_perplexity"])
        axes.axhline(nats, color="0.4", linewidth=1, linestyle="--", label="teacher, held-out ce")
    axes.set(xlabel="step", ylabel=unit, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
