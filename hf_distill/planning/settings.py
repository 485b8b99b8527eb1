"""The settings of a run as a plan needs them: from the arguments of a trainer, without data, weights or tokenizers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedConfig, Trainer, training_args

from hf_distill.losses.head import default_chunk_size
from hf_distill.losses.objective import Objective
from hf_distill.model_files import is_adapter_folder
from hf_distill.modeling import is_vision_language, num_positions
from hf_distill.planning.batches import Batch
from hf_distill.planning.models import ModelSpec
from hf_distill.speculative import RolloutConfig
from hf_distill.store.hub import CACHE
from hf_distill.store.manifest import Manifest, read_manifest
from hf_distill.teachers import loading
from hf_distill.teachers.remote import is_address
from hf_distill.traffic import ENGINES
from hf_distill.trainers import hard_label_config
from hf_distill.trainers.hard_label_config import HardLabelConfig, keywords
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig

SERVED = 64  # tokens of each position, where nothing says how many a server gives
PROMPT_TOKENS = 512  # of rollouts, where nothing says how long prompts are
OTHER_VOCABULARY = 1.2  # vocabularies that differ by more than this factor are of other tokenizers
BITS = {"4bit": 4, "8bit": 8}


@dataclass(frozen=True)
class TeacherSetting:
    """A teacher: a model with its layout, a store, or the student's own base.

    Args:
        name (`str`): as it was given.
        model ([`ModelSpec`], *optional*): None for what is no model of its own.
        layout (`str`): "device" (the student's), "offload", "sharded", "elsewhere", "base", "store" or "remote".
        manifest ([`Manifest`], *optional*): of a store.
        entries (`int`): the tokens that a server gives of each position; -1 for the whole vocabulary.
    """

    name: str
    model: ModelSpec | None
    layout: str = "device"
    manifest: Manifest | None = None
    entries: int = 0


@dataclass(frozen=True)
class Machine:
    """The devices: `memory` bytes of each (None: not asked), their number, how they share the work."""

    memory: int | None = None
    num: int = 1
    engine: str = "ddp"
    reserve: int = 2**30
    kind: str = "cuda"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine has to be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.num < 1:
            raise ValueError(f"gpus has to be at least 1, got {self.num}")


@dataclass(frozen=True)
class Settings:
    """Everything that a plan depends on; remedies are changes of it."""

    student: ModelSpec
    teachers: tuple[TeacherSetting, ...]
    batch: Batch
    accumulation: int
    objective: Objective
    machine: Machine
    combination: str = "mixture"  # of several teachers
    lora: LoraConfig | None = None
    checkpointing: Mapping[str, Any] | None = None
    mixed: torch.dtype | None = None
    optimizer: tuple[Any, Mapping[str, Any]] = (torch.optim.AdamW, {})
    kv: Mapping[str, Any] | None = None  # layers and settings of the term of keys and values
    hidden: Mapping[str, Any] | None = None
    rollout: RolloutConfig | None = None
    rollout_batch_size: int | None = None
    prompts: tuple[int, int] = (0, 0)
    freezes_tower: bool = True  # of a student that sees
    teacher_pictures: int = 0  # tokens of a row's picture, as teachers read it
    notes: tuple[str, ...] = field(default=())

    @property
    def splits(self) -> bool:
        """True if the engine splits gradients or more."""
        return self.machine.num > 1 and self.machine.engine != "ddp"

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype of mixed precision, where the forward casts weights; engines that split hold them in it."""
        return None if self.splits else self.mixed

    def with_rows(self, rows: int) -> "Settings":
        """The same update in micro-batches of `rows` rows, which divide it."""
        total = self.batch.rows * self.accumulation
        labels = -(-self.batch.labels * rows // self.batch.rows)
        batch = replace(self.batch, rows=rows, labels=labels, padded=self.batch.padded and rows > 1)
        return replace(self, batch=batch, accumulation=total // rows)

    @property
    def rollout_rows(self) -> int:
        """Rows that are written at a time."""
        return min(self.rollout_batch_size or self.batch.rows, self.batch.rows * self.accumulation)


@contextmanager
def without_gpu() -> Iterator[None]:
    """Within it settings for a GPU can be made on a machine without one, and without Liger and bitsandbytes."""
    with (
        patch.object(training_args, "is_torch_bf16_gpu_available", lambda: True),
        patch.object(training_args, "is_torch_tf32_available", lambda: True),
        patch.object(hard_label_config, "is_on_cpu", lambda args: args.use_cpu),
        patch.object(hard_label_config, "is_liger_kernel_available", lambda: True),
        patch.object(loading, "is_bitsandbytes_available", lambda: True),
    ):
        yield


def read_settings(
    model: str,
    teacher_model: Any,
    args: HardLabelConfig,
    *,
    peft_config: PeftConfig | None,
    quantization_config: Any,
    machine: Machine,
    row_tokens: int | None,
    prompt_tokens: int | None,
    teacher_prompt_tokens: int | None,
    label_share: float,
    picture_tokens: int | None = None,
    teacher_picture_tokens: int | None = None,
) -> Settings:
    """The settings of a run, from what its trainer would get.

    Raises:
        `ValueError`: no configuration, no length, adapters that are no LoRA, or settings that contradict each other.
    """
    if not 0 < label_share <= 1:
        raise ValueError(f"label_share has to lie in (0, 1], got {label_share}")
    for name, tokens in (("row_tokens", row_tokens), ("prompt_tokens", prompt_tokens)):
        if tokens is not None and tokens < 1:
            raise ValueError(f"{name} has to be at least 1, got {tokens}")
    if quantization_config is not None and peft_config is None and not is_adapter_folder(model):
        raise ValueError("a student in 4 or 8 bits is trained in adapters: add --use_peft, or leave the bits out")
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise ValueError(f"only LoRA can be planned, got a {type(peft_config).__name__}")
    notes: list[str] = []
    student = student_spec(model, args, quantization_config)
    given = [teacher_model] if isinstance(teacher_model, str) else list(teacher_model or ())
    given = [name for i, name in enumerate(given) if not is_address(name) or not any(map(is_address, given[:i]))]
    layouts = [part.strip() or None for part in (getattr(args, "teacher_device", None) or "").split(",")]
    teachers = tuple(
        teacher_setting(name, args, student, layouts[min(i, len(layouts) - 1)], machine) for i, name in enumerate(given)
    )
    if isinstance(args, SpeculativeKDConfig) and [t.model is None for t in teachers] != [False]:
        raise ValueError("rollouts can be planned with one teacher that is a model, given by name or configuration")
    models = dict(zip([model, *given], [student, *(t.model for t in teachers)], strict=True))
    configs = {name: spec.config() for name, spec in models.items() if spec is not None}
    sizes = [config.get_text_config().vocab_size for config in configs.values()]
    vocab_size = min(sizes)
    if (largest := max(sizes)) > OTHER_VOCABULARY * vocab_size:
        notes.append(
            f"vocabularies of {vocab_size:,} and {largest:,} tokens: with another tokenizer the loss aligns texts, "
            "and its memory is taken as that of the common vocabulary"
        )
    rollout = args.rollout_config() if isinstance(args, SpeculativeKDConfig) else None
    prompt = prompt_tokens or PROMPT_TOKENS
    prompts = prompt, teacher_prompt_tokens or prompt
    pictures = _pictures(args, models, picture_tokens, teacher_picture_tokens)
    batch = _batch(args, row_tokens, prompts[0], label_share, pictures[0], rollout)
    notes += _too_long(model, batch, pictures[1], prompts[1] - prompts[0] if rollout else 0, configs)
    if quantised := [name for name, config in configs.items() if _is_quantised(config)]:
        notes.append(f"the weights of {quantised[0]} are saved quantised: they are counted in their dtype, not in bits")
    if seeing := [name for name, config in configs.items() if is_vision_language(config)]:
        if picture_tokens:
            notes.append("each row is taken to have one picture, and no token of it bears a label")
        else:
            notes.append(
                f"{seeing[0]} reads pictures, and rows of text alone are counted: --picture_tokens, the tokens of the "
                "pictures of the longest row, counts rows with pictures"
            )
    return Settings(
        student=student, teachers=teachers, batch=batch, accumulation=args.gradient_accumulation_steps,
        objective=_objective(args, vocab_size, machine), machine=machine, lora=peft_config,
        combination=getattr(args, "teacher_combination", "mixture"),
        checkpointing=_checkpointing(args), mixed=_mixed(args),
        optimizer=_optimizer(args), kv=_kv(args), hidden=_hidden(args), rollout=rollout,
        rollout_batch_size=getattr(args, "rollout_batch_size", None), prompts=prompts,
        freezes_tower=args.freeze_vision_tower, teacher_pictures=pictures[1], notes=tuple(notes),
    )  # fmt: skip


def student_spec(model: str, args: Any, quantization_config: Any) -> ModelSpec:
    """The student as TRL loads it: in float32 unless `dtype` says another."""
    kwargs = keywords(args.model_init_kwargs)
    bits = next((b for b in (4, 8) if getattr(quantization_config, f"load_in_{b}bit", False)), None)
    dtype = kwargs.get("dtype", "float32")
    if bits is not None and dtype == "float32":
        dtype = "auto"  # what is not quantised
    return ModelSpec(
        model, dtype=None if dtype is None else str(dtype).removeprefix("torch."), bits=bits,
        double_quant=bool(getattr(quantization_config, "bnb_4bit_use_double_quant", False)),
        attention=_attention(kwargs.get("attn_implementation")), options=_options(args, kwargs),
    )  # fmt: skip


def teacher_setting(name: str, args: Any, student: ModelSpec, layout: str | None, machine: Machine) -> TeacherSetting:
    """A teacher by its name, in its layout."""
    if name == "base":
        return TeacherSetting(name, None, "base")
    if is_address(name):
        return TeacherSetting("a server", None, "remote", entries=args.teacher_logprobs or SERVED)
    if name.startswith(CACHE):
        folder = Path(name.removeprefix(CACHE))
        if not folder.is_dir():
            raise ValueError(f"there is no store in {folder}: a plan reads its manifest, so it has to be a folder here")
        return TeacherSetting(name, None, "store", read_manifest(folder))
    kwargs = keywords(args.teacher_model_init_kwargs)
    spec = ModelSpec(
        name, dtype=str(kwargs.get("dtype") or "auto").removeprefix("torch."), bits=BITS.get(args.teacher_quantization),
        double_quant=args.teacher_quantization == "4bit", attention=_attention(kwargs.get("attn_implementation")),
        options=_options(args, kwargs),
    )  # fmt: skip
    if layout in ("offload", "sharded"):
        return TeacherSetting(name, spec, layout)
    # A device that a process has is that of a student, whichever it is: the plan is of the fullest one.
    is_students = layout in ("cuda", *(f"cuda:{i}" for i in range(machine.num)))
    return TeacherSetting(name, spec, "device" if layout is None or is_students else "elsewhere")


def _attention(name: str | None) -> str | None:
    """Flash attention keeps what sdpa keeps, and a plan does not need its package."""
    return "sdpa" if name is not None and name.startswith(("flash", "kernels")) else name


def _options(args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    found = {"trust_remote_code": True} if args.trust_remote_code else {}
    return found | ({"revision": kwargs["revision"]} if kwargs.get("revision") else {})


def _pictures(
    args: Any, models: Mapping[str, ModelSpec | None], tokens: int | None, teacher_tokens: int | None
) -> tuple[int, int]:
    """The tokens of a row's picture, as the student and as teachers read it.

    Raises:
        `ValueError`: rows with pictures that the trainer of these `models` (None for what is none) would refuse.
    """
    for name, number in {"picture_tokens": tokens, "teacher_picture_tokens": teacher_tokens}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} has to be at least 1, got {number}; leave it out for rows of text alone")
    if tokens is None:
        if teacher_tokens is not None:
            raise ValueError("teacher_picture_tokens needs picture_tokens, those of the student")
        return 0, 0
    if isinstance(args, SpeculativeKDConfig | KVProjectionConfig):
        raise ValueError("rollouts, and keys and values, work on text alone: leave picture_tokens out, or plan kd")
    if args.joins_rows:
        raise ValueError(
            "packing and padding_free join rows of text alone: leave picture_tokens out, or set them to False"
        )
    for name, model in models.items():
        if name != "base" and (model is None or not is_vision_language(model.config())):
            raise ValueError(
                f"{name} does not read pictures: leave picture_tokens out, or take a vision-language model"
            )
    return tokens, teacher_tokens or tokens


def _batch(
    args: Any, row_tokens: int | None, prompt: int, label_share: float, pictures: int, rollout: RolloutConfig | None
) -> Batch:
    rows = args.per_device_train_batch_size
    if rollout is not None:
        return Batch(rows, prompt + rollout.max_new_tokens, rows * rollout.max_new_tokens, padded=rows > 1)
    length = row_tokens or args.max_length
    if length is None:
        raise ValueError(
            "max_length is not set, so rows may have any length: set --row_tokens, the tokens of the longest row"
        )
    if length <= pictures:
        raise ValueError(
            f"pictures of {pictures} tokens leave no text in a row of {length}: raise max_length or row_tokens"
        )
    joined = bool(args.padding_free or args.packing)
    labels = max(1, round(rows * (length - 1 - pictures) * label_share))
    return Batch(rows, length, labels, padded=rows > 1 and not joined, packed=joined, pictures=pictures)


def _too_long(model: str, batch: Batch, pictures: int, more: int, configs: Mapping[str, PreTrainedConfig]) -> list[str]:
    """Notes on models that were made for less than the longest row that each would read.

    Teachers read `pictures` tokens of a picture, and a prompt that has `more` tokens. It is not known how many tokens
    a row has in another tokenizer. Texts that share a row begin anew.
    """
    if batch.packed:
        return []
    size = configs[model].get_text_config().vocab_size
    own = batch.with_pictures(pictures).length + more
    notes = []
    for name, config in configs.items():
        limit, length = num_positions(config), batch.length if name == model else own
        smaller, larger = sorted((size, config.get_text_config().vocab_size))
        if limit is not None and length > limit and larger <= OTHER_VOCABULARY * smaller:
            notes.append(
                f"{name} was made for {limit:,} tokens, and rows of {length:,} are planned: the run refuses them if "
                "its positions are a table, and otherwise it reads them poorly"
            )
    return notes


def _objective(args: Any, vocab_size: int, machine: Machine) -> Objective:
    chunk = args.loss_chunk_size or default_chunk_size(torch.device(machine.kind), vocab_size)
    options: dict[str, Any] = {"vocab_size": vocab_size, "chunk_size": chunk, "checked": True}
    if not hasattr(args, "divergence"):
        return Objective(kd_weight=0.0, **options)
    changing = keywords(args.schedule)
    params = keywords(args.divergence_params)
    return Objective(
        kd_weight=args.kd_weight, temperature=args.temperature, divergence=args.divergence, divergence_params=params,
        compiled=not changing.keys() & {"kd_weight", "temperature", *params}, **options,
    )  # fmt: skip


def _checkpointing(args: Any) -> dict[str, Any] | None:
    enabled = getattr(args, "activation_checkpointing", None)
    enabled = args.gradient_checkpointing if enabled is None else enabled
    return {"use_reentrant": False, **keywords(args.gradient_checkpointing_kwargs)} if enabled else None


def _mixed(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _optimizer(args: Any) -> tuple[Any, dict[str, Any]]:
    return Trainer.get_optimizer_cls_and_kwargs(args)


def _kv(args: Any) -> dict[str, Any] | None:
    if not isinstance(args, KVProjectionConfig):
        return None
    names = ("kv_layers", "kv_loss", "kv_positions", "projector", "projector_mlp_ratio")
    return {name: getattr(args, name) for name in names}


def _hidden(args: Any) -> dict[str, Any] | None:
    if not getattr(args, "has_hidden", False):
        return None
    return {"hidden_layers": args.hidden_layers, "hidden_loss": args.hidden_loss}


def _is_quantised(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def parse_size(text: str | int | None) -> int | None:
    """Bytes of "24GB", "24 GiB" or "512MB"; as makers of GPUs count, a GB is 2^30 bytes.

    Raises:
        `ValueError`: no such size.
    """
    if text is None or isinstance(text, int):
        return text
    words = text.strip().upper().replace("IB", "B").removesuffix("B")
    factors = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    try:
        number = float(words[:-1]) * factors[words[-1]] if words and words[-1] in factors else float(words)
    except ValueError as error:
        raise ValueError(f"{text!r} is no size such as 24GB") from error
    if not 2**10 <= number < float("inf"):  # nobody means 24 bytes
        raise ValueError(f"{text!r} is no size such as 24GB")
    return int(number)
