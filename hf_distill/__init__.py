"""Distillation of causal language models as drop-in subclasses of TRL trainers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_distill.callbacks import CosinePhaseCallback
    from hf_distill.collators import LUPICollator
    from hf_distill.evaluation import evaluate_fidelity
    from hf_distill.kv_projector import KVProjector
    from hf_distill.lora import describe_lora
    from hf_distill.pruning import drop_layers, restore_layers
    from hf_distill.trainers.config import KDConfig
    from hf_distill.trainers.hard_label import HardLabelTrainer
    from hf_distill.trainers.hard_label_config import HardLabelConfig
    from hf_distill.trainers.kd import KDTrainer
    from hf_distill.trainers.kv_projection import KVProjectionTrainer
    from hf_distill.trainers.kv_projection_config import KVProjectionConfig
    from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
    from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig

__version__ = "0.1.0"

__all__ = [
    "CosinePhaseCallback",
    "HardLabelConfig",
    "HardLabelTrainer",
    "KDConfig",
    "KDTrainer",
    "KVProjectionConfig",
    "KVProjectionTrainer",
    "KVProjector",
    "LUPICollator",
    "SpeculativeKDConfig",
    "SpeculativeKDTrainer",
    "describe_lora",
    "drop_layers",
    "evaluate_fidelity",
    "restore_layers",
]

# The modules of the public names, as imported above for type checkers. A module is imported when one of its names is
# first asked for: torch and TRL take ten seconds, and `hf-distill --help` needs neither.
_MODULES = {
    "CosinePhaseCallback": "callbacks",
    "HardLabelConfig": "trainers.hard_label_config",
    "HardLabelTrainer": "trainers.hard_label",
    "KDConfig": "trainers.config",
    "KDTrainer": "trainers.kd",
    "KVProjectionConfig": "trainers.kv_projection_config",
    "KVProjectionTrainer": "trainers.kv_projection",
    "KVProjector": "kv_projector",
    "LUPICollator": "collators",
    "SpeculativeKDConfig": "trainers.speculative_kd_config",
    "SpeculativeKDTrainer": "trainers.speculative_kd",
    "describe_lora": "lora",
    "drop_layers": "pruning",
    "evaluate_fidelity": "evaluation",
    "restore_layers": "pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
