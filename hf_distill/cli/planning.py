"""The commands `plan kd`, `plan kv` and `plan skd`: does a run fit, and what would make it fit."""

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial

from accelerate.utils import convert_bytes
from rich.console import Console
from trl import ModelConfig, get_quantization_config

from hf_distill.cli.arguments import KDArguments, PlanArguments, PlannedKD, PlannedKV, PlannedSKD
from hf_distill.cli.training import init_kwargs, lora_config
from hf_distill.planning import Machine, Plan, parse_size, plan_run
from hf_distill.report import table
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
    )  # fmt: skip


def show(plan: Plan, options: PlanArguments) -> None:
    """Prints a plan; exits with 1 if the run does not fit."""
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print_plan(plan, Console())
    if plan.fits is False:
        sys.exit(1)


def print_plan(plan: Plan, console: Console) -> None:
    """The tables of a plan, for people."""
    highest = max(plan.phases, key=lambda name: plan.phases[name])
    console.print(table(_sizes({**plan.parts, "together": plan.peak}), f"one device at its fullest: {highest}"))
    phases = {**plan.phases, **{f"elsewhere, {name}": size for name, size in plan.elsewhere.items()}}
    console.print(table(_sizes(phases), "the fullest moment of each phase"))
    console.print(table(_counts(plan), "an update on all devices"))
    if plan.stores:
        stores = {name: size for name, size in plan.stores.items() if name != "head"}
        rows = [
            {"store of this teacher": name, "bytes a label-bearing token": f"{n:,.1f}"} for name, n in stores.items()
        ]
        console.print(table(rows, "stores (docs/cache.md)"))
    if plan.remedies:
        rows = [
            {"change": r.name, "with": convert_bytes(r.peak), "fits": "yes" if r.fits else "no", "costs": r.cost,
             "options": r.options}
            for r in plan.remedies
        ]  # fmt: skip
        console.print(table(rows, "changes, each alone, those that cost least first"))
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    console.print(_verdict(plan), highlight=False)


def _verdict(plan: Plan) -> str:
    peak, reserve = convert_bytes(plan.peak), convert_bytes(plan.reserve)
    if plan.memory is None:
        return f"A device needs {peak}, and {reserve} for CUDA itself (--gpu 24GB asks whether it fits)."
    sums = f"{peak} and {reserve} in reserve, of {convert_bytes(plan.memory)}"
    if plan.fits:
        return f"It fits: {sums}."
    best = next((remedy for remedy in plan.remedies if remedy.fits), None)
    if best is not None:
        return f"It does not fit: {sums}. The smallest change that makes it fit: {best.name} ({best.options})."
    if plan.together:
        return f"It does not fit: {sums}. No change alone makes it fit; together these do: {'; '.join(plan.together)}."
    return f"It does not fit: {sums}, and none of these changes makes it fit."


def _sizes(sizes: Mapping[str, int]) -> list[dict[str, str]]:
    return [{"": name, "size": convert_bytes(size)} for name, size in sizes.items() if size]


def _counts(plan: Plan) -> list[dict[str, str]]:
    rows = {name: f"{count:,}" for name, count in plan.counts.items()}
    rows |= {f"FLOPs, {name}": f"{flops:.2e}" for name, flops in plan.flops.items() if flops}
    rows |= {f"sent by each process, {name}": convert_bytes(size) for name, size in plan.traffic.items() if size}
    rows |= {f"activations, {name}": convert_bytes(size) for name, size in plan.activations.items()}
    rows |= {f"cache of the {name}": convert_bytes(size) for name, size in plan.caches.items()}
    return [{"": name, "number": text} for name, text in rows.items()]
