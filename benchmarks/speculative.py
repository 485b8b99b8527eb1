"""Sources of the training text at equal tokens: speculative, student, teacher, dataset and mixes.

    OMP_NUM_THREADS=1 python -m benchmarks.speculative --teacher stories260K --data tinystories

Prompts are the first tokens of stories. Completions are the next tokens of the dataset, or generated for every update.
Every run ends when it has trained on the same number of tokens. The loss is forward KL alone. The student has some of
the teacher's layers. Held-out pieces of real stories are measured.
"""

import argparse
import time

from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback, set_seed

from benchmarks.measure import print_table
from benchmarks.stories import (
    FIDELITY,
    describe_all,
    load_chunks,
    load_teacher,
    load_texts,
    make_parser,
    make_trainer,
    measure_fidelity,
    some_layers,
)
from hf_distill import SpeculativeKDConfig, SpeculativeKDTrainer

MIXES = {
    "speculative": {"speculative": 1.0},
    "student (on-policy)": {"student": 1.0},
    "teacher (SeqKD)": {"teacher": 1.0},
    "dataset": {"dataset": 1.0},
    "speculative 0.5, dataset 0.5": {"speculative": 0.5, "dataset": 0.5},
    "student 0.5, dataset 0.5": {"student": 0.5, "dataset": 0.5},
}


class Budget(TrainerCallback):
    """Ends a run after this many trained tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= sum(len(row.completion_ids) for row in self.trainer.last_rows)
        control.should_training_stop = self.left <= 0


def train(student, teacher, rows, tokenizer, mix: dict[str, float], seed: int, options: argparse.Namespace) -> None:
    settings = {
        "max_steps": 100_000, "per_device_train_batch_size": options.batch_size, "seed": seed,
        "learning_rate": options.learning_rate, "lr_scheduler_type": "constant", "rollout_mix": mix,
        "max_new_tokens": options.max_new_tokens, "draft_length": options.draft_length, "top_k": options.top_k,
    }  # fmt: skip
    limit = Budget(options.tokens)
    limit.trainer = trainer = make_trainer(
        SpeculativeKDTrainer, SpeculativeKDConfig, student, teacher, rows, tokenizer, settings, callbacks=[limit]
    )
    trainer.train()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's layers in the student")
    parser.add_argument("--tokens", type=int, default=100_000, help="label-bearing tokens of every run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", choices=MIXES, default=list(MIXES))
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    length = options.prompt_length
    rows = Dataset.from_list(
        [
            {"student_prompt_ids": text[:length], "teacher_prompt_ids": text[:length], "completion_ids": text[length:]}
            for text in load_texts(options.data / "train.jsonl", tokenizer)
            if len(text) > length
        ]
    )
    held_out = load_chunks(options.data / "test.jsonl", tokenizer, length + options.max_new_tokens)

    def measure(student) -> dict[str, float]:
        return measure_fidelity(student, teacher, held_out, tokenizer)

    table = []
    untrained = measure(some_layers(teacher, options.layers))
    table.append({"": "untrained", **{title: form.format(untrained[key]) for title, (key, form) in FIDELITY.items()}})
    for name in options.only:
        results, seconds = [], []
        for seed in options.seeds:
            set_seed(seed)
            student, start = some_layers(teacher, options.layers), time.perf_counter()
            train(student, teacher, rows, tokenizer, MIXES[name], seed, options)
            seconds.append(time.perf_counter() - start)
            results.append(measure(student))
        table.append({"": name, **describe_all(results), "seconds": f"{sum(seconds) / len(seconds):.0f}"})
    title = (
        f"{options.tokens:,} tokens a run, batches of {options.batch_size}, seeds {options.seeds}; the teacher's "
        f"perplexity is {untrained['teacher_perplexity']:.2f}"
    )
    print_table(title, table, options.markdown)


if __name__ == "__main__":
    main()
