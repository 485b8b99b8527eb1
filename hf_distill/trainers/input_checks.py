"""Checks of the objects that a trainer is called with, before anything is loaded."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from hf_distill.lora import refuse_targets
from hf_distill.model_files import auto_class, class_problem, is_adapter_folder, name_problem
from hf_distill.modeling import causal_lm
from hf_distill.named import student_without_weights
from hf_distill.row_files import FILE_FORMATS
from hf_distill.saving import base_and_adapter, refuse_unrepeatable
from hf_distill.teachers.opening import BASE
from hf_distill.trainers.hard_label_config import keywords

# Whose availability depends on other trackers, or is not said by transformers.
_UNCHECKED_TRACKERS = {"azure_ml", "flyte"}


def check_inputs(model: Any, train_dataset: Any, eval_dataset: Any, args: SFTConfig, peft_config: Any = None) -> None:
    """Checks the arguments of a trainer; reads no weights, and of a model that is given by name the configuration.

    Raises:
        `ValueError`: a model without a causal head, another object than a dataset, adapters that are none, come
            twice, fit no module or could not be loaded again, a tracker that is not installed, or a push that could
            not reach the hub.
    """
    check_trackers(args)
    check_datasets(train_dataset, eval_dataset)
    if args.eval_strategy != "no" and eval_dataset is None:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"eval_strategy={strategy!r} needs an eval_dataset: pass one, or set eval_strategy='no'")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"peft_config has to be one of peft, such as LoraConfig(...), got {type(peft_config).__name__}"
        )
    if peft_config is not None and (is_adapter_folder(model) or isinstance(model, PeftModel)):
        raise ValueError(
            "the student has adapters already, and peft_config would add others: leave peft_config out to train on, or "
            "merge the adapters first (hf-distill merge) and pass the merged model"
        )
    check_model(model, args)
    for config in (peft_config, *getattr(model, "peft_config", {}).values()):
        refuse_unrepeatable(getattr(config, "init_lora_weights", None), "the student's adapter")
    if isinstance(peft_config, LoraConfig):
        student = student_without_weights(model, args) if isinstance(model, str) else model
        if student is not None:
            refuse_targets(student, peft_config)
    check_push(args)


# ----------------------------------------------------------------------------------------------------------- data sets


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Raises `ValueError` for objects that are no data sets, with the line that makes one of them.

    They are not converted silently: which types the columns get is a choice that should be seen.
    """
    if train_dataset is not None:
        _check_dataset(train_dataset, "train_dataset")
    parts = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    for name, part in parts.items():
        if part is not None:
            _check_dataset(part, "eval_dataset" if name is None else f"eval_dataset[{name!r}]")


def _check_dataset(rows: Any, name: str) -> None:
    if isinstance(rows, Dataset | IterableDataset):
        return
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise ValueError(
            f"{name} is a {type(rows).__name__} with the splits {', '.join(map(str, rows))}: pass one of them, such as "
            f"dataset[{next(map(str, rows), 'train')!r}]"
        )
    raise ValueError(
        f"{name} has to be a Dataset or an IterableDataset of the package datasets, got {_kind(rows)}: {_remedy(rows)}"
    )


def _kind(rows: Any) -> str:
    return f"the name {os.fspath(rows)!r}" if isinstance(rows, str | os.PathLike) else type(rows).__name__


def _remedy(rows: Any) -> str:
    """The line that makes a data set of an object."""
    if isinstance(rows, str | os.PathLike):
        path = os.fspath(rows)
        format_name = FILE_FORMATS.get(os.path.splitext(str(path))[1])
        arguments = f"{path!r}" if format_name is None else f"{format_name!r}, data_files={path!r}"
        return f"pass load_dataset({arguments}, split='train')"
    library = type(rows).__module__.partition(".")[0]
    if library in ("pandas", "polars"):
        return f"pass Dataset.from_{library}(frame)"
    if isinstance(rows, Mapping):
        if any(isinstance(part, Dataset | IterableDataset) for part in rows.values()):
            return f"pass one of its data sets, such as dataset[{next(iter(rows))!r}]"
        return "pass Dataset.from_dict(columns)"
    if isinstance(rows, list | tuple):
        return (
            "pass Dataset.from_dict({'text': texts})"
            if rows and isinstance(rows[0], str)
            else ("pass Dataset.from_list(rows), where each row is a dict")
        )
    if isinstance(rows, torch.utils.data.Dataset) and not isinstance(rows, torch.utils.data.IterableDataset):
        return "pass Dataset.from_list([rows[i] for i in range(len(rows))])"
    if isinstance(rows, Iterable) or callable(rows):
        return "pass Dataset.from_generator(function), where the function yields a dict for each row"
    return "pass Dataset.from_list(rows), where each row is a dict"


# ----------------------------------------------------------------------------------------------------------- the model


def check_model(model: Any, args: SFTConfig) -> None:
    """Raises `ValueError` for a student that is no causal language model, by name or as an object."""
    if isinstance(model, str):
        kwargs = {"trust_remote_code": args.trust_remote_code, **keywords(args.model_init_kwargs)}
        if problem := _name_problem(model, kwargs, by_class=True):
            raise ValueError(f"no model with a tokenizer in the folder or under the hub id {model!r}: {problem}")
        return
    if not isinstance(model, PreTrainedModel | PeftModel):
        remedy = "; pass str(path)" if isinstance(model, os.PathLike) else ""
        raise ValueError(f"model has to be a hub id, a path or a loaded model, got {type(model).__name__}{remedy}")
    base = causal_lm(model)
    problem = class_problem(base.config) if base.config.is_encoder_decoder else None
    if problem is None and (base.get_output_embeddings() is None or not base.can_generate()):
        problem = (
            f"{type(base).__name__} is no causal language model: it has no output layer over the next token. Load it "
            "with AutoModelForCausalLM"
        )
    if problem is not None:
        raise ValueError(f"the student cannot be trained: {problem}")


def check_teachers(teachers: Mapping[str, Any], args: Any) -> None:
    """Raises `ValueError` for a teacher that is given by name and is no causal language model."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **keywords(args.teacher_model_init_kwargs)}
    for teacher in teachers.values():
        if isinstance(teacher, str) and teacher != BASE and (problem := _name_problem(teacher, kwargs)):
            raise ValueError(f"teacher_model={teacher!r} cannot be loaded: {problem}")


def _name_problem(name: str, kwargs: Mapping[str, Any], *, by_class: bool = False) -> str | None:
    """The problem with a name, or with the model that the adapters in its folder belong to."""
    base, adapter = base_and_adapter(name)
    problem = name_problem(name, kwargs, by_class=by_class)
    if problem is None and adapter is not None and (problem := name_problem(base, kwargs)):
        problem = f"the adapters in it belong to {base!r}: {problem}"
    return problem


def load_adapters(folder: str, args: SFTConfig, quantization_config: Any = None) -> PeftModel:
    """The model that saved adapters belong to, with these adapters, which can be trained on.

    transformers would load them frozen, and TRL not at all.

    Args:
        folder (`str`): what a run with a `peft_config` has saved.
        args: their `model_init_kwargs` are for the base model.
    """
    base, adapter = base_and_adapter(folder)
    kwargs = {"trust_remote_code": args.trust_remote_code, "dtype": "float32", **keywords(args.model_init_kwargs)}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.device.type == "cuda" and args.world_size == 1:
        kwargs.setdefault("device_map", {"": args.device})
    model = auto_class(base, kwargs).from_pretrained(base, **kwargs)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


# -------------------------------------------------------------------------------------------------- trackers, and a hub


def check_trackers(args: SFTConfig) -> None:
    """Raises `ValueError` for a tracker that is not installed, or that transformers does not know."""
    trackers = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    available = get_available_reporting_integrations() if trackers else []
    for tracker in trackers:
        if tracker in available or tracker in _UNCHECKED_TRACKERS:
            continue
        try:
            get_reporting_integration_callbacks([tracker])
        except ValueError as error:
            raise ValueError(f"report_to has {tracker!r}: {error} For none write report_to='none'") from error
        raise ValueError(
            f"report_to has {tracker!r}, which is not installed: pip install {tracker}, or set report_to='none'"
        )


def check_push(args: SFTConfig) -> None:
    """Raises `ValueError` if the hub could not take what `push_to_hub` sends it."""
    if not args.push_to_hub:
        return
    remedy = "or set push_to_hub=False and push the finished student later: model.push_to_hub(name)"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"push_to_hub=True, but HF_HUB_OFFLINE keeps the hub away: unset it, {remedy}")
    token = args.hub_token or get_token()
    if token is None:
        raise ValueError(f"push_to_hub=True needs a token: log in with `hf auth login`, set hub_token, {remedy}")
    if args.process_index == 0:
        try:
            HfApi(token=token).whoami()
        except (OSError, HTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"push_to_hub=True, but the hub does not answer ({reason}): mend it, {remedy}") from error
