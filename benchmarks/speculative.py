"""Where should the training text come from? Speculative, student, teacher, data set and mixes, at equal tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.speculative --teacher stories260K --data tinystories

Prompts are the first tokens of stories, completions what follows: from the data set, or written anew for every update.
Every run ends when it has trained on the same number of tokens; the loss is forward KL alone. The student is some of
the teacher's layers. What is measured are held-out pieces of real stories.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

from benchmarks.measure import print_table
from benchmarks.tinystories import describe, load_chunks, load_texts, some_layers
from hf_distill import SpeculativeKDConfig, SpeculativeKDTrainer, evaluate_fidelity

MIXES = {
    "speculative": {"speculative": 1.0},
    "student (on-policy)": {"student": 1.0},
    "teacher (SeqKD)": {"teacher": 1.0},
    "dataset": {"dataset": 1.0},
    "speculative 0.5, dataset 0.5": {"speculative": 0.5, "dataset": 0.5},
    "student 0.5, dataset 0.5": {"student": 0.5, "dataset": 0.5},
}


class Budget(TrainerCallback):
    """Ends a run when it has trained on so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= sum(len(row.completion_ids) for row in self.trainer.last_rows)
        control.should_training_stop = self.left <= 0


def train(student, teacher, rows, tokenizer, mix: dict[str, float], seed: int, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = SpeculativeKDConfig(
            output_dir=folder, max_steps=100_000, per_device_train_batch_size=options.batch_size, seed=seed,
            learning_rate=options.learning_rate, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=False,
            gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, rollout_mix=mix,
            max_new_tokens=options.max_new_tokens, draft_length=options.draft_length, top_k=options.top_k,
        )  # fmt: skip
        budget = Budget(options.tokens)
        budget.trainer = trainer = SpeculativeKDTrainer(
            student, teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer,
            callbacks=[budget],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # prints to where the table goes
        trainer.train()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="hub id or path")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's layers in the student")
    parser.add_argument("--tokens", type=int, default=100_000, help="label-bearing tokens of every run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompt-length", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    length = options.prompt_length
    rows = Dataset.from_list(
        [
            {"student_prompt_ids": text[:length], "teacher_prompt_ids": text[:length], "completion_ids": text[length:]}
            for text in load_texts(Path(options.data) / "train.jsonl", tokenizer)
            if len(text) > length
        ]
    )
    held_out = load_chunks(Path(options.data) / "test.jsonl", tokenizer, length + options.max_new_tokens)

    def measure(student) -> dict[str, float]:
        return evaluate_fidelity(student, teacher, held_out, tokenizer, batch_size=32)

    table = []
    untrained = measure(some_layers(teacher, options.layers))
    table.append({"": "untrained", "KL to the teacher": f"{untrained['kl']:.3f}"})
    table[0] |= {"perplexity": f"{untrained['student_perplexity']:.2f}", "agreement": f"{untrained['agreement']:.1%}"}
    for name in options.only:
        results, seconds = [], []
        for seed in options.seeds:
            set_seed(seed)
            student, start = some_layers(teacher, options.layers), time.perf_counter()
            train(student, teacher, rows, tokenizer, MIXES[name], seed, options)
            seconds.append(time.perf_counter() - start)
            results.append(measure(student))
        columns = {
            "KL to the teacher": ("kl", "{:.3f}"),
            "perplexity": ("student_perplexity", "{:.2f}"),
            "agreement": ("agreement", "{:.1%}"),
        }
        row = {title: describe([result[key] for result in results], form) for title, (key, form) in columns.items()}
        table.append({"": name, **row, "seconds": f"{sum(seconds) / len(seconds):.0f}"})
    title = (
        f"{options.tokens:,} tokens a run, batches of {options.batch_size}, seeds {options.seeds}; the teacher's "
        f"perplexity is {untrained['teacher_perplexity']:.2f}"
    )
    print_table(title, table, options.markdown)


if __name__ == "__main__":
    main()
