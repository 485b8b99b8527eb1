"""A teacher behind an address, against the same teacher in this process; and what its requests cost a step.

    vllm serve MODEL --dtype float32 --max-logprobs -1
    OMP_NUM_THREADS=1 python -m benchmarks.remote --teacher MODEL --data tinystories --url http://localhost:8000/v1
    OMP_NUM_THREADS=1 python -m benchmarks.remote --teacher MODEL --data tinystories --vllm .venv-vllm/bin/vllm

- Log-probabilities of held-out stories, of the whole vocabulary, against the model's own.
- `--steps` updates with the whole vocabulary, against the same with the local teacher: the largest difference of a
  weight, relative to the largest weight.
- Held-out divergence after training with the K most likely tokens, beside the local teacher and hard labels, at equal
  budgets.
- Overlap (`--parts overlap`, needs no server): a teacher that takes 0.8 of a step for each batch, with 0 and 2 workers,
  against the step on hard labels.
"""

import argparse
import statistics
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from benchmarks.measure import machine, print_table
from benchmarks.served import serving
from benchmarks.stories import (
    FIDELITY,
    add_budget,
    budget,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    make_trainer,
    some_layers,
    trained_fidelities,
)
from hf_distill import KDConfig, KDTrainer
from hf_distill.losses.sparse import TopKSignal

PARTS = ("probabilities", "updates", "outcome", "overlap")
WAITING = 0.8  # of a step
STEPS_OF_OVERLAP, STEPS_OF_START = 40, 8  # workers fill their queue in the first ones


def probabilities(options: argparse.Namespace, teacher: Any, rows: Dataset, tokenizer: Any) -> list[dict[str, str]]:
    """The largest and the mean difference of a log-probability, over all tokens at all positions."""
    settings = {**budget(options, 0), "teacher_logprobs": -1, "per_device_train_batch_size": 2}
    trainer = make_trainer(
        KDTrainer, KDConfig, some_layers(teacher, options.layers), options.url, rows, tokenizer, settings
    )
    found = []
    for i in range(4):
        batch = trainer.batch_collator()([rows[2 * i], rows[2 * i + 1]])
        _, positions, _ = trainer.take_labels(batch)
        signal = trainer.teacher(batch, positions)
        with torch.no_grad():
            logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        truth = logits[positions].double().log_softmax(-1).gather(-1, signal.ids.long())
        found.append((signal.log_probs.double() - truth).abs().flatten())
    errors = torch.cat(found)
    return [{"log-probabilities": f"{len(errors):,}", "mean": f"{errors.mean():.1e}", "largest": f"{errors.max():.1e}"}]


def updates(options: argparse.Namespace, teacher: Any, rows: Dataset, tokenizer: Any) -> list[dict[str, str]]:
    """The difference of weights after `options.updates` updates."""
    trained = {}
    for name, source in (("local", teacher), ("remote", options.url)):
        settings = {
            **budget(options, 0), "teacher_logprobs": -1 if name == "remote" else None, "kd_weight": 1.0,
            "max_steps": options.updates, "per_device_train_batch_size": 4, "temperature": 2.0,
        }  # fmt: skip
        student = some_layers(teacher, options.layers)
        trainer = make_trainer(KDTrainer, KDConfig, student, source, rows, tokenizer, settings)
        trainer.train()
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in trainer.student.parameters()])
    far = (trained["remote"] - trained["local"]).abs().max() / trained["local"].abs().max()
    return [{"updates": str(options.updates), "temperature": "2", "largest difference of a weight": f"{far:.1e}"}]


def outcome(
    options: argparse.Namespace, teacher: Any, rows: Dataset, held_out: Dataset, tokenizer: Any
) -> list[dict[str, str]]:
    """Fidelity after training, of each source of the signal and seed."""
    sources: dict[str, tuple[Any, dict[str, Any]]] = {"local": (teacher, {"kd_weight": 1.0})}
    for k in options.sizes:
        sources[f"remote, {k} and the rest"] = (options.url, {"kd_weight": 1.0, "teacher_logprobs": k})
    sources["hard labels"] = (teacher, {"kd_weight": 0.0})
    table = []
    for name, (source, changes) in sources.items():
        found = trained_fidelities(options, source, teacher, rows, held_out, tokenizer, changes)
        table.append({"teacher": name, **describe_all(found, FIDELITY)})
        print(table[-1], flush=True)
    return table


class StepTimes(TrainerCallback):
    """The time at the end of each update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in pairwise(self.ends)]


class Waiting:
    """A teacher that says something after some seconds, as one behind an address does."""

    name = "waiting"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def prepare(self, dataset: Any, name: str) -> Any:
        return dataset

    @property
    def collate(self) -> Any:
        return partial(_answer_after, seconds=self.seconds)

    def __call__(self, inputs: Any, positions: torch.Tensor) -> TopKSignal:
        return TopKSignal(inputs["teacher_ids"], inputs["teacher_log_probs"])


def _answer_after(rows: list[dict[str, Any]], seconds: float) -> dict[str, torch.Tensor]:
    time.sleep(seconds)
    count = sum(len(row["input_ids"]) - 1 for row in rows)
    ids = torch.arange(20).expand(count, 20)
    return {"teacher_ids": ids, "teacher_log_probs": torch.full((count, 20), -4.0)}


def overlap(options: argparse.Namespace, teacher: Any, rows: Dataset, tokenizer: Any) -> list[dict[str, str]]:
    """Seconds of an update, of runs that take turns."""

    def seconds(source: Any, workers: int, **changes: Any) -> float:
        settings = {
            **budget(options, 0), "max_steps": STEPS_OF_OVERLAP, "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0, **changes,
        }  # fmt: skip
        trainer = make_trainer(
            KDTrainer, KDConfig, some_layers(teacher, options.layers), source, rows, tokenizer, settings
        )
        clock = StepTimes()
        trainer.add_callback(clock)
        trainer.train()
        return statistics.median(clock.seconds()[STEPS_OF_START:])

    step = statistics.median(seconds(teacher, 0, kd_weight=0.0) for _ in range(3))
    runs = {
        "hard labels": partial(seconds, teacher, 0, kd_weight=0.0),
        "0 workers": partial(seconds, Waiting(WAITING * step), 0),
        "2 workers": partial(seconds, Waiting(WAITING * step), 2),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            found[name].append(run())
    medians = {name: statistics.median(values) for name, values in found.items()}
    return [
        {"teacher": name, "a step, s": f"{value:.3f}", "ratio": f"{value / medians['hard labels']:.2f}"}
        for name, value in medians.items()
    ]


def main() -> None:
    parser = make_parser(__doc__)
    add_budget(parser, steps=120, learning_rate=3e-3)
    parser.add_argument("--url", help="of a server that has the same model, in float32")
    parser.add_argument("--vllm", help="the command of an environment with vLLM, which is started then")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for the student")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 64], help="K")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = parser.parse_args()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer)
    print(machine("cpu"))
    if options.vllm:
        with serving(options.vllm, options.teacher) as server:
            options.url = server.url
            measure(options, teacher, rows, held_out, tokenizer)
    else:
        measure(options, teacher, rows, held_out, tokenizer)


def measure(options: argparse.Namespace, teacher: Any, rows: Dataset, held_out: Dataset, tokenizer: Any) -> None:
    tables = {
        "probabilities": partial(probabilities, options, teacher, held_out, tokenizer),
        "updates": partial(updates, options, teacher, rows, tokenizer),
        "outcome": partial(outcome, options, teacher, rows, held_out, tokenizer),
        "overlap": partial(overlap, options, teacher, rows, tokenizer),
    }
    for part in options.parts:
        print_table(part, tables[part](), options.markdown)


if __name__ == "__main__":
    main()
