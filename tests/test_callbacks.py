"""PerplexityCallback: what it logs against `perplexity` itself, and that a training does not notice it."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_distill import KDConfig, KDTrainer
from hf_distill.callbacks import PerplexityCallback
from hf_distill.evaluation import perplexity
from tests.conftest import SENTENCES, make_model

TEXTS = Dataset.from_dict({"text": SENTENCES})
NAMED = {"first": TEXTS.select(range(3)), "second": TEXTS.select(range(3, 8))}


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        **changes,
    }


def make_trainer(folder, tokenizer, peft_config=None, **changes):
    trainer = KDTrainer(
        make_model(seed=1), make_model(seed=2), KDConfig(**settings(folder, **changes)), TEXTS,
        processing_class=tokenizer, teacher_processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip
    return trainer


def watched(trainer, data=NAMED, every=2, **options):
    trainer.add_callback(PerplexityCallback(trainer, data, every, **options))
    return trainer


def logged(trainer, key="perplexity/first"):
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


LORA = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_logs_the_perplexity_of_every_data_set_at_the_start_while_training_and_at_the_end(
    tmp_path, tokenizer, peft_config, checkpointing
):
    """Under LoRA with dropout and under gradient checkpointing too."""
    trainer = make_trainer(tmp_path, tokenizer, peft_config, gradient_checkpointing=checkpointing)
    expected = {0: {name: perplexity(trainer.model, data, tokenizer)["perplexity"] for name, data in NAMED.items()}}
    watched(trainer, batch_size=3).train()
    expected[5] = {name: perplexity(trainer.model, data, tokenizer)["perplexity"] for name, data in NAMED.items()}
    for name in NAMED:
        found = logged(trainer, f"perplexity/{name}")
        assert [step for step, _ in found] == [0, 2, 4, 5]
        for step in (0, 5):
            assert dict(found)[step] == pytest.approx(expected[step][name], rel=1e-5)
        assert dict(found)[5] != pytest.approx(dict(found)[0], rel=1e-3)


@pytest.mark.parametrize("trainer_class", [SFTTrainer, KDTrainer])
def test_the_training_does_not_notice_that_it_is_measured(tmp_path, tokenizer, trainer_class):
    """Neither its weights nor its own records: those that are due at the same step, and sums that are not due yet."""
    runs = []
    for measured in (False, True):
        changes = {"gradient_checkpointing": True, "logging_steps": 2, "max_steps": 6}
        if trainer_class is KDTrainer:
            trainer = make_trainer(tmp_path, tokenizer, LORA, **changes)
        else:
            args = SFTConfig(**settings(tmp_path, **changes))
            trainer = SFTTrainer(
                make_model(seed=1), args, train_dataset=TEXTS, processing_class=tokenizer, peft_config=LORA
            )
        if measured:
            watched(trainer, every=1)
        modes = []
        trainer.add_callback(Mode(modes))
        trainer.train()
        assert all(modes)
        timing = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        history = [{k: v for k, v in e.items() if k not in timing} for e in trainer.state.log_history]
        runs.append((history, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}))
    (plain, weights), (history, measured_weights) = runs
    records = [entry for entry in history if "perplexity/first" not in entry]
    assert [entry["step"] for entry in records] == [2, 4, 6, 6]
    assert records == plain
    assert len(history) == len(records) + 7
    assert all(set(entry) - set(records[0]) == {"perplexity/first", "perplexity/second"} for entry in history[:1])
    for name, weight in weights.items():
        assert torch.equal(weight, measured_weights[name]), name


class Mode(TrainerCallback):
    """Whether the model is in training mode when the optimizer steps."""

    def __init__(self, found):
        self.found = found

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(model.training)


def test_trackers_and_the_saved_state_have_it(tmp_path, tokenizer):
    trainer = watched(
        make_trainer(tmp_path, tokenizer, report_to=["tensorboard"], max_steps=2),
        TEXTS, every=1, max_length=8, stride=3,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    found = logged(trainer, "perplexity/eval")  # a data set without a name
    assert [step for step, _ in found] == [0, 1, 2]
    last = perplexity(trainer.model, TEXTS, tokenizer, max_length=8, stride=3)["perplexity"]
    assert found[-1][1] == pytest.approx(last, rel=1e-6)
    saved = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [(e["step"], e["perplexity/eval"]) for e in saved if "perplexity/eval" in e] == found
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    tracked = EventAccumulator(str(events)).Reload().Scalars("train/perplexity/eval")
    assert [event.step for event in tracked] == [0, 1, 2]
    assert [event.value for event in tracked] == pytest.approx([value for _, value in found])


def test_a_resumed_run_measures_no_step_twice(tmp_path, tokenizer):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    watched(make_trainer(tmp_path, tokenizer, **changes)).train()
    resumed = watched(make_trainer(tmp_path, tokenizer, **changes))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step for step, _ in logged(resumed)] == [0, 2, 4]


def test_only_the_main_process_measures(tmp_path, tokenizer, monkeypatch):
    trainer = watched(make_trainer(tmp_path, tokenizer))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PerplexityCallback))
    trainer.state.is_world_process_zero = False
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, trainer.model, tokenizer)
    assert trainer.state.log_history == []


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (TEXTS, {"every": 0}, r"every and batch_size have to be at least 1, got 0 and 8"),
        (TEXTS, {"batch_size": 0}, r"every and batch_size have to be at least 1, got 100 and 0"),
        ({}, {}, "datasets is empty"),
        ({"none": TEXTS.select([])}, {}, "the data set 'none' is empty"),
        ({"odd": TEXTS.rename_column("text", "story")}, {}, "data set 'odd' cannot be measured.*columns story"),
        (TEXTS, {"max_length": 8, "stride": 9}, r"below max_length \(8\)"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(tmp_path, tokenizer, data, options, message):
    trainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=message):
        PerplexityCallback(trainer, data, **options)


def test_a_sharded_model_is_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="whole model"):
        PerplexityCallback(trainer, TEXTS)
