"""The loss inside a model's forward, and 4-bit weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill.modeling import causal_lm, expose_hidden_states, keep_4bit_weights, last_hidden_states, weights_kind
from tests.conftest import make_model


@pytest.mark.parametrize("with_adapter", [False, True])
def test_with_hidden_runs_inside_the_forward_and_is_given_what_the_head_is_applied_to(inputs, with_adapter):
    model = make_model("gemma2")
    if with_adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = model(**inputs).logits
    expose_hidden_states(causal_lm(model))
    depth, seen = [], []
    model.register_forward_pre_hook(lambda *_: depth.append(True))
    model.register_forward_hook(lambda *_: depth.clear())

    def with_hidden(outputs, head):
        assert depth  # The outermost forward has begun and has not ended.
        seen.append(head.logits(outputs.last_hidden_state))
        return {"loss": outputs.last_hidden_state.sum()}

    terms = model(**inputs, labels=inputs["input_ids"], with_hidden=with_hidden)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert terms["loss"].requires_grad
    assert torch.equal(model(**inputs).logits, expected)  # Without it, nothing has changed.


def test_head_is_not_run_when_hidden_states_are_asked_for(inputs):
    model = make_model()
    model.lm_head.forward = lambda *_: pytest.fail("the head was run")
    last_hidden_states(model, **inputs)
    expose_hidden_states(model)
    model(**inputs, with_hidden=lambda outputs, head: outputs.last_hidden_state)


def test_4bit_weights_are_the_same_after_a_forward_in_eval_mode(tmp_path, inputs):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization).eval()
    keep_4bit_weights(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model(**inputs)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (None, "torch.float32"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "4-bit (bitsandbytes)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 3}, "3-bit (gptq)"),
        (BitsAndBytesConfig(load_in_4bit=True), "4-bit (bitsandbytes)"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_kind_of_weights_is_their_dtype_or_their_bits(config, kind):
    model = make_model()
    if config is not None:
        model.config.quantization_config = config
    assert weights_kind(model) == kind
    assert weights_kind(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == kind
