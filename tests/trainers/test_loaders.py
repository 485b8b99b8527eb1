"""Data loaders: their workers, their last rows, and the counts of a run that begins anew."""

import multiprocessing

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


def test_evaluations_drop_no_rows(tmp_path, rows, tokenizer):
    changes = {"per_device_eval_batch_size": len(rows) - 1}
    expected = make_trainer(tmp_path, rows, tokenizer, **changes).evaluate()
    trainer = make_trainer(tmp_path, rows, tokenizer, **changes, dataloader_drop_last=True)
    assert trainer.evaluate()["eval_kd"] == expected["eval_kd"]
    assert trainer.args.dataloader_drop_last
    assert len(trainer.get_train_dataloader()) == len(rows) // trainer.args.per_device_train_batch_size


def test_a_batch_that_all_rows_do_not_fill_is_refused_if_it_would_be_dropped(tmp_path, rows, tokenizer):
    changes = {"per_device_train_batch_size": len(rows) + 1}
    with pytest.raises(ValueError, match=rf"has {len(rows)} rows, and dataloader_drop_last=True .*nothing would be"):
        make_trainer(tmp_path, rows, tokenizer, **changes, dataloader_drop_last=True)
    make_trainer(tmp_path, rows, tokenizer, **changes)


def test_nothing_of_a_batch_that_did_not_fit_is_logged(tmp_path, rows, tokenizer):
    trainer = make_trainer(
        tmp_path, rows, tokenizer, auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=1, kd_weight=0.5
    )
    compute = trainer.compute_loss

    def full(model, inputs, *args, **kwargs):
        loss = compute(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) == 4:
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
