"""`benchmarks/real_model.py`: queues that go on where they were, and the numbers of the tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_model import ARMS, finish, run_path
from benchmarks.real_runs import BINS, calibration_error
from benchmarks.real_tables import all_tables, best_rates, difference, print_tables, read_runs, table_rows, write_runs
from hf_distill import KDConfig
from hf_distill.report import markdown

ROOT = Path(__file__).parent.parent


def about(arm="KD", seed=0, rate=1e-3, steps=4):
    return {
        "data": "gsm8k", "student": "half", "steps": steps, "batch_size": 2, "length": 160, "held_out": 3, "arm": arm,
        "learning_rate": rate, "seed": seed, "settings": {},
    }  # fmt: skip


def run(arm="KD", seed=0, rate=1e-3, steps=4, nats=(4.0, 6.0, 9.0), kl=(1.0, 2.0, 3.0)):
    tokens, teacher = [2, 3, 4], [1.0, 2.0, 4.0]
    means = {"nats": sum(nats) / 9, "kl": sum(kl) / 9, "agreement": 0.5, "ece": 0.1, "teacher_nats": 7 / 9, "tokens": 9}
    rows = {"tokens": tokens, "nats": list(nats), "kl": list(kl), "teacher_nats": teacher}
    more = {"labels": 40, "seconds": 9, "cpu_seconds": 8} if steps else {}
    return {**about(arm, seed, rate, steps), "results": means, "rows": rows, **more}


def test_a_finished_run_is_not_computed_again(tmp_path):
    found = {name: value for name, value in run().items() if name not in about()}
    finish(tmp_path, about(), lambda: found)
    finish(tmp_path, about(), lambda: pytest.fail("it was computed again"))
    assert json.loads(run_path(tmp_path, about()).read_text()) == run()


def test_a_killed_run_leaves_no_file(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, about(), killed)
    assert not run_path(tmp_path, about()).exists()


def test_a_run_of_another_budget_is_refused(tmp_path):
    finish(tmp_path, about(), lambda: {"results": run()["results"]})
    with pytest.raises(ValueError, match="of another held_out"):
        finish(tmp_path, {**about(), "held_out": 4}, dict)


def test_each_arm_seed_and_rate_has_a_file_of_its_own(tmp_path):
    names = {run_path(tmp_path, about(arm, seed, rate)) for arm in ARMS for seed in (0, 1) for rate in (1e-3, 3e-4)}
    assert len(names) == 4 * len(ARMS)


def test_kept_runs_and_new_ones_are_joined_a_line_each(tmp_path):
    write_runs(tmp_path / "kept.json", [run("KD"), run("JSD")])
    finish(tmp_path, about("TAID"), lambda: {n: v for n, v in run("TAID").items() if n not in about()})
    joined = read_runs(tmp_path, tmp_path / "kept.json")
    assert sorted(each["arm"] for each in joined) == ["JSD", "KD", "TAID"]
    write_runs(tmp_path / "kept.json", joined)
    assert len((tmp_path / "kept.json").read_text().splitlines()) == 5
    assert read_runs(tmp_path, tmp_path / "kept.json") == joined


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(500), (rng.random(500) < 0.4).astype(float)
    expected = 0.0
    for i in range(BINS):
        inside = (confidence >= i / BINS) & (confidence < (i + 1) / BINS)
        expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_a_sure_and_right_model_has_no_calibration_error():
    assert calibration_error(np.ones(5), np.ones(5)) == 0


def test_a_difference_is_per_token_over_the_seeds_that_both_have():
    ours = [run("JSD", seed, kl=(2.0, 4.0, 6.0)) for seed in (0, 1)]
    theirs = [run("KD", 0, kl=(1.0, 1.0, 2.0)), run("KD", 2, kl=(9.0, 9.0, 9.0))]
    assert difference(ours, theirs, "kl").startswith(f"{8 / 9:+.3f} [")


def test_a_difference_that_is_the_same_for_each_token_has_no_width():
    ours = [run("JSD", kl=(3.0, 5.0, 7.0))]  # 1 nat a token more, of 2, 3 and 4 tokens
    assert difference(ours, [run("KD", kl=(1.0, 2.0, 3.0))], "kl") == "+1.000 [+1.000, +1.000]"


def test_hard_labels_are_judged_by_nats_and_other_arms_by_kl():
    runs = [
        run("hard labels", rate=1.0, nats=(1.0, 1.0, 1.0), kl=(9.0, 9.0, 9.0)), run("hard labels", rate=2.0),
        run("KD", rate=1.0, nats=(1.0, 1.0, 1.0), kl=(9.0, 9.0, 9.0)), run("KD", rate=2.0),
    ]  # fmt: skip
    groups = {(each["steps"], each["arm"], each["learning_rate"]): [each] for each in runs}
    assert best_rates(groups) == [(4, "KD", 2.0), (4, "hard labels", 1.0)]


def test_the_table_has_the_gap_from_the_untrained_student_to_the_teacher(capsys):
    untrained = run("untrained", steps=0, rate=0.0, nats=(5.0, 8.0, 12.0))
    rows = table_rows([untrained, run("hard labels"), run("KD", nats=(3.0, 5.0, 8.0))])
    assert [row["arm"] for row in rows] == ["untrained", "hard labels", "KD"]
    assert rows[2]["gap recovered"].startswith("50.0% [50.0%")
    assert rows[2]["nats minus hard labels'"].startswith(f"{-3 / 9:+.3f}")
    print_tables([untrained, run("KD")], True)
    assert "about 10 label-bearing" in capsys.readouterr().out


def test_the_documentation_has_the_tables_of_the_kept_runs():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    tables = [*all_tables(read_runs(ROOT / "none", ROOT / "benchmarks" / "real_model.json"))]
    assert len(tables) > 2
    for title, rows in tables:
        assert title in re.sub(r"\s+", " ", text)
        assert markdown(rows).strip() in text


@pytest.mark.parametrize("name", ARMS)
def test_the_settings_of_an_arm_are_valid(name, tmp_path):
    arm = ARMS[name]
    args = arm.trainer[1](output_dir=str(tmp_path), bf16=False, use_cpu=True, **arm.changes)
    assert isinstance(args, KDConfig)
