"""What the trainers refuse at construction, and in which words; and the tokenizers they find by themselves."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig, is_conversational
from trl.data_utils import is_conversational_from_value

from hf_distill.modeling import causal_lm, embedding_weight, shared_parameters
from hf_distill.trainers.config import KDConfig

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset

# A stream has to have a label within these.
PEEKED_ROWS = 1000


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, AnyDataset]:
    """All datasets by the name that messages call them."""
    if train_dataset is None:
        raise ValueError("train_dataset is missing")
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    return {"train": train_dataset, **{name: data for name, data in evaluation.items() if data is not None}}


def check_columns(dataset: AnyDataset, name: str, text_field: str, has_formatting: bool) -> None:
    """Raises `ValueError` for a dataset without rows, without text, or with images."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"the {name} dataset is empty")
    columns = set(row)
    if columns & {"image", "images"}:
        raise ValueError(f"the {name} dataset has images; hf_distill trains language models on text only")
    known = [{"input_ids"}, {text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}]
    if not has_formatting and not any(wanted <= columns for wanted in known):
        raise ValueError(
            f"the {name} dataset has the columns {', '.join(sorted(columns))}; it needs {text_field!r}, 'messages', "
            "'prompt' and 'completion', or 'input_ids'. Rename a column, set dataset_text_field or pass formatting_func"
        )


def check_chat_template(dataset: AnyDataset, name: str, tokenizer: PreTrainedTokenizerBase, args: KDConfig) -> None:
    """Raises `ValueError` for conversations that the tokenizer cannot turn into text."""
    row = next(iter(dataset))
    chats = "input_ids" not in row and (is_conversational(row) or is_conversational_from_value(row))
    if chats and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            f"the {name} dataset has conversations, but the student's tokenizer has no chat template: use one of an "
            "instruct model, set chat_template_path, or give the rows as text"
        )


def has_label(row: Mapping[str, Any], vocab_size: int, dataset_name: str) -> bool:
    """Whether a tokenised row has anything to train on; `ValueError` for a token that the teacher does not know."""
    if "input_ids" not in row:
        return True  # Of a dataset that is prepared by its own collator.
    if (largest := int(max(row["input_ids"], default=0))) >= vocab_size:
        raise ValueError(
            f"a row of the {dataset_name} dataset has token id {largest}, but student and teacher share only the ids "
            f"below {vocab_size}: one of them cannot read it. Use tokens (eos_token, chat template) that both know"
        )
    labels = row["labels"] if "labels" in row else row["input_ids"]
    return any(label != -100 for label in labels[1:])


def refuse_no_label(kept: AnyDataset, name: str, args: SFTConfig) -> None:
    """Raises `ValueError` if no row has been kept, of a stream none of the first `PEEKED_ROWS`."""
    if next(iter(kept), None) is None:
        which = "no row" if isinstance(kept, Dataset) else f"none of the first {PEEKED_ROWS:,} rows"
        raise ValueError(
            f"{which} of the {name} dataset has a label left to train on; check max_length ({args.max_length}), "
            "completion_only_loss, assistant_only_loss and the chat template"
        )


def refuse_vision(model: str | PreTrainedModel, processing_class: Any) -> None:
    """Raises `ValueError` for a vision-language model or processor."""
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class has to be a tokenizer, got {type(processing_class).__name__}; hf_distill trains "
            "language models on text only, vision-language processors are not supported"
        )
    if not isinstance(model, str) and getattr(model.config, "vision_config", None) is not None:
        raise ValueError(f"{type(model).__name__} is a vision model; hf_distill trains language models on text only")


def refuse_prompt_learning(peft_config: Any, *models: Any) -> None:
    """Raises `ValueError` for prompt tuning and its kin, whose virtual tokens shift every position of a row."""
    for config in (peft_config, *(getattr(model, "active_peft_config", None) for model in models)):
        if config is not None and config.is_prompt_learning:
            raise ValueError(f"{type(config).__name__} shifts every position; use LoRA or another adapter")


def refuse_sharding(args: KDConfig) -> None:
    """Raises `ValueError` for ways to spread a run over devices that KDTrainer does not train in."""
    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed ZeRO-3 is not supported yet: use ZeRO-2 (accelerate_configs/zero2.yaml) or DDP")
    # What accelerate will read: the settings, or else what `accelerate launch` has left in the environment.
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("FSDP is not supported yet: use DDP (accelerate_configs/ddp.yaml) or ZeRO-2")
    parallelism = args.parallelism_config
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        parallelism = ParallelismConfig()
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism are not supported: the teacher reads whole rows")


def refuse_split(student: Any) -> None:
    """Raises `ValueError` for a student that is spread over devices; by name it has yet to be loaded."""
    if len(set((getattr(causal_lm(student), "hf_device_map", None) or {}).values())) > 1:
        raise ValueError("the student is split over devices; load it on one: device_map={'': 0}")


def refuse_frozen(student: nn.Module) -> None:
    """Raises `ValueError` for a student without anything to train."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "the student has no trainable parameter (a model that has been a teacher is frozen, and so are its "
            "copies): call student.requires_grad_(True), or pass a peft_config"
        )


def refuse_shared_memory(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `ValueError` if training the student would change the teacher."""
    if shared := shared_parameters(student, teacher):
        raise ValueError(
            f"{len(shared)} of the student's trainable parameters are the teacher's own memory ({shared[0]}, ...): "
            "training would change the teacher. Copy one of them (copy.deepcopy)"
        )


def student_tokenizer(model: str | PreTrainedModel, args: KDConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with the student.

    Raises:
        `ValueError`: the student is a model that was not loaded by name, or there is none of this name.
    """
    name = _name(model)
    if not name:
        raise ValueError("processing_class is missing: the student was not loaded by name, so its tokenizer is unknown")
    try:
        return _load_tokenizer(name, args.model_init_kwargs, args)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no model with a tokenizer in the folder or under the hub id {name!r}: {reason}") from error


def student_rows(model: str | PreTrainedModel, args: KDConfig) -> int:
    """How many token ids the student has embeddings for, before it is loaded."""
    if not isinstance(model, str):
        return len(embedding_weight(causal_lm(model)))
    return text_config(model, args).vocab_size


def text_config(model: str | PreTrainedModel, args: KDConfig) -> PreTrainedConfig:
    """The configuration of a student, loaded or not."""
    if not isinstance(model, str):
        return causal_lm(model).config.get_text_config()
    revision = (args.model_init_kwargs or {}).get("revision")  # pyright: ignore[reportAttributeAccessIssue]
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    return config.get_text_config()


def teacher_tokenizer(model: str | PreTrainedModel, args: KDConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with the teacher, or None, with a warning, where there is none."""
    problem = "it was not loaded by name"
    if name := _name(model):
        try:
            return _load_tokenizer(name, args.teacher_model_init_kwargs, args)
        except (OSError, ValueError) as error:
            problem = str(error).splitlines()[0]
    logger.warning(
        "the teacher comes without a tokenizer (%s): its vocabulary is taken to be the student's. Pass "
        "teacher_processing_class to have that checked",
        problem,
    )
    return None


def _name(model: str | PreTrainedModel) -> str | None:
    return model if isinstance(model, str) else model.config.name_or_path


def _load_tokenizer(name: str, init_kwargs: Any, args: KDConfig) -> PreTrainedTokenizerBase:
    revision = (init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
