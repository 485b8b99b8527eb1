"""The parts of models, against the models' own outputs.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from hf_distill.modeling import (
    check_head,
    head_layer,
    head_of,
    label_positions,
    last_hidden_states,
    load_balancing_loss,
    num_layers,
    num_positions,
    select_positions,
    shared_parameters,
    shared_vocabulary,
)
from tests.conftest import FAMILIES, SENTENCES, make_model, make_tokenizer
from tests.families import tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hidden_states_and_head_give_the_models_own_logits(family, inputs):
    model = make_model(family)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    expected = model(**inputs).logits
    found = head_of(model).logits(last_hidden_states(model, **inputs))
    assert torch.allclose(found, expected, atol=1e-5)
    check_head(model, "student")


# Families that scale their logits by a number of their configuration, each under its own name and in its own direction.
SCALED = {
    "hyperclovax": {"logits_scaling": 0.25},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8, "layer_types": ["full_attention", "full_attention"]},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
}


@pytest.mark.parametrize("family", sorted(SCALED))
def test_logit_scales_of_other_families_are_known(family, inputs):
    sizes = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, **SCALED[family]), dtype=torch.float32
    ).eval()
    nn.init.normal_(model.get_output_embeddings().weight)
    assert head_of(model).logit_scale == 0.25
    expected = model(**inputs, use_cache=False).logits[0]
    assert torch.allclose(head_of(model).logits(last_hidden_states(model, **inputs))[0], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["beam", "recurrent_gemma", "xlstm"])
def test_soft_caps_of_other_families_are_known(family):
    model = tiny_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    ids = torch.arange(2, 12).unsqueeze(0)
    expected = model(input_ids=ids, use_cache=False).logits
    assert expected.abs().max() > 3  # of 5
    found = head_of(model).logits(last_hidden_states(model, input_ids=ids))
    assert torch.allclose(found, expected, atol=1e-4)


def test_label_positions_are_those_before_each_label():
    labels = torch.tensor([[7, -100, 8, 9], [-100, 5, -100, -100]])
    positions, following = label_positions(labels)
    # The label of the first token has nothing before it; the next row's first token does not follow this row's last.
    assert positions.tolist() == [1, 2, 4]
    assert following.tolist() == [8, 9, 5]


def test_label_positions_select_what_cross_entropy_of_shifted_logits_sees():
    torch.manual_seed(0)
    labels = torch.where(torch.rand(3, 8) < 0.5, torch.randint(0, 10, (3, 8)), -100)
    logits = torch.randn(3, 8, 10)
    positions, following = label_positions(labels)
    found = nn.functional.cross_entropy(select_positions(logits, positions), following, reduction="sum")
    expected = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 10), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    assert found == pytest.approx(expected.item())


def test_no_label_gives_no_position():
    for labels in (torch.full((2, 3), -100), torch.tensor([[4], [5]])):
        positions, following = label_positions(labels)
        assert positions.shape == following.shape == (0,)


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, OlmoeConfig])
@pytest.mark.parametrize("with_mask", [False, True])
def test_load_balancing_loss_is_the_models_own(inputs, config_class, with_mask):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=384, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, shared_expert_intermediate_size=16,
        head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        **{"num_local_experts" if config_class is MixtralConfig else "num_experts": 4},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    inputs["attention_mask"] = inputs["attention_mask"] if with_mask else None
    expected = model(**inputs, output_router_logits=True).aux_loss
    outputs = model.base_model(**inputs, output_router_logits=True)
    assert load_balancing_loss(model, outputs, inputs["attention_mask"]).item() == pytest.approx(expected.item())


def test_models_of_several_heads_are_refused_in_words():
    model = tiny_model("musicgen_decoder")
    for function in (head_of, head_layer):
        with pytest.raises(ValueError, match="MusicgenForCausalLM has not one output layer"):
            function(model)


def test_configuration_without_a_number_of_layers_is_refused_in_words():
    assert num_layers(tiny_model("qwen2").config) == 2
    with pytest.raises(ValueError, match="blt does not say how many layers it has"):
        num_layers(tiny_model("blt").config)


def test_same_vocabulary_is_shared_whole_and_added_tokens_are_not(tokenizer):
    extended = make_tokenizer(added_tokens=("<extra>", "<more>"))
    assert shared_vocabulary(tokenizer, tokenizer) == 384
    assert shared_vocabulary(extended, tokenizer) == 384
    assert shared_vocabulary(tokenizer, extended) == 384
    assert shared_vocabulary(extended, make_tokenizer(added_tokens=("<extra>", "<more>"))) == 386
    # What is added at the same place has to be the same, too.
    with pytest.raises(ValueError, match="1 of 386 token ids"):
        shared_vocabulary(extended, make_tokenizer(added_tokens=("<extra>", "<other>")))


def test_smaller_vocabulary_of_the_same_merges_is_another_one_if_an_id_means_something_else(tokenizer):
    with pytest.raises(ValueError, match="different vocabularies"):
        shared_vocabulary(tokenizer, make_tokenizer(corpus=[sentence.upper() for sentence in SENTENCES]))


def test_shared_parameters_are_found_by_memory_and_only_if_trainable():
    student, teacher = make_model(seed=1), make_model(seed=2)
    assert shared_parameters(student, teacher) == []
    teacher.model.norm.weight = student.model.norm.weight
    teacher.lm_head.weight = nn.Parameter(student.lm_head.weight.data)
    assert sorted(shared_parameters(student, teacher)) == ["lm_head.weight", "model.norm.weight"]
    student.lm_head.weight.requires_grad_(False)
    assert shared_parameters(student, teacher) == ["model.norm.weight"]


def test_positions_are_those_of_the_configuration_stretched_by_its_rotary_embedding():
    assert num_positions(make_model("gpt2", n_positions=64)) == 64
    assert num_positions(make_model("llama")) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10_000.0}
    assert num_positions(make_model("llama", rope_parameters=yarn)) == 1024
