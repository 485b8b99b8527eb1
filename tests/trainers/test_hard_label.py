"""HardLabelTrainer: SFTTrainer's loss, KDTrainer's updates without a teacher, and runs that survive."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_distill import HardLabelConfig, HardLabelTrainer, KDConfig, KDTrainer
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import Gradients, assert_same_gradients, settings

TEXT = Dataset.from_dict({"text": [text[: 40 + 7 * i] for i, text in enumerate(SENTENCES)]})
WORDS = [text.split(" ", 4) for text in SENTENCES]
PAIRS = Dataset.from_dict({"prompt": [" ".join(w[:4]) for w in WORDS], "completion": [" " + w[4] for w in WORDS]})
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": w[0]}, {"role": "assistant", "content": w[4]}]} for w in WORDS]
)
CASES = {
    "text": (TEXT, {}),
    "completions": (PAIRS, {}),
    "conversations": (CHATS, {}),
    "short": (TEXT, {"max_length": 12}),
    "packed": (TEXT, {"packing": True, "max_length": 48}),
    "micro-batches": (TEXT, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
}


def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def first_update(trainer, config, folder, rows, tokenizer, *, family="llama", teachers=(), **changes):
    capture = Gradients()
    own = {"teacher_processing_class": tokenizer} if teachers else {}
    made = trainer(
        make_model(family, seed=4), *teachers, args=config(**settings(folder, **changes)), train_dataset=rows,
        processing_class=tokenizer, callbacks=[capture], **own,
    )  # fmt: skip
    made.train()
    return capture.first, made.state.log_history[0], made


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_sft_trainer(tmp_path, tokenizer, case):
    rows, changes = CASES[case]
    if case == "packed":
        changes = {**changes, "max_length": 48}
    tokenizer = chatty(tokenizer)
    expected, theirs, _ = first_update(SFTTrainer, SFTConfig, tmp_path / "sft", rows, tokenizer, **changes)
    found, log, _ = first_update(HardLabelTrainer, HardLabelConfig, tmp_path / "ours", rows, tokenizer, **changes)
    assert_same_gradients(found, expected)
    assert log["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert log["ce"] == pytest.approx(log["loss"], rel=1e-5)
    assert log["student_entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "phi"])
def test_updates_are_those_of_a_distillation_whose_teacher_has_no_weight(tmp_path, tokenizer, family):
    expected, theirs, _ = first_update(
        KDTrainer, KDConfig, tmp_path / "kd", PAIRS, tokenizer, family=family, teachers=[make_model(seed=5)],
        kd_weight=0.0,
    )  # fmt: skip
    found, log, _ = first_update(HardLabelTrainer, HardLabelConfig, tmp_path / "ours", PAIRS, tokenizer, family=family)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (log["loss"], log["ce"]) == (theirs["loss"], theirs["ce"])


def test_evaluations_do_not_depend_on_the_batch_size(tmp_path, tokenizer):
    found = [
        HardLabelTrainer(
            make_model(seed=4), HardLabelConfig(**settings(tmp_path, per_device_eval_batch_size=size)), TEXT, TEXT,
            tokenizer,
        ).evaluate()
        for size in (1, 3, 8)
    ]  # fmt: skip
    for metrics in found[1:]:
        assert metrics["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
        assert metrics["eval_ce"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
    assert not any("kd" in name or "agreement" in name for name in found[0])


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_a_resumed_run_goes_on_with_the_same_numbers(tmp_path, tokenizer, peft_config):
    def make():
        args = HardLabelConfig(
            **settings(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch")
        )
        return HardLabelTrainer(make_model(seed=4), args, TEXT, processing_class=tokenizer, peft_config=peft_config)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "checkpoint-4" / "run.json").exists()


def test_checkpoints_of_a_distillation_are_refused_and_the_other_way_round(tmp_path, tokenizer):
    options = settings(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    HardLabelTrainer(make_model(seed=4), HardLabelConfig(**options), TEXT, processing_class=tokenizer).train()
    other = KDTrainer(
        make_model(seed=4), make_model(seed=5), KDConfig(**options), TEXT, processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(ValueError, match="is of a run of HardLabelTrainer, and this one is of KDTrainer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_non_finite_loss_stops_the_run_before_it_reaches_the_weights(tmp_path, tokenizer):
    student = make_model(seed=4)
    trainer = HardLabelTrainer(student, HardLabelConfig(**settings(tmp_path)), TEXT, processing_class=tokenizer)
    with torch.no_grad():
        student.lm_head.weight[3] = torch.inf
    before = copy.deepcopy(student.model.state_dict())
    with pytest.raises(FloatingPointError, match="non-finite training at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    assert (tmp_path / "emergency").exists()


def test_settings_of_a_distillation_and_other_settings_are_refused(tmp_path, tokenizer):
    for args, message in (
        (KDConfig(**settings(tmp_path)), "HardLabelTrainer has no teacher, but got a KDConfig"),
        (SFTConfig(**settings(tmp_path)), "args has to be a HardLabelConfig, got SFTConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            HardLabelTrainer(make_model(seed=4), args, TEXT, processing_class=tokenizer)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]})
    with pytest.raises(ValueError, match="no row of the train dataset has a label left"):
        HardLabelTrainer(make_model(seed=4), HardLabelConfig(**settings(tmp_path)), rows, processing_class=tokenizer)
