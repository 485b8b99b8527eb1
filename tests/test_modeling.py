"""The insides of models, against the models' own outputs.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy
import functools
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.modeling import (
    CachedReader,
    KVCapture,
    cache_keyword,
    causal_lm,
    check_cache,
    check_head,
    check_load_balancing,
    expose_hidden_states,
    head_layer,
    head_of,
    hidden_widths,
    keep_4bit_weights,
    kv_widths,
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


@pytest.mark.parametrize("what", ["weight", "bias", "scale", "softcap", "weak softcap"])
def test_check_head_notices_a_head_that_is_not_the_models(what, monkeypatch):
    model = make_model("phi")
    nn.init.normal_(model.lm_head.bias)
    right = head_of(model)
    wrong = {
        "weight": right._replace(weight=right.weight.roll(1, 0)),
        "bias": right._replace(bias=None),
        "scale": right._replace(logit_scale=0.5),
        "softcap": right._replace(softcap=1.0),
        "weak softcap": right._replace(softcap=15.0),
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
    model.lm_head.forward = lambda *_: pytest.fail("the head was run")
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


def test_models_of_several_heads_are_refused_in_words():
    model = tiny_model("musicgen_decoder")
    for function in (head_of, head_layer):
        with pytest.raises(ValueError, match="MusicgenForCausalLM has not one output layer"):
            function(model)


@pytest.mark.parametrize("family", ["qwen2", "gemma3n_text"])
def test_two_models_of_one_file_are_captured_at_the_same_time(family):
    ids = torch.arange(2, 12).unsqueeze(0)
    models = [tiny_model(family, seed) for seed in (1, 2)]
    captures = [KVCapture(model, [0, 1]) for model in models]
    expected = []
    for model, capture in zip(models, captures, strict=True):
        with capture():
            last_hidden_states(model, input_ids=ids)
        expected.append(capture.features(1))
    with captures[0]():
        with captures[1]():
            last_hidden_states(models[1], input_ids=ids)
        last_hidden_states(models[0], input_ids=ids)
    for capture, pair in zip(captures, expected, strict=True):
        torch.testing.assert_close(capture.features(1), pair, rtol=0, atol=0)


def test_load_balancing_loss_that_is_not_mixtrals_is_refused_in_words(monkeypatch):
    check_load_balancing(tiny_model("mixtral"), "student")
    with pytest.raises(ValueError, match=r"the student \(DogeForCausalLM\).*set router_aux_loss_coef=0.0"):
        check_load_balancing(tiny_model("doge"), "student")  # it has no experts
    monkeypatch.setattr("hf_distill.modeling.load_balancing_loss", lambda *_: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"the student \(MixtralForCausalLM\) is not that of Mixtral"):
        check_load_balancing(tiny_model("mixtral"), "student")


# -------------------------------------------------------------------------------------------------------------- layers


def test_layers_with_several_vectors_per_token_have_no_width():
    model = tiny_model("deepseek_v4")  # four streams; the last layer's are merged
    assert hidden_widths(model, [model.config.num_hidden_layers - 1], "student") == {2: 32}
    with pytest.raises(ValueError, match=r"what comes out of layer 0 of the student \(DeepseekV4ForCausalLM\)"):
        hidden_widths(model, [0], "student")


def test_configuration_without_a_number_of_layers_is_refused_in_words():
    assert num_layers(tiny_model("qwen2").config) == 2
    with pytest.raises(ValueError, match="blt does not say how many layers it has"):
        num_layers(tiny_model("blt").config)


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
    forward, keyword = model.base_model.forward, cache_keyword(model.base_model)

    @functools.wraps(forward)
    def broken(**kwargs):
        cache = kwargs.get(keyword)
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


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_in_the_forward(keyword, monkeypatch):
    """Remote code keeps the old name whatever transformers calls it, and the other way round."""
    model = make_model("llama")
    forward, its_own = model.model.forward, cache_keyword(model.model)

    def with_cache(input_ids, attention_mask=None, position_ids=None, cache=None, **kwargs):
        return forward(input_ids, attention_mask, position_ids, **{its_own: cache}, use_cache=kwargs["use_cache"])

    def with_past(input_ids, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        return with_cache(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

    monkeypatch.setattr(model.model, "forward", with_cache if keyword == "cache" else with_past)
    assert cache_keyword(model.model) == keyword
    check_cache(model, "student")


def test_a_model_whose_forward_swallows_the_cache_is_refused(monkeypatch):
    """An unknown keyword ends up in `**kwargs` without a word; then every step is read without history."""
    model = make_model("llama")
    for parameter in model.model.layers.parameters():
        parameter.data *= 0.1  # hidden states that hardly depend on the history: comparing them shows nothing
    forward = model.model.forward

    def swallowing(input_ids, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    monkeypatch.setattr(model.model, "forward", swallowing)
    with pytest.raises(ValueError, match="its forward does not fill the cache that it is given as past_key_values"):
        check_cache(model, "teacher")


# ------------------------------------------------------------------------------------------------------ keys and values


def flat(heads):
    """Heads (B, H, T, E) as rows (B * T, H * E)."""
    return torch.stack([heads[b, :, t].reshape(-1) for b in range(heads.shape[0]) for t in range(heads.shape[2])])


def cached(model, inputs):
    """Keys, rotated, and values of each layer, as rows, from the model's own cache."""
    cache = DynamicCache()  # without a configuration it keeps what a sliding window has left behind
    model(**inputs, **{cache_keyword(model): cache}, use_cache=True)
    return [(flat(layer.keys), flat(layer.values)) for layer in cache.layers]


def captured(model, inputs, layers=(0, 1), kv_positions="post", positions=None):
    capture = KVCapture(model, layers, kv_positions)
    with capture(positions):
        model(**inputs, use_cache=False)
    return {layer: capture.features(layer) for layer in capture.heads}


def projected_keys(model, inputs):
    """Keys before the rotary embedding, as rows, by hooks on the key projections, or the norms after them."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "k_norm")):
            index = int(name.split("layers.")[1].split(".")[0])

            def record(module, args, output, index=index):
                if output.dim() == 4 and output.shape[1] != inputs["input_ids"].shape[1]:
                    output = output.transpose(1, 2)
                found[index] = output.reshape(inputs["input_ids"].numel(), -1)  # of a norm: it comes later

            hooks.append(module.register_forward_hook(record))
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_captured_keys_and_values_are_those_of_the_models_own_cache(family, inputs):
    model = make_model(family)
    expected, found = cached(model, inputs), captured(model, inputs)
    assert sorted(found) == [0, 1]
    for layer, pair in enumerate(expected):
        for ours, theirs in zip(found[layer], pair, strict=True):
            assert ours.requires_grad
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keys_before_the_rotary_embedding_differ_from_those_after_it_but_at_position_0(family, inputs):
    model = make_model(family)
    before, after = captured(model, inputs, kv_positions="pre"), captured(model, inputs)
    width = inputs["input_ids"].shape[1]
    for layer in range(2):
        assert torch.equal(before[layer][1], after[layer][1])
        keys, rotated = before[layer][0], after[layer][0]
        assert torch.allclose(keys[[0, width]], rotated[[0, width]], atol=1e-6)
        if family == "gpt2":
            assert torch.equal(keys, rotated)
        else:
            assert not torch.allclose(keys[1], rotated[1], atol=1e-3)
            # A rotation keeps lengths.
            assert torch.allclose(keys.norm(dim=-1), rotated.norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2", "phi3"}))
def test_keys_before_the_rotary_embedding_are_those_of_the_key_projection_and_its_norm(family, inputs):
    model = make_model(family)
    expected, found = projected_keys(model, inputs), captured(model, inputs, kv_positions="pre")
    for layer in range(2):
        assert torch.allclose(found[layer][0], expected[layer], atol=1e-6)


def test_keys_of_a_fused_projection(inputs):
    model, seen = make_model("phi3"), {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.qkv_proj.register_forward_hook(
            lambda module, args, output, index=index: seen.update({index: output.flatten(0, 1)})
        )
    found = captured(model, inputs, kv_positions="pre")
    for layer in range(2):
        assert torch.allclose(found[layer][0], seen[layer][:, 32:48])
        assert torch.allclose(found[layer][1], seen[layer][:, 48:])


def test_only_the_layers_and_positions_asked_for_are_kept(inputs):
    model = make_model(num_hidden_layers=4)
    everything = captured(model, inputs, layers=range(4))
    positions = torch.tensor([3, 0, 17, 17])
    for layers in ([2], [3, 1], []):
        found = captured(model, inputs, layers=layers, positions=positions)
        assert sorted(found) == sorted(layers)
        for layer, pair in found.items():
            assert all(torch.equal(a, b[positions]) for a, b in zip(pair, everything[layer], strict=True))
    none = captured(model, inputs, layers=[0], positions=torch.tensor([], dtype=torch.long))
    assert none[0][0].shape == (0, 16)


def test_positions_may_be_set_inside_and_a_later_run_forgets_the_earlier_one(inputs):
    model = make_model()
    everything = captured(model, inputs)
    capture = KVCapture(model, [1], "post")
    with capture():
        capture.positions = torch.tensor([5])
        model(**inputs)
    assert torch.allclose(capture.features(1)[0], everything[1][0][[5]], atol=1e-6)
    model(**inputs)  # Nothing is watched outside.
    with capture():
        assert capture.heads == {}
        model(input_ids=torch.tensor([[7, 8]]))
    assert capture.features(1)[0].shape == (2, 16)


def weigh(features):
    """A scalar whose gradient is another number everywhere."""
    generator = torch.Generator().manual_seed(3)
    parts = [x for _, pair in sorted(features.items()) for x in pair]
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in parts)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_those_of_the_models_own_cache(family, inputs):
    model = make_model(family)
    expected = gradients(model, weigh(dict(enumerate(cached(model, inputs)))))
    assert_same_gradients(gradients(model, weigh(captured(model, inputs))), expected)


@pytest.mark.parametrize("kv_positions", ["pre", "post"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradient_checkpointing_changes_no_gradient(family, kv_positions, inputs):
    model, positions = make_model(family).train(), torch.tensor([2, 5, 14])

    def loss():
        capture = KVCapture(model, (0, 1), kv_positions)
        with capture(positions):
            logits = model(**inputs, use_cache=False).logits
        return weigh({layer: capture.features(layer) for layer in capture.heads}) + logits.square().mean()

    expected = gradients(model, loss())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, loss())
    assert any(layer.gradient_checkpointing for layer in model.modules() if hasattr(layer, "gradient_checkpointing"))
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("with_checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapters_are_in_the_keys_and_values_and_get_their_gradient(family, with_checkpointing, inputs):
    plain = make_model(family)
    settings = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(plain), settings).train()
    by_hand = projected_keys(model.get_base_model(), inputs)
    expected = gradients(model, weigh({layer: (keys,) for layer, keys in by_hand.items()}))
    if with_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = captured(model, inputs, kv_positions="pre")
    assert not torch.allclose(found[0][0], captured(plain, inputs, kv_positions="pre")[0][0], atol=1e-2)
    for layer, keys in by_hand.items():
        assert torch.allclose(found[layer][0], keys, atol=1e-6)
    assert_same_gradients(gradients(model, weigh({layer: (keys,) for layer, (keys, _) in found.items()})), expected)
    gradients(model, weigh(captured(model, inputs)))
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "v_proj.lora_" in name)


@pytest.mark.parametrize(("outer", "inner"), [("gpt2", "llama"), ("llama", "gpt2"), ("llama", "llama"), ("phi", "phi")])
@pytest.mark.parametrize("kv_positions", ["pre", "post"])
def test_nested_captures_of_two_models_do_not_mix(outer, inner, kv_positions, inputs):
    models = make_model(outer, seed=1), make_model(inner, seed=2)
    alone = [captured(model, inputs, kv_positions=kv_positions) for model in models]
    for first in (0, 1):
        captures = [KVCapture(model, (0, 1), kv_positions) for model in models]
        with captures[0]():
            if first == 0:
                models[0](**inputs)
            with captures[1]():
                models[1](**inputs)
            if first == 1:
                models[0](**inputs)
        for capture, expected in zip(captures, alone, strict=True):
            for layer, pair in expected.items():
                assert all(torch.equal(a, b) for a, b in zip(capture.features(layer), pair, strict=True))


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(raises, inputs):
    models = make_model("llama"), make_model("gemma2", seed=1)
    files = [sys.modules[type(model).__module__] for model in models]
    before = [file.apply_rotary_pos_emb for file in files]
    logits = models[0](**inputs).logits
    captures = [KVCapture(model, [0]) for model in models]
    try:
        with captures[0](), captures[1]():
            assert files[0].apply_rotary_pos_emb is not before[0]
            assert torch.equal(models[0](**inputs).logits, logits)  # Watching changes nothing.
            if raises:
                raise KeyError("stop")
    except KeyError:
        assert raises
    assert [file.apply_rotary_pos_emb for file in files] == before
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert ALL_ATTENTION_FUNCTIONS.get_interface.__self__ is ALL_ATTENTION_FUNCTIONS
    assert torch.equal(models[0](**inputs).logits, logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_capture_the_same(implementation, inputs):
    model = make_model()
    expected = cached(model, inputs)
    model.set_attn_implementation(implementation)
    found = captured(model, inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for i in (0, 1) for a, b in zip(found[i], expected[i], strict=True))


def tiny(family, **settings):
    sizes = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kv_positions", ["pre", "post"])
def test_layers_without_a_rotary_embedding_have_keys_of_their_own(kv_positions, inputs):
    model = tiny("smollm3", num_hidden_layers=3, no_rope_layers=[1, 0, 0])  # 1 is one with
    expected, found = projected_keys(model, inputs), captured(model, inputs, range(3), kv_positions)
    for layer in (1, 2):
        assert torch.allclose(found[layer][0], expected[layer], atol=1e-6)
    assert torch.allclose(found[0][0], expected[0], atol=1e-6) == (kv_positions == "pre")


PER_LAYER = {"head_dim": 8, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8}
ROTATES_KEYS_ALONE = {
    "gemma4_text": {**PER_LAYER, "global_head_dim": 8, "num_kv_shared_layers": 0},
    "gemma3n_text": {
        **PER_LAYER, "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kv_positions", ["pre", "post"])
@pytest.mark.parametrize("family", sorted(ROTATES_KEYS_ALONE))
def test_families_that_rotate_queries_and_keys_one_by_one(family, kv_positions, inputs):
    model = tiny(family, **ROTATES_KEYS_ALONE[family])
    assert kv_widths(model, range(2), "student") == {0: 16, 1: 16}
    found = captured(model, inputs, kv_positions=kv_positions)
    expected = cached(model, inputs)
    if kv_positions == "pre":
        expected = [(keys, values) for (_, values), keys in zip(expected, projected_keys(model, inputs).values())]  # noqa: B905
    for layer in range(2):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[layer], expected[layer], strict=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_kv_widths_count_the_heads_of_keys_and_leave_the_model_as_it_was(family):
    model = make_model(family).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    heads = 4 if family in ("gpt2", "phi") else 2
    assert kv_widths(model, range(2), "student") == {0: heads * 8, 1: heads * 8}
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (2, 16), (4, 4)])
def test_kv_widths_under_grouped_query_attention_are_not_the_hidden_size(heads, head_dim):
    model = make_model("qwen3", num_key_value_heads=heads, head_dim=head_dim)
    assert kv_widths(model, [1], "student") == {1: heads * head_dim}


def test_latent_attention_is_refused_in_words():
    model = tiny(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        moe_intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the teacher \(DeepseekV3ForCausalLM\) has multi-head latent attention"):
        kv_widths(model, range(2), "teacher")


def test_attention_that_attends_twice_is_refused():
    with pytest.raises(ValueError, match=r"layer 0 of the teacher \(DiffLlamaForCausalLM\) has no keys and values"):
        kv_widths(tiny("diffllama", num_key_value_heads=2), range(2), "teacher")


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_layers_without_keys_and_values_are_refused_by_number(family):
    model = tiny(family, **RECURRENT[family])
    first = {"mamba": 0, "lfm2": 1}[family]
    with pytest.raises(ValueError, match=rf"layer {first} of the student \(\w+ForCausalLM\) has no keys and values"):
        kv_widths(model, range(2), "student")
    if first == 1:
        assert kv_widths(model, [0], "student") == {0: 16}


def test_positions_are_those_of_the_configuration_stretched_by_its_rotary_embedding():
    assert num_positions(make_model("gpt2", n_positions=64)) == 64
    assert num_positions(make_model("llama")) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10_000.0}
    assert num_positions(make_model("llama", rope_parameters=yarn)) == 1024
