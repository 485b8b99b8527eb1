"""Imports that wait until they are needed: of the package, and of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

import hf_distill
from hf_distill.cli.options import is_current

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def imported_by(code: str) -> set[str]:
    """The heavy packages that a new process has imported when it has run some code."""
    code = f"{code}\nimport sys\nprint(*set({HEAVY}).intersection(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import hf_distill") == set()


def test_every_public_name_is_there_and_in_its_module():
    assert list(hf_distill._MODULES) == hf_distill.__all__
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name).__module__ == f"hf_distill.{hf_distill._MODULES[name]}"
    assert set(hf_distill.__all__) <= set(dir(hf_distill))
    assert not hasattr(hf_distill, "KDTrainr")


def stops(words: str) -> str:
    """Code that runs a command, which ends the program."""
    return f"""
try:
    main({words.split()})
except SystemExit:
    pass
else:
    raise AssertionError({words!r})
"""


def test_help_and_wrong_options_import_nothing_heavy():
    commands = ["--help", "kd --help", "plan skd --help", "cache write --help", "distil", "kd --alfa 1"]
    if is_current():  # other versions are asked for the types of their options
        commands += ["kd", "kd --model a --teacher_model b --dataset c --kd_weight much", "kd --config none.yaml"]
    code = "import sys\nsys.stderr = sys.stdout\nfrom hf_distill.cli import main\n"
    assert imported_by(f"{code}{''.join(map(stops, commands))}sys.stderr = sys.__stderr__") == set()


def test_an_option_that_no_version_has_is_refused_without_anything_heavy():
    code = "import sys\nsys.stderr = sys.stdout\nfrom hf_distill.cli import main, options, parsing\n"
    code += "options.is_current = parsing.is_current = lambda: False\n"
    commands = ["kd --alfa 1", "kd --help"]
    assert imported_by(f"{code}{''.join(map(stops, commands))}sys.stderr = sys.__stderr__") == set()


@pytest.mark.parametrize("current", [True, False])
def test_finished_runs_and_stores_are_shown_without_anything_heavy(current):
    """What is not there is missed only after all modules have been imported."""
    commands = ["compare no_such_folder", "report no_such_folder", "cache info no_such_folder"]
    code = "import sys\nsys.stderr = sys.stdout\nfrom hf_distill.cli import main, options\n"
    code += "" if current else "options.is_current = lambda: False\n"
    assert imported_by(f"{code}{''.join(map(stops, commands))}sys.stderr = sys.__stderr__") == set()
