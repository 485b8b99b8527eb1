"""What the trainers refuse at construction, and in which words; and the tokenizers they find by themselves."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled

from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import describe_mapping, layer_mapping
from hf_distill.metrics import metric_name, more_is_better
from hf_distill.modeling import (
    causal_lm,
    check_length,
    check_load_balancing,
    num_layers,
    num_positions,
    num_token_ids,
    shared_parameters,
)
from hf_distill.saving import AsItCame, refuse_folder, refuse_moving
from hf_distill.teachers.local import BASE, public_name
from hf_distill.token_rows import longest_text
from hf_distill.trainers.config import KDConfig, keywords, skips_preparation

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset

# Parts of the names of files that tokenizers are saved in.
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece", "tekken")

# A stream has to have a label within these.
PEEKED_ROWS = 1000


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, AnyDataset]:
    """All datasets by the name that messages call them."""
    if train_dataset is None:
        raise ValueError("train_dataset is missing")
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    return {"train": train_dataset, **{name: data for name, data in evaluation.items() if data is not None}}


def check_best_metric(args: KDConfig, eval_dataset: Any, metrics: Iterable[str], *, is_open: bool) -> None:
    """Raises `ValueError` for a `metric_for_best_model` that no evaluation has; warns of a wrong direction.

    Args:
        metrics: how the metrics begin that this trainer evaluates.
        is_open (`bool`): whether something else may add metrics of its own (a callback, a subclass).
    """
    logged = args.metric_for_best_model
    if logged is None or args.eval_strategy == "no" or eval_dataset is None:
        return
    sets = list(eval_dataset) if isinstance(eval_dataset, dict) else [""]
    name = metric_name(logged, sets)
    if not is_open and (name is None or not name.startswith(tuple(metrics))):
        prefixes = ", ".join(f"eval_{name}_" if name else "eval_" for name in sets)
        raise ValueError(
            f"metric_for_best_model={logged!r} is in no evaluation: its metrics are {prefixes} followed by "
            f"{', '.join(metrics)}. Name one of them; a callback with metrics of its own has to be in `callbacks`"
        )
    if name is not None and args.greater_is_better == (not more_is_better(logged)):
        logger.warning(
            "greater_is_better=%s keeps the worst checkpoint by %s, of which %s is better: leave greater_is_better out",
            args.greater_is_better, logged, "less" if args.greater_is_better else "more",
        )  # fmt: skip


def is_of_a_library(kind: type) -> bool:
    """True for callbacks and trainers that are known to add no metrics of a user's own to an evaluation."""
    return kind.__module__.split(".")[0] in ("transformers", "trl", "hf_distill")


def named_teachers(
    teachers: Any, tokenizers: Any, args: KDConfig
) -> tuple[dict[str, str | PreTrainedModel], dict[str, PreTrainedTokenizerBase | None]]:
    """The teachers, and the tokenizers that came with them, by name.

    Raises:
        `ValueError`: there is no teacher, or what is said of several does not fit their number.
    """
    given = list(teachers.values()) if isinstance(teachers, Mapping) else teachers
    given = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
    if strange := [type(teacher).__name__ for teacher in given if not isinstance(teacher, str | nn.Module | None)]:
        raise ValueError(
            f"teacher_model has to be a hub id, a path, a model, or a list or dict of them, not {strange[0]}"
        )
    if not given or None in given:
        raise ValueError("teacher_model is missing: pass a hub id, a path or a model (SFTTrainer trains without)")
    if isinstance(teachers, Mapping):
        named = dict(teachers)
    else:
        named = {}
        for teacher in given:
            name = public_name(teacher)
            named[name if name not in named else f"{name} ({len(named) + 1})"] = teacher
    if isinstance(tokenizers, Mapping):
        if unknown := set(tokenizers) - set(named):
            raise ValueError(f"teacher_processing_class has {sorted(unknown)}; the teachers are {', '.join(named)}")
        found = {name: tokenizers.get(name) for name in named}
    else:
        if isinstance(tokenizers, list | tuple):
            listed = list(tokenizers)
        elif len(named) == 1 or tokenizers is None:
            listed = [tokenizers] * len(named)
        else:  # one for those that bring none
            listed = [_own_tokenizer(teacher, args) or tokenizers for teacher in given]
        if len(listed) != len(named):
            raise ValueError(f"there are {len(named)} teachers and {len(listed)} of teacher_processing_class")
        found = dict(zip(named, listed, strict=True))
    if args.teacher_weights is not None and len(args.teacher_weights) != len(named):
        raise ValueError(f"there are {len(named)} teachers ({', '.join(named)}) and {args.teacher_weights=}")
    if args.teacher_device is not None and args.teacher_device.count(",") not in (0, len(named) - 1):
        raise ValueError(
            f"there are {len(named)} teachers and {args.teacher_device=}: name one device, or one for each"
        )
    if len(named) == 1 and (args.teacher_combination != "mixture" or args.teacher_weights):
        raise ValueError("teacher_combination and teacher_weights need several teachers: teacher_model=[...]")
    if args.teacher_combination == "route" and args.teacher_weights:
        raise ValueError("teacher_weights are not used with teacher_combination='route': each row has one teacher")
    return named, found


def refuse_row_columns(dataset: AnyDataset, name: str, args: KDConfig) -> None:
    """Raises `ValueError` where a column for the teachers is missing or could not be followed."""
    columns = set(next(iter(dataset)))
    is_prepared = skips_preparation(args)
    naming = ["teacher_index"] if is_prepared else ["teacher", "teacher_index"]
    if args.teacher_combination == "route" and not columns & {*naming}:
        raise ValueError(f"teacher_combination='route' needs a column {naming[0]!r} in the {name} dataset")
    own = columns & {"teacher_input_ids", "teacher_labels"}
    if len(own) == 1 or (is_prepared and not own and "teacher_prompt" in columns):
        raise ValueError(
            f"the {name} dataset needs what the teacher reads as 'teacher_input_ids' and 'teacher_labels', or, without "
            "skip_prepare_dataset, as 'teacher_prompt'"
        )
    found = columns & {"teacher_prompt", "teacher_input_ids"} or (args.teacher_combination == "route" and {"teacher"})
    if found and (args.packing or args.eval_packing or args.padding_free):
        raise ValueError(f"packing and padding_free join rows, and would lose {sorted(found)[0]!r}: set both to False")
    if (
        name != "train"
        and args.eval_packing
        and not (args.packing or args.padding_free or args.packing_strategy == "wrapped")
    ):
        raise ValueError(
            "eval_packing without packing: TRL's batches would let held-out rows of one sequence see each other; set "
            "packing=True, too, or eval_packing=False"
        )


def refuse_across(across: Mapping[str, Any], teachers: Mapping[str, Any], args: KDConfig) -> None:
    """Raises `ValueError` for what is not possible with teachers `across` that have another tokenizer."""
    if not across:
        return
    name = next(iter(across))
    if len(teachers) > 1 and args.teacher_combination != "sum":
        raise ValueError(
            f"{name} has another tokenizer than the student, and teacher_combination={args.teacher_combination!r} "
            "needs teachers with the student's: take 'sum', or other teachers"
        )
    if args.packing or args.eval_packing or args.padding_free:
        raise ValueError(
            f"packing and padding_free join rows, but {name} reads them in its own tokens: set both to False"
        )
    if args.has_hidden:
        raise ValueError(f"hidden_weight compares token by token, but {name} has another tokenizer: set it to 0")


def refuse_other_layers(saved: LayerMapping, mine: LayerMapping) -> None:
    """Raises `ValueError` for a checkpoint whose student has learned from other layers."""
    if saved != mine:
        raise ValueError(
            f"the student of the checkpoint learns from other layers ({describe_mapping(saved)}) than this one "
            f"({describe_mapping(mine)}): resume with the settings that it began with"
        )


def refuse_layers(
    layers: Any, student: str | PreTrainedModel, teachers: Mapping[str, str | PreTrainedModel], args: KDConfig
) -> None:
    """Raises `ValueError` for a mapping between layers that student or teacher does not have; nothing is loaded."""
    try:
        mine = text_config(student, args)
        theirs = [
            mine if teacher == BASE else text_config(teacher, args, is_teacher=True) for teacher in teachers.values()
        ]
    except (OSError, ValueError):
        return  # a folder of adapters; and what cannot be loaded, which loading says better
    for config in theirs:
        if layers != "cka":
            layer_mapping(layers, num_layers(mine), num_layers(config))


def has_load_balancing(student: PreTrainedModel, args: KDConfig) -> bool:
    """Whether the student's load-balancing loss is known; `ValueError` if not, and `router_aux_loss_coef` asks for it.

    A configuration may name a coefficient where its model has no such loss (Llama 4), or no experts (Doge).
    """
    try:
        check_load_balancing(student, "student")
    except ValueError as error:
        if args.router_aux_loss_coef is not None:
            raise
        logger.warning("trained without a load-balancing loss: %s", error)
        return False
    return True


def refuse_batch(
    batch: Mapping[str, Any], prefix: str, num_ids: int, vocab_size: int, pad_token_id: int | None
) -> None:
    """Raises `ValueError` for a batch that would be trained on otherwise than it says.

    Args:
        batch: from a collator; `prefix` stands before the names of what one side reads.
        num_ids (`int`): token ids that can be read; what the attention mask leaves out, and padding, may be any.
        vocab_size (`int`): labels are -100 or below this.
    """
    names = [prefix + name for name in ("input_ids", "labels", "attention_mask")]
    ids, labels, mask = (batch.get(name) for name in names)
    if ids is None or labels is None:
        raise ValueError(f"a batch has no {names[0 if ids is None else 1]!r}: the data collator has to make them")
    if f"{prefix}shift_labels" in batch:
        raise ValueError("a batch has 'shift_labels', but labels are shifted by the trainer: leave them out")
    if labels.dim() != 2 or labels.shape != ids.shape:
        raise ValueError(
            f"a batch has {names[1]} of shape {tuple(labels.shape)} and {names[0]} of shape {tuple(ids.shape)}: both "
            "have to be (B, T), a label for each token"
        )
    bad_labels = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    bad_ids = (ids < 0) | (ids >= num_ids)
    if pad_token_id is not None:
        bad_ids = bad_ids & (ids != pad_token_id)
    if mask is not None and mask.shape == ids.shape:
        bad_ids = bad_ids & (mask != 0)
    # One look at both: label_positions waits for the device anyway.
    if len(strange := torch.stack([bad_labels, bad_ids]).nonzero()):
        side, *place = strange[0].tolist()
        value = (labels, ids)[side][tuple(place)].item()
        limits = f"-100 and 0 to {vocab_size - 1} are" if side == 0 else f"0 to {num_ids - 1} are"
        raise ValueError(f"a batch has the {prefix}{('label', 'token id')[side]} {value}; {limits} possible")


def refuse_vision(model: str | PreTrainedModel, processing_class: Any) -> None:
    """Raises `ValueError` for a vision-language model or processor."""
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class has to be a tokenizer, got {type(processing_class).__name__}; hf_distill trains "
            "language models on text only, vision-language processors are not supported"
        )
    if not isinstance(model, str) and getattr(model.config, "vision_config", None) is not None:
        raise ValueError(f"{type(model).__name__} is a vision model; hf_distill trains language models on text only")


def refuse_output_dir(
    student: str | PreTrainedModel, teachers: Mapping[str, Any], args: KDConfig, *, has_adapters: bool
) -> None:
    """Raises `ValueError` for an output directory that cannot be written to, or that a model of the run lies in."""
    in_use = {"the student": _name(student)}
    in_use |= {f"the teacher {name}": _name(teacher) for name, teacher in teachers.items() if teacher != BASE}
    refuse_folder(str(args.output_dir), in_use)
    if has_adapters:  # which are of no use without it
        refuse_moving(str(args.output_dir), {"the student": _name(student) or ""})


def refuse_prompt_learning(peft_config: Any, *models: Any) -> None:
    """Raises `ValueError` for prompt tuning and its kin, whose virtual tokens shift every position of a row."""
    for config in (peft_config, *(getattr(model, "active_peft_config", None) for model in models)):
        if config is not None and config.is_prompt_learning:
            raise ValueError(f"{type(config).__name__} shifts every position; use LoRA or another adapter")


def refuse_sharding(args: KDConfig, teacher_model: Any) -> None:
    """Raises `ValueError` for ways to spread a run over devices that KDTrainer does not train in."""
    # What accelerate will read: the settings, or else what `accelerate launch` has left in the environment.
    is_fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_fsdp:
        _check_fsdp(args.fsdp_plugin_args or _launched_fsdp())
    if is_deepspeed_zero3_enabled():
        zero = deepspeed_config()["zero_optimization"]  # pyright: ignore[reportOptionalSubscript]
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "save_model() would write no model: set stage3_gather_16bit_weights_on_model_save in the DeepSpeed "
                "configuration (zero3_save_16bit_model in one of accelerate's) to true"
            )
    if "sharded" in (args.teacher_device or "") and not (is_fsdp or is_deepspeed_zero3_enabled()):
        raise ValueError("teacher_device='sharded' needs FSDP2 or ZeRO-3, which split the student as well")
    if "sharded" in (args.teacher_device or "") and args.teacher_combination == "route":
        raise ValueError("a sharded teacher has to be asked by all processes at once: take no 'route'")
    listed = teacher_model.values() if isinstance(teacher_model, Mapping) else teacher_model
    listed = listed if isinstance(listed, Iterable) and not isinstance(listed, str) else [listed]
    if BASE in list(listed) and (is_fsdp or is_deepspeed_zero3_enabled()):
        raise ValueError("teacher_model='base' needs a student that is not split: use DDP or ZeRO-2, or pass its name")
    parallelism = args.parallelism_config
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        parallelism = ParallelismConfig()
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism are not supported: the teacher reads whole rows")


def _launched_fsdp() -> dict[str, Any]:
    version = int(os.environ.get("FSDP_VERSION", "1"))
    return {
        "fsdp_version": version,
        "state_dict_type": os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),
        "cpu_ram_efficient_loading": os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true",
    }


def _check_fsdp(settings: dict[str, Any]) -> None:
    if settings["fsdp_version"] != 2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version to 2 (accelerate_configs/fsdp2.yaml)")
    if settings["state_dict_type"] != "FULL_STATE_DICT":
        raise ValueError("save_model() would write no model: set fsdp_state_dict_type to FULL_STATE_DICT")
    if settings["cpu_ram_efficient_loading"]:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading (the default of accelerate launch) reads weights on rank 0 alone, and the "
            "other processes would have a teacher without any: set it to false"
        )


def refuse_lost_processes(args: KDConfig) -> None:
    """Raises `ValueError` where several processes were started that know nothing of each other, or another engine."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and "MASTER_ADDR" in os.environ and started == 1:
        logger.warning(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for several on the CPU start "
            "with torchrun --nproc_per_node and set use_cpu=True"
        )
    if started > 1 and args.world_size == 1:
        raise ValueError(
            f"{started} processes were started, but each of them would train alone: without a GPU set use_cpu=True "
            "(DDP or ZeRO; FSDP needs GPUs)"
        )
    if (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true") and args.use_cpu:
        raise ValueError(
            "FSDP and use_cpu=True exclude each other, accelerate would take DDP instead: on CPUs take DDP or ZeRO"
        )


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


def check_lengths(trainer: Any, dataset: AnyDataset) -> None:
    """Raises `ValueError` for prepared rows that are longer than the table of positions of a model that reads them."""
    if not isinstance(dataset, Dataset):
        return
    models = {"student": trainer.student}
    if not any(f"teacher_{name}" in dataset.column_names for name in ("input_ids", "0_input_ids")):  # texts of its own
        models |= {f"teacher {name}": causal_lm(side.model) for name, side in trainer.teacher_set.local().items()}
    limit = min((limit for model in models.values() if (limit := num_positions(model))), default=None)
    cut = None if (trainer.args.dataset_kwargs or {}).get("skip_prepare_dataset") else trainer.args.max_length
    if limit is None or (cut is not None and cut <= limit):
        return
    length = longest_text(dataset)
    for name, model in models.items():
        with trainer.trying_out():
            check_length(model, name, length)


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
        return num_token_ids(causal_lm(model))
    return text_config(model, args).vocab_size


def as_it_came(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: KDConfig) -> AsItCame:
    """A student's own settings, before it is loaded; a padding token that is asked for is one of them."""
    config = text_config(model, args)
    if isinstance(model, str):
        try:
            revision = keywords(args.model_init_kwargs).get("revision") or "main"
            generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # it has none: transformers makes one of the model's configuration
            generation_config = None
    else:
        generation_config = getattr(causal_lm(model), "generation_config", None)
    asked = args.pad_token is not None or args.chat_template_path is not None
    return AsItCame(config, generation_config, tokenizer, ["pad_token_id"] if asked else [])


def text_config(model: str | PreTrainedModel, args: KDConfig, *, is_teacher: bool = False) -> PreTrainedConfig:
    """The configuration of a student or a teacher, loaded or not."""
    if not isinstance(model, str):
        return causal_lm(model).config.get_text_config()
    kwargs: Any = {"trust_remote_code": args.trust_remote_code}
    if is_teacher:
        kwargs |= keywords(args.teacher_model_init_kwargs)
    else:
        kwargs["revision"] = keywords(args.model_init_kwargs).get("revision")
    return AutoConfig.from_pretrained(model, **kwargs).get_text_config()


def teacher_tokenizer(model: str | PreTrainedModel, args: KDConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with the teacher, or None, with a warning, where there is none."""
    if tokenizer := _own_tokenizer(model, args):
        return tokenizer
    logger.warning(
        "the teacher (%s) comes without a tokenizer: its vocabulary is taken to be the student's. Pass "
        "teacher_processing_class to have that checked",
        public_name(model),
    )
    return None


def _own_tokenizer(model: str | PreTrainedModel, args: KDConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved with a teacher, if there is one."""
    name = _name(model)
    if not name or name == BASE:
        return None
    try:
        return _load_tokenizer(name, args.teacher_model_init_kwargs, args)
    except (OSError, ValueError):
        return None


def _name(model: str | PreTrainedModel) -> str | None:
    return model if isinstance(model, str) else model.config.name_or_path


def _load_tokenizer(name: str, init_kwargs: Any, args: KDConfig) -> PreTrainedTokenizerBase:
    if os.path.isdir(name) and not any(part in file for file in os.listdir(name) for part in TOKENIZER_FILES):
        raise OSError(f"{name} has no tokenizer")  # transformers would make an empty one
    revision = (init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
