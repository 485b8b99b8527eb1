"""Configurations and tokenizers of models that are given by name, before any weights are loaded."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl import SFTConfig

from hf_distill.modeling import causal_lm, is_vision_language, merges_early, num_positions, num_token_ids

logger = logging.getLogger(__name__)

# Parts of the names of files that tokenizers are saved in.
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")


def name_of(model: Any) -> str | None:
    """The hub id or path of a model, loaded or not; None for what has none."""
    if isinstance(model, str):
        return model
    return causal_lm(model).config.name_or_path if isinstance(model, nn.Module) else None


def text_config(model: str | PreTrainedModel, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a language model, loaded or not; `kwargs` of `AutoConfig.from_pretrained`."""
    if isinstance(model, str):
        return AutoConfig.from_pretrained(model, **kwargs).get_text_config()
    return causal_lm(model).config.get_text_config()


def student_config(model: str | PreTrainedModel, args: SFTConfig) -> PreTrainedConfig:
    """The student's configuration, in the revision that will be loaded."""
    return text_config(model, trust_remote_code=args.trust_remote_code, revision=revision_of(args.model_init_kwargs))


def student_without_weights(model: str, args: SFTConfig) -> PreTrainedModel | None:
    """The student on the meta device, before it is loaded; None for remote code, and where a configuration is not all.

    Its class is the one that TRL loads.
    """
    if args.model_init_kwargs and "gguf_file" in args.model_init_kwargs:
        return None
    config = AutoConfig.from_pretrained(
        model, trust_remote_code=args.trust_remote_code, revision=revision_of(args.model_init_kwargs)
    )
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None or getattr(config, "auto_map", None):
        return None
    try:
        with torch.device("meta"):
            return cls(config)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # loading says it better


def student_rows(model: str | PreTrainedModel, args: SFTConfig) -> int:
    """The number of token ids that the student has embeddings for, before it is loaded."""
    return student_config(model, args).vocab_size if isinstance(model, str) else num_token_ids(causal_lm(model))


def student_positions(
    model: str | PreTrainedModel, args: SFTConfig, count: Callable[[Any], int | None] = num_positions
) -> int | None:
    """The number of tokens that the student can read, as `count` finds it, before it is loaded."""
    return count(student_config(model, args) if isinstance(model, str) else model)


def student_tokenizer(model: str | PreTrainedModel, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the student.

    Raises:
        `ValueError`: the student is a model that was not loaded by name, or there is none of this name.
    """
    name = name_of(model)
    if not name:
        raise ValueError("processing_class is missing: the student was not loaded by name, so its tokenizer is unknown")
    try:
        return load_tokenizer(name, args.model_init_kwargs, args.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no model with a tokenizer in the folder or under the hub id {name!r}: {reason}") from error


def student_processor(model: str | PreTrainedModel, args: SFTConfig) -> ProcessorMixin:
    """The processor of pictures and texts that was saved with the student.

    Raises:
        `ValueError`: the student was not loaded by name, or there is none of this name that works here.
    """
    name = name_of(model)
    if not name:
        raise ValueError("processing_class is missing: rows with pictures need the student's processor (AutoProcessor)")
    try:
        return load_processor(name, args.model_init_kwargs, args.trust_remote_code)
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"rows with pictures need a processor, and the one of {name!r} cannot be loaded: {reason}"
        ) from error


def student_processing_class(model: str | PreTrainedModel, args: SFTConfig, *, sees: bool | None) -> Any:
    """The processor of a student that sees, which is saved with it, if one works here; or else its tokenizer.

    Raises:
        `ValueError`: as `student_tokenizer` does.
    """
    if sees:
        try:
            return student_processor(model, args)
        except ValueError as error:  # rows of text alone need none
            logger.warning("the student reads pictures, and will be saved without a processor of pictures: %s", error)
    return student_tokenizer(model, args)


def load_processor(name: str, init_kwargs: Any, trust_remote_code: bool) -> ProcessorMixin:
    """The processor under a name; `ValueError` if there is none but a tokenizer, or what loading it raises."""
    revision = revision_of(init_kwargs)
    found = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(found, ProcessorMixin):
        raise ValueError("it has a tokenizer alone, and no processor of pictures")
    return found


def sees(model: Any, init_kwargs: Any, trust_remote_code: bool) -> bool | None:
    """True if a model, loaded or not, reads pictures; None where its configuration cannot be read."""
    config = _whole_config(model, init_kwargs, trust_remote_code)
    return None if config is None else is_vision_language(config)


def blindness(model: Any, init_kwargs: Any, trust_remote_code: bool) -> str | None:
    """The reason, in words, why a model, loaded or not, cannot be given pictures; None if it can, or nobody knows."""
    config = _whole_config(model, init_kwargs, trust_remote_code)
    if config is None or is_vision_language(config):
        return None
    if merges_early(config):
        return f"reads pictures without a vision tower ({config.model_type}), which is not supported"
    return "reads text alone"


def _whole_config(model: Any, init_kwargs: Any, trust_remote_code: bool) -> PreTrainedConfig | None:
    if not isinstance(model, str):
        return causal_lm(model).config
    try:
        return AutoConfig.from_pretrained(model, revision=revision_of(init_kwargs), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def load_tokenizer(name: str, init_kwargs: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer under a name; `OSError` or `ValueError` if there is none."""
    if os.path.isdir(name) and not has_tokenizer(name):
        raise OSError(f"{name} has no tokenizer")  # transformers would make an empty one
    revision = revision_of(init_kwargs)
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def has_tokenizer(folder: str) -> bool:
    """True if a folder holds a saved tokenizer."""
    return any(part in file for file in os.listdir(folder) for part in TOKENIZER_FILES)


def revision_of(init_kwargs: Any) -> str | None:
    """The revision among keyword arguments of `from_pretrained`."""
    return (init_kwargs or {}).get("revision")
