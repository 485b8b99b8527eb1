"""Other tokenizers, several teachers, inner layers: does each help, at equal budgets, on held-out stories?

    OMP_NUM_THREADS=1 python -m benchmarks.teachers cross --teacher stories260K --data tinystories
    OMP_NUM_THREADS=1 python -m benchmarks.teachers ensemble --teacher stories260K --data tinystories
    OMP_NUM_THREADS=1 python -m benchmarks.teachers hidden --teacher stories260K --data tinystories

Data and budgets are those of benchmarks/tinystories.py. `cross` has a random student of two layers with 1,000
byte-level tokens, trained on the same stories; it measures bits per byte of held-out text. `ensemble` has a second
teacher, made of all but one of the first teacher's layers and trained on hard labels. `hidden` adds the teacher's
hidden states to its logits.
"""

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from benchmarks.measure import print_table
from benchmarks.stories import (
    FIDELITY,
    add_budget,
    add_students,
    describe,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    make_students,
    measure_fidelity,
    random_model,
    some_layers,
    train_kd,
)

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


def byte_level_tokenizer(texts: list[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """A tokenizer for the student, trained on the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Bits per byte of the first `length` tokens of each text, after a bos token."""
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
    # Texts begin with a bos token, as in the teacher's training. max_length cuts the student's own text.
    rows = Dataset.from_dict({"text": [tokenizer.bos_token + text for text in texts]})
    table = []
    for name in options.only or CROSS:
        found = []
        for seed in options.seeds:
            set_seed(seed)
            student = random_model(teacher, options.random_layers)
            student.resize_token_embeddings(len(tokenizer))
            other = {"teacher_processing_class": teacher_tokenizer}
            train_kd(student, teacher, rows, tokenizer, CROSS[name], seed, options, **other)
            found.append(bits_per_byte(student.eval(), held_out, tokenizer, options.length))
            print(f"{name}, seed {seed}: {found[-1]:.4f}", file=sys.stderr, flush=True)
        table.append({"student learns from": name, "bits per byte": describe(found, "{:.3f}")})
    return table


def compare_ensembles(teacher: PreTrainedModel, tokenizer, options: argparse.Namespace) -> list[dict[str, str]]:
    rows, held_out = load_rows(options, tokenizer)
    set_seed(100)
    second = some_layers(teacher, options.second_layers)
    second = train_kd(second, teacher, rows, tokenizer, HARD_LABELS, 100, options).model
    nats = [measure_fidelity(model, teacher, held_out, tokenizer)["nats"] for model in (teacher, second)]
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
    rows, held_out = load_rows(options, tokenizer)
    variants = {name: (teacher, changes) for name, changes in HIDDEN.items()}
    return _compare_students(teacher, variants, rows, held_out, tokenizer, options)


def _compare_students(teacher, variants, rows, held_out, tokenizer, options) -> list[dict[str, str]]:
    """Trains both students with every variant: one or several teachers, and changes to the settings."""
    students = make_students(teacher, options)
    table = []
    for student_name, name in product(students, options.only or variants):
        (teachers, changes), found = variants[name], []
        for seed in options.seeds:
            set_seed(seed)
            student = students[student_name]()
            train_kd(student, teachers, rows, tokenizer, changes, seed, options)
            found.append(measure_fidelity(student, teacher, held_out, tokenizer))
            print(f"{student_name}, {name}, seed {seed}: {found[-1]['kl']:.4f}", file=sys.stderr, flush=True)
        columns = {"nats per token": ("nats", "{:.3f}"), "KL to the teacher": FIDELITY["KL to the teacher"]}
        table.append({"student": student_name, "learns from": name, **describe_all(found, columns)})
    return table


COMPARISONS = {"cross": compare_across, "ensemble": compare_ensembles, "hidden": compare_layers}


def main() -> None:
    parser = make_parser(__doc__)
    add_students(parser)
    add_budget(parser, steps=120, learning_rate=3e-3)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--second-layers", type=int, nargs="+", default=[0, 1, 3, 4], help="of the second teacher")
    parser.add_argument("--only", nargs="+", help="some of the rows")
    options = parser.parse_args()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    table = COMPARISONS[options.comparison](teacher, tokenizer, options)
    print_table(f"{options.steps} steps, seeds {options.seeds}", table, options.markdown)


if __name__ == "__main__":
    main()
