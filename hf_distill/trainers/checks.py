"""The checks of the trainers at construction, and their messages."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from accelerate import ParallelismConfig
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled

from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import describe_mapping, layer_mapping
from hf_distill.metric_names import metric_name, more_is_better
from hf_distill.modeling import causal_lm, check_length, check_load_balancing, num_layers, num_positions
from hf_distill.named import name_of, revision_of, sees, student_config
from hf_distill.saving import AsItCame, refuse_folder, refuse_moving
from hf_distill.store.hub import CACHE
from hf_distill.teachers import WritingTeacher
from hf_distill.teachers.columns import AnyDataset
from hf_distill.teachers.opening import is_base, teacher_config
from hf_distill.token_rows import longest_text
from hf_distill.trainers.hard_label_config import HardLabelConfig

logger = logging.getLogger(__name__)


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, AnyDataset]:
    """All datasets by the name that messages call them."""
    if train_dataset is None:
        raise ValueError("train_dataset is missing")
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    return {"train": train_dataset, **{name: data for name, data in evaluation.items() if data is not None}}


def check_best_metric(args: HardLabelConfig, eval_dataset: Any, metrics: Iterable[str], *, is_open: bool) -> None:
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


def refuse_row_columns(dataset: AnyDataset, name: str, args: Any) -> None:
    """Raises `ValueError` where a column for the teachers is missing or could not be followed."""
    columns, routes = set(next(iter(dataset))), args.teacher_combination == "route"
    naming = ["teacher_index"] if args.skips_preparation else ["teacher", "teacher_index"]
    if routes and not columns & {*naming}:
        raise ValueError(f"teacher_combination='route' needs a column {naming[0]!r} in the {name} dataset")
    own = columns & {"teacher_input_ids", "teacher_labels"}
    if len(own) == 1 or (args.skips_preparation and not own and "teacher_prompt" in columns):
        raise ValueError(
            f"the {name} dataset needs what the teacher reads as 'teacher_input_ids' and 'teacher_labels', or, without "
            "skip_prepare_dataset, as 'teacher_prompt'"
        )
    found = columns & {"teacher_prompt", "teacher_input_ids"} or (routes and {"teacher"})
    if found and args.joins_rows:
        raise ValueError(f"packing and padding_free join rows, and would lose {sorted(found)[0]!r}: set both to False")


def refuse_packed_evaluation(name: str, args: Any) -> None:
    """Raises `ValueError` for held-out rows that are packed for batches that do not keep them apart."""
    keeps_apart = args.packing or args.padding_free or args.packing_strategy == "wrapped"
    if name != "train" and args.eval_packing and not keeps_apart:
        raise ValueError(
            "eval_packing without packing: TRL's batches would let held-out rows of one sequence see each other; set "
            "packing=True, too, or eval_packing=False"
        )


def one_width_each(sides: Iterable[set[int]], what: str, setting: str) -> list[int]:
    """The widths of the mapped layers of student and teacher; `ValueError` for several widths of one side."""
    for name, found in zip(("student", "teacher"), sides, strict=True):
        if len(found) > 1:
            raise ValueError(
                f"the {name}'s mapped layers have {what} of widths {sorted(found)}: choose others with {setting}"
            )
    return [width for (width,) in sides]


def saved_mapping(mappings: Mapping[str, LayerMapping], name: str, mine: LayerMapping, layers: Any) -> LayerMapping:
    """A checkpoint's layer mapping of this name, or `mine` without one.

    Raises:
        `ValueError`: its student has learned from other layers than `mine`, which the setting `layers` names.
    """
    saved = mappings.get(name, mine)
    if layers != "cka" and saved != mine:
        raise ValueError(
            f"the student of the checkpoint learns from other layers ({describe_mapping(saved)}) than this one "
            f"({describe_mapping(mine)}): resume with the settings that it began with"
        )
    return saved


def refuse_layers(layers: Any, student: str | PreTrainedModel, teachers: Mapping[str, Any], args: Any) -> None:
    """Raises `ValueError` for a mapping between layers that student or teacher does not have; nothing is loaded."""
    try:
        mine = student_config(student, args)
        theirs = [mine if is_base(teacher) else teacher_config(teacher, args) for teacher in teachers.values()]
    except (OSError, ValueError):
        return  # a folder of adapters; and what cannot be loaded, which loading says better
    for config in theirs:
        if layers != "cka":
            layer_mapping(layers, num_layers(mine), num_layers(config))


def has_load_balancing(student: PreTrainedModel, args: HardLabelConfig) -> bool:
    """True if the student's load-balancing loss is known; `ValueError` if not, and `router_aux_loss_coef` asks for it.

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


def refuse_processing_class(processing_class: Any) -> None:
    """Raises `ValueError` for what is neither a tokenizer nor a processor of pictures and texts."""
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        raise ValueError(
            f"processing_class has to be a tokenizer, or a processor of pictures and texts, got "
            f"{type(processing_class).__name__}"
        )


def refuse_sight(trainer: str, models: Mapping[str, Any], processing_class: Any, args: Any, *, pictures: bool) -> None:
    """Raises `ValueError` for pictures, and models that read them, in a `trainer` that works on text alone."""
    known = {name: model for name, model in models.items() if isinstance(model, str | nn.Module) and not is_base(model)}
    seeing = [name for name, model in known.items() if sees(model, None, args.trust_remote_code)]
    if pictures or seeing or isinstance(processing_class, ProcessorMixin):
        what = "rows with pictures" if pictures else f"vision-language models ({', '.join(seeing) or 'a processor'})"
        raise ValueError(f"{trainer} works on text alone, and does not take {what}: take KDTrainer")


def refuse_output_dir(
    student: str | PreTrainedModel, teachers: Mapping[str, Any], args: HardLabelConfig, *, has_adapters: bool
) -> None:
    """Raises `ValueError` for an output directory that cannot be written to, or that a model of the run lies in."""
    in_use = {"the student": name_of(student)}
    in_use |= {f"the teacher {name}": name_of(teacher) for name, teacher in teachers.items() if not is_base(teacher)}
    in_use = {role: name.removeprefix(CACHE) if name else name for role, name in in_use.items()}
    refuse_folder(str(args.output_dir), in_use)
    if has_adapters:  # which are of no use without it
        refuse_moving(str(args.output_dir), {"the student": name_of(student) or ""})


def refuse_prompt_learning(peft_config: Any, *models: Any) -> None:
    """Raises `ValueError` for prompt tuning and its kin, whose virtual tokens shift every position of a row."""
    for config in (peft_config, *(getattr(model, "active_peft_config", None) for model in models)):
        if config is not None and config.is_prompt_learning:
            raise ValueError(f"{type(config).__name__} shifts every position; use LoRA or another adapter")


def refuse_sharding(args: HardLabelConfig) -> None:
    """Raises `ValueError` for ways to spread a run over devices that the trainers do not train in."""
    if _is_fsdp(args):
        _check_fsdp(args.fsdp_plugin_args or _launched_fsdp())
    if is_deepspeed_zero3_enabled():
        zero = (deepspeed_config() or {}).get("zero_optimization", {})
        if not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "save_model() would write no model: set stage3_gather_16bit_weights_on_model_save in the DeepSpeed "
                "configuration (zero3_save_16bit_model in one of accelerate's) to true"
            )
    parallelism = args.parallelism_config
    if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        parallelism = ParallelismConfig()
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism are not supported: the teacher reads whole rows")


def refuse_teacher_layouts(args: Any, *, has_base: bool) -> None:
    """Raises `ValueError` for teachers that would have to be split, or not, otherwise than the student."""
    splits = splits_weights(args)
    if "sharded" in (args.teacher_device or ""):
        if not splits:
            raise ValueError("teacher_device='sharded' needs FSDP2 or ZeRO-3, which split the student as well")
        if args.teacher_combination == "route":
            raise ValueError("a sharded teacher has to be asked by all processes at once: take no 'route'")
    if has_base and splits:
        raise ValueError("teacher_model='base' needs a student that is not split: use DDP or ZeRO-2, or pass its name")


def splits_weights(args: HardLabelConfig) -> bool:
    """True if each process has a part of the weights, and gathers them layer by layer."""
    return _is_fsdp(args) or is_deepspeed_zero3_enabled()


def _is_fsdp(args: HardLabelConfig) -> bool:
    # The source that accelerate will read: the settings, or else what `accelerate launch` has left in the environment.
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


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


def refuse_lost_processes(args: HardLabelConfig) -> None:
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
    if _is_fsdp(args) and args.use_cpu:
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


def check_lengths(
    readers: Sequence[tuple[Any, ...]],
    dataset: AnyDataset,
    args: Any,
    trying_out: Callable[[], AbstractContextManager[None]],
) -> None:
    """Raises `ValueError` for prepared rows that are longer than the table of positions of a model that reads them.

    Args:
        readers: name and model of the student, then of the teachers that read its rows.
        trying_out (`Callable`): a context in which the student is whole; entered only where a model is tried.
    """
    if not isinstance(dataset, Dataset):
        return
    has_own = "teacher_input_ids" in dataset.column_names  # which the teachers read
    for column, part in {
        "input_ids": readers[:1] if has_own else readers,
        "teacher_input_ids": readers[1:] if has_own else [],
    }.items():
        limit = min((limit for _, model, *_ in part if (limit := num_positions(model))), default=None)
        cut = None if args.skips_preparation or column != "input_ids" else args.max_length
        if limit is None or (cut is not None and cut <= limit):
            continue
        length, row = longest_text(dataset, column)
        with trying_out():
            for name, model, *_ in part:
                remedy = "shorten it" if column != "input_ids" else f"set max_length to at most {num_positions(model)}"
                text = f"row {row} of the prepared rows"
                check_length(model, name, length, text, f"{remedy}, or set drop_long_rows=True")


def as_it_came(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: HardLabelConfig) -> AsItCame:
    """A student's own settings, before it is loaded; a padding token that is asked for is one of them."""
    config = student_config(model, args)
    if isinstance(model, str):
        try:
            revision = revision_of(args.model_init_kwargs) or "main"
            generation_config = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # it has none: transformers makes one of the model's configuration
            generation_config = None
    else:
        generation_config = getattr(causal_lm(model), "generation_config", None)
    asked = args.pad_token is not None or args.chat_template_path is not None
    return AsItCame(config, generation_config, tokenizer, ["pad_token_id"] if asked else [])


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, teacher: WritingTeacher) -> list[int]:
    """The tokens that end a text: the tokenizer's, the teacher's, and those that the student's generation knows."""
    found = [tokenizer.eos_token_id, getattr(student.generation_config, "eos_token_id", None), *teacher.eos_token_ids]
    ids = {int(i) for entry in found if entry is not None for i in (entry if isinstance(entry, list) else [entry])}
    if not ids:
        raise ValueError("neither tokenizer nor models have an end-of-sequence token: set tokenizer.eos_token")
    return sorted(ids)
