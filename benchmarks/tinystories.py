"""Hard labels alone against distillation, at equal budgets, on held-out stories.

    OMP_NUM_THREADS=1 python -m benchmarks.tinystories --teacher stories260K --data tinystories

`--teacher` is a causal language model, `--data` a folder with train.jsonl and test.jsonl, a `text` in each line. Rows
are 128-token pieces of all stories in one stream, each story after the tokenizer's bos token, as the teacher was
trained. Two students: some of the teacher's own layers, and a random model of the teacher's width. Every run goes
through KDTrainer; the seed draws the order of the rows and the random weights. `--plain` runs the same in a plain torch
loop with dense logits, which has to end at the same numbers.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from benchmarks.measure import print_table
from hf_distill import KDConfig, KDTrainer, evaluate_fidelity

OBJECTIVES = {
    "hard labels": {"kd_weight": 0.0},
    "forward KL": {"kd_weight": 1.0, "divergence": "forward_kl"},
    "half and half": {"kd_weight": 0.5, "divergence": "forward_kl"},
}


def load_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each story, after the bos token."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [
        [tokenizer.bos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def load_chunks(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, by_story: bool = False) -> Dataset:
    """The stories as one stream of tokens, or one by one, cut into rows of `length`; what is left over is dropped."""
    texts = load_texts(path, tokenizer)
    streams = texts if by_story else [[token for text in texts for token in text]]
    rows = [stream[i : i + length] for stream in streams for i in range(0, len(stream) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def some_layers(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of the teacher that has only these of its layers."""
    student = copy.deepcopy(teacher).requires_grad_()  # a teacher that has taught is frozen
    student.model.layers = nn.ModuleList(student.model.layers[i] for i in layers)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(layers)
    return student


def random_model(teacher: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A random model of the teacher's width."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    return AutoModelForCausalLM.from_config(config)


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: dict[str, float | str],
    seed: int,
    options: argparse.Namespace,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = KDConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            max_length=options.length,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **objective,
        )
        trainer = KDTrainer(
            student, teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)  # prints to where the table goes
        trainer.train()


def train_plainly(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: dict[str, float | str],
    seed: int,
    options: argparse.Namespace,
) -> None:
    """What `train` does, without KDTrainer: forward KL and hard labels from dense logits, rows in the same order."""
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


def describe(values: list[float], form: str) -> str:
    """The mean and the values."""
    return f"{form.format(statistics.mean(values))} ({', '.join(map(form.format, values))})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or hub id of a causal language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for one student")
    parser.add_argument("--random-layers", type=int, default=2, help="layers of the random student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--by-story", action="store_true", help="cut each story by itself, not all in one stream")
    parser.add_argument("--plain", action="store_true", help="a plain torch loop in place of KDTrainer")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    progress = Console(stderr=True)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device)
    rows, held_out = (
        load_chunks(options.data / f"{name}.jsonl", tokenizer, options.length, options.by_story)
        for name in ("train", "test")
    )
    students = {
        f"its layers {', '.join(map(str, options.layers))}": lambda: some_layers(teacher, options.layers),
        f"random, {options.random_layers} layers": lambda: random_model(teacher, options.random_layers),
    }
    table = []
    for student_name, make_student in students.items():
        for objective_name, objective in {"untrained": None, **OBJECTIVES}.items():
            found = []
            for seed in options.seeds:
                set_seed(seed)
                student = make_student().to(device)
                if objective is not None:
                    (train_plainly if options.plain else train)(
                        student, teacher, rows, tokenizer, objective, seed, options
                    )
                found.append(evaluate_fidelity(student, teacher, held_out, tokenizer, batch_size=32))
                nats = math.log(found[-1]["student_perplexity"])
                progress.print(f"{student_name}, {objective_name}, seed {seed}: {nats:.3f} nats per token")
            table.append(
                {
                    "student": f"{student_name}: {objective_name}",
                    "nats per token": describe([math.log(values["student_perplexity"]) for values in found], "{:.3f}"),
                    "KL to the teacher": describe([values["kl"] for values in found], "{:.3f}"),
                    "agreement": describe([values["agreement"] for values in found], "{:.1%}"),
                }
            )
    budget = f"{options.steps} steps of {options.batch_size} x {options.length} tokens"
    teacher_nats = f"the teacher has {math.log(found[-1]['teacher_perplexity']):.3f} nats per token"
    title = f"{budget}; mean (seeds {options.seeds}) on {len(held_out)} held-out rows, where {teacher_nats}"
    print_table(title, table, options.markdown)


if __name__ == "__main__":
    main()
