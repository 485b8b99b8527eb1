"""KDTrainer against dense formulas, against SFTTrainer, against itself cut another way, and against misuse.

Shapes: B batch, T tokens, N label-bearing positions, V vocabulary.
"""

import copy
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from hf_distill import KDConfig, KDTrainer
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE, adaptive_kl, alpha_beta

VOCAB = 384


# ------------------------------------------------------------------------------------------------ what the tests share


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        **changes,
    }


def make_trainer(folder, student, teacher, dataset, tokenizer, *, trainer_settings=None, **changes) -> KDTrainer:
    return KDTrainer(
        student,
        teacher,
        KDConfig(**settings(folder, **changes)),
        train_dataset=dataset,
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
        **(trainer_settings or {}),
    )


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged tokenised rows; the first tokens of each are prompt, without a label."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class Gradients(TrainerCallback):
    """The gradients that the optimizer is about to use, of every update."""

    def __init__(self):
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.updates.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    @property
    def first(self) -> dict[str, Tensor]:
        return self.updates[0]


def gradients_of(folder, student, teacher, dataset, tokenizer, trainer_settings=None, **changes):
    """Gradients and log of the first update of a copy of the student."""
    capture = Gradients()
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, dataset, tokenizer,
        trainer_settings={"callbacks": [capture], **(trainer_settings or {})}, **changes,
    )  # fmt: skip
    trainer.train()
    return capture.first, trainer.state.log_history[0]


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert found
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > 0
    for name in expected:
        difference = (found[name] - expected[name]).norm()
        # Relative to the tensor, except for tensors that are noise beside the whole gradient.
        assert difference <= rtol * max(expected[name].norm(), 1e-3 * norm), name


def padded_batch(dataset) -> dict[str, Tensor]:
    """All rows right-padded into one batch, made without any collator."""
    length = max(len(row["input_ids"]) for row in dataset)

    def pad(values: list[int], value: int) -> list[int]:
        return values + [value] * (length - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in dataset]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in dataset]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in dataset]),
    }


ORACLE_WITH_PARAMS = {"alpha_beta": alpha_beta, "adaptive_kl": adaptive_kl}


def dense_terms(student, teacher, dataset, *, temperature=1.0, divergence="forward_kl", vocab_size=VOCAB, **params):
    """Divergence, CE, agreement and entropy per label-bearing token, from the logits that the models return."""
    batch = padded_batch(dataset)
    labels = batch.pop("labels")[:, 1:]
    mask = labels != -100
    student_logits = student(**batch).logits[:, :-1][mask][:, :vocab_size].double()  # (N, V)
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits[:, :-1][mask][:, :vocab_size].double()  # (N, V)
    log_probs = student_logits.log_softmax(-1)
    formula = partial(ORACLE_WITH_PARAMS[divergence], **params) if params else ORACLE[divergence]
    kd = formula((teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1))
    return {
        "kd": kd,
        "ce": nn.functional.cross_entropy(student_logits, labels[mask], reduction="none"),
        "agreement": (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double(),
        "student_entropy": -(log_probs.exp() * log_probs).sum(-1),
    }


def dense_loss(student, teacher, dataset, *, kd_weight=0.5, temperature=1.0, divergence="forward_kl", **options):
    terms = dense_terms(student, teacher, dataset, temperature=temperature, divergence=divergence, **options)
    factor = temperature if divergence == "total_variation" else temperature**2
    return kd_weight * factor * terms["kd"].mean() + (1 - kd_weight) * terms["ce"].mean()


def dense_gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture
def student():
    return make_model("llama", seed=2)


# -------------------------------------------------------------------------------------- the loss is the dense formula


DENSE_CASES = [
    ("llama", {"divergence": "forward_kl", "temperature": 1.0, "kd_weight": 0.5}, {}),
    ("llama", {"divergence": "forward_kl", "temperature": 3.0, "kd_weight": 1.0}, {}),
    ("qwen2", {"divergence": "reverse_kl", "temperature": 2.0, "kd_weight": 0.7}, {}),
    ("gemma2", {"divergence": "alpha_beta", "temperature": 0.5, "kd_weight": 0.9}, {"alpha": 0.3, "beta": 0.6}),
    ("gpt2", {"divergence": "total_variation", "temperature": 2.0, "kd_weight": 0.5}, {}),
    ("cohere", {"divergence": "forward_kl", "temperature": 2.0, "kd_weight": 0.5}, {}),
    ("granite", {"divergence": "jensen_shannon", "temperature": 4.0, "kd_weight": 0.5}, {}),
    ("qwen3", {"divergence": "adaptive_kl", "temperature": 2.0, "kd_weight": 0.5}, {"head": 0.7}),
    ("phi", {"divergence": "reverse_kl", "temperature": 1.5, "kd_weight": 0.5}, {}),
    ("mistral", {"divergence": "forward_kl", "temperature": 2.0, "kd_weight": 0.0}, {}),
]


@pytest.mark.parametrize(("family", "options", "params"), DENSE_CASES)
def test_loss_and_gradients_of_a_full_student_are_the_dense_formula(tmp_path, tokenizer, rows, family, options, params):
    student, teacher = make_model(family, seed=2), make_model(family, seed=1)
    for model in (student, teacher):
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            nn.init.normal_(model.get_output_embeddings().bias)  # Zero would prove nothing.
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, divergence_params=params, **options)
    loss = dense_loss(student, teacher, rows, **options, **params)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def test_teacher_of_another_family_and_width_gives_the_dense_formula(tmp_path, tokenizer, rows, student):
    teacher = make_model("gemma2", seed=1, hidden_size=48)
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, temperature=2.0)
    loss = dense_loss(student, teacher, rows, temperature=2.0)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes})


def nonzero_adapters(model: nn.Module) -> nn.Module:
    """LoRA's B starts at zero, where half of the gradients vanish."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_loss_and_gradients_of_a_lora_student_are_the_dense_formula(tmp_path, tokenizer, rows, teacher, family):
    student = nonzero_adapters(get_peft_model(make_model(family, seed=2), lora()))
    options = {"divergence": "reverse_kl", "temperature": 2.0, "kd_weight": 0.8}
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, **options)
    loss = dense_loss(student, teacher, rows, **options)
    expected = dense_gradients(loss, student)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert all("lora" in name for name in expected)
    assert_same_gradients(found, expected)


def test_lora_with_modules_to_save_trains_the_head(tmp_path, tokenizer, rows, student, teacher):
    student = nonzero_adapters(get_peft_model(student, lora(modules_to_save=["lm_head"])))
    found, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer)
    expected = dense_gradients(dense_loss(student, teacher, rows), student)
    assert any("lm_head.modules_to_save" in name for name in found)
    assert_same_gradients(found, expected)


def test_peft_config_adds_adapters_and_trains_only_them(tmp_path, tokenizer, rows, student, teacher):
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, trainer_settings={"peft_config": lora()}, max_steps=3
    )
    trainer.train()
    weights = trainer.model.get_base_model().state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in weights.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = [name for name, value in weights.items() if "lora_B" in name and value.abs().sum() > 0]
    assert len(trained) == 2 * 3  # layers x modules


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen2MoeConfig])
def test_loss_of_a_mixture_of_experts_has_the_models_own_load_balancing_loss(tmp_path, tokenizer, rows, config_class):
    student, teacher = make_moe(config_class, seed=2), make_model("llama", seed=1)
    coefficient = 0.3
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, router_aux_loss_coef=coefficient)
    batch = padded_batch(rows)
    del batch["labels"]
    auxiliary = student(**batch, output_router_logits=True).aux_loss
    loss = dense_loss(student, teacher, rows) + coefficient * auxiliary
    assert log["aux_loss"] == pytest.approx(auxiliary.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def make_moe(config_class, seed: int):
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, num_experts_per_tok=2,
        shared_expert_intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        **{"num_local_experts" if config_class is MixtralConfig else "num_experts": 4},
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# --------------------------------------------------------------------------------- kd_weight 0 is TRL's own SFTTrainer


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "lora"])
def test_kd_weight_zero_is_sfttrainer(tmp_path, tokenizer, rows, teacher, family):
    if family == "mixtral":
        student = make_moe(MixtralConfig, seed=2)
    elif family == "lora":
        student = nonzero_adapters(get_peft_model(make_model("llama", seed=2), lora()))
    else:
        student = make_model(family, seed=2)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, kd_weight=0.0, **split)

    capture = Gradients()
    sft = SFTTrainer(
        copy.deepcopy(student), SFTConfig(**settings(tmp_path, **split)),
        train_dataset=rows, processing_class=tokenizer, callbacks=[capture],
    )  # fmt: skip
    sft.train()
    assert log["loss"] == pytest.approx(sft.state.log_history[0]["loss"], rel=1e-6)
    assert log["num_tokens"] == sft.state.log_history[0]["num_tokens"]
    assert_same_gradients(found, capture.first)


# ----------------------------------------------------------------------------------- however the batch is cut or packed


@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_do_not_depend_on_how_a_batch_is_split(tmp_path, tokenizer, rows, student, teacher, with_lora):
    if with_lora:
        student = nonzero_adapters(get_peft_model(student, lora()))
    expected, whole = gradients_of(tmp_path, student, teacher, rows, tokenizer)
    for batch_size, steps in ((4, 2), (1, 8)):
        split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, **split)
        assert_same_gradients(found, expected)
        for name in ("loss", "kd", "ce", "agreement", "student_entropy", "num_tokens"):
            assert log[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_packed_rows_give_the_gradients_of_the_rows_alone(tmp_path, tokenizer, rows, family):
    student, teacher = make_model(family, seed=2), make_model(family, seed=1)
    expected, plain = gradients_of(tmp_path, student, teacher, rows, tokenizer)
    # Whichever rows meet in a pack, and however many packs there are, all of them are in this one update.
    packed, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, packing=True, max_length=64)
    assert_same_gradients(packed, expected)
    padding_free, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer, padding_free=True, max_length=None)
    assert_same_gradients(padding_free, expected)
    assert log["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert log["num_tokens"] == plain["num_tokens"]


def test_gradient_checkpointing_does_not_change_gradients(tmp_path, tokenizer, rows, student, teacher):
    expected, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer)
    found, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer, gradient_checkpointing=True)
    assert_same_gradients(found, expected, rtol=1e-6)


def test_bf16_loss_is_within_two_percent_of_float32(tmp_path, tokenizer, rows, student, teacher):
    _, exact = gradients_of(tmp_path, student, teacher, rows, tokenizer, temperature=2.0)
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, temperature=2.0, bf16=True)
    assert log["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert log["loss"] != exact["loss"]  # Autocast was really on.
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


# -------------------------------------------------------------------------------------------------------- vocabularies


def with_padded_head(model, rows: int, **config):
    """The same model with more rows in embedding and head than there are tokens; loud ones, so that a leak is seen."""
    padded = make_model("llama", vocab_size=VOCAB + rows, seed=3, **config)
    state = padded.state_dict()
    for name, value in model.state_dict().items():
        state[name][: len(value)] = value
        state[name][len(value) :] *= 20
    padded.load_state_dict(state)
    return padded


def test_padded_heads_of_different_sizes_give_the_update_of_unpadded_ones(tmp_path, tokenizer, rows, student, teacher):
    expected, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, temperature=2.0)
    padded_teacher = with_padded_head(teacher, 64, hidden_size=48, num_hidden_layers=3)
    found, padded_log = gradients_of(
        tmp_path, with_padded_head(student, 16), padded_teacher, rows, tokenizer, temperature=2.0
    )
    assert found["lm_head.weight"][VOCAB:].abs().max() == 0
    assert_same_gradients({name: gradient[: len(expected[name])] for name, gradient in found.items()}, expected)
    for name in ("loss", "kd", "ce", "agreement", "student_entropy"):
        assert padded_log[name] == pytest.approx(log[name], rel=1e-5), name


def test_qwen2_5_sizes_of_the_large_and_the_small_models_fit_each_other(tmp_path):
    # 0.5B has 151,936 rows and 7B 152,064 for one and the same tokenizer of 151,665 tokens.
    vocab = {f"t{i}": i for i in range(151_665)}
    tokenizer = word_level_tokenizer(vocab, pad_token="t151643", eos_token="t151645")
    student = make_model("qwen2", 151_936, seed=2, hidden_size=8, num_hidden_layers=1)
    teacher = make_model("qwen2", 152_064, seed=1, hidden_size=8, num_hidden_layers=1)
    rows = Dataset.from_dict({"input_ids": [[5, 151_664, 9, 70_000, 8], [1, 2, 151_645]]})
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, temperature=2.0)
    loss = dense_loss(student, teacher, rows, temperature=2.0, vocab_size=151_665)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # With so many small probabilities, dense float32 itself is 2e-5 away from float64.
    assert_same_gradients(found, dense_gradients(loss, student), rtol=5e-5)


def word_level_tokenizer(vocab: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_another_vocabulary_of_the_same_size_is_refused_with_examples_and_a_way_out(tmp_path, tokenizer, rows):
    other = make_tokenizer(corpus=[sentence[::-1] for sentence in SENTENCES])
    assert len(other) == len(tokenizer)
    with pytest.raises(ValueError, match="different vocabularies") as error:
        KDTrainer(
            make_model(), make_model(seed=1), KDConfig(**settings(tmp_path), cross_tokenizer="error"), rows,
            processing_class=tokenizer, teacher_processing_class=other,
        )  # fmt: skip
    mine, theirs = (tok.convert_ids_to_tokens(range(VOCAB)) for tok in (tokenizer, other))
    first = next(i for i in range(VOCAB) if mine[i] != theirs[i])
    assert f"{first}: {mine[first]!r} / {theirs[first]!r}" in str(error.value)
    assert "one family" in str(error.value)


@pytest.fixture(scope="module")
def extended_tokenizer():
    """The tokenizer with two tokens added at the end, one of which is its pad token: ids 384 and 385."""
    extended = make_tokenizer(added_tokens=("<extra>", "<mypad>"))
    extended.pad_token = "<mypad>"
    return extended


def test_tokens_added_at_one_end_get_no_mass_even_if_the_teacher_cannot_embed_the_pad_token(
    tmp_path, tokenizer, extended_tokenizer, rows, student, teacher
):
    expected, log = gradients_of(tmp_path, student, teacher, rows, tokenizer)
    larger = with_padded_head(student, 2)
    assert teacher.get_input_embeddings().num_embeddings == VOCAB <= extended_tokenizer.pad_token_id
    capture = Gradients()
    trainer = KDTrainer(
        larger, teacher, KDConfig(**settings(tmp_path)), rows,
        processing_class=extended_tokenizer, teacher_processing_class=tokenizer, callbacks=[capture],
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[7]])
    assert (batch["input_ids"] == extended_tokenizer.pad_token_id).any()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(log["loss"], rel=1e-5)
    assert_same_gradients({name: g[: len(expected[name])] for name, g in capture.first.items()}, expected)


def test_row_with_a_token_that_the_teacher_lacks_is_refused(tmp_path, tokenizer, extended_tokenizer, student, teacher):
    dataset = Dataset.from_dict({"text": ["The dog ran.", "The <extra> ran."]})
    with pytest.raises(ValueError, match=r"token id 384.*share only the ids below 384.*both know"):
        KDTrainer(
            with_padded_head(student, 2), teacher, KDConfig(**settings(tmp_path)), dataset,
            processing_class=extended_tokenizer, teacher_processing_class=tokenizer,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the teacher


def test_teacher_stays_frozen_deterministic_and_unchanged(tmp_path, tokenizer, rows, student):
    teacher = make_model("gpt2", seed=1, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=3, gradient_checkpointing=True, weight_decay=0.1
    )
    batch = padded_batch(rows)
    positions = torch.arange(5)
    del batch["labels"]
    signals = [trainer.teacher(dict(batch), positions).hidden]
    trainer.train()
    signals += [trainer.teacher(dict(batch), positions).hidden for _ in range(2)]
    assert torch.equal(signals[0], signals[1])
    assert torch.equal(signals[1], signals[2])
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


def test_checkpoints_hold_the_student_and_nothing_of_the_teacher(tmp_path, tokenizer, rows, student, teacher):
    from safetensors.torch import load_file

    names = set(student.state_dict())
    teacher_size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        weights = load_file(folder / "model.safetensors")
        assert set(weights) == names
        assert list(folder.glob("*.safetensors")) == [folder / "model.safetensors"]
    # No other file is large enough to hide it in: the optimizer's state of SGD is empty.
    others = [p for p in (tmp_path / "checkpoint-2").iterdir() if p.suffix not in (".safetensors", ".json")]
    assert sum(path.stat().st_size for path in others) < teacher_size / 2
    assert not any("teacher" in path.name for path in tmp_path.rglob("*"))


def test_student_and_teacher_may_be_the_same_path(tmp_path, tokenizer, rows, student):
    student.save_pretrained(path := str(tmp_path / "model"))
    tokenizer.save_pretrained(path)
    trainer = KDTrainer(path, path, KDConfig(**settings(tmp_path, max_steps=2)), rows)
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(0, abs=1e-6)
    assert trainer.state.log_history[1]["kd"] > 1e-6


def test_teacher_in_half_precision_is_within_two_percent(tmp_path, tokenizer, rows, student, teacher):
    _, exact = gradients_of(tmp_path, student, teacher, rows, tokenizer, kd_weight=1.0)
    _, log = gradients_of(tmp_path, student, teacher.to(torch.bfloat16), rows, tokenizer, kd_weight=1.0)
    assert teacher.dtype == torch.bfloat16
    assert log["loss"] == pytest.approx(exact["loss"], rel=2e-2)


def test_student_can_be_trained_again_and_then_teach(tmp_path, tokenizer, rows, student, teacher):
    first = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    first.train()
    trained = make_model("llama", seed=2)
    trained.load_state_dict(student.state_dict())
    expected = dense_gradients(dense_loss(trained, teacher, rows), trained)
    capture = Gradients()
    make_trainer(
        tmp_path, student, teacher, rows, tokenizer, learning_rate=0.0, trainer_settings={"callbacks": [capture]}
    ).train()
    assert_same_gradients(capture.first, expected)

    pupil = make_model("gpt2", seed=3)
    found, _ = gradients_of(tmp_path, pupil, student, rows, tokenizer)
    assert_same_gradients(found, dense_gradients(dense_loss(pupil, trained, rows), pupil))


# ---------------------------------------------------------------------------------------------------------------- logs


def test_logs_are_token_weighted_means_over_the_steps_since_the_last_log(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, copy.deepcopy(student), teacher, rows, tokenizer, temperature=2.0, learning_rate=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, logging_steps=2,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    terms = dense_terms(student, teacher, rows, temperature=2.0)
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    for epoch, log in enumerate(logs, start=1):  # Two updates of four rows are one epoch, and nothing changes.
        for name, values in terms.items():
            assert log[name] == pytest.approx(values.mean().item(), rel=1e-5), name
        assert log["num_tokens"] == epoch * num_tokens
    assert not any(name in log for log in trainer.state.log_history if "loss" not in log for name in terms)


def test_eval_metrics_are_exact_token_means_whatever_the_batch_size(tmp_path, tokenizer, rows, student, teacher):
    terms = dense_terms(student, teacher, rows, temperature=2.0)
    loss = dense_loss(student, teacher, rows, temperature=2.0, kd_weight=0.7)
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, temperature=2.0, kd_weight=0.7,
        trainer_settings={"eval_dataset": rows},
    )  # fmt: skip
    for batch_size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = batch_size
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
        for name, values in terms.items():
            assert metrics[f"eval_{name}"] == pytest.approx(values.mean().item(), rel=1e-5), name


def test_each_eval_set_has_its_own_metrics_and_training_means_are_untouched(
    tmp_path, tokenizer, rows, student, teacher
):
    sets = {"short": rows.select(range(3)), "long": rows.select(range(3, 8))}
    expected = {name: dense_loss(student, teacher, part).item() for name, part in sets.items()}
    kd = dense_terms(student, teacher, rows)["kd"].mean().item()
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, trainer_settings={"eval_dataset": sets},
        learning_rate=0.0, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    logs = {name: value for log in trainer.state.log_history for name, value in log.items()}
    for name, value in expected.items():
        assert logs[f"eval_{name}_loss"] == pytest.approx(value, rel=1e-5)
    assert logs["kd"] == pytest.approx(kd, rel=1e-5)
    assert logs["eval_short_kd"] != logs["eval_long_kd"]


def test_evaluate_prepares_a_held_out_set_and_predict_returns_logits(tmp_path, tokenizer, rows, student, teacher):
    held_out = Dataset.from_dict({"text": SENTENCES[:3]})
    tokenised = [{"input_ids": (ids := tokenizer(t + "<eos>")["input_ids"]), "labels": ids} for t in SENTENCES[:3]]
    expected = dense_loss(student, teacher, tokenised).item()
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, per_device_eval_batch_size=2)
    assert trainer.evaluate(held_out, metric_key_prefix="test")["test_loss"] == pytest.approx(expected, rel=1e-5)
    output = trainer.predict(trainer.train_dataset.select(range(1)))
    with torch.no_grad():
        row = torch.tensor([trainer.train_dataset[0]["input_ids"]])
        assert torch.allclose(torch.tensor(output.predictions), student(input_ids=row).logits, atol=1e-5)


# ------------------------------------------------------------------------------------------------ runs that are stopped


class At(TrainerCallback):
    """Does something at the beginning of one step (1 is the first)."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def throw(error: BaseException):
    raise error


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_whatever_stops_training_is_raised_again_after_the_student_is_saved(
    tmp_path, tokenizer, rows, student, teacher, error, with_lora
):
    student.save_pretrained(tmp_path / "base")
    peft_config = lora(target_modules=["q_proj"]) if with_lora else None
    trainer = make_trainer(
        tmp_path, str(tmp_path / "base"), teacher, rows, tokenizer, max_steps=5,
        trainer_settings={"callbacks": [At(3, lambda: throw(error))], "peft_config": peft_config},
    )  # fmt: skip
    with pytest.raises(type(error)) as raised:
        trainer.train()
    assert raised.value is error
    assert trainer.state.global_step == 2
    loader = AutoPeftModelForCausalLM if with_lora else AutoModelForCausalLM
    saved = loader.from_pretrained(tmp_path / "emergency").state_dict()
    weights = trainer.model.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())
    assert any(
        not torch.equal(saved[name], value) for name, value in student.state_dict().items() if name in saved
    ) or (with_lora and any(value.abs().sum() > 0 for name, value in saved.items() if "lora_B" in name))


def test_failure_to_save_does_not_hide_what_stopped_training(tmp_path, tokenizer, rows, student, teacher, caplog):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer,
        trainer_settings={"callbacks": [At(1, lambda: throw(RuntimeError("first")))]},
    )  # fmt: skip
    trainer.save_model = lambda *_, **__: throw(OSError("second"))
    with pytest.raises(RuntimeError, match="first"):
        trainer.train()
    assert "second" in caplog.text


def test_a_run_that_fails_to_start_leaves_the_student_that_an_earlier_one_rescued(tmp_path, tokenizer, rows, teacher):
    for step, seed in ((3, 2), (1, 9)):
        trainer = make_trainer(
            tmp_path, make_model("llama", seed=seed), teacher, rows, tokenizer, max_steps=5,
            trainer_settings={"callbacks": [At(step, lambda: throw(RuntimeError("stop")))]},
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
        if step == 3:
            rescued = trainer.model.state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "emergency").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in rescued.items())


def test_an_emergency_is_never_pushed_to_the_hub(tmp_path, tokenizer, rows, student, teacher, monkeypatch):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=5,
        trainer_settings={"callbacks": [At(2, lambda: throw(KeyboardInterrupt()))]},
    )  # fmt: skip
    trainer.args.push_to_hub = True
    pushed = []
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "push_to_hub", lambda *_, **__: pushed.append(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "emergency").exists()
    assert not pushed


def test_a_second_training_starts_with_nothing_of_an_interrupted_one(tmp_path, tokenizer, rows, student, teacher):
    """The first stops in the middle of an update, whose sums must not be those of the second's first step."""

    def logs_of(interrupted: bool):
        trainer = make_trainer(
            tmp_path, copy.deepcopy(student), teacher, rows, tokenizer, max_steps=1, gradient_accumulation_steps=2,
            per_device_train_batch_size=2, logging_steps=1, learning_rate=0.0,
        )  # fmt: skip
        if interrupted:
            compute_loss, calls = trainer.compute_loss, []

            def stop_at_the_second(*args, **kwargs):
                calls.append(1)
                return throw(RuntimeError("stop")) if len(calls) == 2 else compute_loss(*args, **kwargs)

            trainer.compute_loss = stop_at_the_second
            with pytest.raises(RuntimeError, match="stop"):
                trainer.train()
            trainer.compute_loss = compute_loss
        trainer.train()
        return [(log["kd"], log["ce"]) for log in trainer.state.log_history if "loss" in log]

    assert logs_of(interrupted=True) == logs_of(interrupted=False)


@pytest.mark.parametrize("source", ["loss", "gradient"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_non_finite_training_stops_before_the_optimizer_and_names_the_step(
    tmp_path, tokenizer, rows, student, teacher, source, max_grad_norm
):
    def poison():
        if source == "loss":
            teacher.lm_head.weight.data[:] = float("nan")
        else:
            student.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, optim="adamw_torch", learning_rate=1e-3, max_steps=5,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
        max_grad_norm=max_grad_norm, trainer_settings={"callbacks": [At(3, poison)]},
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="at step 3"):
        trainer.train()
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    rescued = AutoModelForCausalLM.from_pretrained(tmp_path / "emergency").state_dict()
    assert not (tmp_path / "checkpoint-3").exists()
    for name, value in student.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, last[name])
        assert torch.equal(value, rescued[name])


@pytest.mark.parametrize("finite", [(1,), (1, 21)])
def test_loss_scaler_may_skip_updates_but_not_for_ever(
    tmp_path, tokenizer, rows, student, teacher, monkeypatch, finite
):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, max_steps=50)
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu"))
    student.model.norm.weight.register_hook(
        lambda gradient: gradient * (1.0 if trainer.state.global_step + 1 in finite else float("inf"))
    )
    stop = finite[-1] + 20  # 19 in a row are everyday.
    with pytest.raises(FloatingPointError, match=f"at step {stop}: .*norm (inf|nan), in 20 updates in a row.*lower"):
        trainer.train()
    assert trainer.state.global_step == stop - 1
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - (stop - 1 - len(finite)))
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, tokenizer, rows, teacher):
    def run(folder, seed, **kwargs):
        student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        trainer = make_trainer(
            folder, student, teacher, rows, tokenizer, optim="adamw_torch", learning_rate=1e-2, max_steps=6,
            lr_scheduler_type="cosine", per_device_train_batch_size=1, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=3, max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train(**kwargs)
        logs = [{k: v for k, v in log.items() if "time" not in k} for log in trainer.state.log_history if "loss" in log]
        return student.state_dict(), logs

    whole, whole_logs = run(tmp_path / "whole", seed=2)
    resumed, logs = run(tmp_path / "resumed", seed=9, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for name in ("loss", "kd", "ce", "agreement", "student_entropy", "grad_norm"):
        assert [log[name] for log in logs] == [log[name] for log in whole_logs], name


# ------------------------------------------------------------------------------------------------------------- datasets


def text_ids(tokenizer, prompt: str, completion: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of a row, and the positions whose token bears a label: those after the prompt."""
    ids, prompt_ids = tokenizer(prompt + completion + "<eos>")["input_ids"], tokenizer(prompt)["input_ids"]
    return tuple(ids), tuple(range(len(prompt_ids) if completion else 1, len(ids)))


def chat_ids(tokenizer, user: str, assistant: str, only_assistant: bool):
    start = tokenizer(f"<|user|>{user}<eos><|assistant|>")["input_ids"]
    ids = start + tokenizer(f"{assistant}<eos>")["input_ids"]
    return tuple(ids), tuple(range(len(start) if only_assistant else 1, len(ids)))


def dataset_case(name: str, tokenizer):
    """A dataset, settings for it, and the rows and label-bearing positions it should become."""
    pairs = [(" ".join(words[:3]), " " + " ".join(words[3:])) for words in (s.split() for s in SENTENCES[:2])]
    texts = [prompt + completion for prompt, completion in pairs]
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in pairs
    ]
    as_text = [text_ids(tokenizer, text) for text in texts]
    if name == "text":
        return Dataset.from_dict({"text": texts}), {}, as_text
    if name == "text in another column":
        return Dataset.from_dict({"story": texts}), {"dataset_text_field": "story"}, as_text
    if name == "formatting_func":
        rows = Dataset.from_dict({"a": [p for p, _ in pairs], "b": [c for _, c in pairs]})
        return rows, {"formatting_func": lambda row: row["a"] + row["b"]}, as_text
    if name == "streaming":
        return Dataset.from_dict({"text": texts}).to_iterable_dataset(), {}, as_text
    if name == "generator":
        return IterableDataset.from_generator(lambda: ({"text": text} for text in texts)), {}, as_text
    if name == "prompt and completion":
        rows = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
        return rows, {}, [text_ids(tokenizer, *pair) for pair in pairs]
    if name == "prompt and completion, whole":
        rows = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
        return rows, {"completion_only_loss": False}, as_text
    if name == "conversational prompt and completion":
        rows = Dataset.from_dict({"prompt": [chat[:1] for chat in chats], "completion": [chat[1:] for chat in chats]})
        return rows, {}, [chat_ids(tokenizer, *pair, only_assistant=True) for pair in pairs]
    if name == "messages":
        return Dataset.from_dict({"messages": chats}), {}, [chat_ids(tokenizer, *pair, False) for pair in pairs]
    if name == "messages, assistant only":
        rows = Dataset.from_dict({"messages": chats})
        return rows, {"assistant_only_loss": True}, [chat_ids(tokenizer, *pair, True) for pair in pairs]
    if name == "conversations":
        turns = [[{"from": turn["role"], "value": turn["content"]} for turn in chat] for chat in chats]
        return Dataset.from_dict({"conversations": turns}), {}, [chat_ids(tokenizer, *pair, False) for pair in pairs]
    assert name == "pre-tokenised"
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]], "labels": [[-100, -100, 7, 8], [9, -100, 11]]})
    # A label on the first token has nothing that predicts it.
    return rows, {}, [((5, 6, 7, 8), (2, 3)), ((9, 10, 11), (2,))]


FORMATS = [
    "text", "text in another column", "formatting_func", "streaming", "generator", "prompt and completion",
    "prompt and completion, whole", "conversational prompt and completion", "messages", "messages, assistant only",
    "conversations", "pre-tokenised",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_each_dataset_format_trains_on_the_expected_tokens(tmp_path, tokenizer, student, teacher, name):
    dataset, changes, expected = dataset_case(name, tokenizer)
    extra = {key: changes.pop(key) for key in ("formatting_func",) if key in changes}
    trainer = make_trainer(
        tmp_path, student, teacher, dataset, tokenizer, trainer_settings=extra,
        per_device_train_batch_size=1, max_steps=2, **changes,
    )  # fmt: skip
    seen, ask = [], trainer.teacher

    def teacher_that_listens(inputs, positions):
        # Positions are those that predict: one before the token that bears the label.
        seen.append((tuple(inputs["input_ids"][0].tolist()), tuple((positions + 1).tolist())))
        return ask(inputs, positions)

    trainer.teacher = teacher_that_listens
    trainer.train()
    assert sorted(seen) == sorted(expected)
    assert trainer.state.global_step == 2


def test_rows_without_a_label_are_dropped_and_counted(tmp_path, tokenizer, student, teacher, caplog):
    ids = [[5, 6, 7], [5, 6, 8], [9, 10, 11], [12]]
    labels = [[-100, -100, 7], [-100] * 3, [9, -100, -100], [12]]  # A first token alone has nothing to predict it.
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        trainer = make_trainer(tmp_path, student, teacher, dataset, tokenizer)
    assert trainer.train_dataset["input_ids"] == [[5, 6, 7]]
    assert "3 of 4 train rows have no label" in caplog.text


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_rows_without_a_label_are_dropped_and_counted_before_packing(
    tmp_path, tokenizer, student, teacher, caplog, strategy
):
    ids = [[5, 6, 7], [5, 6, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17, 18]]
    labels = [[-100, -100, 7], [-100] * 3, [9, -100, -100], [-100] * 6 + [18]]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        trainer = make_trainer(
            tmp_path, student, teacher, dataset, tokenizer, packing=True, packing_strategy=strategy, max_length=6
        )
    # The label of the last row is past max_length, where "bfd" cuts and the others go on in another row.
    dropped = 3 if strategy == "bfd" else 2
    assert f"{dropped} of 4 train rows have no label" in caplog.text
    found = {token for row in trainer.train_dataset["input_ids"] for token in row}
    assert {5, 6, 7} <= found
    assert not {8, 9, 10, 11} & found


def test_packing_cuts_and_mixes_rows_as_sfttrainer_does(tmp_path, tokenizer, student, teacher):
    dataset = Dataset.from_dict({"text": SENTENCES})
    for strategy in ("bfd", "bfd_split", "wrapped"):
        options = {"packing": True, "packing_strategy": strategy, "max_length": 12, "shuffle_dataset": True}
        args = SFTConfig(**settings(tmp_path, **options))
        sft = SFTTrainer(copy.deepcopy(student), args, train_dataset=dataset, processing_class=tokenizer)
        trainer = make_trainer(tmp_path, student, teacher, dataset, tokenizer, **options)
        assert trainer.train_dataset["input_ids"] == sft.train_dataset["input_ids"], strategy


def endless(row: dict[str, list[int]]) -> IterableDataset:
    def rows():
        while True:
            yield row

    return IterableDataset.from_generator(rows)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("labels", [[-100] * 3, [5, -100, -100]])
def test_stream_that_starts_with_too_many_rows_without_a_label_is_refused(
    tmp_path, tokenizer, student, teacher, packing, labels
):
    dataset = endless({"input_ids": [5, 6, 7], "labels": labels})
    with pytest.raises(ValueError, match=r"none of the first 1,000 rows of the train dataset has a label.*max_length"):
        make_trainer(tmp_path, student, teacher, dataset, tokenizer, packing=packing)


def test_stream_may_start_with_rows_without_a_label(tmp_path, tokenizer, student, teacher):
    def rows():
        yield from [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 999
        yield {"input_ids": [8, 9, 10], "labels": [8, 9, 10]}

    dataset = IterableDataset.from_generator(rows)
    trainer = make_trainer(tmp_path, student, teacher, dataset, tokenizer, per_device_train_batch_size=1)
    assert [row["input_ids"] for row in trainer.train_dataset] == [[8, 9, 10]]
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", ["rows", "torch", "transform", "stream"])
def test_rows_that_are_not_prepared_are_checked_all_the_same(tmp_path, tokenizer, student, teacher, kind):
    def make(rows) -> Dataset | IterableDataset:
        dataset = Dataset.from_dict(rows)
        if kind == "transform":
            return dataset.with_transform(lambda batch: {name: list(values) for name, values in batch.items()})
        return (
            dataset.to_iterable_dataset()
            if kind == "stream"
            else dataset.with_format("torch" if kind == "torch" else None)
        )

    known = make({"input_ids": [[5, 6, 7], [8, 9, 10]], "labels": [[5, 6, 7], [-100] * 3]})
    foreign = make({"input_ids": [[5, 6, 7], [8, VOCAB, 10]], "labels": [[-100, -100, -100], [8, 9, 10]]})
    unlabelled = make({"input_ids": [[5, 6, 7]], "labels": [[-100] * 3]})
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    trainer = make_trainer(
        tmp_path, student, teacher, known, tokenizer, **skip, per_device_train_batch_size=1, max_steps=2
    )
    trainer.train()
    assert kind == "stream" or trainer.train_dataset is known  # rows of a stream are checked one by one
    for dataset, message in ((foreign, "token id 384.*share only the ids below 384"), (unlabelled, "has a label left")):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student, teacher, dataset, tokenizer, **skip)
        with pytest.raises(ValueError, match=message):
            make_trainer(
                tmp_path, student, teacher, known, tokenizer, **skip, trainer_settings={"eval_dataset": dataset}
            )


def test_rows_that_are_not_prepared_and_have_no_labels_train_on_every_token(tmp_path, tokenizer, student, teacher):
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    trainer = make_trainer(
        tmp_path, student, teacher, dataset, tokenizer, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer.train()
    expected = dense_loss(student, teacher, [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]).item()
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_caller_keeps_dataset_args_and_configs_as_they_were(tmp_path, tokenizer, student, teacher):
    dataset = Dataset.from_dict({"text": SENTENCES})
    params, kwargs = {"alpha": 0.3}, {"attn_implementation": "eager"}
    student.config.bos_token_id = None  # as the tokenizer says: older transformers copy it
    teacher.save_pretrained(tmp_path / "teacher")
    args = KDConfig(
        **settings(tmp_path, divergence="alpha_beta", divergence_params=params, teacher_model_init_kwargs=kwargs)
    )

    def snapshot():
        config = {
            k: v for k, v in student.config.to_dict().items() if k != "use_cache"
        }  # transformers switches it off.
        return args.to_dict(), config, dataset.to_dict(), tokenizer.get_vocab(), tokenizer.special_tokens_map

    before = copy.deepcopy(snapshot())
    KDTrainer(
        student, str(tmp_path / "teacher"), args, dataset, dataset, tokenizer, teacher_processing_class=tokenizer
    ).train()
    assert snapshot() == before
    assert (params, kwargs) == ({"alpha": 0.3}, {"attn_implementation": "eager"})


# ------------------------------------------------------------------------------------------------------------ the card


def test_model_card_names_teacher_and_weights_once_and_no_local_path(tmp_path, tokenizer, rows, student, teacher):
    for name, model in (("tiny-student", student), ("tiny-teacher", teacher)):
        model.save_pretrained(tmp_path / "private" / name)
        tokenizer.save_pretrained(tmp_path / "private" / name)
    args = KDConfig(
        **settings(tmp_path / "out", kd_weight=0.75, temperature=2.5, divergence="skew_forward_kl",
                   divergence_params={"skew": 0.2})
    )  # fmt: skip
    trainer = KDTrainer(
        str(tmp_path / "private/tiny-student"), str(tmp_path / "private/tiny-teacher"), args, train_dataset=rows
    )
    trainer.train()
    for _ in range(2):
        trainer.create_model_card(model_name="tiny-kd")
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count("## Distillation") == 1
        for setting in (
            "| teacher | tiny-teacher |",
            "skew_forward_kl, skew 0.2",
            "| temperature | 2.5 |",
            "0.75",
            "0.25",
        ):
            assert card.count(setting) == 1, setting
        assert str(tmp_path) not in card
        assert "private" not in card


# ------------------------------------------------------------------------------------------------------ 4-bit student


def test_qlora_student_trains_also_after_an_evaluation(tmp_path, tokenizer, rows, student, teacher):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    student.save_pretrained(tmp_path / "student")
    capture = Gradients()
    trainer = make_trainer(
        tmp_path, str(tmp_path / "student"), teacher, rows, tokenizer, max_steps=3, per_device_eval_batch_size=8,
        eval_strategy="steps", eval_steps=1,
        trainer_settings={
            "eval_dataset": rows, "peft_config": lora(), "callbacks": [capture],
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
        },
    )  # fmt: skip
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    trainer.evaluate()  # Where bitsandbytes repacks, if it does.
    trainer.train()
    for gradients in capture.updates:
        found = [gradient.abs().max() for name, gradient in gradients.items() if "lora_B" in name]
        assert len(found) == 2 * 3  # layers x modules
        assert min(found) > 0
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def pair():
    return make_model("llama", seed=2), make_model("llama", seed=1)


def with_shared_embedding(model):
    twin = make_model("llama", seed=1)
    twin.model.embed_tokens.weight = model.model.embed_tokens.weight
    return twin


def with_shared_memory(model):
    twin = make_model("llama", seed=1)
    twin.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    return twin


def on_meta():
    with torch.device("meta"):
        return make_model("llama")


PROMPT_TUNING = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}

BAD_INPUT = {
    "no teacher": (lambda s, t, f: {"teacher_model": None}, "teacher_model is missing: pass a hub id"),
    "the student as teacher": (lambda s, t, f: {"teacher_model": s}, "student object itself.*load the model twice"),
    "a shared parameter": (
        lambda s, t, f: {"teacher_model": with_shared_embedding(s)}, r"own memory.*embed_tokens.*Copy one",
    ),
    "shared memory": (lambda s, t, f: {"teacher_model": with_shared_memory(s)}, r"own memory.*embed_tokens.*Copy one"),
    "the base of a LoRA student as teacher": (
        lambda s, t, f: {"model": (p := get_peft_model(copy.deepcopy(s), lora())), "teacher_model": p.get_base_model()},
        r"own memory.*lora.*Copy one",
    ),
    "a teacher on the meta device": (lambda s, t, f: {"teacher_model": on_meta()}, "meta device.*from_pretrained"),
    "missing columns": (
        lambda s, t, f: {"train_dataset": Dataset.from_dict({"story": ["a"]})},
        r"train dataset has the columns story; it needs 'text'.*Rename",
    ),
    "missing columns of an eval set": (
        lambda s, t, f: {"eval_dataset": {"tales": Dataset.from_dict({"story": ["a"]})}}, "the tales dataset has",
    ),
    "no dataset": (lambda s, t, f: {"train_dataset": None}, "train_dataset is missing"),
    "an empty dataset": (lambda s, t, f: {"train_dataset": Dataset.from_dict({"text": []})}, "train dataset is empty"),
    "only masked labels": (
        lambda s, t, f: {"train_dataset": Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, -100]]})},
        "no row of the train dataset has a label left.*max_length",
    ),
    "images": (
        lambda s, t, f: {"train_dataset": Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "images": [[1]]})},
        "the rows have pictures, and the student reads text alone",
    ),
    "a processor": (lambda s, t, f: {"processing_class": object()}, "has to be a tokenizer, or .* got object"),
    "SFTConfig": (lambda s, t, f: {"args": SFTConfig(**settings(f))}, "has to be a KDConfig, got SFTConfig"),
    "prompt tuning": (
        lambda s, t, f: {"peft_config": PromptTuningConfig(**PROMPT_TUNING)}, "PromptTuningConfig shifts.*use LoRA",
    ),
    "a prompt-tuned student": (
        lambda s, t, f: {"model": get_peft_model(copy.deepcopy(s), PromptTuningConfig(**PROMPT_TUNING))},
        "PromptTuningConfig shifts.*use LoRA",
    ),
    "a prompt-tuned teacher": (
        lambda s, t, f: {"teacher_model": get_peft_model(copy.deepcopy(t), PromptTuningConfig(**PROMPT_TUNING))},
        "PromptTuningConfig shifts.*use LoRA",
    ),
    "quantisation of a loaded teacher": (
        lambda s, t, f: {"args": KDConfig(**settings(f, teacher_quantization="4bit"))}, "already loaded.*Pass its name",
    ),
    "settings for a loaded teacher": (
        lambda s, t, f: {"args": KDConfig(**settings(f, teacher_model_init_kwargs={"a": 1}))}, "already loaded",
    ),
    "a frozen student": (lambda s, t, f: {"model": s.requires_grad_(False)}, "no trainable parameter.*requires_grad_"),
    "no tokenizer": (lambda s, t, f: {"processing_class": None}, "processing_class is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_at_construction_in_words(tmp_path, tokenizer, rows, pair, case, monkeypatch):
    if case == "quantisation of a loaded teacher":
        pytest.importorskip("bitsandbytes")
    change, message = BAD_INPUT[case]
    student, teacher = copy.deepcopy(pair[0]).requires_grad_(True), copy.deepcopy(pair[1])
    arguments = {
        "model": student, "teacher_model": teacher, "train_dataset": rows, "processing_class": tokenizer,
        "teacher_processing_class": tokenizer, "args": KDConfig(**settings(tmp_path)),
    }  # fmt: skip
    arguments |= change(student, teacher, tmp_path)
    with pytest.raises(ValueError, match=message):
        KDTrainer(**arguments)


CHATS = ["messages", "conversations", "conversational prompt and completion"]


@pytest.mark.parametrize("name", CHATS)
def test_conversations_without_a_chat_template_are_refused_in_words(tmp_path, tokenizer, rows, student, teacher, name):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    chats, _, _ = dataset_case(name, tokenizer)
    message = r"the {} dataset has conversations, but .* no chat template: .*chat_template_path"
    with pytest.raises(ValueError, match=message.format("train")):
        make_trainer(tmp_path, student, teacher, chats, plain)
    with pytest.raises(ValueError, match=message.format("eval")):
        make_trainer(tmp_path, student, teacher, rows, plain, trainer_settings={"eval_dataset": chats})
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    args = {"chat_template_path": str(tmp_path / "template.jinja")}
    make_trainer(tmp_path, student, teacher, chats, plain, **args).train()


FSDP = {"ACCELERATE_USE_FSDP": "true"}
SHARDED = {
    "fsdp 1": ({"fsdp": True, "use_cpu": False, "fsdp_config": {"version": 1}}, {}, "FSDP 1 .*fsdp_version to 2"),
    "fsdp 1 by accelerate": ({"use_cpu": False}, FSDP, "FSDP 1 .*fsdp_version to 2"),
    "fsdp that exports nothing": ({"use_cpu": False}, FSDP | {"FSDP_VERSION": "2"}, "no model.*to FULL_STATE_DICT"),
    "fsdp whose weights only rank 0 reads": (
        {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}}, {},
        "rank 0 alone.*set it to false",
    ),
    "fsdp that becomes ddp": ({"fsdp": True}, {}, "FSDP and use_cpu=True exclude each other"),
    "fsdp by accelerate that becomes ddp": ({}, FSDP, "FSDP and use_cpu=True exclude each other"),
    "sharded teacher of a whole student": ({"teacher_device": "sharded"}, {}, "'sharded' needs FSDP2 or ZeRO-3"),
    "processes that know nothing of each other": ({}, {"WORLD_SIZE": "2"}, "2 processes .* train alone: .*use_cpu"),
    "context parallel": (
        {"parallelism_config": ParallelismConfig(cp_size=2)}, {}, "context and sequence parallelism are not supported",
    ),
    "sequence parallel by accelerate": (
        {}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"},
        "context and sequence parallelism are not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDED)
def test_runs_that_are_not_what_they_seem_are_refused_first(tmp_path, tokenizer, rows, case, monkeypatch):
    changes, environment, message = SHARDED[case]
    args = KDConfig(**settings(tmp_path, **changes))
    for name, value in {"ACCELERATE_USE_FSDP": "false", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        KDTrainer("no/student", "no/teacher", args, rows, processing_class=tokenizer)


def test_student_that_is_split_over_devices_is_refused_before_the_teacher_is_loaded(tmp_path, tokenizer, rows, student):
    student.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    for model in (student, get_peft_model(student, lora())):
        with pytest.raises(ValueError, match=r"the student is split over devices.*device_map"):
            KDTrainer(model, "no/teacher", KDConfig(**settings(tmp_path)), rows, processing_class=tokenizer)


def test_student_that_is_loaded_onto_several_devices_is_refused(tmp_path, tokenizer, rows, student, teacher):
    student.save_pretrained(tmp_path / "student")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    kwargs = {"model_init_kwargs": {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}}
    with pytest.raises(ValueError, match=r"the student is split over devices.*device_map"):
        make_trainer(tmp_path, str(tmp_path / "student"), teacher, rows, tokenizer, **kwargs)


def test_frozen_weights_may_be_shared_with_the_teacher(tmp_path, tokenizer, rows, student):
    teacher = make_model("llama", seed=1)
    teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, trainer_settings={"peft_config": lora()})
    before = teacher.model.embed_tokens.weight.clone()
    trainer.train()
    assert torch.equal(teacher.model.embed_tokens.weight, before)


@pytest.mark.parametrize("by_path", [False, True])
def test_teacher_without_a_tokenizer_is_taken_at_its_word_with_a_warning(
    tmp_path, tokenizer, rows, student, teacher, caplog, by_path
):
    if by_path:
        teacher.save_pretrained(tmp_path / "teacher")
        teacher = str(tmp_path / "teacher")
    KDTrainer(student, teacher, KDConfig(**settings(tmp_path)), rows, processing_class=tokenizer)
    assert "teacher_processing_class" in caplog.text


def test_importing_hf_distill_prints_nothing_of_its_own_and_opens_no_connection():
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import peft
from trl import SFTTrainer
for stream in (sys.stdout, sys.stderr):
    print("the libraries underneath have spoken", file=stream, flush=True)
from hf_distill import *
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        assert output.split("the libraries underneath have spoken\n")[1] == ""
