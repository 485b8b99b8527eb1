"""What the command line prints while it trains: brief log lines, and nothing that says nothing."""

import ast
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers import PrinterCallback, TrainerControl, TrainerState

from hf_distill import cli
from hf_distill.cli.brief_logs import BriefPrinter
from hf_distill.cli.noise import LOGGED, WARNED, without_noise
from hf_distill.metric_names import FIRST, MORE_IS_BETTER, SHOWN, brief
from tests.test_cli import options

# The modules whose messages are hidden, where they are not those of the loggers.
MODULES = {"DeepSpeed": "deepspeed.accelerator.real_accelerator"}


@pytest.mark.parametrize("tqdm", [True, False])
def test_a_log_line_has_few_values_and_the_state_has_all(folder, tmp_path, capfd, tqdm):
    run = {"output_dir": tmp_path, "eval_dataset": folder / "rows.jsonl", "eval_strategy": "steps", "eval_steps": 1}
    cli.main(["kd", *options(folder, **run, disable_tqdm=not tqdm)])
    printed = "".join(capfd.readouterr())
    lines = [ast.literal_eval(line) for line in re.findall(r"\{'[^}]*\}", printed)]
    assert len([line for line in lines if {"loss", "kd", "ce", "agreement", "learning_rate"} <= line.keys()]) == 2
    assert len([line for line in lines if {"eval_loss", "eval_kd", "eval_ce"} <= line.keys()]) == 2
    assert max(map(len, lines)) <= SHOWN
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert max(map(len, logged)) > SHOWN
    for hidden in ("gemm_4bit_forward", "gradient_checkpointing", "Setting accelerator"):
        assert hidden not in printed


def test_what_says_most_is_shown_first():
    rest = {f"schedule/{i}": float(i) for i in range(20)}
    shown = brief({"total_flos": 1.0, **rest, "grad_norm": 1.0, "kd": 2.0, "loss": 3.0})
    assert list(shown) == ["loss", "kd", "grad_norm", *list(rest)[:5]]
    assert list(brief({"eval_runtime": 1.0, "eval_kd": 2.0})) == ["eval_kd", "eval_runtime"]
    assert set(FIRST) - {"learning_rate", "grad_norm"} <= set(MORE_IS_BETTER)


def test_a_brief_printer_changes_no_log(capsys):
    logs = {"total_flos": 1.0, **{f"x{i}": float(i) for i in range(20)}}
    before = dict(logs)
    BriefPrinter().on_log(None, TrainerState(), TrainerControl(), logs=logs)
    assert logs == before
    assert len(ast.literal_eval(capsys.readouterr().out)) == SHOWN
    assert issubclass(BriefPrinter, PrinterCallback)


def test_noise_is_hidden_while_it_lasts_and_nothing_else(caplog):
    with without_noise():
        for name, beginning in LOGGED.items():
            logging.getLogger(name).warning("%s, and so on", beginning)
            logging.getLogger(name).warning("a message about %s", beginning)
    shown = [record.getMessage() for record in caplog.records]
    assert not [text for text in shown if not text.startswith("a message about")]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with without_noise():
            for beginning in WARNED:
                warnings.warn(f"{beginning} and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("something else", FutureWarning, stacklevel=1)
        warnings.warn(f"{WARNED[0]} again", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in found] == ["something else", f"{WARNED[0]} again"]


def test_progress_bars_of_less_than_a_second_are_not_shown():
    code = "from hf_distill.cli.noise import without_noise\nwith without_noise():\n    from tqdm.auto import tqdm\n"
    code += "    list(tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DELAY"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_messages_of_libraries_that_print_them_are_there_once():
    code = "import logging, datasets, huggingface_hub, peft\nfrom hf_distill.cli.noise import without_noise\n"
    code += "logging.basicConfig()\nwith without_noise():\n"
    code += "    for name in ('datasets', 'huggingface_hub', 'peft'):\n"
    code += "        logging.getLogger(f'{name}.part').warning('about %s', name)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert [done.stderr.count(f"about {name}") for name in ("datasets", "huggingface_hub", "peft")] == [1, 1, 1]


@pytest.mark.parametrize("name", LOGGED)
def test_the_libraries_still_say_what_is_hidden(name):
    spec = importlib.util.find_spec(MODULES.get(name, name))
    if spec is None:
        pytest.skip("not installed")
    text = LOGGED[name].partition(":")[0]
    assert text in Path(str(spec.origin)).read_text(encoding="utf-8")
