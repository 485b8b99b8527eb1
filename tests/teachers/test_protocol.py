"""Any object that keeps the protocol of a teacher is one: here a table of probabilities, written in a few lines.

Shapes: N label-bearing positions, V vocabulary.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill import SpeculativeKDConfig as SKDConfig
from hf_distill import SpeculativeKDTrainer as SKDTrainer
from hf_distill.losses.divergence import log_softmax
from hf_distill.losses.loop import StepResult, chunked_loss, compare
from hf_distill.teachers import ModelTeacher, Teacher, require_model
from hf_distill.teachers.ensemble import EnsembleTeacher
from hf_distill.teachers.local import LocalTeacher
from tests.conftest import SENTENCES, make_model
from tests.losses.oracle import ORACLE

VOCAB = 384


class TableSignal(NamedTuple):
    """The rows (N,) of a table (V, V) of log-probabilities: any divergence, at any temperature."""

    log_probs: torch.Tensor
    rows: torch.Tensor
    num_buffers = 1
    more = property(lambda self: {})

    @property
    def num_paired(self):
        return len(self.rows)

    def loss(self, hidden, head, labels, objective):
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows, vocab_size, device, objective):
        return TableSignal(self.log_probs[:, :vocab_size].to(device), self.rows.to(device))

    def inputs_(self, chunk, buffers, constants):
        return (buffers[0].copy_(self.log_probs[self.rows[chunk]]),)

    def differentiate_(self, student, inputs, token_weights, constants):
        (logits,) = inputs
        agreement = (student.logits.argmax(-1) == logits.argmax(-1)).sum()
        teacher = log_softmax(logits.div_(constants.temperature))
        return StepResult(*compare(student, teacher, token_weights, constants), agreement)


class TableTeacher:
    """Says of every token what a table (V, V) of probabilities says about the token before it."""

    name = "bigrams"

    def __init__(self, table):
        self.log_probs = table.log()
        self.prepared, self.asked, self.knows = [], 0, None

    def introduce(self, tokenizer, vocab_size):
        if len(self.log_probs) < vocab_size:
            raise ValueError(f"bigrams of {len(self.log_probs)} tokens, the student has {vocab_size}")
        self.knows = tokenizer

    def prepare(self, dataset, name):
        self.prepared.append(name)
        return dataset.map(lambda row: {"teacher_last": row["input_ids"]})

    def collate(self, rows):
        ids = [torch.tensor(row["teacher_last"]) for row in rows]
        return {"teacher_last": nn.utils.rnn.pad_sequence(ids, batch_first=True)}

    def __call__(self, inputs, positions):
        self.asked += 1
        return TableSignal(self.log_probs, inputs["teacher_last"].flatten()[positions])


@pytest.fixture
def table():
    torch.manual_seed(0)
    return torch.randn(VOCAB, VOCAB).mul(2).softmax(-1)


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_dict({"text": [text[: 30 + 5 * i] for i, text in enumerate(SENTENCES)]})


def make(folder, teacher, rows, tokenizer, trainer=KDTrainer, config=KDConfig, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", **changes,
    }  # fmt: skip
    more = {"peft_config": settings.pop("peft_config", None), "eval_dataset": settings.pop("eval_dataset", None)}
    return trainer(make_model(seed=2), teacher, config(**settings), rows, processing_class=tokenizer, **more)


def by_hand(model, batch, table, *, kd_weight, temperature=1.0, divergence="forward_kl"):
    """Loss of a batch by the definition, in float64."""
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    mask = labels != -100
    ids = batch.pop("teacher_last")
    logits = model(**batch).logits[:, :-1][mask].double()
    target = (table[ids[:, :-1][mask]].double().log() / temperature).softmax(-1)
    kl = ORACLE[divergence](target, (logits / temperature).softmax(-1)).mean()
    ce = nn.functional.cross_entropy(logits, labels[mask])
    return kd_weight * temperature**2 * kl + (1 - kd_weight) * ce


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_table_of_probabilities_is_a_teacher(tmp_path, table, rows, tokenizer, divergence):
    teacher = TableTeacher(table)
    assert isinstance(teacher, Teacher)
    trainer = make(
        tmp_path, teacher, rows, tokenizer, kd_weight=0.7, eval_dataset={"some": rows}, temperature=2.0,
        divergence=divergence,
    )  # fmt: skip
    assert teacher.prepared == ["train", "some"]
    assert teacher.knows is trainer.processing_class
    assert trainer.teacher is teacher
    batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
    loss = by_hand(trainer.model, batch, table, kd_weight=0.7, temperature=2.0, divergence=divergence)
    found = trainer.compute_loss(trainer.model, dict(batch))
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(trainer.model.parameters()))
    gradients = torch.autograd.grad(found, list(trainer.model.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other.to(one), atol=1e-6, rtol=1e-4)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_some_kd"] > 0
    assert found["eval_some_agreement"] >= 0
    assert trainer.describe()["teacher"] == "bigrams"
    assert "bigrams" in trainer.describe_run()["teacher bigrams"]


def test_it_is_asked_about_packed_rows_and_rows_that_are_prepared_already(tmp_path, table, rows, tokenizer):
    teacher = TableTeacher(table)
    trainer = make(tmp_path, teacher, rows, tokenizer, packing=True, max_length=64)
    assert teacher.prepared == ["train"]
    trainer.train()
    ids = [tokenizer(text)["input_ids"] for text in rows["text"]]
    tokens = Dataset.from_dict({"input_ids": ids, "labels": ids})
    teacher = TableTeacher(table)
    trainer = make(tmp_path, teacher, tokens, tokenizer, dataset_kwargs={"skip_prepare_dataset": True})
    assert teacher.prepared == ["train"]
    trainer.train()


def test_a_teacher_that_does_not_fit_its_student_says_so_at_construction(tmp_path, table, rows, tokenizer):
    with pytest.raises(ValueError, match="bigrams of 100 tokens, the student has 384"):
        make(tmp_path, TableTeacher(table[:100, :100]), rows, tokenizer)


def test_it_is_asked_in_the_workers_of_the_data_loader(tmp_path, table, rows, tokenizer):
    plain, workers = TableTeacher(table), TableTeacher(table)
    first = make(tmp_path / "one", plain, rows, tokenizer)
    first.train()
    second = make(tmp_path / "two", workers, rows, tokenizer, dataloader_num_workers=2)
    loader = second.get_train_dataloader()
    assert isinstance(getattr(loader, "base_dataloader", loader), DataLoader)
    second.train()
    assert workers.asked == plain.asked
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_joins_models_in_a_sum_and_in_nothing_else(tmp_path, table, rows, tokenizer):
    teachers = {"table": TableTeacher(table), "model": make_model(seed=3)}
    trainer = make(tmp_path, teachers, rows, tokenizer, teacher_combination="sum", kd_weight=1.0)
    assert isinstance(trainer.teacher, EnsembleTeacher)
    batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
    found = trainer.compute_loss(trainer.model, dict(batch)).item()
    alone = [
        make(tmp_path, teacher, rows, tokenizer, kd_weight=1.0) for teacher in (TableTeacher(table), make_model(seed=3))
    ]
    parts = [
        one.compute_loss(one.model, one.batch_collator()(one.first_rows(one.train_dataset, 4))).item() for one in alone
    ]
    assert found == pytest.approx(sum(parts) / 2, rel=1e-5)
    for combination in ("mixture", "route"):
        with pytest.raises(ValueError, match="table is no model, and teacher_combination="):
            make(tmp_path, teachers, rows, tokenizer, teacher_combination=combination)


def test_what_needs_a_model_refuses_it_by_name(tmp_path, table, rows, tokenizer):
    teacher = TableTeacher(table)
    with pytest.raises(ValueError, match=r"hidden_weight needs .* a model in this process .* bigrams \(TableTeacher\)"):
        make(tmp_path, teacher, rows, tokenizer, hidden_weight=1.0)
    with pytest.raises(ValueError, match=r"KVProjectionTrainer needs .* a model in this process"):
        make(tmp_path, teacher, rows, tokenizer, KVProjectionTrainer, KVProjectionConfig)
    prompts = Dataset.from_dict({"prompt": ["a b"] * 4, "completion": [" c d"] * 4})
    with pytest.raises(ValueError, match=r"SpeculativeKDTrainer needs .* a model in this process"):
        make(tmp_path, teacher, prompts, tokenizer, SKDTrainer, SKDConfig, max_length=None)
    assert not isinstance(teacher, ModelTeacher)
    local = LocalTeacher(make_model(), torch.device("cpu"))
    assert require_model(local, "this") is local


@pytest.mark.parametrize("given", [3, {"a": 3}, [object()], lambda inputs, positions: None])
def test_other_objects_are_refused_in_words(tmp_path, rows, tokenizer, given):
    with pytest.raises(ValueError, match="teacher_model has to be a hub id, a path, a model, an object with the"):
        make(tmp_path, given, rows, tokenizer)


def test_no_teacher_is_asked_where_its_weight_is_zero(tmp_path, table, rows, tokenizer):
    teacher = TableTeacher(table)
    trainer = make(tmp_path, teacher, rows, tokenizer, kd_weight=0.0)
    trainer.train()
    assert teacher.asked == 0
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["ce"], rel=1e-4)
    assert "kd" not in log
    assert "agreement" not in log
    # A schedule that begins at 0 asks from the second update on, and its mean is over the tokens that were asked about.
    scheduled = TableTeacher(table)
    trainer = make(tmp_path, scheduled, rows, tokenizer, schedule={"kd_weight": [0, 1]}, logging_steps=2)
    trainer.train()
    assert scheduled.asked == 1
    assert trainer.state.log_history[0]["kd"] > 0.1


def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path, table, rows, tokenizer):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "peft_config": LoraConfig(r=2)}
    whole = make(tmp_path, TableTeacher(table), rows, tokenizer, **options)
    whole.train()
    resumed = make(tmp_path, TableTeacher(table), rows, tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_example_of_the_docs_is_this_teacher(tmp_path, table, rows, tokenizer):
    page = Path(__file__).parents[2].joinpath("docs", "teachers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import torch.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(block, names)
    losses = []
    for teacher in (names["TableTeacher"](table), TableTeacher(table)):
        trainer = make(tmp_path, teacher, rows, tokenizer, divergence="jensen_shannon", temperature=2.0)
        batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 4))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_evaluations_ask_a_teacher_whose_weight_ends_at_zero(tmp_path, table, rows, tokenizer):
    trainer = make(
        tmp_path, TableTeacher(table), rows, tokenizer, schedule={"kd_weight": [1, 0]}, eval_dataset=rows,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_kd",
    )  # fmt: skip
    trainer.train()
    logged = [log["eval_kd"] for log in trainer.state.log_history if "eval_kd" in log]
    assert len(logged) == 2
    with pytest.raises(ValueError, match="metric_for_best_model='eval_kd' is in no evaluation"):
        make(
            tmp_path, TableTeacher(table), rows, tokenizer, kd_weight=0.0, eval_dataset=rows, eval_strategy="steps",
            eval_steps=1, metric_for_best_model="eval_kd",
        )  # fmt: skip


def test_the_collator_of_the_trainer_stays_the_students(tmp_path, table, rows, tokenizer):
    trainer = make(tmp_path, TableTeacher(table), rows, tokenizer)
    assert isinstance(trainer.data_collator, DataCollatorForLanguageModeling)
    trainer.data_collator.pad_to_multiple_of = 64
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 64 == 0
    assert "teacher_last" in batch
    assert isinstance(trainer.data_collator, DataCollatorForLanguageModeling)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_two_models_may_read_a_prompt_of_their_own_in_rows_of_any_format(tmp_path, tokenizer, kind):
    prompts = Dataset.from_dict({"prompt": ["a b"] * 4, "completion": [" c d"] * 4, "teacher_prompt": ["e f g"] * 4})
    teachers = {"one": make_model(seed=3), "other": make_model(seed=4)}
    args = KDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = KDTrainer(
        make_model(seed=2), teachers, args, prompts.with_format(kind), processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )  # fmt: skip
    assert "teacher_input_ids" in trainer.train_dataset.column_names
