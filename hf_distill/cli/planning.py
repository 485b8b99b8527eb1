"""The commands `plan kd`, `plan kv` and `plan skd`: does a run fit, and what would make it fit."""

import json
import sys
from collections.abc import Callable
from functools import partial

from rich.console import Console
from trl import ModelConfig, get_quantization_config

from hf_distill.cli.arguments import KDArguments, PlanArguments, PlannedKD, PlannedKV, PlannedSKD
from hf_distill.cli.training import init_kwargs, lora_config
from hf_distill.planning import Machine, Plan, parse_size, plan_run
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig


def plan_kd(
    arguments: PlannedKD, args: KDConfig, model_config: ModelConfig, options: PlanArguments
) -> Callable[[], None]:
    """Plans a run of `kd`; returns what prints the plan, which exits with 1 if the run does not fit."""
    if arguments.stage is not None:
        raise ValueError("--stage restores layers, which no configuration has: plan the restored model by its folder")
    return partial(show, _planned(arguments, args, model_config, options), options)


def plan_kv(
    arguments: PlannedKV, args: KVProjectionConfig, model_config: ModelConfig, options: PlanArguments
) -> Callable[[], None]:
    """Plans a run of `kv`."""
    return partial(show, _planned(arguments, args, model_config, options), options)


def plan_skd(
    arguments: PlannedSKD, args: SpeculativeKDConfig, model_config: ModelConfig, options: PlanArguments
) -> Callable[[], None]:
    """Plans a run of `skd`."""
    plan = _planned(arguments, args, model_config, options, teacher_prompt_tokens=arguments.max_prompt_length)
    return partial(show, plan, options)


def _planned(
    arguments: KDArguments, args: KDConfig, model_config: ModelConfig, options: PlanArguments,
    teacher_prompt_tokens: int | None = None,
) -> Plan:  # fmt: skip
    args.model_init_kwargs = init_kwargs(args, model_config)
    teachers = arguments.teacher_model
    return plan_run(
        arguments.model, [teachers] if isinstance(teachers, str) else teachers, args,
        peft_config=lora_config(model_config), quantization_config=get_quantization_config(model_config),
        machine=Machine(
            parse_size(options.gpu), options.gpus, options.engine, parse_size(options.reserve) or 0,
            "cpu" if args.use_cpu else "cuda",
        ),
        row_tokens=options.row_tokens, prompt_tokens=options.prompt_tokens,
        teacher_prompt_tokens=teacher_prompt_tokens, label_share=options.label_share,
        picture_tokens=options.picture_tokens, teacher_picture_tokens=options.teacher_picture_tokens,
    )  # fmt: skip


def show(plan: Plan, options: PlanArguments) -> None:
    """Prints a plan; exits with 1 if the run does not fit."""
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        Console().print(plan, crop=False)
    if plan.fits is False:
        sys.exit(1)
