"""LocalTeacher and load_teacher: the right dtype, the right device, nothing quantised unasked, nothing trained.

Shapes: B batch, T tokens, N positions, D hidden width, V vocabulary.
"""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill.modeling import head_of
from hf_distill.teachers.loading import check_quantization, load_teacher
from hf_distill.teachers.local import LocalTeacher
from tests.conftest import FAMILIES, make_model

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- the signal


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_signal_is_the_models_own_logits_at_the_asked_positions(family, inputs):
    model = make_model(family)
    expected = model(**inputs).logits.flatten(0, 1)  # (B * T, V)
    positions = torch.tensor([14, 0, 7, 7])
    hidden, head, *_ = LocalTeacher(model, CPU)(inputs, positions)
    assert torch.allclose(head.logits(hidden), expected[positions], atol=1e-5)
    assert not hidden.requires_grad


def test_no_position_gives_an_empty_signal(inputs):
    hidden, *_ = LocalTeacher(make_model(), CPU)(inputs, torch.tensor([], dtype=torch.long))
    assert hidden.shape == (0, 32)


def test_teacher_with_an_adapter_answers_with_it(inputs):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], r=2))
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    expected = model(**inputs).logits.flatten(0, 1)
    hidden, head, *_ = LocalTeacher(model, CPU)(inputs, torch.arange(5))
    assert torch.allclose(head.logits(hidden), expected[:5], atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits.flatten(0, 1)[:5], expected[:5], atol=1e-2)


def test_asking_leaves_the_batch_as_it_was_and_survives_ids_that_the_teacher_cannot_embed(inputs):
    teacher = LocalTeacher(make_model(), CPU)
    inputs["input_ids"][1, 7:] = 400  # Another tokenizer's padding: behind the mask, past the embedding.
    before = {name: value.clone() for name, value in inputs.items()}
    hidden = teacher(inputs, torch.arange(19)).hidden
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    inputs["input_ids"][1, 7:] = 3
    assert torch.equal(hidden, teacher(inputs, torch.arange(19)).hidden)


def test_teacher_goes_back_to_eval_mode_when_something_has_put_it_into_training_mode(inputs):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    teacher = LocalTeacher(model.train(), CPU)
    first = teacher(inputs, torch.arange(9)).hidden
    model.train()
    assert torch.equal(teacher(inputs, torch.arange(9)).hidden, first)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_model_whose_logits_are_not_what_its_head_says_is_refused():
    model = make_model()
    forward = model.forward

    def other_forward(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = 3 * outputs.logits
        return outputs

    model.forward = other_forward
    with pytest.raises(ValueError, match=r"the teacher \(LlamaForCausalLM\) does not compute its logits"):
        LocalTeacher(model, CPU)


# ---------------------------------------------------------------------------------------------------------- the loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_teacher_is_loaded_in_the_dtype_it_was_saved_in(tmp_path, dtype):
    make_model().to(dtype).save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert load_teacher(str(tmp_path), device="cpu", init_kwargs={"dtype": "float64"}).dtype == torch.float64


def test_loaded_teacher_is_the_saved_one_and_its_name_holds_no_directory(tmp_path, inputs):
    saved = make_model("gemma2")
    saved.save_pretrained(tmp_path / "secret" / "my-teacher")
    model = load_teacher(str(tmp_path / "secret" / "my-teacher"), device="cpu")
    assert torch.equal(model(**inputs).logits, saved(**inputs).logits)
    assert LocalTeacher(model, CPU).name == "my-teacher"
    assert LocalTeacher(saved, CPU).name == "Gemma2ForCausalLM"
    saved.config.name_or_path = "google/gemma-2-9b"
    assert LocalTeacher(saved, CPU).name == "google/gemma-2-9b"


def test_loaded_model_is_used_as_it_is():
    model = make_model().to(torch.bfloat16)
    assert load_teacher(model, device="cpu") is model
    assert model.dtype == torch.bfloat16


def test_head_is_copied_to_the_device_that_asks_once_and_hidden_states_wait_where_they_are(inputs):
    # "meta" stands for a second device: tensors really have to be moved to get there. Moved at once, hidden states
    # would make the student's device wait for the teacher before the student's own forward.
    teacher = LocalTeacher(make_model("phi"), torch.device("meta"))
    signals = [teacher(inputs, torch.arange(4)) for _ in range(2)]
    for hidden, head, *_ in signals:
        assert (hidden.device.type, head.weight.device.type, head.bias.device.type) == ("cpu", "meta", "meta")
    assert signals[0].head.weight is signals[1].head.weight
    assert {parameter.device.type for parameter in teacher.model.parameters()} == {"cpu"}


# ------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize(("quantization", "layer"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantisation_on_request_reaches_all_but_the_head_is_logged_and_stays_close(
    tmp_path, inputs, caplog, quantization, layer
):
    pytest.importorskip("bitsandbytes")
    saved = make_model(hidden_size=64, intermediate_size=128)
    saved.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        model = load_teacher(str(tmp_path), device="cpu", quantization=quantization)
    assert f"teacher loaded in {quantization}" in caplog.text
    layers = [name for name, module in model.named_modules() if type(module).__name__ == layer]
    assert len(layers) == 2 * 7  # layers x linear maps
    assert "lm_head" not in layers
    hidden, head, *_ = LocalTeacher(model, CPU)(inputs, torch.arange(19))
    expected = saved(**inputs).logits.flatten(0, 1)[:19]
    correlation = torch.corrcoef(torch.stack([head.logits(hidden).flatten(), expected.flatten()]))[0, 1]
    assert correlation > 0.9
    assert not torch.allclose(head.logits(hidden), expected, atol=1e-4)  # It really was quantised.


def test_4bit_teacher_is_left_as_it_came(tmp_path, inputs):
    pytest.importorskip("bitsandbytes")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), device="cpu", quantization="4bit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    LocalTeacher(model, CPU)(inputs, torch.arange(3))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_nothing_is_quantised_unasked(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), device="cpu")
    assert not any("bit" in type(module).__name__ for module in model.modules())
    assert getattr(model, "quantization_method", None) is None


def test_4bit_teacher_and_full_student_keep_apart(tmp_path, tokenizer, text_dataset):
    pytest.importorskip("bitsandbytes")
    from hf_distill import KDConfig, KDTrainer

    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    student = make_model(seed=2)
    args = KDConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2, teacher_quantization="4bit",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = KDTrainer(
        student, str(tmp_path / "teacher"), args, text_dataset,
        processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.teacher.model.modules())
    assert not any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    assert trainer.describe()["teacher"] == "teacher"
    assert trainer.describe()["weights of the teacher"] == "4-bit (bitsandbytes)"


@pytest.mark.parametrize("way", ["object", "folder", "two"])
def test_the_card_says_that_a_teachers_weights_are_quantised_however_they_came(tmp_path, tokenizer, text_dataset, way):
    pytest.importorskip("bitsandbytes")
    from hf_distill import KDConfig, KDTrainer

    make_model(seed=1).save_pretrained(tmp_path / "whole")
    kwargs: dict = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **kwargs)
    teacher.save_pretrained(tmp_path / "saved")
    given = {"object": teacher, "folder": str(tmp_path / "saved"), "two": {"a": make_model(seed=3), "b": teacher}}[way]
    args = KDConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[])
    trainer = KDTrainer(
        make_model(seed=2), given, args, text_dataset,
        processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    trainer.create_model_card()
    kind = f"{'b: ' * (way == 'two')}8-bit (bitsandbytes)"
    assert f"| weights of the teacher | {kind} |" in (tmp_path / "out" / "README.md").read_text()


def test_quantisation_of_a_loaded_model_is_refused():
    with pytest.raises(ValueError, match="this one is already loaded"):
        load_teacher(make_model(), device="cpu", quantization="4bit")


def test_unknown_quantisation_and_missing_bitsandbytes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of 4bit, 8bit, got 'int3'"):
        check_quantization("int3")
    monkeypatch.setattr("hf_distill.teachers.loading.is_bitsandbytes_available", lambda: False)
    check_quantization(None)
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pip install 'hf_distill\[quantization\]'"):
        load_teacher(str(tmp_path), device="cpu", quantization="8bit")


def test_model_without_weights_is_refused():
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="meta device: it has no weights"):
        load_teacher(model, device="cpu")


def test_settings_of_the_caller_are_left_as_they_were(tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = {"attn_implementation": "eager"}
    before = copy.deepcopy(settings)
    model = load_teacher(str(tmp_path), device="cpu", init_kwargs=settings)
    assert settings == before
    assert model.config._attn_implementation == "eager"


def test_head_of_a_teacher_is_not_copied_on_its_own_device():
    model = make_model()
    assert LocalTeacher(model, CPU).head.weight.data_ptr() == head_of(model).weight.data_ptr()
