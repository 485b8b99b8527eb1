"""Checks of what the trainer does with a batch: splits, packing, the path of the loss, adapters."""

from itertools import islice

import torch
from peft import LoraConfig, PeftModel

from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.probe import Probe
from hf_distill.diagnosis.updates import (
    difference,
    first_gradient,
    gradient,
    micro_batches,
    micro_rows,
    single_rows,
    training,
)
from hf_distill.lora import describe_lora
from hf_distill.losses.head import default_chunk_size
from hf_distill.named import student_without_weights
from hf_distill.trainers.pictures import kept_to_language

# The largest relative difference of gradients that rounding makes: 1e-5 in float32, some 1e-2 in half precision.
ROUNDING = {"no": 1e-3, "bf16": 0.1, "fp16": 0.1}


def split_batches(probe: Probe) -> Finding:
    """The gradient of one batch of n rows against n batches of one row each."""
    trainer = probe.trainer
    if (size := micro_rows(probe)) == 1:
        raise LeftOut("micro-batches have one row")
    if trainer.aux_loss_enabled:
        raise LeftOut("the load-balancing loss of experts is not a mean over tokens")
    with training(probe):
        together = first_gradient(probe)
        ones = single_rows(together.batches[0]) if probe.writes else micro_batches(probe, 1)
        alone = list(islice(ones, size))
        if len(alone) == 1:
            raise LeftOut("the probe has one row")
        apart = difference(together.values, gradient(probe, alone))
    line = f"the gradient of 1 x {len(alone)} rows differs from that of {len(alone)} x 1 by {apart:.1e}"
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    in_half = bool(dtypes & {torch.bfloat16, torch.float16})
    allowed = ROUNDING["bf16" if in_half else trainer.accelerator.mixed_precision]
    if not apart <= allowed:
        return failure(
            f"{line}: rows of a batch see each other, or padding counts",
            "look at the student's own code, or train with per_device_train_batch_size=1", difference=apart,
        )  # fmt: skip
    return ok(line, difference=apart)


def packing(probe: Probe) -> Finding:
    """Whether texts that share a row see each other; the trainer has probed it, and refuses models that leak."""
    if not probe.trainer.tried_packings:
        raise LeftOut("no row holds several texts")
    texts = [len(row["seq_lengths"]) for row in probe.trainer.train_dataset if "seq_lengths" in row]
    shared = f"{sum(texts)} texts in {len(texts)} rows" if texts else "rows joined by the collator"
    return ok(f"{shared}: no model lets them see each other", texts=sum(texts), rows=len(texts))


def loss_path(probe: Probe) -> Finding:
    """The path that the loss takes, and its share of a micro-batch's time."""
    trainer, device = probe.trainer, probe.trainer.args.device
    with training(probe):
        (batch,), _, whole, parts = first_gradient(probe)
    tokens = batch["input_ids"].numel()  # with padding
    chunk = probe.args.loss_chunk_size or default_chunk_size(device, trainer.vocab_size)
    compiled = trainer.objective(1).compiled and device.type == "cuda"
    line = (
        f"{'compiled' if compiled else 'not compiled'}, chunks of {chunk:,} positions; a micro-batch of "
        f"{tokens:,} tokens takes {whole:.2g} s" + (f", teacher and loss {sum(parts):.2g} s of it" if parts else "")
    )
    numbers = {
        "compiled": compiled,
        "chunk": chunk,
        "tokens": tokens,
        "micro-batch": whole,
        "teacher and loss": sum(parts),
    }
    if device.type == "cuda" and not compiled:
        remedy = "remove kd_weight, temperature and parameters of the divergence from schedule"
        return warning(f"{line}; a schedule keeps it from being compiled", remedy, **numbers)
    return ok(line, **numbers)


def adapters(probe: Probe) -> Finding:
    """What a LoRA configuration trains, and likely mistakes in it."""
    config, model, args = probe.arguments.get("peft_config"), probe.arguments["model"], probe.args
    if config is None:
        raise LeftOut("the student is not trained in new adapters")
    if not isinstance(config, LoraConfig):
        raise LeftOut(f"{type(config).__name__} is no LoRA")
    student = student_without_weights(model, args) if isinstance(model, str) else model
    if student is None or isinstance(student, PeftModel):
        raise LeftOut("the student has adapters already, or is not all in its configuration")
    if args.freeze_vision_tower:
        config = kept_to_language(config, student)
    report = describe_lora(student, config)
    share = report.trainable_parameters / report.total_parameters
    line = f"{report.trainable_parameters:,} parameters in {len(report.modules)} modules are trained, {share:.2%}"
    numbers = {"trainable": report.trainable_parameters, "modules": len(report.modules), "warnings": report.warnings}
    if report.warnings:
        return warning(report.warnings[0], "mend the LoRA options; describe_lora lists what they train", **numbers)
    return ok(line, **numbers)
