"""The command `demo`: the packaged teacher, distilled."""

import sys
from collections.abc import Callable
from functools import partial

from hf_distill.cli.arguments import DemoArguments


def demo(arguments: DemoArguments) -> Callable[[], None]:
    """Distils the packaged teacher; exits with an error if hard labels alone do as well."""
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} has to be at least 1, got {getattr(arguments, name)}")
    return partial(_run_demo, arguments)


def _run_demo(arguments: DemoArguments) -> None:
    from hf_distill.demo import run_demo

    results = run_demo(arguments.output_dir, arguments.seeds, arguments.steps)
    if results["distilled"]["student_perplexity"] >= results["hard labels only"]["student_perplexity"]:
        sys.exit("distillation did not win: please report this with the table above")
