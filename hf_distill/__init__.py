"""Distillation of causal language models as drop-in subclasses of TRL trainers."""

from hf_distill.collators import LUPICollator
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.trainers.config import KDConfig, SpeculativeKDConfig
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer

__all__ = ["KDConfig", "KDTrainer", "LUPICollator", "SpeculativeKDConfig", "SpeculativeKDTrainer", "evaluate_fidelity"]
