"""The share of a gap that is closed, against plain loops."""

import math
import random

import numpy as np
import pytest

from hf_distill.evaluating.gaps import Gap, gap_recovered, mean_measure, measures_data, perplexity_measure


def sums_of(seed=0, num_rows=40, shift=(0.2, 0.5, 0.8)):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=num_rows)
    return {
        name: noise + mean + 0.1 * rng.normal(size=num_rows)
        for name, mean in zip(("base", "student", "teacher"), shift, strict=True)
    }


def by_loops(sums, weights, draws):
    """The shares in samples of rows, and the differences between teacher and base there."""
    shares, differences = [], []
    for rows in draws:
        total = sum(weights[i] for i in rows)
        base, student, teacher = (sum(sums[name][i] for i in rows) / total for name in ("base", "student", "teacher"))
        differences.append(teacher - base)
        shares.append((student - base) / (teacher - base))
    return shares, differences


def percentile(values, share):
    """By linear interpolation between the sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    return values[below] + (place - below) * (values[min(below + 1, len(values) - 1)] - values[below])


@pytest.mark.parametrize("is_weighted", [False, True])
def test_share_and_interval_are_those_of_plain_loops(is_weighted):
    sums, weights = sums_of(), np.arange(1, 41.0) if is_weighted else None
    if weights is not None:
        sums = {name: values * weights for name, values in sums.items()}
    found = gap_recovered(mean_measure("m", sums, weights), num_resamples=300, seed=3)
    plain = np.ones(40) if weights is None else weights
    draws = np.random.default_rng(3).integers(40, size=(300, 40))
    shares, _ = by_loops(sums, plain, draws)
    (whole,), _ = by_loops(sums, plain, [range(40)])
    assert found == pytest.approx(Gap(whole, percentile(shares, 0.025), percentile(shares, 0.975)))
    assert found.low < found.share < found.high


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [slice(3, 4), slice(None)])
def test_values_that_are_not_finite_have_no_gap(value, where):
    sums = sums_of()
    sums["student"][where] = value
    assert gap_recovered(mean_measure("m", sums)) is None


def test_one_row_has_no_interval_and_so_no_gap():
    assert gap_recovered(mean_measure("m", sums_of(num_rows=1))) is None
    assert gap_recovered(mean_measure("m", sums_of(num_rows=2, shift=(0, 5, 9)))) is not None


def test_interval_is_that_of_another_bootstrap_up_to_chance():
    """Rows that python's own generator has drawn."""
    sums = sums_of(seed=1)
    drawn = random.Random(0)
    shares, _ = by_loops(sums, np.ones(40), [drawn.choices(range(40), k=40) for _ in range(2000)])
    found = gap_recovered(mean_measure("m", sums))
    width = found.high - found.low
    assert found.low == pytest.approx(percentile(shares, 0.025), abs=0.1 * width)
    assert found.high == pytest.approx(percentile(shares, 0.975), abs=0.1 * width)


def test_no_share_is_told_where_teacher_and_base_do_not_differ():
    rng = np.random.default_rng(0)
    sums = {name: rng.normal(size=40) for name in ("base", "student", "teacher")}
    _, differences = by_loops(sums, np.ones(40), rng.integers(40, size=(500, 40)))
    assert percentile(differences, 0.025) < 0 < percentile(differences, 0.975)
    assert gap_recovered(mean_measure("m", sums)) is None
    same = {**sums, "teacher": sums["base"]}
    assert gap_recovered(mean_measure("m", same)) is None
    assert gap_recovered(mean_measure("m", {"base": np.zeros(2), "student": np.zeros(2), "teacher": np.ones(2)}))


def test_no_share_is_told_without_base_teacher_or_rows():
    sums = sums_of()
    for missing in ("base", "teacher"):
        rest = {name: values for name, values in sums.items() if name != missing}
        assert gap_recovered(mean_measure("m", rest)) is None
    assert gap_recovered(mean_measure("m", sums)._replace(sums=None)) is None


def test_perplexities_are_compared_in_nats():
    tokens = np.array([10.0, 30.0, 20.0])
    nats = {"base": 4 * tokens, "student": 2.5 * tokens, "teacher": 2 * tokens}
    measure = perplexity_measure("perplexity", nats, tokens)
    assert measure.values == pytest.approx({"base": math.exp(4), "student": math.exp(2.5), "teacher": math.exp(2)})
    assert gap_recovered(measure) == pytest.approx(Gap(0.75, 0.75, 0.75))


def test_a_measure_that_falls_towards_the_teacher_has_the_same_share():
    sums = sums_of()
    falling = {name: -values for name, values in sums.items()}
    assert gap_recovered(mean_measure("m", falling)) == pytest.approx(gap_recovered(mean_measure("m", sums)))


def test_many_rows_are_drawn_in_parts_with_the_same_numbers():
    sums = sums_of(num_rows=3_000)
    whole = np.random.default_rng(0).integers(3_000, size=(1_000, 3_000))
    shares = [sums[name][whole].mean(1) for name in ("base", "student", "teacher")]
    expected = np.percentile((shares[1] - shares[0]) / (shares[2] - shares[0]), [2.5, 97.5])
    found = gap_recovered(mean_measure("m", sums), num_resamples=1_000)
    assert [found.low, found.high] == pytest.approx(expected)


def test_measures_as_json_have_values_rows_and_shares():
    sums = {"base": np.zeros(4), "student": np.array([1.0, 0, 1, 0]), "teacher": np.ones(4)}
    data = measures_data([mean_measure("f1", sums, form="{:.1%}")])
    assert data["f1"]["values"] == {"base": 0.0, "student": 0.5, "teacher": 1.0}
    assert data["f1"]["num_rows"] == 4
    assert data["f1"]["gap_recovered"]["share"] == 0.5
