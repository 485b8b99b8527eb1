"""The best checkpoint, for all metrics that the trainers evaluate."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, SpeculativeKDConfig
from hf_distill.evaluation import _exp
from hf_distill.metric_names import MORE_IS_BETTER, metric_name
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import settings

PROMPTS = Dataset.from_list([{"prompt": text[:12], "completion": text[12:]} for text in SENTENCES[:4]])
TEXTS = Dataset.from_dict({"text": SENTENCES[:4]})
TRAINERS = {
    "kd": (KDTrainer, KDConfig, TEXTS, {"hidden_weight": 0.1}),
    "kv": (KVProjectionTrainer, KVProjectionConfig, TEXTS, {}),
    "skd": (
        SpeculativeKDTrainer, SpeculativeKDConfig, PROMPTS,
        {"max_new_tokens": 4, "draft_length": 2, "kd_weight": 0.5, "rollout_mix": {"speculative": 0.5, "teacher": 0.5}},
    ),
}  # fmt: skip


def make_trainer(folder, tokenizer, kind="kd", held_out=None, callbacks=None, **changes):
    trainer, config, rows, options = TRAINERS[kind]
    unused = {"max_length": None, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    args = config(**{**settings(folder, per_device_train_batch_size=4), **unused, **options, **changes})
    return trainer(make_model(seed=1), make_model(seed=2), args, rows, held_out or rows, tokenizer, callbacks=callbacks)


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_metric_of_an_evaluation_has_a_direction_or_says_that_it_has_none(kind, tmp_path, tokenizer):
    rows = TRAINERS[kind][2]
    trainer = make_trainer(tmp_path, tokenizer, kind, {"a": rows, "b_loss": rows}, metric_for_best_model="a_kd")
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("eval_")}
    assert {"eval_a_loss", "eval_b_loss_kd", "eval_a_agreement"} <= logged
    for name in logged:
        known = metric_name(name, ["a", "b_loss"])
        assert known in MORE_IS_BETTER, name
        if "loss" not in name:
            assert f"_{known.split('/')[0]}" in name


class Measured(TrainerCallback):
    """Evaluations with these divergences."""

    def __init__(self, values):
        self.values = iter(values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_kd"] = next(self.values)


def test_the_least_divergence_is_the_best_and_a_falling_one_stops_nothing(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, callbacks=[Measured([3.0, 2.0, 1.0, 1.5]), EarlyStoppingCallback(1)],
        metric_for_best_model="eval_kd", max_steps=4, save_strategy="best", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (3, 1.0)


@pytest.mark.parametrize(
    ("metric", "held_out"),
    [("eval_kdd", TEXTS), ("perplexity/eval", TEXTS), ("eval_kv/cosine", TEXTS), ("rollout/acceptance_rate", TEXTS),
     ("kd", {"a": TEXTS}), ("eval_c_kd", {"a": TEXTS}), ("a_kd", TEXTS), ("expected_acceptance", TEXTS)],
)  # fmt: skip
def test_a_metric_that_no_evaluation_has_is_refused(metric, held_out, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="is in no evaluation"):
        make_trainer(tmp_path, tokenizer, held_out=held_out, metric_for_best_model=metric)


def test_a_callback_may_bring_metrics_of_its_own(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, callbacks=[Measured([])], metric_for_best_model="eval_rouge")


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_a_best_metric_that_a_callback_brings_is_saved_whatever_its_type(tmp_path, tokenizer, value):
    trainer = make_trainer(
        tmp_path, tokenizer, callbacks=[Measured([value, value + 1])], metric_for_best_model="eval_kd",
        save_strategy="best", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 1)
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["best_metric"] == 0.5


def test_a_data_set_whose_name_ends_like_a_metric_has_its_metrics():
    assert metric_name("eval_x_aux_loss", ["x_aux"]) == "loss"
    assert metric_name("eval_x_aux_loss", ["x"]) == "aux_loss"


def test_a_direction_that_keeps_the_worst_is_warned_of(tmp_path, tokenizer, caplog):
    args = {"metric_for_best_model": "eval_kd", "greater_is_better": True}
    make_trainer(tmp_path, tokenizer, **args)
    assert "keeps the worst checkpoint by eval_kd, of which less is better" in caplog.text


def test_a_perplexity_past_all_numbers_is_infinite():
    assert _exp(800.0) == math.inf
    assert _exp(2.0) == math.exp(2.0)
