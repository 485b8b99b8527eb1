"""Comparison of a checkpoint with the run that resumes from it.

The comparison reads the checkpoint's own files, so it also works for checkpoints of earlier versions. `run.json` adds
the facts that no other file has.
"""

import json
import logging
import pickletools
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from hf_distill.modeling import causal_lm
from hf_distill.saved_weights import misfit
from hf_distill.trainers.checkpoints import PARTS

logger = logging.getLogger(__name__)

RUN = "run.json"
# Settings that change the updates of a resumed run, in addition to the fields of hf_distill's own configurations.
SETTINGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay",
    "lr_scheduler_type", "max_grad_norm", "num_train_epochs", "max_steps", "max_length", "packing",
)  # fmt: skip
# Implementations of the same step. PyTorch accepts a change of these silently.
_IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}


def other_run(checkpoint: Path, trainer: Any) -> str | None:
    """The reason why a trainer cannot resume from a whole checkpoint, or None.

    The reason is the end of a sentence that starts with the checkpoint's name.
    """
    run, mine = _saved_run(checkpoint), describe_run(trainer)
    problem = no_state(checkpoint) or other_trainer(checkpoint, type(trainer.args))
    if problem or (problem := _other_engine(checkpoint, run, mine)):
        return problem
    plain = mine["engine"] == "none"
    with trainer.projectors.detached(trainer.student):
        problem = misfit(trainer.model, checkpoint, dtypes=plain)
    if problem:
        return problem
    for name in ("quantization", "optimizer"):
        if name in run and run[name] != mine[name]:
            return f"is of a run with {name} {run[name]}, and this one has {mine[name]}: resume with that of its run"
    return _other_optimizer(checkpoint, trainer) if plain else None


def no_state(checkpoint: Path) -> str | None:
    """The reason, as in [`other_run`], if a whole checkpoint has no training state; else None."""
    for part, patterns in PARTS.items():
        if part != "weights" and not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return (
                f"has no {part}, as save_only_model leaves it: the optimizer would start from scratch. For a new run "
                "from its weights, take its folder as the model"
            )
    return None


def other_trainer(checkpoint: Path, args: type[TrainingArguments]) -> str | None:
    """The reason, as in [`other_run`], if a checkpoint is of another trainer than these arguments; else None.

    The checkpoint's arguments are pickled. Their class is read without unpickling them.
    """
    found = _pickled_class(checkpoint / "training_args.bin")
    mine = _own_config(args)
    module, _, name = found.rpartition(".")
    if module.partition(".")[0] in ("hf_distill", "trl", "transformers") and name != mine.__name__:
        theirs, ours = (config.removesuffix("Config") + "Trainer" for config in (name, mine.__name__))
        return (
            f"is of a run of {theirs}, and this one is of {ours}: resume with {theirs}, or start a new run with its "
            "folder as the model"
        )
    return None


def _own_config(args: type[TrainingArguments]) -> type[TrainingArguments]:
    """The first hf_distill class among the bases of a configuration."""
    return next(cls for cls in args.__mro__ if cls.__module__.partition(".")[0] == "hf_distill")


def describe_run(trainer: Any) -> dict[str, Any]:
    """The content of `run.json`."""
    args = trainer.args
    own = {field.name for field in fields(_own_config(type(args)))} - {field.name for field in fields(SFTConfig)}
    # Arguments for loading may contain a password.
    values = {name: getattr(args, name) for name in (*SETTINGS, *sorted(own)) if not name.endswith("_kwargs")}
    settings = {
        **values,
        "processes": trainer.accelerator.num_processes,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "dtype": str(trainer.student.dtype),
        **trainer.run_settings(),
        "training_rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
    }
    return {
        # DDP and no engine differ only in the number of processes.
        "engine": "none" if trainer.engine == "DDP" else trainer.engine,
        "optimizer": _optimizer_name(trainer),
        "quantization": _quantization(trainer.student),
        "settings": json.loads(json.dumps(settings, default=str)),
    }


def save_run(checkpoint: Path, trainer: Any) -> None:
    """Writes `run.json`."""
    (checkpoint / RUN).write_text(json.dumps(describe_run(trainer), indent=2), encoding="utf-8")


def tell_differing_settings(checkpoint: Path, trainer: Any) -> None:
    """Warns, in one line, about settings that differ from those of the checkpoint's run."""
    theirs, mine = _saved_run(checkpoint).get("settings", {}), describe_run(trainer)["settings"]
    if other := [
        f"{name} {mine[name]} ({theirs[name]})" for name in mine if mine[name] != theirs.get(name, mine[name])
    ]:
        logger.warning(
            "this run differs from the checkpoint's, in brackets: %s. It uses its own values, but learning rate and "
            "weight decay stay those of the checkpoint's optimizer", ", ".join(other),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------- facts read from the files


def _saved_run(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / RUN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _pickled_class(path: Path) -> str:
    """The class, with its module, of the object in a file of torch; "" if the file does not exist."""
    if not path.exists():
        return ""
    with zipfile.ZipFile(path) as file:
        pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    names = (arg for code, arg, _ in pickletools.genops(pickled) if code.name == "GLOBAL")
    return next((str(name).replace(" ", ".") for name in names), "")


def _other_engine(checkpoint: Path, run: dict[str, Any], mine: dict[str, Any]) -> str | None:
    found = "FSDP2" if any(checkpoint.glob("pytorch_model_fsdp*")) else "none"
    found = "DeepSpeed" if any(checkpoint.glob("global_step*")) else found
    found = run.get("engine", found)
    if mine["engine"] == found or mine["engine"].startswith(found):
        return None
    theirs, ours = ("no sharding engine" if name == "none" else name for name in (found, mine["engine"]))
    return f"is of a run under {theirs}, and this one is under {ours}: resume under the engine that it began with"


def _other_optimizer(checkpoint: Path, trainer: Any) -> str | None:
    """The reason, as in [`other_run`], if settings or groups of the saved optimizer differ; else None."""
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    groups = _optimizer(trainer).param_groups
    theirs, mine = (
        {name: value for name, value in side[0].items() if name != "initial_lr"} for side in (saved, groups)
    )
    # New versions add settings to an optimizer. If both sides lack a setting of the other, the optimizers differ.
    strange, missing = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    flags = [name for name in theirs.keys() & mine.keys() - _IMPLEMENTATIONS if isinstance(theirs[name], bool)]
    other = [f"{name}={theirs[name]}" for name in sorted(flags) if theirs[name] != mine[name]]
    if (strange and missing) or other:
        return f"is of a run with another optimizer ({', '.join(other or strange)}): resume with the optim of its run"
    found, expected = (sum(len(group["params"]) for group in side) for side in (saved, groups))
    if found != expected or len(saved) != len(groups):
        return (
            f"is of a run that trained {found} tensors in {len(saved)} groups, and this one trains {expected} in "
            f"{len(groups)}: freeze and adapt the student as its run did"
        )
    return None


def _optimizer(trainer: Any) -> Any:
    """The optimizer that training will use."""
    if trainer.optimizer is None:
        with trainer.projectors.attached(trainer.student):
            trainer.create_optimizer()
    return trainer.optimizer


def _optimizer_name(trainer: Any) -> str:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # they create the optimizer later, and wrap it
        return trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[0].__qualname__
    optimizer = _optimizer(trainer)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    name = f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__qualname__}"
    return f"{name} of {bits} bits" if bits else name


def _quantization(student: Any) -> str:
    config = getattr(causal_lm(student).config, "quantization_config", None)
    if config is None:
        return "none"
    config = config if isinstance(config, dict) else config.to_dict()
    kinds = [name for name in ("load_in_4bit", "load_in_8bit") if config.get(name)]
    return " ".join(map(str, [config.get("quant_method"), *kinds, config.get("bnb_4bit_quant_type") or ""])).strip()
