"""Names and folders that hold no causal language model: what is wrong with them, before any weights are read."""

import json
import os
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def is_adapter_folder(name: Any) -> bool:
    """True if a name is a folder with adapters alone, whose base model lies elsewhere."""
    if not isinstance(name, str) or os.path.isfile(os.path.join(name, "config.json")):
        return False
    return os.path.isfile(os.path.join(name, ADAPTER_CONFIG))


def name_problem(name: str, init_kwargs: Mapping[str, Any] | None = None, *, by_class: bool = False) -> str | None:
    """Looks for a causal language model under a hub id or path.

    Args:
        name (`str`): a hub id or a path.
        init_kwargs: keyword arguments of `from_pretrained`.
        by_class (`bool`): whether the class that the configuration names will be loaded, as TRL does it.

    Returns:
        The problem with it, as one line, or None.
    """
    kwargs = init_kwargs or {}
    if kwargs.get("gguf_file") is not None:
        return None  # configuration and weights are in this file
    if os.path.isfile(name):
        return "it is a file: pass the folder that it lies in"
    if not os.path.isdir(name) and (not name.strip() or name[0] in "./~\\" or name.count("/") > 1):
        return "there is no such folder; a hub id is a name, or owner/name"
    subfolder = os.path.join(name, kwargs.get("subfolder") or "")
    if os.path.isdir(name) and (problem := _folder_problem(subfolder)):
        return problem
    if is_adapter_folder(name):
        return None
    known = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder", "code_revision")
    try:
        config = AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in known if kwargs.get(key) is not None})
    except (OSError, ValueError) as error:
        return _reason(error)
    if by_class and not config.architectures and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return f'its config.json names no class to load: add "architectures": ["{causal.__name__}"]'
    return class_problem(config)


def auto_class(name: str, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """The class that loads a model by name: of one that reads pictures all of it, and not its language part alone."""
    kwargs = {key: (init_kwargs or {}).get(key) for key in ("revision", "trust_remote_code", "subfolder")}
    if (init_kwargs or {}).get("gguf_file") is not None:
        return AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(name, **{key: value for key, value in kwargs.items() if value is not None})
    except (OSError, ValueError):
        return AutoModelForCausalLM  # loading says it better
    if getattr(config, "vision_config", None) is None or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def class_problem(config: PreTrainedConfig) -> str | None:
    """Why a configuration is not that of a causal language model; None for one that is, or that nobody knows."""
    name = (config.architectures or [None])[0]
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    if config.is_encoder_decoder:
        return f"{name or type(config).__name__} is an encoder-decoder; hf_distill trains causal language models only"
    if name is None:
        problem = None if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else "it"
    else:
        is_causal = name in _causal_classes() or not hasattr(transformers, name)
        problem = None if is_causal or getattr(config, "vision_config", None) is not None else name
    return problem and (
        f"{problem} is no causal language model: it has no output layer over the next token, and one would be made of "
        "random numbers. Pass a model whose class ends in ForCausalLM"
    )


def _causal_classes() -> set[str]:
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names |= {value} if isinstance(value, str) else set(value)
    return names


def _folder_problem(folder: str) -> str | None:
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    files = sorted(os.listdir(folder))
    if "config.json" not in files and ADAPTER_CONFIG not in files:
        within = [file for file in files if os.path.isfile(os.path.join(folder, file, "config.json"))]
        within += [file for file in files if os.path.isfile(os.path.join(folder, file, ADAPTER_CONFIG))]
        return "it has no config.json" + (f"; there is one in {', '.join(within)}" if within else "")
    if not any(file.endswith(WEIGHTS) for file in files):
        return "it has no weights (no file that ends in .safetensors or .bin)"
    for file in files:
        path = os.path.join(folder, file)
        if file.endswith(".safetensors") and not _is_whole(path):
            return (
                f"{file} is cut ({os.path.getsize(path):,} bytes): copy or download it again. One of some hundred "
                "bytes is a pointer that `git lfs pull` replaces"
            )
        if file.endswith(".index.json") and (missing := _missing_shards(path, files)):
            return f"{missing[0]} is missing, which {file} names: copy or download it again"
    return None


def _is_whole(path: str) -> bool:
    """True if a file of safetensors is as long as its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size >= 8 + length + max(ends, default=0)


def _missing_shards(path: str, files: list[str]) -> list[str]:
    with open(path, encoding="utf-8") as file:
        shards = set(json.load(file).get("weight_map", {}).values())
    return sorted(shards - set(files))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "does not recognize this architecture" in text:
        return f"{text.partition(' but ')[0]}, which transformers {transformers.__version__} does not know: upgrade it"
    if "couldn't connect" in text or "offline" in text.lower():
        return "there is no such folder here, and the hub cannot be reached: check the name, or download it first"
    if "is not a local folder" in text:
        return "there is no such folder, nor such a model on the hub (a private one needs a token: hf auth login)"
    return text.partition(". ")[0]
