import json
import math

import pytest
from rich.console import Console
from rich.text import Text

from hf_distill import report
from hf_distill.report import Shown, markdown, measured_on, result_rows, save_picture, save_report, table, verdict

pytestmark = pytest.mark.draws
RESULTS = {
    "before": {
        "student_perplexity": 40.0,
        "teacher_perplexity": 5.0,
        "kl": 2.0,
        "agreement": 0.125,
        "expected_acceptance": 0.25,
        "num_tokens": 1000,
    },
    "after": {
        "student_perplexity": 8.0,
        "teacher_perplexity": 5.0,
        "kl": 0.5,
        "agreement": 0.75,
        "expected_acceptance": 0.875,
        "num_tokens": 1000,
    },
}
HISTORY = [{"step": 1, "loss": 3.0, "kd": 2.0, "ce": 4.0}, {"step": 2, "loss": 2.0, "kd": 1.0, "ce": 3.0}]


def test_a_table_shows_every_number_within_eighty_columns():
    console = Console(width=80, record=True)
    console.print(table(result_rows(RESULTS), title="title"))
    text = console.export_text()
    for expected in ("before", "after", "40.000", "0.5000", "12.5%", "87.5%", "title"):
        assert expected in text


def test_no_title_is_cut_short_beside_a_long_name():
    console = Console(width=80, record=True)
    console.print(table(result_rows({"untrained student": RESULTS["before"]})))
    text = console.export_text()
    assert "…" not in text
    for word in ("untrained student", "perplexity", "teacher's", "KL,", "nats", "agreement", "acceptance", "40.000"):
        assert word in text, word


def test_markdown_has_a_row_per_model_and_a_cell_per_column():
    lines = markdown(result_rows(RESULTS)).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {7}
    assert lines[3].startswith("| after | 8.000 |")


def test_markdown_keeps_the_text_of_every_cell_in_its_cell():
    text = markdown([{"": "a", "found": Text("<s> | or\nnothing")}])
    assert text.splitlines()[1:] == ["| --- | --- |", "| a | &lt;s&gt; \\| or<br>nothing |"]


class Result(Shown):
    def shown(self):
        return [([{"": "a", "n": 1, "said": Text("[b] & c", "red")}], "title"), Text("a <note>", "yellow"), "[end]"]


def test_a_result_shows_itself_in_a_terminal_and_in_a_notebook():
    lines = [line.strip() for line in repr(Result()).splitlines()]
    assert lines[0] == "title"
    assert "a   1   [b] & c" in lines
    assert lines[-2:] == ["a <note>", "[end]"]
    assert f"{Result()}" == repr(Result())
    rows = "|  | n | said |\n| --- | ---: | --- |\n| a | 1 | [b] &amp; c |\n"
    assert Result()._repr_markdown_() == f"**title**\n\n{rows}\n\na &lt;note&gt;\n\n[end]"


def test_the_report_is_written_as_numbers_markdown_and_a_picture(tmp_path):
    save_report(tmp_path / "new", RESULTS, {"training": HISTORY})
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == RESULTS
    assert "| before |" in (tmp_path / "new" / "report.md").read_text()
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_history_without_losses_still_gives_a_picture(tmp_path):
    save_report(tmp_path, RESULTS, {"training": [{"step": 1, "epoch": 1.0}]})
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "expected"),
    [
        (500, [25312, 25312], "500 rows, 25,312 tokens"),
        (1, [1], "1 row, 1 token"),
        (12, [None], "12 rows"),
        (None, [1000, None], "1,000 tokens"),
        (None, [10, 30, 20], "10 to 30 tokens"),
        (None, [None], ""),
    ],
)
def test_sizes_of_what_was_measured_are_one_phrase(num_rows, num_tokens, expected):
    results = {str(i): {} if count is None else {"num_tokens": count} for i, count in enumerate(num_tokens)}
    assert measured_on(results, num_rows) == expected


def test_rows_that_were_counted_while_measuring_come_before_those_of_the_dataset():
    assert measured_on({"before": {"num_rows": 3, "num_tokens": 40}}, 5) == "3 rows, 40 tokens"


def test_a_sentence_says_what_came_out():
    before, after = RESULTS["before"], RESULTS["after"]
    assert verdict(RESULTS) == (
        "Compared with its state before the training, the student is closer to the teacher (KL, nats: 0.5000 against "
        "2.0000) and predicts the held-out rows better (perplexity: 8.000 against 40.000). Add --baseline to "
        "see whether the teacher helped."
    )
    assert verdict(RESULTS, advice=False) == verdict(RESULTS).removesuffix(
        " Add --baseline to see whether the teacher helped."
    )
    baseline = {**after, "kl": 0.505, "student_perplexity": 7.0}
    assert verdict({**RESULTS, "baseline": baseline}) == (
        "Compared with the baseline on hard labels, the student is as close to the teacher (KL, nats: 0.5000 against "
        "0.5050) and predicts the held-out rows worse (perplexity: 8.000 against 7.000)."
    )
    weak = {name: {**values, "teacher_perplexity": 7.5} for name, values in RESULTS.items()}
    assert verdict(weak).endswith("helped.")  # better than the student
    weak["after"]["teacher_perplexity"] = 9.0
    assert verdict(weak).endswith(
        "The teacher itself predicts these rows worse (9.000): they may have a form that it does not use. `hf-distill "
        "doctor` looks for other reasons."
    )
    # Of a run on hard labels, whose perplexity is the exponential of the nats.
    alone = {name: {"eval_ce": n, "student_perplexity": math.exp(n)} for name, n in (("before", 2.0), ("after", 3.0))}
    assert verdict(alone, report.HARD_LABEL_COLUMNS) == (
        "Compared with its state before the training, the student predicts the held-out rows worse (perplexity: 20.086 "
        "against 7.389)."
    )
    near = {"before": {"student_perplexity": math.exp(2.0)}, "after": {"student_perplexity": math.exp(1.97)}}
    assert "predicts the held-out rows as well" in verdict(near)  # 1.5 % of the nats, 3 % of the perplexity
    same = {"before": {"kl": 1e-9}, "after": {"kl": 0.0}}
    assert "is as close to the teacher" in verdict(same)
    broken = {**RESULTS, "before": {**before, "kl": math.nan, "student_perplexity": math.inf}}
    assert verdict(broken) == ""
    assert verdict({"after": after}) == verdict({"before": before}) == verdict({"untrained": before}) == ""


def drawn(monkeypatch, **options):
    """The figure that a picture is saved from."""
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    save_picture("unused", {"training": options.pop("history", HISTORY)}, RESULTS, **options)
    return figures[0]


def test_rows_and_tokens_stand_on_table_file_and_picture(tmp_path, monkeypatch, capsys):
    save_report(tmp_path, RESULTS, {"training": HISTORY}, num_rows=12)
    assert "measured on 12 rows, 1,000 tokens" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "report.md").read_text().endswith("\n\nMeasured on 12 rows, 1,000 tokens.\n")
    assert "measured on 12 rows, 1,000 tokens" in drawn(monkeypatch, num_rows=12).get_suptitle()


def test_every_term_that_was_logged_is_drawn_and_can_be_told_apart(monkeypatch):
    terms = ("loss", "kd", "ce", "hidden", "kv", "aux_loss")
    history = [{"step": i, **dict.fromkeys(terms, float(i))} for i in (1, 2)]
    curves = drawn(monkeypatch, history=history).axes[0]
    assert [line.get_label() for line in curves.lines] == list(terms)
    assert len({str(line._dash_pattern) for line in curves.lines}) == len(terms)
    assert curves.get_ylabel() == "nats per token; hidden, kv, aux_loss: a distance"
    assert [line.get_label() for line in drawn(monkeypatch).axes[0].lines] == ["loss", "kd", "ce"]
