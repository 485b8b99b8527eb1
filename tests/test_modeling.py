"""The insides of models, against the models' own outputs.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from hf_distill.modeling import (
    CachedReader,
    causal_lm,
    check_cache,
    check_head,
    expose_hidden_states,
    head_of,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    load_balancing_loss,
    select_positions,
    shared_parameters,
    shared_vocabulary,
)
from tests.conftest import FAMILIES, SENTENCES, make_model, make_tokenizer

# ------------------------------------------------------------------------------------------------------ head, backbone


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hidden_states_and_head_give_the_models_own_logits(family, inputs):
    model = make_model(family)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    expected = model(**inputs).logits
    found = head_of(model).logits(last_hidden_states(model, **inputs))
    assert torch.allclose(found, expected, atol=1e-5)
    check_head(model, "student")


def test_damaged_weights_are_refused_in_words():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the teacher's logits are not finite"):
        check_head(model, "teacher")


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


@pytest.mark.parametrize("what", ["weight", "bias", "scale", "softcap"])
def test_check_head_notices_a_head_that_is_not_the_models(what, monkeypatch):
    model = make_model("phi")
    nn.init.normal_(model.lm_head.bias)
    right = head_of(model)
    wrong = {
        "weight": right._replace(weight=right.weight.roll(1, 0)),
        "bias": right._replace(bias=None),
        "scale": right._replace(logit_scale=0.5),
        "softcap": right._replace(softcap=1.0),
    }[what]
    monkeypatch.setattr("hf_distill.modeling.head_of", lambda model: wrong)
    with pytest.raises(ValueError, match=r"the student \(PhiForCausalLM\) does not compute its logits"):
        check_head(model, "student")


def test_check_head_leaves_the_model_as_it_was():
    model = make_model("gpt2", resid_pdrop=0.5).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_head(model, "student")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_check_head_takes_half_precision_and_refuses_a_quantised_head():
    check_head(make_model("granite").to(torch.bfloat16), "teacher")
    model = make_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="the teacher's output layer is quantised"):
        check_head(model, "teacher")


# ----------------------------------------------------------------------------------------- the loss inside the forward


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
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    last_hidden_states(model, **inputs)
    expose_hidden_states(model)
    model(**inputs, with_hidden=lambda outputs, head: outputs.last_hidden_state)


# ---------------------------------------------------------------------------------------------------------- positions


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


# ----------------------------------------------------------------------------------------------- mixtures of experts


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


# -------------------------------------------------------------------------------------------------------- vocabularies


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


# --------------------------------------------------------------------------------------------------------------- memory


def test_shared_parameters_are_found_by_memory_and_only_if_trainable():
    student, teacher = make_model(seed=1), make_model(seed=2)
    assert shared_parameters(student, teacher) == []
    teacher.model.norm.weight = student.model.norm.weight
    teacher.lm_head.weight = nn.Parameter(student.lm_head.weight.data)
    assert sorted(shared_parameters(student, teacher)) == ["lm_head.weight", "model.norm.weight"]
    student.lm_head.weight.requires_grad_(False)
    assert shared_parameters(student, teacher) == ["model.norm.weight"]


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


# --------------------------------------------------------------------------------------------------------------- cache


def fresh_hidden(model, text):
    return model.base_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


def left_padded(texts, pad=0):
    width = max(map(len, texts))
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_reader_reads_what_a_fresh_forward_reads(family):
    """Random reads and rewinds of ragged rows, most of them longer than a sliding window of 8."""
    model = make_model(family)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(3):
            texts = [random.integers(2, 384, random.integers(1, 14)).tolist() for _ in range(random.integers(1, 5))]
            ids, mask = left_padded(texts)
            reader, unread = CachedReader(model, ids, mask.bool()), ids.shape[1]
            for _ in range(7):
                added = torch.from_numpy(random.integers(2, 384, (len(texts), random.integers(0, 5))))
                found = reader.read(added if added.shape[1] or random.random() < 0.5 else None)
                texts = [text + more for text, more in zip(texts, added.tolist(), strict=True)]
                assert found.shape == (len(texts), unread + added.shape[1], 32)
                assert reader.lengths.tolist() == [len(text) for text in texts]
                for row, text in zip(found, texts, strict=True):
                    new = min(len(text), found.shape[1])
                    assert torch.allclose(row[-new:], fresh_hidden(model, text)[-new:], atol=1e-4)
                kept = random.permutation(len(texts))[: random.integers(max(1, len(texts) - 1), len(texts) + 1)]
                counts = [int(random.integers(0, min(len(texts[row]), 9))) for row in kept]
                following = random.integers(2, 384, len(kept))
                reader.rewind(*(torch.tensor(list(values)) for values in (kept, counts, following)))
                texts = [
                    [*texts[row][: len(texts[row]) - count], int(token)]
                    for row, count, token in zip(kept, counts, following, strict=True)
                ]
                unread = 1


def test_cached_reader_forgets_padding_with_the_longest_row():
    """When only short texts go on, the cache is as long as they are."""
    model = make_model()
    ids, mask = left_padded([list(range(5, 45)), [7, 8], [9]])
    reader = CachedReader(model, ids, mask)
    shapes = []
    forward = model.base_model.forward
    model.base_model.forward = lambda **kwargs: (
        shapes.append([list(kwargs[name].shape) for name in sorted(kwargs) if name.endswith(("mask", "ids"))])
        or forward(**kwargs)
    )
    with torch.no_grad():
        reader.read()
        reader.rewind(torch.tensor([2, 1]), torch.tensor([0, 0]), torch.tensor([3, 4]))
        found = reader.read()[:, -1]
    # Mask, tokens, positions.
    assert shapes == [[[3, 40], [3, 40], [3, 40]], [[2, 3], [2, 1], [2, 1]]]
    model.base_model.forward = forward
    expected = torch.stack([fresh_hidden(model, text)[-1] for text in ([9, 3], [7, 8, 4])])
    assert torch.allclose(found, expected, atol=1e-5)


def test_cached_reader_reads_no_padding_token(inputs):
    """The padding may have an id that the model has no embedding for."""
    model = make_model()
    ids, mask = left_padded([[5, 6, 7], [8]], pad=10**6)
    with torch.no_grad():
        found = CachedReader(model, ids, mask).read()[:, -1]
    expected = torch.stack([fresh_hidden(model, text)[-1] for text in ([5, 6, 7], [8])])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_check_cache_takes_every_family_and_leaves_the_model_as_it_was(family):
    model = make_model(family).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_cache(model, "student")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    check_cache(model.eval().to(torch.bfloat16), "student")
    assert not any(module.training for module in model.modules())


RECURRENT = {
    "mamba": {"state_size": 4},
    "rwkv": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["attention", "attention", "recurrent"]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [0]},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
}


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_check_cache_refuses_models_that_remember_more_than_keys_and_values(family):
    sizes = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **RECURRENT[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with pytest.raises(ValueError, match=r"the teacher \(\w+ForCausalLM\) cannot take back what it has read"):
        check_cache(model, "teacher")
    assert model.training


@pytest.mark.parametrize("what", ["values", "mask", "positions"])
def test_check_cache_notices_a_cache_that_does_not_work(what, monkeypatch):
    model = make_model("gpt2")
    forward = model.base_model.forward

    def broken(**kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and what == "mask":
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        elif cache is not None and what == "positions":
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        outputs = forward(**kwargs)
        if cache is not None and what == "values":
            cache.layers[0].values *= 0
        return outputs

    monkeypatch.setattr(model.base_model, "forward", broken)
    with pytest.raises(ValueError, match="its hidden states are others than those of the whole text"):
        check_cache(model, "teacher")
