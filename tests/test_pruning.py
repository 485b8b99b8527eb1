"""Pruned models against the original that skips the same layers, restored ones against the original itself."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_distill.modeling import decoder_layers
from hf_distill.pruning import (
    drop_layers,
    missing_bundles,
    original_layers,
    rank_layers,
    read_manifest,
    restore_layers,
)
from tests.conftest import SENTENCES, make_model

LAYERS = 6
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
# One for each way in which families tell layers apart, and what that has to be after dropping layers 1, 4 and 5.
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},  # layer 5 is the only one with full attention
    "phi3": {},
    "gpt2": {"n_positions": 128},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [1, 2, 5], **EXPERTS},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, **EXPERTS},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1], "head_dim": 8},
    "llama4_text": {
        "num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
    },
}  # fmt: skip
DROPPED, KEPT = [1, 4, 5], [0, 2, 3]
SETTINGS = {
    "qwen2": {"layer_types": ["full_attention", "full_attention", "sliding_attention"], "max_window_layers": 3},
    "gemma2": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention"] * 3},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "glm4_moe": {"first_k_dense_replace": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "llama4_text": {"moe_layers": [2]},
}


def build(family="llama", seed=0, **changes):
    """A random model of six layers, in evaluation mode."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


def logits(model):
    """Of two texts, one of them left-padded, longer than any window."""
    ids = torch.randint(2, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def logits_when_skipping(model, layers):
    blocks = decoder_layers(model)[1]

    def skip(block, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [blocks[i].register_forward_hook(skip, with_kwargs=True) for i in layers]
    found = logits(model)
    for hook in hooks:
        hook.remove()
    return found


def generated(model, use_cache):
    ids = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=use_cache
    )


def assert_same_model(found, expected):
    states = found.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(value, states[1][name]) and value.dtype == states[1][name].dtype
        for name, value in states[0].items()
    )
    # What from_pretrained adds and changes.
    configs = [model.config.to_dict() for model in (found, expected)]
    for config in configs:
        config.pop("_name_or_path", None)
        config.pop("architectures", None)
    assert configs[0] == configs[1]
    assert torch.equal(logits(found), logits(expected))


# ---------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_model_computes_what_the_original_computes_without_these_layers(family, tmp_path):
    model = build(family)
    before = copy.deepcopy(model)
    student = drop_layers(model, DROPPED)
    expected = logits_when_skipping(model, DROPPED)
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=1e-6)
    assert (expected - logits(model)).abs().max() > 0.1
    assert_same_model(model, before)

    config = student.config.to_dict()
    assert student.config.num_hidden_layers == len(decoder_layers(student)[1]) == 3
    assert {name: config[name] for name in SETTINGS.get(family, {})} == SETTINGS.get(family, {})
    prefix = decoder_layers(model)[0]
    for name, value in student.state_dict().items():
        if name.startswith(f"{prefix}."):
            index, rest = name.removeprefix(f"{prefix}.").split(".", 1)
            name = f"{prefix}.{KEPT[int(index)]}.{rest}"
        assert torch.equal(value, model.state_dict()[name])

    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, student)
    assert type(loaded) is type(model)
    assert torch.equal(generated(loaded, True), generated(loaded, False))
    assert torch.equal(generated(student, True), generated(loaded, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_model_is_the_original_and_in_between_it_is_one_that_never_lost_these_layers(family, tmp_path):
    model = build(family)
    student = drop_layers(model, DROPPED, tmp_path / "bundles", {"B": [4], "C": [5, 1]})
    student.save_pretrained(tmp_path / "A")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "A")
    for order in (["B", "C"], ["C", "B"]):
        part = restore_layers(loaded, tmp_path / "bundles", order[:1])
        assert_same_model(part, drop_layers(model, [1, 5] if order[0] == "B" else [4]))
        whole = restore_layers(part, tmp_path / "bundles")
        assert_same_model(whole, model)
        assert not hasattr(whole.config, "pruned_from")
        assert torch.equal(generated(whole, True), generated(model, True))
    assert_same_model(restore_layers(student, tmp_path / "bundles"), model)
    assert_same_model(loaded, student)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"layer 1 would be made with attn\.scaling"),
        ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 2}, r".* asks for model\.layers\.1\."),
    ],
)
def test_layers_that_a_formula_would_make_otherwise_are_refused_by_name(family, changes, message):
    model = build(family, **changes)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot have these layers only: {message}"):
        drop_layers(model, DROPPED)
    # At the end no other layer's number changes.
    torch.testing.assert_close(logits(drop_layers(model, [4, 5])), logits_when_skipping(model, [4, 5]))


def test_a_model_whose_forward_depends_on_the_number_of_a_layer_is_refused():
    class Louder(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.register_forward_hook(lambda _, x, out, attention=layer.self_attn: out * attention.layer_idx)

    model = Louder(build().config).eval()
    with pytest.raises(ValueError, match=r"Louder cannot do without these layers: .* depends on their number"):
        drop_layers(model, [0])
    drop_layers(model, [5])


def test_a_configuration_that_does_not_allow_what_is_left_is_refused():
    class EvenConfig(LlamaConfig):
        model_type = "even"

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            if self.num_hidden_layers % 2:
                raise ValueError("the number of layers has to be even")

    class FormulaConfig(LlamaConfig):
        model_type = "formula"

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.wide_layers = [i % 2 for i in range(self.num_hidden_layers)]

    for kind, message in ((EvenConfig, "has to be even"), (FormulaConfig, "another one after loading")):
        model = LlamaForCausalLM(kind(**build().config.to_dict())).eval()
        with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot have these layers only, .*{message}"):
            drop_layers(model, [2])
        drop_layers(model, [4, 5])


def test_models_without_one_list_of_layers_are_refused():
    config = T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no single list of 2 layers"):
        drop_layers(T5ForConditionalGeneration(config), [0])


# ----------------------------------------------------------------------------------------------- weights and dtypes


def train(model):
    """What a training leaves behind: other weights, in training mode, with checkpointing and no dropout."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.gradient_checkpointing_enable()
    return model.train()


def test_restoring_keeps_what_was_trained_and_adds_what_was_removed(tmp_path):
    model = build()
    student = train(drop_layers(model, DROPPED, tmp_path))
    whole = restore_layers(student, tmp_path)
    assert whole.training
    for name, value in whole.state_dict().items():
        removed = name.startswith(tuple(f"model.layers.{i}." for i in DROPPED))
        assert torch.equal(value, model.state_dict()[name] + (0 if removed else 0.01)), name


def test_merged_adapters_stay_in_the_kept_layers(tmp_path):
    model = build()
    adapted = get_peft_model(drop_layers(model, DROPPED, tmp_path), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = copy.deepcopy(model)
    merged = adapted.merge_and_unload()
    for i, layer in zip(KEPT, merged.model.layers, strict=True):
        expected.model.layers[i] = copy.deepcopy(layer)
        expected.model.layers[i].self_attn.layer_idx = i
    assert torch.equal(logits(restore_layers(merged, tmp_path)), logits(expected))
    assert not torch.equal(logits(expected), logits(model))


def test_adapters_of_a_student_do_not_say_that_they_are_the_whole_models(tmp_path):
    build().save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    student = drop_layers(model, DROPPED, tmp_path / "bundles")
    for part in (student, restore_layers(student, tmp_path / "bundles")):
        adapted = get_peft_model(part, LoraConfig(target_modules=["q_proj"]))
        assert not adapted.peft_config["default"].base_model_name_or_path
    assert model.config.name_or_path == str(tmp_path / "whole")


def test_pruning_a_pruned_model_numbers_layers_as_in_the_first_one(tmp_path):
    model = build("gemma3_text")
    once = drop_layers(model, [0, 3], tmp_path / "first")
    twice = drop_layers(once, [1, 3], tmp_path / "second")
    assert original_layers(model) == [0, 1, 2, 3, 4, 5]
    assert original_layers(once) == [1, 2, 4, 5]
    assert original_layers(twice) == [1, 4]
    assert_same_model(restore_layers(twice, tmp_path / "second"), once)
    assert_same_model(restore_layers(restore_layers(twice, tmp_path / "first"), tmp_path / "second"), model)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_copied_unless_they_are_to_be_shared(tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    copied = drop_layers(model, DROPPED, tmp_path)
    shared = drop_layers(model, DROPPED, share_weights=True)
    assert not ours & {parameter.data_ptr() for parameter in copied.parameters()}
    assert ours > {parameter.data_ptr() for parameter in shared.parameters()}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in shared.parameters()}
    for student in (copied, shared):
        assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    whole = restore_layers(copied, tmp_path, share_weights=True)
    assert {p.data_ptr() for p in whole.parameters()} > {p.data_ptr() for p in copied.parameters()}
    assert not {p.data_ptr() for p in restore_layers(copied, tmp_path).parameters()} & {
        p.data_ptr() for p in copied.parameters()
    }


def test_student_of_a_frozen_teacher_is_trainable_and_the_teacher_stays_frozen():
    model = build().requires_grad_(False)
    for share in (True, False):
        assert all(parameter.requires_grad for parameter in drop_layers(model, [2], share_weights=share).parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_stays_and_bundles_follow_the_model_into_another_dtype(tmp_path):
    model = build("gemma2").to(torch.bfloat16)
    student = drop_layers(model, DROPPED, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "B.safetensors").values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    whole = restore_layers(student, tmp_path)
    assert torch.equal(logits(whole), logits(model))
    widened = restore_layers(student.float(), tmp_path)
    assert {parameter.dtype for parameter in widened.parameters()} == {torch.float32}
    assert all(torch.equal(value, model.state_dict()[name].float()) for name, value in widened.state_dict().items())


# --------------------------------------------------------------------------------------------------------- bundles


def test_manifest_says_what_is_where(tmp_path):
    model = build("gemma3_text")
    model.save_pretrained(tmp_path / "some-model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "some-model")
    student = drop_layers(model, DROPPED, tmp_path / "bundles", {"B": [4], "C": [5, 1]})
    assert {path.name for path in (tmp_path / "bundles").iterdir()} == {
        "B.safetensors",
        "C.safetensors",
        "manifest.json",
    }
    manifest = read_manifest(tmp_path / "bundles")
    assert (manifest["base_model"], manifest["architecture"]) == ("some-model", "Gemma3ForCausalLM")
    assert (manifest["num_layers"], manifest["dtype"]) == (6, "float32")
    assert {name: bundle["layers"] for name, bundle in manifest["bundles"].items()} == {"B": [4], "C": [1, 5]}
    assert manifest["bundles"]["C"]["config"] == {"layer_types": ["sliding_attention", "full_attention"]}
    assert str(tmp_path) not in json.dumps([manifest, student.config.pruned_from])
    assert missing_bundles(student, tmp_path / "bundles") == ["B", "C"]
    assert missing_bundles(restore_layers(student, tmp_path / "bundles", ["B"]), tmp_path / "bundles") == ["C"]


@pytest.fixture
def pruned(tmp_path):
    """A pruned model, and the folder with its bundles B and C."""
    return drop_layers(build(), DROPPED, tmp_path, {"B": [4], "C": [5, 1]}), tmp_path


def test_damaged_missing_and_exchanged_files_are_refused_by_name(pruned):
    student, folder = pruned
    path = folder / "B.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"B\.safetensors is damaged, or another one"):
        restore_layers(student, folder)
    path.write_bytes((folder / "C.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"B\.safetensors is damaged, or another one"):
        restore_layers(student, folder, ["B"])
    restore_layers(student, folder, ["C"])
    path.unlink()
    with pytest.raises(ValueError, match=r"B\.safetensors is missing"):
        restore_layers(student, folder)
    for manifest in ("{", "[]", '{"bundles": {}}', '{"bundles": []}', None):
        (folder / "manifest.json").unlink()
        if manifest is not None:
            (folder / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"manifest\.json is not a (readable|complete) list of bundles"):
            restore_layers(student, folder)


def test_bundles_of_another_model_are_refused_by_name(pruned, tmp_path_factory):
    _, folder = pruned
    for other in (build(seed=1), build("mistral"), build(hidden_size=16)):
        other.config._name_or_path = "some/other"
        theirs = drop_layers(other, DROPPED, tmp_path_factory.mktemp("theirs") / "bundles")
        with pytest.raises(ValueError, match=r"are of LlamaForCausalLM '.*', the model is a .* 'some/other'"):
            restore_layers(theirs, folder)
    # The same base, pruned at another time, has the same bundles.
    assert_same_model(restore_layers(drop_layers(build(), DROPPED), folder), build())


def test_models_that_the_bundles_do_not_fit_are_refused(pruned):
    student, folder = pruned
    with pytest.raises(ValueError, match="the model has no pruned_from"):
        restore_layers(build(), folder)
    with pytest.raises(ValueError, match=r"there is no bundle 'D' in .*; it has B, C"):
        restore_layers(student, folder, ["B", "D"])
    for groups in (["B"], None):
        whole = restore_layers(student, folder, ["B"]) if groups else drop_layers(build(), [0])
        with pytest.raises(ValueError, match="there is nothing to restore"):
            restore_layers(whole, folder, groups)
    student.model.layers = student.model.layers[:2]
    student.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="the model has 2 layers, but pruned_from"):
        restore_layers(student, folder)


def test_a_layer_of_another_shape_is_refused_by_name(pruned):
    student, folder = pruned
    student.config.intermediate_size = 40
    student = AutoModelForCausalLM.from_config(student.config)
    with pytest.raises(
        ValueError, match=r"asks for model\.layers\.1\.mlp\.gate_proj\.weight \(40, 32\), there is \(48, 32\)"
    ):
        restore_layers(student, folder)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([6], {}, "the model has layers 0 to 5, there is no layer 6"),
        ([-1], {}, "there is no layer -1"),
        ([], {}, "layers have to be some of 0 to 5"),
        ([1, 1], {}, "each once"),
        (range(6), {}, "not all"),
        ([1], {"groups": {"B": [1]}}, "bundle_dir, which is missing"),
        ([1, 2], {"bundle_dir": "new", "groups": {"B": [1]}}, r"groups have to hold each of the layers \[1, 2\] once"),
        ([1], {"bundle_dir": "new", "groups": {"B": [1], "C": [1]}}, "once"),
        ([1], {"bundle_dir": "new", "groups": {"B": [1], "C": []}}, "none empty"),
        ([1], {"bundle_dir": "new", "groups": {"../B": [1]}}, "named by letters and digits"),
        ([1], {"bundle_dir": "old"}, "has bundles already"),
    ],
)
def test_layers_and_groups_that_make_no_sense_are_refused_in_words(layers, options, message, tmp_path):
    model = build()
    drop_layers(model, [0], tmp_path / "old")
    if "bundle_dir" in options:
        options = {**options, "bundle_dir": tmp_path / options["bundle_dir"]}
    with pytest.raises(ValueError, match=message):
        drop_layers(model, layers, **options)
    assert not (tmp_path / "new").exists()


def test_adapters_quantised_weights_and_models_without_weights_are_refused_in_words(tmp_path):
    adapted = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match=r"cannot drop layers of a .* with adapters.*: merge them first"):
            drop_layers(model, [0])
        with pytest.raises(ValueError, match=r"cannot restore layers of a .* with adapters"):
            restore_layers(model, tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(build().config)
    with pytest.raises(ValueError, match="cannot drop layers of a LlamaForCausalLM on meta"):
        drop_layers(empty, [0])


def test_4bit_models_are_refused_in_words(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match=r"with quantised weights.*: load it unquantised"):
        drop_layers(model, [0])


# --------------------------------------------------------------------------------------------------------- ranking


def by_brute_force(model, rows, num_layers):
    """Angles of the last tokens' hidden states, row by row without padding, in float64."""
    model = copy.deepcopy(model).double()
    if hasattr(model, "transformer"):
        model.transformer.ln_f = nn.Identity()  # the last hidden states come after it
    else:
        model.model.norm = nn.Identity()
    angles = []
    for ids in rows:
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        last = [state[0, -1] for state in states]
        pairs = zip(last, last[num_layers:], strict=False)
        angles.append([torch.arccos(x @ y / (x.norm() * y.norm())) / torch.pi for x, y in pairs])
    return torch.tensor(angles, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_distances_are_those_of_the_paper_for_every_batch_size(tokenizer, family, num_layers):
    model = build(family, vocab_size=400).train()
    texts = [text[: 5 * i + 1] for i, text in enumerate(SENTENCES[:5])]
    dataset = Dataset.from_dict({"text": texts})
    rows = [ids[:9] for ids in tokenizer(texts)["input_ids"]]
    assert len({len(ids) for ids in rows}) > 2
    expected = by_brute_force(model.eval(), rows, num_layers)
    model.train()
    for batch_size in (1, 2, 8):
        spans = rank_layers(model, dataset, tokenizer, num_layers, batch_size=batch_size, max_length=9)
        assert [span.start for span in spans] == expected.argsort().tolist()
        found = torch.tensor([span.distance for span in sorted(spans)], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert all(span.layers == list(range(span.start, span.start + num_layers)) for span in spans)
    assert model.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model)[1])


def test_layers_that_do_nothing_rank_first(tokenizer):
    model = make_model(num_hidden_layers=5)
    with torch.no_grad():
        for layer in model.model.layers[2:4]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    best, second, *_ = rank_layers(model, Dataset.from_dict({"text": SENTENCES}), tokenizer, 2)
    assert best.layers == [2, 3]
    assert best.distance < 1e-6 < 0.01 < second.distance
    torch.testing.assert_close(logits(drop_layers(model, best.layers)), logits(model))


def test_rows_are_ranked_up_to_the_last_position_that_the_model_has(tokenizer):
    model = make_model("gpt2", n_layer=3, n_positions=8)  # has no embedding for a later position
    rows = Dataset.from_dict({"text": SENTENCES})
    assert rank_layers(model, rows, tokenizer, 1) == rank_layers(model, rows, tokenizer, 1, max_length=8)


def test_every_batch_is_read_once_whatever_the_number_of_spans(tokenizer):
    model = make_model(num_hidden_layers=5)
    rows = []

    def count(module, args, kwargs, output):
        rows.append(len(kwargs["input_ids"]))

    model.model.register_forward_hook(count, with_kwargs=True)
    rank_layers(model, Dataset.from_dict({"text": SENTENCES}), tokenizer, 1, batch_size=3)
    assert rows == [3, 3, 2]


def test_rows_of_every_format_are_read_alike(tokenizer):
    model = make_model(num_hidden_layers=3)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    rows = [
        {"text": text}, {"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}, {"input_ids": ids},
        {"prompt": text[:9], "completion": text[9:]},
    ]  # fmt: skip
    first, *others = [rank_layers(model, Dataset.from_list([row]), tokenizer, 1) for row in rows]
    assert all(other == first for other in others)


def test_ranking_reads_models_with_adapters(tokenizer):
    dataset = Dataset.from_dict({"text": SENTENCES[:2]})
    plain = rank_layers(make_model(num_hidden_layers=3), dataset, tokenizer, 1)
    adapted = get_peft_model(make_model(num_hidden_layers=3), LoraConfig(target_modules=["q_proj"]))
    assert rank_layers(adapted, dataset, tokenizer, 1) == plain


@pytest.mark.parametrize(
    ("rows", "num_layers", "message"),
    [
        ([{"text": "a"}], 0, "num_layers has to be at least 1 and below 3"),
        ([{"text": "a"}], 3, "num_layers has to be at least 1 and below 3"),
        ([{"text": ""}], 1, "no row with a token"),
        ([{"story": "a"}], 1, "row 0 of the dataset has the columns story; it needs 'text'"),
    ],
)
def test_what_cannot_be_ranked_is_refused_in_words(tokenizer, rows, num_layers, message):
    with pytest.raises(ValueError, match=message):
        rank_layers(make_model(num_hidden_layers=3), Dataset.from_list(rows), tokenizer, num_layers)


def test_layers_that_do_not_hand_on_one_vector_per_token_are_not_ranked(tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 2, num_kv_shared_layers=0,
        laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=None, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=384, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = Dataset.from_dict({"text": SENTENCES})
    with pytest.raises(ValueError, match=r"cannot be ranked .* is not one vector per token"):
        rank_layers(model, rows, tokenizer, 1)
    shared = make_model(num_hidden_layers=3)
    shared.model.layers[2].forward = lambda hidden, **kwargs: shared.model.layers[1](hidden, **kwargs)
    with pytest.raises(ValueError, match="they do not run once each"):
        rank_layers(shared, rows, tokenizer, 1)
