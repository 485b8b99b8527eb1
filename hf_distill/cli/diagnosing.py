"""The commands `doctor kd`, `doctor kv` and `doctor skd`: what would go wrong, before the run."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from trl import ModelConfig

from hf_distill.cli.arguments import DoctorArguments, KVArguments, SKDArguments, StagedArguments
from hf_distill.cli.training import trainer_arguments, written_arguments
from hf_distill.diagnosis import Diagnosis, diagnose
from hf_distill.diagnosis.findings import FAILURE, LEFT_OUT, OK, WARNING
from hf_distill.planning import parse_size
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig

STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red", LEFT_OUT: "dim"}


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
        print_findings(found, Console())
    if found.fails:
        sys.exit(1)


def print_findings(found: Diagnosis, console: Console) -> None:
    """The findings as a table, for people; what was left out comes last, in one line each."""
    table = Table(box=None, pad_edge=False)
    for name in ("check", "", "finding"):
        table.add_column(name, overflow="fold")
    for finding in found.findings:
        if finding.status != LEFT_OUT:
            remedy = f"\n[bold]do:[/bold] {escape(finding.remedy)}" if finding.remedy else ""
            style = STYLES[finding.status]
            table.add_row(finding.check, f"[{style}]{finding.status}[/{style}]", escape(finding.line) + remedy)
    console.print(table, highlight=False)
    for finding in found.with_status(LEFT_OUT):
        console.print(f"left out: {finding.check}: {finding.line}", style="dim", highlight=False, markup=False)
    counts = {status: len(list(found.with_status(status))) for status in STYLES}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(f"{said}; {found.num_rows} rows, {found.seconds:.0f} s", highlight=False)
