"""What is saved: tried before the work, as the base model has it, beside nothing of an earlier run."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer_callback import ExportableState

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.kv_projector import KVProjector, Projectors, load_projector, save_projector
from hf_distill.lora import merge_adapter
from hf_distill.saving import base_of, mend_generation_config, refuse_folder, refuse_undeclared_ties, set_aside
from hf_distill.teachers.loading import load_teacher
from hf_distill.trainers.checkpoints import CheckpointTiming
from tests.conftest import SENTENCES, make_model, make_tokenizer

ROWS = Dataset.from_dict({"text": SENTENCES[:4]})
PROMPTS = Dataset.from_dict({"prompt": SENTENCES[:4]})
TRAINERS = {
    "kd": (KDTrainer, KDConfig, ROWS),
    "kv": (KVProjectionTrainer, KVProjectionConfig, ROWS),
    "skd": (SpeculativeKDTrainer, SpeculativeKDConfig, PROMPTS),
}


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model on the disk with settings that a training likes to change: no padding token, a cache, a left side."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = make_model(seed=2), make_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length = None, "left", 128
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text())
    path.write_text(json.dumps(generation | {"temperature": 0.9}))
    try:
        GenerationConfig.from_pretrained(folder).save_pretrained(tmp_path_factory.mktemp("trial"))
    except ValueError:  # transformers 5.17 saves no temperature without sampling
        path.write_text(json.dumps(generation))
    return folder


def settings_of(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if isinstance(found.get("eos_token_id"), int):  # transformers 5.17 makes a list of one
        found["eos_token_id"] = [found["eos_token_id"]]
    return found


def make_trainer(folder, student, teacher, tokenizer, kind="kd", callbacks=(), peft_config=None, rows=None, **changes):
    of, config, own_rows = TRAINERS[kind]
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2,
    }  # fmt: skip
    if kind == "skd":
        settings["max_new_tokens"] = 4
    return of(
        student, teacher, config(**settings | changes), rows or own_rows, None, tokenizer, peft_config=peft_config,
        teacher_processing_class=make_tokenizer(), callbacks=list(callbacks),
    )  # fmt: skip


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------ before the work


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_sampling_temperature_without_sampling_is_left_out_with_one_line(tmp_path, teacher, tokenizer, caplog, kind):
    student = make_model(seed=2)
    student.generation_config.temperature, student.generation_config.max_new_tokens = 0.9, 7
    trainer = make_trainer(tmp_path / "out", student, teacher, tokenizer, kind)
    (line,) = [message for message in caplog.messages if "generation_config" in message]
    assert line.endswith("cannot be saved as it is: these settings are removed: temperature=0.9")
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    saved.validate(strict=True)
    assert (saved.temperature, saved.max_new_tokens) == (None, 7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_all_that_fits_together_stays_in_a_generation_config():
    model = make_model()
    given = {"length_penalty": 2.0, "num_beams": 4, "top_p": 0.5, "max_new_tokens": 7, "eos_token_id": [1, 3]}
    model.generation_config = GenerationConfig(**given)
    model.generation_config.stray = {1, 2}  # no JSON
    mend_generation_config(model)
    assert {name: getattr(model.generation_config, name) for name in given} == {**given, "top_p": None}
    assert not hasattr(model.generation_config, "stray")
    whole = model.generation_config = GenerationConfig(temperature=0.9, do_sample=True)
    mend_generation_config(model)
    assert model.generation_config is whole


class Counts(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"seen": {1, 2}}}


def shared_layers():
    model = make_model(seed=2)
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight
    return model


def shared_part():
    model = make_model(seed=2)
    weights = torch.randn(96, 32)
    for layer, part in zip(model.model.layers, (weights[:48], weights[24:72]), strict=True):
        layer.mlp.gate_proj.weight = torch.nn.Parameter(part)
    return model


def shared_head():
    model = make_model(seed=2)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_setting(name, value):
    model = make_model(seed=2)
    setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": lambda: with_setting("odd", {1, 2})}, r"the model's configuration cannot be .*config\.odd"),
        ({"student": shared_layers}, "share their memory"),
        ({"student": shared_part}, "share their memory"),
        ({"student": shared_head}, r"embed_tokens.weight and lm_head.weight share .*tie_word_embeddings"),
        ({"peft_config": lora(rank_pattern={"q_proj": np.int64(4)})}, "adapter's configuration cannot be saved"),
        ({"lr_scheduler_kwargs": {"f": lambda step: step}}, "args cannot be saved"),
        ({"callbacks": [Counts()]}, "the state of the callbacks cannot be saved"),
        ({"tokenizer": "broken"}, "the tokenizer cannot be saved"),
    ],
    ids=["config", "layers", "parts", "head", "adapter", "args", "callback", "tokenizer"],
)  # fmt: skip
def test_what_could_not_be_saved_is_refused_at_construction(tmp_path, teacher, tokenizer, changes, message):
    changes = dict(changes)
    student = changes.pop("student", lambda: make_model(seed=2))()
    if changes.pop("tokenizer", None):
        tokenizer = make_tokenizer()
        tokenizer.init_kwargs["odd"] = object()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", student, teacher, tokenizer, **changes)
    assert not contents(tmp_path / "out")


def test_what_is_changed_after_the_construction_is_tried_when_the_training_starts(tmp_path, teacher, tokenizer):
    trainer = make_trainer(tmp_path, make_model(seed=2), teacher, tokenizer)
    trainer.student.config.odd = {1}
    with pytest.raises(ValueError, match=r"config\.odd"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trial_leaves_no_file_and_the_model_as_it_was(tmp_path, teacher, tokenizer):
    student = make_model(seed=2)
    before = dict(vars(student.config))
    for peft_config in (None, lora(modules_to_save=["lm_head"], trainable_token_indices=[1, 2], use_dora=True)):
        make_trainer(tmp_path, student, teacher, tokenizer, peft_config=peft_config)
        assert not contents(tmp_path)
    assert vars(student.config)["dtype"] == before["dtype"]


def test_a_trial_takes_nothing_of_what_a_trainer_of_ones_own_saves_beside(tmp_path, teacher, tokenizer):
    """It may copy the model, send it away, or need what is only there after the construction."""

    class Own(KDTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.sent = []

        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            self.sent.append(str(output_dir))

        def create_model_card(self, *args, **kwargs):
            super().create_model_card(*args, **kwargs)
            self.sent.append(f"card after {self.state.log_history[-1]['step']}")

    args = KDConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, save_steps=1, logging_steps=1
    )  # fmt: skip
    trainer = Own(make_model(seed=2), teacher, args, ROWS, None, tokenizer, teacher_processing_class=tokenizer)
    trainer.train()
    assert trainer.sent == ["card after 1", str(tmp_path / "_tmp-checkpoint-1" / "checkpoint-1")]


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match=r"nothing can be saved in .*file is a file"):
            make_trainer(tmp_path / out, "no-such-student", "no-such-teacher", make_tokenizer())
        with pytest.raises(ValueError, match="is a file"):
            refuse_folder(tmp_path / out)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_of_the_run_is_not_written_over(base, teacher, tokenizer, whose):
    models = (str(base), teacher) if whose == "student" else (make_model(seed=2), str(base))
    with pytest.raises(ValueError, match=f"is the folder of the {whose}.*choose another one"):
        make_trainer(base, *models, tokenizer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "cohere", "phi"])
def test_ties_that_loading_makes_again_are_none_to_refuse(family):
    refuse_undeclared_ties(make_model(family))


def test_what_is_logged_can_be_saved(tmp_path, teacher, tokenizer):
    trainer = make_trainer(tmp_path, make_model(seed=2), teacher, tokenizer)
    trainer.log({"a": torch.tensor(1.5), "b": np.float32(0.5), "c": torch.float32, "d": 2.0})
    trainer.save_state()
    (entry,) = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {name: entry[name] for name in "abcd"} == {"a": 1.5, "b": 0.5, "c": "torch.float32", "d": 2.0}


# ------------------------------------------------------------------------------------------------- as the base model is


@pytest.mark.parametrize("kind", ["kd", "kv", "lora"])
def test_every_setting_that_is_saved_is_the_base_models(tmp_path, base, teacher, kind):
    """Of the final model, a checkpoint, and, of adapters, the merged model."""
    peft_config = lora() if kind == "lora" else None
    kind = "kv" if kind == "kv" else "kd"
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = make_trainer(
        tmp_path, str(base), teacher, tokenizer, kind, peft_config=peft_config, gradient_checkpointing=True,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert tokenizer.pad_token == "<eos>"  # for the training
    folders = [tmp_path, tmp_path / "checkpoint-1"]
    if peft_config is not None:
        merge_adapter(tmp_path, tmp_path / "merged")
        folders.append(tmp_path / "merged")
    else:
        trainer.model.save_pretrained(tmp_path / "by hand")
        tokenizer_files = [path for path in base.iterdir() if "token" in path.name or "template" in path.name]
        (tmp_path / "by hand").mkdir(exist_ok=True)
        for path in tokenizer_files:
            shutil.copy(path, tmp_path / "by hand")
        folders.append(tmp_path / "by hand")
    for folder in folders:
        for path in base.iterdir():
            if path.suffix == ".json" and (peft_config is None or folder.name == "merged" or "token" in path.name):
                assert settings_of(folder / path.name) == settings_of(path), path.name
        assert (folder / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()


def test_the_routers_settings_are_the_base_models(tmp_path, tokenizer, teacher):
    config = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.02, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for i, coefficient in enumerate((None, 0.0)):
        student = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        trainer = make_trainer(tmp_path / str(i), student, teacher, tokenizer, router_aux_loss_coef=coefficient)
        trainer.save_model()
        saved = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert (saved["output_router_logits"], saved["router_aux_loss_coef"]) == (False, 0.02)
        assert trainer.student.config.output_router_logits is (coefficient is None)


@pytest.mark.filterwarnings("ignore:`(pad|eos)_token` is deprecated")
def test_a_padding_token_that_was_asked_for_is_saved(tmp_path, base, teacher):
    trainer = make_trainer(
        tmp_path, str(base), teacher, AutoTokenizer.from_pretrained(base), pad_token="<|system|>", eos_token="<|user|>"
    )
    trainer.save_model()
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), json.loads((tmp_path / "config.json").read_text())
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|system|>", "<|user|>")
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_no_model_card_names_a_local_path(tmp_path, base, teacher):
    trainer = make_trainer(
        tmp_path / "out", str(base), teacher, AutoTokenizer.from_pretrained(base), peft_config=lora(), save_steps=1,
        save_strategy="steps",
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    for folder in ("out", "out/checkpoint-1"):
        assert str(base) not in (tmp_path / folder / "README.md").read_text()
        assert {"lora", "hf_distill"} <= set(ModelCard.load(tmp_path / folder / "README.md").data.tags)
    trainer.create_model_card()
    assert str(base) not in (tmp_path / "out" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------- used folders


def assert_loads_as(folder, trainer):
    found, expected = AutoModelForCausalLM.from_pretrained(folder), trainer.student
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, expected.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("order", ["adapter, then whole", "whole, then adapter"])
@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_and_a_whole_model_never_meet_in_a_folder(tmp_path, base, teacher, caplog, order, trains):
    out, tokenizer = tmp_path / "out", AutoTokenizer.from_pretrained(base)
    configs = [lora(init_lora_weights=False), None]
    for i, peft_config in enumerate(configs if order.startswith("adapter") else reversed(configs)):
        caplog.clear()
        place = out if trains else tmp_path / f"elsewhere-{i}"
        trainer = make_trainer(place, str(base), teacher, tokenizer, peft_config=peft_config)
        if trains:
            trainer.train()
        trainer.save_model(str(out))
        assert_loads_as(out, trainer)
        assert not {"adapter_config.json", "model.safetensors"} <= contents(out)
        told = [message for message in caplog.messages if "files of an earlier run" in message]
        assert [message.endswith("_earlier-1") for message in told] == [True] * i
        trainer.save_model(str(out))  # its own are no earlier run's
    assert contents(out / "_earlier-1") & {"adapter_config.json", "model.safetensors"}


def test_nothing_of_an_earlier_run_is_taken_for_the_next_ones(tmp_path, teacher, tokenizer):
    """Reports, pictures, emergencies, projectors, checkpoints, shards, chat templates; what is no run's stays."""
    names = [
        "report.md", "report.json", "report.png", "settings.json", "trainer_state.json", "cosine.png", "comparison.md",
        "emergency/model.safetensors", "projectors/projector.json", "projector.safetensors", "hidden_projector.json",
        "checkpoint-9/model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "added_tokens.json",
        "additional_chat_templates/tools.jinja", "all_results.json", "generation_config.json", "baseline/settings.json",
        "baseline/model.safetensors",
    ]  # fmt: skip
    kept = [
        "rows.jsonl", "run.yaml", "bundles/manifest.json", "restored/config.json", "tokenizer_training.py",
        "tokenizer/tokenizer.json", "tokenizers.csv", "report.tex", "comparison.csv", "vocab.py", "chat_templates.md",
    ]  # fmt: skip
    for name in names + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    plain = make_tokenizer()
    plain.chat_template = None
    trainer = make_trainer(tmp_path, make_model(seed=2), teacher, plain)
    assert not (tmp_path / "_earlier-1").exists()  # not before there is something new
    trainer.train()
    trainer.save_model()
    moved = {str(path.relative_to(tmp_path / "_earlier-1")) for path in (tmp_path / "_earlier-1").rglob("*.*")}
    assert moved == set(names)
    assert all((tmp_path / name).exists() for name in kept)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    assert_loads_as(tmp_path, trainer)


def test_a_folder_of_the_name_of_a_baseline_stays_without_a_run_around_it(tmp_path):
    for name in ("report.md", "baseline/settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    set_aside(tmp_path)
    assert contents(tmp_path) == {"_earlier-1", "baseline"}
    # That of a run that was stopped in it belongs to this run, and no later one goes on with it.
    stopped = tmp_path / "stopped"
    (stopped / "baseline" / "checkpoint-3").mkdir(parents=True)
    set_aside(stopped)
    assert contents(stopped) == {"baseline"}
    (stopped / "model.safetensors").touch()
    set_aside(stopped)
    assert contents(stopped) == {"_earlier-1"}


def test_a_run_that_fails_to_start_leaves_a_used_folder_as_it_was(tmp_path, teacher, tokenizer, monkeypatch):
    (tmp_path / "report.md").write_text("earlier")
    (tmp_path / "emergency").mkdir()
    trainer = make_trainer(tmp_path, make_model(seed=2), teacher, tokenizer)
    monkeypatch.setattr(trainer, "training_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert contents(tmp_path) == {"report.md", "emergency"}


def test_a_resumed_run_keeps_its_files(tmp_path, teacher, tokenizer):
    def run(**kwargs):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        trainer = make_trainer(tmp_path, make_model(seed=2), teacher, tokenizer, **options)
        trainer.train(**kwargs)
        trainer.save_model()

    run()
    (tmp_path / "report.md").write_text("its own")
    run(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "report.md").exists()
    assert not list(tmp_path.glob("_earlier-*"))
    run()
    assert {"report.md", "checkpoint-2", "model.safetensors"} <= contents(tmp_path / "_earlier-1")


def test_a_resumed_run_keeps_its_files_under_every_name_of_its_folder(tmp_path, teacher, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    out, link = tmp_path / "out", tmp_path / "link"
    make_trainer(out, make_model(seed=2), teacher, tokenizer, **options | {"max_steps": 1}).train()
    link.symlink_to(out)
    for name in (f"{tmp_path}/else/../out", link):
        trainer = make_trainer(name, make_model(seed=2), teacher, tokenizer, **options)
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))
        assert {"checkpoint-1", "checkpoint-2"} <= contents(out)
        assert not list(out.glob("_earlier-*"))


@pytest.mark.parametrize("place", ["checkpoint-9", "emergency"])
def test_a_model_that_adapters_need_is_not_moved_aside(tmp_path, base, teacher, place):
    out, tokenizer = tmp_path / "out", AutoTokenizer.from_pretrained(base)
    shutil.copytree(base, out / place)
    with pytest.raises(ValueError, match=f"the student .*{place}.*moved aside.*choose another"):
        make_trainer(out, str(out / place), teacher, tokenizer, peft_config=lora())
    make_trainer(tmp_path / "adapted", str(out / place), teacher, tokenizer, peft_config=lora()).save_model()
    with pytest.raises(ValueError, match=f"the base model .*{place}.*moved aside"):
        merge_adapter(tmp_path / "adapted", out)
    shutil.move(tmp_path / "adapted", tmp_path / "other" / "checkpoint-9")
    with pytest.raises(ValueError, match=r"the adapter .*moved aside"):
        merge_adapter(tmp_path / "other" / "checkpoint-9", tmp_path / "other")
    trainer = make_trainer(out, str(out / place), teacher, tokenizer)  # a whole student needs nothing of it
    trainer.train()
    assert (out / "_earlier-1" / place).exists()


def test_earlier_runs_are_set_aside_one_by_one(tmp_path):
    for i in (1, 2):
        (tmp_path / "report.md").write_text(str(i))
        set_aside(tmp_path)
        assert (tmp_path / f"_earlier-{i}" / "report.md").read_text() == str(i)
    set_aside(tmp_path)
    assert contents(tmp_path) == {"_earlier-1", "_earlier-2"}
    set_aside(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- paths


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_base_is_found_from_its_adapter(tmp_path, monkeypatch):
    inside, beside = make_folder(tmp_path / "work/out/restored"), make_folder(tmp_path / "work/student")
    adapter = tmp_path / "work" / "out" / "checkpoint-3"
    make_folder(tmp_path / "elsewhere" / "student")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of(adapter, "out/restored") == str(inside)
    assert base_of(adapter, "student") == str(beside)  # not the one of the working directory
    assert base_of(adapter, str(beside)) == str(beside)
    assert base_of(adapter, "org/model") == "org/model"
    assert base_of(inside, "") == ""
    shutil.move(tmp_path / "work", tmp_path / "moved")
    assert base_of(tmp_path / "moved" / "out", str(inside)) == str(tmp_path / "moved" / "out" / "restored")
    assert base_of(tmp_path / "moved" / "out", str(tmp_path / "no")) == str(tmp_path / "no")


def test_an_adapter_is_loaded_and_merged_from_every_working_directory(tmp_path, base, teacher, monkeypatch):
    """Of a base that was named relative to the training's; also one that was saved so."""
    shutil.copytree(base, tmp_path / "models" / "student")
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = make_trainer("runs/out", "models/student", teacher, tokenizer, peft_config=lora(init_lora_weights=False))
    trainer.save_model()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out, ids = tmp_path / "runs" / "out", torch.arange(8).unsqueeze(0)
    expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(out)(ids).logits, expected)
    config = PeftConfig.from_pretrained(out)
    assert config.base_model_name_or_path == str(tmp_path / "models" / "student")
    config.base_model_name_or_path = "models/student"
    config.save_pretrained(out)
    merge_adapter(os.path.relpath(out), "merged")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained("merged")(ids).logits, expected)
    found = load_teacher(os.path.relpath(out), device=None)
    torch.testing.assert_close(found(ids).logits, expected)


def test_an_adapter_saved_beside_its_base_leaves_it_there(tmp_path, base, teacher):
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = lora(init_lora_weights=False)
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), teacher, tokenizer, peft_config=config)
    trainer.save_model(str(tmp_path / "base"))
    assert_loads_as(tmp_path / "base", trainer)


def test_merging_over_the_base_is_refused(tmp_path, base, teacher):
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    make_trainer(tmp_path / "out", str(tmp_path / "base"), teacher, tokenizer, peft_config=lora()).save_model()
    with pytest.raises(ValueError, match="is the folder of the base model"):
        merge_adapter(tmp_path / "out", tmp_path / "base")


def test_the_best_checkpoint_of_a_moved_run_is_beside_the_one_that_it_goes_on_from(tmp_path):
    args = type("Args", (), {"output_dir": str(tmp_path / "new")})
    state = TrainerState(best_global_step=4, best_model_checkpoint="old/checkpoint-4")
    for folder in ("new", "moved"):  # the one in the new folder is another run's
        (tmp_path / folder / "checkpoint-4").mkdir(parents=True)
        timing = CheckpointTiming(lambda: False, lambda: None, {tmp_path / "moved", tmp_path / "nowhere"})
        timing.on_train_begin(args, state, None)
        assert (state.best_model_checkpoint == "old/checkpoint-4") == (folder == "new")
    assert state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-4")


# ----------------------------------------------------------------------------------------------------------- projectors


def test_no_file_beside_the_students_weights_looks_like_weights_and_the_old_place_is_read(tmp_path, teacher, tokenizer):
    options = {"projector": "mlp", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "out", make_model(seed=2), teacher, tokenizer, "kv", **options)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    expected = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    old = tmp_path / "out" / "checkpoint-1"
    for path in (old / "projectors").iterdir():
        path.rename(old / path.name)
    (old / "projectors").rmdir()
    names = [name.replace("projectors/", "") for name in json.loads((old / "complete.json").read_text())]
    (old / "complete.json").write_text(json.dumps(names))
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    again = make_trainer(tmp_path / "out", make_model(seed=9), teacher, tokenizer, "kv", **options)
    again.train(resume_from_checkpoint=True)
    found = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_projector_is_loaded_from_the_students_folder_and_from_its_own(tmp_path):
    projector = KVProjector(6, 4)
    Projectors({"projector": projector}).save(tmp_path / "new")
    save_projector(projector, tmp_path / "old")
    assert contents(tmp_path / "new") == {"projectors"}
    for folder in ("new", "new/projectors", "old"):
        found = load_projector(tmp_path / folder).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in projector.state_dict().items())
