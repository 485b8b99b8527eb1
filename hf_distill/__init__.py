"""Distillation of causal language models as drop-in subclasses of TRL trainers."""

from hf_distill.evaluation import evaluate_fidelity
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.kd import KDTrainer

__all__ = ["KDConfig", "KDTrainer", "evaluate_fidelity"]
