"""Tables of finished runs of `benchmarks.real_model`: means over seeds, intervals over held-out rows.

Shapes: S seeds, R held-out rows.
"""

import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.measure import print_table
from hf_distill.evaluating.gaps import BASE, STUDENT, TEACHER, gap_recovered, mean_measure
from hf_distill.report import markdown

Run = dict[str, Any]
KEY = ("data", "student", "steps", "batch_size", "length", "held_out", "arm", "learning_rate", "seed")
UNTRAINED, HARD, KD = "untrained", "hard labels", "KD"
NUM_RESAMPLES = 4000
BEGIN, END = "<!-- real_model: begin -->", "<!-- real_model: end -->"  # marks in a Markdown page


# --------------------------------------------------------------------------------------------------------------- files


def read_runs(output: Path, keep: Path | None) -> list[Run]:
    """Finished runs of a folder and of a file of earlier ones, without those that are in both."""
    lines = keep.read_text(encoding="utf-8") if keep and keep.exists() else "[]"
    files = sorted((output / "runs").glob("*.json"))
    runs = [*json.loads(lines), *(json.loads(path.read_text(encoding="utf-8")) for path in files)]
    found = {tuple(run[name] for name in KEY): run for run in runs}
    return [found[key] for key in sorted(found, key=str)]


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """A JSON file with a line for each run."""
    text = "[\n" + ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs) + "\n]\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# --------------------------------------------------------------------------------------------------------------- cells


def spread(runs: Sequence[Run], name: str, form: str) -> str:
    """The mean over seeds, and each seed's value if there are several."""
    values = [run["results"][name] for run in runs]
    each = f" ({', '.join(map(form.format, values))})" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + each


def answers_right(runs: Sequence[Run]) -> str:
    """Each score of generated answers: the mean over the seeds that have it, and each seed's value."""
    having = [{**run, "results": run["scores"]} for run in runs if "scores" in run]
    names = having[0]["scores"] if having else {}
    return "; ".join(f"{name.removeprefix('squad_')} {spread(having, name, '{:.1%}')}" for name in names)


def gap(runs: Sequence[Run], untrained: Run | None) -> str:
    """The share of the way from the untrained student to the teacher, in nats, with its interval over rows."""
    if untrained is None or runs[0]["arm"] == UNTRAINED:
        return ""
    nats = np.mean([run["rows"]["nats"] for run in runs], axis=0)  # (R,)
    rows = {
        BASE: np.array(untrained["rows"]["nats"]),
        STUDENT: nats,
        TEACHER: np.array(runs[0]["rows"]["teacher_nats"]),
    }
    found = gap_recovered(mean_measure("nats", rows, np.array(runs[0]["rows"]["tokens"], float)))
    return "" if found is None else f"{found.share:.1%} [{found.low:.1%}, {found.high:.1%}]"


def difference(runs: Sequence[Run], others: Sequence[Run], name: str) -> str:
    """`name` per token minus that of other runs, over the seeds that both have, with its interval over rows.

    The interval is that of a paired bootstrap: rows are drawn with replacement, the same ones for both.
    """
    by_seed = {run["seed"]: run for run in others}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs or runs[0]["arm"] == others[0]["arm"]:
        return ""
    sums = np.mean([np.subtract(run["rows"][name], other["rows"][name]) for run, other in pairs], axis=0)  # (R,)
    tokens = np.array(runs[0]["rows"]["tokens"], float)  # (R,)
    chosen = np.random.default_rng(0).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    low, high = np.percentile(sums[chosen].sum(1) / tokens[chosen].sum(1), (2.5, 97.5))
    return f"{sums.sum() / tokens.sum():+.3f} [{low:+.3f}, {high:+.3f}]"


# -------------------------------------------------------------------------------------------------------------- tables


def budget_of(run: Run) -> tuple:
    return run["data"], run["student"], run["batch_size"], run["length"], run["held_out"]


def budget_text(runs: Sequence[Run]) -> str:
    """The title of a table."""
    trained = [run for run in runs if run["steps"]]
    labels = statistics.mean(run["labels"] / run["steps"] for run in trained) if trained else 0
    data, student, batch_size, length, held_out = budget_of(runs[0])
    results = runs[0]["results"]
    size = f"updates of {batch_size} rows of at most {length} tokens, about {labels:.0f} label-bearing"
    measured = (
        f"{held_out} held-out rows, {results['tokens']:,} tokens, the teacher's nats {results['teacher_nats']:.3f}"
    )
    right = next(
        (answers_right([{**run, "scores": run["teacher_scores"]}]) for run in runs if "teacher_scores" in run), ""
    )
    return f"{data}, student: {student}; {size}; {measured}{right and f', its answers: {right}'}"


def table_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row for each arm and number of updates, at its best learning rate."""
    untrained = next((run for run in runs if run["arm"] == UNTRAINED), None)
    groups = by_arm(runs)
    best = best_rates(groups)
    scored = any("scores" in run for run in runs)
    found = []
    for steps, arm, rate in sorted(best, key=order):
        group = groups[steps, arm, rate]
        kd, hard = (next((groups[key] for key in best if key[:2] == (steps, name)), None) for name in (KD, HARD))
        found.append(
            {
                "arm": arm, "updates": str(steps or "-"), "rate": f"{rate:g}" if steps else "-",
                "nats per token": spread(group, "nats", "{:.3f}"),
                "KL to the teacher": spread(group, "kl", "{:.3f}"),
                "agreement": spread(group[:1], "agreement", "{:.1%}"), "ECE": spread(group[:1], "ece", "{:.3f}"),
                **({"answers right": answers_right(group)} if scored else {}),
                "gap recovered": gap(group, untrained),
                "KL minus KD's": difference(group, kd, "kl") if kd else "",
                "nats minus hard labels'": difference(group, hard, "nats") if hard else "",
                "CPU s": f"{statistics.mean(run['cpu_seconds'] for run in group):.0f}" if steps else "",
            }
        )  # fmt: skip
    return found


def sweep_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Hard labels and KD at each learning rate that the first seed has run, by number of updates."""
    first = [run for run in runs if run["arm"] in (HARD, KD) and run["seed"] == 0]
    found: dict[tuple, dict[str, str]] = {}
    for run in sorted(first, key=lambda run: (run["steps"], run["learning_rate"], run["arm"] != HARD)):
        steps, rate = run["steps"], run["learning_rate"]
        columns = dict.fromkeys((f"{arm}: {title}" for arm in (HARD, KD) for title in ("nats per token", "KL")), "")
        row = found.setdefault((steps, rate), {"updates": str(steps), "rate": f"{rate:g}", **columns})
        for title, name in (("nats per token", "nats"), ("KL", "kl")):
            row[f"{run['arm']}: {title}"] = f"{run['results'][name]:.3f}"
    return [*found.values()]


def by_arm(runs: Sequence[Run]) -> dict[tuple, list[Run]]:
    """Runs by updates, arm and learning rate."""
    groups: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run["steps"], run["arm"], run["learning_rate"], run["seed"])):
        groups.setdefault((run["steps"], run["arm"], run["learning_rate"]), []).append(run)
    return groups


def order(key: tuple) -> tuple:
    """Untrained, hard labels and KD first, the other arms by name."""
    steps, arm, rate = key
    first = (UNTRAINED, HARD, KD)
    return steps, first.index(arm) if arm in first else len(first), arm, rate


def best_rates(groups: dict[tuple, list[Run]]) -> list[tuple]:
    """Of each arm and number of updates, the rate with the lowest nats (hard labels) or KL (others) of its first seed.

    A rate that more seeds have run goes before one that fewer have.
    """

    def worth(key: tuple) -> tuple:
        results = groups[key][0]["results"]
        return -len(groups[key]), results["nats" if key[1] == HARD else "kl"]

    return [min(same, key=worth) for _, same in groupby(sorted(groups), key=lambda key: key[:2])]


def all_tables(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Titles and rows: a table for each data set, student and size of an update, and one of its learning rates."""
    runs = [run for run in runs if "rows" in run]  # those of benchmarks.real_tokenizers have other numbers
    for _, same in groupby(sorted(runs, key=lambda run: str(budget_of(run))), key=budget_of):
        group = [*same]
        yield budget_text(group), table_rows(group)
        rates = sweep_rows(group)
        if len(rates) > len({row["updates"] for row in rates}):
            yield f"{group[0]['data']}, student: {group[0]['student']}; learning rates, one seed", rates


def print_tables(runs: Sequence[Run], as_markdown: bool) -> None:
    for title, rows in all_tables(runs):
        print_table(title, rows, as_markdown)
        print()


def write_tables(page: Path, runs: Sequence[Run]) -> None:
    """Replaces the tables between the two marks of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(f"{BEGIN}\n", 1)
    _, after = rest.split(END, 1)
    tables = (f"{fill(f'**{title}**', 120)}\n\n{markdown(rows)}" for title, rows in all_tables(runs))
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{after}", encoding="utf-8")
