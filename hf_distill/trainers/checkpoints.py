"""Checkpoints that survive a kill: writing (temporary folder, mark, rename), finding whole ones, and SIGTERM."""

import copy
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState

from hf_distill.saving import TRIAL, try_saving

logger = logging.getLogger(__name__)

# A folder is written as `_tmp-NAME/NAME`. transformers does not push names with an underscore to the hub.
STAGING = "_tmp-"
# The file with the names of all files of a folder. It is written when they are on the disk.
MARK = "complete.json"

# A checkpoint without the mark (of another tool) needs one file or folder of each kind.
PARTS = {
    "weights": (
        "model.safetensors",
        "pytorch_model.bin",
        "*.index.json",
        "adapter_model.*",
        "*/adapter_model.*",
        "pytorch_model_fsdp*",
    ),
    "optimizer": ("optimizer*", "global_step*"),  # DeepSpeed has one folder for optimizer and scheduler
    "scheduler": ("scheduler.pt", "global_step*"),
    "random number state": ("rng_state*.pth",),
}


# -------------------------------------------------------------------------------------------- finding whole checkpoints


def problem_of(checkpoint: Path) -> str | None:
    """The reason why a checkpoint is not whole, or None.

    The reason is the end of a sentence that starts with the checkpoint's name. The check is cheap and safe: it reads
    names, and the heads and ends of files, and unpickles nothing.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()  # the format of torch; its directory is at the end
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"has an unreadable {path.relative_to(checkpoint)} ({error})"
    if (checkpoint / "checkpoint-is-incomplete.txt").exists():  # written by enable_jit_checkpoint of transformers
        return "is half-written, as its checkpoint-is-incomplete.txt says"
    if (checkpoint / MARK).exists():
        names = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    else:
        for part, patterns in PARTS.items():
            if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
                return f"has no {part}"
        indices = [json.loads(path.read_text(encoding="utf-8")) for path in checkpoint.glob("*.index.json")]
        names = [name for index in indices for name in index["weight_map"].values()]
    missing = [name for name in ("trainer_state.json", *names) if not (checkpoint / name).exists()]
    return f"has no {missing[0]}" if missing else None


def checkpoints(folder: Path) -> list[Path]:
    """All folders `checkpoint-<step>`, whole or not, sorted by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__)


def find_checkpoint(
    resume: str | os.PathLike[str] | bool | None,
    output_dir: str | os.PathLike[str],
    problem: Callable[[Path], str | None] = problem_of,
) -> str | None:
    """The checkpoint to resume from. For True, it is the newest whole one; a warning names each skipped checkpoint.

    Raises:
        `ValueError`: there is none, or the checkpoint that was named is not whole.
    """
    if not resume:
        return None
    if resume is not True:
        if not os.path.isdir(resume):
            raise ValueError(f"there is no checkpoint {os.fspath(resume)!r} to resume from")
        if (reason := problem(Path(resume))) is not None:
            raise ValueError(
                f"{resume} {reason}. A run cannot resume from it: name another checkpoint, or set "
                "resume_from_checkpoint=True for the newest whole one"
            )
        return str(resume)
    reasons = []
    for checkpoint in reversed(checkpoints(Path(output_dir))):
        if (reason := problem(checkpoint)) is None:
            return str(checkpoint)
        logger.warning("%s %s: it is skipped", checkpoint, reason)
        reasons.append(f" ({checkpoint.name} {reason})")
    raise ValueError(
        f"there is no checkpoint to resume from in {os.fspath(output_dir)!r}{''.join(reasons[:1])}: start without "
        "resuming"
    )


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def replacing(final: Path, is_writer: bool = True, wait: Callable[[], Any] = lambda: None) -> Iterator[Path]:
    """A temporary folder to write to. It is renamed to `final` when everything is written, and not before.

    Args:
        final (`Path`): the final path; an older folder there is replaced.
        is_writer (`bool`): True in exactly one process, which renames the folder.
        wait (`Callable`): a barrier over all processes.

    Raises:
        `OSError`: the folder could not be written (for example, the disk is full). An older folder stays.
    """
    staging = final.with_name(STAGING + final.name)
    staged = staging / final.name
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(final, ". Older files stay"):
            yield staged
        wait()
        if is_writer:
            with naming(final, ". Older files stay"):
                _commit(staged, final)
        wait()
    finally:
        if is_writer:
            _settle(staging)


def try_saving_run(
    trainer: Any, save: Callable[[str, dict[str, torch.Tensor]], Any], create_card: Callable[..., Any] | None = None
) -> None:
    """Raises `ValueError` if a part of a run cannot be saved, as [`try_saving`] does.

    Args:
        trainer: the trainer of the run.
        save: saves model and tokenizer, given a folder and a state.
        create_card (*optional*): writes the model card to `trainer.args.output_dir`.
    """
    splits = getattr(trainer, "is_distributed_loading_by_transformers", False)  # transformers 5.17 has no such loading
    if not trainer.args.should_save or splits:
        return

    def state(folder: str) -> None:
        stateful = [
            callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ExportableState)
        ]
        json.dumps([callback.state() for callback in stateful])
        trainer.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def card(create: Callable[..., Any], folder: str) -> None:
        args = trainer.args
        trainer.args = copy.copy(args)
        trainer.args.output_dir = folder
        try:
            create(model_name=Path(str(args.output_dir)).name)
        finally:
            trainer.args = args

    try_saving(
        trainer.model, trainer.processing_class, str(trainer.args.output_dir),
        save=save,
        others={
            "args": lambda folder: torch.save(trainer.args, os.path.join(folder, TRAINING_ARGS_NAME)),
            "the state of the callbacks": state,
            **({"the model card": partial(card, create_card)} if create_card else {}),
        },
    )  # fmt: skip


@contextmanager
def naming(folder: Path, more: str = "") -> Iterator[None]:
    """Turns errors of writing inside the context into an `OSError` with the folder and the free space on its disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError for a full disk
        free = shutil.disk_usage(folder.parent).free / 2**20
        raise OSError(f"{folder} could not be saved: {error} ({free:,.0f} MiB are free on that disk){more}") from error


def _commit(staged: Path, final: Path) -> None:
    files = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)
    mark = staged.with_name(MARK)  # outside the folder until the mark itself is whole
    mark.write_text(json.dumps([str(path.relative_to(staged)) for path in files], indent=0))
    _sync(mark)
    mark.rename(staged / MARK)
    for path in (staged, *(path for path in staged.rglob("*") if path.is_dir())):
        _sync(path)
    if final.exists():
        final.rename(staged.with_name("replaced"))
    staged.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Flushes a file to the disk, or a directory if the system can. Files must be on the disk before a rename."""
    if path.is_dir():
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _settle(staging: Path) -> None:
    """Renames a whole folder to its final path, if a kill prevented that. Removes an incomplete one."""
    final = staging.with_name(staging.name.removeprefix(STAGING))
    if (staging / final.name / MARK).exists() and not final.exists():
        (staging / final.name).rename(final)
    shutil.rmtree(staging, ignore_errors=True)


def settle_leftovers(folder: str | os.PathLike[str]) -> None:
    """Finishes or removes the temporary folders of killed runs in `folder`. Other folders may belong to the user."""
    names = (f"{STAGING}checkpoint-*", f"{STAGING}emergency", f"{TRIAL}*")
    for staging in [path for name in names for path in Path(folder).glob(name)]:
        logger.warning("%s was left by a killed run: it is completed if it is whole, and removed if not", staging)
        _settle(staging)


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Removes the oldest whole checkpoints until `limit` are left. Those in `keep` are never removed.

    Incomplete checkpoints are neither counted nor removed.
    """
    if limit is None or limit <= 0:
        return
    whole = [checkpoint for checkpoint in checkpoints(folder) if problem_of(checkpoint) is None]
    whole.sort(key=lambda checkpoint: checkpoint.stat().st_mtime)  # the steps of an earlier run may be larger
    removable = [checkpoint for checkpoint in whole if checkpoint not in keep]
    for checkpoint in removable[: max(len(whole) - limit, 0)]:
        # Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint.
        trash = checkpoint.with_name(STAGING + checkpoint.name)
        with suppress(OSError):
            checkpoint.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------- stopping


@contextmanager
def noticing_sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM arrives. The signal has no other effect inside the context.

    Only the main thread can receive the signal. If the context ends normally after a signal, the signal is raised again
    for the previous handler.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
    if received:
        signal.raise_signal(signal.SIGTERM)


def leave_sigterm_to_the_trainer(worker_id: int, then: Callable[[int], Any] | None = None) -> None:
    """A `worker_init_fn` that blocks SIGTERM, because the trainer needs the worker's rows to finish an update.

    It works on Linux only. Elsewhere, a worker that gets the signal dies, and the run with it.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def end_with_the_trainer():
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer.pid:  # pyright: ignore
                pass
            os._exit(0)

        trainer = multiprocessing.parent_process()
        threading.Thread(target=end_with_the_trainer, daemon=True).start()
    if then is not None:
        then(worker_id)


def end_workers(*loaders: Any) -> None:
    """Ends the workers that data loaders keep (`dataloader_persistent_workers`).

    The garbage collector would close their queues first, and then wait for each of them for 5 seconds.
    """
    for loader in loaders:
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's are wrapped around the one that works
        if hasattr(kept := getattr(inner, "_iterator", None), "_shutdown_workers"):
            kept._shutdown_workers()  # now, though the traceback of an error may still refer to it
            inner._iterator = None


def drop_loaders(kept: dict[str, Any]) -> None:
    """Empties a dict of data loaders, and ends their workers."""
    end_workers(*kept.values())
    kept.clear()


class CheckpointTiming(TrainerCallback):
    """Delays a checkpoint until all work of its update is done, and saves one when the run is told to stop.

    An evaluation at the end of an epoch draws random numbers, so a checkpoint of the epoch's last update waits for it.
    """

    def __init__(
        self, is_told_to_stop: Callable[[], bool], make_room: Callable[[], Any], own_folders: Collection[Path]
    ) -> None:
        self.is_told_to_stop = is_told_to_stop
        self.make_room = make_room
        self.own_folders = own_folders
        self.waits = False

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed run may have another working directory, or its folder may have been moved.
        for folder in self.own_folders if state.best_model_checkpoint is not None else ():
            if (best := folder / f"checkpoint-{state.best_global_step}").exists():
                state.best_model_checkpoint = str(best)

    def on_step_end(self, args, state, control, **kwargs):
        self.make_room()  # not earlier: a run that fails to start must not change the folder
        control.should_save |= self.is_told_to_stop()
        self.waits = control.should_save and state.epoch == int(state.epoch)
        control.should_save &= not self.waits

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.waits or self.is_told_to_stop()

    def on_save(self, args, state, control, **kwargs):
        if not self.is_told_to_stop():
            return
        if state.is_world_process_zero:
            logger.warning(
                "SIGTERM: the run stops after update %d, which is saved in %s. Resume it with "
                "trainer.train(resume_from_checkpoint=True); on the command line, add --resume_from_checkpoint true",
                state.global_step, Path(str(args.output_dir), f"checkpoint-{state.global_step}"),
            )  # fmt: skip
        raise SystemExit(0)
