"""The page of a report: what is embedded in it, what is escaped, and how large it gets."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hf_distill import cli
from hf_distill.page import MAX_ANSWERS, MAX_BYTES, MAX_CHARACTERS, page_of, save_page, write_page
from hf_distill.page.charts import MAX_POINTS, chart_data
from hf_distill.runs import Run, read_run
from tests.test_cli import WRITTEN, options
from tests.test_cli_compare import HISTORY, MEASURES, make_run

EVIL = '</script><script>document.title="broken"</script><!-- \u202e\u0645\u0631\u062d\u0628\u0627 & \u2028'


class Reader(HTMLParser):
    """The scripts of a page, as a browser divides them, and the addresses that it names."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.addresses, self._script = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        if tag == "script":
            self.scripts.append([found, ""])
            self._script = self.scripts[-1]

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script[1] += data


def read_page(path):
    page = Reader(path.read_text("utf-8"))
    (data,) = (text for attributes, text in page.scripts if attributes.get("id") == "data")
    assert len(page.scripts) == 2
    return json.loads(data), page


def tokens_of(num_rows=2, num_tokens=4, texts=("a", "b", "c", "d", "e", "f")):
    """Rows as `comparison_data` makes them."""
    n = num_tokens - 1
    side = {"ids": [0, 1, 2, 3, 4] * n, "probs": [500, 200, 100, 50, 10] * n, "own": [123] * n}
    row = {"length": num_tokens, "tokens": [i % len(texts) for i in range(num_tokens)], "pieces": {}}
    row |= {"places": list(range(1, num_tokens)), "kl": [0.1234] * n, "student": side, "teacher": side}
    rows = [{"number": i, **row} for i in range(num_rows)]
    return {"kl_is": "exact", "notes": [], "num_rows": num_rows, "texts": list(texts), "rows": rows}


def run_of(**changes):
    results = {"before": MEASURES, "after": MEASURES | {"kl": 0.25}}
    return Run(**{"settings": {"model": "m"}, "history": HISTORY, "results": results, "recorded": {}} | changes)


@pytest.mark.parametrize(
    ("tasks", "source"), [(None, "8 rows of rows.jsonl"), (["arc_easy"], "3 to 8 rows and questions")]
)
def test_the_table_of_evaluate_stands_below_the_results(tasks, source):
    gap = {"share": 0.5, "low": 0.25, "high": 0.75}
    values = {"base": 0.0, "student": 0.5, "teacher": 1.0}
    measures = {"f1": {"values": values, "format": "{:.1%}", "num_rows": 8, "gap_recovered": gap}}
    if tasks:
        measures["arc_easy acc"] = {"values": values, "format": "{:.1%}", "num_rows": 3, "gap_recovered": None}
    models = {"base": "out/baseline", "student": "out", "teacher": "some/teacher"}
    evaluation = {"models": models, "measures": measures, "rows": "rows.jsonl", "notes": ["A note."]}
    evaluation["settings"] = {"tasks": tasks}
    tables = page_of({"run": run_of(evaluation=evaluation)})["tables"]
    assert tables[1]["rows"][0] == {
        "": "f1", "base": "0.0%", "student": "50.0%", "teacher": "100.0%", "gap recovered": "50% (25% to 75%)"
    }  # fmt: skip
    said = "base is out/baseline, student is out, teacher is some/teacher"
    assert f"hf-distill evaluate, on {source}; {said}; gap recovered is" in tables[1]["note"]
    assert tables[1]["note"].endswith("A note.")
    if tasks:
        assert tables[1]["rows"][1]["gap recovered"] == ""


def answers_of(scores):
    """Lines of `answers.jsonl`: a question for each pair of scores, of student and teacher."""
    return [
        {
            "prompt": f"Question {i}?", "answers": [str(i), "more"],
            "student": {"text": "s" * (i + 1), "f1": own, "exact_match": 0.0},
            "teacher": {"text": "t\u2028t", "f1": other, "exact_match": 1.0},
        }
        for i, (own, other) in enumerate(scores)
    ]  # fmt: skip


def test_generated_answers_begin_where_the_student_is_furthest_behind():
    (texts,) = page_of({"run": run_of(answers=answers_of([(1, 1), (0, 1), (1, 0), (0.25, 0.5)]))})["texts"]
    assert [row[""] for row in texts["rows"]] == ["1", "3", "0", "2"]
    assert texts["rows"][0] == {
        "": "1", "question": "Question 1?", "right answer": "1", "student": "[0] ss", "teacher": "[1] t\u2028t"
    }  # fmt: skip
    assert texts["note"].startswith("run: 4 answers of hf-distill evaluate, each with its f1 in brackets.")


def test_each_run_is_compared_with_its_own_baseline_whatever_stands_beside_it():
    results = {"after": {"student_perplexity": 8.0, "kl": 0.5, "num_rows": 3}}
    good = run_of()._replace(results=results, baseline={"student_perplexity": 9.0, "kl": 1.0})
    bad = run_of()._replace(results=results, baseline={"student_perplexity": 9.0, "kl": 0.25})
    (table,) = page_of({"a": good, "b": bad, "baseline": run_of()._replace(results=results)})["tables"][:1]
    assert "a: Compared with the baseline on hard labels, the student is closer to the teacher" in table["note"]
    assert "b: Compared with the baseline on hard labels, the student is further from the teacher" in table["note"]
    assert "baseline: Compared" not in table["note"]
    other = bad._replace(recorded={"held_out": "others"})
    tables = page_of({"a": good, "b": other})["tables"]
    assert ["Compared with the baseline" in each["note"] for each in tables[:2]] == [True, True]


def test_answers_are_read_line_by_line_whatever_their_texts_hold(tmp_path):
    folder = make_run(tmp_path / "run", {})
    answers = answers_of([(0, 1), (1, 1)])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    assert read_run(folder).answers == answers


def test_of_many_and_long_generated_answers_some_are_shown():
    answers = answers_of([(0, 0)] * MAX_ANSWERS + [(0, 1)])
    answers[-1]["student"]["text"] = "s" * (MAX_CHARACTERS + 1)
    (texts,) = page_of({"run": run_of(answers=answers)})["texts"]
    assert len(texts["rows"]) == MAX_ANSWERS
    assert texts["rows"][0]["student"] == f"[0] {'s' * MAX_CHARACTERS} ..."
    assert f"run: {MAX_ANSWERS} of {MAX_ANSWERS + 1} answers" in texts["note"]


def test_what_is_embedded_is_what_the_run_measured(folder, tmp_path):
    held_out = folder / "rows.jsonl"
    cli.main(["kd", *options(folder, output_dir=tmp_path, eval_dataset=held_out, max_steps=4, max_length=16)])
    data, page = read_page(tmp_path / "report.html")
    report = json.loads((tmp_path / "report.json").read_text())
    (run,) = data["runs"]
    kl = [value for row in run["tokens"]["rows"] for value in row["kl"]]
    assert len(kl) == report["after"]["num_tokens"]
    assert np.mean(kl) == pytest.approx(report["after"]["kl"], abs=1e-4)
    same = [
        row["student"]["ids"][5 * j] == row["teacher"]["ids"][5 * j]
        for row in run["tokens"]["rows"]
        for j in range(len(row["kl"]))
    ]
    assert np.mean(same) == pytest.approx(report["after"]["agreement"])
    (results,) = data["tables"]
    assert [row[""] for row in results["rows"]] == ["before", "after", "teacher"]
    assert results["rows"][1]["KL, nats"] == f"{report['after']['kl']:.4f}"
    assert results["rows"][2]["perplexity"] == f"{report['after']['teacher_perplexity']:.3f}"
    assert f"{report['after']['num_tokens']:,} tokens" in results["note"]
    (ce,) = (chart for chart in data["charts"] if chart["title"] == "Hard labels (ce)")
    training, held_out = ce["series"]
    assert training["steps"] == [1, 2, 3, 4]
    assert held_out["is_held_out"]
    assert held_out["values"][-1] == pytest.approx(math.log(report["after"]["student_perplexity"]), rel=1e-4)
    assert ce["lines"][0]["value"] == pytest.approx(math.log(report["after"]["teacher_perplexity"]))
    assert ["command", "hf-distill kd"] in run["about"]
    assert any("longer than max_length=16 and cut" in text for text in run["warnings"])
    # The command makes the same page of the folder.
    cli.main(["report", str(tmp_path), "--output_file", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    assert [address for address in page.addresses if not address.startswith(("#", "data:"))] == []


def test_generated_rows_say_who_has_written_them(folder, tmp_path):
    facts = folder / "facts.jsonl"
    columns = {"prompt_column": "question", "completion_column": "answer", "as_chat": True}
    data = {"dataset": facts, "eval_dataset": facts, "output_dir": tmp_path, "max_eval_rows": 8, "max_steps": 6}
    mix = {"rollout_mix": '{"speculative": 0.5, "student": 0.5}', "student_temperature": 0.5, "teacher_temperature": 0}
    cli.main(["skd", *options(folder, **data, **columns, **mix, **WRITTEN)])
    embedded, _ = read_page(tmp_path / "report.html")
    rows = embedded["runs"][0]["tokens"]["rows"]
    report = json.loads((tmp_path / "report.json").read_text())["after"]
    assert len(rows) == 8
    assert all(len(row["marks"]) == len(row["places"]) == len(row["kl"]) for row in rows)
    # The teacher has seen no token of a completion that the student wrote alone.
    written = {"".join(sorted(set(row["marks"]))) for row in rows}
    assert "s" in written
    assert written - {"s"}
    assert written - {"s"} <= {"c", "cd", "d"}
    about = dict(embedded["runs"][0]["about"])
    assert (about["temperature of drafts"], about["temperature of corrections"]) == ("0.5", "0")
    kl = [value for row in rows for value in row["kl"]]
    assert np.mean(kl) == pytest.approx(report["eval_kd"], rel=1e-2)
    titles = {chart["title"] for chart in embedded["charts"]}
    assert {"Rollouts: accepted by the teacher", "Rollouts: tokens of a log"} <= titles


def test_keys_and_values_stand_beside_the_held_out_divergence(folder, tmp_path):
    run = {"output_dir": tmp_path, "eval_dataset": folder / "rows.jsonl", "max_steps": 4, "eval_strategy": "steps"}
    cli.main(["kv", *options(folder, eval_steps=2, **run)])
    data, _ = read_page(tmp_path / "report.html")
    (chart,) = (chart for chart in data["charts"] if chart["title"] == "Keys and values")
    axes = {(series["name"], series["is_right"]) for series in chart["series"]}
    assert {("kv/cosine", False), ("kd", True)} <= axes


def test_a_run_without_held_out_rows_has_a_page_without_rows(folder, tmp_path):
    cli.main(["kd", *options(folder, output_dir=tmp_path)])
    data, _ = read_page(tmp_path / "report.html")
    assert (data["runs"][0]["tokens"], data["charts"][0]["title"]) == (None, "Hard labels (ce)")
    assert "no held-out rows" in data["tables"][0]["note"]


def test_no_text_leaves_the_place_that_it_has(tmp_path):
    tokens = tokens_of(texts=(EVIL, "\u05e9\u05dc\u05d5\u05dd", "c", "d", "e", "f"))
    tokens["rows"][0]["pieces"] = {"1": EVIL}
    run = run_of(settings={"model": EVIL}, recorded={"warnings": [EVIL]}, tokens=tokens)
    write_page(tmp_path / "page.html", page_of({EVIL: run, "other": run_of()}))
    text = (tmp_path / "page.html").read_text("utf-8")
    data, page = read_page(tmp_path / "page.html")
    assert data["runs"][0]["tokens"]["texts"][0] == EVIL
    assert data["runs"][0]["name"] == EVIL
    assert "broken" in page.scripts[0][1]
    assert text.count("<script") == 2
    assert EVIL not in text


def test_a_page_stays_below_five_megabytes_and_says_what_it_leaves_out(tmp_path):
    texts = [f" token{i}" for i in range(30_000)]
    tokens = tokens_of(num_rows=200, num_tokens=256, texts=texts)
    rng = np.random.default_rng(0)
    for row in tokens["rows"]:
        row["length"] = 300
        for side in ("student", "teacher"):
            row[side] = {**row[side], "ids": rng.integers(0, 30_000, 5 * 255).tolist()}
    tokens["num_rows"] = 500
    history = [{"step": i, "loss": 1.0 / (i + 1), "ce": 0.123456789, "grad_norm": 3.0} for i in range(20_000)]
    run = run_of(tokens=tokens, history=history)
    for runs in ({"a": run}, {"a": run, "b": run}):
        write_page(tmp_path / "page.html", page_of(runs))
        assert 4_000_000 < (tmp_path / "page.html").stat().st_size < MAX_BYTES + 10_000 < 5_000_000
        data, _ = read_page(tmp_path / "page.html")
        for each in data["runs"]:
            shown = len(each["tokens"]["rows"])
            assert f"Shown are the first {shown} of 500 held-out rows." in each["tokens"]["notes"]
            assert f"Of {shown} longer rows the first 256 tokens are shown." in each["tokens"]["notes"]
    assert len(tokens["rows"]) == 200


def test_a_long_series_is_thinned_and_keeps_its_ends():
    history = [{"step": i, "ce": float(i)} for i in range(10_000)]
    (chart,) = chart_data({"a": run_of(history=history, results={})})
    (series,) = chart["series"]
    assert len(series["steps"]) == MAX_POINTS
    assert (series["steps"][0], series["steps"][-1]) == (0, 9999)
    assert series["values"] == pytest.approx(series["steps"], rel=1e-5)


def test_numbers_that_are_none_are_not_drawn():
    history = [{"step": 1, "loss": math.nan, "ce": 1.0}, {"step": 2, "loss": "x", "ce": math.inf}]
    charts = chart_data({"a": run_of(history=history, results={})})
    assert [(chart["title"], chart["series"][0]["values"]) for chart in charts] == [("Hard labels (ce)", [1.0])]


def test_runs_side_by_side_have_the_tables_of_a_comparison(tmp_path):
    make_run(tmp_path / "a", {"learning_rate": 1e-3, "seed": 0})
    make_run(tmp_path / "b", {"learning_rate": 2e-3, "seed": 0}, kl=0.25)
    save_page(tmp_path / "page.html", [tmp_path / "a", tmp_path / "b"])
    data, _ = read_page(tmp_path / "page.html")
    assert [row[""] for row in data["tables"][0]["rows"]] == ["b", "a", "before", "teacher"]
    assert data["settings"][0]["rows"] == [{"": "learning_rate", "a": "0.001", "b": "0.002"}]
    (ce,) = (chart for chart in data["charts"] if chart["title"] == "Hard labels (ce)")
    assert {series["run"] for series in ce["series"]} == {"a", "b"}


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(tmp_path), "--output_file", str(tmp_path / "page.html")])
    assert stopped.value.code == 2
    assert "has no settings.json" in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_another_run_are_not_shown(folder, tmp_path):
    cli.main(["kd", *options(folder, output_dir=tmp_path, eval_dataset=folder / "rows.jsonl")])
    path = tmp_path / "tokens.json"
    path.write_text(re.sub(r'"number":0', '"number":9', path.read_text()))
    with pytest.raises(ValueError, match=r"tokens\.json changed after settings\.json"):
        read_run(tmp_path)
