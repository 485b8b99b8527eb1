"""Settings of the trainers. Each field is explained once, in its `help`, which is also what the command line prints."""

import json
import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig

from hf_distill.kv_projector import PROJECTORS
from hf_distill.layer_mapping import NAMES as LAYER_MAPPINGS
from hf_distill.losses.divergence import DIVERGENCES, TEMPERATURES, check_divergence, check_temperature
from hf_distill.losses.feature import FEATURE_LOSSES, HIDDEN_LOSSES
from hf_distill.metrics import more_is_better
from hf_distill.speculative import RolloutConfig
from hf_distill.teachers.ensemble import COMBINATIONS
from hf_distill.teachers.local import check_quantization

logger = logging.getLogger(__name__)


def checkpointing(enabled: bool) -> dict[str, bool]:
    """The setting of gradient checkpointing by its name, which newer transformers change and warn of the old one."""
    names = {field.name for field in fields(SFTConfig)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": enabled}


@dataclass
class KDConfig(SFTConfig):
    """Settings of `KDTrainer`: every field of `trl.SFTConfig`, and those of the teacher and the distillation loss.

    Raises:
        `ValueError`: a value out of its range, a setting of SFTTrainer's own loss (`loss_type`, label smoothing),
            or Liger's kernels where they cannot run.
    """

    _VALID_DICT_FIELDS = [
        *SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs", "divergence_params", "schedule"
    ]  # fmt: skip
    # What `schedule` may change, beside the parameters of the divergence.
    _SCHEDULED = ("kd_weight", "temperature", "hidden_weight")

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
        metadata={
            "help": "Where the teacher is: a device such as 'cuda:1' or 'cpu'; 'auto' (laid out over the devices that "
            "are no student's), 'paired' (a device of its own for each process), 'offload' (in the CPU's memory, layer "
            "by layer on the student's device) or 'sharded' (split over the processes by FSDP2 or ZeRO-3, as the "
            "student is). Of several teachers one for all, or one for each, as 'cuda:1,cuda:2'. The default is the "
            "student's device."
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
            "choices": ["auto", "aligned", "uld", "error"],
        },
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Weight of the term of inner hidden states; 0 leaves it out."}
    )
    hidden_layers: str = field(  # or the list of pairs itself; the command line's parser knows no such union
        default="uniform",
        metadata={
            "help": "Which teacher layer each student layer learns from: uniform, last, cka, or pairs "
            "[student layer, teacher layer] as JSON such as '[[0, 1], [-1, -1]]'."
        },
    )
    hidden_loss: str = field(
        default="mse",
        metadata={"help": "How hidden states are compared.", "choices": sorted(HIDDEN_LOSSES)},
    )
    projector_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "Learning rate of what brings one side's hidden states, or keys and values, to a width."},
    )
    schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings that change over the training, straight from value to value, which are evenly spaced: "
            'a dict or JSON such as \'{"kd_weight": [1, 0.5], "temperature": [4, 2, 1]}\'. Of kd_weight, temperature, '
            "other weights and parameters of the divergence. Evaluations use the last values."
        },
    )
    loss_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Positions whose logits exist at one time. The default fits 128 MiB on the CPU, 512 on CUDA."
        },
    )

    def __post_init__(self):
        for name in set(self._VALID_DICT_FIELDS) - set(SFTConfig._VALID_DICT_FIELDS):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):  # transformers reads it, and does not say which it is
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} has to be JSON, got {value!r}: {error}") from error
        is_open = self.greater_is_better is None
        super().__post_init__()
        metric = self.metric_for_best_model
        if is_open and metric is not None:
            self.greater_is_better = more_is_better(metric)
            if self.greater_is_better is None:
                raise ValueError(
                    f"metric_for_best_model={metric!r} does not say by itself whether more of it is better: set "
                    "greater_is_better"
                )
        if self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU and self.greater_is_better:
            self.lr_scheduler_kwargs = {"mode": "max", **(self.lr_scheduler_kwargs or {})}  # pyright: ignore
        inherited = {entry.name for entry in fields(SFTConfig)}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in inherited and entry.type is float:
                setattr(self, entry.name, _number(entry.name, value))
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight has to lie in [0, 1], got {self.kd_weight}")
        check_temperature(self.temperature)
        if self.loss_chunk_size is not None and self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size has to be at least 1, got {self.loss_chunk_size}")
        if isinstance(self.divergence_params, str):
            raise ValueError(
                f"divergence_params has to be JSON such as '{{\"beta\": 0.5}}', got {self.divergence_params!r}"
            )
        if self.schedule is not None and not isinstance(self.schedule, dict):
            raise ValueError(f"schedule has to be JSON such as '{{\"kd_weight\": [1, 0.5]}}', got {self.schedule!r}")
        if self.divergence == "taid" and "t" not in {**(self.divergence_params or {}), **(self.schedule or {})}:  # pyright: ignore
            self.schedule = {**(self.schedule or {}), "t": [0.4, 1.0]}  # pyright: ignore[reportGeneralTypeIssues]
        check_divergence(self.divergence, self.divergence_params)  # pyright: ignore[reportArgumentType]
        self._check_schedule()
        if self.teacher_combination not in COMBINATIONS:
            raise ValueError(
                f"teacher_combination has to be one of {', '.join(COMBINATIONS)}, got {self.teacher_combination!r}"
            )
        if self.cross_tokenizer not in ("auto", "aligned", "uld", "error"):
            raise ValueError(f"cross_tokenizer has to be auto, aligned, uld or error, got {self.cross_tokenizer!r}")
        if self.teacher_weights is not None:
            if not isinstance(self.teacher_weights, list | tuple):
                raise ValueError(
                    f"teacher_weights has to be a list with a number for each teacher, got {self.teacher_weights!r}"
                )
            self.teacher_weights = [_number("teacher_weights", weight) for weight in self.teacher_weights]
        weights = self.teacher_weights
        if weights is not None and (not weights or any(not 0 <= w < math.inf for w in weights) or sum(weights) == 0):
            raise ValueError(f"teacher_weights have to be at least 0, not all of them 0, got {weights}")
        if not 0 <= self.hidden_weight < math.inf:
            raise ValueError(f"hidden_weight has to be at least 0 and finite, got {self.hidden_weight}")
        if self.hidden_loss not in HIDDEN_LOSSES:
            raise ValueError(f"hidden_loss has to be one of {', '.join(HIDDEN_LOSSES)}, got {self.hidden_loss!r}")
        self.hidden_layers = _layers("hidden_layers", self.hidden_layers)
        defaults = {entry.name: entry.default for entry in fields(KDConfig)}
        unused = [name for name in ("hidden_layers", "hidden_loss") if getattr(self, name) != defaults[name]]
        if unused and not self.has_hidden:
            logger.warning("%s is not used: hidden_weight is 0", unused[0])
        if not 0 < self.projector_learning_rate < math.inf:
            raise ValueError(
                f"projector_learning_rate has to be above 0 and finite, got {self.projector_learning_rate}"
            )
        check_quantization(self.teacher_quantization)
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

    def _check_schedule(self) -> None:
        ranges = {"kd_weight": (0, 1), "temperature": TEMPERATURES}
        for name, values in (self.schedule or {}).items():  # pyright: ignore[reportAttributeAccessIssue]
            if (
                not isinstance(values, list | tuple)
                or not values
                or not all(isinstance(v, int | float) for v in values)
            ):
                raise ValueError(f"schedule[{name!r}] has to be a list of numbers, from first to last, got {values!r}")
            for value in values:
                if name not in self._SCHEDULED:
                    try:
                        check_divergence(self.divergence, {**(self.divergence_params or {}), name: value})  # pyright: ignore
                    except ValueError as error:
                        raise ValueError(
                            f"schedule has {name!r}: {value}; it takes {', '.join(self._SCHEDULED)} and parameters of "
                            f"the divergence: {error}"
                        ) from error
                elif not ranges.get(name, (0, 1e9))[0] <= value <= ranges.get(name, (0, 1e9))[1]:
                    raise ValueError(f"schedule[{name!r}] has {value}, which is out of the range of {name}")

    @property
    def has_hidden(self) -> bool:
        """Whether inner hidden states are a part of the loss."""
        return bool(self.hidden_weight or "hidden_weight" in (self.schedule or {}))

    def scheduled(self, name: str, progress: float) -> float:
        """The value of a setting at `progress`, from 0 in the first update to 1 in the last."""
        assert isinstance(self.schedule, dict)
        values = self.schedule[name]
        place = min(max(progress, 0.0), 1.0) * (len(values) - 1)
        before = int(place)
        after = min(before + 1, len(values) - 1)
        return values[before] + (place - before) * (values[after] - values[before])


def _number(name: str, value: Any) -> float:
    try:
        return value if isinstance(value, int | float) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has to be a number, got {value!r}") from error


def _layers(name: str, layers: Any) -> Any:
    """The name of a layer mapping or its pairs."""
    if isinstance(layers, str) and layers.startswith("["):
        try:
            layers = json.loads(layers)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} has to be JSON such as '[[0, 1]]', got {layers!r}") from error
    if isinstance(layers, str) and layers not in LAYER_MAPPINGS:
        raise ValueError(
            f"{name} has to be one of {', '.join(LAYER_MAPPINGS)} or pairs such as [[0, 1], [-1, -1]], got {layers!r}"
        )
    return layers


ROLLOUT_SOURCES = ("speculative", "student", "teacher", "dataset")
HARD_SOURCES = ("teacher", "dataset")  # a student's own samples are nobody's hard labels


@dataclass
class SpeculativeKDConfig(KDConfig):
    """Settings of `SpeculativeKDTrainer`: every field of `KDConfig`, and how the training text is written.

    Raises:
        `ValueError`: what `KDConfig` and `RolloutConfig` refuse, an unknown source, packing.
    """

    _VALID_DICT_FIELDS = [*KDConfig._VALID_DICT_FIELDS, "rollout_mix"]

    kd_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the distillation term, in [0, 1]; hard labels get 1 - kd_weight, on tokens of the "
            "sources dataset and teacher only."
        },
    )
    # SFTTrainer would cut rows here; a prompt is never cut, and what does not fit is refused.
    max_length: int | None = field(
        default=None, metadata={"help": "Not used: completions end at max_new_tokens, prompts are never cut."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of a completion at most."})
    draft_length: int = field(
        default=5, metadata={"help": "Tokens that the student drafts before the teacher checks them."}
    )
    adaptive: bool = field(
        default=False,
        metadata={"help": "Whether each row adapts its draft length, up to draft_length, to what was accepted."},
    )
    top_k: int = field(
        default=25, metadata={"help": "A drafted token is kept only among the teacher's top_k most likely ones."}
    )
    min_prob: float = field(
        default=0.0, metadata={"help": "A drafted token is kept only with at least this teacher probability."}
    )
    student_temperature: float = field(default=1.0, metadata={"help": "Temperature of the draft; 0 is greedy."})
    student_top_p: float = field(default=1.0, metadata={"help": "Nucleus of the draft, in (0, 1]."})
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the teacher's corrections; 0 is greedy."}
    )
    teacher_top_p: float = field(default=1.0, metadata={"help": "Nucleus of the teacher's corrections, in (0, 1]."})
    rollout_mix: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Where the training text comes from, drawn per row: shares of speculative, student (on-policy), "
            'teacher (SeqKD) and dataset, as a dict or JSON such as \'{"speculative": 0.7, "dataset": 0.3}\'. The '
            "default is speculative alone."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an update that are written at a time. The default is per_device_train_batch_size; with "
            "small batches and many accumulation steps a larger number is faster."
        },
    )
    rollout_debug: bool = field(
        default=False, metadata={"help": "Whether to log every block: draft, tokens accepted, correction."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.rollout_mix = {"speculative": 1.0} if self.rollout_mix is None else self.rollout_mix
        if (
            not isinstance(self.rollout_mix, dict)
            or not set(self.rollout_mix) <= set(ROLLOUT_SOURCES)
            or any(not isinstance(share, int | float) for share in self.rollout_mix.values())
            or any(not 0 <= share < math.inf for share in self.rollout_mix.values())
            or sum(self.rollout_mix.values()) == 0
        ):
            unknown = set(self.rollout_mix) - set(ROLLOUT_SOURCES) if isinstance(self.rollout_mix, dict) else ()
            raise ValueError(
                f"rollout_mix has to give the sources {', '.join(ROLLOUT_SOURCES)} shares of at least 0, not all of "
                f"them 0, as a dict or JSON, got {self.rollout_mix!r}{' with the unknown ' if unknown else ''}"
                f"{', '.join(map(repr, sorted(unknown)))}"
            )
        lowest = min((self.schedule or {}).get("kd_weight", [self.kd_weight]))  # pyright: ignore
        if lowest < 1 and not any(self.rollout_mix.get(name) for name in HARD_SOURCES):
            raise ValueError(
                f"kd_weight={lowest} leaves {1 - lowest:g} for hard labels, but only the sources "
                f"{' and '.join(HARD_SOURCES)} have any: set kd_weight=1, or give one of them a share of rollout_mix"
            )
        if self.has_hidden:
            raise ValueError("hidden_weight is not possible with rollouts, which keep the last layer only: set it to 0")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ValueError(f"rollout_batch_size has to be at least 1, got {self.rollout_batch_size}")
        if self.draft_length < 1:
            raise ValueError(
                f"draft_length has to be at least 1, got {self.draft_length}; for text of the teacher alone set "
                'rollout_mix={"teacher": 1.0}'
            )
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(
                "packing and padding_free are not possible with rollouts, whose lengths are known only when they are "
                "written: set both to False"
            )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                "skip_prepare_dataset is not possible: prompts are encoded and checked first. Rows that are token ids "
                "already (student_prompt_ids, teacher_prompt_ids, completion_ids) are taken as they are"
            )
        if self.completion_only_loss is False or self.assistant_only_loss:
            raise ValueError(
                "completion_only_loss=False and assistant_only_loss=True are not possible: what is written is trained "
                "on, and nothing else"
            )
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError("group_by_length is not possible: lengths are known only when the texts are written")
        if self.max_length is not None:
            raise ValueError(
                f"max_length={self.max_length} is not used: completions end at max_new_tokens, and prompts are never "
                "cut (a LUPICollator cuts knowledge at max_prompt_length). Remove it"
            )
        self.rollout_config()

    def rollout_config(self, **changes: Any) -> RolloutConfig:
        """The fields that are `RolloutConfig`'s."""
        names = [entry.name for entry in fields(RolloutConfig)]
        return RolloutConfig(**{name: getattr(self, name) for name in names} | changes)


@dataclass
class KVProjectionConfig(KDConfig):
    """Settings of `KVProjectionTrainer`: every field of `KDConfig`, and those of the keys and values.

    Raises:
        `ValueError`: what `KDConfig` refuses, or a value out of its range.
    """

    _SCHEDULED = (*KDConfig._SCHEDULED, "kv_weight")

    kv_weight: float = field(default=1.0, metadata={"help": "Weight of the term of keys and values."})
    kv_loss: str = field(
        default="mercator",
        metadata={"help": "How keys and values are compared.", "choices": sorted(FEATURE_LOSSES)},
    )
    kv_layers: str = field(  # or the list of pairs itself; the command line's parser knows no such union
        default="uniform",
        metadata={
            "help": "Which teacher layer each student layer learns from: uniform, last, cka, or pairs "
            "[student layer, teacher layer] as JSON such as '[[0, 1], [-1, -1]]'."
        },
    )
    direction_weight: float = field(default=1.0, metadata={"help": "Weight of the direction in the Mercator loss."})
    magnitude_weight: float = field(default=0.01, metadata={"help": "Weight of the length in the Mercator loss."})
    kv_positions: str = field(
        default="pre",
        metadata={
            "help": "Keys before or after the rotary embedding, which shifts them with the length of the prompt.",
            "choices": ["pre", "post"],
        },
    )
    projector: str = field(
        default="pca",
        metadata={
            "help": "What brings the teacher's keys and values to the student's width: its principal components, which "
            "stay as they are, or a bottleneck (mlp) that is trained with the student.",
            "choices": sorted(PROJECTORS),
        },
    )
    projector_mlp_ratio: float = field(
        default=1.0, metadata={"help": "Width of the bottleneck, in units of the student's."}
    )
    projector_dropout: float = field(default=0.1, metadata={"help": "Dropout of the bottleneck, in [0, 1)."})
    projector_freeze_after: int | None = field(
        default=None, metadata={"help": "Updates after which the projector stays as it is."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in {
            "kv_loss": FEATURE_LOSSES, "kv_positions": ("pre", "post"), "projector": PROJECTORS
        }.items():  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} has to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.kv_layers = _layers("kv_layers", self.kv_layers)
        for name in ("kv_weight", "direction_weight", "magnitude_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} has to be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.projector_mlp_ratio < math.inf or not 0 <= self.projector_dropout < 1:
            raise ValueError(
                f"projector_mlp_ratio has to be above 0 and projector_dropout in [0, 1), got "
                f"{self.projector_mlp_ratio} and {self.projector_dropout}"
            )
        if self.projector_freeze_after is not None and self.projector_freeze_after < 0:
            raise ValueError(f"projector_freeze_after has to be at least 0, got {self.projector_freeze_after}")
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError(
                "reentrant gradient checkpointing gives keys and values without a gradient: leave "
                "gradient_checkpointing_kwargs out, or set use_reentrant to False"
            )
