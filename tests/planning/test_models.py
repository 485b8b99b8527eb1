"""Sizes of models that are made of configurations alone, against models with weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill.planning.models import ModelSpec, make_model, no_memory, read_config, weight_bytes, with_adapters
from tests.conftest import FAMILIES
from tests.conftest import make_model as real_model
from tests.planning.published import CONFIGS, PARAMETERS


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_bytes_of_a_real_model(family, tmp_path):
    model = real_model(family)
    model.config.save_pretrained(tmp_path)
    real = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    with no_memory():
        assert weight_bytes(make_model(ModelSpec(str(tmp_path), "float32"))) == sum(real.values())
        assert weight_bytes(make_model(ModelSpec(str(tmp_path / "config.json"), "float32"))) == sum(real.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_have_the_parameters_of_their_cards(name):
    with no_memory():
        model = make_model(ModelSpec(str(CONFIGS[name])))
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name.removesuffix("-Instruct")]


@pytest.mark.parametrize(("bits", "double"), [(4, True), (4, False), (8, False)])
def test_quantised_weights_have_the_bytes_of_bitsandbytes(bits, double, tmp_path):
    pytest.importorskip("bitsandbytes")
    real_model(hidden_size=64, intermediate_size=192, dtype="bfloat16").to(torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype="auto")
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            tensors += _tensors(module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            tensors += [module.weight.SCB if module.weight.SCB is not None else module.state.SCB]
    real = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    with no_memory():
        found = weight_bytes(make_model(ModelSpec(str(tmp_path), "auto", bits=bits, double_quant=double)))
    assert found == pytest.approx(real, rel=0.005)


def _tensors(state) -> list[torch.Tensor]:
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def test_adapters_are_counted(tmp_path):
    model = real_model("qwen2")
    model.config.save_pretrained(tmp_path)
    lora = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    real = get_peft_model(model, lora)
    with no_memory():
        found = with_adapters(make_model(ModelSpec(str(tmp_path), "float32")), lora)
        assert weight_bytes(found) == sum(t.nbytes for t in (*real.parameters(), *real.buffers()))


def test_no_configuration_is_an_error_of_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path / "nothing"), str(tmp_path / "config.json")):
        with pytest.raises(ValueError, match="no configuration of") as error:
            read_config(name)
        assert "\n" not in str(error.value)
