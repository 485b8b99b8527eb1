"""Probes of tiny runs: each test plants one fault in a run that is clean."""

import copy

import pytest
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer
from hf_distill.diagnosis import CHECKS
from hf_distill.diagnosis.probe import open_probe
from tests.conftest import SENTENCES


@pytest.fixture
def run(folder, tokenizer, tmp_path):
    """A function that makes the arguments of a clean run, with changes; `settings` are those of its config."""

    def make(config=KDConfig, settings=None, **changes):
        args = {
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": "none",
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "learning_rate": 1e-3, "max_steps": 100,
        }  # fmt: skip
        arguments = {
            "model": str(folder / "student"), "teacher_model": str(folder / "teacher"),
            "args": config(**{**args, **(settings or {})}), "train_dataset": Dataset.from_dict({"text": SENTENCES}),
        }  # fmt: skip
        return {**arguments, **changes}

    return make


@pytest.fixture
def examine(run):
    """A function from the name of a check and the changes of a run to the check's finding."""

    def find(check, trainer_class=KDTrainer, **changes):
        with open_probe(trainer_class, run(**changes), 16) as probe:
            probe.memory = 2**34
            return CHECKS[check](probe)

    return find


@pytest.fixture
def with_template(tokenizer):
    """A function from a template to a tokenizer that has it."""

    def make(template):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make
