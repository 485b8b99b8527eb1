"""Finished runs side by side: what they measured, and the settings in which they differ."""

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_distill.report import (
    FIDELITY_COLUMNS,
    ROLLOUT_COLUMNS,
    markdown,
    measured_on,
    result_rows,
    save_picture,
    table,
    teacher_results,
)
from hf_distill.runs import Run, differing_settings, named_runs, with_ends

# Columns of a comparison of runs.
COMPARED_COLUMNS = {key: FIDELITY_COLUMNS[key] for key in ("student_perplexity", "kl", "agreement")}
LOGGED_COLUMNS = {"num_tokens": ("tokens", "{:,.0f}"), "seconds": ("seconds", "{:.0f}")}
# Runs beside each other in a table of settings: more would not fit 80 columns.
RUNS_OF_A_TABLE = 3


def compare_runs(folders: Sequence[str | PathLike[str]]) -> list[dict[str, Any]]:
    """A row per run: those of the same held-out rows follow each other, the best of them first.

    Every row has the same columns: `run`; the settings that matter and differ between runs (None where one has no
    effect); the measures of the student at the end, `COMPARED_COLUMNS` or, for runs of `skd`, `ROLLOUT_COLUMNS`;
    `num_tokens` trained on, as logged last, and `seconds` of training (None if they were not logged). The best run is
    the one closest to its teacher; of runs with different teachers, the one with the least perplexity.

    Raises:
        `ValueError`: a folder without a finished run, or runs measured on held-out rows beside runs of `skd`.
    """
    runs = named_runs(folders)
    differing = differing_settings(runs)
    return [
        {"run": name} | {setting: values[name] for setting, values in differing.items()} | _measures(run, runs)
        for group in ranked_groups(runs)
        for name, run in group.items()
    ]


def ranked_groups(runs: Mapping[str, Run]) -> list[dict[str, Run]]:
    """Runs that were measured on the same held-out rows, the best first; groups in the order of their first runs.

    Raises:
        `ValueError`: as [`compare_runs`].
    """
    columns = compared_columns(runs)
    groups: dict[Any, dict[str, Run]] = {}
    for name, run in runs.items():
        groups.setdefault(_held_out(run), {})[name] = run
    ranked = []
    for group in groups.values():
        is_one_teacher = len({json.dumps(run.settings.get("teacher_model")) for run in group.values()}) == 1
        names = ("kl", "eval_kd", "student_perplexity")
        if not is_one_teacher:  # distances to different teachers do not compare
            names = ("student_perplexity",)
        known = [name for name in names if name in columns and all(name in run.measures for run in group.values())]
        measure = next(iter(known), names[0])
        values = {name: run.measures.get(measure) for name, run in group.items()}
        ranked.append(dict(sorted(group.items(), key=lambda pair: _last_if_none(values[pair[0]]))))
    return ranked


def group_rows(group: Mapping[str, Run], columns: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """The table of a group: its runs, and their students before the training, baselines and teachers.

    What several runs have in common stands once; tokens and seconds stand beside the runs alone.
    """
    shown = {**columns, **LOGGED_COLUMNS}
    measures = {name: {key: run.measures[key] for key in columns if key in run.measures} for name, run in group.items()}
    rows = result_rows({name: {**measures[name], **_logged(run)} for name, run in group.items()}, shown)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    for kind in ("before", "baseline", "teacher"):
        found = {
            name: teacher_results(run.results) if kind == "teacher" else run.results.get(kind, {})
            for name, run in group.items()
        }
        cells = {name: result_rows({kind: values}, columns)[0] for name, values in found.items() if values}
        if len({json.dumps(row) for row in cells.values()}) == 1 and len(cells) == len(group):
            rows.append(next(iter(cells.values())))
        else:
            rows += [{**row, "": f"{kind}, {name}"} for name, row in cells.items()]
    return [{title: row.get(title, "") for title in titles} for row in rows]


def setting_tables(runs: Mapping[str, Run]) -> list[list[dict[str, str]]]:
    """Tables of the settings that matter and differ: a row for each, a column for each of a few runs."""
    differing, names = differing_settings(runs), list(runs)
    if not differing:
        return []
    return [
        [
            {"": setting, **{name: setting_text(values[name]) for name in names[start : start + RUNS_OF_A_TABLE]}}
            for setting, values in differing.items()
        ]
        for start in range(0, len(names), RUNS_OF_A_TABLE)
    ]


def setting_text(value: Any) -> str:
    """A setting for people; nothing where it has no effect."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def save_comparison(folder: str | PathLike[str], folders: Sequence[str | PathLike[str]]) -> None:
    """Prints the comparison, and writes it to `comparison.md`, `.json` and, with curves, `.png`.

    `comparison.json` has the rows of [`compare_runs`].
    """
    rows, runs = compare_runs(folders), named_runs(folders)
    columns, groups = compared_columns(runs), ranked_groups(runs)
    parts = []
    for group in groups:
        sizes = measured_on({name: run.measures for name, run in group.items()})
        note = f"Measured on {sizes}." if sizes else "Measured on the same held-out rows."
        if len(groups) > 1:
            note += " Other held-out rows than those of the other tables: their numbers do not compare."
        parts.append((group_rows(group, columns), note))
    parts += [(rows, "") for rows in setting_tables({name: run for group in groups for name, run in group.items()})]
    for part, note in parts:
        Console().print(table(part))
        if note:
            Console().print(note)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(markdown(part) + (f"\n{note}\n" if note else "") for part, note in parts)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    names = [row["run"] for row in rows]
    save_picture(
        folder / "comparison.png",
        {name: with_ends(runs[name]) for name in names},
        {name: runs[name].measures for name in names},
        columns,
        terms=("ce",),  # the only term whose meaning does not depend on the settings
        is_one_set=len(groups) == 1,
    )
    print(f"comparison.md, comparison.json and comparison.png are in {folder}")


def compared_columns(runs: Mapping[str, Run]) -> Mapping[str, tuple[str, str]]:
    """Columns of the measures that the runs have.

    Raises:
        `ValueError`: some were measured on held-out rows, others on text that models generated.
    """
    generated = {name: "student_perplexity" not in run.measures for name, run in runs.items()}
    if len(set(generated.values())) > 1:
        mixed = ", ".join(name for name, is_generated in generated.items() if is_generated)
        raise ValueError(f"{mixed}: measured on text that the models write, not on held-out rows; compare by itself")
    return ROLLOUT_COLUMNS if any(generated.values()) else COMPARED_COLUMNS


def _measures(run: Run, runs: Mapping[str, Run]) -> dict[str, Any]:
    logged = {"num_tokens": None, "seconds": None, **_logged(run)}
    return {measure: run.measures.get(measure) for measure in compared_columns(runs)} | logged


def _logged(run: Run) -> dict[str, float]:
    found = {"num_tokens": run.logged("num_tokens"), "seconds": run.logged("train_runtime")}
    return {name: value for name, value in found.items() if value is not None}


def _held_out(run: Run) -> Any:
    """The identity of the held-out rows; of older runs, their number of rows and tokens."""
    return run.recorded.get("held_out") or (run.measures.get("num_rows"), run.measures.get("num_tokens"))


def _last_if_none(value: float | None) -> float:
    return math.inf if value is None else value
