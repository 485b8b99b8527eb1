"""Other tokenizers, several teachers, inner layers: does each help, at equal budgets, on held-out stories?

    OMP_NUM_THREADS=1 python -m benchmarks.teachers cross --teacher stories260K --data tinystories
    OMP_NUM_THREADS=1 python -m benchmarks.teachers ensemble --teacher stories260K --data tinystories
    OMP_NUM_THREADS=1 python -m benchmarks.teachers hidden --teacher stories260K --data tinystories

Data and budgets as in benchmarks/tinystories.py. `cross`: a random student of two layers with a vocabulary of 1,000
byte-level tokens, trained on the same stories; what is measured is bits per byte of held-out text. `ensemble`: a second
teacher, made of all but one of the first one's layers and trained on hard labels. `hidden`: the teacher's hidden states
beside its logits.
"""

import argparse
import json
import math
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

from benchmarks.measure import print_table
from benchmarks.tinystories import describe, load_chunks, random_model, some_layers
from hf_distill import KDConfig, KDTrainer, evaluate_fidelity

HARD_LABELS = {"kd_weight": 0.0}
CROSS = {
    "hard labels": HARD_LABELS,
    "half aligned spans": {"cross_tokenizer": "aligned"},
    "aligned spans": {"cross_tokenizer": "aligned", "kd_weight": 0.9},
    "half ULD": {"cross_tokenizer": "uld"},
    "ULD": {"cross_tokenizer": "uld", "kd_weight": 0.9},
}
HIDDEN = {"KD alone": {}} | {
    f"KD + {weight:g} {loss}": {"hidden_weight": weight, "hidden_loss": loss}
    for loss, weight in (("mse", 1.0), ("mse", 0.1), ("cosine", 1.0), ("normalized_mse", 1.0), ("normalized_mse", 0.1))
}


def train(student, teacher, rows, tokenizer, changes, seed, options, teacher_tokenizer=None) -> KDTrainer:
    with tempfile.TemporaryDirectory() as folder:
        args = KDConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate, lr_scheduler_type="cosine", max_grad_norm=1.0,
            max_length=options.length, seed=seed, bf16=False, activation_checkpointing=False,
            use_cpu=not torch.cuda.is_available(), logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, **changes,
        )  # fmt: skip
        trainer = KDTrainer(
            student, teacher, args, rows, processing_class=tokenizer,
            teacher_processing_class=teacher_tokenizer or tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # prints to where the table goes
        trainer.train()
        return trainer


def byte_level_tokenizer(texts: list[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """A vocabulary of the student's own, from the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Of the first `length` tokens of each text, after a bos token."""
    nats = num_bytes = 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:length]
        tensor = torch.tensor([ids], device=model.device)
        nats += model(input_ids=tensor, labels=tensor).loss.item() * (len(ids) - 1)
        num_bytes += len(tokenizer.decode(ids[1:]).encode())
    return nats / math.log(2) / num_bytes


def load_stories(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"].strip() for line in file]


def compare_across(teacher: PreTrainedModel, teacher_tokenizer, options: argparse.Namespace) -> list[dict[str, str]]:
    texts, held_out = (load_stories(options.data / f"{name}.jsonl") for name in ("train", "test"))
    tokenizer = byte_level_tokenizer(texts)
    # A bos token, as the teacher was trained; the student's own text ends where max_length cuts it.
    rows = Dataset.from_dict({"text": [tokenizer.bos_token + text for text in texts]})
    table = []
    for name in options.only or CROSS:
        found = []
        for seed in options.seeds:
            set_seed(seed)
            student = random_model(teacher, options.random_layers)
            student.resize_token_embeddings(len(tokenizer))
            trainer = train(student, teacher, rows, tokenizer, CROSS[name], seed, options, teacher_tokenizer)
            found.append(bits_per_byte(trainer.model.eval(), held_out, tokenizer, options.length))
            print(f"{name}, seed {seed}: {found[-1]:.4f}", file=sys.stderr, flush=True)
        table.append({"student learns from": name, "bits per byte": describe(found, "{:.3f}")})
    return table


def compare_ensembles(teacher: PreTrainedModel, tokenizer, options: argparse.Namespace) -> list[dict[str, str]]:
    rows, held_out = (load_chunks(options.data / f"{n}.jsonl", tokenizer, options.length) for n in ("train", "test"))
    set_seed(100)
    second = some_layers(teacher, options.second_layers)
    second = train(second, teacher, rows, tokenizer, HARD_LABELS, 100, options).model
    nats = [math.log(evaluate_fidelity(m, teacher, held_out, tokenizer, batch_size=32)["student_perplexity"])
            for m in (teacher, second)]  # fmt: skip
    print(f"teachers: {nats[0]:.3f} and {nats[1]:.3f} nats per token", file=sys.stderr, flush=True)
    both = {"first": teacher, "second": second}
    variants = {
        "hard labels": (teacher, HARD_LABELS),
        "the first": (teacher, {"kd_weight": 1.0}),
        "the second": (second, {"kd_weight": 1.0}),
        "their mixture": (both, {"kd_weight": 1.0}),
        "their mixture, 3 to 1": (both, {"kd_weight": 1.0, "teacher_weights": [3.0, 1.0]}),
        "their reverse KLs": (both, {"kd_weight": 1.0, "teacher_combination": "sum", "divergence": "reverse_kl"}),
        "the first's reverse KL": (teacher, {"kd_weight": 1.0, "divergence": "reverse_kl"}),
    }
    return _compare_students(teacher, variants, rows, held_out, tokenizer, options)


def compare_layers(teacher: PreTrainedModel, tokenizer, options: argparse.Namespace) -> list[dict[str, str]]:
    rows, held_out = (load_chunks(options.data / f"{n}.jsonl", tokenizer, options.length) for n in ("train", "test"))
    variants = {name: (teacher, changes) for name, changes in HIDDEN.items()}
    return _compare_students(teacher, variants, rows, held_out, tokenizer, options)


def _compare_students(teacher, variants, rows, held_out, tokenizer, options) -> list[dict[str, str]]:
    """Both students with every variant, which is one teacher or several and what changes in the settings."""
    students = {
        f"its layers {', '.join(map(str, options.layers))}": lambda: some_layers(teacher, options.layers),
        f"random, {options.random_layers} layers": lambda: random_model(teacher, options.random_layers),
    }
    table = []
    for student_name, name in product(students, options.only or variants):
        (teachers, changes), found = variants[name], []
        for seed in options.seeds:
            set_seed(seed)
            student = students[student_name]()
            train(student, teachers, rows, tokenizer, changes, seed, options)
            found.append(evaluate_fidelity(student, teacher, held_out, tokenizer, batch_size=32))
            print(f"{student_name}, {name}, seed {seed}: {found[-1]['kl']:.4f}", file=sys.stderr, flush=True)
        nats = describe([math.log(values["student_perplexity"]) for values in found], "{:.3f}")
        kl = describe([values["kl"] for values in found], "{:.3f}")
        table.append({"student": student_name, "learns from": name, "nats per token": nats, "KL to the teacher": kl})
    return table


COMPARISONS = {"cross": compare_across, "ensemble": compare_ensembles, "hidden": compare_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--teacher", required=True, help="path or hub id of a causal language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for one student")
    parser.add_argument("--second-layers", type=int, nargs="+", default=[0, 1, 3, 4], help="of the second teacher")
    parser.add_argument("--random-layers", type=int, default=2, help="layers of the random student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--only", nargs="+", help="some of the rows")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device)
    table = COMPARISONS[options.comparison](teacher, tokenizer, options)
    print_table(f"{options.steps} steps, seeds {options.seeds}", table, options.markdown)


if __name__ == "__main__":
    main()
