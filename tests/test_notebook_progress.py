"""The table of a run in a notebook: the trainer's own names, a line for each logged update."""

import re

import pytest
import transformers.trainer
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer
from hf_distill.trainers import surviving
from tests.conftest import SENTENCES

notebook = pytest.importorskip("transformers.utils.notebook", reason="needs IPython")


@pytest.fixture
def displayed(monkeypatch):
    """The outputs of a kernel, by their number; an update replaces one."""
    outputs = []

    class Handle:
        def __init__(self, html):
            outputs.append(html.data)
            self.place = len(outputs) - 1

        def update(self, html):
            outputs[self.place] = html.data

    monkeypatch.setattr(notebook.disp, "display", lambda html, display_id: Handle(html))
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    monkeypatch.setattr(surviving, "is_in_notebook", lambda: True)
    return outputs


def make(folder, tmp_path, **settings):
    args = KDConfig(
        output_dir=str(tmp_path), kd_weight=0.5, max_steps=4, logging_steps=2, use_cpu=True, bf16=False,
        report_to="none", per_device_train_batch_size=2, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    rows = Dataset.from_dict({"text": SENTENCES})
    return KDTrainer(str(folder / "student"), str(folder / "teacher"), args, rows, rows.select(range(2)))


def cells(html):
    lines = re.findall(r"<tr.*?>(.*?)</tr>", html, re.DOTALL)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in lines]


def test_a_run_shows_the_terms_of_its_loss(folder, tmp_path, displayed):
    trainer = make(folder, tmp_path)
    trainer.train()
    (shown,) = displayed
    titles, *lines = cells(shown)
    assert titles == ["Step", "loss", "kd", "ce", "agreement"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [line[0] for line in lines] == ["2", "4"]
    for line, entry in zip(lines, logged, strict=True):
        assert [float(cell) for cell in line[1:]] == pytest.approx([entry[name] for name in titles[1:]], abs=1e-6)


def test_a_resumed_run_shows_what_was_logged_before(folder, tmp_path, displayed):
    trainer = make(folder, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    again = make(folder, tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, second = (cells(html) for html in displayed)
    assert first == second


def test_an_evaluation_stands_beside_the_update_that_it_follows(folder, tmp_path, displayed):
    make(folder, tmp_path, eval_strategy="steps", eval_steps=2).train()
    titles, *lines = cells(displayed[0])
    names = ["loss", "kd", "ce", "agreement"]
    assert titles == ["Step", *names, *(f"eval_{name}" for name in names)]
    assert [line[0] for line in lines] == ["2", "4"]
    assert all(len(line) == len(titles) and "No Log" not in line for line in lines)


def test_an_evaluation_alone_returns_all_that_it_returns_elsewhere(folder, tmp_path, displayed):
    trainer = make(folder, tmp_path)
    inside = trainer.evaluate()
    trainer.remove_callback(notebook.NotebookProgressCallback)
    assert inside.keys() == trainer.evaluate().keys()


def test_a_run_without_bars_stays_without(folder, tmp_path, displayed):
    make(folder, tmp_path, disable_tqdm=True).train()
    assert displayed == []
