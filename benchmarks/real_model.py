"""Losses, weights, temperatures and sources of text for a real student, at equal budgets, on held-out rows.

    OMP_NUM_THREADS=1 python -m benchmarks.real_model --teacher SmolLM2-135M-Instruct --data_folder data \
        --data gsm8k --output out/real --arms "hard labels" KD --seeds 0 1 2 --learning_rate 1e-3
    python -m benchmarks.real_model --output out/real --table

The student `half` has every second layer of the teacher, `near` lacks five of thirty; with `LoRA` adapters alone are
trained. Each finished run is one JSON file in `--output`, and a run whose file is there is skipped: a killed queue goes
on where it was. The teacher's hidden states are written once into a store there, from which most arms train.
`--keep FILE` adds all finished runs to one file, and `--table` shows what is in `--output` and in that file.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from benchmarks.real_runs import STUDENTS, Arm, Budget, Setup
from benchmarks.real_tables import print_tables, read_runs, write_runs, write_tables
from hf_distill import KVProjectionConfig, KVProjectionTrainer, SpeculativeKDConfig, SpeculativeKDTrainer

ALONE = {"kd_weight": 1.0}
ROLLOUT = {"max_new_tokens": 96, "max_length": None, **ALONE}
SPECULATIVE = (SpeculativeKDTrainer, SpeculativeKDConfig)
ARMS: dict[str, Arm] = {
    "hard labels": Arm({"kd_weight": 0.0}),
    "KD": Arm(ALONE),
    "hard labels, warm-up": Arm({"kd_weight": 0.0, "warmup_steps": 5}),
    "KD, warm-up": Arm({**ALONE, "warmup_steps": 5}),
    "KD, half, warm-up": Arm({"kd_weight": 0.5, "warmup_steps": 5}),
    "KD, half": Arm({"kd_weight": 0.5}),
    "KD, T = 2": Arm({**ALONE, "temperature": 2.0}),
    "KD, T = 4": Arm({**ALONE, "temperature": 4.0}),
    "KD, half, T = 2": Arm({"kd_weight": 0.5, "temperature": 2.0}),
    "KD, half, T = 4": Arm({"kd_weight": 0.5, "temperature": 4.0}),
    "reverse KL": Arm({**ALONE, "divergence": "reverse_kl"}),
    "JSD": Arm({**ALONE, "divergence": "jensen_shannon"}),
    "TAID": Arm({**ALONE, "divergence": "taid"}),
    "KD + hidden states": Arm({**ALONE, "hidden_weight": 1.0, "hidden_loss": "cosine"}, "model"),
    "KD + keys and values": Arm({**ALONE, "kv_weight": 1.0}, "model", (KVProjectionTrainer, KVProjectionConfig)),
    "KD, sampled store": Arm(ALONE, "sampled"),
    "KD, int8 store": Arm(ALONE, "int8"),
    "KD, top-12 store": Arm(ALONE, "topk"),
    "KD, two teachers": Arm(ALONE, "two"),
    "KD, speculative": Arm({**ROLLOUT, "rollout_mix": {"speculative": 1.0}}, "model", SPECULATIVE),
    "KD, half speculative": Arm(
        {**ROLLOUT, "rollout_mix": {"speculative": 0.5, "dataset": 0.5}}, "model", SPECULATIVE
    ),
    "KD, half on-policy": Arm({**ROLLOUT, "rollout_mix": {"student": 0.5, "dataset": 0.5}}, "model", SPECULATIVE),
}  # fmt: skip
UNTRAINED = "untrained"


def run_path(output: Path, about: dict[str, Any]) -> Path:
    """The file of a run."""
    name = "-".join(f"{about[key]}" for key in ("data", "student", "arm", "steps", "learning_rate", "seed"))
    return output / "runs" / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', name)}.json"


def finish(output: Path, about: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
    """Computes a run and writes its file; nothing if it is there, from the same settings."""
    path = run_path(output, about)
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if differing := {name for name in about if there.get(name) != about[name]}:
            raise ValueError(f"{path} is of another {', '.join(sorted(differing))}: take another --output")
        return
    start = time.time()
    found = {**about, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    os.replace(part, path)
    numbers = {name: found["results"][name] for name in ("nats", "kl", "agreement", "ece")}
    print(f"{time.strftime('%H:%M')} {path.stem}: {numbers}, {time.time() - start:.0f} s", flush=True)


def run_all(options: argparse.Namespace) -> None:
    """All runs of the options, one after the other."""
    budget = Budget(options.steps, options.batch_size, options.length, options.held_out)
    setup = Setup(options.teacher, options.data, options.data_folder, options.output, budget, options.scores)
    keep = options.output / options.save if options.save else None
    for student in options.students:
        about = {"data": options.data, "student": student, **budget._asdict()}
        start = {**about, "arm": UNTRAINED, "steps": 0, "learning_rate": 0.0, "seed": 0, "settings": {}}
        finish(options.output, start, partial(setup.untrained, student))
        for seed, name, rate in product(options.seeds, options.arms, options.learning_rate):
            arm = ARMS[name]
            run = {**about, "arm": name, "learning_rate": rate, "seed": seed, "settings": dict(arm.changes)}
            finish(options.output, run, partial(setup.train, arm, student, seed, rate, keep))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--data_folder", type=Path, help="folder with gsm8k, squad, dolly, tinystories")
    parser.add_argument("--data", choices=["gsm8k", "squad", "dolly", "stories"], default="gsm8k")
    parser.add_argument("--output", type=Path, default=Path("out/real_model"))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=["half"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["hard labels", "KD"], metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[1e-3])
    for name, value in Budget._field_defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scores", action="store_true", help="generate answers to held-out prompts, and score them")
    parser.add_argument("--save", help="folder in --output for the student, as the second teacher (`second`)")
    parser.add_argument("--keep", type=Path, help="a JSON file of finished runs: --output's are added to it")
    parser.add_argument("--table", action="store_true", help="print the tables of finished runs, and train nothing")
    parser.add_argument("--page", type=Path, help="with --table: a Markdown page whose tables are replaced")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    if not options.table and not (options.teacher and options.data_folder):
        parser.error("a training needs --teacher and --data_folder; --table and --keep alone need neither")
    return options


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    if not options.table:
        run_all(options)
    runs = read_runs(options.output, options.keep)
    if options.keep:
        write_runs(options.keep, runs)
    if options.table:
        print_tables(runs, options.markdown)
        if options.page:
            write_tables(options.page, runs)


if __name__ == "__main__":
    main()
