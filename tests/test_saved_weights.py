"""Weights that `save_pretrained` wrote, back in a live model: bit for bit, in place, or not at all."""

import signal
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_distill.pruning import drop_layers
from hf_distill.saved_weights import load_weights, misfit
from tests.conftest import make_model

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 8, "moe_num_experts": 4, "d_model": 16, "n_layer": 2,
    "n_head": 4, "n_embd": 16, "n_layers": 2, "n_heads": 4, "num_layers": 2, "ffn_dim": 24, "state_size": 4,
    "mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_dt_rank": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
# Saved under other names than their modules have: experts, a head, fused projections, the whole backbone.
RENAMED = ("mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_neox", "jamba")


def make_family(family: str, seed: int, dtype=torch.float32, **config) -> PreTrainedModel:
    """A model of any family with sizes that fit it, whose numbers all depend on the seed, those of buffers included."""
    known = CONFIG_MAPPING[family]().to_dict()
    settings = {name: value for name, value in SIZES.items() if name in known}
    if isinstance(types := known.get("layer_types"), list) and types:
        settings["layer_types"] = [types[0], types[-1]]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings | config), dtype=dtype)
    return randomise(model, seed)


def randomise(model, seed: int):
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.1)
    return model


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_restores(source, target, folder) -> None:
    """The target gets the source's numbers into the objects that it has."""
    source.save_pretrained(folder)
    objects = {name: id(tensor) for name, tensor in target.state_dict(keep_vars=True).items()}
    assert any(not torch.equal(a, b) for a, b in zip(bits(source).values(), bits(target).values(), strict=True))
    assert misfit(target, folder) is None
    load_weights(target, folder)
    assert_same(bits(target), bits(source))
    assert {name: id(tensor) for name, tensor in target.state_dict(keep_vars=True).items()} == objects


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", RENAMED)
def test_weights_that_are_saved_under_other_names_come_back(tmp_path, family):
    source = make_family(family, 1)
    assert_restores(source, make_family(family, 2), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - source.state_dict().keys()


@contextmanager
def at_most(seconds: int):
    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_weights_of_every_causal_family_come_back(tmp_path, family):
    try:
        with at_most(10):
            source, target = make_family(family, 1), make_family(family, 2)
    except Exception as error:  # noqa: BLE001 - sizes that this family does not take
        pytest.skip(f"{type(error).__name__}: {error}"[:100])
    if sum(parameter.numel() for parameter in source.parameters()) > 1e7:
        pytest.skip("large")
    assert_restores(source, target, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_body_and_a_head_of_different_dtypes_keep_all_their_bits(tmp_path, family):
    models = [make_family(family, seed, torch.bfloat16) for seed in (1, 2)]
    for seed, model in enumerate(models):
        model.lm_head.float()
        randomise(model, seed)
    assert_restores(*models, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
@pytest.mark.parametrize("form", ["shards", "bin", "bin shards"])
def test_shards_and_older_files_come_back(tmp_path, family, form):
    source, target = make_family(family, 1), make_family(family, 2)
    source.save_pretrained(tmp_path, max_shard_size="5KB" if "shards" in form else "1GB")
    if "bin" in form:
        for file in tmp_path.glob("*.safetensors"):
            torch.save(load_file(file), file.with_name(file.name.replace("model", "pytorch_model")).with_suffix(".bin"))
            file.unlink()
        for index in tmp_path.glob("*.index.json"):
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            index.with_name("pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    assert len(list(tmp_path.glob("*model*"))) > (2 if "shards" in form else 0)
    load_weights(target, tmp_path)
    assert_same(bits(target), bits(source))


def test_tied_weights_stay_tied_and_two_values_for_them_are_refused(tmp_path):
    source, target = make_model("qwen2", seed=1), make_model("qwen2", seed=2)
    assert_restores(source, target, tmp_path)
    assert target.lm_head.weight is target.model.embed_tokens.weight
    saved = load_file(tmp_path / "model.safetensors")
    saved["lm_head.weight"] = saved["model.embed_tokens.weight"] + 1
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has other weights for .* than for .*, which are tied in this student"):
        load_weights(target, tmp_path)
    assert_same(bits(target), bits(source))


def test_weights_that_are_no_numbers_come_back(tmp_path):
    source, target = make_model(seed=1), make_model(seed=2)
    source.model.norm.weight.data[0] = float("nan")
    source.save_pretrained(tmp_path)
    load_weights(target, tmp_path)
    assert target.model.norm.weight[0].isnan()


@pytest.mark.parametrize("family", ["mixtral", "llama"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("model.norm.weight"), "missing.*model.norm.weight"),
        (lambda saved: saved.update(strange=torch.ones(1)), "strange"),
        (lambda saved: saved.update({"model.norm.weight": torch.ones(5)}), "model.norm.weight"),
    ],
    ids=["missing", "strange", "of another shape"],
)
def test_weights_that_do_not_match_are_refused_and_nothing_is_copied(tmp_path, family, change, message):
    make_family(family, 1).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    change(saved)
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    target = make_family(family, 2)
    before = bits(target)
    with pytest.raises(ValueError, match=message):
        load_weights(target, tmp_path)
    assert_same(bits(target), before)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no weights of a model"):
        load_weights(make_model(), tmp_path)


class OwnMixtral(MixtralForCausalLM):
    """A family's weights under a user's class."""


class Own(PreTrainedModel):
    """A class that `from_pretrained` could not make, with a buffer that is saved and one that is not."""

    config_class = PreTrainedConfig

    def __init__(self, config, width):
        super().__init__(config)
        self.layer = nn.Linear(width, width)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.post_init()


def test_classes_of_ones_own_come_back(tmp_path):
    config = make_family("mixtral", 0).config
    assert_restores(randomise(OwnMixtral(config), 1), randomise(OwnMixtral(config), 2), tmp_path / "mixtral")
    source, target = randomise(Own(PreTrainedConfig(), 3), 1), randomise(Own(PreTrainedConfig(), 3), 2)
    source.count += 5
    target.cache += 7
    assert_restores(source, target, tmp_path / "own")
    assert (target.count.item(), target.cache.item()) == (5, 7)


def test_a_pruned_and_a_resized_student_come_back(tmp_path):
    def made(seed):
        model = drop_layers(make_family("mixtral", seed, num_hidden_layers=4), [1, 2])
        model.resize_token_embeddings(70)
        return randomise(model, seed)

    assert_restores(made(1), made(2), tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=2, and this student has num_hidden_layers=3"),
        ({"hidden_size": 32}, "hidden_size=16, and this student has hidden_size=32"),
        ({"num_attention_heads": 2, "head_dim": 8}, "num_attention_heads=4"),
        ({"dtype": torch.bfloat16}, "is in float32, and this student in bfloat16"),
    ],
)  # fmt: skip
def test_another_model_is_seen_before_anything_is_loaded(tmp_path, family, changes, message):
    make_family(family, 1).save_pretrained(tmp_path)
    for config in (True, False):  # numbers and shapes tell without a configuration, all but heads
        if not config:
            (tmp_path / "config.json").unlink()
            message = "" if "head_dim" not in changes else None
        found = misfit(make_family(family, 1, **changes), tmp_path)
        assert message is None or (found is not None and message in found)


# ------------------------------------------------------------------------------------------------------------- adapters


ADAPTERS = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "other ranks": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "head and norms": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "experts and attention": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}  # fmt: skip


def adapted(seed: int, settings: dict, family: str = "mixtral", dtype=torch.float32):
    model = get_peft_model(make_family(family, 0, dtype), LoraConfig(r=2, **settings), autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_come_back_whatever_they_adapt_and_in_their_dtype(tmp_path, settings, dtype):
    assert_restores(adapted(1, settings, dtype=dtype), adapted(2, settings, dtype=dtype), tmp_path)


@pytest.mark.parametrize("names", [("default", "other"), ("one", "other"), ("one",)])
def test_all_adapters_come_back_under_any_name(tmp_path, names):
    def made(seed):
        configs = [LoraConfig(r=2 + i, target_modules=["q_proj"]) for i in range(len(names))]
        model = get_peft_model(make_family("mixtral", 0), configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_()
        return model

    assert_restores(made(1), made(2), tmp_path)


OTHER_ADAPTERS = {
    "rank": {"r": 4}, "targets": {"target_modules": ["q_proj"]}, "alpha": {"lora_alpha": 32},
    "DoRA": {"use_dora": True}, "rank-stabilised": {"use_rslora": True}, "head": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "lora_only"}, "start": {"init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.parametrize("changes", OTHER_ADAPTERS.values(), ids=OTHER_ADAPTERS)
def test_other_adapters_are_seen_both_ways_and_another_dropout_is_not(tmp_path, changes):
    settings = {"target_modules": ["q_proj", "v_proj"]}
    models = [
        get_peft_model(make_family("llama", 0, attention_bias=True), LoraConfig(**{"r": 2, **settings, **more}))
        for more in ({}, changes, {"lora_dropout": 0.5})
    ]
    for index in (0, 1):
        models[index].save_pretrained(tmp_path / str(index))
    for index in (0, 1):
        found = misfit(models[index], tmp_path / str(1 - index))
        assert found is not None
        assert found.endswith("pass the model and the peft_config that its run began with")
    assert misfit(models[2], tmp_path / "0") is None


def test_full_and_adapted_students_do_not_take_each_others_weights(tmp_path):
    full, lora = make_family("mixtral", 1), adapted(1, ADAPTERS["LoRA"])
    full.save_pretrained(tmp_path / "full")
    lora.save_pretrained(tmp_path / "lora")
    assert "is of a student with adapters (peft_type='LORA', r=2, " in misfit(full, tmp_path / "lora")
    assert "is of a student that was trained in full, and this one has adapters" in misfit(lora, tmp_path / "full")


def test_a_trained_parameter_that_adapters_do_not_save_is_seen(tmp_path):
    model = adapted(1, ADAPTERS["LoRA"])
    model.save_pretrained(tmp_path)
    model.get_base_model().model.norm.requires_grad_(True)
    assert "not base_model.model.model.norm.weight, which this student trains" in misfit(model, tmp_path)


def test_an_adapter_that_lacks_a_weight_is_refused_and_nothing_is_copied(tmp_path):
    model = adapted(1, ADAPTERS["head and norms"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    saved.pop(next(name for name in saved if "lm_head" in name))
    save_file(saved, tmp_path / "adapter_model.safetensors")
    other = adapted(2, ADAPTERS["head and norms"])
    before = bits(other)
    with pytest.raises(ValueError, match=r"1 missing: .*lm_head"):
        load_weights(other, tmp_path)
    assert_same(bits(other), before)
