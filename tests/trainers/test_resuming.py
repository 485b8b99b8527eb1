"""A resumed run is the uninterrupted one, whatever the student; a checkpoint of another run is refused in words."""

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
    cli,
)
from hf_distill.modeling import whole_state
from hf_distill.trainers.checkpoints import MARK, checkpoints, problem_of, rotate
from hf_distill.trainers.resuming import RUN
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_checkpoints import At, terminate

SIZES = {
    "vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, tie_word_embeddings=True, attention_dropout=0.1),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=3, attention_dropout=0.1),
}  # fmt: skip
ADAPTERS = {
    "full": None,
    "LoRA": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "use_dora": True},
    "LoRA on experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
}


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    ids = [tokenizer(text)["input_ids"][: 6 + 2 * i] for i, text in enumerate(SENTENCES)]
    return Dataset.from_dict({"input_ids": ids})


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1, hidden_size=48)


@pytest.fixture(scope="module")
def make(rows, teacher, tokenizer):
    """A trainer with a tiny student; `student` is a model or the name of a mixture of experts."""

    def trainer(folder, student="llama", lora=None, kind=KDTrainer, seed=2, callbacks=(), **changes):
        settings = {
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": [], "disable_tqdm": True, "optim": "adamw_torch", "learning_rate": 1e-2, "logging_steps": 1,
            "per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        }  # fmt: skip
        if isinstance(student, str) and student in MIXTURES:
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(MIXTURES[student], dtype=torch.float32)
        elif isinstance(student, str):
            student = make_model(student, seed=seed)
        data = rows
        if kind is SpeculativeKDTrainer:
            data = Dataset.from_dict({"student_prompt_ids": [r[:3] for r in rows["input_ids"]]})
            data = data.add_column("teacher_prompt_ids", data["student_prompt_ids"])
            settings |= {"max_new_tokens": 4, "top_k": 50}
        args = {
            KDTrainer: KDConfig, KVProjectionTrainer: KVProjectionConfig, SpeculativeKDTrainer: SpeculativeKDConfig
        }[kind](**settings | changes)  # fmt: skip
        return kind(
            student, teacher, args, data, data, tokenizer, teacher_processing_class=tokenizer,
            peft_config=lora and LoraConfig(**{"r": 2, **lora}), callbacks=list(callbacks),
        )  # fmt: skip

    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return whole_state(trainer.model)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


# ---------------------------------------------------------------------------------------------------------- bit for bit


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "full"), ("mixtral", "LoRA on experts"), ("qwen3_moe", "LoRA"),
        *(pytest.param(*case, marks=SLOW) for case in (
            ("mixtral", "LoRA"), ("qwen3_moe", "full"), ("qwen3_moe", "LoRA on experts"),
        )),
    ],
)  # fmt: skip
def test_a_resumed_mixture_of_experts_is_bit_identical_and_keeps_its_parameters(tmp_path, make, family, kind):
    lora = ADAPTERS[kind]
    whole = make(tmp_path, family, lora)
    whole.train()
    # The base of a student with adapters is not in a checkpoint.
    resumed = make(tmp_path, family, lora, seed=2 if lora else 9)
    if lora:
        for parameter in resumed.model.parameters():
            parameter.data += 0.1 * parameter.requires_grad
    objects = {name: id(parameter) for name, parameter in resumed.model.named_parameters(remove_duplicate=False)}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))
    found = {name: id(parameter) for name, parameter in resumed.model.named_parameters(remove_duplicate=False)}
    assert found == objects


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "full"),
        pytest.param("mixtral", "LoRA on experts", marks=SLOW),
        pytest.param("gpt2", "full", marks=SLOW),
    ],
)
def test_the_best_model_is_loaded_bit_for_bit(tmp_path, make, family, kind):
    seen = {}
    trainer = make(
        tmp_path, family, ADAPTERS[kind], eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=3,
        load_best_model_at_end=True, metric_for_best_model="kd", greater_is_better=False,
        callbacks=[At(3, lambda: seen.update(weights(trainer)))],
    )  # fmt: skip
    measure = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (
        measure(*args, **kwargs) | {"eval_kd": abs(2 - trainer.state.global_step)}
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_same(weights(trainer), seen)


def test_adapters_over_a_bfloat16_student_go_on_in_their_dtype(tmp_path, make):
    def made():
        student = make_model("llama", seed=2).bfloat16()
        trainer = make(tmp_path, student, {"target_modules": ["q_proj"]})
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()  # as TRL keeps those of QLoRA
        return trainer

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(whole))
    assert {parameter.dtype for parameter in resumed.model.parameters()} == {torch.bfloat16}


def test_a_stopped_trainer_with_a_projector_goes_on_itself(tmp_path, make):
    """Its optimizer has the projector in a group of its own already."""
    settings = {"kind": KVProjectionTrainer, "projector": "mlp", "save_strategy": "no"}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    trainer = make(tmp_path / "out", callbacks=[At(2, terminate)], **settings)
    with pytest.raises(SystemExit):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), weights(whole))
    assert_same(whole_state(trainer.projectors), whole_state(whole.projectors))


# ------------------------------------------------------------------------------------------------------- of another run


LORA = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory, make):
    """A checkpoint of each kind of run, made when it is asked for."""
    runs = {
        "full": {}, "LoRA": {"lora": LORA}, "sgd": {"optim": "sgd"}, "only model": {"save_only_model": True},
        "only adapters": {"save_only_model": True, "lora": LORA}, "skd": {"kind": SpeculativeKDTrainer},
        "kv": {"kind": KVProjectionTrainer, "projector": "pca"},
        "kv, trained": {"kind": KVProjectionTrainer, "projector": "mlp"}, "mixtral": {"student": "mixtral"},
    }  # fmt: skip
    folders: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / "out"
            make(folders[name], max_steps=1, save_steps=1, **runs[name]).train()
        return folders[name] / "checkpoint-1"

    return checkpoint


SMALLER = {"hidden_size": 16, "head_dim": 8}
OTHER_RUNS = {
    "adapters to full": ("LoRA", {}, r"is of a student with adapters \(peft_type='LORA', r=2.*this one has none"),
    "full to adapters": ("full", {"lora": LORA}, "is of a student that was trained in full, and this one has adapters"),
    "rank": ("LoRA", {"lora": {**LORA, "r": 3}}, "of shape .*peft_config that its run began with"),
    "targets": ("LoRA", {"lora": {**LORA, "target_modules": ["q_proj"]}}, r"strange: .*v_proj"),
    "alpha": ("LoRA", {"lora": {**LORA, "lora_alpha": 9}}, "of an adapter with lora_alpha=4, and .* has lora_alpha=9"),
    "DoRA": ("LoRA", {"lora": {**LORA, "use_dora": True}}, "use_dora=False, and this student's has use_dora=True"),
    "rank-stabilised": ("LoRA", {"lora": {**LORA, "use_rslora": True}}, "use_rslora=False"),
    "head": ("LoRA", {"lora": {**LORA, "modules_to_save": ["lm_head"]}}, r"missing: .*lm_head"),
    "adamw to sgd": ("full", {"optim": "sgd"}, "optimizer torch.AdamW, and this one has torch.SGD"),
    "adamw to adafactor": ("full", {"optim": "adafactor"}, "optimizer torch.AdamW, .*Adafactor"),
    "sgd to adamw": ("sgd", {}, "optimizer torch.SGD, and this one has torch.AdamW"),
    "8 bits": ("full", {"optim": "adamw_bnb_8bit"}, "optimizer torch.AdamW, and this one has bitsandbytes.AdamW of 8"),
    "another model": ("full", {"student": "gpt2"}, "model_type='llama', and this student has model_type='gpt2'"),
    "experts": ("mixtral", {}, "model_type='mixtral'"),
    "kd to skd": ("full", {"kind": SpeculativeKDTrainer}, "of a run of KDTrainer, and this one is of SpeculativeKDTr"),
    "skd to kd": ("skd", {}, "of a run of SpeculativeKDTrainer, and this one is of KDTrainer: resume with Specul"),
    "kd to kv": ("full", {"kind": KVProjectionTrainer, "projector": "pca"}, "of a run with this projector"),
    "kv to kd": ("kv", {}, "is of a run with a projector, and this run has none of that name"),
    "another projector": ("kv", {"kind": KVProjectionTrainer, "projector": "mlp"}, "projector.*pca.*mlp"),
    "a wider projector": (
        "kv, trained", {"kind": KVProjectionTrainer, "projector": "mlp", "projector_mlp_ratio": 2.0}, "mlp_ratio",
    ),
    "only the model": ("only model", {}, "has no optimizer, as save_only_model leaves it.*take its folder as the"),
    "only adapters": ("only adapters", {"lora": LORA}, "has no optimizer, as save_only_model leaves it"),
}  # fmt: skip


# Of those that are told by the same lines as another one is.
RARELY = (
    "targets", "DoRA", "rank-stabilised", "head", "sgd to adamw", "adamw to adafactor", "experts", "only adapters",
    "skd to kd", "a wider projector",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [pytest.param(*case, id=name, marks=[SLOW] * (name in RARELY)) for name, case in OTHER_RUNS.items()],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_changes(
    tmp_path, make, made, caplog, kind, changes, message
):
    if "bnb" in str(changes):
        pytest.importorskip("bitsandbytes")
    checkpoint = made(kind)
    trainer = make(tmp_path, seed=9, **changes)
    before = weights(trainer)
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"no checkpoint to resume from .*checkpoint-1.*" + message):
        trainer.train(resume_from_checkpoint=True)
    assert "it is skipped" in caplog.text
    assert_same(weights(trainer), before)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["adapters to full", "full to adapters", "alpha", "adamw to sgd", "skd to kd"])
def test_checkpoints_of_earlier_versions_are_compared_too(tmp_path, make, made, name):
    kind, changes, _ = OTHER_RUNS[name]
    old = tmp_path / "checkpoint-1"
    shutil.copytree(made(kind), old, ignore=shutil.ignore_patterns(RUN, MARK))
    trainer = make(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=r"checkpoint-1 (is|was|has) "):
        trainer.train(resume_from_checkpoint=str(old))


def test_another_dtype_is_refused_in_words(tmp_path, make, made):
    for kind, lora in (("full", None), ("LoRA", LORA)):
        trainer = make(tmp_path, make_model("llama", seed=2).bfloat16(), lora)
        trainer.model.bfloat16()
        with pytest.raises(ValueError, match="is in float32, and this student in bfloat16"):
            trainer.train(resume_from_checkpoint=str(made(kind)))


def test_a_checkpoint_of_sft_is_refused(tmp_path, make, rows, tokenizer):
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, save_steps=1, optim="adamw_torch"
    )
    SFTTrainer(make_model("llama", seed=2), args, train_dataset=rows, processing_class=tokenizer).train()
    with pytest.raises(ValueError, match="is of a run of SFTTrainer, and this one is of KDTrainer"):
        make(tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_adapters_over_another_quantisation_are_refused(tmp_path, make, made):
    checkpoint = shutil.copytree(made("LoRA"), tmp_path / "checkpoint-1")
    run = json.loads((checkpoint / RUN).read_text())
    assert run["quantization"] == "none"
    (checkpoint / RUN).write_text(json.dumps(run | {"quantization": "bitsandbytes load_in_4bit nf4"}))
    with pytest.raises(ValueError, match="quantization bitsandbytes load_in_4bit nf4, and this one has none"):
        make(tmp_path, lora=LORA).train(resume_from_checkpoint=True)


def test_the_newest_checkpoint_of_the_same_kind_is_taken(tmp_path, make, made, caplog):
    for step, kind in enumerate(["full", "only model", "LoRA"], 1):
        shutil.copytree(made(kind), tmp_path / f"checkpoint-{step}")
    trainer = make(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    passed = [record.getMessage() for record in caplog.records if "it is skipped" in record.getMessage()]
    assert ["checkpoint-3 is of a student with adapters" in passed[0], "checkpoint-2 has no opt" in passed[1]] == [
        True
    ] * 2
    assert trainer.state.global_step == 2


def test_settings_that_change_the_updates_are_told_in_one_line(tmp_path, make, made, caplog):
    caplog.set_level(logging.WARNING)
    trainer = make(tmp_path, max_steps=2, seed=3, temperature=3.0, learning_rate=1.0)
    trainer.teacher.name = "another"
    trainer.train(resume_from_checkpoint=str(made("full")))
    (line,) = [
        record.getMessage() for record in caplog.records if "differs from the checkpoint's" in record.getMessage()
    ]
    for setting in ("temperature 3.0 (1.0)", "max_steps 2 (1)", "learning_rate 1.0 (0.01)", "teacher another ("):
        assert setting in line
    assert "kd_weight" not in line
    caplog.clear()
    make(tmp_path, max_steps=1).train(resume_from_checkpoint=str(made("full")))
    assert "differs" not in caplog.text


@dataclass
class OwnConfig(KDConfig):
    mixture: dict = field(default_factory=lambda: {("web", "en"): 0.5})
    reward: object = field(default_factory=object)


def test_settings_of_a_configuration_of_ones_own_are_its_own_business(tmp_path, make, teacher, rows, tokenizer, caplog):
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        args = OwnConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, save_steps=1, optim="adamw_torch"
        )
        trainer = KDTrainer(
            make_model("llama", seed=2), teacher, args, rows, None, tokenizer, teacher_processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "differs" not in caplog.text
    make(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_checkpoints_of_save_only_model_are_still_rotated(tmp_path, made):
    for step in (1, 2, 3):
        shutil.copytree(made("only model"), tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, ())
    assert len(checkpoints(tmp_path)) == 1
    assert problem_of(checkpoints(tmp_path)[0]) is None


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("only model", [], "has no optimizer, as save_only_model leaves it"),
        ("skd", [], "is of a run of SpeculativeKDTrainer"),
        ("LoRA", [], "is of a student with adapters"),
        ("full", ["--use_peft", "True"], "is of a student that was trained in full"),
        ("LoRA", ["--use_peft", "True", "--lora_r", "2", "--lora_alpha", "9"], "lora_alpha=4, and .* lora_alpha=9"),
    ],
)
def test_the_command_line_says_so_before_anything_is_loaded(
    tmp_path, made, folder, capsys, monkeypatch, kind, options, message
):
    monkeypatch.setattr("hf_distill.cli.data.load_splits", lambda *_: pytest.fail("rows are loaded"))
    shutil.copytree(made(kind), tmp_path / "checkpoint-1")
    arguments = [
        "kd", "--model", str(folder / "student"), "--teacher_model", str(folder / "teacher"), "--dataset",
        str(folder / "rows.jsonl"), "--output_dir", str(tmp_path), "--use_cpu", "True", "--bf16", "False",
        "--resume_from_checkpoint", "true", *options,
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert re.search(message, capsys.readouterr().err)
