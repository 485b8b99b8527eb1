"""Reading in pieces, against reading at once."""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.modeling import CachedReader, SlotCache, cache_keyword, caches, check_cache, may_have_slots
from tests.conftest import FAMILIES, make_model


def fresh_hidden(model, text):
    return model.base_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


def left_padded(texts, pad=0):
    width = max(map(len, texts))
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


IN_SLOTS = sorted(name for name in FAMILIES if may_have_slots(make_model(name).config))


@pytest.mark.parametrize(
    ("family", "in_slots"), [*((name, False) for name in sorted(FAMILIES)), *((name, True) for name in IN_SLOTS)]
)
def test_cached_reader_reads_what_a_fresh_forward_reads(family, in_slots, monkeypatch):
    """Random reads and rewinds of ragged rows, most of them longer than a sliding window of 8, and than all slots."""
    monkeypatch.setattr(caches, "SLOTS", 5)
    model = make_model(family)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(3):
            texts = [random.integers(2, 384, random.integers(1, 14)).tolist() for _ in range(random.integers(1, 5))]
            ids, mask = left_padded(texts)
            reader, unread = CachedReader(model, ids, mask.bool(), in_slots), ids.shape[1]
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_slots_serve_both_kinds_of_masks(attention):
    """One text in slots behind padding, in half precision, against the moving cache."""
    model = make_model().to(torch.bfloat16)
    model.set_attn_implementation(attention)
    ids, mask = left_padded([list(range(5, 25)), [7, 8], [9]])
    found = []
    for in_slots in (True, False):
        reader = CachedReader(model, ids, mask, in_slots)
        with torch.no_grad():
            reader.read()
            reader.rewind(torch.tensor([0, 2]), torch.tensor([7, 0]), torch.tensor([3, 4]))
            found.append(reader.read(torch.tensor([[5, 6], [7, 8]])).float())
    assert torch.allclose(*found, atol=0.05)


def test_slots_are_used_once_they_are_known_to_serve(monkeypatch):
    """A cache that is checked, or a window, or a forward that takes no mask for each query."""
    ids = torch.tensor([[3, 4]])
    kind = {}
    for name in ("llama", "mistral", "refuses"):
        model = make_model("llama" if name == "refuses" else name)
        assert not isinstance(CachedReader(model, ids, ids)._cache, SlotCache)
        if name == "refuses":
            forward = model.base_model.forward

            @functools.wraps(forward)
            def refusing(forward=forward, **kwargs):
                if (mask := kwargs.get("attention_mask")) is not None and mask.dim() != 2:
                    raise TypeError("a mask has two dimensions")
                return forward(**kwargs)

            monkeypatch.setattr(model.base_model, "forward", refusing)
        check_cache(model, "student")
        kind[name] = isinstance(CachedReader(model, ids, ids)._cache, SlotCache)
    assert kind == {"llama": True, "mistral": False, "refuses": False}


@pytest.mark.parametrize("settings", [{"sliding_window": 64}, {"layer_types": ["full_attention", "sliding_attention"]}])
def test_layers_with_windows_have_no_slots(settings):
    """Short texts would not show that a window counts slots."""
    config = make_model("qwen2").config
    assert may_have_slots(config)
    for name, value in settings.items():
        setattr(config, name, value)
    assert not may_have_slots(config)


def test_a_row_is_rewound_without_a_copy():
    model = make_model()
    ids, mask = left_padded([[5, 6, 7, 8], [9, 10]])
    reader = CachedReader(model, ids, mask, in_slots=True)
    with torch.no_grad():
        reader.read()
        place = reader._cache.layers[0].keys.data_ptr()
        reader.rewind(torch.tensor([0, 1]), torch.tensor([3, 0]), torch.tensor([4, 5]))
        reader.read(torch.tensor([[6, 7], [7, 8]]))
    assert reader._cache.layers[0].keys.data_ptr() == place


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
    with pytest.raises(ValueError, match="its hidden states differ from those of the whole text"):
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
