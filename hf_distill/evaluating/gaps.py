"""Numbers of base, student and teacher over the same rows, and the share of the gap that the student has closed.

Shapes: R rows, S resamples.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

BASE, STUDENT, TEACHER = "base", "student", "teacher"
NUM_RESAMPLES = 2_000
LEVEL = 0.95


class Measure(NamedTuple):
    """A number of each model, and the rows that it is a mean over."""

    name: str
    values: Mapping[str, float]  # by model: `base`, `student`, `teacher`
    sums: Mapping[str, np.ndarray] | None = None  # by model (R,); None: the number is no mean over rows
    weights: np.ndarray | None = None  # (R,), of the rows, such as their tokens; None: 1 each
    form: str = "{:.4f}"  # of a value in a table

    @property
    def num_rows(self) -> int | None:
        return None if not self.sums else len(next(iter(self.sums.values())))


class Gap(NamedTuple):
    """(student - base) / (teacher - base), with its bootstrap interval."""

    share: float
    low: float
    high: float


def mean_measure(
    name: str, sums: Mapping[str, np.ndarray], weights: np.ndarray | None = None, form: str = "{:.4f}"
) -> Measure:
    """A measure whose values are the means of its rows."""
    counts = np.ones(len(next(iter(sums.values())))) if weights is None else weights
    values = {model: float(each.sum() / counts.sum()) for model, each in sums.items()}
    return Measure(name, values, sums, weights, form)


def perplexity_measure(name: str, nats: Mapping[str, np.ndarray], tokens: np.ndarray) -> Measure:
    """Perplexities, from the nats and the tokens of rows; their gap is that of the nats per token."""
    means = mean_measure(name, nats, tokens)
    values = {model: math.exp(min(value, 700.0)) for model, value in means.values.items()}
    return means._replace(values=values, form="{:.3f}")


def gap_recovered(
    measure: Measure, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Gap | None:
    """The share of the way from base to teacher that the student has gone: 0 at the base, 1 at the teacher.

    The interval is that of a paired bootstrap: rows are drawn with replacement, the same ones for all three models, and
    its ends are percentiles of the shares in these samples.

    Args:
        measure ([`Measure`]): of a perplexity it is the share in nats.
        num_resamples (`int`): S.
        seed (`int`): of the draws.
        level (`float`): of the interval.

    Returns:
        None where a model or the rows are missing, a value is not finite, there is one row alone, and where teacher and
        base do not differ: where the interval of teacher - base contains 0, the share would be a division by nearly
        nothing.
    """
    sums = measure.sums
    if sums is None or not {BASE, STUDENT, TEACHER} <= set(sums):
        return None
    weights = np.ones(len(sums[BASE])) if measure.weights is None else measure.weights
    rows = np.stack([sums[BASE], sums[STUDENT], sums[TEACHER], weights]).astype(np.float64)  # (4, R)
    if rows.shape[1] < 2 or not np.isfinite(rows).all():
        return None
    base, student, teacher = _means(rows.sum(1)[:, None])[:, 0]
    drawn = _means(_resampled(rows, num_resamples, seed))  # (3, S)
    ends = 100 * (1 - level) / 2, 100 * (1 + level) / 2
    low, high = np.percentile(drawn[2] - drawn[0], ends)
    if low <= 0 <= high:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (drawn[1] - drawn[0]) / (drawn[2] - drawn[0])
    low, high = np.percentile(shares[np.isfinite(shares)], ends)
    return Gap(float((student - base) / (teacher - base)), float(low), float(high))


def measures_data(measures: Iterable[Measure], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Measures as JSON values, by name.

    Each has `values` by model, `format` (of a value as text), `num_rows`, and `gap_recovered`: `share`, `low` and
    `high`, or None where [`gap_recovered`] has none.
    """
    found = {}
    for measure in measures:
        gap = gap_recovered(measure, seed=seed)
        found[measure.name] = {
            "values": dict(measure.values),
            "format": measure.form,
            "num_rows": measure.num_rows,
            "gap_recovered": gap and gap._asdict(),
        }
    return found


def _means(totals: np.ndarray) -> np.ndarray:
    """The means (3, S) of totals (4, S), whose last row are the weights."""
    return totals[:3] / totals[3]


def _resampled(rows: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Totals (4, S) of rows (4, R) that are drawn with replacement."""
    rng, num_rows = np.random.default_rng(seed), rows.shape[1]
    parts, at_once = [], max(1, 2_000_000 // num_rows)
    for start in range(0, num_resamples, at_once):
        chosen = rng.integers(num_rows, size=(min(at_once, num_resamples - start), num_rows))
        parts.append(np.stack([row[chosen].sum(1) for row in rows]))
    return np.concatenate(parts, axis=1)
