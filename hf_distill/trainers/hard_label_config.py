"""Settings of `HardLabelTrainer`, which all trainers share, and what reads settings."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from hf_distill.metrics import more_is_better


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

    def __post_init__(self):
        self._check_json()
        is_open = self.greater_is_better is None
        super().__post_init__()
        self._check_dicts()
        self._choose_direction(is_open)
        self._check_numbers()
        self._check_inherited()

    @property
    def skips_preparation(self) -> bool:
        """True if rows are token ids that SFTTrainer leaves as they are (`skip_prepare_dataset`)."""
        return bool(keywords(self.dataset_kwargs).get("skip_prepare_dataset"))

    @property
    def joins_rows(self) -> bool:
        """True if several rows become one row of a batch, in training or in evaluations."""
        return bool(self.packing or self.eval_packing or self.padding_free)

    def _check_json(self) -> None:
        """Raises `ValueError` that names the setting whose JSON is broken; transformers would not say which it is."""
        for name in set(self._VALID_DICT_FIELDS) - set(SFTConfig._VALID_DICT_FIELDS):
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
        inherited = {entry.name for entry in fields(SFTConfig)}
        for entry in fields(self):
            if entry.name not in inherited and entry.type is float:
                setattr(self, entry.name, as_number(entry.name, getattr(self, entry.name)))
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size has to be at least 1, got {self.loss_chunk_size}")

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
        if self.use_liger_kernel:
            # TRL keeps to Liger's layers, which go together with any loss. They fail only when training starts.
            if not is_liger_kernel_available():
                raise ValueError("use_liger_kernel=True needs Liger: pip install liger-kernel, or remove it")
            if self.device.type == "cpu":
                raise ValueError("use_liger_kernel=True needs a GPU: its kernels do not run on the CPU. Remove it")


def as_number(name: str, value: Any) -> float:
    """The value of a setting, text of a command line or a file among them; `ValueError` if it is no number."""
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has to be a number, got {value!r}") from error
