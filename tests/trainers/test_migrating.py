"""TRL's distillation trainers against ours, at the settings that docs/migrate.md sets side by side."""

import copy
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers.integrations.integration_utils import rewrite_logs
from trl import DistillationConfig, ModelConfig, SFTConfig

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, LUPICollator, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.cli import arguments
from hf_distill.losses.divergence import DIVERGENCES
from tests.conftest import SENTENCES, make_model

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns that its trainers are experimental

# TRL's beta -> our divergence and its parameters.
BETAS = {
    0.0: ("forward_kl", None),
    0.1: ("jensen_shannon", {"beta": 0.1}),
    0.5: ("jensen_shannon", None),
    1.0: ("reverse_kl", None),
}


@pytest.fixture(scope="module")
def student():
    return make_model(seed=1)


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=2)


def conversations():
    """A question and an answer in each row, once as messages, once as prompt and completion."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in SENTENCES]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in halves]
    split = {"prompt": [turn[:1] for turn in turns], "completion": [turn[1:] for turn in turns]}
    return Dataset.from_dict({"messages": turns}), Dataset.from_dict(split)


def settings(folder, **changes):
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, **changes,
    }  # fmt: skip


def trained(trainer):
    """The logged losses, and all weights after the training."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("beta", BETAS)
def test_gkd_off_policy_is_kd_with_the_divergence_of_beta(student, teacher, tokenizer, tmp_path, beta):
    gkd_module = pytest.importorskip("trl.experimental.gkd")
    messages, split = conversations()
    # The temperature of GKD is that of its samples: it never reaches the loss.
    args = gkd_module.GKDConfig(lmbda=0.0, beta=beta, temperature=0.3, **settings(tmp_path / "gkd"))
    gkd = gkd_module.GKDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher), args, train_dataset=messages, processing_class=tokenizer
    )
    divergence, params = BETAS[beta]
    args = KDConfig(kd_weight=1.0, divergence=divergence, divergence_params=params, **settings(tmp_path / "kd"))
    kd = KDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher), args, split,
        processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    (their_losses, their_weights), (losses, weights) = trained(gkd), trained(kd)
    assert losses == pytest.approx(their_losses, rel=1e-4)
    torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-5)


def test_gkd_on_policy_divides_by_the_tokens_of_the_data(student, teacher, tokenizer, tmp_path):
    gkd_module = pytest.importorskip("trl.experimental.gkd")
    messages, split = conversations()
    changes = {"max_steps": 1, "max_new_tokens": 6}
    args = gkd_module.GKDConfig(lmbda=1.0, beta=0.5, temperature=1e-4, **settings(tmp_path / "gkd", **changes))
    gkd = gkd_module.GKDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher), args, train_dataset=messages, processing_class=tokenizer
    )
    args = SpeculativeKDConfig(
        rollout_mix={"student": 1.0}, student_temperature=0.0, divergence="jensen_shannon", kd_weight=1.0,
        **settings(tmp_path / "skd", **changes),
    )  # fmt: skip
    skd = SpeculativeKDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher), args, split,
        processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    (their_loss,), _ = trained(gkd)
    (loss,), _ = trained(skd)
    answers = [row["completion"][0]["content"] + "<eos>" for row in split.select(range(4))]
    in_the_data = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers)
    generated = sum(len(row.completion_ids) for row in skd.last_rows)
    assert their_loss * in_the_data / generated == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_trainer_has_no_factor_of_the_temperature(
    student, teacher, tokenizer, tmp_path, beta, temperature
):
    from trl import DistillationTrainer

    changes = {"temperature": temperature}
    theirs = DistillationTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher),
        DistillationConfig(beta=beta, **settings(tmp_path / "distillation", **changes)),
        train_dataset=Dataset.from_dict({"prompt": SENTENCES}), processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    divergence, params = BETAS[beta]
    ours = KDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher),
        KDConfig(
            kd_weight=1.0, divergence=divergence, divergence_params=params, **settings(tmp_path / "kd", **changes)
        ),
        Dataset.from_dict({"text": SENTENCES}), processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    torch.manual_seed(0)
    ids, mask, prompt = torch.randint(2, 384, (2, 12)), torch.ones(2, 12, dtype=torch.long), 5
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    with torch.no_grad():
        their_loss = theirs.compute_loss(
            theirs.model.eval(),
            {
                "prompt_ids": ids[:, :prompt], "prompt_mask": mask[:, :prompt],
                "completion_ids": ids[:, prompt:], "completion_mask": mask[:, prompt:],
            },
        )  # fmt: skip
    num_items = (labels[:, 1:] != -100).sum()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = ours.compute_loss(ours.model, inputs, num_items_in_batch=num_items)
    torch.testing.assert_close(loss.detach() / temperature**2, their_loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_gold_divides_logits_by_its_temperature_and_has_no_factor(beta, temperature):
    gold = pytest.importorskip("trl.experimental.gold")
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 7, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[1, -100, 2], [-100, 3, 4]])
    theirs = gold.GOLDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    divergence, params = BETAS[beta]
    sides = [log_softmax(logits / temperature, dim=-1) for logits in (student, teacher)]
    per_token = DIVERGENCES[divergence](*sides, **(params or {}))
    torch.testing.assert_close(per_token[labels != -100].mean(), theirs)


def names(*classes):
    return {entry.name for each in classes for entry in fields(each)}


def rows_of_tables():
    """Their column's name, their cell and our cell, of each row of a table that has a column called ours."""
    header = None
    for line in (Path(__file__).parents[2] / "docs" / "migrate.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif "ours" in header and not set(line) <= set("|-"):
            yield header[0], cells[0], cells[header.index("ours")]


def test_the_page_names_settings_that_exist():
    experimental = {"gkd": "GKDConfig", "gold": "GOLDConfig", "server_distillation": "ServerDistillationConfig"}
    found = [getattr(pytest.importorskip(f"trl.experimental.{name}"), kind) for name, kind in experimental.items()]
    configs = (SFTConfig, DistillationConfig, *found)
    theirs = {f"`{config.__name__}`": names(config) for config in configs}
    options = (arguments.StagedArguments, arguments.KVArguments, arguments.SKDArguments, ModelConfig)
    ours = names(KVProjectionConfig, SpeculativeKDConfig, *options)
    checked = 0
    for header, their_cell, our_cell in rows_of_tables():
        for name in re.findall(r"`([a-z_0-9]+)(?:`|=)", their_cell) if header in theirs else ():
            assert name in theirs[header] | {"eval_loss"}, f"{header} has no {name}"
            checked += 1
        for name in re.findall(r"--([a-z_]+)|`([a-z_]+)(?:=|: )", our_cell):
            assert max(name) in ours | {"env"}, f"there is no {max(name)}"
            checked += 1
    assert checked > 100


def test_curves_have_the_names_that_pages_give_them(student, teacher, tokenizer, tmp_path):
    rows = Dataset.from_list([{"query": f"Where is {i}?", "knowledge": text} for i, text in enumerate(SENTENCES)])
    args = SpeculativeKDConfig(
        max_new_tokens=6, adaptive=True, eval_strategy="steps", eval_steps=1,
        **settings(tmp_path, max_steps=1, per_device_eval_batch_size=8),
    )  # fmt: skip
    trainer = SpeculativeKDTrainer(
        copy.deepcopy(student), copy.deepcopy(teacher), args, rows, rows, processing_class=tokenizer,
        teacher_processing_class=tokenizer, data_collator=LUPICollator(tokenizer),
    )  # fmt: skip
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in rewrite_logs(entry)}  # as W&B gets them
    recipes = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    curves = re.findall(r"`((?:train|eval)/\w+/\w+)`", recipes)
    assert len(curves) == 8
    assert set(curves) <= logged
    ours = [cell for header, _, cell in rows_of_tables() if header == "their metric"]
    names = {name for cell in ours for name in re.findall(r"`(\w+(?:/\w+)?)`", cell) if not name.startswith("_")}
    names -= {"acceptance_ratio_global", "tokens/acceptance_ratio_global"}
    assert {name.removeprefix("eval_") for name in names} <= {name.partition("/")[2] for name in logged}
