"""The commands that need a teacher or its tokenizer: `cache write` and `cache verify`."""

import errno
import json
import shlex
import shutil
import sys
from argparse import Namespace
from dataclasses import MISSING, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from trl import ModelConfig

from hf_distill.cli.arguments import CacheArguments, KDArguments
from hf_distill.cli.stores import card, facts, show
from hf_distill.cli.training import trainer_arguments
from hf_distill.named import student_tokenizer
from hf_distill.report import size_text, table
from hf_distill.runs import as_list
from hf_distill.servers import TeacherAway
from hf_distill.store.formats import format_of
from hf_distill.store.head import read_head, read_rounding
from hf_distill.store.hub import CACHE, create_repository, find_store, push
from hf_distill.store.manifest import DamagedManifest, Manifest, read_manifest
from hf_distill.store.reader import Store, damages
from hf_distill.store.shards import REMEDY, shard_names
from hf_distill.teachers.stored import ROW_SETTINGS, TOKENIZER, has_tokenizer
from hf_distill.teachers.writing import Method, StoreWriter
from hf_distill.trainers.caching import store_writer
from hf_distill.trainers.config import KDConfig, keywords
from hf_distill.trainers.kd import KDTrainer

NO_FOLDER = "trainer_output"  # what transformers makes of no output_dir
# Options of `cache write` that belong to some methods only.
OF_METHODS = {"store_dtype": ("hidden",), "entries": ("sampled", "topk"), "sampler": ("sampled",)}


# ------------------------------------------------------------------------------------------------------------- write


def write(arguments: CacheArguments, args: KDConfig, model_config: ModelConfig) -> None:
    """Writes what a teacher says about the rows of a run, or says what that would take.

    Raises:
        `ValueError`: what `kd` and [`StoreWriter`] refuse, or options that do not go together.
    """
    method = _method(arguments, args)
    folder = Path(str(args.output_dir)).expanduser()
    pushes, args.push_to_hub = args.push_to_hub and args.process_index == 0, False  # the trainer would send a student
    repository = None
    with TemporaryDirectory() as unused:  # a trainer tries out saving; the store's folder is for the store
        args.output_dir = unused
        try:
            trainer = KDTrainer(**trainer_arguments(arguments, args, model_config))
            writer = store_writer(trainer, method, arguments.write_batch_size)
            if arguments.dry_run:
                return _show_estimates(trainer, writer, folder)
            if pushes:  # before hours of writing
                repository = create_repository(
                    args.hub_model_id or folder.name, token=args.hub_token, private=args.hub_private_repo
                )
            writer.write(folder)
        except TeacherAway as error:
            raise ValueError(f"{error}; what has been written stays, and the same command goes on") from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(str(error)) from error  # which says that shards stay, and what to do
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on with the store in {folder}", file=sys.stderr)
            sys.exit(130)
    if trainer.is_world_process_zero():
        show({folder.name: facts(folder)})
        if repository is not None:
            push(folder, repository, card(repository, folder), token=args.hub_token)
            print(f"the store is on the hub: {CACHE}{repository}")
        print(f"\nTo train a student from it:\n\n  {next_command(arguments, args, folder)}")


def _method(arguments: CacheArguments, args: KDConfig) -> Method:
    """The method of the store, before anything is loaded; `ValueError` for one that `kd` could not train from."""
    if args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint is for training: the same `cache write` goes on by itself")
    if args.output_dir == NO_FOLDER and not arguments.dry_run:
        raise ValueError("--output_dir is missing: the folder of the store")
    if arguments.write_batch_size is not None and arguments.write_batch_size < 1:
        raise ValueError(f"--write_batch_size has to be at least 1, got {arguments.write_batch_size}")
    defaults = {entry.name: entry.default for entry in fields(CacheArguments)}
    for name, methods in OF_METHODS.items():
        given = getattr(arguments, name) != defaults[name]
        if given and arguments.store not in methods and not arguments.dry_run:
            raise ValueError(f"--{name} is for --store {' and '.join(methods)}, not for {arguments.store}")
    entries = int(arguments.entries) if arguments.entries.is_integer() else arguments.entries
    method = Method(arguments.store, arguments.store_dtype, entries, arguments.sampler, arguments.store_seed)
    if not arguments.dry_run:
        temperatures = keywords(args.schedule).get("temperature", [args.temperature])
        asked = Manifest(
            method.store, {"entries": entries}, {}, {}, seed=method.seed,
            vocab_size=len(student_tokenizer(arguments.model, args)),
            temperature=args.temperature if method.store == "sampled" else 1.0,
        )  # fmt: skip
        asked.refuse_loss(args.divergence, set(temperatures), Path(str(args.output_dir)))
    return method


def _show_estimates(trainer: KDTrainer, writer: StoreWriter, folder: Path) -> None:
    estimates = writer.estimates()
    if not trainer.is_world_process_zero():
        return
    rows = [
        {
            "store": found["store"],
            "bytes a position": f"{found['position_bytes']:,.1f}",
            "in all": size_text(found["bytes"]),
            "head": size_text(found["head_bytes"]) if found["head_bytes"] else "",
            "about": str(timedelta(seconds=max(1, round(found["seconds"])))),
        }
        for found in estimates
    ]
    documents = writer.documents
    counts = f"{len(documents):,} different texts with {documents.num_tokens.sum():,} tokens"
    Console().print(f"{counts}, {documents.num_labels.sum():,} of them label-bearing", table(rows), sep="\n")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    print(f"nothing has been written; {size_text(shutil.disk_usage(place).free)} are free in {place}")


def next_command(arguments: KDArguments, args: KDConfig, folder: Path) -> str:
    """The command that trains from a store here, with the options that its rows depend on."""
    tokens = "eos_token", "chat_template_path"
    device = ("use_cpu", "bf16") if args.use_cpu else ()
    rows = (*ROW_SETTINGS, *tokens, "packing", "temperature", "divergence", "divergence_params", *device)
    given = _given(KDArguments, arguments, [entry.name for entry in fields(KDArguments)])
    given = {**given, "teacher_model": f"{CACHE}{folder}", **_given(KDConfig, args, rows), "output_dir": "out"}
    words = ((f"--{name}", *as_list(value)) for name, value in given.items())
    return shlex.join(["hf-distill", "kd", *(word for option in words for word in option)])


def _given(options: Any, values: Any, names: Any) -> dict[str, str | list[str]]:
    """The values of options that differ from their defaults."""
    defaults = {entry.name: entry.default for entry in fields(options)}
    return {
        name: _separate_words(getattr(values, name))
        for name in names
        if defaults[name] is MISSING or getattr(values, name) != defaults[name]
    }


def _separate_words(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [str(each) for each in value]
    return json.dumps(value) if isinstance(value, dict) else str(value)


# ------------------------------------------------------------------------------------------------------------ verify


def verify(words: Namespace) -> None:
    """Checks every byte of stores; the exit code is 1 if anything is damaged."""
    is_whole = True
    for name in words.stores:
        folder, fetch = find_store(name)
        if fetch is not None:
            fetch(shard_names(folder))
        problems = problems_of(folder)
        is_whole = is_whole and not problems
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{name}: {len(shard_names(folder))} shards and all else are whole")
    if not is_whole:
        sys.exit(1)


def problems_of(folder: Path) -> list[str]:
    """The damages of a store, each a line with a file and what to do.

    Raises:
        `ValueError`: no store, or one of a newer format.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedManifest as error:
        return [str(error)]  # it says how all else is to be read
    streams = format_of(manifest).streams
    damaged = damages(folder, streams)
    problems = list(damaged.values())
    if manifest.head is not None:
        checks = partial(read_head, folder, manifest.head), partial(read_rounding, folder, "", manifest.chosen)
        for check in checks:
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
    if not has_tokenizer(folder, manifest):
        problems.append(f"{folder / TOKENIZER} is not the tokenizer of the teacher, or damaged: {REMEDY}")
    there = sum(len(Store(folder, streams, [name])) for name in shard_names(folder) if name not in damaged)
    written = manifest.counts.get("documents", 0)
    if not damaged and there < written:
        problems.append(f"{folder} had {written:,} texts when it was written, and has {there:,}: {REMEDY}")
    return problems
