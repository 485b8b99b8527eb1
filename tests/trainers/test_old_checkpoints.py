"""Resuming from checkpoints that an earlier version wrote gives the weights that this version would have trained.

`python -m tests.trainers.test_old_checkpoints` wrote `old_checkpoints/` beside this file when the file was added: the
teacher, a checkpoint of update 2 of each run, and the trained weights after update 4. Never write the folder again: it
stands for the files that users already have.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from tests.conftest import SENTENCES, make_model, make_tokenizer

FOLDER = Path(__file__).with_name("old_checkpoints")
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2, "save_steps": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps",
    "gradient_checkpointing": False,
}  # fmt: skip


def kd_with_hidden_layers(teacher, rows, tokenizer, folder) -> KDTrainer:
    """All weights, inner layers through a projector, a schedule."""
    args = KDConfig(
        output_dir=str(folder),
        hidden_weight=0.5,
        hidden_layers="last",
        schedule={"temperature": [2.0, 1.0]},
        **SETTINGS,
    )
    student = make_model("llama", seed=2, vocab_size=280, hidden_size=16, intermediate_size=16)
    return KDTrainer(student, teacher, args, rows, None, tokenizer, teacher_processing_class=tokenizer)


def kv_with_adapters(teacher, rows, tokenizer, folder) -> KVProjectionTrainer:
    """Adapters, keys and values through a trained projector."""
    args = KVProjectionConfig(output_dir=str(folder), projector="mlp", projector_dropout=0.0, kv_weight=0.5, **SETTINGS)
    student = make_model("llama", seed=3, vocab_size=280, hidden_size=16, intermediate_size=16)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return KVProjectionTrainer(
        student, teacher, args, rows, None, tokenizer, teacher_processing_class=tokenizer, peft_config=lora
    )


RUNS = {"kd_with_hidden_layers": kd_with_hidden_layers, "kv_with_adapters": kv_with_adapters}


def make_rows(tokenizer) -> Dataset:
    return Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"][:12] for text in SENTENCES]})


def trained(trainer) -> dict[str, torch.Tensor]:
    """Weights that the run trains, the projectors' included."""
    student = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    projectors = {f"projectors.{name}": p.detach() for name, p in trainer.projectors.named_parameters()}
    return {name: tensor.clone() for name, tensor in (student | projectors).items()}


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_from_an_old_checkpoint(name, tmp_path):
    shutil.copytree(FOLDER / name / "checkpoint-2", tmp_path / "checkpoint-2")
    tokenizer = make_tokenizer(vocab_size=280)
    teacher = AutoModelForCausalLM.from_pretrained(FOLDER / "teacher", dtype="auto")
    trainer = RUNS[name](teacher, make_rows(tokenizer), tokenizer, tmp_path)
    before = trained(trainer)
    trainer.train(resume_from_checkpoint=True)
    found, expected = trained(trainer), load_file(FOLDER / name / "expected.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert any(not torch.allclose(before[key], expected[key], atol=1e-2) for key in expected)


@pytest.mark.filterwarnings("default:.*KVProjectionConfig is:DeprecationWarning")
def test_old_arguments_are_read_by_the_path_that_their_class_had():
    args = torch.load(FOLDER / "kv_with_adapters" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(args) is KVProjectionConfig


def write() -> None:
    tokenizer = make_tokenizer(vocab_size=280)
    teacher = make_model("llama", seed=1, vocab_size=280, hidden_size=24, intermediate_size=16)
    FOLDER.mkdir()
    os.chdir(FOLDER)  # Files that a run writes name its output directory.
    teacher.save_pretrained("teacher")
    for name, make in RUNS.items():
        trainer = make(teacher, make_rows(tokenizer), tokenizer, name)
        trainer.train()
        save_file(trained(trainer), f"{name}/expected.safetensors")
        shutil.rmtree(f"{name}/checkpoint-4")


if __name__ == "__main__":
    write()
