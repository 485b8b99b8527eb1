"""KDTrainer's term of inner hidden states: against a loss by hand, and what becomes of its projector.

The truth is the `hidden_states` that plain models return, every row read alone, compared in float64.
Shapes: N label-bearing positions, D hidden width.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer, SpeculativeKDConfig
from hf_distill.kv_projector import load_projector
from hf_distill.layer_mapping import cka_mapping
from hf_distill.trainers.checkpoints import MARK
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import (
    At,
    Gradients,
    assert_same_gradients,
    gradients_of,
    lora,
    make_trainer,
    nonzero_adapters,
    settings,
)
from tests.trainers.test_kd_teachers import by_hand

PROJECTOR = "hidden_projector"
SHORT = {"num_hidden_layers": 3}
WIDE = {"hidden_size": 48, **SHORT}


# ------------------------------------------------------------------------------------------------ what the tests share


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged tokenised rows; the first tokens of each are prompt, and some later ones bear no label either."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    labels[5][9] = labels[6][12] = -100
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def student():
    return make_model("llama", seed=2)


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1, **SHORT)


@pytest.fixture(scope="module")
def wide_teacher():
    return make_model("llama", seed=1, **WIDE)


def inner_states(model, dataset) -> list[torch.Tensor]:
    """The hidden states (N, D) after each layer at the label-bearing positions, every row read alone."""
    found = []
    for row in dataset:
        mask = torch.tensor(row["labels"][1:]) != -100
        states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        found.append([state[0, :-1][mask] for state in states[1:]])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


DISTANCES = {
    "mse": lambda s, t: ((s - t) ** 2).mean(-1),
    "cosine": lambda s, t: 1 - (s * t).sum(-1) / ((s * s).sum(-1) * (t * t).sum(-1)).sqrt(),
    "normalized_mse": lambda s, t: ((s - t) ** 2).sum(-1) / (t * t).sum(-1),
}


def hidden_by_hand(student, teacher, dataset, mapping, *, hidden_loss="mse", projector=None, views=None):
    """The mean over mapped layers and label-bearing tokens; `views` is the dataset as the teacher reads it."""
    ours = inner_states(student, dataset)
    with torch.no_grad():
        theirs = inner_states(teacher, views or dataset)
    terms = []
    for index, (layer, weights) in enumerate(mapping.items()):
        mine = projector(ours[layer], index) if projector else ours[layer]
        target = sum(weight * theirs[i] for i, weight in weights.items())
        terms.append(DISTANCES[hidden_loss](mine.double(), target.double()).mean())
    return sum(terms) / len(terms)


def first_update(folder, student, teacher, dataset, tokenizer, trainer_settings=None, **changes):
    """Gradients and log of the first update of a copy of the student; its trainer, and its projector before that."""
    capture = Gradients()
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, dataset, tokenizer,
        trainer_settings={"callbacks": [capture], **(trainer_settings or {})}, **{"hidden_weight": 1.0, **changes},
    )  # fmt: skip
    projector = copy.deepcopy(trainer.projectors[PROJECTOR]) if PROJECTOR in trainer.projectors else None
    trainer.train()
    return capture.first, trainer.state.log_history[0], projector, trainer


def gradients_by_hand(loss, student, projector=None):
    """Of the student, and of the projector under the name that it has inside of the student."""
    inside = f"{'base_model.model.' if hasattr(student, 'peft_config') else ''}projectors.{PROJECTOR}."
    named = dict(student.named_parameters())
    named |= {inside + name: p for name, p in projector.named_parameters()} if projector else {}
    for parameter in named.values():
        parameter.grad = None
    loss.backward()
    return {name: p.grad for name, p in named.items() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------- the update

UNIFORM = {0: {1: 1.0}, 1: {2: 1.0}}
CASES = {
    "mse": ({}, {}, UNIFORM),
    "mse of two widths": (WIDE, {"hidden_weight": 3.0}, UNIFORM),
    "cosine": ({}, {"hidden_loss": "cosine", "kd_weight": 0.0}, UNIFORM),
    "cosine of two widths": (WIDE, {"hidden_loss": "cosine", "hidden_layers": "last"}, {1: {2: 1.0}}),
    "normalized_mse": ({}, {"hidden_loss": "normalized_mse", "hidden_layers": "last"}, {1: {2: 1.0}}),
    "normalized_mse of two widths": (
        WIDE, {"hidden_loss": "normalized_mse", "hidden_layers": "[[0, 0], [1, -1], [1, 0]]", "kd_weight": 1.0},
        {0: {0: 1.0}, 1: {2: 0.5, 0: 0.5}},
    ),
    "pairs": ({}, {"hidden_layers": [[-1, -2]], "hidden_weight": 0.3}, {1: {1: 1.0}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_first_update_is_the_one_by_hand(tmp_path, tokenizer, rows, student, teacher, wide_teacher, case):
    sizes, options, mapping = CASES[case]
    teacher = wide_teacher if sizes else teacher
    found, log, projector, trainer = first_update(tmp_path, student, teacher, rows, tokenizer, **options)
    assert trainer.hidden_layers.mapping == mapping
    assert (projector is not None) == bool(sizes)
    hidden = hidden_by_hand(
        student, teacher, rows, mapping, projector=projector, hidden_loss=options.get("hidden_loss", "mse")
    )
    loss = by_hand(student, rows, [(teacher, 1.0)], kd_weight=options.get("kd_weight", 0.5))
    loss = loss + options.get("hidden_weight", 1.0) * hidden
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["hidden"] == pytest.approx(hidden.item(), rel=1e-5)
    assert_same_gradients(found, gradients_by_hand(loss, student, projector))


@pytest.mark.parametrize(("family", "teacher_family"), [("gpt2", "gemma2"), ("qwen3", "phi"), ("mistral", "gpt2")])
def test_families_learn_from_each_other(tmp_path, tokenizer, rows, family, teacher_family):
    sizes = {"n_embd": 48} if teacher_family == "gpt2" else {"hidden_size": 48}
    student, teacher = make_model(family, seed=2), make_model(teacher_family, seed=1, **sizes)
    found, log, projector, trainer = first_update(tmp_path, student, teacher, rows, tokenizer)
    hidden = hidden_by_hand(student, teacher, rows, trainer.hidden_layers.mapping, projector=projector)
    loss = by_hand(student, rows, [(teacher, 1.0)]) + hidden
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, gradients_by_hand(loss, student, projector), rtol=2e-5)


def test_cka_learns_from_the_layers_that_are_most_alike(tmp_path, tokenizer, rows, student, wide_teacher):
    found, log, projector, trainer = first_update(tmp_path, student, wide_teacher, rows, tokenizer, hidden_layers="cka")
    with torch.no_grad():
        expected = cka_mapping(inner_states(student, rows), inner_states(wide_teacher, rows))
    assert list(trainer.hidden_layers.mapping) == [0, 1]
    for layer, weights in trainer.hidden_layers.mapping.items():
        assert weights == pytest.approx(expected[layer], rel=1e-5)
        assert sum(weights.values()) == pytest.approx(1)
    loss = by_hand(student, rows, [(wide_teacher, 1.0)])
    loss = loss + hidden_by_hand(student, wide_teacher, rows, trainer.hidden_layers.mapping, projector=projector)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, gradients_by_hand(loss, student, projector))


@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_do_not_depend_on_splits_packing_or_checkpointing(
    tmp_path, tokenizer, rows, student, wide_teacher, with_lora
):
    if with_lora:
        student = nonzero_adapters(get_peft_model(student, lora()))
    expected, whole, projector, trainer = first_update(tmp_path, student, wide_teacher, rows, tokenizer)
    loss = by_hand(student, rows, [(wide_teacher, 1.0)])
    loss = loss + hidden_by_hand(student, wide_teacher, rows, trainer.hidden_layers.mapping, projector=projector)
    assert_same_gradients(expected, gradients_by_hand(loss, student, projector))
    for changes in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
    ):
        found, log, *_ = first_update(tmp_path, student, wide_teacher, rows, tokenizer, **changes)
        assert_same_gradients(found, expected)
        for name in ("loss", "kd", "hidden"):
            assert log[name] == pytest.approx(whole[name], rel=1e-5), (changes, name)


def test_teacher_with_a_prompt_of_its_own_is_compared_on_the_completion(
    tmp_path, tokenizer, rows, student, wide_teacher
):
    own = [[7 + i] * (3 * i) for i in range(len(rows))]
    views = [
        {"input_ids": prompt + row["input_ids"], "labels": [-100] * len(prompt) + row["labels"]}
        for prompt, row in zip(own, rows, strict=True)
    ]
    dataset = Dataset.from_list(
        [{**row, **{f"teacher_{k}": v for k, v in view.items()}} for row, view in zip(rows, views, strict=True)]
    )
    for hidden_layers in ("uniform", "cka"):
        found, log, projector, trainer = first_update(
            tmp_path, student, wide_teacher, dataset, tokenizer, hidden_layers=hidden_layers
        )
        with torch.no_grad():
            alike = cka_mapping(inner_states(student, rows), inner_states(wide_teacher, views))
        expected = alike if hidden_layers == "cka" else UNIFORM
        for layer, weights in trainer.hidden_layers.mapping.items():
            assert weights == pytest.approx(expected[layer], rel=1e-5)
        loss = by_hand(student, rows, [(wide_teacher, 1.0)], views=views)
        loss = loss + hidden_by_hand(student, wide_teacher, rows, expected, projector=projector, views=views)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(found, gradients_by_hand(loss, student, projector))


def test_inner_layers_of_the_students_own_base(tmp_path, tokenizer, rows, student):
    base = copy.deepcopy(student)
    student = nonzero_adapters(get_peft_model(student, lora()))
    found, log, projector, _ = first_update(tmp_path, student, "base", rows, tokenizer)
    assert projector is None
    hidden = hidden_by_hand(student, base, rows, {0: {0: 1.0}, 1: {1: 1.0}})
    loss = by_hand(student, rows, [(base, 1.0)]) + hidden
    assert log["hidden"] == pytest.approx(hidden.item(), rel=1e-5)
    assert_same_gradients(found, gradients_by_hand(loss, student))


def test_weight_zero_is_the_trainer_without_the_term(tmp_path, tokenizer, rows, student, wide_teacher):
    expected, plain = gradients_of(tmp_path, student, wide_teacher, rows, tokenizer)
    found, log, projector, trainer = first_update(tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=0.0)
    assert projector is None
    assert trainer.hidden_layers is None
    assert "hidden" not in log
    assert log["loss"] == plain["loss"]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_within_two_percent_of_float32(tmp_path, tokenizer, rows, student, wide_teacher, autocast):
    """Under autocast, and of a student whose weights are bfloat16."""
    options = {"kd_weight": 0.0, "hidden_loss": "normalized_mse"}
    _, exact, *_ = first_update(tmp_path, student, wide_teacher, rows, tokenizer, **options)
    student = student if autocast else student.bfloat16()
    found, log, projector, _ = first_update(tmp_path, student, wide_teacher, rows, tokenizer, bf16=autocast, **options)
    assert log["hidden"] == pytest.approx(exact["hidden"], rel=2e-2)
    assert log["hidden"] != exact["hidden"]
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.float32}


def test_evaluation_is_the_mean_over_tokens_whatever_the_batch_size(tmp_path, tokenizer, rows, student, wide_teacher):
    held_out = rows.select(range(5))
    trainer = make_trainer(
        tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=2.0, trainer_settings={"eval_dataset": held_out}
    )
    projector = trainer.projectors[PROJECTOR]
    hidden = hidden_by_hand(student, wide_teacher, held_out, UNIFORM, projector=projector).item()
    loss = by_hand(student, held_out, [(wide_teacher, 1.0)]).item() + 2 * hidden
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        assert metrics["eval_hidden"] == pytest.approx(hidden, rel=1e-5)
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the projector


def test_projector_has_a_learning_rate_of_its_own_and_is_trained(tmp_path, tokenizer, rows, student, wide_teacher):
    capture = Gradients()
    trainer = make_trainer(
        tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=1.0, learning_rate=0.1,
        projector_learning_rate=0.7, weight_decay=0.0, trainer_settings={"callbacks": [capture]},
    )  # fmt: skip

    def parameters():
        own = trainer.projectors.named_parameters(prefix="projectors")
        return {name: p.detach().clone() for name, p in [*student.named_parameters(), *own]}

    before = parameters()
    trainer.train()
    after = parameters()
    assert capture.first.keys() == after.keys()
    for name, gradient in capture.first.items():
        rate = 0.7 if "projectors" in name else 0.1
        torch.testing.assert_close(after[name], before[name] - rate * gradient, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(after[name], before[name]) for name in after if "projectors" in name)
    everything = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(after)


@pytest.mark.parametrize("with_lora", [False, True])
def test_checkpoints_hold_the_student_and_the_projector_beside_it(
    tmp_path, tokenizer, rows, student, wide_teacher, with_lora
):
    names = set(student.state_dict())
    trainer = make_trainer(
        tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=1.0, max_steps=2, save_strategy="steps",
        save_steps=1, trainer_settings={"peft_config": lora() if with_lora else None},
    )  # fmt: skip
    states = []
    trainer.add_callback(At(2, lambda: states.append(copy.deepcopy(trainer.projectors[PROJECTOR].state_dict()))))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    states += [trainer.projectors[PROJECTOR].state_dict()] * 2
    for folder, state in zip(("checkpoint-1", "checkpoint-2", "final"), states, strict=True):
        weights = load_file(tmp_path / folder / ("adapter_model.safetensors" if with_lora else "model.safetensors"))
        assert all("lora_" in name for name in weights) if with_lora else set(weights) == names
        saved = load_projector(tmp_path / folder, PROJECTOR)
        assert saved.settings == {"student_width": 32, "teacher_width": 48, "num_layers": 2}
        assert saved.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in saved.state_dict().items())
        assert not list((tmp_path / folder).glob("*projector*.*"))
    assert any(not torch.equal(value, states[0][name]) for name, value in states[1].items())
    assert not any("projectors" in name for name in trainer.model.state_dict())


def run(folder, tokenizer, rows, teacher, seed, **changes):
    """Weights of student and projector, losses and folder of the best model of a run with dropout."""
    student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    trainer = make_trainer(
        folder, student, teacher, rows, tokenizer, hidden_weight=1.0, optim="adamw_torch", learning_rate=1e-2,
        max_steps=4, lr_scheduler_type="cosine", per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=2, max_grad_norm=1.0, **changes,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    losses = [log[name] for log in logs for name in ("loss", "hidden", "grad_norm")]
    return student.state_dict() | trainer.projectors.state_dict(prefix="projectors."), losses


@pytest.mark.parametrize("layers", ["uniform", "cka"])
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, tokenizer, rows, wide_teacher, layers):
    whole, losses = run(tmp_path / "whole", tokenizer, rows, wide_teacher, seed=2, hidden_layers=layers)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, own_losses = run(
        tmp_path / "resumed", tokenizer, rows, wide_teacher, seed=9, resume_from_checkpoint=str(checkpoint),
        hidden_layers=layers,
    )  # fmt: skip
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert own_losses == losses
    other = {"hidden_layers": [[0, 0], [1, 2]], "resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(ValueError, match=r"learns from other layers .* than this one \(0 <- 0 \(100%\); 1 <- 2"):
        run(tmp_path / "other", tokenizer, rows, wide_teacher, seed=2, **other)
    without = make_trainer(tmp_path / "none", make_model("gpt2", seed=2), wide_teacher, rows, tokenizer)
    with pytest.raises(ValueError, match=r"has a hidden_projector.json: it is of a run with a projector"):
        without.train(resume_from_checkpoint=str(checkpoint))
    Path(checkpoint / "projectors" / f"{PROJECTOR}.json").unlink()
    (checkpoint / MARK).write_text("[]")  # as a run without a projector leaves it
    with pytest.raises(ValueError, match=r"has no hidden_projector.safetensors and hidden_projector.json"):
        run(tmp_path / "third", tokenizer, rows, wide_teacher, seed=2, resume_from_checkpoint=str(checkpoint))


def test_best_student_comes_back_with_its_own_projector(tmp_path, tokenizer, rows, student, wide_teacher):
    trainer = make_trainer(
        tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=1.0, max_steps=3, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="eval_loss", learning_rate=0.02, trainer_settings={"eval_dataset": rows.select([0, 1])},
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-3")
    saved = load_projector(best, PROJECTOR).state_dict()
    assert all(torch.equal(p, saved[name]) for name, p in trainer.projectors[PROJECTOR].state_dict().items())


def test_keys_and_values_and_hidden_states_have_a_projector_each(tmp_path, tokenizer, rows, student, wide_teacher):
    args = KVProjectionConfig(**settings(tmp_path, hidden_weight=1.0, projector="mlp", projector_dropout=0.0))
    trainer = KVProjectionTrainer(
        student, wide_teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer
    )
    assert set(trainer.projectors) == {PROJECTOR, "projector"}
    before = copy.deepcopy(trainer.projectors)
    expected = hidden_by_hand(student, wide_teacher, rows, UNIFORM, projector=before[PROJECTOR]).item()
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert trainer.state.log_history[0]["hidden"] == pytest.approx(expected, rel=1e-5)
    for name in before:
        saved = load_projector(tmp_path, name).state_dict()
        assert any(not torch.equal(value, saved[key]) for key, value in before[name].state_dict().items())


def test_model_card_says_what_was_compared(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, hidden_weight=0.25, hidden_loss="cosine")
    assert trainer.describe()["hidden states"] == "cosine, weight 0.25, layers 0 <- 1 (100%); 1 <- 2 (100%)"


# ------------------------------------------------------------------------------------------------------------ bad input

REFUSED = [
    ("the student has 2 layers, there is no layer 2", {"hidden_layers": [[2, 0]]}),
    ("the teacher has 3 layers, there is no layer -4", {"hidden_layers": "[[0, -4]]"}),
    ("layers have to be pairs", {"hidden_layers": [[0, 1, 2]]}),
    ("layers have to be pairs", {"hidden_layers": [0, 1]}),
    ("layers have to be one pair", {"hidden_layers": []}),
    ("hidden_layers has to be JSON", {"hidden_layers": "[[0, 1"}),
    ("hidden_layers has to be one of uniform, last, cka or pairs", {"hidden_layers": "first"}),
    ("hidden_loss has to be one of mse, cosine, normalized_mse, got 'l1'", {"hidden_loss": "l1"}),
    ("hidden_weight has to be at least 0 and finite, got -1", {"hidden_weight": -1.0}),
    ("hidden_weight has to be at least 0 and finite, got nan", {"hidden_weight": math.nan}),
    ("hidden_weight has to be at least 0 and finite, got inf", {"hidden_weight": math.inf}),
    ("projector_learning_rate has to be above 0 and finite, got 0", {"projector_learning_rate": 0.0}),
    ("hidden_weight has to be a number, got 'high'", {"hidden_weight": "high"}),
]


@pytest.mark.parametrize(("message", "changes"), REFUSED)
def test_bad_settings_are_refused_at_construction_in_words(
    tmp_path, tokenizer, rows, student, teacher, message, changes
):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, **{"hidden_weight": 1.0, **changes})


def test_settings_that_are_not_used_are_told(tmp_path, tokenizer, rows, student, teacher, caplog):
    make_trainer(tmp_path, student, teacher, rows, tokenizer, hidden_loss="cosine")
    assert "hidden_loss is not used: hidden_weight is 0" in caplog.text


SMALL = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
OTHERWISE = {
    "mamba": {"state_size": 4},  # counts without the embeddings
    "gemma3n_text": {  # several vectors per token
        "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384,
    },
}  # fmt: skip


def from_config(family, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **sizes})).eval()


@pytest.mark.parametrize("family", sorted(OTHERWISE))
@pytest.mark.parametrize("hidden_layers", ["last", "cka"])
def test_layers_whose_output_is_not_the_hidden_states_are_refused(
    tmp_path, tokenizer, rows, student, family, hidden_layers
):
    odd, options = from_config(family, **OTHERWISE[family]), {"hidden_weight": 1.0, "hidden_layers": [[0, 0]]}
    with pytest.raises(ValueError, match=r"layer 0 of the student \(\w+\) is not the hidden states"):
        make_trainer(tmp_path, odd, copy.deepcopy(student), rows, tokenizer, **options)
    options["hidden_layers"] = hidden_layers if hidden_layers == "cka" else [[0, 0]]
    with pytest.raises(ValueError, match=r"layer 0 of the teacher \(\w+\) is not the hidden states"):
        make_trainer(tmp_path, student, odd, rows, tokenizer, **options)


def test_a_projector_has_the_width_of_the_layers_and_not_of_the_configuration(tmp_path, tokenizer, rows, teacher):
    """This OPT's hidden states have 32 numbers, and 16 after its last layer."""
    student = from_config("opt", ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=256, dropout=0.0)
    with pytest.raises(ValueError, match=r"the student's mapped layers have hidden states of widths \[16, 32\]"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, hidden_weight=1.0)
    options = {"hidden_layers": [[-1, 1]], "kd_weight": 1.0}
    found, log, projector, _ = first_update(tmp_path, student, teacher, rows, tokenizer, **options)
    assert projector is not None
    hidden = hidden_by_hand(student, teacher, rows, {1: {1: 1.0}}, projector=projector)
    assert log["hidden"] == pytest.approx(hidden.item(), rel=1e-5)
    loss = by_hand(student, rows, [(teacher, 1.0)], kd_weight=1.0) + hidden
    assert_same_gradients(found, gradients_by_hand(loss, student, projector))


def test_numbers_of_any_kind_are_taken(tmp_path):
    args = KDConfig(**settings(tmp_path, kd_weight=np.float32(0.5), temperature="2", teacher_weights=[np.int64(1), 3]))
    assert (args.kd_weight, args.temperature, args.teacher_weights) == (0.5, 2.0, [1.0, 3])


def test_layers_of_a_teacher_that_is_loaded_otherwise_are_those_it_has(tmp_path, tokenizer, rows, student, teacher):
    teacher.save_pretrained(tmp_path / "hub" / "inner")
    options = {"teacher_model_init_kwargs": {"subfolder": "inner", "num_hidden_layers": 2}, "hidden_weight": 1.0}
    with pytest.raises(ValueError, match="the teacher has 2 layers, there is no layer 2"):
        make_trainer(tmp_path, student, str(tmp_path / "hub"), rows, tokenizer, hidden_layers=[[0, 2]], **options)
    trainer = make_trainer(tmp_path, student, str(tmp_path / "hub"), rows, tokenizer, hidden_layers=[[0, 1]], **options)
    assert trainer.teacher.layers == (1,)


def test_other_refusals(tmp_path, tokenizer, rows, student, teacher, wide_teacher):
    for combination in ("mixture", "sum", "route"):
        dataset = rows.add_column("teacher_index", [0] * len(rows))
        with pytest.raises(ValueError, match=r"hidden_weight needs one teacher.*set it to 0"):
            make_trainer(
                tmp_path, student, [teacher, wide_teacher], dataset, tokenizer, hidden_weight=1.0,
                teacher_combination=combination,
            )  # fmt: skip
    own = {"optimizers": (torch.optim.SGD(student.parameters(), lr=0.1), None)}
    with pytest.raises(ValueError, match=r"hidden sizes 32 and 48, and the projector .* leave optimizers out"):
        make_trainer(tmp_path, student, wide_teacher, rows, tokenizer, hidden_weight=1.0, trainer_settings=own)
    # Where there is no projector, any optimizer will do.
    make_trainer(tmp_path, student, teacher, rows, tokenizer, hidden_weight=1.0, trainer_settings=own).train()
    for changes in ({"hidden_weight": 1.0}, {"schedule": {"hidden_weight": [1, 0]}}):
        with pytest.raises(ValueError, match="hidden_weight is not possible with rollouts"):
            SpeculativeKDConfig(**settings(tmp_path, max_length=None, **changes))


def test_teacher_of_another_trainer_is_asked_for_no_more_than_is_used(tmp_path, tokenizer, rows, student, teacher):
    """Inner layers cost memory: a teacher that gives none keeps none."""
    args = KDConfig(**settings(tmp_path))
    trainer = KDTrainer(student, teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer)
    assert trainer.teacher.layers == ()
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, hidden_weight=1.0, hidden_layers="last")
    assert trainer.teacher.layers == (2,)
