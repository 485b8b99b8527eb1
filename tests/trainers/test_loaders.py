"""Data loaders: their workers, their last rows, and the counts of a run that begins anew."""

import multiprocessing
from unittest import mock

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_distill import KDConfig, KDTrainer
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import settings

WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
OTHERS = ["It rained.", "A bird sat there all day long.", "We were late."]


@pytest.fixture
def rows():
    return Dataset.from_dict({"text": SENTENCES})


def make_trainer(folder, rows, tokenizer, callbacks=(), **changes) -> KDTrainer:
    return KDTrainer(
        make_model(seed=2), make_model(seed=1), KDConfig(**settings(folder, **changes)), rows, rows, tokenizer,
        teacher_processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


def measured(trainer, rows) -> dict[str, float]:
    """The divergence on the trainer's held-out rows, on others, and on both by name."""
    found = {"own": trainer.evaluate(), "others": trainer.evaluate(rows)}
    both = trainer.evaluate({"own": trainer.eval_dataset, "others": rows})
    return {name: each["eval_kd"] for name, each in found.items()} | {
        f"{n}, named": both[f"eval_{n}_kd"] for n in found
    }


class Measuring(TrainerCallback):
    """Measures others in the middle of a training that measures its own held-out rows, and counts workers."""

    def __init__(self, rows):
        self.rows, self.found, self.workers = rows, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.found.append(measured(self.trainer, self.rows))
        self.workers.append(len(multiprocessing.active_children()))


def test_workers_that_are_kept_bring_the_rows_that_are_measured(tmp_path, rows, tokenizer):
    others = Dataset.from_dict({"text": OTHERS})
    expected = measured(make_trainer(tmp_path, rows, tokenizer), others)
    assert expected["own"] == expected["own, named"] != expected["others"] == expected["others, named"]
    trainer = make_trainer(tmp_path, rows, tokenizer, **WORKERS)
    assert measured(trainer, others) == expected
    trainer.eval_dataset = trainer.eval_dataset.select([0])
    assert trainer.evaluate()["eval_kd"] != expected["own"]


def test_rows_are_measured_in_a_training_with_workers_as_without(tmp_path, rows, tokenizer):
    found = []
    for changes in ({}, WORKERS):
        watch = Measuring(Dataset.from_dict({"text": OTHERS}))
        trainer = make_trainer(
            tmp_path, rows, tokenizer, [watch], max_steps=3, eval_strategy="steps", eval_steps=1, **changes
        )
        watch.trainer = trainer
        trainer.train()
        found.append(watch)
    plain, with_workers = found
    assert with_workers.found == plain.found
    assert with_workers.workers[-1] <= 2  # of the training, and of its own held-out rows


@pytest.mark.parametrize("own", [True, False])
def test_an_evaluation_that_is_interrupted_leaves_neither_workers_nor_rows(tmp_path, rows, tokenizer, own):
    trainer = make_trainer(tmp_path, rows, tokenizer, **WORKERS)
    read = trainer.prediction_step
    trainer.prediction_step = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as held:
        trainer.evaluate(None if own else Dataset.from_dict({"text": OTHERS}))
    assert held.value.__traceback__ is not None
    assert not multiprocessing.active_children()
    trainer.prediction_step = read
    trainer.eval_dataset = trainer.eval_dataset.select([0])
    assert trainer.evaluate()["eval_kd"] == pytest.approx(trainer.evaluate(trainer.eval_dataset)["eval_kd"])


def test_held_out_rows_may_be_exchanged_in_a_training(tmp_path, rows, tokenizer):
    found = []
    for changes in ({}, WORKERS):
        trainer = make_trainer(tmp_path, rows, tokenizer, max_steps=3, eval_strategy="steps", eval_steps=1, **changes)

        class Exchanging(TrainerCallback):
            def on_evaluate(self, args, state, control, trainer=trainer, **kwargs):
                trainer.eval_dataset = trainer.eval_dataset.select(range(len(trainer.eval_dataset) - 2))

        trainer.add_callback(Exchanging())
        trainer.train()
        found.append([log["eval_kd"] for log in trainer.state.log_history if "eval_kd" in log])
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_a_resumed_run_that_fails_leaves_no_workers(tmp_path, rows, tokenizer):
    changes = {**WORKERS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    make_trainer(tmp_path, rows, tokenizer, **changes, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, rows, tokenizer, **changes, max_steps=3)
    trainer.compute_loss = mock.Mock(side_effect=RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken") as held:
        trainer.train(resume_from_checkpoint=True)
    assert held.value.__traceback__ is not None
    assert not multiprocessing.active_children()


def test_evaluations_drop_no_rows(tmp_path, rows, tokenizer):
    changes = {"per_device_eval_batch_size": len(rows) - 1}
    expected = make_trainer(tmp_path, rows, tokenizer, **changes).evaluate()
    trainer = make_trainer(tmp_path, rows, tokenizer, **changes, dataloader_drop_last=True)
    assert trainer.evaluate()["eval_kd"] == expected["eval_kd"]
    assert trainer.args.dataloader_drop_last
    assert len(trainer.get_train_dataloader()) == len(rows) // trainer.args.per_device_train_batch_size


def test_a_batch_that_all_rows_do_not_fill_is_refused_if_it_would_be_dropped(tmp_path, rows, tokenizer):
    changes = {"per_device_train_batch_size": len(rows) + 1}
    with pytest.raises(ValueError, match=rf"has {len(rows)} rows, and dataloader_drop_last=True .*nothing would"):
        make_trainer(tmp_path, rows, tokenizer, **changes, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="8 rows, a batch for every process"):
        make_trainer(
            tmp_path, rows.select(range(6)), tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4,
            train_sampling_strategy="batch_rebalance", dataloader_drop_last=True,
        )  # fmt: skip
    make_trainer(tmp_path, rows, tokenizer, **changes)


def test_nothing_of_a_batch_that_did_not_fit_is_logged(tmp_path, rows, tokenizer):
    trainer = make_trainer(
        tmp_path,
        rows,
        tokenizer,
        auto_find_batch_size=True,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        kd_weight=0.5,
    )
    compute = trainer.compute_loss

    def full(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) == len(rows):
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.compute_loss = full
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.5 * (log["kd"] + log["ce"]), rel=1e-6)
    whole = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert log["num_tokens"] < whole


def test_a_second_training_counts_its_tokens_from_nought(tmp_path, rows, tokenizer):
    trainer = make_trainer(tmp_path, rows, tokenizer, max_steps=2)
    counts = []
    for _ in range(2):
        trainer.train()
        counts.append([log["num_tokens"] for log in trainer.state.log_history if "loss" in log])
    assert counts[0] == counts[1]
