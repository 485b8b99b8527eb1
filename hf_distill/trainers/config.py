"""Settings of the trainers. Each field is explained once, in its `help`, which is also what the command line prints."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from hf_distill.losses.divergence import DIVERGENCES, check_divergence
from hf_distill.teachers.local import check_quantization


@dataclass
class KDConfig(SFTConfig):
    """Settings of `KDTrainer`: every field of `trl.SFTConfig`, and those of the teacher and the distillation loss.

    Raises:
        `ValueError`: a value out of its range, a setting of SFTTrainer's own loss (`loss_type`, label smoothing),
            or Liger's kernels where they cannot run.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "divergence_params"]

    # transformers would replace a non-finite loss by the mean of earlier ones and train on; KDTrainer stops instead.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to log the mean of earlier losses in place of a non-finite one."}
    )

    kd_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the distillation term, in [0, 1]; hard labels get 1 - kd_weight."},
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of both distributions inside the divergence. Hard labels are always at 1."},
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised between the student's and the teacher's next-token distributions.",
            "choices": sorted(DIVERGENCES),
        },
    )
    divergence_params: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the divergence as a dict or JSON, such as '{\"beta\": 0.5}' for jensen_shannon."
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of from_pretrained for a teacher given by name. The dtype is the one it was "
            "saved in unless `dtype` is set here."
        },
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the teacher, and only the teacher, quantised by bitsandbytes: '4bit' (NF4) or '8bit'. "
            "The default keeps its weights as they were saved."
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={"help": "Device of the teacher, such as 'cuda:1' or 'cpu'. The default is the student's device."},
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Positions whose logits exist at one time. The default fits 128 MiB on the CPU, 512 on CUDA."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight has to lie in [0, 1], got {self.kd_weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature has to be above 0 and finite, got {self.temperature}")
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size has to be at least 1, got {self.loss_chunk_size}")
        if isinstance(self.divergence_params, str):
            raise ValueError(
                f"divergence_params has to be JSON such as '{{\"beta\": 0.5}}', got {self.divergence_params!r}"
            )
        check_divergence(self.divergence, self.divergence_params)  # pyright: ignore[reportArgumentType]
        check_quantization(self.teacher_quantization)
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r} is a loss of SFTTrainer's own; KDTrainer trains on hard labels and a "
                "divergence. Remove it and set kd_weight and divergence"
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
