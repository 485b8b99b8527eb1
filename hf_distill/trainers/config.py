"""Settings of `KDTrainer`. Each field is explained once, in its `help`, which is also what the command line prints."""

import importlib
import json
import logging
import math
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import SFTConfig

from hf_distill.layer_mapping import NAMES as LAYER_MAPPINGS
from hf_distill.losses.divergence import DIVERGENCES, check_divergence, check_temperature
from hf_distill.losses.feature import HIDDEN_LOSSES
from hf_distill.teachers.ensemble import COMBINATIONS
from hf_distill.teachers.loading import check_quantization
from hf_distill.teachers.placement import check_device_names
from hf_distill.trainers.hard_label_config import HardLabelConfig, keywords
from hf_distill.trainers.schedules import check_schedule, value_at, with_default
from hf_distill.trainers.setting_types import as_number, require_at_least

logger = logging.getLogger(__name__)

CROSS_TOKENIZER = ("auto", "aligned", "uld", "error")
# The help of every setting that maps layers.
LAYERS_HELP = (
    "Which teacher layer each student layer learns from: uniform, last, cka, or pairs "
    "[student layer, teacher layer] as JSON such as '[[0, 1], [-1, -1]]'."
)
# Names that have moved; their old import path works for one release.
_MOVED = {
    "KVProjectionConfig": "hf_distill.trainers.kv_projection_config",
    "SpeculativeKDConfig": "hf_distill.trainers.speculative_kd_config",
    "ROLLOUT_SOURCES": "hf_distill.trainers.speculative_kd_config",
    "HARD_SOURCES": "hf_distill.trainers.speculative_kd_config",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is {_MOVED[name]}.{name} now; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(_MOVED[name]), name)


@dataclass
class KDConfig(HardLabelConfig):
    """Settings of `KDTrainer`: every field of `trl.SFTConfig`, and those of the teacher and the distillation loss.

    Raises:
        `ValueError`: a value out of its range, a setting of SFTTrainer's own loss (`loss_type`, label smoothing),
            or Liger's kernels where they cannot run.
    """

    _VALID_DICT_FIELDS = [
        *SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "divergence_params", "schedule"
    ]  # fmt: skip
    # Settings that `schedule` may change, beside the parameters of the divergence.
    _SCHEDULED = ("kd_weight", "temperature", "hidden_weight")

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
        metadata={
            "help": "Where the teacher is: a device such as 'cuda:1' or 'cpu'; 'auto' (laid out over the devices that "
            "are no student's), 'paired' (a device of its own for each process), 'offload' (in the CPU's memory, layer "
            "by layer on the student's device) or 'sharded' (split over the processes by FSDP2 or ZeRO-3, as the "
            "student is). Of several teachers one for all, or one for each, as 'cuda:1,cuda:2'. The default is the "
            "student's device."
        },
    )
    teacher_served_name: str | None = field(
        default=None,
        metadata={"help": "Of a teacher at an address that serves several models: the name of the one."},
    )
    teacher_logprobs: int | None = field(
        default=None,
        metadata={
            "help": "Of a teacher at an address: the most likely tokens of each position whose log-probabilities are "
            "asked for; -1 is the whole vocabulary. The default is as many as the server gives, up to 64."
        },
    )
    teacher_timeout: float = field(
        default=600.0,
        metadata={
            "help": "Of a teacher at an address: the seconds that requests are tried for. If nothing answers then, the "
            "run saves a checkpoint of its last update and stops."
        },
    )
    teacher_key_variable: str | None = field(
        default=None,
        metadata={"help": "Of a teacher at an address that wants a key: the environment variable that holds it."},
    )
    dataloader_num_workers: int | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": "Processes that make batches. The default is 2 for a teacher at an address, which they ask while "
            "the student trains, and 0 otherwise."
        },
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several teachers, in their order. The default is equal ones."}
    )
    teacher_combination: str = field(
        default="mixture",
        metadata={
            "help": "What several teachers are: one distribution, their weighted mixture; a weighted sum of "
            "divergences, one to each; or route: each row has its own, named in its column 'teacher'.",
            "choices": list(COMBINATIONS),
        },
    )
    cross_tokenizer: str = field(
        default="auto",
        metadata={
            "help": "What is compared with a teacher of another tokenizer: aligned (distributions over the texts that "
            "both can write), uld (probabilities in order of size), or nothing (error). The default is aligned, unless "
            "the vocabularies have next to nothing in common.",
            "choices": list(CROSS_TOKENIZER),
        },
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the term of inner hidden states; 0 leaves it out."}
    )
    hidden_layers: str = field(  # or the list of pairs itself; the command line's parser knows no such union
        default="uniform", metadata={"help": LAYERS_HELP}
    )
    hidden_loss: str = field(
        default="mse",
        metadata={"help": "How hidden states are compared.", "choices": sorted(HIDDEN_LOSSES)},
    )
    projector_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Learning rate of the projectors."},
    )
    schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings that change over the training, straight from value to value, which are evenly spaced: "
            'a dict or JSON such as \'{"kd_weight": [1, 0.5], "temperature": [4, 2, 1]}\'. Of kd_weight, temperature, '
            "other weights and parameters of the divergence. Evaluations use the last values."
        },
    )

    def __post_init__(self):
        self.chose_workers = self.dataloader_num_workers is not None
        self.dataloader_num_workers = self.dataloader_num_workers or 0  # pyright: ignore
        super().__post_init__()
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight has to lie in [0, 1], got {self.kd_weight}")
        check_temperature(self.temperature)
        self._check_divergence()
        self._check_teachers()
        self._check_loading()
        self._check_server()
        self._check_hidden()

    def _check_divergence(self) -> None:
        params, schedule = keywords(self.divergence_params), self.schedule
        assert not isinstance(schedule, str)
        self.schedule = with_default(schedule, self.divergence, params)
        check_divergence(self.divergence, params)
        check_schedule(keywords(self.schedule), self._SCHEDULED, self.divergence, params)

    def _check_teachers(self) -> None:
        if self.teacher_combination not in COMBINATIONS:
            raise ValueError(
                f"teacher_combination has to be one of {', '.join(COMBINATIONS)}, got {self.teacher_combination!r}"
            )
        if self.cross_tokenizer not in CROSS_TOKENIZER:
            *names, last = CROSS_TOKENIZER
            raise ValueError(f"cross_tokenizer has to be {', '.join(names)} or {last}, got {self.cross_tokenizer!r}")
        if self.teacher_weights is None:
            return
        if not isinstance(self.teacher_weights, list | tuple):
            raise ValueError(
                f"teacher_weights has to be a list with a number for each teacher, got {self.teacher_weights!r}"
            )
        self.teacher_weights = weights = [as_number("teacher_weights", weight) for weight in self.teacher_weights]
        if not weights or any(not 0 <= w < math.inf for w in weights) or sum(weights) == 0:
            raise ValueError(f"teacher_weights have to be at least 0, not all of them 0, got {weights}")

    def _check_loading(self) -> None:
        """Raises `ValueError` for a quantisation, a device or loading options that contradict each other."""
        check_quantization(self.teacher_quantization)
        if isinstance(self.teacher_device, torch.device):
            self.teacher_device = str(self.teacher_device)
        check_device_names(self.teacher_device)
        places = {place for place in ("offload", "sharded") if place in (self.teacher_device or "")}
        if self.teacher_quantization is not None and places:
            raise ValueError(
                f"teacher_quantization={self.teacher_quantization!r} and teacher_device={self.teacher_device!r} "
                "exclude each other: remove one of them"
            )
        kwargs = keywords(self.teacher_model_init_kwargs)
        for name, quantization in (("load_in_4bit", "4bit"), ("load_in_8bit", "8bit")):
            if name in kwargs:
                raise ValueError(
                    f"teacher_model_init_kwargs has {name!r}, which from_pretrained does not take: set "
                    f"teacher_quantization={quantization!r} in its place"
                )
        if "torch_dtype" in kwargs:
            raise ValueError("teacher_model_init_kwargs has 'torch_dtype', which is not read: call it 'dtype'")
        for name, setting in (("quantization_config", "teacher_quantization"), ("device_map", "teacher_device")):
            if name in kwargs and (value := getattr(self, setting)) is not None:
                raise ValueError(
                    f"teacher_model_init_kwargs has {name!r}, and {setting}={value!r} says another: remove one of them"
                )

    def _check_server(self) -> None:
        """Raises `ValueError` for settings of a teacher at an address that no server could serve."""
        if self.teacher_logprobs is not None and self.teacher_logprobs != -1:
            require_at_least("teacher_logprobs", self.teacher_logprobs, 1)
        if not 0 < self.teacher_timeout < self.ddp_timeout:
            raise ValueError(
                f"teacher_timeout has to be above 0 and below ddp_timeout={self.ddp_timeout}, after which processes "
                f"give each other up, got {self.teacher_timeout}"
            )
        if self.teacher_key_variable is not None and self.teacher_key_variable not in os.environ:
            raise ValueError(
                "teacher_key_variable has to be the name of an environment variable that is set, and there is none "
                f"of the name that was given ({len(self.teacher_key_variable)} characters long)"
            )

    def _check_hidden(self) -> None:
        require_at_least("hidden_weight", self.hidden_weight, 0.0)
        if self.hidden_loss not in HIDDEN_LOSSES:
            raise ValueError(f"hidden_loss has to be one of {', '.join(HIDDEN_LOSSES)}, got {self.hidden_loss!r}")
        self.hidden_layers = read_layers("hidden_layers", self.hidden_layers)
        defaults = {entry.name: entry.default for entry in fields(KDConfig)}
        unused = [name for name in ("hidden_layers", "hidden_loss") if getattr(self, name) != defaults[name]]
        if unused and not self.has_hidden:
            logger.warning("%s is not used: hidden_weight is 0", unused[0])
        if not 0 < self.projector_learning_rate < math.inf:
            raise ValueError(
                f"projector_learning_rate has to be above 0 and finite, got {self.projector_learning_rate}"
            )

    @property
    def asks_in_workers(self) -> bool:
        """True if teachers are asked about rows in the workers of the data loader."""
        return True

    @property
    def has_hidden(self) -> bool:
        """True if inner hidden states are a part of the loss."""
        return bool(self.hidden_weight or "hidden_weight" in keywords(self.schedule))

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms beside divergence and hard labels, as they are logged."""
        return ("hidden",) if self.has_hidden else ()

    def scheduled(self, name: str, progress: float) -> float:
        """The value of a setting at `progress`, from 0 in the first update to 1 in the last."""
        return value_at(keywords(self.schedule)[name], progress)


def read_layers(name: str, layers: Any) -> Any:
    """The name of a layer mapping or its pairs; `ValueError` for another name, for broken JSON, and for no pairs."""
    if isinstance(layers, str) and layers.startswith("["):
        try:
            layers = json.loads(layers)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} has to be JSON such as '[[0, 1]]', got {layers!r}") from error
    is_list = isinstance(layers, list | tuple)
    if is_list and not layers:
        raise ValueError(f"{name}: layers have to be one pair [student layer, teacher layer] or more, got {layers!r}")
    if is_list and not all(map(_is_pair, layers)):
        raise ValueError(
            f"{name}: layers have to be pairs [student layer, teacher layer] of whole numbers, got {layers!r}"
        )
    if not is_list and not (isinstance(layers, str) and layers in LAYER_MAPPINGS):
        raise ValueError(
            f"{name} has to be one of {', '.join(LAYER_MAPPINGS)} or pairs such as [[0, 1], [-1, -1]], got {layers!r}"
        )
    return layers


def _is_pair(pair: Any) -> bool:
    is_two = isinstance(pair, list | tuple) and len(pair) == 2
    return is_two and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in pair)
