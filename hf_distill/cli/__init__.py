"""The command line, `hf-distill`: one row of `COMMANDS` for each command. Parse, then one call."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trl import ModelConfig

from hf_distill.cli.arguments import (
    CacheArguments,
    CompareArguments,
    DemoArguments,
    KVArguments,
    MergeArguments,
    PlanArguments,
    PlannedKD,
    PlannedKV,
    PlannedSKD,
    PruneArguments,
    ReportArguments,
    SFTArguments,
    SKDArguments,
    StagedArguments,
)
from hf_distill.cli.cache import info, verify, write
from hf_distill.cli.parsing import CommandParser
from hf_distill.cli.planning import plan_kd, plan_kv, plan_skd
from hf_distill.cli.pruning import merge, prune
from hf_distill.cli.reporting import compare, report
from hf_distill.cli.training import start_kd, start_kv, start_sft, start_skd
from hf_distill.planning import without_gpu
from hf_distill.servers import TeacherAway
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.hard_label_config import HardLabelConfig
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig


def demo(arguments: DemoArguments) -> Callable[[], None]:
    """Distils the packaged teacher; exits with an error if hard labels alone do as well."""
    return partial(_run_demo, arguments.output_dir)


def _run_demo(folder: str) -> None:
    from hf_distill.demo import run_demo

    results = run_demo(folder)
    if results["distilled"]["student_perplexity"] >= results["hard labels only"]["student_perplexity"]:
        sys.exit("distillation did not win: please report this with the table above")


@dataclass(frozen=True)
class Command:
    """A command of `hf-distill`.

    Args:
        help: its line in `hf-distill --help`.
        options: dataclasses; each of their fields is an option.
        start: Called with an instance of each; `ValueError` becomes one line on the screen. It may return a run: an
            error there keeps its traceback.
        words: names and help of words without an option. `start` is called with a namespace of them, too.
        parsing: makes the context in which options become these instances.
    """

    help: str
    options: tuple[Any, ...]
    start: Callable[..., Callable[[], None] | None]
    words: Mapping[str, str] = field(default_factory=dict)
    parsing: Callable[[], AbstractContextManager] = nullcontext


COMMANDS = {
    "demo": Command("distil the packaged teacher, offline, on a CPU, in three minutes", (DemoArguments,), demo),
    "kd": Command(
        "distil a student; --help lists all options", (StagedArguments, KDConfig, ModelConfig), start_kd
    ),
    "kv": Command(
        "with the teacher's keys and values beside its logits", (KVArguments, KVProjectionConfig, ModelConfig), start_kv
    ),
    "skd": Command(
        "on text that student and teacher write together", (SKDArguments, SpeculativeKDConfig, ModelConfig), start_skd
    ),
    "sft": Command(
        "on hard labels alone, without a teacher: the baseline", (SFTArguments, HardLabelConfig, ModelConfig), start_sft
    ),
    "plan kd": Command(
        "the memory of a run of kd, whether it fits, and what would make it fit; from configurations alone",
        (PlannedKD, KDConfig, ModelConfig, PlanArguments), plan_kd, parsing=without_gpu,
    ),
    "plan kv": Command(
        "the same of kv", (PlannedKV, KVProjectionConfig, ModelConfig, PlanArguments), plan_kv, parsing=without_gpu
    ),
    "plan skd": Command(
        "the same of skd", (PlannedSKD, SpeculativeKDConfig, ModelConfig, PlanArguments), plan_skd, parsing=without_gpu
    ),
    "prune": Command("drop the layers that change least, keep them as bundles", (PruneArguments,), prune),
    "merge": Command("merge an adapter into its base model", (MergeArguments,), merge),
    "cache write": Command(
        "write a teacher's outputs into a folder, to train any number of students from",
        (CacheArguments, KDConfig, ModelConfig), write,
    ),
    "cache info": Command(
        "show what is in such folders", (), info, words={"stores": "folders, or datasets on the hub as user/name"}
    ),
    "cache verify": Command(
        "check every byte of such folders", (), verify, words={"stores": "folders, or datasets on the hub as user/name"}
    ),
    "compare": Command(
        "put finished runs side by side: settings, fidelity, tokens, time", (CompareArguments,), compare,
        words={"runs": "output directories of kd, kv or skd"},
    ),
    "report": Command(
        "write the page of finished runs: results, curves, held-out rows token by token", (ReportArguments,), report,
        words={"runs": "output directories of kd, kv or skd"},
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hf-distill`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="hf-distill", description="Distil causal language models.")
    names = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, command in COMMANDS.items():
        names.add_parser(name, help=command.help, add_help=False)
    num_words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name = parser.parse_args([" ".join(argv[:num_words])] if argv else []).command
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)

    command = COMMANDS[name]
    options = CommandParser(command.options, prog=f"hf-distill {name}")
    for word, help_text in command.words.items():
        options.add_argument(word, nargs="+", help=help_text)
    try:
        with command.parsing():
            parsed = options.parse(argv[num_words:])
        run = command.start(*parsed)
    except ValueError as error:
        options.exit(2, f"{options.prog}: error: {error}\n")
    if run is not None:
        try:
            run()
        except TeacherAway as error:
            options.exit(1, f"{options.prog}: error: {error}\n")
        except KeyboardInterrupt:
            sys.exit(130)  # the trainer has said where the student is
