"""The commands `doctor kd`, `doctor kv` and `doctor skd`: what would go wrong, before the run."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from trl import ModelConfig

from hf_distill.cli.arguments import DoctorArguments, KVArguments, SKDArguments, StagedArguments
from hf_distill.cli.training import trainer_arguments, written_arguments
from hf_distill.diagnosis import Diagnosis, diagnose
from hf_distill.planning import parse_size
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig


def doctor_kd(
    arguments: StagedArguments, args: KDConfig, model_config: ModelConfig, options: DoctorArguments
) -> Callable[[], None]:
    """Examines a run of `kd`; returns what prints the findings, which exits with 1 if one is a failure."""
    if arguments.stage is not None:
        raise ValueError("--stage restores layers into a folder: examine the restored model by its folder")
    return _examined(KDTrainer, trainer_arguments(arguments, args, model_config), options)


def doctor_kv(
    arguments: KVArguments, args: KVProjectionConfig, model_config: ModelConfig, options: DoctorArguments
) -> Callable[[], None]:
    """Examines a run of `kv`."""
    return _examined(KVProjectionTrainer, trainer_arguments(arguments, args, model_config), options)


def doctor_skd(
    arguments: SKDArguments, args: SpeculativeKDConfig, model_config: ModelConfig, options: DoctorArguments
) -> Callable[[], None]:
    """Examines a run of `skd`."""
    return _examined(SpeculativeKDTrainer, written_arguments(arguments, args, model_config), options)


def _examined(
    trainer_class: type[HardLabelTrainer], arguments: dict[str, Any], options: DoctorArguments
) -> Callable[[], None]:
    found = diagnose(trainer_class, num_rows=options.rows, memory=parse_size(options.gpu), **arguments)
    return partial(show, found, options)


def show(found: Diagnosis, options: DoctorArguments) -> None:
    """Prints findings; exits with 1 if one is a failure."""
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(found)
    if found.fails:
        sys.exit(1)
