"""The baseline of a distillation: the same student, rows and updates, on hard labels alone."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from hf_distill.cli.brief_logs import shorten_logs
from hf_distill.cli.reporting import optional, record, write_tokens
from hf_distill.picture_rows import has_pictures
from hf_distill.runs import BASELINE
from hf_distill.saved_weights import load_weights
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig

# Columns of prepared rows that a training on hard labels reads.
READ = ("input_ids", "labels", "seq_lengths")


def check_baseline(trainer: Any) -> None:
    """Raises `ValueError` for a run that can have no baseline beside it."""
    if trainer.engine not in ("none", "DDP"):
        raise ValueError(
            f"--baseline needs the whole student in each process, not {trainer.engine}: remove one of them"
        )
    if trainer.eval_dataset is None:
        raise ValueError("--baseline needs held-out rows (--eval_dataset) to measure both students on")
    if not len(hard_label_rows(trainer.train_dataset)):
        raise ValueError("--baseline needs rows with completions to train on: give --completion_column")


def run_baseline(
    trainer: Any,
    measure: Callable[[], Mapping[str, float]],
    before: Mapping[str, float],
    *,
    model: str,
    quantization_config: Any,
    settings: Mapping[str, Any],
) -> Mapping[str, float]:
    """Trains the baseline in the folder `baseline` of a run that has been trained and saved; returns its measures.

    The folder becomes that of a run of its own. All processes come here.

    Args:
        trainer (`KDTrainer`): of the run; while the baseline is measured, its student has the baseline's weights.
        measure (`Callable`): measures the trainer's student.
        before: the measures before the training.
        model (`str`): the student, as it was before the training.
        quantization_config: of the student.
        settings: those of the run.
    """
    folder = os.path.join(str(trainer.args.output_dir), BASELINE)
    # The run's optimizer would stay in memory beside the baseline's.
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = None
    models = [*trainer.accelerator._models]
    trainer.accelerator.free_memory()
    trainer.accelerator._models.extend(models)  # the student, which is measured after the baseline
    baseline = _make_baseline(trainer, folder, model, quantization_config)
    has_checkpoint = any(Path(folder).glob("checkpoint-*"))
    shorten_logs(baseline)
    resume = trainer.args.resume_from_checkpoint
    baseline.train(resume_from_checkpoint=True if resume and has_checkpoint else None)
    baseline.save_model()
    baseline.save_state()
    own = {**settings, "output_dir": folder, "kd_weight": 0.0}
    del baseline  # its optimizer, too
    with trainer.projectors.detached(trainer.student):
        load_weights(trainer.model, folder)
        found = measure()
        if trainer.is_world_process_zero():
            results = {"before": before, "after": found}
            Path(folder, "report.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
            with optional("the page of its tokens", str(trainer.args.output_dir)):
                write_tokens(trainer, folder)
            record(trainer, own, "sft", [], folder)
        trainer.accelerator.wait_for_everyone()
        load_weights(trainer.model, str(trainer.args.output_dir))
    return found


def hard_label_rows(rows: Dataset) -> Dataset:
    """Prepared rows of any trainer as token ids and labels; of generated texts the completions that were given."""
    if has_pictures(rows):
        return rows
    if "input_ids" in rows.column_names:
        return rows.select_columns([name for name in READ if name in rows.column_names])

    def with_labels(row: dict[str, list[int]]) -> dict[str, list[int]]:
        prompt, completion = row["student_prompt_ids"], row["completion_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    rows = rows.filter(lambda row: len(row["completion_ids"]) > 0)
    return rows.map(with_labels, remove_columns=rows.column_names)


def _make_baseline(trainer: Any, folder: str, model: str, quantization_config: Any) -> HardLabelTrainer:
    args = trainer.args
    settings = {each.name: getattr(args, each.name) for each in fields(HardLabelConfig) if each.init}
    settings |= {
        "output_dir": folder, "report_to": "none",
        "dataset_kwargs": None if trainer.has_pictures else {"skip_prepare_dataset": True},
        "push_to_hub": False, "eval_on_start": False, "resume_from_checkpoint": None,
        # The metric of the run's best checkpoint may be one that hard labels do not have.
        "load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None,
    }  # fmt: skip
    are_rows = trainer.has_pictures or "input_ids" in trainer.eval_dataset.column_names
    held_out = hard_label_rows(trainer.eval_dataset) if are_rows else None
    if held_out is None:
        settings["eval_strategy"] = "no"
    if settings["save_strategy"] == "best":
        settings["save_strategy"] = "no"
    peft_config = None
    if isinstance(trainer.model, PeftModel) and not os.path.exists(os.path.join(model, "adapter_config.json")):
        peft_config = copy.deepcopy(trainer.model.peft_config["default"])
        peft_config.inference_mode = False
    set_seed(args.seed)
    return HardLabelTrainer(
        model,
        HardLabelConfig(**settings),
        hard_label_rows(trainer.train_dataset),
        held_out,
        trainer.processing_class,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
