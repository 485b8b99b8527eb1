"""Runs that are killed at a random moment and resumed: do they end where a run ends that nobody killed?

Every run is a process of its own, forked before any model exists; SIGKILL comes from outside, at a seeded moment of a
seeded update, while a step is made, text is written, or a checkpoint.

Usage: kill_runs.py FOLDER [--kills 24] [--seed 0] [--no_lora]
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.trainers.checkpoints import checkpoints, problem_of
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.distributed.kd_runs import make_rows

TRAINERS = {
    "KDTrainer": (KDTrainer, KDConfig, {}),
    "KVProjectionTrainer": (
        KVProjectionTrainer, KVProjectionConfig, {"projector": "mlp", "projector_dropout": 0.3}
    ),
    "SpeculativeKDTrainer": (
        SpeculativeKDTrainer, SpeculativeKDConfig,
        {"max_new_tokens": 12, "rollout_mix": {"speculative": 0.5, "dataset": 0.5}, "kd_weight": 0.8},
    ),
}  # fmt: skip


@dataclass
class Kill:
    """What one kill came to. `moment` is what the run was doing, as far as it had said."""

    trainer: str
    lora: bool
    moment: str
    resumed_from: str
    is_identical: bool


class Moments(TrainerCallback):
    """Says into a pipe what the run begins to do: step, text, checkpoint, or something else."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def say(self, moment: str) -> None:
        os.write(self.pipe, moment[0].encode())

    def on_step_begin(self, *_, **__):
        self.say("step")

    def around(self, function, moment: str):
        def saying(*args, **kwargs):
            self.say(moment)
            try:
                return function(*args, **kwargs)
            finally:
                self.say("other")

        return saying


def train(folder: Path, trainer_name: str, lora: bool, resume: bool, pipe: int) -> None:
    """Two and a half epochs with dropout, an evaluation after each, a checkpoint after every update; the weights."""
    trainer_class, config_class, settings = TRAINERS[trainer_name]
    tokenizer, moments = make_tokenizer(), Moments(pipe)
    rows = make_rows(tokenizer)
    if trainer_class is SpeculativeKDTrainer:
        parts = [sentence.split(" ", 3) for sentence in SENTENCES]
        rows = Dataset.from_list([{"prompt": " ".join(part[:3]), "completion": " " + part[3]} for part in parts])
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    args = config_class(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="cosine", max_grad_norm=1.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5,
        logging_steps=1, eval_strategy="epoch", save_strategy="steps", save_steps=1, save_total_limit=2, **settings,
    )  # fmt: skip
    trainer = trainer_class(
        make_model("gpt2", seed=2, **dropout), make_model("gpt2", seed=1, n_embd=48), args, rows, rows, tokenizer,
        teacher_processing_class=tokenizer, callbacks=[moments],
        peft_config=LoraConfig(target_modules=["c_attn"], lora_dropout=0.2) if lora else None,
    )  # fmt: skip
    trainer._save_checkpoint = moments.around(trainer._save_checkpoint, "checkpoint")
    if trainer_class is SpeculativeKDTrainer:
        trainer._write_batches = moments.around(trainer._write_batches, "text")
    trainer.train(resume_from_checkpoint=resume)
    weights = trainer.model.state_dict() | trainer.projectors.state_dict(prefix="projectors.")
    torch.save(weights, folder / "weights.pt")


def start(folder: Path, *options) -> tuple[int, int]:
    """A process that trains, and the pipe that tells what it does."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    status = 1
    try:
        os.close(reader)
        with open(folder / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        train(folder, *options, pipe=writer)
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def follow(process: int, reader: int, kill_at=None) -> tuple[list[tuple[str, float]], int]:
    """What a run says, each with its time in seconds, and its exit status; `kill_at` is (moment, number, delay)."""
    said, counts = [], {}
    while byte := os.read(reader, 1).decode():
        said.append((byte, time.monotonic()))
        counts[byte] = counts.get(byte, 0) + 1
        if kill_at is not None and (byte, counts[byte]) == kill_at[:2]:
            time.sleep(kill_at[2])
            os.kill(process, signal.SIGKILL)
            kill_at = None
    os.close(reader)
    return said, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def uninterrupted(folder: Path, trainer_name: str, lora: bool) -> list[tuple[str, int, float]]:
    """The moments of a run that is left alone: which, the how-manieth of its kind, how long in seconds."""
    said, status = follow(*start(folder, trainer_name, lora, False))
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    found, counts = [], {}
    for (moment, begin), (_, end) in itertools.pairwise(said):
        counts[moment] = counts.get(moment, 0) + 1
        found.append((moment, counts[moment], end - begin))
    return [entry for entry in found if entry[0] != "o"]


def kill_and_resume(folder: Path, expected: Path, trainer_name: str, lora: bool, moment) -> Kill | None:
    """One kill; None if the run was through before it came."""
    said, status = follow(*start(folder, trainer_name, lora, False), kill_at=moment)
    if status != -signal.SIGKILL:
        return None
    whole = [path.name for path in checkpoints(folder) if problem_of(path) is None]
    says = {"s": "step", "t": "rollout", "c": "checkpoint write", "o": "between"}[said[-1][0]]
    _, status = follow(*start(folder, trainer_name, lora, bool(whole)))
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    found, wanted = torch.load(folder / "weights.pt"), torch.load(expected / "weights.pt")
    identical = found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())
    return Kill(trainer_name, lora, says, whole[-1] if whole else "the start", identical)


def run(folder: Path, num_kills: int, seed: int, with_lora: bool = True) -> list[Kill]:
    """Kills, spread evenly over trainers, with and without LoRA, and moments."""
    chance, kills, timelines = random.Random(seed), [], {}
    runs = [(name, lora) for lora in ((False, True) if with_lora else (False,)) for name in TRAINERS]
    while len(kills) < num_kills:
        name, lora = runs[len(kills) % len(runs)]
        whole = folder / f"{name}-{lora}"
        if whole not in timelines:
            timelines[whole] = uninterrupted(whole, name, lora)
        kinds = sorted({entry[0] for entry in timelines[whole]})
        kind = kinds[(len(kills) // len(runs) + len(kills)) % len(kinds)]
        moment, number, seconds = chance.choice([entry for entry in timelines[whole] if entry[0] == kind])
        at = (moment, number, chance.random() * seconds)
        kill = kill_and_resume(folder / f"{name}-{lora}-{len(kills)}-{chance.random()}", whole, name, lora, at)
        if kill is not None:
            kills.append(kill)
            print(json.dumps(asdict(kill)), flush=True)
    return kills


def table(kills: list[Kill]) -> str:
    """One line per trainer, with and without LoRA."""
    moments = ("step", "rollout", "checkpoint write", "between")
    lines = [f"| trainer | LoRA | kills | {' | '.join(moments)} | resumed | bit-identical |", "|---" * 9 + "|"]
    for name, lora in dict.fromkeys((kill.trainer, kill.lora) for kill in kills):
        own = [kill for kill in kills if (kill.trainer, kill.lora) == (name, lora)]
        counts = [sum(kill.moment == moment for kill in own) for moment in moments]
        resumed = sum(kill.resumed_from != "the start" for kill in own)
        cells = [name, "yes" if lora else "no", len(own), *counts, resumed, sum(kill.is_identical for kill in own)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_lora", action="store_true")
    options = parser.parse_args()
    found = run(options.folder, options.kills, options.seed, with_lora=not options.no_lora)
    print(table(found))
    sys.exit(not all(kill.is_identical for kill in found))
