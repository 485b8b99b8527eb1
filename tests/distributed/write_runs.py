"""Stores whose writing is killed at random moments and goes on until it is done: do they end in the same bytes?

A process is killed from outside after a random time, or kills itself at a random one of its operations on files: before
a file is opened, renamed or removed, and so between any two parts of a store. Where there are two processes, the other
one goes on for a moment before it is ended, too. A store is killed up to three times, and compared, file by file, with
the store of a writing that nobody killed.

Usage: write_runs.py FOLDER [--kills 24] [--processes 1 2] [--seed 0]
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
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hf_distill.store.documents import Documents
from hf_distill.store.manifest import NAME as MANIFEST
from hf_distill.store.plan import PLAN
from hf_distill.store.shards import PART
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.stored import fingerprint
from hf_distill.teachers.writing import LOCK, Method, StoreWriter
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.distributed import engines
from tests.distributed.kill_runs import run_forked

METHODS = {
    "hidden": Method("hidden", "int8"),
    "sampled": Method("sampled", entries=6),
    "topk": Method("topk", entries=5),
}
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
KILLS_PER_STORE = 3
STUCK = 120  # seconds without a sign of life


class Done(NamedTuple):
    """What a process that came to its end did: operations on the files of the store, seconds of the writing."""

    events: int
    seconds: float


class Kill(NamedTuple):
    """Which process is killed, and when: before which of its operations on files, or after how many seconds."""

    rank: int
    event: int | None
    seconds: float


class Material(NamedTuple):
    """What a store is written of, made before processes are forked."""

    tokenizer: PreTrainedTokenizerBase
    teacher: LocalTeacher
    documents: Documents


def make_material() -> Material:
    tokenizer = make_tokenizer()
    rows = [tokenizer(text[: 20 + 3 * i]) for i, text in enumerate(SENTENCES * 2)]
    return Material(tokenizer, LocalTeacher(make_model(seed=1), torch.device("cpu")), Documents.of_rows(rows))


def write(
    material: Material, folder: Path, method: str, num_ranks: int, rank: int, pipe: int, event: int | None
) -> None:
    """Writes a store of a few shards; this process dies before its `event`-th operation on a file of the store."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == num_ranks
    assert accelerator.process_index == rank
    vocabulary = fingerprint(sorted(material.tokenizer.get_vocab().items()))
    writer = StoreWriter(
        material.teacher, material.documents, METHODS[method], accelerator,
        about={"teacher": {"name": "teacher"}, "tokenizer": {"own": vocabulary}, "rows": {}},
        tokenizer=material.tokenizer, vocab_size=384, temperature=1.0, batch_size=2,
    )  # fmt: skip
    count, inside = 0, f"{folder}{os.sep}"

    def watch(name: str, args: tuple) -> None:
        nonlocal count
        if name in EVENTS and str(args[0]).startswith(inside):
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os.write(pipe, b"begin\n")
    start = time.monotonic()
    writer.write(folder, shard_bytes=600)
    os.write(pipe, f"{count} {time.monotonic() - start}\n".encode())


def run(material: Material, folder: Path, method: str, num_ranks: int, kill: Kill | None = None) -> list[Done] | None:
    """Writes the store in `folder`, or goes on with it; None if it was killed."""
    started = []
    for rank, environment in enumerate(engines.environments("none" if num_ranks == 1 else "ddp")):
        reader, pipe = os.pipe()
        event = kill.event if kill is not None and kill.rank == rank else None
        if (process := os.fork()) == 0:
            os.environ.update(environment)
            log = folder.with_name(f"{folder.name}-log{rank}.txt")
            run_forked(log, write, material, folder, method, num_ranks, rank, pipe, event)
        os.close(pipe)
        started.append((process, reader))
    said = follow(started, kill)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in started]
    if not any(statuses):
        return [Done(int(events), float(seconds)) for events, seconds in (text.split()[1:] for text in said)]
    logs = [folder.with_name(f"{folder.name}-log{rank}.txt").read_text()[-3000:] for rank in range(num_ranks)]
    assert kill is not None, "\n".join(logs)
    assert statuses[kill.rank] == -signal.SIGKILL, "\n".join(logs)
    return None


def follow(started: list[tuple[int, int]], kill: Kill | None) -> list[str]:
    """What the processes say until they end. One of them gets its signal; when it is gone, the others end, too."""
    said = ["" for _ in started]
    running, due = {reader: rank for rank, (_, reader) in enumerate(started)}, None
    while running:
        left = STUCK if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select(list(running), [], [], left)
        if not ready:
            victims = running.values() if kill is None or kill.rank not in running.values() else [kill.rank]
            for rank in victims:
                os.kill(started[rank][0], signal.SIGKILL)
            due = None
        for reader in ready:
            rank, text = running[reader], os.read(reader, 1000).decode()
            said[rank] += text
            if not text:
                os.close(reader)
                del running[reader]
            if kill is not None and rank == kill.rank and kill.event is None and text == "begin\n":
                due = time.monotonic() + kill.seconds
            if kill is not None and rank == kill.rank and not text:
                due = time.monotonic() + 0.3
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: Path) -> str:
    """What a kill has left behind."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    shards = {name.partition("-")[2] for name in names if name.startswith("data-") and not name.endswith(PART)}
    if any(name.endswith(PART) for name in names):
        return "half a file"
    if any(f"index-{shard}" not in names for shard in shards):
        return "data without an index"
    if MANIFEST not in names:
        return "parts before the manifest" if names - {LOCK} else "nothing but the lock"
    if PLAN not in names:
        return "no plan"
    return "some shards" if shards else "a plan alone"


def different(folder: Path, expected: Path) -> list[str]:
    """The names of files that are not the same in two folders."""
    found, wanted = contents(folder), contents(expected)
    return sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))


def main(folder: Path, num_kills: int, processes: list[int], seed: int) -> list[dict]:
    """Stores, in turn of every method with every number of processes, until there are kills enough."""
    material = make_material()
    chance, found, whole = random.Random(seed), [], {}
    cells = itertools.cycle([(method, num) for num in processes for method in METHODS])
    while sum(store["kills"] for store in found) < num_kills:
        method, num_ranks = cell = next(cells)
        if cell not in whole:
            whole[cell] = run(material, folder / f"{method}-{num_ranks}", *cell)
        own, kills = folder / f"{method}-{num_ranks}-{len(found)}", []
        for _ in range(KILLS_PER_STORE):
            rank = chance.randrange(num_ranks)
            events, seconds = whole[cell][rank]
            event = chance.randint(1, max(events, 1)) if chance.random() < 0.6 else None
            kill = Kill(rank, event, chance.random() * seconds)
            if run(material, own, *cell, kill) is not None:
                break
            kills.append(state_of(own))
        else:
            run(material, own, *cell)
        differs = different(own, folder / f"{method}-{num_ranks}")
        found.append({"method": method, "processes": num_ranks, "kills": len(kills), "differs": differs, "left": kills})
        print(json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--processes", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stores = main(options.folder, options.kills, options.processes, options.seed)
    left = Counter(state for store in stores for state in store["left"])
    differ = sum(bool(store["differs"]) for store in stores)
    print(f"{left.total()} kills of {len(stores)} stores, which left {dict(left)}: {differ} differ")
    sys.exit(differ)
