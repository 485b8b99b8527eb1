"""Checks of a run before any training, on a few rows: with these models on this data, what goes wrong or is wasted.

A check is a function from a [`Probe`] to a [`Finding`], and one line of `CHECKS`. It raises [`LeftOut`] where it can
say nothing. What several checks need (rows as tokens, the trainer, both sides' predictions) is computed once.
"""

import time
from collections.abc import Callable, Sized
from dataclasses import replace
from typing import Any

import torch

from hf_distill.diagnosis import labels, models, resources, rows, templates, training
from hf_distill.diagnosis.findings import LEFT_OUT, Diagnosis, Finding, LeftOut, failure, ok
from hf_distill.diagnosis.learning_rate import learning_rate
from hf_distill.diagnosis.probe import PROBLEMS, Probe, open_probe
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.kd import KDTrainer

__all__ = ["CHECKS", "Diagnosis", "Finding", "LeftOut", "Probe", "diagnose"]


def construction(probe: Probe) -> Finding:
    """The trainer itself, which refuses settings, models and rows that it cannot train with."""
    if probe.problem is not None:
        return failure(probe.problem, "see the message; the checks below that need a trainer are left out")
    described = probe.trainer.describe_run()
    return ok("; ".join(f"{name}: {text}" for name, text in described.items() if not name.startswith("teacher")))


CHECKS: dict[str, Callable[[Probe], Finding]] = {
    "construction": construction,
    # The text that both sides read.
    "vocabularies": templates.vocabularies,
    "alignment": templates.alignment,
    "chat templates": templates.templates,
    "lost messages": templates.lost_text,
    "generation markers": templates.generation_markers,
    # Tokens and labels.
    "BOS": labels.doubled_bos,
    "EOS": labels.missing_end,
    "padding": labels.labelled_padding,
    "labels": labels.other_labels,
    "label share": labels.label_share,
    "cut rows": labels.cut_labels,
    # Rows.
    "longest rows": rows.longest_rows,
    "copies": rows.copies,
    "held-out rows": rows.leaked_rows,
    # Both models, before any training.
    "teacher's source": models.sources,
    "teacher's perplexity": models.teacher_perplexity,
    "start": models.start,
    "teacher's EOS": models.teacher_end,
    "cost of bits": models.cost_of_bits,
    # The training.
    "split batches": training.split_batches,
    "packing": training.packing,
    "loss": training.loss_path,
    "LoRA": training.adapters,
    "learning rate": learning_rate,
    # The machine.
    "memory": resources.memory,
    "disk": resources.disk,
}


def diagnose(
    trainer_class: type[HardLabelTrainer] = KDTrainer,
    *,
    num_rows: int = 64,
    memory: int | None = None,
    **arguments: Any,
) -> Diagnosis:
    """Runs all checks on a few rows of a run; nothing is trained, written or changed.

    Args:
        trainer_class: of the run.
        num_rows (`int`): training rows of the probe; copies and held-out rows are looked for in all rows.
        memory (`int`, *optional*): bytes of the GPU, or of the host with `use_cpu`; by default those of this machine's.
        arguments: what the trainer would be called with: `model`, `teacher_model`, `args`, `train_dataset` and so on.
            A student that is given as an object is copied.

    Returns:
        [`Diagnosis`], with a finding for each check.

    Raises:
        `ValueError`: settings of another trainer, less than one row, or several processes.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows has to be at least 1, got {num_rows}")
    if trainer_class.settings(arguments.get("args")).world_size > 1:
        raise ValueError("a run is examined in one process: start doctor without accelerate or torchrun")
    begin = time.perf_counter()
    with open_probe(trainer_class, arguments, num_rows) as probe:
        probe.memory = memory or resources.device_memory(probe.args.device)
        if memory and not probe.args.use_cpu:
            probe.kind = "cuda"
        findings = tuple(_timed(name, check, probe) for name, check in CHECKS.items())
        tried = probe.samples.get("train")
    num_rows = min(num_rows, len(tried)) if isinstance(tried, Sized) else num_rows
    return Diagnosis(findings, num_rows, time.perf_counter() - begin)


def _timed(name: str, check: Callable[[Probe], Finding], probe: Probe) -> Finding:
    begin = time.perf_counter()
    return replace(_found(check, probe), check=name, seconds=time.perf_counter() - begin)


def _found(check: Callable[[Probe], Finding], probe: Probe) -> Finding:
    """The finding of a check; what stops the check is a reason to leave it out, never an ok."""
    try:
        return check(probe)
    except LeftOut as reason:
        return Finding(LEFT_OUT, str(reason))
    except torch.OutOfMemoryError as error:
        remedy = "see what `hf-distill plan` offers: a smaller chunk, checkpointing, smaller micro-batches"
        return failure(f"the memory of the device is not enough: {str(error).splitlines()[0]}", remedy)
    except PROBLEMS as error:
        return Finding(LEFT_OUT, f"it stopped: {type(error).__name__}: {' '.join(str(error).split())}"[:300])
