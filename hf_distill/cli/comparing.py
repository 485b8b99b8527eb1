"""The commands about finished runs: `compare` and `report`."""

from argparse import Namespace
from pathlib import Path

from hf_distill.cli.arguments import CompareArguments, ReportArguments
from hf_distill.comparison import save_comparison
from hf_distill.page import save_page


def compare(arguments: CompareArguments, words: Namespace) -> None:
    """Puts finished runs side by side."""
    save_comparison(arguments.output_dir, words.runs)


def report(arguments: ReportArguments, words: Namespace) -> None:
    """Writes the page of finished runs; `ValueError` for a folder without one."""
    path = Path(arguments.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_page(path, words.runs)
    print(f"the report is in {path}; open it in a browser")
