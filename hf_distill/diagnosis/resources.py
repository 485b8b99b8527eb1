"""Checks of what a run takes: memory of a device, as planned, and room for checkpoints."""

import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import convert_bytes
from transformers.trainer_utils import SaveStrategy

from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.pictures import TAKEN, TAKEN_BY_TEACHERS
from hf_distill.diagnosis.probe import Probe
from hf_distill.diagnosis.updates import trained
from hf_distill.planning import Machine, plan_run
from hf_distill.saving import refuse_folder

STATES = 8  # bytes of a trained parameter that AdamW's states take
NEARLY = 0.9  # the part of the free room of a disk from which on it is a risk


def memory(probe: Probe) -> Finding:
    """The planned peak of a device, for the longest row and the share of labels that the probe has."""
    model, teachers = probe.arguments["model"], probe.arguments.get("teacher_model")
    given = list(teachers) if isinstance(teachers, list | tuple) else [teachers] if teachers is not None else []
    if not isinstance(model, str) or any(not isinstance(teacher, str) for teacher in given):
        raise LeftOut("a plan needs models by name")
    args, limit, kind = probe.args, probe.memory, probe.kind
    row_tokens, share, pictures = args.max_length, 1.0, {}
    if probe.problem is None and not probe.writes:
        longest = max(len(ids) for ids, _ in probe.texts)
        row_tokens = args.max_length if args.packing and args.max_length else min(longest, args.max_length or longest)
        taken = probe.uncut[TAKEN] if probe.has_pictures else [0]
        num_texts = sum(len(ids) for ids, _ in probe.texts) - sum(taken)  # tokens of text
        share = sum((labels != -100).sum() for _, labels in probe.texts) / num_texts
        if max(taken):
            pictures = {
                "picture_tokens": max(taken), "teacher_picture_tokens": max(probe.uncut[TAKEN_BY_TEACHERS]) or None,
            }  # fmt: skip
    plan = plan_run(
        model, given or None, args, peft_config=probe.arguments.get("peft_config"),
        quantization_config=probe.arguments.get("quantization_config"), row_tokens=row_tokens,
        machine=Machine(limit, reserve=2**30 if kind == "cuda" else 0, kind="cuda" if kind == "cuda" else "cpu"),
        label_share=min(1.0, max(float(share), 1e-6)), **pictures,
    )  # fmt: skip
    line = f"the plan needs {convert_bytes(plan.peak)} of {convert_bytes(limit)}"
    line += f", with rows of {row_tokens} tokens" if row_tokens else ""
    line += f", {pictures['picture_tokens']} of them of pictures" if pictures else ""
    numbers = {"peak": plan.peak, "memory": limit, "row_tokens": row_tokens, **pictures}
    if plan.fits is False:
        best = next((remedy for remedy in plan.remedies if remedy.fits), None)
        remedy = f"{best.name}: {best.options}" if best else "; ".join(plan.together) or "a smaller student or teacher"
        return failure(f"{line}: it does not fit", remedy, **numbers)
    return ok(line, **numbers)


def device_memory(device: torch.device) -> int:
    """The bytes of a GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disk(probe: Probe) -> Finding:
    """The checkpoints of the run, and the room where they go."""
    args, trainer = probe.args, probe.trainer
    folder = Path(str(args.output_dir)).absolute()
    try:
        refuse_folder(folder)
    except ValueError as error:
        return failure(str(error), "choose another output_dir")
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    numbers_trained = sum(p.numel() for p in trained(probe))
    model_bytes = 4 * numbers_trained if numbers_trained < weights / 8 else weights  # adapters are saved alone
    number = _checkpoints(probe)
    if number is None:
        raise LeftOut("the number of updates of a stream is not known")
    one = model_bytes + (0 if args.save_only_model else STATES * numbers_trained)
    needed = number * one + model_bytes
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    line = (
        f"{number} checkpoints of {convert_bytes(one)} and the student take {convert_bytes(needed)} of "
        f"{convert_bytes(free)} free in {existing}"
    )
    numbers = {"checkpoints": number, "bytes": needed, "free": free}
    remedy = "keep fewer (save_total_limit), save less often (save_steps), or save_only_model"
    if needed > free:
        return failure(f"{line}: the disk will be full", remedy, **numbers)
    return warning(line, remedy, **numbers) if needed > NEARLY * free else ok(line, **numbers)


def _checkpoints(probe: Probe) -> int | None:
    """The checkpoints that are there at once; None where the number of updates is not known."""
    args, updates = probe.args, probe.updates
    if args.save_strategy == SaveStrategy.NO:
        return 0
    if updates is None:
        return None
    if args.save_strategy == SaveStrategy.EPOCH:
        number = max(1, round(args.num_train_epochs))
    else:
        steps = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * updates))
        number = max(1, updates // int(steps))
    # A new one is written before an old one is removed.
    return number if args.save_total_limit is None else min(number, args.save_total_limit + 1)
