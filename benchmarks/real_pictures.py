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

DATA, STUDENT = "gsm8k", "near, LoRA"
SHORT, RATE = 20, 3e-3  # updates and rate of the runs side by side
LONG, LONG_RATE = 60, 1e-3  # of the runs with a curve
COLOURS = {HARD: "C1", KD: "C0"}
STYLES = {"kl": "-", "nats": "--"}
LABELS = {"kl": "KL to the teacher", "nats": "nats of the rows"}
ARMS = (HARD, KD, "KD, half", "KD, T = 2", "KD, T = 4", "KD, half, T = 2", "reverse KL", "JSD", "KD, half speculative")


def mean(runs: Sequence[Run], name: str) -> float:
    """The mean over seeds, on all held-out rows."""
    return statistics.mean(run["results"][name] for run in runs)


def draw_goals(axes: Axes, runs: Sequence[Run]) -> None:
    """Each arm by its nats on the rows and its KL to the teacher, with each seed."""
    same = [run for run in runs if run["steps"] == SHORT and run["learning_rate"] == RATE]
    for arm in ARMS:
        found = [run for run in same if run["arm"] == arm]
        if found:
            x, y, colour = mean(found, "nats"), mean(found, "kl"), COLOURS.get(arm, "0.35")
            axes.plot(
                [run["results"]["nats"] for run in found], [run["results"]["kl"] for run in found], ".", color=colour
            )
            axes.plot(x, y, "o", color=colour)
            axes.annotate(arm, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    teacher = runs[0]["results"]["teacher_nats"]
    axes.plot(teacher, 0, "k*")
    axes.annotate("the teacher", (teacher, 0), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(title="0.5 or 1.0? T = 1 or 4?", xlabel="nats per token of the rows", ylabel="KL to the teacher, nats")
    axes.margins(x=0.22, y=0.1)


def draw_rates(axes: Axes, runs: Sequence[Run]) -> None:
    """KL and nats of hard labels and KD by their learning rate."""
    for arm, colour in COLOURS.items():
        same = [run for run in runs if run["arm"] == arm and run["steps"] == SHORT and run["seed"] == 0]
        same.sort(key=lambda run: run["learning_rate"])
        for name, style in STYLES.items():
            rates, values = zip(*((run["learning_rate"], run["results"][name]) for run in same), strict=True)
            axes.plot(rates, values, "o" + style, color=colour, markersize=4, label=f"{arm}: {LABELS[name]}")
    axes.set(title="Which learning rate?", xlabel="learning rate of the adapters", xscale="log")
    axes.legend(fontsize=8)


def draw_rows(axes: Axes, runs: Sequence[Run], untrained: Run) -> None:
    """KL and nats over the rows of a training, on the held-out rows that are measured meanwhile."""
    for arm, colour in COLOURS.items():
        (run,) = (
            r for r in runs if r["arm"] == arm and (r["steps"], r["learning_rate"], r["seed"]) == (LONG, LONG_RATE, 0)
        )
        for name, style in STYLES.items():
            middle = [point[name] for point in run["curve"] if point["step"] < LONG]
            values = [on_first_rows(untrained, name), *middle, on_first_rows(run, name)]
            rows = [2 * LONG * i / (len(values) - 1) for i in range(len(values))]
            axes.plot(rows, values, "o" + style, color=colour, markersize=4, label=f"{arm}: {LABELS[name]}")
    axes.axhline(
        on_first_rows(untrained, "teacher_nats"), color="k", linewidth=0.8, linestyle=":", label="the teacher's nats"
    )
    axes.set(title="How many rows? Does the teacher help?", xlabel="rows trained on", ylim=(0, None))
    axes.legend(fontsize=8)


def on_first_rows(run: Run, name: str) -> float:
    """A number per token of the held-out rows that are measured during a training."""
    return sum(run["rows"][name][:CURVE_ROWS]) / sum(run["rows"]["tokens"][:CURVE_ROWS])


def save_picture(path: Path, runs: Sequence[Run]) -> None:
    """A PNG with three panels."""
    same = [run for run in runs if run["data"] == DATA and run["student"] == STUDENT]
    untrained = next(run for run in same if run["arm"] == UNTRAINED)
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_rows(left, same, untrained)
    draw_goals(middle, same)
    draw_rates(right, same)
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
