"""Common code of the benchmarks on stories: options, rows, students, quiet trainers, results as text."""

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from hf_distill import KDConfig, KDTrainer, evaluate_fidelity

FIDELITY = {
    "KL to the teacher": ("kl", "{:.3f}"),
    "perplexity": ("student_perplexity", "{:.2f}"),
    "agreement": ("agreement", "{:.1%}"),
}


# ------------------------------------------------------------------------------------------------------------- options


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or hub id of a causal language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


def add_budget(parser: argparse.ArgumentParser, *, steps: int, learning_rate: float) -> None:
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)


def add_students(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for one student")
    parser.add_argument("--random-layers", type=int, default=2, help="layers of the random student")


# ---------------------------------------------------------------------------------------------------------------- data


def load_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each story, after the bos token."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [
        [tokenizer.bos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]


def load_chunks(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, by_story: bool = False) -> Dataset:
    """The stories as one stream of tokens, or story by story, cut into rows of `length`. The remainder is dropped."""
    texts = load_texts(path, tokenizer)
    streams = texts if by_story else [[token for text in texts for token in text]]
    rows = [stream[i : i + length] for stream in streams for i in range(0, len(stream) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def load_rows(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, by_story: bool = False
) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows."""
    train, test = (
        load_chunks(options.data / f"{name}.jsonl", tokenizer, options.length, by_story) for name in ("train", "test")
    )
    return train, test


# -------------------------------------------------------------------------------------------------------------- models


def load_teacher(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return teacher.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(name)


def some_layers(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy of the teacher with only these layers."""
    student = copy.deepcopy(teacher).requires_grad_()  # the trainer has frozen the teacher
    student.model.layers = nn.ModuleList(student.model.layers[i] for i in layers)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(layers)
    return student


def random_model(teacher: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A random model with the teacher's width."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = num_layers
    return AutoModelForCausalLM.from_config(config).to(teacher.device)


def make_students(teacher: PreTrainedModel, options: argparse.Namespace) -> dict[str, Callable[[], PreTrainedModel]]:
    """Functions that create the two students of most benchmarks, by name."""
    return {
        f"its layers {', '.join(map(str, options.layers))}": lambda: some_layers(teacher, options.layers),
        f"random, {options.random_layers} layers": lambda: random_model(teacher, options.random_layers),
    }


# ------------------------------------------------------------------------------------------------- training, measuring


def make_trainer(
    trainer_class: type[KDTrainer],
    config_class: type,
    student: PreTrainedModel,
    teacher: PreTrainedModel | Mapping[str, PreTrainedModel] | str,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    **kwargs: Any,
) -> Any:
    """A trainer that prints and saves nothing. `settings` are added to the common ones."""
    common = {
        "output_dir": "out/benchmarks", "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "bf16": False,
        "gradient_checkpointing": False, "use_cpu": not torch.cuda.is_available(), "logging_strategy": "no",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    kwargs = {"processing_class": tokenizer, "teacher_processing_class": tokenizer, **kwargs}
    trainer = trainer_class(student, teacher, config_class(**{**common, **settings}), rows, **kwargs)
    trainer.remove_callback(PrinterCallback)  # it prints to the output of the table
    return trainer


def budget(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The settings from the options of `add_budget`."""
    return {
        "max_steps": options.steps, "per_device_train_batch_size": options.batch_size, "max_length": options.length,
        "learning_rate": options.learning_rate, "seed": seed,
    }  # fmt: skip


def train_kd(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Mapping[str, PreTrainedModel],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    changes: Mapping[str, Any],
    seed: int,
    options: argparse.Namespace,
    **kwargs: Any,
) -> KDTrainer:
    """KDTrainer after training with the budget of the options and `changes` to its settings."""
    settings = {**budget(options, seed), **changes}
    trainer = make_trainer(KDTrainer, KDConfig, student, teacher, rows, tokenizer, settings, **kwargs)
    trainer.train()
    return trainer


def trained_fidelities(
    options: argparse.Namespace,
    source: Any,
    teacher: PreTrainedModel,
    rows: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    changes: Mapping[str, Any],
) -> list[dict[str, float]]:
    """The fidelity of students of some of the teacher's layers, one for each seed, that learn from a `source` of it."""
    found = []
    for seed in options.seeds:
        settings, student = {**budget(options, seed), **changes}, some_layers(teacher, options.layers)
        trainer = make_trainer(KDTrainer, KDConfig, student, source, rows, tokenizer, settings)
        trainer.train()
        found.append(measure_fidelity(trainer.model, teacher, held_out, tokenizer))
    return found


def measure_fidelity(
    student: PreTrainedModel, teacher: PreTrainedModel, held_out: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """The results of `evaluate_fidelity`, and `nats`, the student's nats per token."""
    found = evaluate_fidelity(student, teacher, held_out, tokenizer, batch_size=32)
    return {**found, "nats": math.log(found["student_perplexity"])}


def describe(values: list[float], form: str) -> str:
    """The mean and all values as text."""
    return f"{form.format(statistics.mean(values))} ({', '.join(map(form.format, values))})"


def describe_all(found: list[dict[str, float]], columns: Mapping[str, tuple[str, str]] = FIDELITY) -> dict[str, str]:
    """Cells of a table: for each column (key and format), the mean and the values of all seeds."""
    return {title: describe([values[key] for values in found], form) for title, (key, form) in columns.items()}
