"""Distillation of causal language models as drop-in subclasses of TRL trainers."""

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
