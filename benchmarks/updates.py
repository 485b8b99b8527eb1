"""Digests of trained weights, to see that a change changes no number.

    python -m benchmarks.updates before.json
    ... the change ...
    python -m benchmarks.updates after.json --against before.json

Each run makes two updates of a tiny model. Three things are compared bit for bit: the trained weights, the log, and the
number of matrix products. Compare on one machine with one set of versions: others round differently.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, make_model, make_tokenizer

SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "save_strategy": "no",
    "gradient_checkpointing": False, "temperature": 2.0, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")
UNSTEADY = ("runtime", "per_second", "rollout/tokens_per_second", "rollout/seconds", "flos")  # of the log


class CountProducts(TorchDispatchMode):
    """Counts matrix products by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **kwargs or {})


def texts() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(text.split()[: 4 + i]) for i, text in enumerate(SENTENCES)]})


def pairs() -> Dataset:
    words = [sentence.split(" ", 4) for sentence in SENTENCES]
    return Dataset.from_dict({"prompt": [" ".join(w[:4]) for w in words], "completion": [" " + w[4] for w in words]})


def kd(folder: str, teacher: Any = None, rows: Dataset | None = None, tokenizers: Any = None, **changes) -> KDTrainer:
    tokenizer = make_tokenizer()
    others = {"peft_config": changes.pop("peft_config", None)}
    teacher = make_model(seed=1, hidden_size=48, num_hidden_layers=3) if teacher is None else teacher
    rows = texts() if rows is None else rows
    return KDTrainer(
        make_model(changes.pop("family", "llama"), seed=2), teacher, KDConfig(output_dir=folder, **SETTINGS | changes),
        rows, rows, tokenizer, teacher_processing_class=tokenizers or tokenizer, **others,
    )  # fmt: skip


def two_teachers() -> dict[str, Any]:
    return {"first": make_model(seed=1, hidden_size=48), "second": make_model("gpt2", seed=3)}


def routed() -> Dataset:
    return texts().add_column("teacher", ["first", "second"] * (len(SENTENCES) // 2))


def other_tokenizer():
    return make_tokenizer(vocab_size=320, corpus=SENTENCES[::2])


def kv(folder: str, **changes) -> KVProjectionTrainer:
    tokenizer = make_tokenizer()
    return KVProjectionTrainer(
        make_model(seed=2), make_model(seed=1, hidden_size=48, num_hidden_layers=3),
        KVProjectionConfig(output_dir=folder, **SETTINGS | changes), texts(), texts(), tokenizer,
        teacher_processing_class=tokenizer,
    )  # fmt: skip


def skd(folder: str, **changes) -> SpeculativeKDTrainer:
    tokenizer = make_tokenizer()
    settings = SETTINGS | {"max_new_tokens": 8, "top_k": 60, "draft_length": 3, **changes}
    return SpeculativeKDTrainer(
        make_model(seed=2), make_model(seed=1, hidden_size=48), SpeculativeKDConfig(output_dir=folder, **settings),
        pairs(), pairs(), tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
RUNS: dict[str, Callable[[str], KDTrainer]] = {
    "plain": kd,
    "completions": lambda f: kd(f, rows=pairs(), divergence="reverse_kl", kd_weight=1.0),
    "tied heads, jensen_shannon": lambda f: kd(f, family="qwen2", divergence="jensen_shannon"),
    "soft-caps, alpha_beta": lambda f: kd(f, family="gemma2", divergence="alpha_beta"),
    "taid with a schedule": lambda f: kd(f, divergence="taid", schedule={"t": [0.2, 1.0], "temperature": [2.0, 1.0]}),
    "packed": lambda f: kd(f, packing=True, max_length=32),
    "padding-free": lambda f: kd(f, padding_free=True, max_length=None),
    "mixture": lambda f: kd(f, two_teachers(), teacher_weights=[3.0, 1.0]),
    "sum": lambda f: kd(f, two_teachers(), teacher_combination="sum"),
    "route": lambda f: kd(f, two_teachers(), routed(), teacher_combination="route"),
    "aligned": lambda f: kd(f, make_model("gpt2", seed=3, vocab_size=320), tokenizers=other_tokenizer()),
    "uld": lambda f: kd(
        f, make_model("gpt2", seed=3, vocab_size=320), tokenizers=other_tokenizer(), cross_tokenizer="uld"
    ),
    "hidden layers": lambda f: kd(f, hidden_weight=0.5, hidden_layers="last"),
    "adapters": lambda f: kd(f, peft_config=LORA),
    "its own base": lambda f: kd(f, "base", peft_config=LORA),
    "checkpointing": lambda f: kd(f, gradient_checkpointing=True, family="qwen2"),
    "keys and values, pca": kv,
    "keys and values, mlp": lambda f: kv(f, projector="mlp", projector_dropout=0.0, kv_loss="mse"),
    "speculative": skd,
    "all sources": lambda f: skd(f, rollout_mix={"speculative": 0.5, "student": 0.2, "teacher": 0.2, "dataset": 0.1}),
}


def record(make: Callable[[str], KDTrainer]) -> dict[str, Any]:
    """The digest of the trained weights, the log without times, and the number of matrix products of a run."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        with CountProducts() as products:
            trainer.train()
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    for name, parameter in sorted(trainer.projectors.named_parameters()):
        digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    log = [
        {name: value for name, value in entry.items() if not any(part in name for part in UNSTEADY)}
        for entry in trainer.state.log_history
    ]
    return {"weights": digest.hexdigest(), "log": log, "products": products.counts}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """One line for each difference between two records."""
    lines = []
    for name, run in expected.items():
        other = found.get(name)
        if other is None:
            lines.append(f"{name}: not run")
            continue
        lines += [f"{name}: other {part}" for part in run if other[part] != run[part] and part != "log"]
        for step, (mine, theirs) in enumerate(zip(other["log"], run["log"], strict=False)):
            changed = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            lines += [f"{name}: log entry {step}, {key}: {theirs.get(key)} -> {mine.get(key)}" for key in changed]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the records go, as JSON")
    parser.add_argument("--against", type=Path, help="records to compare with")
    options = parser.parse_args()
    found = {}
    for name, make in RUNS.items():
        found[name] = json.loads(json.dumps(record(make)))
        print(f"{name}: {found[name]['weights'][:12]}", file=sys.stderr, flush=True)
        options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.against is not None:
        lines = differences(found, json.loads(options.against.read_text(encoding="utf-8")))
        print("\n".join(lines) or "the same weights, logs and products in all runs")
        sys.exit(bool(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
