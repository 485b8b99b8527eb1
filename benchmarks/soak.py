"""Thousands of updates of a tiny run of each trainer: memory that stays, steps that take as long as the first ones.

    OMP_NUM_THREADS=1 python -m benchmarks.soak --steps 10000 --markdown
    OMP_NUM_THREADS=1 python -m benchmarks.soak --only kd --steps 2000

Each trainer runs in a process of its own, and saves a checkpoint in the middle and at the end (`save_total_limit=1`).
Memory is the resident memory after a collection of garbage, at a tenth of the updates and at the end. Time is the
median of CPU seconds per update over the second tenth and over the last. Other work on the machine makes even CPU
seconds longer, by a third and more; so a fixed computation runs before each update, and `ratio` divides by its own.
A file that is neither of the run's reports nor in a checkpoint is stray.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from benchmarks.measure import in_fresh_process, machine, print_table
from benchmarks.timed_rows import seconds, size
from benchmarks.updates import SETTINGS, kd, kv, skd, texts
from hf_distill import HardLabelConfig, HardLabelTrainer
from tests.conftest import make_model, make_tokenizer

REPORTS = {"report.md", "report.html", "report.json", "metrics.json", "README.md", "run.json", "tokens.json"}


class Watch(TrainerCallback):
    """Resident memory at some updates, and the CPU times of each and of a fixed computation before it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.memory, self.times, self.fixed, self.before = steps, {}, [], [], 0.0
        self.layer, self.input = torch.nn.Linear(32, 32), torch.ones(32, 32)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.process_time()
        for _ in range(4):  # of small operations, as an update here
            (self.layer(self.input).tanh() @ self.input).sum().backward()
        self.before = time.process_time()
        self.fixed.append(self.before - start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time() - self.before)
        if state.global_step in (self.steps // 10, self.steps):
            gc.collect()
            self.memory[state.global_step] = psutil.Process().memory_info().rss


def sft(folder: str, **changes: Any) -> HardLabelTrainer:
    settings = {name: value for name, value in SETTINGS.items() if name != "temperature"} | changes
    args = HardLabelConfig(output_dir=folder, **settings)
    return HardLabelTrainer(make_model(seed=2), args, texts(), texts(), make_tokenizer())


MAKERS = {"sft": sft, "kd": kd, "kv": kv, "skd": skd}


def run(name: str, steps: int) -> dict[str, Any]:
    """Memory, times and stray files of one trainer."""
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {
            "max_steps": steps, "logging_steps": 100, "eval_strategy": "no", "save_strategy": "steps",
            "save_steps": max(steps // 2, 1), "save_total_limit": 1, "gradient_accumulation_steps": 1,
        }  # fmt: skip
        if name == "skd":
            changes |= {"max_new_tokens": 4, "draft_length": 2}
        trainer = MAKERS[name](folder, **changes)
        trainer.add_callback(watch := Watch(steps))
        trainer.train()
        kept = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
        stray = {path for path in kept if not path.startswith("checkpoint-") and path not in REPORTS}
        tenth = steps // 10
        found = {
            name: [statistics.median(part) for part in (times[tenth : 2 * tenth], times[-tenth:])]
            for name, times in {"times": watch.times, "fixed": watch.fixed}.items()
        }
        return {"memory": [*watch.memory.values()], "stray": sorted(stray), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    rows = []
    for name in options.only:
        found = in_fresh_process(run, name, options.steps)
        (early, late), (first, last), fixed = found["memory"], found["times"], found["fixed"]
        rows.append(
            {
                "trainer": name,
                f"memory at {options.steps // 10:,}": size(early),
                f"at {options.steps:,}": size(late),
                "growth": f"{late / early - 1:+.1%}",
                "update, second tenth": seconds(first),
                "last tenth": seconds(last),
                "the fixed computation": f"{fixed[1] / fixed[0]:.2f}x",
                "ratio": f"{last / first / (fixed[1] / fixed[0]):.2f}x",
                "stray files": ", ".join(found["stray"]) or "none",
            }
        )
    print_table(f"{options.steps:,} updates; {machine('cpu')}", rows, options.markdown)


if __name__ == "__main__":
    main()
