"""A report as a page: one HTML file without a network, of one run or of several side by side.

`page.html` is the frame; its style, scripts and data are put into it when it is written. Python prepares everything
that is shown, as one JSON; the scripts only draw it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from hf_distill.comparison import (
    compared_columns,
    group_rows,
    ranked_groups,
    setting_tables,
    setting_text,
)
from hf_distill.page.charts import chart_data
from hf_distill.report import (
    EVALUATION_COLUMNS,
    FIDELITY_COLUMNS,
    HARD_LABEL_COLUMNS,
    ROLLOUT_COLUMNS,
    evaluation_rows,
    measured_on,
    rows_with_teacher,
    verdict,
)
from hf_distill.runs import BASELINE, Run, named_runs, read_run, with_baselines

MAX_BYTES = 4_900_000  # of a page
SCRIPTS = ("charts.js", "tokens.js", "rows.js", "page.js")
# Settings of a run that stand above the others: those that exist, by their names for people.
MAIN_SETTINGS = {
    "model": "student",
    "teacher_model": "teacher",
    "dataset": "training rows",
    "eval_dataset": "held-out rows",
    "divergence": "divergence",
    "temperature": "temperature",
    "student_temperature": "temperature of drafts",
    "teacher_temperature": "temperature of corrections",
    "kd_weight": "weight of the divergence",
    "hidden_weight": "weight of hidden states",
    "kv_weight": "weight of keys and values",
    "learning_rate": "learning rate",
    "per_device_train_batch_size": "rows of a batch",
    "max_steps": "updates at most",
    "num_train_epochs": "epochs",
    "lora_r": "rank of LoRA",
    "seed": "seed",
}

# The columns of the results, by their titles.
COLUMNS = {
    "perplexity": "exp of the mean of -log p over the held-out tokens: less is better",
    "teacher's": "the teacher's perplexity on the same tokens",
    "KL, nats": "mean of KL(teacher ‖ student) over the tokens: less is better, 0 for the teacher itself",
    "divergence, nats": "mean of the divergence that was trained, at the temperature of the run: less is better",
    "hard labels, nats": "mean of -log p over the held-out tokens: less is better",
    "agreement": "share of tokens where student and teacher have the same most likely token",
    "acceptance": "share of the student's drafted tokens that the teacher would keep in speculative decoding, expected",
    "accepted": "share of the student's drafted tokens that the teacher kept",
}
MAX_ANSWERS, MAX_CHARACTERS = 30, 600  # generated answers that are shown, and how much of a text


def save_page(path: str | PathLike[str], folders: Sequence[str | PathLike[str]]) -> None:
    """Writes the page of the runs in these folders, and of their baselines.

    Raises:
        `ValueError`: no run has ended in one of the folders, its files are of different runs, or runs that were
            measured on held-out rows stand beside runs of `skd`.
    """
    write_page(path, page_of(with_baselines(named_runs(folders, read_run), folders)))


def write_page(path: str | PathLike[str], page: Mapping[str, Any]) -> None:
    """Writes a page; rows that would make it larger than `MAX_BYTES` are left out, which it says.

    Args:
        path: the file.
        page: as [`page_of`] makes it.
    """
    folder = files("hf_distill.page")
    read = {name: (folder / name).read_text("utf-8") for name in ("page.html", "page.css", *SCRIPTS)}
    frame = read["page.html"].replace("/*style*/", read["page.css"])
    frame = frame.replace("/*script*/", "\n".join(read[name] for name in SCRIPTS))
    titles = {title for table in page["tables"] for row in table["rows"] for title in row}
    page = {**page, "columns": [pair for pair in COLUMNS.items() if pair[0] in titles]}
    before, after = frame.split("/*data*/")
    runs = page["runs"]
    empty = {**page, "runs": [{**run, "tokens": run["tokens"] and {**run["tokens"], "rows": []}} for run in runs]}
    room = MAX_BYTES - len(frame.encode()) - len(_json(empty))
    shares = max(1, sum(run["tokens"] is not None for run in runs))
    fitting = [{**run, "tokens": run["tokens"] and _fitting(run["tokens"], room // shares)} for run in runs]
    Path(path).write_text(before + _json({**page, "runs": fitting}) + after, encoding="utf-8")


def page_of(runs: Mapping[str, Run]) -> dict[str, Any]:
    """The JSON of a page.

    Returns:
        A dict with `title`; `tables`, `texts` and `settings`, lists of dicts with `rows`, whose cells are text, and
        `note`;
        `charts` ([`~hf_distill.page.charts.chart_data`]); and `runs`, dicts with `name`, `about`, pairs of text,
        `warnings`, `options`, pairs of text, and `tokens`, what `comparison_data` returned, or None.
    """
    measured = {name: run for name, run in runs.items() if run.results}
    tables: list[dict[str, Any]] = []
    if len(runs) == 1:
        tables = [_results(run) for run in measured.values()]
    elif measured:
        columns, groups = compared_columns(measured), ranked_groups(measured)
        for group in groups:
            measured_rows = _measured({name: run.measures for name, run in group.items()}, next(iter(group.values())))
            note = f"{_verdicts(group)} {measured_rows}".strip()
            if len(groups) > 1:
                note += " These are other held-out rows than those of the other tables: their numbers do not compare."
            tables.append({"rows": group_rows(group, columns), "note": note})
    if missing := [name for name in runs if name not in measured]:
        note = f"{', '.join(missing)}: there were no held-out rows (--eval_dataset) to measure the student on."
        tables.append({"rows": [], "note": note})
    tables += [_evaluation(name, run) for name, run in runs.items() if run.evaluation]
    return {
        "title": " and ".join(runs) if len(runs) <= 3 else f"{len(runs)} runs",
        "tables": tables,
        "texts": [_answers(name, run.answers) for name, run in runs.items() if run.answers],
        "settings": [{"rows": rows, "note": ""} for rows in setting_tables(runs)],
        "charts": chart_data(runs),
        "runs": [_run(name, run) for name, run in runs.items()],
    }


def _run(name: str, run: Run) -> dict[str, Any]:
    return {
        "name": name,
        "about": _about(run),
        "warnings": run.recorded.get("warnings", []),
        "options": [[setting, setting_text(value)] for setting, value in run.settings.items() if value is not None],
        "tokens": run.tokens,
    }


def _about(run: Run) -> list[list[str]]:
    """The run's settings, as pairs of text."""
    settings, recorded = run.effective(), run.recorded
    whole = {**run.settings, **settings}
    found = [["command", f"hf-distill {recorded['command']}"]] if "command" in recorded else []
    for name, label in MAIN_SETTINGS.items():
        value = settings.get(name) if name != "eval_dataset" else whole.get(name)
        is_greedy = value == 0 and name.endswith("_temperature")
        if is_greedy or value not in (None, 0, -1, "", []):
            found.append([label, setting_text(value)])
    counts = recorded.get("num_rows", {})
    found += [[f"rows of the {name} set", f"{count:,}"] for name, count in counts.items() if count is not None]
    logged = {"updates": max((entry.get("step", 0) for entry in run.history), default=None)}
    logged |= {"tokens trained on": run.logged("num_tokens"), "seconds of training": run.logged("train_runtime")}
    found += [[label, f"{value:,.0f}"] for label, value in logged.items() if value is not None]
    if versions := recorded.get("versions"):
        found.append(["versions", ", ".join(f"{name} {version}" for name, version in versions.items())])
    return found


def _columns(run: Run) -> Mapping[str, tuple[str, str]]:
    """The columns of what was measured of a run."""
    if "kl" in run.measures:
        return FIDELITY_COLUMNS
    if "eval_rollout/acceptance_rate" in run.measures:
        return ROLLOUT_COLUMNS
    return EVALUATION_COLUMNS if "eval_kd" in run.measures else HARD_LABEL_COLUMNS


def _results(run: Run) -> dict[str, Any]:
    """The table of a single run: every result, and the teacher."""
    columns = _columns(run)
    note = f"{verdict(run.results, columns)} {_measured(run.results, run)}".strip()
    return {"rows": rows_with_teacher(run.results, columns), "note": note}


def _verdicts(group: Mapping[str, Run]) -> str:
    """The verdicts on runs that have a baseline, one after the other."""
    found = {
        name: verdict({"after": run.measures, BASELINE: run.baseline}, _columns(run))
        for name, run in group.items()
        if run.baseline
    }
    return " ".join(text if len(found) == 1 else f"{name}: {text}" for name, text in found.items() if text)


def _evaluation(name: str, run: Run) -> dict[str, Any]:
    """The table of `hf-distill evaluate`."""
    assert run.evaluation is not None
    found, measures = run.evaluation, run.evaluation["measures"]
    sizes = sorted({each["num_rows"] for each in measures.values() if each["num_rows"]})
    of = " to ".join(f"{size:,}" for size in dict.fromkeys((*sizes[:1], *sizes[-1:])))
    source = "rows and questions" if found["settings"].get("tasks") else f"rows of {found['rows']}"
    note = f"{name}: hf-distill evaluate" + (f", on {of} {source}" if sizes else "")
    note += f"; {', '.join(f'{role} is {model}' for role, model in found['models'].items())}"
    if any(each["gap_recovered"] for each in measures.values()):
        note += "; gap recovered is (student - base) / (teacher - base), with its 95% interval over rows"
    return {"rows": evaluation_rows(measures), "note": " ".join([f"{note}.", *found["notes"]])}


def _answers(name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Generated answers side by side: first those that the student gets wrong and its teacher or base right."""
    models = [key for key, value in answers[0].items() if isinstance(value, Mapping)]
    measure = next(key for key in answers[0][models[0]] if key != "text")

    def lost(row: Mapping[str, Any]) -> float:
        """How much better the best of the other models is than the student."""
        return max((row[model][measure] for model in models), default=0.0) - row["student"][measure]

    chosen = sorted(range(len(answers)), key=lambda i: -lost(answers[i]))[:MAX_ANSWERS]
    rows = []
    for i in chosen:
        texts = {
            model: f"[{answers[i][model][measure]:.3g}] {_shortened(answers[i][model]['text'])}" for model in models
        }
        question, right = _shortened(answers[i].get("prompt", "")), _shortened(answers[i]["answers"][0])
        rows.append({"": str(i), "question": question, "right answer": right, **texts})
    shown = f"{len(rows):,} of {len(answers):,} answers" if len(rows) < len(answers) else f"{len(rows):,} answers"
    return {
        "rows": rows,
        "note": f"{name}: {shown} of hf-distill evaluate, each with its {measure} in brackets. Those where the student "
        "is furthest behind another model come first.",
    }


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


def _measured(results: Mapping[str, Mapping[str, float]], run: Run) -> str:
    sizes = measured_on(results, run.recorded.get("num_rows", {}).get("held-out"))
    return f"Measured on {sizes}, which were not trained on." if sizes else "Measured on held-out rows."


def _fitting(tokens: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    """The rows that fit, from the first on, and how many do not."""
    kept: list[Any] = []
    for row in tokens["rows"]:
        max_bytes -= len(_json(row)) + 1
        if max_bytes < 0:
            break
        kept.append(row)
    return {**tokens, "rows": kept, "notes": [*tokens["notes"], *_left_out(kept, tokens)]}


def _left_out(kept: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> Iterable[str]:
    """Sentences about what is not shown."""
    numbers, num_rows = {row["number"] for row in kept}, tokens["num_rows"]
    if num_rows is not None and len(numbers) < num_rows:
        yield f"Shown are the first {len(numbers):,} of {num_rows:,} held-out rows."
    elif len(kept) < len(tokens["rows"]):
        yield f"Shown are the first {len(kept):,} of {len(tokens['rows']):,} rows that were compared."
    if cut := sum(row["length"] > len(row["tokens"]) for row in kept):
        most = max(len(row["tokens"]) for row in kept)
        yield f"Of {cut:,} longer rows the first {most:,} tokens are shown."


def _json(value: Any) -> str:
    """JSON that may stand in a script of a page: `</script>` and `<!--` cannot end it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
