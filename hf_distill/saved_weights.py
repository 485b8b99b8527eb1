"""Saved weights copied back into the live model: in place and completely, or an error that says why not.

`save_pretrained` renames, splits or joins the weights of some families (one tensor per expert). transformers' own way
back into a live model skips whatever does not match.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

MODEL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Settings of an adapter that need not match: its tensors show them, they name its base, or a run may change them.
FREE_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "modules_to_save", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type",
}  # fmt: skip
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(model: nn.Module, folder: str | PathLike[str]) -> None:
    """Copies the weights that `model.save_pretrained(folder)` saved into the model's own tensors, bit for bit.

    Parameters stay the same objects, because optimizers, DDP and a teacher that is the student's base hold them. Tied
    parameters stay tied. For a model with adapters, only these are saved and loaded.

    Raises:
        `ValueError`: the folder lacks a weight of this model, or has one that the model lacks, or one of another shape.
            Nothing has been copied then.
    """
    pairs = []
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            saved = _read(_adapter_file(Path(folder), name))
            pairs.append((_adapter_tensors(model, name, saved), saved))
    else:
        tensors, saved = model.state_dict(keep_vars=True), _read(_model_file(Path(folder)))
        if any(_differing_names(model, tensors, saved)):
            saved = _converted(model, tensors, saved, Path(folder))
        pairs.append((tensors, saved))
    for tensors, saved in pairs:
        if problem := _other_tensors(model, tensors, saved) or _untied(tensors, saved):
            raise ValueError(f"{folder} {problem}")
    with torch.no_grad():
        for tensors, saved in pairs:
            for name in tensors.keys() & saved.keys():
                tensors[name].copy_(saved[name])


def misfit(model: nn.Module, folder: str | PathLike[str], *, dtypes: bool = True) -> str | None:
    """Compares the weights in a folder with a model's by names, shapes and configurations, without reading them.

    Returns the difference as the end of a sentence that starts with the folder's name, or None.

    Args:
        dtypes (`bool`): whether dtypes have to match. An engine that splits a model may save it in another dtype.
    """
    folder = Path(folder)
    if isinstance(model, PeftModel):
        problem = other_adapters(folder, model.peft_config) or _other_adapter_tensors(model, folder, dtypes)
        return problem and f"{problem}: pass the model and the peft_config that its run began with"
    problem = other_adapters(folder, {}) or _other_config(model, folder) or _other_model_tensors(model, folder, dtypes)
    return problem and f"{problem}: resume with the model that its run began with"


def other_adapters(folder: str | PathLike[str], configs: Mapping[str, PeftConfig]) -> str | None:
    """Compares only the configurations of adapters, as [`misfit`] does; a student without adapters has none."""
    folder = Path(folder)
    saved = {name: _settings(path.parent) for name, path in _adapter_files(folder).items()}
    if not saved and configs:
        return "is of a student that was trained in full, and this one has adapters"
    if saved and not configs:
        return f"is of a student with adapters ({_said(next(iter(saved.values())))}), and this one has none"
    if saved.keys() != configs.keys():
        return f"has the adapters {', '.join(sorted(saved))}, and this student has {', '.join(sorted(configs))}"
    for name, config in configs.items():
        theirs, mine = saved[name], _as_json(config)
        shared = sorted(theirs.keys() & mine.keys() - FREE_SETTINGS)
        if other := [key for key in shared if theirs[key] != mine[key]]:
            found, expected = (_said({key: side[key] for key in other}) for side in (theirs, mine))
            return f"is of an adapter with {found}, and this student's has {expected}"
    return None


def lacking(model: PeftModel, folder: str | PathLike[str]) -> list[str]:
    """Names of weights of the model's adapter "default", saved base weights included, that a folder lacks."""
    saved = _read(_adapter_file(Path(folder), "default"), values=False)
    tensors = _adapter_tensors(model, "default", saved)
    # Unknown names may come from another version; PEFT translates them.
    return [] if saved.keys() - tensors.keys() else sorted(tensors.keys() - saved.keys())


# ----------------------------------------------------------------------------------------------------- what is compared


def _other_adapter_tensors(model: PeftModel, folder: Path, dtypes: bool) -> str | None:
    held: set[int] = set()
    for name in model.peft_config:
        saved = _read(_adapter_file(folder, name), values=False)
        tensors = _adapter_tensors(model, name, saved)
        if problem := _other_tensors(model, tensors, saved) or (dtypes and _other_dtypes(tensors.values(), saved)):
            return problem
        held |= {id(tensor) for tensor in tensors.values()}
    lost = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held
    ]
    return f"holds adapters only, and not {lost[0]}, which this student trains" if lost else None


def _other_model_tensors(model: nn.Module, folder: Path, dtypes: bool) -> str | None:
    tensors, saved = model.state_dict(keep_vars=True), _read(_model_file(folder), values=False)
    if not any(_differing_names(model, tensors, saved)):
        tensors = {name: tensor for name, tensor in tensors.items() if name in saved}
        return _other_tensors(model, tensors, saved) or ((dtypes or None) and _other_dtypes(tensors.values(), saved))
    # The names differ: another model, or a family that is saved under other names, with equally many numbers.
    found, expected = (sum(_shape(t).numel() for t in side) for side in (saved.values(), _once(tensors.values())))
    if found != expected and not getattr(model, "_keys_to_ignore_on_load_missing", None):
        missing, strange = _differing_names(model, tensors, saved)
        return f"holds {found:,} numbers, and this student {expected:,} ({_examples(missing, strange)})"
    return (dtypes or None) and _other_dtypes(tensors.values(), saved)


def _other_config(model: nn.Module, folder: Path) -> str | None:
    """Compares the integers of two configurations, which are sizes and counts; ids of tokens may differ."""
    if not isinstance(model, PreTrainedModel) or not (folder / "config.json").exists():
        return None

    def sizes(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in config.items():
            if isinstance(value, dict):
                yield from sizes(value, f"{prefix}{name}.")
            elif (type(value) is int and "token" not in name) or name == "model_type":
                yield prefix + name, value

    theirs = dict(sizes(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    mine = dict(sizes(json.loads(model.config.to_json_string(use_diff=False))))
    if other := [name for name in theirs if name in mine and theirs[name] != mine[name]]:
        other.sort(key=lambda name: name != "model_type")
        found, expected = (_said({name: side[name] for name in other[:4]}) for side in (theirs, mine))
        return f"is of a model with {found}, and this student has {expected}"
    return None


def _differing_names(
    model: nn.Module, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Names of the model that a file lacks, and names in the file that the model lacks, if they have to match."""
    loads: Any = None if isinstance(model, PeftModel) else model
    may_miss, may_come, never_saved = (
        getattr(loads, f"_keys_to_ignore_on_{when}", None) or () for when in ("load_missing", "load_unexpected", "save")
    )
    present = {id(tensors[name]) for name in tensors if name in saved}  # one of several tied names is enough
    missing = [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in present and name not in never_saved and not any(re.search(p, name) for p in may_miss)
    ]
    strange = [name for name in saved if name not in tensors and not any(re.search(p, name) for p in may_come)]
    return missing, strange


def _other_tensors(model: nn.Module, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    missing, strange = _differing_names(model, tensors, saved)
    if missing or strange:
        return f"does not hold the weights of this {type(model).__name__} ({_examples(missing, strange)})"
    for name in tensors:
        if name in saved and _shape(tensors[name]) != saved[name].shape:
            return f"has {name} of shape {tuple(saved[name].shape)}, and this student {tuple(_shape(tensors[name]))}"
    return None


def _other_dtypes(tensors: Iterable[Tensor], saved: Mapping[str, Tensor]) -> str | None:
    found, expected = ({t.dtype for t in side if t.is_floating_point()} for side in (saved.values(), tensors))
    if found != expected:
        theirs, mine = (" and ".join(sorted(str(d).removeprefix("torch.") for d in side)) for side in (found, expected))
        return f"is in {theirs}, and this student in {mine}"
    return None


def _untied(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str | None:
    """Compares the values that were saved under the names of one tied tensor."""
    first: dict[int, str] = {}
    for name in tensors.keys() & saved.keys():
        other = first.setdefault(id(tensors[name]), name)
        if other != name and not torch.equal(saved[other], saved[name]):
            return f"has other weights for {name} than for {other}, which are tied in this student"
    return None


def _shape(tensor: Tensor) -> torch.Size:
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor in its place


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, tied ones once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _examples(missing: list[str], strange: list[str]) -> str:
    parts = {"missing": missing, "strange": strange}
    return "; ".join(f"{len(names)} {kind}: {', '.join(names[:2])}" for kind, names in parts.items() if names)


def _said(settings: Mapping[str, Any]) -> str:
    if len(settings) > 5:  # a whole configuration of an adapter
        settings = {key: settings[key] for key in ("peft_type", "r", "target_modules") if key in settings}
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


# ------------------------------------------------------------------------------------------------ a model, its adapters


def _converted(model: nn.Module, tensors: Mapping[str, Tensor], saved: Any, folder: Path) -> dict[str, Tensor]:
    """The saved weights under the names of the model's modules, loaded as a user would load them.

    They are loaded in the widest dtype of the model, so that each tensor gets its bits back.
    """
    problem = f"{folder} does not hold the weights of this {type(model).__name__}"
    examples = _examples(*_differing_names(model, tensors, saved))
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{problem} ({examples})")
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    try:
        both: Any = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=reduce(torch.promote_types, dtypes),
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        loaded, found = both
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{problem} ({examples}): {error}") from error
    if wrong := {kind: names for kind, names in found.items() if names}:
        raise ValueError(f"{problem} ({'; '.join(f'{kind}: {sorted(map(str, wrong[kind]))[0]}' for kind in wrong)})")
    return loaded.state_dict()


def _adapter_tensors(model: PeftModel, name: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, the same objects, under the names that PEFT saves them by."""
    state = model.state_dict(keep_vars=True)
    tensors = get_peft_model_state_dict(model, dict(state), name, save_embedding_layers=False)
    if saved.keys() - tensors.keys():  # PEFT saves resized embeddings too
        tensors = get_peft_model_state_dict(model, dict(state), name, save_embedding_layers=True)
    if {id(tensor) for tensor in tensors.values()} - {id(tensor) for tensor in state.values()}:
        raise ValueError(f"adapters of type {model.peft_config[name].peft_type} cannot be loaded in place: take LoRA")
    return tensors


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _as_json(config: PeftConfig) -> dict[str, Any]:
    """The settings as `save_pretrained` would save them."""
    return json.loads(
        json.dumps(config.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


# ---------------------------------------------------------------------------------------------------------------- files


def _adapter_files(folder: Path) -> dict[str, Path]:
    """The files by adapter: "default" is in the folder itself, others are in a subfolder each."""
    found = [path for name in ADAPTER_FILES for path in (folder / name, *folder.glob(f"*/{name}")) if path.exists()]
    return {"default" if path.parent == folder else path.parent.name: path for path in reversed(found)}


def _adapter_file(folder: Path, name: str) -> Path:
    if name not in (files := _adapter_files(folder)):
        raise ValueError(f"{folder} has no adapter {name!r}" + (f", only {', '.join(files)}" if files else ""))
    return files[name]


def _model_file(folder: Path) -> Path:
    for name in MODEL_FILES:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} has no weights of a model: there is no {MODEL_FILES[0]}")


def _read(path: Path, *, values: bool = True) -> dict[str, Tensor]:
    """The tensors of a file, or of the files that an index names; without values, on the meta device."""
    if path.suffix == ".json":
        parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        return {name: tensor for part in parts for name, tensor in _read(path.parent / part, values=values).items()}
    if path.suffix != ".safetensors":
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state if values else {name: tensor.to("meta") for name, tensor in state.items()}

    def empty(part: Any) -> Tensor:
        return torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) if values else empty(file.get_slice(name)) for name in names}
