"""Runs of `benchmarks.real_model`: rows, students, stores of the teacher's outputs, one training and what it leaves.

Shapes: R rows, n positions of a chunk, V vocabulary.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback, set_seed

from benchmarks.stories import make_trainer
from hf_distill import KDConfig, KDTrainer, drop_layers
from hf_distill.evaluating.answers import best_f1, same_number, squad_scores
from hf_distill.evaluating.generation import generate_answers
from hf_distill.evaluation import (
    documents_of,
    log_prob_chunks,
    measuring,
    text_batches,
    tokenized_rows,
    true_vocabulary,
)
from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.rows import tokenized_row
from hf_distill.store.documents import keys_of_dataset
from hf_distill.teachers.opening import open_store
from hf_distill.teachers.writing import Method
from hf_distill.trainers.caching import store_writer

Score = Callable[[str, Sequence[str]], dict[str, float]]
CURVE_ROWS = 8  # held-out rows that are measured at the thirds of a training, and after it
CURVE_STEPS = 60  # a shorter training has no curve
BINS = 15  # of the calibration error
FILES = {"gsm8k": ("train", "test"), "squad": ("train", "dev"), "stories": ("train", "test")}
FOLDERS = {"stories": "tinystories"}
METHODS = {
    "hidden": Method(),
    "int8": Method(dtype="int8"),
    "sampled": Method("sampled", entries=12),
    "topk": Method("topk", entries=12),
}
# By name, the layers that a student lacks and whether adapters alone are trained.
STUDENTS = {
    "half": (range(1, 30, 2), False),
    "half, LoRA": (range(1, 30, 2), True),
    "near": ((9, 13, 17, 21, 25), False),
    "near, LoRA": ((9, 13, 17, 21, 25), True),
}
# By data set, how many tokens an answer that is scored may have, and its scores; stories have none.
SCORES: dict[str, tuple[int, Score]] = {
    "gsm8k": (128, same_number),
    "squad": (32, squad_scores),
    "dolly": (96, best_f1),
}
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


class Budget(NamedTuple):
    """The size of a training, and of what it is measured on."""

    steps: int = 60
    batch_size: int = 2
    length: int = 160  # tokens of a row at most; longer ones are left out, not cut
    held_out: int = 32  # rows


class Arm(NamedTuple):
    """A way to train: changes to the settings, and the source of the teacher's outputs."""

    changes: Mapping[str, Any]
    source: str = "hidden"  # a name in `METHODS`, `model` for the teacher itself, or `two` for a second one as well
    trainer: tuple[type[KDTrainer], type[KDConfig]] = (KDTrainer, KDConfig)


class Rows(NamedTuple):
    """Sums over the label-bearing tokens of each of R rows, and the calibration error over all of them."""

    tokens: np.ndarray  # (R,)
    nats: np.ndarray  # (R,)
    kl: np.ndarray  # (R,)
    agreement: np.ndarray  # (R,)
    teacher_nats: np.ndarray  # (R,)
    ece: float

    def means(self) -> dict[str, float]:
        total = self.tokens.sum()
        found = {name: float(getattr(self, name).sum() / total) for name in ("nats", "kl", "agreement", "teacher_nats")}
        return {**found, "perplexity": math.exp(found["nats"]), "ece": self.ece, "tokens": int(total)}


# ---------------------------------------------------------------------------------------------------------------- rows


def conversations(data: str, folder: Path, split: int) -> Iterator[dict[str, Any]]:
    """Rows of the training (0) or held-out (1) part of a data set: a text, or prompt, completion and answers."""
    if data == "dolly":
        path, *_ = sorted((folder / data).glob("*.jsonl"))
    else:
        path = folder / FOLDERS.get(data, data) / f"{FILES[data][split]}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    if data == "dolly":
        lines = lines[: -len(lines) // 10] if split == 0 else lines[-len(lines) // 10 :]
    for row in map(json.loads, lines):
        if data == "stories":
            yield {"text": row["text"].strip()}
            continue
        question, *answers = {
            "gsm8k": lambda row: (row["question"], row["answer"]),
            "squad": lambda row: (f"{row['context']}\n\n{row['question']}", *row["answers"]),
            "dolly": lambda row: (row["instruction"], row["response"]),
        }[data](row)
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answers[0]}],
            "answers": answers,
        }


class Chosen(NamedTuple):
    """Rows as token ids, and the right answers of each where the data set has them."""

    tokens: Dataset
    answers: list[list[str]]


def choose_rows(data: str, folder: Path, tokenizer: Any, length: int, split: int, first: int, number: int) -> Chosen:
    """Rows `first` to `first + number` of those with at most `length` tokens, in a fixed random order.

    A story begins with the token that ends a text, and counts up to `length`; other rows are whole.
    """
    texts = [*conversations(data, folder, split)]
    random.Random(0).shuffle(texts)
    found: list[dict[str, list[int]]] = []
    answers: list[list[str]] = []
    for text in texts:
        right = text.pop("answers", [])
        row = tokenized_row(text, tokenizer)
        if "text" in text:
            ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *row["input_ids"]][:length]
            row = {"input_ids": ids, "labels": ids}
        if len(row["input_ids"]) <= length:
            found.append({"input_ids": row["input_ids"], "labels": row["labels"]})
            answers.append(right)
        if len(found) == first + number:
            return Chosen(Dataset.from_list(found[first:]), answers[first:])
    raise ValueError(f"{data} has {len(found)} rows of at most {length} tokens, and {first + number} are needed")


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(model: PreTrainedModel, teacher: Any, rows: Dataset, tokenizer: Any, batch_size: int = 8) -> Rows:
    """A student's numbers on held-out rows, against what a store of hidden states holds of the teacher."""
    documents = (
        document for _, tokens in tokenized_rows(rows, tokenizer, (model,), None) for document in documents_of(tokens)
    )
    numbers, values = [], []
    size, batches = true_vocabulary(tokenizer, (model,), None), text_batches(documents, batch_size, teacher)
    with measuring(student=model):
        for number, labels, (own, other) in log_prob_chunks((model,), batches, size, teacher):
            sides = [-each.gather(-1, labels[:, None])[:, 0] for each in (own, other)]  # (n,) each
            confidence, token = own.max(-1)
            same = (token == other.argmax(-1)).float()
            kl = DIVERGENCES["forward_kl"](own, other)
            right = (token == labels).float()
            numbers.append(number)
            values.append(torch.stack([torch.ones_like(kl), sides[0], kl, same, sides[1], confidence.exp(), right], 1))
    number, value = torch.cat(numbers), torch.cat(values).double()
    sums = torch.zeros(int(number[-1]) + 1, value.shape[1], dtype=torch.float64).index_add_(0, number, value)
    return Rows(*sums[:, :5].T.numpy(), calibration_error(value[:, 5].numpy(), value[:, 6].numpy()))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy, over bins of equal width."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


class Curve(TrainerCallback):
    """Measures some held-out rows at the thirds of a training."""

    def __init__(self, setup: "Setup", points: list[dict[str, float]]) -> None:
        self.setup, self.points = setup, points

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.max_steps >= CURVE_STEPS and state.global_step in (state.max_steps // 3, state.max_steps * 2 // 3):
            self.points.append({"step": state.global_step, **self.setup.some_means(model)})


# ---------------------------------------------------------------------------------------------------------------- runs


class Setup:
    """Teacher, rows and stores of one data set and budget.

    Args:
        teacher (`str`): folder of the teacher.
        data (`str`): name of the data set.
        data_folder (`Path`): with a folder for each.
        output (`Path`): for stores and results.
        budget ([`Budget`]): of every run.
        has_scores (`bool`): whether trained students, and their teacher, generate answers that are scored.
    """

    def __init__(
        self, teacher: str, data: str, data_folder: Path, output: Path, budget: Budget, has_scores: bool = False
    ) -> None:
        self.teacher_name, self.data, self.data_folder, self.has_scores = teacher, data, data_folder, has_scores
        self.output, self.budget = output, budget
        self.tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.held_out, self.answers = self.rows(1, 0, budget.held_out)

    def rows(self, split: int, first: int, number: int) -> Chosen:
        return choose_rows(self.data, self.data_folder, self.tokenizer, self.budget.length, split, first, number)

    def training_rows(self, seed: int) -> Dataset:
        """The rows of a seed: each is trained on once, and no two seeds share one."""
        number = self.budget.steps * self.budget.batch_size
        return self.rows(0, seed * number, number).tokens

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.teacher_name, dtype=torch.float32)

    def student(self, name: str) -> tuple[PreTrainedModel, LoraConfig | None]:
        dropped, has_adapters = STUDENTS[name]
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS) if has_adapters else None
        return drop_layers(self.teacher, [*dropped]), lora

    def settings(self, seed: int, learning_rate: float) -> dict[str, Any]:
        return {
            "max_steps": self.budget.steps, "per_device_train_batch_size": self.budget.batch_size,
            "max_length": self.budget.length, "learning_rate": learning_rate, "warmup_steps": self.budget.steps // 10,
            "seed": seed, "logging_strategy": "steps", "logging_steps": max(self.budget.steps // 12, 1),
            "per_device_eval_batch_size": 8, "output_dir": str(self.output / "trainer"),
        }  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- stores

    def store(self, method: str, rows: Dataset, model: PreTrainedModel | None = None, name: str = "teacher") -> str:
        """The folder of a store that has these rows and the held-out ones, which are added where it lacks them.

        Stores of other methods are made of the teacher's hidden states in float16, without a forward.
        """
        folder = self.output / "stores" / f"{self.data}-{name}-{method}"
        both = concatenate_datasets([rows, self.held_out])
        if (folder / "manifest.json").exists():
            keys, _ = keys_of_dataset(both)
            if (open_store(str(folder), index=0, num_proc=None).store.find(keys) >= 0).all():
                return str(folder)
        source = None if method == "hidden" else self.store("hidden", rows, model, name)
        student, _ = self.student("half")
        trainer = make_trainer(
            KDTrainer, KDConfig, student, model or self.teacher, both, self.tokenizer, self.settings(0, 1e-4)
        )
        writer = store_writer(trainer, METHODS[method])
        if source is not None:
            writer.teacher = open_store(source, index=0, num_proc=None)
        writer.write(folder)
        return str(folder)

    @cached_property
    def stored(self) -> Any:
        """The teacher's outputs on the held-out rows."""
        return open_store(self.store("hidden", self.held_out.select([])), index=0, num_proc=None)

    def some_means(self, model: PreTrainedModel) -> dict[str, float]:
        found = measure(
            model, self.stored, self.held_out.select(range(min(CURVE_ROWS, len(self.held_out)))), self.tokenizer
        ).means()
        return {name: round(found[name], 4) for name in ("nats", "kl")}

    def source(self, arm: Arm, rows: Dataset) -> Any:
        """The `teacher_model` of a trainer."""
        if arm.source == "model":
            return self.teacher
        if arm.source == "two":
            second = AutoModelForCausalLM.from_pretrained(self.output / "second", dtype=torch.float32)
            stores = {"teacher": self.store("hidden", rows), "second": self.store("hidden", rows, second, "second")}
            return {name: f"cache:{folder}" for name, folder in stores.items()}
        return f"cache:{self.store(arm.source, rows)}"

    # -------------------------------------------------------------------------------------------------------- training

    def untrained(self, student: str) -> dict[str, Any]:
        """The result of a student before any training."""
        model, _ = self.student(student)
        found = as_result(measure(model, self.stored, self.held_out, self.tokenizer))
        return {**found, **self.scores(model), **{f"teacher_{k}": v for k, v in self.scores(self.teacher).items()}}

    def scores(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Mean scores, in [0, 1], of the answers that a model generates greedily after the held-out prompts."""
        if not self.has_scores or self.data not in SCORES:
            return {}
        length, score = SCORES[self.data]
        prompts = [prompt for prompt, _ in map(parts, self.held_out)]
        texts = generate_answers(model, self.tokenizer, prompts, batch_size=16, max_new_tokens=length)
        found = [score(text, answers) for text, answers in zip(texts, self.answers, strict=True)]
        return {"scores": {name: round(float(np.mean([each[name] for each in found])), 4) for name in found[0]}}

    def train(self, arm: Arm, student: str, seed: int, learning_rate: float, keep: Path | None = None) -> dict:
        """One training: results on held-out rows, the curve, and seconds. `keep` is a folder for the student."""
        rows = self.training_rows(seed)
        teacher = self.source(arm, rows)
        set_seed(seed)
        model, lora = self.student(student)
        points: list[dict[str, float]] = []
        settings = {**self.settings(seed, learning_rate), **arm.changes}
        curve, kind = Curve(self, points), arm.trainer
        trainer = make_trainer(
            *kind, model, teacher, as_prompts(rows) if "rollout_mix" in arm.changes else rows, self.tokenizer, settings,
            callbacks=[curve], peft_config=lora,
        )  # fmt: skip
        self.stored  # noqa: B018 - it is written before the clock starts
        start = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = {
            "seconds": round(time.perf_counter() - start[0]), "cpu_seconds": round(time.process_time() - start[1])
        }  # fmt: skip
        trained = trainer.model
        found = as_result(measure(trained, self.stored, self.held_out, self.tokenizer))
        if keep is not None:
            (trained.merge_and_unload() if lora else trained).save_pretrained(keep)
            self.tokenizer.save_pretrained(keep)
        found.update(self.scores(trained))
        labels = sum(label != -100 for row in rows["labels"] for label in row)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        loss = [[entry["step"], round(entry["loss"], 3)] for entry in log]
        return {**found, "curve": points, "loss": loss, "labels": labels, **seconds}


def as_prompts(rows: Dataset) -> Dataset:
    """The same rows as `SpeculativeKDTrainer` takes them."""

    def split(row: dict[str, list[int]]) -> dict[str, list[int]]:
        prompt, completion = parts(row)
        return {"student_prompt_ids": prompt, "teacher_prompt_ids": prompt, "completion_ids": completion}

    return rows.map(split, remove_columns=rows.column_names)


def parts(row: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """The tokens of a row before its first label-bearing one, and the others."""
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    return row["input_ids"][:start], row["input_ids"][start:]


def as_result(found: Rows) -> dict[str, Any]:
    """Means, and each row's tokens and sum of nats, from which intervals are computed."""
    return {
        "results": {name: round(value, 5) for name, value in found.means().items()},
        "rows": {
            "tokens": found.tokens.astype(int).tolist(),
            "nats": found.nats.round(2).tolist(),
            "kl": found.kl.round(2).tolist(),
            "teacher_nats": found.teacher_nats.round(2).tolist(),
        },
    }
