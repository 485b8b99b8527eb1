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
    num_steady_positions,
    public_name,
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


def test_label_positions_of_a_known_number_are_the_same():
    for seed, share in enumerate((0.0, 0.1, 0.5, 1.0)):
        torch.manual_seed(seed)
        labels = torch.where(torch.rand(5, 40) < share, torch.randint(0, 10, (5, 40)), -100)
        positions, following = label_positions(labels)
        found = label_positions(labels, len(positions))
        assert [each.tolist() for each in found] == [positions.tolist(), following.tolist()]


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
        with pytest.raises(ValueError, match="MusicgenForCausalLM has no single output layer"):
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


# What the configurations on the hub say, and the length that their model cards state.
PUBLISHED = {
    "Llama-3.1-8B": (
        "llama", 131_072, 131_072,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ),
    "Llama-3.2-1B": (  # 32 * 8192 would be twice its length
        "llama", 131_072, 131_072,
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ),
    "Qwen2.5-7B-Instruct, its card's YaRN": (
        "qwen2", 32_768, 131_072, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    ),
    "Qwen3-8B, its card's YaRN": (
        "qwen3", 40_960, 131_072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    ),
    "YaRN that leaves out the original length": ("qwen2", 32_768, 131_072, {"rope_type": "yarn", "factor": 4.0}),
    "DeepSeek-V3": (
        "deepseek_v3", 163_840, 163_840,
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "gpt-oss-20b": (
        "gpt_oss", 131_072, 131_072,
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
    "vicuna-7b-v1.5-16k": ("llama", 4096, 16_384, {"type": "linear", "factor": 4.0}),
    "dynamic": ("llama", 2048, 4096, {"type": "dynamic", "factor": 2.0}),
    "Qwen3-8B as it comes": ("qwen3", 40_960, 40_960, None),
}  # fmt: skip


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_number_of_positions_is_the_length_on_the_model_card(model):
    family, max_position_embeddings, expected, rope_scaling = PUBLISHED[model]
    config = AutoConfig.for_model(
        family, max_position_embeddings=max_position_embeddings, rope_theta=1e6, rope_scaling=rope_scaling
    )
    assert num_positions(config) == expected


def test_number_of_positions_of_longrope_is_stretched_already():
    """As in Phi-3-mini-128k-instruct."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = AutoConfig.for_model(
        "phi3", max_position_embeddings=131_072, original_max_position_embeddings=4096, rope_theta=1e4,
        rope_scaling={"type": "longrope", **factors},
    )  # fmt: skip
    assert num_positions(config) == 131_072


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
CHANGING = {
    "longrope": ("phi3", {"original_max_position_embeddings": 40, "rope_parameters": LONGROPE}, 40),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        40,
    ),
    "llama": ("llama", {}, 256),
    "gpt2": ("gpt2", {}, 256),
}


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_no_token_is_rotated_in_another_way_up_to_the_steady_positions(name):
    """The states of a beginning are those of the whole text; in a longer text they are not."""
    family, settings, expected = CHANGING[name]
    model = make_model(family, **settings)
    assert num_steady_positions(model) == num_steady_positions(model.config) == expected
    ids = torch.arange(2, 2 * expected).unsqueeze(0) % 384
    with torch.no_grad():
        beginning = last_hidden_states(model, input_ids=ids[:, :8])
        whole = last_hidden_states(model, input_ids=ids[:, :expected])[:, :8]
        assert torch.allclose(beginning, whole, atol=1e-5)
        if expected < num_positions(model):
            assert not torch.allclose(beginning, last_hidden_states(model, input_ids=ids)[:, :8], atol=1e-2)


def test_number_of_positions_is_that_of_the_least_stretched_layers():
    """As in gemma-3-4b-it: the layers with full attention are stretched, to the length in the configuration."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    text = {"max_position_embeddings": 131_072, "rope_parameters": rope}
    assert num_positions(AutoConfig.for_model("gemma3_text", **text)) == 131_072
    assert num_positions(AutoConfig.for_model("gemma3", text_config=text)) == 131_072
    rope["sliding_attention"] = dict(rope["full_attention"])
    assert num_positions(AutoConfig.for_model("gemma3_text", **text)) == 8 * 131_072


def test_layers_without_rotary_embedding_limit_no_length():
    """As in BeamForCausalLM, whose layers with full attention have none."""
    config = tiny_model("beam").config
    assert config.rope_parameters["full_attention"] is None
    assert num_positions(config) == 256


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "gptj", "mpt", "openai-gpt", "opt", "roberta", "xlm", "xlm-roberta"]
)
def test_number_of_positions_of_a_table_is_what_the_model_can_read(family):
    model = tiny_model(family)
    limit = num_positions(model)
    last_hidden_states(model, input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        last_hidden_states(model, input_ids=torch.full((1, limit + 1), 5))


@pytest.mark.parametrize("family", ["bloom", "falcon", "mamba", "xlnet"])
def test_models_that_read_any_length_have_no_number_of_positions(family):
    model = tiny_model(family)
    if family == "falcon":
        model.config.alibi = True
        model = type(model)(model.config).eval()
    assert num_positions(model) is None
    assert num_positions(model.config) is None
    last_hidden_states(model, input_ids=torch.full((1, 600), 5))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_rotary_positions_go_on_past_their_number(rope_type):
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4}
    if rope_type in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = 32
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = make_model("llama", max_position_embeddings=64, rope_parameters=rope)
    assert num_positions(model) == {"linear": 128, "dynamic": 128, "yarn": 64, "llama3": 64}[rope_type]
    last_hidden_states(model, input_ids=torch.full((1, 300), 5))


def test_public_name_is_a_hub_id_or_the_last_part_of_a_path(tmp_path):
    model = make_model()
    assert public_name(model) == "LlamaForCausalLM"
    for name, expected in (("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), (f"{tmp_path}/", tmp_path.name), ("", "str")):
        assert public_name(name) == expected
        model.config.name_or_path = name
        assert public_name(model) == (expected if name else "LlamaForCausalLM")
