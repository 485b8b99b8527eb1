"""What a trainer may be called with: a table of objects that are refused, in words, before anything is loaded."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_distill import KDConfig, KDTrainer
from hf_distill.lora import merge_adapter
from hf_distill.trainers.input_checks import check_inputs, load_adapters
from tests.conftest import SENTENCES, make_model, make_tokenizer

ROWS = Dataset.from_dict({"text": SENTENCES})


class Indexed(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"text": "one"}


def config(**changes) -> KDConfig:
    return KDConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **changes})


def check(model=None, train=ROWS, held_out=None, peft_config=None, **settings):
    check_inputs(model or make_model(), train, held_out, config(**settings), peft_config)


DATASETS = {
    "a DatasetDict": (
        DatasetDict({"train": ROWS, "test": ROWS}), r"is a DatasetDict with the splits train, test: .*\['train'\]"
    ),
    "a dict of datasets": ({"a": ROWS}, r"got dict: pass one of its data sets, such as dataset\['a'\]"),
    "a list of rows": (list(ROWS), r"got list: pass Dataset.from_list\(rows\)"),
    "a tuple of rows": (tuple(ROWS), r"got tuple: pass Dataset.from_list\(rows\)"),
    "a list of texts": (SENTENCES, r"got list: pass Dataset.from_dict\(\{'text': texts\}\)"),
    "an empty list": ([], r"got list: pass Dataset.from_list\(rows\)"),
    "columns": ({"text": SENTENCES}, r"got dict: pass Dataset.from_dict\(columns\)"),
    "a frame": (pd.DataFrame({"text": SENTENCES}), r"got DataFrame: pass Dataset.from_pandas\(frame\)"),
    "a file": ("rows.jsonl", r"'rows.jsonl': pass load_dataset\('json', data_files='rows.jsonl', split='train'\)"),
    "a path": (Path("rows.csv"), r"'rows.csv': pass load_dataset\('csv', data_files='rows.csv', split='train'\)"),
    "a hub id": ("trl-lib/Capybara", r"pass load_dataset\('trl-lib/Capybara', split='train'\)"),
    "a generator": ((row for row in ROWS), r"got generator: pass Dataset.from_generator\(function\)"),
    "a function": (lambda: iter(ROWS), r"got function: pass Dataset.from_generator\(function\)"),
    "a dataset of PyTorch": (Indexed(), r"Indexed: pass Dataset.from_list\(\[rows\[i\] for i in range"),
    "a number": (3, "got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATASETS)
def test_what_is_no_dataset_is_refused_with_the_line_that_makes_one(case):
    rows, message = DATASETS[case]
    with pytest.raises(ValueError, match=f"^train_dataset .*{message}") as error:
        check(train=rows)
    assert "\n" not in str(error.value)
    if not isinstance(rows, dict):  # several held-out data sets are a dict
        with pytest.raises(ValueError, match=f"^eval_dataset .*{message}"):
            check(held_out=rows)
    with pytest.raises(ValueError, match=rf"^eval_dataset\['other'\] .*{message}"):
        check(held_out={"one": ROWS, "other": rows})


def test_data_sets_of_every_kind_pass():
    for rows in (ROWS, IterableDataset.from_generator(lambda: iter(ROWS)), None):
        check(train=rows, held_out=rows)
    check(held_out={"one": ROWS})
    check(held_out=DatasetDict({"one": ROWS}))


SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
T5_SIZES = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
MODELS = {
    "a backbone": (lambda: make_model().model, "LlamaModel is no causal language model.*AutoModelForCausalLM"),
    "a classifier": (
        lambda: LlamaForSequenceClassification(make_model().config),
        "LlamaForSequenceClassification is no causal language model",
    ),
    "a masked model": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "BertForMaskedLM is no causal language model"),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
        "T5.* is an encoder-decoder",
    ),
    "a module": (lambda: torch.nn.Linear(2, 2), "model has to be a hub id, a path or a loaded model, got Linear"),
    "a configuration": (lambda: make_model().config, "model has to be a hub id, .*, got LlamaConfig"),
    "a path": (lambda: Path("out"), r"model has to be a hub id, a path .*, got PosixPath; pass str\(path\)"),
    "a path that is not there": (lambda: "/nonexistent", "'/nonexistent': there is no such folder"),
    "a hub id out of reach": (lambda: "some/model", "'some/model': there is no such folder here, and the hub"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_what_is_no_causal_language_model_is_refused_in_words(case):
    make, message = MODELS[case]
    with pytest.raises(ValueError, match=message) as error:
        check(make())
    assert "\n" not in str(error.value)
    assert "Repo id" not in str(error.value)


def test_trackers_that_are_not_installed_or_unknown_are_refused(monkeypatch):
    available = "hf_distill.trainers.input_checks.get_available_reporting_integrations"
    monkeypatch.setattr(available, lambda: ["tensorboard"])
    check(report_to="tensorboard")
    check(report_to="none")
    for given in ("wandb", ["tensorboard", "wandb"]):
        with pytest.raises(
            ValueError, match="report_to has 'wandb', which is not installed: pip install wandb, or set"
        ):
            check(report_to=given)
    with pytest.raises(ValueError, match=r"report_to has 'wanndb': wanndb is not supported, only .*wandb.*'none'"):
        check(report_to="wanndb")


def test_a_push_that_cannot_reach_the_hub_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub=True, but HF_HUB_OFFLINE keeps the hub away: unset it"):
        check(push_to_hub=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_distill.trainers.input_checks.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub=True needs a token: log in with `hf auth login`"):
        check(push_to_hub=True)
    with pytest.raises(ValueError, match="push_to_hub=True, but the hub does not answer"):
        check(push_to_hub=True, hub_token="hf_none")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder of adapters that are not zero, and one of the model under them."""
    folder = tmp_path_factory.mktemp("adapters")
    make_model(seed=3).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "lora")
    return folder


def test_adapters_in_a_folder_are_loaded_to_be_trained_on(adapters, inputs):
    check(str(adapters / "lora"))
    model = load_adapters(str(adapters / "lora"), config())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapters / "base"), adapters / "lora")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_adapters_do_not_come_twice_nor_as_something_else(adapters):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for model in (str(adapters / "lora"), get_peft_model(make_model(), lora)):
        with pytest.raises(
            ValueError, match=r"has adapters already.*leave peft_config out to train on.*hf-distill merge"
        ):
            check(model, peft_config=lora)
    with pytest.raises(ValueError, match=r"peft_config has to be one of peft, such as LoraConfig\(...\), got dict"):
        check(peft_config={"r": 2})


def start(model, init) -> LoraConfig:
    """The configuration of adapters, and the gradients that LoRA-GA reads, put on the model."""
    settings = {"lora_ga_config": LoraGAConfig()} if init == "lora_ga" else {}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **settings)
    if init == "lora_ga":
        ids = torch.arange(2, 12).unsqueeze(0)
        preprocess_loraga(model, lora, lambda: model(input_ids=ids, labels=ids).loss.backward())
    return lora


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_4", "lora_ga"])
def test_initialisations_are_refused_where_a_saved_adapter_is_loaded_as_another(tmp_path, inputs, init):
    make_model(seed=3).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = start(plain, init)
    adapted = get_peft_model(plain, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    change = (loaded(**inputs).logits - expected).abs().max()
    if change < 1e-4:
        check(peft_config=lora)
        check(adapted)
        check(str(tmp_path / "lora"))
        return
    assert change > 0.1
    for arguments, adapter in (
        ({"peft_config": lora}, "the student's adapter"),
        ({"model": adapted}, "the student's adapter"),
        ({"model": str(tmp_path / "lora")}, "the adapter in .*lora"),
    ):
        with pytest.raises(ValueError, match=rf"{adapter} has init_lora_weights='{init}', .* Train with 'pissa' or"):
            check(**arguments)
    with pytest.raises(ValueError, match=rf"the adapter in .*lora has init_lora_weights='{init}'"):
        merge_adapter(tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_that_cannot_be_loaded_without_data_are_refused():
    with pytest.raises(ValueError, match=r"the student's adapter has init_lora_weights='corda'"):
        check(peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda"))


MISFITS = {
    "another family's names": ({"target_modules": ["c_attn", "c_proj"]}, "c_attn.* not found in the base model"),
    "a pattern": ({"target_modules": r".*\.query"}, r"query not found in the base model"),
    "layers that are not there": ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "q_proj.* not found"),
    "parameters": ({"target_modules": [], "target_parameters": ["mlp.experts"]}, "found"),
}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_adapters_that_fit_no_module_are_refused_before_a_weight_is_read(tmp_path, monkeypatch, case, by_name):
    settings, message = MISFITS[case]
    model = make_model()
    if by_name:
        model.save_pretrained(tmp_path)
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=rf"peft_config does not fit the student: .*{message}") as error:
        check(str(tmp_path) if by_name else model, peft_config=LoraConfig(**settings))
    assert str(error.value).endswith(
        "The linear layers of LlamaForCausalLM: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": "all-linear"}, {"target_modules": r".*\.1\..*_proj"}, {"init_lora_weights": "pissa"}],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_adapters_that_fit_change_nothing_when_they_are_tried(tmp_path, by_name, settings):
    model, lora = make_model(), LoraConfig(**settings)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state(), lora.to_dict(), str(model)
    check(str(tmp_path) if by_name else model, peft_config=lora)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (lora.to_dict(), str(model)) == before[1:]


def test_adapters_on_remote_code_are_left_to_the_real_model(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    check(str(tmp_path), peft_config=LoraConfig(target_modules=["its_own"]))


def test_adapters_of_a_model_that_is_not_there_are_told(adapters, tmp_path):
    config_file = adapters / "lora" / "adapter_config.json"
    (tmp_path / "adapter_config.json").write_text(
        re.sub(r'"[^"]*/base"', '"/nonexistent/base"', config_file.read_text())
    )
    (tmp_path / "adapter_model.safetensors").write_bytes((adapters / "lora" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"the adapters in it belong to '/nonexistent/base': there is no such folder"):
        check(str(tmp_path))


def trainer(model, teacher, train=ROWS, held_out=None, **changes):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        **changes,
    }
    return KDTrainer(model, teacher, config(**settings), train, held_out)


@pytest.fixture(scope="module")
def named(adapters):
    """Folders of a student and a teacher with tokenizers; a backbone, and a model whose class nobody names."""
    folder = adapters / "named"
    for name, model in {
        "teacher": make_model(seed=4),
        "student": make_model(seed=5),
        "backbone": make_model().model,
    }.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    shutil.copytree(folder / "student", folder / "no class")
    path = folder / "no class" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    make_tokenizer().save_pretrained(adapters / "base")
    return folder


REFUSED_BY_TRAINERS = {
    "a list of rows": ({"train": list(ROWS)}, "train_dataset has to be a Dataset"),
    "a frame to evaluate on": ({"held_out": pd.DataFrame({"text": SENTENCES})}, "eval_dataset has to be a Dataset"),
    "no rows to evaluate on": ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy='steps' needs an eval_dat"),
    "an unknown tracker": ({"report_to": "wanndb"}, "report_to has 'wanndb'"),
    "a push without a hub": ({"push_to_hub": True}, "push_to_hub=True"),
    "a backbone": ({"model": "backbone"}, "LlamaModel is no causal language model"),
    "a backbone as teacher": ({"teacher": "backbone"}, "teacher_model='.*' cannot be loaded: LlamaModel is no causal"),
    "no class": ({"model": "no class"}, r'names no class to load: add "architectures": \["LlamaForCausalLM"\]'),
    "no student": ({"model": "nothing"}, "no model with a tokenizer in the folder .*: there is no such folder"),
    "no teacher": ({"teacher": "nothing"}, "teacher_model='.*nothing' cannot be loaded: there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_BY_TRAINERS)
def test_trainers_refuse_before_they_read_a_weight(named, monkeypatch, case):
    changes, message = REFUSED_BY_TRAINERS[case]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    folders = {
        "model": str(named / changes.get("model", "student")),
        "teacher": str(named / changes.get("teacher", "teacher")),
    }
    with pytest.raises(ValueError, match=message) as error:
        trainer(**{**changes, **folders})
    assert "\n" not in str(error.value)


def test_a_model_whose_class_is_not_named_can_be_a_teacher(named):
    trainer(str(named / "student"), str(named / "no class"))


def test_a_folder_of_adapters_is_trained_on_as_the_loaded_model_is(adapters, named):
    """The adapters learn, and nothing else; they are saved for the model that they were made for."""
    folder, teacher = str(adapters / "lora"), str(named / "teacher")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapters / "base"), folder, is_trainable=True
    )
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    runs = [trainer(model, teacher) for model in (folder, loaded)]
    for run in runs:
        run.train()
    found, expected = (dict(run.model.named_parameters()) for run in runs)
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name
    assert runs[0].processing_class.get_vocab() == make_tokenizer().get_vocab()


def test_adapters_in_a_folder_can_have_their_own_base_as_teacher(adapters, named):
    run = trainer(str(adapters / "lora"), "base")
    assert "without adapters" in run.teacher.name
