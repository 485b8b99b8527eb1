"""Settings of `SpeculativeKDTrainer`."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hf_distill.speculative import RolloutConfig
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.hard_label_config import keywords
from hf_distill.trainers.setting_types import require_at_least

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
    draft_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that the student drafts before the teacher checks them. The default is 5; for a teacher at "
            "an address, which reads the whole text for every check, it is the rest of the text."
        },
    )
    adaptive: bool = field(
        default=False,
        metadata={"help": "Whether drafts adapt their length, up to draft_length, to what was accepted so far."},
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
    rollout_compile: bool = field(
        default=False,
        metadata={
            "help": "Whether the student's step of one token is compiled, for drafts: once, 10 seconds a layer on one "
            "core. The text stays the same. Not with FSDP or ZeRO-3, nor for layers with windows."
        },
    )
    value_of_privilege: bool | None = field(
        default=None,
        metadata={
            "help": "Whether logging steps measure rollout/value_of_privilege where the teacher has a prompt of its "
            "own; it reads completions once more for that. The default is yes, but no for a teacher at an address."
        },
    )
    rollout_debug: bool = field(
        default=False, metadata={"help": "Whether to log every block: draft, tokens accepted, correction."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_mix()
        self._check_rollouts()
        self._check_sft_settings()
        self.rollout_config()

    def _check_mix(self) -> None:
        self.rollout_mix = {"speculative": 1.0} if self.rollout_mix is None else self.rollout_mix
        if (
            not isinstance(self.rollout_mix, dict)
            or not set(self.rollout_mix) <= set(ROLLOUT_SOURCES)
            or any(not isinstance(share, int | float) or isinstance(share, bool) for share in self.rollout_mix.values())
            or any(not 0 <= share < math.inf for share in self.rollout_mix.values())
            or sum(self.rollout_mix.values()) == 0
        ):
            unknown = set(self.rollout_mix) - set(ROLLOUT_SOURCES) if isinstance(self.rollout_mix, dict) else ()
            raise ValueError(
                f"rollout_mix has to give the sources {', '.join(ROLLOUT_SOURCES)} shares of at least 0, not all of "
                f"them 0, as a dict or JSON, got {self.rollout_mix!r}{' with the unknown ' if unknown else ''}"
                f"{', '.join(sorted(map(repr, unknown)))}"
            )
        lowest = min(keywords(self.schedule).get("kd_weight", [self.kd_weight]))
        if lowest < 1 and not any(self.rollout_mix.get(name) for name in HARD_SOURCES):
            raise ValueError(
                f"kd_weight={lowest} leaves {1 - lowest:g} for hard labels, but only the sources "
                f"{' and '.join(HARD_SOURCES)} have any: set kd_weight=1, or give one of them a share of rollout_mix"
            )

    def _check_rollouts(self) -> None:
        if self.has_hidden:
            raise ValueError("hidden_weight is not possible with rollouts, which keep the last layer only: set it to 0")
        require_at_least("rollout_batch_size", self.rollout_batch_size, 1)
        if self.draft_length is not None and self.draft_length < 1:
            raise ValueError(
                f"draft_length has to be at least 1, got {self.draft_length}; for text of the teacher alone set "
                'rollout_mix={"teacher": 1.0}'
            )

    def _check_rows(self) -> None:
        """Raises `ValueError` for ways to cut and join rows, whose lengths are not known before they are generated."""
        if self.joins_rows:
            raise ValueError(
                "packing and padding_free are not possible with rollouts, whose lengths are known only when they are "
                "written: set both to False"
            )
        if self.max_length is not None:
            raise ValueError(
                f"max_length={self.max_length} is not used: completions end at max_new_tokens, and prompts are never "
                "cut (a LUPICollator cuts knowledge at max_prompt_length). Remove it"
            )

    def _check_sft_settings(self) -> None:
        """Raises `ValueError` for settings of SFTTrainer that speak of texts before they are generated."""
        if self.skips_preparation:
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

    @property
    def asks_in_workers(self) -> bool:
        """False: teachers are asked about what has just been written."""
        return False

    def rollout_config(self, **changes: Any) -> RolloutConfig:
        """The fields that are `RolloutConfig`'s."""
        names = [entry.name for entry in fields(RolloutConfig)]
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        return RolloutConfig(**chosen | changes)

    @property
    def most_rollout_rows(self) -> int:
        """The number of rows that are written at a time, at most."""
        return self.rollout_batch_size or max(self.per_device_train_batch_size, self.per_device_eval_batch_size)

    @property
    def shares(self) -> dict[str, float]:
        """`rollout_mix` as a dict: the share of each source of text."""
        return keywords(self.rollout_mix)
