"""Hard labels alone against distillation, at equal budgets, on held-out stories.

    OMP_NUM_THREADS=1 python -m benchmarks.tinystories --teacher stories260K --data tinystories

`--teacher` is a causal language model. `--data` is a folder with train.jsonl and test.jsonl, with a `text` in each
line. Rows are 128-token pieces of one stream of all stories. Each story begins with the tokenizer's bos token, as in
the teacher's training. There are two students: some of the teacher's own layers, and a random model with the teacher's
width. Every run uses KDTrainer; the seed sets the order of the rows and the random weights. `--plain` runs the same in
a plain torch loop with dense logits, which has to end at the same numbers.
"""

import argparse
import math

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.measure import print_table
from benchmarks.stories import (
    FIDELITY,
    add_budget,
    add_students,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    make_students,
    measure_fidelity,
    train_kd,
)

OBJECTIVES = {
    "hard labels": {"kd_weight": 0.0},
    "forward KL": {"kd_weight": 1.0, "divergence": "forward_kl"},
    "half and half": {"kd_weight": 0.5, "divergence": "forward_kl"},
}
COLUMNS = {"nats per token": ("nats", "{:.3f}")} | {name: FIDELITY[name] for name in ("KL to the teacher", "agreement")}


def train_plainly(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: dict[str, float | str],
    seed: int,
    options: argparse.Namespace,
) -> None:
    """Trains as `train_kd`, without KDTrainer: forward KL and hard labels from dense logits, rows in the same order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(options.batch_size)
    input_ids = torch.tensor(rows["input_ids"], device=student.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for chosen in order[: options.steps]:
        batch = input_ids[chosen]
        student_logits = student.train()(input_ids=batch).logits[:, :-1].flatten(0, 1)  # (N, V)
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch).logits[:, :-1].flatten(0, 1)  # (N, V)
        log_probs = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        kl = nn.functional.kl_div(*log_probs, log_target=True, reduction="batchmean")
        ce = nn.functional.cross_entropy(student_logits, batch[:, 1:].flatten())
        (objective["kd_weight"] * kl + (1 - objective["kd_weight"]) * ce).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_students(parser)
    add_budget(parser, steps=120, learning_rate=3e-3)
    parser.add_argument("--by-story", action="store_true", help="cut each story by itself, not all in one stream")
    parser.add_argument("--plain", action="store_true", help="a plain torch loop in place of KDTrainer")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    progress = Console(stderr=True)
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer, options.by_story)
    run = train_plainly if options.plain else train_kd
    table = []
    for student_name, make_student in make_students(teacher, options).items():
        for objective_name, objective in {"untrained": None, **OBJECTIVES}.items():
            found = []
            for seed in options.seeds:
                set_seed(seed)
                student = make_student()
                if objective is not None:
                    run(student, teacher, rows, tokenizer, objective, seed, options)
                found.append(measure_fidelity(student, teacher, held_out, tokenizer))
                progress.print(f"{student_name}, {objective_name}, seed {seed}: {found[-1]['nats']:.3f} nats per token")
            table.append({"student": f"{student_name}: {objective_name}", **describe_all(found, COLUMNS)})
    size = f"{options.steps} steps of {options.batch_size} x {options.length} tokens"
    teacher_nats = f"the teacher has {math.log(found[-1]['teacher_perplexity']):.3f} nats per token"
    title = f"{size}; mean (seeds {options.seeds}) on {len(held_out)} held-out rows, where {teacher_nats}"
    print_table(title, table, options.markdown)


if __name__ == "__main__":
    main()
