"""The command `demo`: the packaged teacher, distilled."""

import sys
from collections.abc import Callable
from functools import partial

from hf_distill.cli.arguments import DemoArguments


def demo(arguments: DemoArguments) -> Callable[[], None]:
    """Distils the packaged teacher; exits with an error if hard labels alone do as well."""
    return partial(_run_demo, arguments.output_dir)


def _run_demo(folder: str) -> None:
    from hf_distill.demo import run_demo

    results = run_demo(folder)
    if results["distilled"]["student_perplexity"] >= results["hard labels only"]["student_perplexity"]:
        sys.exit("distillation did not win: please report this with the table above")
