"""Do the teacher's keys and values help in addition to its logits? Distances and projectors at equal budgets.

    OMP_NUM_THREADS=1 python -m benchmarks.kv_projection --teacher stories260K --data tinystories

Rows, students and budgets are those of benchmarks/tinystories.py. Half of the loss is hard labels, half is forward KL.
The term for keys and values is added. Cosine, centred cosine and CKA are those of held-out rows. `--curve` shows them
and the KL to the teacher over the steps of one seed. `--picture` draws the same, with lines for the training batches.
"""

import argparse
import sys

from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.measure import print_table
from benchmarks.stories import (
    FIDELITY,
    add_budget,
    add_students,
    budget,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    make_students,
    make_trainer,
    measure_fidelity,
)
from hf_distill import KVProjectionConfig, KVProjectionTrainer

VARIANTS: dict[str, dict] = {"KD alone": {"kv_weight": 0.0}} | {
    f"KD + {loss}, {projector}": {"kv_loss": loss, "projector": projector}
    for loss in ("mercator", "mse", "normalized_l1")
    for projector in ("mlp", "pca")
}
VARIANTS["KD + mercator, mlp frozen after 50"] = {"projector": "mlp", "projector_freeze_after": 50}
VARIANTS["KD + 0.1 mercator, pca"] = {"kv_weight": 0.1, "projector": "pca"}
# The other terms stay. They alone reach some weights (the last layer's MLP, an untied head). AdamW ignores the scale of
# a gradient, so it would follow them at any weight. But clipping makes their gradients far smaller than its epsilon.
VARIANTS["mercator alone, mlp"] = {"kv_weight": 1e12, "projector": "mlp"}
CURVES = ["KD + mercator, mlp", "KD + mercator, pca", "mercator alone, mlp"]
COLUMNS = {
    "KL to the teacher": FIDELITY["KL to the teacher"],
    "perplexity": FIDELITY["perplexity"],
    "cosine": ("eval_kv/cosine", "{:.2f}"),
    "centred": ("eval_kv/centered_cosine", "{:.2f}"),
    "CKA": ("eval_kv/cka", "{:.2f}"),
}


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    variant: dict,
    seed: int,
    options: argparse.Namespace,
) -> KVProjectionTrainer:
    """The trainer after training, with its log."""
    strategy = "steps" if options.curve else "no"
    settings = {
        **budget(options, seed), "projector_learning_rate": options.learning_rate, "per_device_eval_batch_size": 32,
        "logging_strategy": strategy, "logging_steps": max(options.steps // 20, 1), "eval_strategy": strategy,
        "eval_steps": max(options.steps // 8, 1), "eval_on_start": options.curve, **variant,
    }  # fmt: skip
    trainer = make_trainer(
        KVProjectionTrainer, KVProjectionConfig, student, teacher, rows, tokenizer, settings, eval_dataset=held_out
    )
    trainer.train()
    return trainer


def held_out_rows(histories: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """One row per evaluation: the step, and the numbers of each run."""
    steps = sorted({entry["step"] for history in histories.values() for entry in history if "eval_loss" in entry})
    keys = ("eval_kv/cosine", "eval_kv/centered_cosine", "eval_kv/cka", "eval_kd")
    rows = []
    for step in steps:
        found = {
            title: next(entry for entry in history if entry["step"] == step and "eval_loss" in entry)
            for title, history in histories.items()
        }
        cells = {title: " / ".join(f"{entry[key]:.2f}" for key in keys) for title, entry in found.items()}
        rows.append({"step": str(int(step)), **cells})
    return rows


def save_curves(path: str, students: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Saves a PNG: one row per student, one panel per run, lines for training batches, dots for held-out rows."""
    shape = len(students), max(map(len, students.values()))
    figure = Figure(figsize=(4.5 * shape[1], 3.2 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    for (student, histories), row in zip(students.items(), panels, strict=True):
        for (title, history), axes in zip(histories.items(), row, strict=True):
            right = axes.twinx()
            right.set_ylim(0, 6)
            measures = {"kv/cosine": axes, "kv/centered_cosine": axes, "kv/cka": axes, "kd": right}
            for i, (key, side) in enumerate(measures.items()):
                for prefix, style in {"": "-", "eval_": "o"}.items():
                    points = [(entry["step"], entry[prefix + key]) for entry in history if prefix + key in entry]
                    side.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4)
                axes.plot([], [], color=f"C{i}", label="KL, nats (right)" if key == "kd" else key)
            axes.set(title=f"{student}\n{title}", xlabel="step", ylim=(-0.1, 1.05))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_students(parser)
    add_budget(parser, steps=200, learning_rate=3e-3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="by default all, of --curve three")
    parser.add_argument("--curve", action="store_true", help="how one seed goes over the steps")
    parser.add_argument("--picture", help="with --curve: a PNG to write")
    options = parser.parse_args()
    if options.picture and not options.curve:
        parser.error("--picture draws what --curve measures: give both")
    options.only = options.only or (CURVES if options.curve else list(VARIANTS))
    options.seeds = options.seeds[:1] if options.curve else options.seeds
    return options


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer)
    curves = {}
    for name, make in make_students(teacher, options).items():
        table, curves[name] = [], {}
        for title in options.only:
            results = []
            for seed in options.seeds:
                set_seed(seed)
                student = make()
                trainer = train(student, teacher, rows, held_out, tokenizer, VARIANTS[title], seed, options)
                if options.curve:
                    curves[name][title] = trainer.state.log_history
                else:
                    results.append(trainer.evaluate() | measure_fidelity(student, teacher, held_out, tokenizer))
            if results:
                table.append({"": title, **describe_all(results, COLUMNS)})
            print(f"{name}: {table[-1:] or title}", file=sys.stderr, flush=True)  # runs are long
        heading = f"student: {name}; {options.steps} steps, seeds {options.seeds}"
        if options.curve:
            table, heading = held_out_rows(curves[name]), f"{heading}; cosine / centred / CKA / KL of held-out rows"
        print_table(heading, table, options.markdown)
    if options.picture:
        save_curves(options.picture, curves)


if __name__ == "__main__":
    main()
