"""The cost of the term for keys and values, in addition to KDTrainer's step.

    python -m benchmarks.kv_capture

Rows are random, and every token has a label. Ratios are KDTrainer / this row. Diagnostics (CKA, ranks) are computed on
logging steps only and are not included.
"""

import argparse
import tempfile
from contextlib import nullcontext

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import Measurement, columns, in_fresh_process, machine, measure, print_table
from benchmarks.training_step import make_model
from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer

VARIANTS = {
    "KDTrainer": None,
    "keys and values, pca": {"projector": "pca"},
    "keys and values, mlp": {"projector": "mlp"},
}


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the numbers below `vocab`, for rows of token ids."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="1")


def run(variant: str, options: argparse.Namespace) -> Measurement:
    """Measures one variant in this process."""
    disable_progress_bars()
    torch.manual_seed(0)
    tokenizer = word_tokenizer(options.vocab)
    student, teacher = (make_model(width, options.vocab) for width in (options.student_width, options.teacher_width))
    ids = torch.randint(options.vocab, (options.batch_size * (options.steps + 1), options.length)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder, "per_device_train_batch_size": options.batch_size, "max_length": None, "bf16": False,
            "gradient_checkpointing": options.gradient_checkpointing, "report_to": "none", "disable_tqdm": True,
            "use_cpu": not options.device.startswith("cuda"), "logging_steps": 1000,
        }  # fmt: skip
        tools = {"train_dataset": rows, "processing_class": tokenizer, "teacher_processing_class": tokenizer}
        changes = VARIANTS[variant]
        if changes is None:
            trainer, context = KDTrainer(student, teacher, KDConfig(**settings), **tools), nullcontext()
        else:
            trainer = KVProjectionTrainer(student, teacher, KVProjectionConfig(**settings, **changes), **tools)
            context = trainer.projectors.attached(trainer.student)
        trainer.state.logging_steps = 1000
        batches = iter(trainer.get_train_dataloader())
        taken = [trainer.get_batch_samples(batches, 1, trainer.args.device) for _ in range(options.steps)]
        with context:
            return measure(
                lambda batch: trainer.training_step(trainer.model, dict(batch[0][0]), batch[1]),
                taken, reset=trainer.model.zero_grad, device=options.device,
            )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--student-width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    found = {variant: in_fresh_process(run, variant, options) for variant in VARIANTS}
    rows = [{"step": name, **columns(value, found["KDTrainer"])} for name, value in found.items()]
    shapes = f"V={options.vocab:,}, trunks 4 x {options.student_width} and 4 x {options.teacher_width}, float32"
    title = f"{options.batch_size} rows of {options.length} tokens, {shapes}"
    title += ", checkpointing" if options.gradient_checkpointing else ""
    print_table(f"{title}; {machine(options.device)}", rows, options.markdown)


if __name__ == "__main__":
    main()
