"""Runs that are killed at a random moment and resumed: do they end where a run ends that nobody killed?

Every process of a run, one or two of them, is forked before any model exists; the signal comes from outside to one of
them, at a seeded moment of a seeded update, while a step is made, text is written, or a checkpoint. What is left of
the run is then ended as torchrun does it.

Usage: kill_runs.py FOLDER [--kills 24] [--engine none ddp fsdp2 zero2 zero3] [--signal KILL|TERM] [--seed 0]
[--no_lora]
"""

import argparse
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

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
from hf_distill.modeling import whole_state
from hf_distill.trainers.checkpoints import checkpoints, problem_of
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.distributed import engines
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


# Seconds in which what is left of a run may end by itself, after that by SIGTERM; without any sign of life it is stuck.
GRACE, STUCK = 5, 300
MOMENTS = {"s": "step", "t": "rollout", "c": "checkpoint write", "o": "between"}


class Cell(NamedTuple):
    """What is killed."""

    engine: str
    trainer: str
    lora: bool


class Moment(NamedTuple):
    """Something that a process does: which kind, the how-manieth of it, how long in seconds."""

    rank: int
    kind: str
    number: int
    seconds: float


@dataclass
class Kill:
    """What one kill came to. `moment` is what the process was doing, as far as it had said."""

    engine: str
    trainer: str
    lora: bool
    rank: int
    moment: str
    statuses: list[int]
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


def train(folder: Path, cell: Cell, resume: bool, rank: int, num_ranks: int, pipe: int) -> None:
    """Two and a half epochs with dropout, an evaluation after each, a checkpoint after every update; the weights."""
    engines.use(cell.engine)
    trainer_class, config_class, settings = TRAINERS[cell.trainer]
    settings = settings | engines.settings(cell.engine)
    tokenizer, moments = make_tokenizer(), Moments(pipe)
    rows = make_rows(tokenizer)
    if trainer_class is SpeculativeKDTrainer:
        parts = [sentence.split(" ", 3) for sentence in SENTENCES]
        rows = Dataset.from_list([{"prompt": " ".join(part[:3]), "completion": " " + part[3]} for part in parts])
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    # From the first arguments on, ZeRO-3 splits every model that is made.
    student, teacher = make_model("gpt2", seed=2, **dropout), make_model("gpt2", seed=1, n_embd=48)
    args = config_class(
        output_dir=str(folder), bf16=False, gradient_checkpointing=False, report_to=[],
        disable_tqdm=True, optim="adamw_torch", learning_rate=1e-2, lr_scheduler_type="cosine", max_grad_norm=1.0,
        per_device_train_batch_size=2 // num_ranks, gradient_accumulation_steps=2, max_steps=5,
        logging_steps=1, eval_strategy="epoch", save_strategy="steps", save_steps=1, save_total_limit=2, **settings,
    )  # fmt: skip
    trainer = trainer_class(
        student, teacher, args, rows, rows, tokenizer,
        teacher_processing_class=tokenizer, callbacks=[moments],
        peft_config=LoraConfig(target_modules=["c_attn"], lora_dropout=0.2) if cell.lora else None,
    )  # fmt: skip
    trainer._save_checkpoint = moments.around(trainer._save_checkpoint, "checkpoint")
    if trainer_class is SpeculativeKDTrainer:
        trainer._write_batches = moments.around(trainer._write_batches, "text")
    trainer.train(resume_from_checkpoint=resume)
    assert engines.engine_of(trainer) == engines.FOUND[cell.engine]
    assert trainer.accelerator.num_processes == num_ranks
    torch.save(whole_state(torch.nn.ModuleList([trainer.model, trainer.projectors])), folder / f"weights{rank}.pt")
    trainer.accelerator.wait_for_everyone()


def start(folder: Path, cell: Cell, resume: bool = False) -> list[tuple[int, int]]:
    """Each process of a run, and the pipe that tells what it does."""
    folder.mkdir(parents=True, exist_ok=True)
    environments, started = engines.environments(cell.engine), []
    for rank, environment in enumerate(environments):
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.environ.update(environment)
            run_forked(folder / f"log{rank}.txt", train, folder, cell, resume, rank, len(environments), writer)
        os.close(writer)
        started.append((process, reader))
    return started


def run_forked(log: Path, function, *args) -> NoReturn:
    """Ends this process with what a script would end with; what it prints is in a file."""
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function(*args)
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def follow(started: list[tuple[int, int]], at: Moment | None = None, number: int = signal.SIGKILL):
    """What each process says, each with its time in seconds, and its exit status; `at` one of them gets a signal.

    As a launcher does, it ends those that stay for long when another is gone.
    """
    said: list[list[tuple[str, float]]] = [[] for _ in started]
    running = {reader: rank for rank, (_, reader) in enumerate(started)}
    last_words = itertools.chain([signal.SIGTERM], itertools.repeat(signal.SIGKILL))
    while running:
        ready, _, _ = select.select(list(running), [], [], STUCK if len(running) == len(started) else GRACE)
        if not ready:
            word = next(last_words)
            for rank in running.values():
                os.kill(started[rank][0], word)
        for reader in ready:
            kind, rank = os.read(reader, 1).decode(), running[reader]
            if not kind:
                del running[reader]
                continue
            said[rank].append((kind, time.monotonic()))
            count = sum(kind == other for other, _ in said[rank])
            if at is not None and (rank, kind, count) == at[:3]:
                time.sleep(at.seconds)
                os.kill(started[rank][0], number)
                at = None
    for _, reader in started:
        os.close(reader)
    return said, [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in started]


def complete(folder: Path, cell: Cell, resume: bool = False) -> tuple[list, list[dict[str, torch.Tensor]]]:
    """What the processes of a run say that is left alone, and the weights that each ends with."""
    said, statuses = follow(start(folder, cell, resume))
    logs = [(folder / f"log{rank}.txt").read_text()[-3000:] for rank in range(len(said))]
    assert not any(statuses), "\n".join(logs)
    return said, [torch.load(folder / f"weights{rank}.pt") for rank in range(len(said))]


def moments_of(said: list[list[tuple[str, float]]]) -> list[Moment]:
    """What the processes of a run were doing, for how long."""
    found = []
    for rank, own in enumerate(said):
        counts = Counter()
        for (kind, begin), (_, end) in itertools.pairwise(own):
            counts[kind] += 1
            found.append(Moment(rank, kind, counts[kind], end - begin))
    return [moment for moment in found if moment.kind != "o"]


def kill_and_resume(folder: Path, cell: Cell, at: Moment, number: int, expected: list) -> Kill | None:
    """One kill; None if the run was through before it came."""
    said, statuses = follow(start(folder, cell), at, number)
    if all((folder / f"weights{rank}.pt").exists() for rank in range(len(said))):
        return None
    whole = [path.name for path in checkpoints(folder) if problem_of(path) is None]
    _, found = complete(folder, cell, resume=bool(whole))
    identical = all(
        own.keys() == wanted.keys() and all(torch.equal(own[name], value) for name, value in wanted.items())
        for own, wanted in zip(found, expected, strict=True)
    )
    doing = said[at.rank][-1][0] if number == signal.SIGKILL else at.kind  # what is killed says nothing more
    return Kill(*cell, at.rank, MOMENTS[doing], statuses, whole[-1] if whole else "the start", identical)


def run(folder: Path, cells: list[Cell], num_kills: int, seed: int, number: int) -> list[Kill]:
    """Kills, spread evenly over cells and kinds of moments; the first of a cell comes after a checkpoint."""
    chance, kills, whole = random.Random(seed), [], {}
    while len(kills) < num_kills:
        cell, turn = cells[len(kills) % len(cells)], len(kills) // len(cells)
        own = folder / "-".join(map(str, cell))
        if cell not in whole:
            said, weights = complete(own, cell)
            whole[cell] = moments_of(said), weights
        moments, weights = whole[cell]
        kinds = sorted({moment.kind for moment in moments})
        kind = kinds[(turn + len(kills)) % len(kinds)]
        moment = chance.choice([at for at in moments if at.kind == kind and (turn or at.number > 1)])
        at = moment._replace(seconds=chance.random() * moment.seconds)
        kill = kill_and_resume(Path(f"{own}-{len(kills)}-{chance.random()}"), cell, at, number, weights)
        if kill is not None:
            kills.append(kill)
            print(json.dumps(asdict(kill)), flush=True)
    return kills


def table(kills: list[Kill]) -> str:
    """One line per cell."""
    heads = ("engine", "trainer", "LoRA", "kills", *MOMENTS.values(), "resumed", "bit-identical")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell in dict.fromkeys(Cell(kill.engine, kill.trainer, kill.lora) for kill in kills):
        own = [kill for kill in kills if (kill.engine, kill.trainer, kill.lora) == cell]
        counts = [sum(kill.moment == moment for kill in own) for moment in MOMENTS.values()]
        resumed = sum(kill.resumed_from != "the start" for kill in own)
        name = cell.engine, cell.trainer, "yes" if cell.lora else "no"
        line = [*name, len(own), *counts, resumed, sum(kill.is_identical for kill in own)]
        lines.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--engine", nargs="+", choices=engines.FOUND, default=["none"])
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_lora", action="store_true")
    options = parser.parse_args()
    cells = itertools.product(options.engine, TRAINERS, (False,) if options.no_lora else (False, True))
    cells = sorted(map(Cell._make, cells), key=lambda cell: (options.engine.index(cell.engine), cell.lora))
    found = run(options.folder, cells, options.kills, options.seed, signal.Signals[f"SIG{options.signal}"])
    print(table(found))
    sys.exit(not all(kill.is_identical for kill in found))
