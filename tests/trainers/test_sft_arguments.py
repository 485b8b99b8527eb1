"""Everything that SFTTrainer can be called with, the trainers can be called with, and it does what it does there."""

import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_distill import (
    HardLabelConfig,
    HardLabelTrainer,
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import settings

TEXTS = Dataset.from_dict({"text": [text[: 40 + 7 * i] for i, text in enumerate(SENTENCES)]})
PAIRS = Dataset.from_dict({"prompt": [text[:12] for text in SENTENCES], "completion": [t[12:] for t in SENTENCES]})
TRAINERS = {
    HardLabelTrainer: (HardLabelConfig, TEXTS, {}),
    KDTrainer: (KDConfig, TEXTS, {}),
    KVProjectionTrainer: (KVProjectionConfig, TEXTS, {}),
    SpeculativeKDTrainer: (SpeculativeKDConfig, PAIRS, {"max_new_tokens": 4, "rollout_mix": {"dataset": 1.0}}),
}
LEFT_OUT = {"compute_loss_func": "the loss is what these trainers are for; a term of one's own overrides compute_loss"}


def arguments(trainer: type) -> set[str]:
    """The names that a trainer can be called with; those that it hands on are its parents'."""
    found = inspect.signature(trainer.__init__).parameters.values()
    names = {
        parameter.name for parameter in found if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)
    return names | arguments(trainer.__bases__[0]) if hands_on else names


def make(trainer, folder, tokenizer, *, changes=None, **given):
    config, rows, options = TRAINERS[trainer]
    own = {} if trainer is HardLabelTrainer else {"teacher_model": make_model(seed=5)}
    args = config(**settings(folder, **{**options, **(changes or {})}))
    return trainer(
        model=make_model(seed=4), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, **own,
        **given,
    )  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_argument_of_sft_trainer_is_one_of_the_trainers_too(trainer):
    assert arguments(SFTTrainer) - arguments(trainer) == set(LEFT_OUT)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_metrics_of_ones_own_are_computed_from_logits_and_labels(tmp_path, tokenizer, trainer):
    def best(logits, labels):
        return logits.argmax(-1)

    def compute_metrics(found):
        predicted, labels = found.predictions[:, :-1], found.label_ids[:, 1:]
        return {"hits": (predicted == labels)[labels != -100].mean(), "share": (labels != -100).mean()}

    run = make(
        trainer, tmp_path, tokenizer, compute_metrics=compute_metrics, preprocess_logits_for_metrics=best,
        changes={"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_hits", "max_steps": 1},
    )  # fmt: skip
    found = run.evaluate()
    assert found["eval_hits"] == pytest.approx(hits(make_model(seed=4), run))
    assert found["eval_share"] > 0
    run.train()


def hits(model, run) -> float:
    """The share of labels that are the model's most likely token, every row read alone."""
    right = total = 0
    for row in run.eval_dataset:
        ids = row.get("input_ids") or row["student_prompt_ids"] + row["completion_ids"]
        start = len(row.get("student_prompt_ids", [0]))
        with torch.no_grad():
            predicted = model(torch.tensor([ids])).logits[0, start - 1 : -1].argmax(-1)
        right += (predicted == torch.tensor(ids[start:])).sum().item()
        total += len(ids) - start
    return right / total


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_optimizer_by_class_is_made(tmp_path, tokenizer, trainer):
    changes = {"projector": "mlp"} if trainer is KVProjectionTrainer else {}
    given = {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.25})}
    run = make(trainer, tmp_path, tokenizer, changes=changes, **given)
    run.train()
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert isinstance(optimizer, torch.optim.Adagrad)
    trained = {id(p) for p in (*run.model.parameters(), *run.projectors.parameters()) if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained


@pytest.mark.parametrize("trainer", TRAINERS)
def test_predictions_of_raw_rows_are_those_of_prepared_ones(tmp_path, tokenizer, trainer):
    run = make(trainer, tmp_path, tokenizer)
    raw, prepared = run.predict(TRAINERS[trainer][1]), run.predict(run.eval_dataset)
    np.testing.assert_array_equal(raw.predictions, prepared.predictions)
    np.testing.assert_array_equal(raw.label_ids, prepared.label_ids)
    evaluated = run.evaluate(TRAINERS[trainer][1])
    for name in ("loss", "ce", "kd", "kv"):
        if f"eval_{name}" in evaluated:
            assert raw.metrics[f"test_{name}"] == evaluated[f"eval_{name}"]


def test_the_loss_of_predictions_on_packed_rows_is_sft_trainers(tmp_path, tokenizer):
    rows = Dataset.from_dict({"text": SENTENCES[:3]})
    found = make(HardLabelTrainer, tmp_path, tokenizer, changes={"packing": True, "max_length": 64}).predict(rows)
    plain = SFTTrainer(
        make_model(seed=4), SFTConfig(**settings(tmp_path)), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    assert found.metrics["test_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
