"""Settings of `HardLabelTrainer`, which all trainers share, and what reads settings."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available
from trl import SFTConfig

from hf_distill.metric_names import more_is_better
from hf_distill.trainers.setting_types import require_at_least, take_types

# The least values of numbers that transformers and TRL would take as they come. A row of one token predicts nothing.
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(
        ("loss_chunk_size", "dataset_num_proc", "eval_accumulation_steps", "dataloader_prefetch_factor"), 1
    ),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps"), 0.0),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "eval_delay"), 0.0),
    **dict.fromkeys(("neftune_noise_alpha", "router_aux_loss_coef"), 0.0),
    "max_length": 2,
    "max_steps": -1,
}
# Strategies of packing for rows that do not fit; the last is TRL's older name of bfd_split.
_PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped", "bfd-requeue")


def keywords(setting: dict[str, Any] | str | None) -> dict[str, Any]:
    """A setting that is a dict or None, such as `model_init_kwargs`, as a dict.

    The types of these fields allow text, because command lines give JSON, which is read at construction.
    """
    assert not isinstance(setting, str), f"{setting!r} was not read at construction"
    return setting or {}


def checkpointing(enabled: bool) -> dict[str, bool]:
    """The setting of gradient checkpointing by its name, which newer transformers change and warn of the old one."""
    names = {field.name for field in fields(SFTConfig)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": enabled}


@dataclass
class HardLabelConfig(SFTConfig):
    """Settings of `HardLabelTrainer`: every field of `trl.SFTConfig`, and those that keep a run exact.

    Raises:
        `ValueError`: a value out of its range, a setting of SFTTrainer's own loss (`loss_type`, label smoothing),
            or Liger's kernels where they cannot run.
    """

    # transformers would replace a non-finite loss by the mean of earlier ones and train on; KDTrainer stops instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to log the mean of earlier losses in place of a non-finite one."}
    )

    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Positions whose logits exist at one time. The default fits 128 MiB on the CPU, 512 on CUDA."
        },
    )

    drop_long_rows: bool = field(
        default=False,
        metadata={
            "help": "Whether rows that are longer than the student or a teacher has positions are dropped, with a "
            "count. By default they are an error, unless rotary embeddings read on. max_length cuts rows before."
        },
    )

    freeze_vision_tower: bool = field(
        default=True,
        metadata={
            "help": "Whether the part of a vision-language student that sees stays as it is. Adapters then go to its "
            "language part alone."
        },
    )

    def __post_init__(self):
        self._check_json()
        take_types(self)
        self._check_numbers()
        is_open = self.greater_is_better is None
        super().__post_init__()
        self._check_dicts()
        self._choose_direction(is_open)
        self._check_rows()
        self._check_inherited()

    @property
    def skips_preparation(self) -> bool:
        """True if rows are token ids that SFTTrainer leaves as they are (`skip_prepare_dataset`)."""
        return bool(keywords(self.dataset_kwargs).get("skip_prepare_dataset"))

    @property
    def joins_rows(self) -> bool:
        """True if several rows become one row of a batch, in training or in evaluations."""
        return bool(self.packing or self.eval_packing or self.padding_free)

    @property
    def keeps_documents_apart(self) -> bool:
        """True if TRL joins the rows of a batch without padding, and the documents do not see each other."""
        return bool(self.padding_free or (self.packing and self.packing_strategy != "wrapped"))

    def _check_json(self) -> None:
        """Raises `ValueError` that names the setting whose JSON is broken; transformers would not say which it is."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} has to be JSON, got {value!r}: {error}") from error

    def _check_dicts(self) -> None:
        """Raises `ValueError` for text that is no JSON object, and for other values that are no dict."""
        examples = {
            "divergence_params": '{"beta": 0.5}',
            "schedule": '{"kd_weight": [1, 0.5]}',
            "teacher_model_init_kwargs": '{"revision": "main"}',
            "model_init_kwargs": '{"revision": "main"}',
            "dataset_kwargs": '{"skip_prepare_dataset": true}',
            "lr_scheduler_kwargs": '{"num_cycles": 2}',
            "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
        }
        for name, example in examples.items():
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} has to be JSON such as '{example}', got {value!r}")
        if bits := [name for name in ("load_in_4bit", "load_in_8bit") if name in keywords(self.model_init_kwargs)]:
            raise ValueError(
                f"model_init_kwargs has {bits[0]!r}, which from_pretrained does not take: pass "
                f"quantization_config=BitsAndBytesConfig({bits[0]}=True) to the trainer (--{bits[0]})"
            )

    def _choose_direction(self, is_open: bool) -> None:
        """Sets whether more of the best model's metric is better; `is_open` if the user has not said it."""
        metric = self.metric_for_best_model
        if is_open and metric is not None:
            self.greater_is_better = more_is_better(metric)
            if self.greater_is_better is None:
                raise ValueError(
                    f"metric_for_best_model={metric!r} does not say by itself whether more of it is better: set "
                    "greater_is_better"
                )
        if self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU and self.greater_is_better:
            self.lr_scheduler_kwargs = {"mode": "max", **keywords(self.lr_scheduler_kwargs)}

    def _check_numbers(self) -> None:
        """Raises `ValueError` for numbers with which nothing could be trained."""
        for name, least in _LEAST.items():
            require_at_least(name, getattr(self, name, None), least)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} has to lie in [0, 1), got {getattr(self, name)}")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs has to be above 0 and finite, got {self.num_train_epochs}")

    def _check_rows(self) -> None:
        """Raises `ValueError` for ways to cut and join rows that TRL would refuse after the models are loaded."""
        if not isinstance(self.dataset_text_field, str) or not self.dataset_text_field:
            raise ValueError(
                f"dataset_text_field has to be the name of a column, such as 'text', got {self.dataset_text_field!r}"
            )
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode has to be keep_start or keep_end, got {self.truncation_mode!r}")
        if self.packing_strategy not in _PACKING_STRATEGIES:
            *names, _ = _PACKING_STRATEGIES
            raise ValueError(f"packing_strategy has to be one of {', '.join(names)}, got {self.packing_strategy!r}")
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("packing joins rows up to max_length, which is None: set it, or packing=False")
        if self.padding_free and not self.packing and self.max_length is not None:
            raise ValueError(
                f"padding_free=True without packing does not cut rows at max_length={self.max_length}: set "
                "packing=True, too, or max_length=None"
            )

    def _check_inherited(self) -> None:
        """Raises `ValueError` for settings of SFTTrainer that do not go together with a teacher."""
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r} is a loss of SFTTrainer's own; KDTrainer trains on hard labels and a "
                "divergence. Remove it and set kd_weight and divergence"
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True saves in the middle of an update, from which no run goes on as it was. "
                "Remove it: SIGTERM makes the trainer finish the update, save a checkpoint and exit"
            )
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} is not supported: the teacher's distribution is "
                "the soft label. Set it to 0 and choose kd_weight and temperature"
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True would round the student's weights at an evaluation outside of a training, and leave "
                    f"them so: remove it, and set {name[:4]}=True to compute in this precision over float32 weights"
                )
        optim = getattr(self.optim, "value", self.optim)
        is_quantised = "torch" not in optim and any(part in optim for part in ("8bit", "bnb", "paged"))
        if is_quantised and not is_bitsandbytes_available():
            raise ValueError(
                f"optim={optim!r} needs bitsandbytes: pip install 'hf_distill[quantization]', or take 'adamw_torch'"
            )
        try:
            Trainer.get_optimizer_cls_and_kwargs(self)
        except ImportError as error:
            raise ValueError(f"optim={optim!r}: {error}") from error
        except (RuntimeError, TypeError, ValueError):
            pass  # it needs the model, or arguments that transformers asks for in its own words
        if self.fp16 and is_on_cpu(self):
            raise ValueError("fp16=True needs a GPU: on a CPU take bf16=True, or bf16=False for float32")
        if self.use_liger_kernel:
            # TRL keeps to Liger's layers, which go together with any loss. They fail only when training starts.
            if not is_liger_kernel_available():
                raise ValueError("use_liger_kernel=True needs Liger: pip install liger-kernel, or remove it")
            if is_on_cpu(self):
                raise ValueError("use_liger_kernel=True needs a GPU: its kernels do not run on the CPU. Remove it")


def is_on_cpu(args: SFTConfig) -> bool:
    """True if a run with these settings computes on the CPU of this machine."""
    return args.device.type == "cpu"
