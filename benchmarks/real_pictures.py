"""The picture of the tutorial (docs/which_settings.md), from finished runs of `benchmarks.real_model`.

python -m benchmarks.real_pictures --keep benchmarks/real_model.json --picture docs/which_settings.png
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.real_runs import CURVE_ROWS
from benchmarks.real_tables import HARD, KD, UNTRAINED, Run, read_runs

DATA, STUDENT, STEPS, RATE = "gsm8k", "near, LoRA", 60, 1e-3
COLOURS = {HARD: "0.4", KD: "C0", "KD, half": "C2", "KD, T = 2": "C1", "KD, T = 4": "C3"}
GRID = {
    "the teacher alone": {1: KD, 2: "KD, T = 2", 4: "KD, T = 4"},
    "half and half": {1: "KD, half", 2: "KD, half, T = 2", 4: "KD, half, T = 4"},
}  # by temperature


def kl(runs: Sequence[Run]) -> float:
    """The mean over seeds, on all held-out rows."""
    return statistics.mean(run["results"]["kl"] for run in runs)


def first_kl(run: Run) -> float:
    """KL on the held-out rows that are measured during a training."""
    return sum(run["rows"]["kl"][:CURVE_ROWS]) / sum(run["rows"]["tokens"][:CURVE_ROWS])


def draw_curves(axes: Axes, runs: Sequence[Run], untrained: Run) -> None:
    """KL over the rows of a training, on the held-out rows that are measured meanwhile."""
    for arm, colour in COLOURS.items():
        same = [run for run in runs if run["arm"] == arm and run["steps"] == STEPS]
        if not same:
            continue
        middle = [[point["kl"] for point in run["curve"] if point["step"] < STEPS] for run in same]
        means = [statistics.mean(values) for values in zip(*middle, strict=True)]
        values = [first_kl(untrained), *means, statistics.mean(map(first_kl, same))]
        axes.plot(
            [2 * STEPS * i / (len(values) - 1) for i in range(len(values))], values, "o-", color=colour, label=arm
        )
    axes.set(title="Does the teacher help?", xlabel="rows trained on", ylabel="KL to the teacher, nats", ylim=(0, None))
    axes.legend()


def draw_grid(axes: Axes, runs: Sequence[Run]) -> None:
    """KL by temperature and weight after a training, with each seed."""
    at_end = [run for run in runs if run["steps"] == STEPS]
    for (title, by_temperature), colour in zip(GRID.items(), (COLOURS[KD], COLOURS["KD, half"]), strict=True):
        found = {t: [run for run in at_end if run["arm"] == arm] for t, arm in by_temperature.items()}
        found = {t: same for t, same in found.items() if same}
        axes.plot([*found], [kl(same) for same in found.values()], "o-", color=colour, label=title)
        for t, same in found.items():
            axes.plot([t] * len(same), [run["results"]["kl"] for run in same], ".", color=colour, alpha=0.5)
    axes.axhline(kl([run for run in at_end if run["arm"] == HARD]), color=COLOURS[HARD], linestyle="--", label=HARD)
    axes.set(title="0.5 or 1.0? T = 1 or 4?", xlabel="temperature", xticks=[1, 2, 4])
    axes.legend()


def draw_rows(axes: Axes, runs: Sequence[Run]) -> None:
    """KL by the number of rows of a training."""
    for arm in (HARD, KD):
        by_steps = {step: [r for r in runs if r["arm"] == arm and r["steps"] == step and r["seed"] == 0]
                    for step in sorted({run["steps"] for run in runs if run["arm"] == arm})}  # fmt: skip
        points = [(2 * steps, kl(same)) for steps, same in by_steps.items()]
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[arm], label=arm)
    axes.set(title="How many rows?", xlabel="rows of the whole training", xscale="log")
    axes.set_xticks([40, 120, 240], labels=["40", "120", "240"])
    axes.minorticks_off()
    axes.legend()


def save_picture(path: Path, runs: Sequence[Run]) -> None:
    """A PNG with three panels."""
    same = [run for run in runs if run["data"] == DATA and run["student"] == STUDENT]
    untrained = next(run for run in same if run["arm"] == UNTRAINED)
    trained = [run for run in same if run["learning_rate"] == RATE]
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_curves(left, trained, untrained)
    draw_grid(middle, trained)
    draw_rows(right, trained)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/real_model"))
    parser.add_argument("--keep", type=Path, help="a JSON file of finished runs")
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    save_picture(options.picture, read_runs(options.output, options.keep))


if __name__ == "__main__":
    main()
