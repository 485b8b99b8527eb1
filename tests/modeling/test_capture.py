"""What inner layers compute, against the models' own caches and gradients.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.modeling import KVCapture, cache_keyword, hidden_widths, kv_widths, last_hidden_states
from tests.conftest import FAMILIES, make_model
from tests.families import tiny_model


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


def test_layers_with_several_vectors_per_token_have_no_width():
    model = tiny_model("deepseek_v4")  # four streams; the last layer's are merged
    assert hidden_widths(model, [model.config.num_hidden_layers - 1], "student") == {2: 32}
    with pytest.raises(ValueError, match=r"the output of layer 0 of the student \(DeepseekV4ForCausalLM\)"):
        hidden_widths(model, [0], "student")


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


OWN_ATTENTION = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt")  # not through transformers' function


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_keys_and_values_of_families_with_an_attention_of_their_own(family, checkpointed):
    model = tiny_model(family).train()
    inputs = {"input_ids": torch.arange(10, 22).view(2, 6)}
    expected = cached(model, inputs)
    plain = model(**inputs, use_cache=False).logits
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    capture = KVCapture(model, [0, 1], "post")
    with capture():
        logits = model(**inputs, use_cache=False).logits
    assert torch.equal(logits, plain)  # the cache that is lent to it changes nothing
    found = {layer: capture.features(layer) for layer in (0, 1)}
    for layer, pair in enumerate(expected):
        for ours, theirs in zip(found[layer], pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with capture():  # checkpointing computes the layers again in the backward
        gradients = torch.autograd.grad(
            sum(part.square().sum() for pair in found.values() for part in pair),
            [p for p in model.parameters() if p.requires_grad],
            allow_unused=True,
        )
    if not checkpointed:
        return
    model.gradient_checkpointing_disable()
    with capture():
        model(**inputs, use_cache=False)
    loss = sum(part.square().sum() for layer in (0, 1) for part in capture.features(layer))
    again = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for one, other in zip(gradients, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_their_keys_before_the_rotary_embedding_are_those_after_it_at_position_0(family):
    model = tiny_model(family)
    inputs = {"input_ids": torch.arange(10, 22).view(2, 6)}
    before, after = captured(model, inputs, kv_positions="pre"), captured(model, inputs)
    turns = family in ("codegen", "gptj") or (family == "falcon" and not model.config.alibi)
    for layer in (0, 1):
        keys, rotated = before[layer][0], after[layer][0]
        torch.testing.assert_close(keys[[0, 6]], rotated[[0, 6]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(keys.norm(dim=-1), rotated.norm(dim=-1), rtol=1e-4, atol=1e-6)
        assert torch.equal(keys, rotated) != turns


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


@pytest.mark.parametrize(
    ("family", "settings", "first"),
    [("mamba", {"state_size": 4}, 0), ("lfm2", {"layer_types": ["full_attention", "conv"]}, 1)],
)
def test_layers_without_keys_and_values_are_refused_by_number(family, settings, first):
    model = tiny(family, **settings)
    with pytest.raises(ValueError, match=rf"layer {first} of the student \(\w+ForCausalLM\) has no keys and values"):
        kv_widths(model, range(2), "student")
    if first == 1:
        assert kv_widths(model, [0], "student") == {0: 16}
