"""Names and folders without a causal language model: one line, and no weights are read."""

import json
import os
import shutil

import pytest
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_distill.model_files import class_problem, is_adapter_folder, name_problem
from tests.conftest import make_model

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    make_model().save_pretrained(folder)
    return folder


def test_a_causal_language_model_has_no_problem(good, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", lambda *_: pytest.fail("weights are read"))
    assert name_problem(str(good)) is None
    assert name_problem("any", {"gguf_file": "model.gguf"}) is None


@pytest.mark.parametrize("name", ["/nonexistent", "./nowhere", "../nowhere", "~/model", "a/b/c", "", " "])
def test_a_path_that_does_not_exist_is_told_as_one(name):
    assert name_problem(name).startswith("there is no such folder")


def test_a_hub_id_without_a_network_is_told_with_the_way_out():
    assert name_problem("someone/model").startswith("there is no such folder here, and the hub cannot be reached")


FOLDERS = {
    "nothing": (lambda folder: shutil.rmtree(folder) or os.mkdir(folder), "it has no config.json"),
    "no weights": (lambda folder: os.remove(folder / "model.safetensors"), "it has no weights"),
    "cut weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000), r"model.safetensors is cut \(5,000 bytes\)"
    ),
    "a cut header": (lambda folder: os.truncate(folder / "model.safetensors", 50), "model.safetensors is cut"),
    "an empty file": (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors is cut"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is cut .*git lfs pull",
    ),
    "a missing shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        ),
        "model-2.safetensors is missing, which model.safetensors.index.json names",
    ),
    "a broken configuration": (
        lambda folder: (folder / "config.json").write_text("{"), "config.json' is not a valid JSON"
    ),
    "an unknown type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nosuch"}'),
        "model type `nosuch`, which transformers .* does not know: upgrade it",
    ),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "Unrecognized model"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_a_whole_model_is_told_in_one_line(good, tmp_path, case):
    spoil, message = FOLDERS[case]
    shutil.copytree(good, tmp_path / "model")
    spoil(tmp_path / "model")
    assert_says(name_problem(str(tmp_path / "model")), message)


def test_a_run_folder_names_the_checkpoints_in_it_and_a_file_its_folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "checkpoint-2")
    assert_says(name_problem(str(tmp_path)), "it has no config.json; there is one in checkpoint-2")
    assert_says(name_problem(str(good / "model.safetensors")), "it is a file: pass the folder")


def test_models_without_a_causal_head_are_told_by_their_class(tmp_path):
    causal = make_model()
    models = {
        "LlamaModel": causal.model,
        "LlamaForSequenceClassification": LlamaForSequenceClassification(causal.config),
        "BertForMaskedLM": BertForMaskedLM(BertConfig(**SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        assert_says(name_problem(str(tmp_path / name)), f"^{name} is no causal language model: it has no output layer")
    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    assert_says(name_problem(str(tmp_path / "t5")), "T5ForConditionalGeneration is an encoder-decoder")


def test_every_causal_class_of_transformers_is_one_here():
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for cls in model_class if isinstance(model_class, tuple) else [model_class]:
            config = config_class.__new__(config_class)
            config.architectures, config.is_encoder_decoder = [cls.__name__], False
            assert class_problem(config) is None, cls


def test_adapters_are_no_model_and_no_problem(good, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(good), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    assert is_adapter_folder(str(tmp_path))
    assert name_problem(str(tmp_path)) is None
    assert not is_adapter_folder(str(good))
    assert not is_adapter_folder(model)


def assert_says(line, pattern: str) -> None:
    import re

    assert line is not None
    assert re.search(pattern, line), line
    assert "\n" not in line
