"""KDTrainer with adapters: batches cut differently; a student over 4-bit weights, from training to merged model."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill import KDConfig, KDTrainer
from hf_distill.lora import describe_lora, describe_updates, merge_adapter
from hf_distill.modeling import keep_4bit_weights
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import (
    Gradients,
    assert_same_gradients,
    dense_gradients,
    dense_loss,
    gradients_of,
    lora,
    make_trainer,
    nonzero_adapters,
    settings,
)

OPTIONS = {"kd_weight": 0.3, "temperature": 2.0}
LABELS = [1, 2, 3, 1, 60, 12, 40, 25]


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight rows with between 1 and 60 labels."""
    text = tokenizer(" ".join(SENTENCES))["input_ids"]
    ids = [text[7 * i : 7 * i + 4 + count] for i, count in enumerate(LABELS)]
    labels = [[-100] * 4 + row[4:] for row in ids]
    assert [sum(label != -100 for label in row) for row in labels] == LABELS
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture
def student():
    return nonzero_adapters(get_peft_model(make_model("llama", seed=2), lora()))


def norm_of_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative to b."""
    flat = [torch.cat([side[name].flatten() for name in sorted(b)]) for side in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


# ------------------------------------------------------------------------------------------- however the batch is cut


def test_one_row_at_a_time_gives_the_gradients_of_the_whole_batch(tmp_path, tokenizer, rows, teacher, student):
    """A mean per micro-batch, weighting a row of 1 label like one of 60, would give others, and others for each cut."""
    expected = dense_gradients(dense_loss(student, teacher, rows, **OPTIONS), student)
    per_micro_batch = {}
    for size in (1, 4):
        parts = [rows.select(range(start, start + size)) for start in range(0, 8, size)]
        loss = sum(dense_loss(student, teacher, part, **OPTIONS) for part in parts) / len(parts)
        per_micro_batch[size] = dense_gradients(loss, student)
    for a, b in itertools.pairwise([*per_micro_batch.values(), expected]):
        assert norm_of_difference(a, b) > 0.1
    for size in (1, 4, 8):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        found, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer, **OPTIONS, **split)
        assert_same_gradients(found, expected)


def test_one_row_at_a_time_trains_to_the_adapters_of_the_whole_batch(tmp_path, tokenizer, rows, teacher, student):
    """After three clipped updates."""
    updates = {}
    for size in (8, 4, 1):
        trainer = make_trainer(
            tmp_path, copy.deepcopy(student), teacher, rows, tokenizer, **OPTIONS, max_steps=3, max_grad_norm=1.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        after = dict(trainer.model.named_parameters())
        updates[size] = {name: after[name].detach() - value for name, value in before.items()}
    for size in (4, 1):
        assert norm_of_difference(updates[size], updates[8]) < 1e-5


# ------------------------------------------------------------------------------------------------- over 4-bit weights


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def quantised(folder):
    how = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).eval()
    keep_4bit_weights(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25).unsqueeze(0)).logits


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, tokenizer, rows):
    """A run over 4-bit weights by path with an evaluation before the first update: folder, trainer, gradients."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("qlora")
    # Whole blocks of 64 weights: narrower ones are never repacked by bitsandbytes, or not without an error.
    make_model("llama", seed=2, hidden_size=64, intermediate_size=128).save_pretrained(folder / "student")
    make_model("llama", seed=1, hidden_size=64, intermediate_size=128).save_pretrained(folder / "teacher")
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(folder / name)
    capture = Gradients()
    trainer = KDTrainer(
        str(folder / "student"),
        str(folder / "teacher"),
        KDConfig(**settings(folder / "out", max_steps=3, teacher_quantization="4bit", **OPTIONS)),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora(init_lora_weights="gaussian"),
        quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32),
        callbacks=[capture],
    )
    first = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return folder, trainer, first, capture


def test_gradients_over_4bit_weights_are_the_dense_formula_also_after_an_evaluation(qlora, rows):
    folder, trainer, first, capture = qlora
    student = get_peft_model(quantised(folder / "student"), lora(init_lora_weights="gaussian"))
    assert student.load_state_dict(first, strict=False).unexpected_keys == []
    loss = dense_loss(student, quantised(folder / "teacher"), rows, **OPTIONS)
    # TRL keeps these adapters in bfloat16.
    assert_same_gradients(capture.first, dense_gradients(loss, student), rtol=1e-2)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert losses[-1] < losses[0]
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    assert {type(layer.base_layer).__name__ for layer in layers} == {"Linear4bit"}
    report = describe_lora(quantised(folder / "student"), lora())
    assert report.trainable_parameters == sum(gradient.numel() for gradient in capture.first.values())


def test_description_of_a_run_says_the_bits_of_student_and_teacher(qlora):
    described = qlora[1].describe_run()
    assert described["student"] == "4-bit (bitsandbytes), mixed precision no, cpu"
    (teacher,) = [text for name, text in described.items() if name.startswith("teacher")]
    assert teacher.startswith("4-bit (bitsandbytes), ")


def test_adapter_over_4bit_weights_reloads_to_the_same_logits(qlora):
    folder, trainer, _, _ = qlora
    reloaded = PeftModel.from_pretrained(quantised(folder / "student"), folder / "out")
    for name, parameter in reloaded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()  # as TRL trains them; PEFT reloads them in float32
    expected = logits(trainer.model.eval())
    assert torch.equal(logits(reloaded), expected)
    assert (logits(quantised(folder / "student")) - expected).abs().max() > 0.1


def test_adapter_over_4bit_weights_is_merged_into_the_student_as_it_was_saved(qlora):
    folder, trainer, _, _ = qlora
    merge_adapter(folder / "out", folder / "merged")
    student = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    changed = {}
    for name, weight in merged.state_dict().items():
        if not torch.equal(weight, student[name]):
            changed[name.removesuffix(".weight")] = weight - student[name]
    norms = {update.name: update.norm for update in describe_updates(trainer.model).modules}
    assert changed.keys() == norms.keys()
    assert len(changed) == 2 * 3  # layers x modules
    for name, norm in norms.items():
        assert changed[name].norm().item() == pytest.approx(norm, rel=1e-3), name
    plain = AutoModelForCausalLM.from_pretrained(folder / "student")
    exact = logits(PeftModel.from_pretrained(plain, folder / "out"))
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=1e-5)
