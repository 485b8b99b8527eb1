"""Settings of `KVProjectionTrainer`."""

import math
from dataclasses import dataclass, field

from hf_distill.kv_projector import PROJECTORS
from hf_distill.losses.feature import FEATURE_LOSSES
from hf_distill.trainers.config import LAYERS_HELP, KDConfig, read_layers
from hf_distill.trainers.hard_label_config import keywords
from hf_distill.trainers.setting_types import require_at_least


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
        default="uniform", metadata={"help": LAYERS_HELP}
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
            "help": "How the teacher's keys and values get the student's width: by their principal components (pca), "
            "which stay fixed, or by a bottleneck (mlp) that is trained with the student.",
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
        self.kv_layers = read_layers("kv_layers", self.kv_layers)
        for name in ("kv_weight", "direction_weight", "magnitude_weight"):
            require_at_least(name, getattr(self, name), 0.0)
        if self.kv_loss == "mercator" and self.direction_weight == self.magnitude_weight == 0:
            raise ValueError(
                "direction_weight and magnitude_weight are both 0, which leaves nothing of the Mercator loss: give one "
                "a weight, or take kv_loss='mse'"
            )
        if not 0 < self.projector_mlp_ratio < math.inf or not 0 <= self.projector_dropout < 1:
            raise ValueError(
                f"projector_mlp_ratio has to be above 0 and projector_dropout in [0, 1), got "
                f"{self.projector_mlp_ratio} and {self.projector_dropout}"
            )
        require_at_least("projector_freeze_after", self.projector_freeze_after, 0)
        if keywords(self.gradient_checkpointing_kwargs).get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing gives keys and values without a gradient: leave "
                "gradient_checkpointing_kwargs out, or set use_reentrant to False"
            )

    @property
    def terms(self) -> tuple[str, ...]:
        return (*super().terms, "kv")
