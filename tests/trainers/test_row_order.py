"""The rows of each update: whole updates of a stream, passes that are resumed, orders that the seed alone decides."""

import logging

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_distill import (
    HardLabelConfig,
    HardLabelTrainer,
    KDConfig,
    KDTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.trainers.row_order import SeededLengthGroups
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_resuming import assert_same, weights

CONFIGS = {HardLabelTrainer: HardLabelConfig, KDTrainer: KDConfig, SpeculativeKDTrainer: SpeculativeKDConfig}
LEARNING_RATE = 0.05


def rows_of(number: int, column: str = "text") -> list[dict[str, str]]:
    """Texts of different lengths."""
    return [{column: SENTENCES[i % len(SENTENCES)][: 12 + 5 * i]} for i in range(number)]


def stream_of(number: int, kind: type = HardLabelTrainer) -> IterableDataset:
    column = "prompt" if kind is SpeculativeKDTrainer else "text"
    return IterableDataset.from_generator(rows_of, gen_kwargs={"number": number, "column": column})


@pytest.fixture
def make(tokenizer):
    """A trainer of a tiny student, with batches of one row and two of them in an update."""

    def trainer(folder, rows, kind=HardLabelTrainer, eval_dataset=None, **changes):
        settings = {
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": [], "disable_tqdm": True, "optim": "adamw_torch", "learning_rate": 1e-2, "logging_steps": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "no",
        }  # fmt: skip
        teacher = {} if kind is HardLabelTrainer else {"teacher_model": make_model(seed=2)}
        teacher |= {"teacher_processing_class": tokenizer} if teacher else {}
        settings |= {"max_new_tokens": 4} if kind is SpeculativeKDTrainer else {}
        return kind(
            model=make_model(seed=1), args=CONFIGS[kind](**settings | changes), train_dataset=rows,
            eval_dataset=eval_dataset, processing_class=tokenizer, **teacher,
        )  # fmt: skip

    return trainer


def trained_by_hand(rows: list[dict], updates: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights after steps of plain gradient descent in float64, each on the mean over the tokens of its rows."""
    model = make_model(seed=1).double()
    for update in updates:
        losses = []
        for row in (torch.tensor(rows[i]["input_ids"]) for i in update):
            losses.append(F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none"))
        model.zero_grad()
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return model.state_dict()


# ------------------------------------------------------------------------------------------ whole updates of a stream


@pytest.mark.parametrize(
    ("is_stream", "passes"),
    [(True, [(0, 1), (2, 3)] * 3), (False, [(0, 1), (2, 3), (4,)] * 2)],
    ids=["stream", "dataset"],
)
def test_the_rest_of_a_pass_is_an_update_of_a_dataset_and_left_out_of_a_stream(
    tmp_path, make, caplog, is_stream, passes
):
    rows = stream_of(5) if is_stream else Dataset.from_list(rows_of(5))
    trainer = make(
        tmp_path, rows, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "hf_distill"):
        trainer.train()
    expected = trained_by_hand(list(trainer.train_dataset), passes)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    told = [record for record in caplog.records if "ends within an update" in record.message]
    assert len(told) == is_stream
    assert not told or "(1 in this process, of gradient_accumulation_steps=2)" in told[0].message


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_after_the_last_whole_update_of_a_pass_change_nothing(tmp_path, make, kind):
    more, fewer = (make(tmp_path / str(number), stream_of(number, kind), kind) for number in (5, 4))
    more.train()
    fewer.train()
    assert_same(weights(more), weights(fewer))


def test_packs_after_the_last_whole_update_of_a_pass_change_nothing(tmp_path, make, tokenizer):
    ids = [tokenizer(row["text"])["input_ids"] for row in rows_of(10)]
    packs = [{"input_ids": a + b, "seq_lengths": [len(a), len(b)]} for a, b in zip(ids[::2], ids[1::2], strict=True)]
    more, fewer = (
        make(
            tmp_path / str(number),
            Dataset.from_list(packs[:number]).to_iterable_dataset(),
            padding_free=True,
            max_length=None,
        )
        for number in (5, 4)
    )
    more.train()
    fewer.train()
    assert_same(weights(more), weights(fewer))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stream_that_is_shorter_than_an_update_is_refused(tmp_path, make, kind):
    trainer = make(tmp_path, stream_of(3, kind), kind, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=r"fewer batches than the gradient_accumulation_steps=4.*\(3 in this process"):
        trainer.train()


# ------------------------------------------------------------------------------------------------- passes, resumed


def shuffled(rows: IterableDataset) -> IterableDataset:
    return rows.shuffle(seed=3, buffer_size=4)


STREAMS = {
    "several passes": (lambda kind: stream_of(3, kind), {"gradient_accumulation_steps": 1}),
    "a rest in each pass": (lambda kind: stream_of(5, kind), {}),
    "shuffled": (lambda kind: shuffled(stream_of(7, kind)), {}),
    "a worker": (lambda kind: shuffled(stream_of(5, kind)), {"dataloader_num_workers": 1}),
    "a worker that stays": (
        lambda kind: shuffled(stream_of(5, kind)), {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case"), [*((KDTrainer, case) for case in STREAMS), (SpeculativeKDTrainer, "a rest in each pass")]
)
def test_a_stream_goes_on_where_its_run_was_in_any_pass(tmp_path, make, kind, case):
    stream, changes = STREAMS[case]
    changes = {**changes, "save_strategy": "steps", "save_steps": 1, "max_steps": 7}
    whole = make(tmp_path, stream(kind), kind, **changes)
    whole.train()
    for step in (2, 3, 4):
        resumed = make(tmp_path, stream(kind), kind, **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(weights(resumed), weights(whole))
        assert resumed.state.epoch == whole.state.epoch


@pytest.mark.parametrize(("rows", "first"), [(5, 3), (5, 4), (20, 4)])
def test_a_finished_run_of_a_stream_goes_on_with_more_updates(tmp_path, make, rows, first):
    changes = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", stream_of(rows), **changes, max_steps=7)
    whole.train()
    for steps in (first, 6, 7):
        trainer = make(tmp_path / "parts", stream_of(rows), **changes, max_steps=steps)
        trainer.train(resume_from_checkpoint=steps != first)
    assert_same(weights(trainer), weights(whole))


@pytest.mark.parametrize("saved", ["epoch", "steps"])
def test_a_stream_that_goes_on_after_a_pass_does_not_end_it_again(tmp_path, make, saved):
    """Its evaluation would be made twice, and draws random numbers."""

    def trainer():
        found = make(
            tmp_path, stream_of(5), save_strategy=saved, save_steps=1, max_steps=7, eval_strategy="epoch",
            eval_dataset=Dataset.from_list(rows_of(3)),
        )  # fmt: skip
        for module in found.student.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        return found

    def evaluated(run):
        return [log["step"] for log in run.state.log_history if "eval_loss" in log]

    whole = trainer()
    whole.train()
    assert evaluated(whole) == [2, 4, 6, 7]
    for step in (2, 4):  # after the first and the second pass
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(weights(resumed), weights(whole))
        assert evaluated(resumed) == evaluated(whole)


class Passes(TrainerCallback):
    """Counts passes, and ends a run that makes more than ten."""

    def __init__(self):
        self.number = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.number += 1
        assert self.number <= 10


def test_a_finished_run_of_a_stream_that_is_resumed_ends_at_once(tmp_path, make):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    make(tmp_path, stream_of(3), **changes).train()
    trainer, passes = make(tmp_path, stream_of(3), **changes), Passes()
    trainer.add_callback(passes)
    trainer.train(resume_from_checkpoint=True)
    assert passes.number == 1


# --------------------------------------------------------------------------------------------- groups of similar length

LENGTHS = [5, 40, 7, 31, 12, 28, 3, 19, 22, 35, 9, 16]


def test_groups_by_length_have_one_order_in_all_processes_in_each_epoch():
    one, other = (SeededLengthGroups(LengthGroupedSampler(4, lengths=LENGTHS), seed=3) for _ in range(2))
    orders = []
    for epoch in range(3):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        torch.manual_seed(epoch)
        orders.append(list(one))
        torch.rand(7 + epoch)  # what dropout draws in one process
        assert list(other) == list(one) == orders[-1]
        assert sorted(orders[-1]) == list(range(len(LENGTHS)))
    assert len(set(map(tuple, orders))) == 3


def test_groups_by_length_are_those_of_transformers():
    lengths = [3 + 7 * i % 50 for i in range(64)]
    sampler = SeededLengthGroups(LengthGroupedSampler(4, lengths=lengths), seed=3)
    sampler.set_epoch(2)
    generator = torch.Generator().manual_seed(5)
    assert list(sampler) == list(LengthGroupedSampler(4, lengths=lengths, generator=generator))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "random"])
def test_a_run_is_resumed_bit_for_bit_in_any_epoch_of_any_order(tmp_path, make, strategy, processes):
    """`processes` are those among which the loader divides rows; this one trains on its own part alone."""

    def trainer():
        made = make(
            tmp_path, Dataset.from_list(rows_of(9)), train_sampling_strategy=strategy, save_strategy="steps",
            save_steps=1, max_steps=-1, num_train_epochs=2,
        )  # fmt: skip
        made.accelerator.prepare_data_loader = lambda loader, **_: prepare_data_loader(
            loader, num_processes=processes, process_index=0, use_seedable_sampler=True, data_seed=3
        )
        return made

    whole = trainer()
    whole.train()
    updates = whole.state.max_steps // 2
    for step in (updates, updates + 1):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(weights(resumed), weights(whole))


def test_predictions_have_the_order_of_their_rows_whatever_the_training_groups(tmp_path, make, tokenizer):
    rows = Dataset.from_list(rows_of(9))
    trainer = make(tmp_path, rows, train_sampling_strategy="group_by_length", per_device_eval_batch_size=2)
    found = [[token for token in labels.tolist() if token >= 0] for labels in trainer.predict(rows).label_ids]
    assert found == [row["input_ids"] for row in trainer.train_dataset]
