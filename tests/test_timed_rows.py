"""Rows with time limits: whatever one of them does, the others are measured and what has been measured is kept."""

import json
import sys
import time

import pytest

from benchmarks.timed_rows import JSON, MARKDOWN, Budget, Group, Results, run_groups

COMMAND = [sys.executable, "-m", "tests.hanging_rows"]


def make_results(folder):
    names = "row", "value", "repeats", "error"
    return Results(folder, {"first": "First"}, lambda row: {name: str(row.get(name, "")) for name in names})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    results, start = make_results(folder), time.monotonic()
    groups = [Group(name, 30, COMMAND) for name in ("first", "broken", "poisoned", "second")]
    run_groups(groups, results, 60, grace=0.5)
    return folder, json.loads((folder / JSON).read_text())["groups"], time.monotonic() - start


def rows_of(measured, group):
    return {row["row"]: row for row in measured[1][group]}


def test_a_row_that_hangs_is_cut_and_the_rest_is_measured(measured):
    rows = rows_of(measured, "first")
    assert rows["hangs"]["error"].startswith("no answer within 2 s")  # its limit of 1 s and the grace
    assert rows["part 1"]["value"] == 1
    assert rows["part 2"]["value"] == 2
    assert measured[2] < 25


def test_a_row_that_fails_says_why_and_the_rest_is_measured(measured):
    rows = rows_of(measured, "first")
    assert rows["quick"]["value"] == 1
    assert rows["stops"]["error"] == "no such device"
    assert rows["fails"]["error"] == "RuntimeError: out of luck"
    assert rows["dies"]["error"].startswith("its process ended with code 7")


def test_repeats_stop_when_the_time_of_a_row_is_over(measured):
    assert 4 <= rows_of(measured, "first")["repeats"]["repeats"] <= 8  # 1.5 s of 0.2 s each


def test_rows_are_kept_in_the_order_in_which_they_are_measured(measured):
    expected = ["quick", "stops", "fails", "hangs", "dies", "part 1", "part 2", "repeats"]
    assert list(rows_of(measured, "first")) == expected


def test_a_group_that_does_not_start_costs_only_itself(measured):
    assert rows_of(measured, "broken")["all rows"]["error"].startswith("its process ended with code 1")
    assert rows_of(measured, "second")["quick"]["value"] == 2


def test_after_an_error_that_spoils_the_process_the_rest_has_a_new_one(measured):
    rows = rows_of(measured, "poisoned")
    assert rows["fails"]["error"] == "RuntimeError: out of luck"
    assert "pid" in rows["quick"]


def test_the_table_has_every_row_and_no_empty_column(measured):
    text = (measured[0] / MARKDOWN).read_text()
    first = text.split("**First**")[1].split("**")[0].strip().splitlines()
    assert first[:3] == ["| row | value | repeats | error |", "| --- | ---: | ---: | ---: |", "| quick | 1 |  |  |"]
    assert "repeats" not in text.split("**second**")[1]


def test_no_group_begins_when_the_time_is_over(tmp_path):
    results = make_results(tmp_path)
    run_groups([Group(name, 30, COMMAND) for name in ("first", "second")], results, 0.5)
    assert [row["error"] for rows in results.rows.values() for row in rows.values()] == ["no time left"] * 2


def test_results_of_an_earlier_run_stay_until_they_are_measured_again(tmp_path):
    results = make_results(tmp_path)
    results.note(machine="a")
    results.add("first", {"row": "x", "value": 1})
    results.add("first", {"row": "y", "value": 2})
    again = make_results(tmp_path)
    again.add("first", {"row": "x", "value": 3})
    again.add("second", {"row": "z", "value": 4})
    assert json.loads((tmp_path / JSON).read_text()) == {
        "notes": {"machine": "a"},
        "groups": {
            "first": [{"row": "x", "value": 3}, {"row": "y", "value": 2}], "second": [{"row": "z", "value": 4}],
        },
    }  # fmt: skip
    assert not list(tmp_path.glob("*.new"))


def test_a_budget_gives_one_repeat_even_when_it_is_over():
    assert list(Budget(-1).repeats(5)) == [0]
    assert list(Budget(60).repeats(3)) == [0, 1, 2]
