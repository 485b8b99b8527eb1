"""What a LoraConfig trains against what PEFT trains, updates against full matrices, merged models against adapters."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, LlamaConfig, MixtralConfig

from hf_distill.lora import describe_lora, describe_updates, merge_adapter
from tests.conftest import make_model

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
READ = [80, 239]  # token ids that `logits` reads
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **changes})


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def gpt2_small():
    return on_meta(GPT2Config())


def moe(**changes):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def trained(model, config, std=0.05):
    """Adapters with random values, as if they had been trained."""
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return adapted.eval()


def logits(model):
    ids = torch.randint(2, 384, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


# ------------------------------------------------------------------------------------------------- before the training


def test_c_proj_of_gpt2_is_attention_and_mlp():
    report = describe_lora(gpt2_small(), lora(r=8, target_modules=["c_attn", "c_proj"]))
    assert report.trainable_parameters == 811_008 == 12 * (24_576 + 12_288 + 30_720)
    by_kind = {kind: sum(m.parameters for m in report.modules if m.kind == kind) for kind in ("attention", "mlp")}
    assert by_kind == {"attention": 442_368, "mlp": 368_640}
    (warning,) = report.warnings
    assert warning.startswith("'c_proj' matches modules of different kinds: 12 attention and 12 mlp;")
    assert "'attn.c_proj' or 'mlp.c_proj'" in warning

    report = describe_lora(gpt2_small(), lora(r=8, target_modules=["c_attn", "attn.c_proj"]))
    assert report.trainable_parameters == 442_368
    assert report.warnings == []


def test_rows_have_names_kinds_and_shapes_of_the_modules():
    modules = {m.name: m for m in describe_lora(gpt2_small(), lora(r=8, target_modules=["c_attn", "c_proj"])).modules}
    assert len(modules) == 36
    c_attn, c_proj = modules["transformer.h.0.attn.c_attn"], modules["transformer.h.11.mlp.c_proj"]
    assert (c_attn.kind, c_attn.in_features, c_attn.out_features, c_attn.rank) == ("attention", 768, 2304, 8)
    assert (c_attn.a_shape, c_attn.b_shape, c_attn.parameters) == ((8, 768), (2304, 8), 8 * (768 + 2304))
    assert (c_proj.kind, c_proj.in_features, c_proj.out_features) == ("mlp", 3072, 768)


def test_seven_projections_of_an_8b_llama_are_counted_without_its_weights():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256,
    )  # fmt: skip
    report = describe_lora(on_meta(config), lora(r=8, target_modules=PROJECTIONS))
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    assert report.trainable_parameters == 32 * 8 * (attention + 3 * (4096 + 14336))
    assert report.total_parameters == 8_030_261_248
    assert report.warnings == []
    lines = [line for line in str(report).splitlines() if "_proj" in line]
    assert [line.split()[0].split(".")[1] for line in lines] == PROJECTIONS
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].split()[1:] == ["attention", "32", "4096→8→1024", "1,310,720", "0.02%"]
    assert "20,971,520 trainable parameters, 0.26% of 8,030,261,248" in str(report)


SETTINGS = {
    "PEFT's default": {"target_modules": None},
    "all-linear": {},
    "names": {"target_modules": ["q_proj", "o_proj", "qkv_proj", "c_attn", "down_proj", "c_proj"], "use_rslora": True},
    "pattern": {"target_modules": r".*\.1\..*(q_proj|qkv_proj|c_attn)"},
    "some layers": {
        "target_modules": ["q_proj", "qkv_proj", "c_attn"], "layers_to_transform": [1],
        "layers_pattern": ["layers", "h"],
    },
    "left out": {"exclude_modules": r".*(down_proj|c_fc)"},
    "ranks": {"rank_pattern": {"o_proj": 2, r".*\.0\.mlp.*": 7}, "alpha_pattern": {"o_proj": 3}},
    "DoRA": {"use_dora": True},
    "all biases": {"bias": "all"},
    "biases of adapted modules": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "MiCA": {"init_lora_weights": "mica"},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"target_modules": ["embed_tokens", "wte", "lm_head"]},
    "tied embeddings": {"target_modules": ["embed_tokens", "wte"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [3, 5]},
    "layers twice": {"layer_replication": [(0, 2), (1, 2)]},
}  # fmt: skip

REFUSED = {
    ("gpt2", "layers twice"): "Could not locate the layers attribute",
    ("phi3", "PEFT's default"): "Please specify `target_modules`",
}


def trainable_by_module(adapted: PeftModel) -> dict[str, int]:
    """Trainable parameters under the names that modules had before PEFT wrapped them."""
    counts: dict[str, int] = {}
    for name, parameter in adapted.get_base_model().named_parameters():
        if parameter.requires_grad:
            for inside in (".lora_", ".base_layer", ".modules_to_save", ".token_adapter", ".weight", ".bias"):
                name = name.split(inside)[0]
            counts[name] = counts.get(name, 0) + parameter.numel()
    return counts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi3", "gemma2"])
def test_report_is_what_get_peft_model_trains(family, setting):
    model = make_model(family)
    if (family, setting) in REFUSED:
        for describe in (describe_lora, get_peft_model):
            with pytest.raises(ValueError, match=REFUSED[family, setting]):
                describe(model, lora(**SETTINGS[setting]))
        return
    report = describe_lora(model, lora(**SETTINGS[setting]))
    adapted = get_peft_model(copy.deepcopy(model), lora(**SETTINGS[setting]))
    assert report.trainable_parameters == adapted.get_nb_trainable_parameters()[0] > 0
    assert {module.name: module.parameters for module in report.modules} == trainable_by_module(adapted)
    for module in report.modules:
        if module.rank is not None:
            layer = adapted.get_base_model().get_submodule(module.name)
            assert module.rank == layer.r["default"]
            a, b = layer.lora_embedding_A or layer.lora_A, layer.lora_embedding_B or layer.lora_B
            shapes = [tuple(getattr(side["default"], "weight", side["default"]).shape) for side in (a, b)]
            assert shapes == [module.a_shape, module.b_shape]
            assert shapes == [(module.rank, module.in_features), (module.out_features, module.rank)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
def test_model_on_the_meta_device_gives_the_same_report(setting):
    model = make_model("llama")
    expected = describe_lora(model, lora(**SETTINGS[setting]))
    assert describe_lora(on_meta(model.config), lora(**SETTINGS[setting])) == expected


MOE_SETTINGS = {
    "all-linear": {},
    "names": {"target_modules": PROJECTIONS},
    "experts": EXPERTS,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", MOE_SETTINGS)
def test_report_of_a_mixture_of_experts_is_what_get_peft_model_trains(setting):
    model = moe()
    report = describe_lora(model, lora(**MOE_SETTINGS[setting]))
    adapted = get_peft_model(copy.deepcopy(model), lora(**MOE_SETTINGS[setting]))
    assert report.trainable_parameters == adapted.get_nb_trainable_parameters()[0]
    assert len({module.name for module in report.modules}) == len(report.modules)
    experts = {m.name.removeprefix("model.layers.0.mlp."): m for m in report.modules if "layers.0.mlp.exp" in m.name}
    out_of_reach = [warning for warning in report.warnings if "weights of several experts" in warning]
    if setting == "experts":
        assert experts["experts.gate_up_proj"].a_shape == (4 * 4, 32)
        assert experts["experts.gate_up_proj"].b_shape == (2 * 48, 4 * 4)
        assert experts["experts.down_proj"].parameters == 4 * 4 * (48 + 32)
        assert {module.kind for module in experts.values()} == {"mlp"}
    if setting == "names":
        assert len(out_of_reach) == 1
        assert "target_parameters=['experts.gate_up_proj']" in out_of_reach[0]
    else:
        assert out_of_reach == []


KINDS = {
    "gpt2": {"attn.c_attn": "attention", "attn.c_proj": "attention", "mlp.c_fc": "mlp", "mlp.c_proj": "mlp"},
    "llama": {"self_attn.q_proj": "attention", "self_attn.o_proj": "attention", "mlp.down_proj": "mlp"},
    "phi3": {"self_attn.qkv_proj": "attention", "mlp.gate_up_proj": "mlp"},
    "phi": {"self_attn.dense": "attention", "mlp.fc1": "mlp"},
}


@pytest.mark.parametrize("family", KINDS)
def test_kinds_are_told_by_place_and_not_by_name(family):
    model = make_model(family)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    report = describe_lora(model, lora(modules_to_save=[head, "wte", "embed_tokens"]))
    found = {module.name.split(".", 3)[-1]: module.kind for module in report.modules}
    assert KINDS[family].items() <= found.items()
    assert {module.kind for module in report.modules if module.rank is None} == {"head", "embedding"}


def snapshot(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, gradients, model.config.to_dict(), model.training


def test_model_and_config_stay_as_they_were():
    model = make_model("gpt2")
    model.transformer.wpe.requires_grad_(False)
    config = lora(target_modules=None, init_lora_weights="olora", bias="all", modules_to_save=["lm_head"])
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    settings = copy.deepcopy(config.to_dict())
    describe_lora(model, config)
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert config.to_dict() == settings


class Largest(TorchDispatchMode):
    """The largest tensor with values that is made within it."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        self.size = max([self.size, *made])
        return result


def test_nothing_as_large_as_a_weight_is_allocated():
    model = make_model("llama", hidden_size=64, intermediate_size=64)
    with Largest() as largest:
        describe_lora(model, lora(r=2, use_dora=True))
    assert largest.size <= 2 * 64


@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantised_model_is_described_as_the_one_it_was_made_from(tmp_path, how):
    pytest.importorskip("bitsandbytes")
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**how))
    report = describe_lora(quantised, lora(use_dora=True))
    assert report == describe_lora(model, lora(use_dora=True))
    assert (
        report.trainable_parameters == get_peft_model(quantised, lora(use_dora=True)).get_nb_trainable_parameters()[0]
    )


WARNINGS = {
    "a name that is not there": (
        {"target_modules": ["q_proj", "dwn_proj"]}, ["'dwn_proj' matches no module; near it: down_proj"],
    ),
    "a name like no other": ({"target_modules": ["q_proj", "xyz"]}, ["'xyz' matches no module; nothing is near it"]),
    "a name that is left out": (
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
        ["'o_proj' matches no module; exclude_modules, layers_to_transform or modules_to_save leave it out"],
    ),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, ["the output layer lm_head gets an adapter"]),
    "a rank above the width": (
        {"target_modules": ["q_proj", "k_proj"], "r": 24},
        ["rank 24 is above the smaller width of 2 modules (model.layers.0.self_attn.k_proj: 16)"],
    ),
    "a bias for layers without one": ({"lora_bias": True}, ["`lora_bias=True` was passed"]),
    "a rank for nothing": ({"rank_pattern": {"xyz": 3}}, ["The following rank_pattern keys did not match"]),
    "a rank as wide as the layer": ({"target_modules": ["q_proj"], "r": 32}, []),
    "all there is": ({"target_modules": PROJECTIONS, "bias": "all", "use_dora": True}, []),
    "a pattern": ({"target_modules": ".*proj"}, []),
    "PEFT's default": ({"target_modules": None}, []),
    "more names than PEFT keeps": ({"target_modules": [f"model.layers.{i}.{j}" for i in range(2) for j in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")] + PROJECTIONS}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_warnings_name_what_looks_like_a_mistake(case):
    settings, expected = WARNINGS[case]
    report = describe_lora(make_model("llama"), lora(**settings))
    assert len(report.warnings) == len(expected)
    for warning, beginning in zip(report.warnings, expected, strict=True):
        assert warning.startswith(beginning)
        assert f"warning: {warning}" in str(report)


def test_tied_embeddings_are_warned_of_in_pefts_words():
    report = describe_lora(make_model("qwen2"), lora(target_modules=["embed_tokens"]))
    assert len(report.warnings) == 1
    assert "tie_word_embeddings=True" in report.warnings[0]


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (make_model, IA3Config(), "has to be a LoraConfig, got IA3Config"),
        (lambda: get_peft_model(make_model(), lora()), lora(), "has adapters already.*describe_updates"),
        (make_model, lora(target_modules=["c_attn"]), "c_attn.* not found in the base model"),
        (moe, lora(target_modules=None), "target_modules"),
    ],
)
def test_what_could_not_be_trained_is_refused(make, config, message):
    with pytest.raises(ValueError, match=message):
        describe_lora(make(), config)


# -------------------------------------------------------------------------------------------------- after the training


def by_full_matrices(adapted: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, tuple[float, float, float]]:
    """Effective rank, norm and relative norm from PEFT's own full updates in float64."""
    found = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            name = name.replace(".base_layer", "")
            weight = weights.get(f"{name}.weight")
            if weight is None:
                name = f"{name}.{layer.parameter_name}"
                weight = weights[name]
            update = layer.get_delta_weight("default").detach().double()
            values = torch.linalg.svdvals(update)
            shares = values / values.sum(-1, keepdim=True)
            entropy = -torch.where(shares > 1e-9, shares * shares.clamp(min=1e-9).log(), 0).sum(-1)
            norm = update.norm().item()
            found[name] = entropy.exp().mean().item(), norm, norm / weight.double().norm().item()
    return found


UPDATES = {
    "linear": ("llama", {}),
    "transposed": ("gpt2", {"use_rslora": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "different ranks": ("qwen2", {"rank_pattern": {"o_proj": 2}, "lora_alpha": -3}),
    "wider than the layer": ("llama", {"r": 40}),
    "experts": ("moe", EXPERTS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UPDATES)
def test_updates_are_those_of_the_full_matrices(case):
    family, settings = UPDATES[case]
    model = moe() if family == "moe" else make_model(family)
    weights = copy.deepcopy(model.state_dict())
    adapted = trained(model, lora(**settings))
    report = describe_updates(adapted)
    expected = by_full_matrices(adapted, weights)
    assert {update.name for update in report.modules} == expected.keys()
    for update in report.modules:
        found = update.effective_rank, update.norm, update.relative_norm
        assert found == pytest.approx(expected[update.name], rel=1e-4)
        assert 1 <= update.effective_rank <= update.rank


def test_effective_rank_counts_equal_directions_and_is_zero_for_no_update():
    adapted = get_peft_model(make_model("llama"), lora(target_modules=["q_proj"]))
    assert {(u.effective_rank, u.norm, u.relative_norm) for u in describe_updates(adapted).modules} == {(0, 0, 0)}
    for i, count in enumerate((1, 3)):
        layer = adapted.get_base_model().model.layers[i].self_attn.q_proj
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(torch.eye(32)[:4])
            layer.lora_B["default"].weight.copy_(torch.eye(32)[:, :4] * (torch.arange(4) < count))
    found = describe_updates(adapted).modules
    assert [u.effective_rank for u in found] == pytest.approx([1, 3], rel=1e-5)
    assert [u.norm for u in found] == pytest.approx([2, 2 * 3**0.5])  # scaling 2
    line = next(line for line in str(describe_updates(adapted)).splitlines() if "self_attn.q_proj" in line)
    assert line.split()[1:4] == ["2", "4", "2.0"]


def test_each_of_several_adapters_has_its_own_update():
    adapted = trained(make_model("llama"), lora(target_modules=["q_proj"]))
    adapted.add_adapter("other", lora(target_modules=["q_proj"], r=2))
    updates = {update.name: update for update in describe_updates(adapted).modules}
    name = "model.layers.0.self_attn.q_proj"
    assert updates[f"{name} (default)"].norm > 0
    assert (updates[f"{name} (other)"].rank, updates[f"{name} (other)"].norm) == (2, 0)


@pytest.mark.parametrize("how", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_relative_norm_over_quantised_weights_is_that_of_the_dequantised_ones(tmp_path, how):
    pytest.importorskip("bitsandbytes")
    model = make_model("llama", hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**how))
    expected = describe_updates(trained(model, lora())).modules
    found = describe_updates(trained(quantised, lora())).modules
    for a, b in zip(found, expected, strict=True):
        assert (a.name, a.norm) == (b.name, pytest.approx(b.norm, rel=1e-5))
        assert a.relative_norm == pytest.approx(b.relative_norm, rel=0.02)


def test_relative_norm_is_left_out_where_bitsandbytes_has_repacked_the_weights(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU does not repack")
    make_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    adapted = trained(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how), lora())
    logits(adapted)
    report = describe_updates(adapted)
    assert {update.relative_norm for update in report.modules} == {None}
    assert min(update.norm for update in report.modules) > 0
    assert " - " in str(report)


def test_model_without_adapters_has_no_updates():
    with pytest.raises(ValueError, match=r"no LoRA adapter.*get_peft_model"):
        describe_updates(make_model())


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.fixture
def base(tmp_path, tokenizer):
    """Saves a model of a family with a tokenizer, and loads it again."""

    def save(family="llama", **config):
        model = moe(**config) if family == "moe" else make_model(family, **config)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    return save


MERGED = {
    "linear": ("llama", {"use_rslora": True}),
    "transposed": ("gpt2", {}),
    "biases": ("qwen2", {"bias": "all"}),
    "DoRA": ("llama", {"use_dora": True}),
    "experts": ("moe", EXPERTS),
    "embeddings tied to the head": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings tied to the head, as is": ("gemma2", {}),
    "head tied to the embeddings": ("gpt2", {"target_modules": ["lm_head"]}),
    "both tied": ("gemma2", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "a whole head": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "some tokens": ("llama", {"trainable_token_indices": [3, 5]}),
    "tokens of the head": ("llama", {"trainable_token_indices": {"lm_head": READ}}),
    "tokens of both": ("llama", {"trainable_token_indices": {"embed_tokens": READ, "lm_head": [80, 7]}}),
    "tokens, tied": ("qwen2", {"trainable_token_indices": {"embed_tokens": READ}}),
    "tokens of the head, tied": ("qwen2", {"trainable_token_indices": {"lm_head": READ}}),
    "tokens of both, tied": ("qwen2", {"trainable_token_indices": {"embed_tokens": READ, "lm_head": READ}}),
    "other tokens of both, tied": ("qwen2", {"trainable_token_indices": {"embed_tokens": READ, "lm_head": [80, 7]}}),
    "tokens of the head, embeddings tied to it": (
        "gemma2", {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": READ}}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MERGED)
def test_merged_model_has_the_logits_of_model_and_adapter(tmp_path, base, case):
    family, settings = MERGED[case]
    adapted = trained(base(family), lora(**settings))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged, "peft_config")
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert (expected - plain).abs().max() > 1e-3  # there was something to merge
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_tokenizer_is_the_one_beside_the_adapter_or_else_the_bases(tmp_path, base, tokenizer):
    trained(base(), lora()).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "first")
    merged = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert merged.get_vocab() == tokenizer.get_vocab()
    assert merged.chat_template == tokenizer.chat_template
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "second"))
    assert AutoTokenizer.from_pretrained(tmp_path / "second").chat_template == "{{ messages }}"


def test_adapter_over_4bit_weights_is_merged_into_the_exact_ones(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    plain = base()
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    adapted = trained(quantised, lora(lora_alpha=16))
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    updates = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            updates[f"{name}.weight"] = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (16 / 4)
    assert len(updates) == 2 * 7
    for name, weight in plain.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight + updates.get(name, 0)), name
    exact = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), exact, rtol=1e-5, atol=1e-5)


def test_dtype_is_the_bases_unless_another_is_asked_for(tmp_path, base, tokenizer):
    base("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert half.dtype == torch.bfloat16
    adapted = trained(half, lora())
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "half")
    merge_adapter(tmp_path / "adapter", tmp_path / "full", dtype=torch.float32)
    merge_adapter(tmp_path / "adapter", tmp_path / "named", dtype="float32")
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("half", "full", "named")}
    assert [model.dtype for model in models.values()] == [torch.bfloat16, torch.float32, torch.float32]
    for name, weight in models["full"].state_dict().items():
        assert torch.equal(models["named"].state_dict()[name], weight)
        assert torch.equal(models["half"].state_dict()[name], weight.bfloat16()), name  # rounded once


def test_base_is_the_one_that_is_named(tmp_path, base):
    plain = base()
    trained(plain, lora()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"base '.*base' is no folder or hub id of a model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "moved")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "moved"), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"bias": "lora_only"}, "bias"), ({"use_dora": True}, "magnitude")],
)
def test_an_adapter_that_lacks_any_weight_is_refused(tmp_path, tokenizer, settings, part):
    """PEFT passes over biases that are not there."""
    make_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained(model, lora(target_modules=["q_proj"], **settings)).save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved.pop(next(name for name in saved if part in name))
    save_file(saved, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit base .*" + part):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("layers", [1, 3])
def test_base_with_more_or_fewer_layers_is_refused(tmp_path, base, tokenizer, layers):
    """PEFT would merge what there is: a pruned student's adapter into the wrong layers of the whole model."""
    trained(base(), lora(target_modules=PROJECTIONS)).save_pretrained(tmp_path / "adapter")
    make_model("llama", num_hidden_layers=layers).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"14 of its weights have no counterpart.*as many layers"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "other")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_refused_in_words(tmp_path, base, tokenizer):
    adapted = trained(base(), lora(target_modules=["q_proj"]))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    for folder in (tmp_path / "nowhere", tmp_path / "base"):
        with pytest.raises(ValueError, match=r"has no adapter: there is no adapter_config\.json with adapter_model"):
            merge_adapter(folder, merged)
    with pytest.raises(ValueError, match="has an adapter, which loading would add again: choose another"):
        merge_adapter(adapter, adapter)
    for name in ("nowhere", "no/where", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=f"base '{name}' is no folder or hub id of a model"):
            merge_adapter(adapter, merged, base=name)
    for family, config in (("gpt2", {}), ("llama", {"hidden_size": 64})):
        make_model(family, **config).save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=r"nor base .* has a tokenizer"):
            merge_adapter(adapter, merged, base=tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        with pytest.raises(ValueError, match=r"the adapter in .* does not fit base .*"):
            merge_adapter(adapter, merged, base=tmp_path / family)
    get_peft_model(make_model(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="IA3 adapter; only LoRA"):
        merge_adapter(tmp_path / "ia3", merged)
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="does not say which model it was trained on: name it with base"):
        merge_adapter(tmp_path / "nameless", merged)
    assert not merged.exists()


def test_quantised_base_is_refused(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    trained(base(), lora()).save_pretrained(tmp_path / "adapter")
    how = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how).save_pretrained(tmp_path / "4bit")
    with pytest.raises(ValueError, match="is quantised: name the model that it was made from"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "4bit")
