"""Does a real teacher help a student that has another tokenizer? Equal budgets, bits per byte of held-out text.

    OMP_NUM_THREADS=1 python -m benchmarks.real_tokenizers --teacher SmolLM2-135M-Instruct --tokenizer gpt2-base \
        --data_folder data --output out/real

The student has 25 of the teacher's 30 layers and the other tokenizer's vocabulary. The embedding of each of its tokens
is the mean of those of the teacher's tokens that write the same text. All weights are trained, on GSM8K's questions and
answers as plain text. Finished runs in `--output` are skipped, as in `benchmarks.real_model`.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.measure import print_table
from benchmarks.real_model import finish
from benchmarks.real_runs import Budget, Setup, conversations
from benchmarks.real_tables import read_runs
from benchmarks.stories import describe, make_trainer
from benchmarks.teachers import bits_per_byte
from hf_distill import KDConfig, KDTrainer

ARMS: dict[str, dict[str, Any]] = {
    "hard labels": {"kd_weight": 0.0},
    "half aligned spans": {"kd_weight": 0.5, "cross_tokenizer": "aligned"},
    "aligned spans": {"kd_weight": 0.9, "cross_tokenizer": "aligned"},
}
STUDENT = "near, other tokens"


@torch.no_grad()
def with_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model with the tokens of `other`: each embedding is the mean of those of the same text's tokens."""
    old = model.get_input_embeddings().weight.clone()  # (V, D)
    texts = [other.decode([token]) for token in range(len(other))]
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    model.resize_token_embeddings(len(other))
    new = model.get_input_embeddings().weight
    for token, ids in enumerate(pieces):
        new[token] = old[ids].mean(0) if ids else old.mean(0)
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = other.eos_token_id
    return model


def load_texts(folder: Path, split: int, number: int, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Questions and their answers with at most `length` tokens, as one text each."""
    rows = conversations("gsm8k", folder, split)
    texts = (f"{row['prompt'][0]['content']}\n{row['completion'][0]['content']}" for row in rows)
    found = []
    for text in texts:
        if len(tokenizer(text)["input_ids"]) <= length:
            found.append(text)
        if len(found) == number:
            break
    return found


def train(setup: Setup, tokenizer: PreTrainedTokenizerBase, changes: dict, seed: int, rate: float) -> dict[str, Any]:
    """One training, and the bits per byte before (no changes) or after it."""
    budget, folder = setup.budget, setup.data_folder
    set_seed(seed)
    student = with_vocabulary(setup.student("near")[0], setup.tokenizer, tokenizer)
    held_out = load_texts(folder, 1, budget.held_out, tokenizer, budget.length)
    start = time.process_time()
    if changes:
        number = budget.steps * budget.batch_size
        texts = load_texts(folder, 0, (seed + 1) * number, tokenizer, budget.length)[seed * number :]
        trainer = make_trainer(
            KDTrainer, KDConfig, student, setup.teacher, Dataset.from_dict({"text": texts}), tokenizer,
            {**setup.settings(seed, rate), **changes}, teacher_processing_class=setup.tokenizer,
        )  # fmt: skip
        trainer.train()
    bits = bits_per_byte(student.eval(), held_out, tokenizer, budget.length)
    # The names that `finish` prints.
    nothing = dict.fromkeys(("nats", "kl", "agreement", "ece"), None)
    return {"results": {**nothing, "bits_per_byte": round(bits, 5)}, "cpu_seconds": round(time.process_time() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of the student's tokenizer")
    parser.add_argument("--data_folder", type=Path, required=True, help="folder with gsm8k")
    parser.add_argument("--output", type=Path, default=Path("out/real_model"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    budget = Budget(options.steps)
    setup = Setup(options.teacher, "gsm8k", options.data_folder, options.output, budget)
    about = {"data": "gsm8k, text", "student": STUDENT, **budget._asdict()}
    before = {**about, "arm": "untrained", "steps": 0, "learning_rate": 0.0, "seed": 0, "settings": {}}
    finish(options.output, before, partial(train, setup, tokenizer, {}, 0, 0.0))
    for seed in options.seeds:
        for name in options.arms:
            run = {**about, "arm": name, "learning_rate": options.learning_rate, "seed": seed, "settings": ARMS[name]}
            finish(options.output, run, partial(train, setup, tokenizer, ARMS[name], seed, options.learning_rate))
    runs = [run for run in read_runs(options.output, None) if run["student"] == STUDENT]
    table = []
    for name in ("untrained", *ARMS):
        values = [run["results"]["bits_per_byte"] for run in runs if run["arm"] == name]
        if values:
            table.append({"student learns from": name, "bits per byte": describe(values, "{:.3f}")})
    print_table(f"{options.steps} updates of {budget.batch_size} texts", table, options.markdown)


if __name__ == "__main__":
    main()
