"""Do the teacher's keys and values help, beside its logits? Distances and projectors at equal budgets.

    OMP_NUM_THREADS=1 python -m benchmarks.kv_projection --teacher stories260K --data tinystories

Rows, students and budgets as in benchmarks/tinystories.py. Half of the loss are hard labels, half forward KL; the term
of keys and values comes on top. Cosine, centred cosine and CKA are of held-out rows.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from benchmarks.measure import print_table
from benchmarks.tinystories import describe, load_chunks, random_model, some_layers
from hf_distill import KVProjectionConfig, KVProjectionTrainer, evaluate_fidelity

VARIANTS = {"KD alone": {"kv_weight": 0.0}} | {
    f"KD + {loss}, {projector}": {"kv_loss": loss, "projector": projector}
    for loss in ("mercator", "mse", "normalized_l1")
    for projector in ("mlp", "pca")
}
VARIANTS["KD + mercator, mlp frozen after 50"] = {"projector_freeze_after": 50}
VARIANTS["KD + 0.1 mercator, pca"] = {"kv_weight": 0.1, "projector": "pca"}
# The other terms stay, too small to matter beside this weight; gradients are clipped and AdamW knows no scale.
VARIANTS["mercator alone, mlp"] = {"kv_weight": 1e6}


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    variant: dict,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Trains and returns what `evaluate` says of keys and values."""
    with tempfile.TemporaryDirectory() as folder:
        args = KVProjectionConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate, projector_learning_rate=options.learning_rate,
            lr_scheduler_type="cosine", max_grad_norm=1.0, max_length=options.length, seed=seed, bf16=False,
            gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, per_device_eval_batch_size=32, **variant,
        )  # fmt: skip
        trainer = KVProjectionTrainer(
            student, teacher, args, rows, held_out, tokenizer, teacher_processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)  # prints to where the table goes
        trainer.train()
        return trainer.evaluate()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="hub id or path")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's layers in a student")
    parser.add_argument("--random-layers", type=int, default=2, help="layers of the random student")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    rows, held_out = (
        load_chunks(Path(options.data) / f"{name}.jsonl", tokenizer, options.length) for name in ("train", "test")
    )
    students = {
        f"its layers {', '.join(map(str, options.layers))}": lambda: some_layers(teacher, options.layers),
        f"random, {options.random_layers} layers": lambda: random_model(teacher, options.random_layers),
    }
    columns = {
        "KL to the teacher": ("kl", "{:.3f}"),
        "perplexity": ("student_perplexity", "{:.2f}"),
        "cosine": ("eval_kv/cosine", "{:.2f}"),
        "centred": ("eval_kv/centered_cosine", "{:.2f}"),
        "CKA": ("eval_kv/cka", "{:.2f}"),
    }
    for name, make in students.items():
        table = []
        for title in options.only:
            results = []
            for seed in options.seeds:
                set_seed(seed)
                student = make()
                found = train(student, teacher, rows, held_out, tokenizer, VARIANTS[title], seed, options)
                fidelity = evaluate_fidelity(student, teacher, held_out, tokenizer, batch_size=32)
                results.append(found | fidelity)
            row = {column: describe([r[key] for r in results], form) for column, (key, form) in columns.items()}
            table.append({"": title, **row})
            print(f"{name}: {table[-1]}", file=sys.stderr, flush=True)  # runs are long; the table comes at the end
        print_table(f"student: {name}; {options.steps} steps, seeds {options.seeds}", table, options.markdown)


if __name__ == "__main__":
    main()
