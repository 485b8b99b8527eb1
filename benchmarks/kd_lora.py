"""Seven settings of LoRA distillation on a pruned student: the effects of rank, weight, temperature and epochs.

    OMP_NUM_THREADS=1 python -m benchmarks.kd_lora --teacher stories260K --data tinystories

The settings are common for 7B models. The student has some of the teacher's layers, and adapters on all of its
projections. Rows are those of benchmarks/tinystories.py. Every run is one call of `hf-distill kd`, and the numbers come
from `compare_runs`. One factor multiplies all learning rates, because a model this small learns almost nothing at 2e-4.
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from datasets import disable_progress_bars

from benchmarks.measure import print_table
from benchmarks.stories import FIDELITY, describe_all, load_rows, load_teacher, make_parser, some_layers
from hf_distill import cli
from hf_distill.comparison import compare_runs, save_comparison
from hf_distill.row_files import first_rows

NAMES = "learning_rate num_train_epochs lora_r lora_alpha kd_weight temperature".split()
TITLES = "lr epochs rank alpha kd_weight T".split()
SETTINGS = {
    "baseline": (2e-4, 1, 8, 16, 0.1, 2),
    "higher_lr": (3e-4, 1, 8, 16, 0.1, 2),
    "more_epochs": (2e-4, 3, 8, 16, 0.1, 2),
    "higher_kd": (2e-4, 1, 8, 16, 0.3, 2),
    "combined": (3e-4, 2, 8, 16, 0.2, 2),
    "rank16": (2e-4, 4, 16, 32, 0.2, 2),
    "softer": (2e-4, 1, 8, 16, 0.1, 3),
}
# For `--only`: these change one setting at a time, while the seven change several.
SINGLE = {
    "hard_labels": (2e-4, 1, 8, 16, 0.0, 2),
    "kd_0.2": (2e-4, 1, 8, 16, 0.2, 2),
    "kd_1": (2e-4, 1, 8, 16, 1.0, 2),
    "kd_1_T1": (2e-4, 1, 8, 16, 1.0, 1),
    "four_epochs": (2e-4, 4, 8, 16, 0.1, 2),
    "only_rank16": (2e-4, 1, 16, 32, 0.1, 2),
    "rank8_four_epochs": (2e-4, 4, 8, 16, 0.2, 2),
}
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def run(name: str, seed: int, folder: Path, options: argparse.Namespace) -> Path:
    """Runs `hf-distill kd` once and returns its output directory."""
    output_dir = folder / f"{name}_{seed}"
    settings = dict(zip(NAMES, (SETTINGS | SINGLE)[name], strict=True))
    settings["learning_rate"] *= options.learning_rate_factor
    settings |= {
        "model": folder / "student", "teacher_model": options.teacher, "dataset": folder / "rows",
        "max_eval_rows": options.eval_rows, "output_dir": output_dir, "seed": seed, "max_length": options.length,
        "per_device_train_batch_size": options.batch_size, "gradient_accumulation_steps": 32 // options.batch_size,
        "per_device_eval_batch_size": 32, "lr_scheduler_type": "cosine", "lora_dropout": 0.0, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(), "save_strategy": "no",
        "logging_steps": 8, "report_to": "none", "disable_tqdm": True, "use_peft": True,
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    if not (output_dir / "settings.json").exists():
        cli.main(["kd", *arguments, "--lora_target_modules", *MODULES])
    return output_dir


def means(rows: list[dict], names: list[str], seeds: list[int]) -> list[dict[str, str]]:
    """One row per setting, with the mean over seeds and each seed."""
    by_name = {row["run"]: row for row in rows}
    found = []
    for name in names:
        runs = [by_name[f"{name}_{seed}"] for seed in seeds]
        settings = dict(zip(TITLES, (SETTINGS | SINGLE)[name], strict=True))
        found.append(
            {"": name, **settings, **describe_all(runs, FIDELITY), "tokens": f"{runs[0]['num_tokens']:,.0f}"}
        )  # of every seed
    return found


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for the student")
    parser.add_argument("--only", nargs="+", choices=SETTINGS | SINGLE, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--learning-rate-factor", type=float, default=50.0)
    parser.add_argument("--train-rows", type=int, default=1024)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a micro-batch; 32 make an update")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--output_dir", type=Path, default=Path("out/kd_lora"), help="finished runs there are kept")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    folder = options.output_dir
    teacher, tokenizer = load_teacher(options.teacher)
    some_layers(teacher, options.layers).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    (folder / "rows").mkdir(exist_ok=True)
    train, test = load_rows(options, tokenizer)
    first_rows(train, options.train_rows).to_json(folder / "rows" / "train.jsonl")
    first_rows(test, options.eval_rows).to_json(folder / "rows" / "test.jsonl")
    with redirect_stdout(sys.stderr):  # the table alone goes to stdout
        runs = [run(name, seed, folder, options) for seed in options.seeds for name in options.only]
        save_comparison(folder / "compare_out", runs)
    rows = compare_runs(runs)
    title = f"LoRA on layers {options.layers} of the teacher; learning rates x {options.learning_rate_factor:g}"
    print_table(f"{title}; mean (seeds {options.seeds})", means(rows, options.only, options.seeds), options.markdown)


if __name__ == "__main__":
    main()
