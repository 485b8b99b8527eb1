"""KVProjectionTrainer against the same update computed by hand from the caches and hooks of plain models.

Shapes: B batch, T tokens, N label-bearing positions, F width of the keys.
"""

import copy
import itertools
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TrainerCallback

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig
from hf_distill.kv_projector import load_projector
from hf_distill.layer_mapping import linear_cka
from hf_distill.losses.feature import centered_cosine, effective_rank
from hf_distill.modeling import cache_keyword
from hf_distill.trainers.checkpoints import MARK
from hf_distill.trainers.hard_label_config import checkpointing
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE
from tests.trainers.test_kd_teachers import by_hand as kd_by_hand

VOCAB = 384
(CHECKPOINTING,) = checkpointing(True)
DIAGNOSTICS = ("kv/centered_cosine", "kv/cka", "kv/magnitude_ratio", "kv/target_effective_rank")


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1,
        "save_strategy": "no", "projector": "mlp", "projector_dropout": 0.0, **changes,
    }  # fmt: skip


def mapping_of(trainer):
    return next(iter(trainer.sources.values())).mapping


def projector_of(trainer):
    return trainer.projectors["projector"]


def make_trainer(folder, student, teacher, dataset, tokenizer, *, others=None, **changes):
    return KVProjectionTrainer(
        student, teacher, KVProjectionConfig(**settings(folder, **changes)), train_dataset=dataset,
        processing_class=tokenizer, teacher_processing_class=tokenizer, **(others or {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged tokenised rows; the first tokens of each are prompt, without a label."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    labels[5][9] = labels[6][12] = -100  # and holes
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3, num_key_value_heads=4)


@pytest.fixture
def student():
    return make_model("llama", seed=2)


class Gradients(TrainerCallback):
    """The gradients that the optimizer is about to use, the projector's too, of every update."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class At(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def first_update(folder, student, teacher, dataset, tokenizer, **changes):
    """Gradients and log of the first update of a copy of the student, and its projector before it."""
    capture = Gradients()
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, dataset, tokenizer, others={"callbacks": [capture]}, **changes
    )
    projector = copy.deepcopy(projector_of(trainer))
    trainer.train()
    return capture.updates[0], trainer.state.log_history[0], projector, trainer


def padded_batch(dataset):
    length = max(len(row["input_ids"]) for row in dataset)

    def pad(name, value):
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in dataset])

    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in dataset]
    return {"input_ids": pad("input_ids", 0), "attention_mask": torch.tensor(mask)}, pad("labels", -100)


def keys_and_values(model, batch, chosen, kv_positions):
    """Keys and values (N, F) of each layer: from the model's own cache, keys before rotation from hooks."""
    before, hooks = {}, []
    for name, module in model.named_modules():
        if kv_positions == "pre" and name.endswith(("k_proj", "k_norm")):
            index = int(name.split("layers.")[1].split(".")[0])
            hooks.append(
                module.register_forward_hook(
                    lambda module, args, output, index=index: before.update({index: output.flatten(2)})
                )
            )
    cache = DynamicCache()
    logits = model(**batch, **{cache_keyword(model): cache}, use_cache=True).logits
    for hook in hooks:
        hook.remove()
    found = []
    for i, layer in enumerate(cache.layers):
        keys = before.get(i, layer.keys.transpose(1, 2).flatten(2))
        found.append((keys[chosen], layer.values.transpose(1, 2).flatten(2)[chosen]))
    return logits[chosen], found


def by_hand(student, teacher, projector, dataset, mapping, kv_positions="pre", kv_weight=1.0, kd_weight=0.5, dw=1.0,
            mw=0.01, views=None):  # fmt: skip
    """The loss of an update and what is logged of the keys and values, in float64, from plain models.

    `views` is the dataset as the teacher reads it.
    """
    batch, labels = padded_batch(dataset)
    chosen = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    following = labels[:, 1:][labels[:, 1:] != -100]
    student_logits, student_kv = keys_and_values(student, batch, chosen, kv_positions)
    view, view_labels = padded_batch(views or dataset)
    chosen = nn.functional.pad(view_labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        teacher_logits, teacher_kv = keys_and_values(teacher, view, chosen, kv_positions)
    kd = ORACLE["forward_kl"](teacher_logits.double().softmax(-1), student_logits.double().softmax(-1)).mean()
    ce = nn.functional.cross_entropy(student_logits.double(), following)
    terms, logs = [], {name: [] for name in DIAGNOSTICS}
    cosines = {}
    for index, (layer, weights) in enumerate(mapping.items()):
        raw = [sum(weight * teacher_kv[i][kind] for i, weight in weights.items()) for kind in range(2)]
        for ours, target, plain in zip(student_kv[layer], projector(*raw, index), raw, strict=True):
            s, t = ours.double(), target.double()
            cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
            terms.append((dw * (1 - cosine) + mw * (s.norm(dim=-1) / t.norm(dim=-1)).log().square()).mean())
            cosines.setdefault(layer, []).append(cosine.mean().item())
            with torch.no_grad():
                values = (
                    centered_cosine(s, t),
                    linear_cka(s, plain.double()),
                    s.norm(dim=-1).mean() / t.norm(dim=-1).mean(),
                    effective_rank(t),
                )
            for name, value in zip(DIAGNOSTICS, values, strict=True):
                logs[name].append(value.item())
    loss = kd_weight * kd + (1 - kd_weight) * ce + kv_weight * torch.stack(terms).mean()
    logs = {name: sum(values) / len(values) for name, values in logs.items()}
    logs |= {f"kv/cosine_layer_{layer}": sum(values) / len(values) for layer, values in cosines.items()}
    logs["kv/cosine"] = sum(logs[f"kv/cosine_layer_{layer}"] for layer in cosines) / len(cosines)
    return loss, {"kd": kd.item(), "ce": ce.item(), **logs}


def assert_same_gradients(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= rtol * max(gradient.norm(), 1e-3 * norm), name


def gradients_by_hand(loss, student, projector):
    """Of the student, and of the projector where the trainer keeps it."""
    student.zero_grad()
    projector.zero_grad()
    loss.backward()
    inside = "base_model.model.projectors.projector." if hasattr(student, "peft_config") else "projectors.projector."
    named = [*student.named_parameters(), *((inside + n, p) for n, p in projector.named_parameters())]
    return {name: p.grad for name, p in named if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------- the update


CASES = {
    "uniform": ({}, {0: {1: 1.0}, 1: {2: 1.0}}),
    "after the rotation": ({"kv_positions": "post"}, {0: {1: 1.0}, 1: {2: 1.0}}),
    "last": ({"kv_layers": "last", "kv_weight": 3.0, "kd_weight": 1.0}, {1: {2: 1.0}}),
    "pairs": (
        {"kv_layers": "[[0, 0], [1, -1], [1, 0]]", "kv_positions": "post", "kd_weight": 0.0},
        {0: {0: 1.0}, 1: {2: 0.5, 0: 0.5}},
    ),
    "weights": ({"direction_weight": 0.5, "magnitude_weight": 2.0, "kv_weight": 0.3}, {0: {1: 1.0}, 1: {2: 1.0}}),
}


@pytest.mark.parametrize("case", CASES)
def test_first_update_is_the_one_by_hand(tmp_path, tokenizer, rows, student, teacher, case):
    options, mapping = CASES[case]
    found, log, projector, trainer = first_update(tmp_path, student, teacher, rows, tokenizer, **options)
    assert mapping_of(trainer) == mapping
    names = {"direction_weight": "dw", "magnitude_weight": "mw"}
    options = {names.get(name, name): value for name, value in options.items() if name != "kv_layers"}
    loss, means = by_hand(student, teacher, projector, rows, mapping, **options)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in means.items():
        assert log[name] == pytest.approx(value, rel=1e-4), name
    assert_same_gradients(found, gradients_by_hand(loss, student, projector))
    assert any("projectors" in name for name in found)


FAMILY_PAIRS = [("gpt2", "llama"), ("llama", "gpt2"), ("qwen3", "gemma2"), ("phi", "qwen2"), ("gemma3_text", "mistral")]


@pytest.mark.parametrize(("family", "teacher_family"), FAMILY_PAIRS)
def test_families_with_other_heads_learn_from_each_other(tmp_path, tokenizer, rows, family, teacher_family):
    student = make_model(family, seed=2)
    sizes = {"n_head": 2, "n_layer": 3} if teacher_family == "gpt2" else {"num_key_value_heads": 1, "hidden_size": 48}
    teacher = make_model(teacher_family, seed=1, **sizes)
    options = {"kv_positions": "post"}
    found, log, projector, trainer = first_update(tmp_path, student, teacher, rows, tokenizer, **options)
    assert projector.settings["teacher_width"] != projector.settings["student_width"]
    loss, means = by_hand(student, teacher, projector, rows, mapping_of(trainer), **options)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["kv/cosine"] == pytest.approx(means["kv/cosine"], rel=1e-4)
    assert_same_gradients(found, gradients_by_hand(loss, student, projector), rtol=2e-5)


@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_do_not_depend_on_how_a_batch_is_split(tmp_path, tokenizer, rows, student, teacher, with_lora):
    if with_lora:
        student = with_adapters(student)
    expected, whole, projector, trainer = first_update(tmp_path, student, teacher, rows, tokenizer)
    loss, _ = by_hand(student, teacher, projector, rows, mapping_of(trainer))
    assert_same_gradients(expected, gradients_by_hand(loss, student, projector))
    for size, steps in ((4, 2), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        found, log, *_ = first_update(tmp_path, student, teacher, rows, tokenizer, **split)
        assert_same_gradients(found, expected)
        for name in ("loss", "kd", "ce", "kv/cosine", "kv/cosine_layer_0", "kv/cosine_layer_1"):
            assert log[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kv_positions", ["pre", "post"])
def test_packing_and_gradient_checkpointing_change_no_gradient(
    tmp_path, tokenizer, rows, student, teacher, kv_positions
):
    options = {"kv_positions": kv_positions}
    expected, plain, *_ = first_update(tmp_path, student, teacher, rows, tokenizer, **options)
    for changes in (
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
    ):
        found, log, *_ = first_update(tmp_path, student, teacher, rows, tokenizer, **options, **changes)
        assert_same_gradients(found, expected)
        assert log["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert log["kv/cosine"] == pytest.approx(plain["kv/cosine"], rel=1e-4, abs=1e-7)


def with_adapters(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_gradient_checkpointing_with_adapters(tmp_path, tokenizer, rows, student, teacher):
    student = with_adapters(student)
    expected, *_ = first_update(tmp_path, student, teacher, rows, tokenizer)
    found, *_ = first_update(tmp_path, student, teacher, rows, tokenizer, gradient_checkpointing=True)
    assert_same_gradients(found, expected)


def test_weight_zero_is_kdtrainer(tmp_path, tokenizer, rows, student, teacher):
    capture = Gradients()
    args = {k: v for k, v in settings(tmp_path).items() if not k.startswith("projector")}
    trainer = KDTrainer(
        copy.deepcopy(student), teacher, KDConfig(**args), rows, processing_class=tokenizer,
        teacher_processing_class=tokenizer, callbacks=[capture],
    )  # fmt: skip
    trainer.train()
    found, log, *_ = first_update(tmp_path, student, teacher, rows, tokenizer, kv_weight=0.0)
    projector = {name: gradient for name, gradient in found.items() if "projectors" in name}
    assert projector
    assert all((gradient == 0).all() for gradient in projector.values())
    assert_same_gradients({n: g for n, g in found.items() if n not in projector}, capture.updates[0], rtol=1e-6)
    assert log["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("kv_loss", ["mse", "normalized_l1"])
def test_other_distances(tmp_path, tokenizer, rows, student, teacher, kv_loss):
    _, log, projector, trainer = first_update(
        tmp_path, student, teacher, rows, tokenizer, kv_loss=kv_loss, kd_weight=0.0
    )
    batch, labels = padded_batch(rows)
    chosen = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    ours, theirs = (keys_and_values(model, batch, chosen, "pre")[1] for model in (student, teacher))
    terms = []
    for index, (layer, weights) in enumerate(mapping_of(trainer).items()):
        for s, t in zip(ours[layer], projector(*theirs[next(iter(weights))], index), strict=True):
            s, t = s.double(), t.double()
            terms.append(
                ((s - t) ** 2).mean()
                if kv_loss == "mse"
                else ((s - t).abs() / t.std(-1, correction=0, keepdim=True)).mean()
            )
    assert log["loss"] == pytest.approx(log["ce"] + (sum(terms) / len(terms)).item(), rel=1e-5)


def test_cka_weighs_the_layers_that_are_most_alike(tmp_path, tokenizer, rows, teacher):
    """A student that is the teacher: each layer is most like itself."""
    student = copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, kv_layers="cka")
    assert list(mapping_of(trainer)) == [0, 1, 2]
    for layer, weights in mapping_of(trainer).items():
        assert len(weights) == 2
        assert sum(weights.values()) == pytest.approx(1)
        assert max(weights, key=weights.get) == layer
    trainer.train()
    assert trainer.state.log_history[0]["kv/cka"] > 0.9


# ------------------------------------------------------------------------------------------------------- the projector


def test_projector_has_a_learning_rate_of_its_own_and_is_trained(tmp_path, tokenizer, rows, student, teacher):
    capture = Gradients()
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"callbacks": [capture]}, projector_learning_rate=0.7,
        learning_rate=0.1, weight_decay=0.0,
    )  # fmt: skip
    before = {f"projectors.projector.{name}": p.clone() for name, p in projector_of(trainer).named_parameters()}
    before |= {name: p.clone() for name, p in student.named_parameters()}
    trainer.train()
    after = {f"projectors.projector.{name}": p for name, p in projector_of(trainer).named_parameters()}
    after |= dict(student.named_parameters())
    for name, gradient in capture.updates[0].items():
        step = (0.7 if "projectors" in name else 0.1) * gradient
        torch.testing.assert_close(after[name], before[name] - step, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(after[name], before[name]) for name in after if "projectors" in name)
    groups = trainer.optimizer.param_groups
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(after)


@pytest.mark.parametrize("with_lora", [False, True])
def test_checkpoints_hold_the_student_and_the_projector_beside_it(
    tmp_path, tokenizer, rows, student, teacher, with_lora
):
    names = set(student.state_dict())
    peft_config = LoraConfig(r=2, target_modules=["k_proj"]) if with_lora else None
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"peft_config": peft_config}, max_steps=2,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    states = []
    trainer.add_callback(At(2, lambda: states.append(copy.deepcopy(projector_of(trainer).state_dict()))))
    trainer.train()
    states.append(projector_of(trainer).state_dict())
    trainer.save_model(str(tmp_path / "final"))
    states.append(states[1])
    for folder, state in zip(("checkpoint-1", "checkpoint-2", "final"), states, strict=True):
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert not any("projector." in name for name in files)  # servers read every file of weights
        weights = load_file(tmp_path / folder / ("adapter_model.safetensors" if with_lora else "model.safetensors"))
        assert weights
        assert not any("projectors" in name for name in weights)
        if with_lora:
            assert all("lora_" in name for name in weights)
        else:
            assert set(weights) == names
            config = json.loads((tmp_path / folder / "config.json").read_text())
            assert config["model_type"] == "llama"
            assert AutoModelForCausalLM.from_pretrained(tmp_path / folder) is not None
        saved = load_projector(tmp_path / folder).state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in saved.items())
    assert not hasattr(trainer.student, "projectors")
    assert not any("projectors" in name for name in trainer.model.state_dict())


@pytest.mark.parametrize(("projector", "layers"), [("mlp", "uniform"), ("pca", "uniform"), ("pca", "cka")])
def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, tokenizer, rows, teacher, projector, layers):
    def run(folder, seed, **kwargs):
        student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        trainer = make_trainer(
            folder, student, teacher, rows, tokenizer, optim="adamw_torch", learning_rate=1e-2, max_steps=4,
            lr_scheduler_type="cosine", per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_strategy="steps", save_steps=2, max_grad_norm=1.0, projector_dropout=0.3, projector=projector,
            kv_layers=layers,
        )  # fmt: skip
        trainer.train(**kwargs)
        logs = [{k: v for k, v in log.items() if "time" not in k} for log in trainer.state.log_history if "loss" in log]
        return student.state_dict() | projector_of(trainer).state_dict(prefix="projector."), logs

    whole, whole_logs = run(tmp_path / "whole", seed=2)
    resumed, logs = run(tmp_path / "resumed", seed=9, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    names = [name for name in whole_logs[0] if name.startswith("kv/")]
    for name in ("loss", "kd", "ce", "grad_norm", *names):
        assert [log[name] for log in logs] == [log[name] for log in whole_logs], name


def test_resuming_from_another_trainers_checkpoint_is_refused_in_words(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    (tmp_path / "checkpoint-1" / "projectors" / "projector.json").unlink()
    (tmp_path / "checkpoint-1" / MARK).write_text("[]")  # as a run without a projector leaves it
    trainer = make_trainer(tmp_path, make_model(seed=2), teacher, rows, tokenizer, max_steps=2)
    with pytest.raises(
        ValueError, match=r"has no projector.safetensors and projector.json: it is not of a run with this projector"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not hasattr(trainer.student, "projectors")


def test_best_student_comes_back_with_its_own_projector(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"eval_dataset": rows.select(range(3))}, max_steps=3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_kd", greater_is_better=True, learning_rate=0.02, projector_learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    saved, last = (load_projector(folder).state_dict() for folder in (best, tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, saved[name]) for name, value in projector_of(trainer).state_dict().items())
    if not best.endswith("-3"):
        assert any(not torch.equal(value, last[name]) for name, value in saved.items())
    weights = load_file(f"{best}/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_projector_stays_as_it_is_after_so_many_updates(tmp_path, tokenizer, rows, student, teacher, optim):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=4, projector_freeze_after=2, optim=optim,
        learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0,
    )  # fmt: skip
    states, students = [], []

    def keep():
        states.append(copy.deepcopy(projector_of(trainer).state_dict()))
        students.append(student.lm_head.weight.detach().clone())

    for step in (1, 2, 3, 4):
        trainer.add_callback(At(step, keep))
    trainer.train()
    keep()
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert same == [False, False, True, True]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(students))


def test_frozen_projector_does_not_shorten_the_students_steps(tmp_path, tokenizer, rows, student, teacher):
    """What is clipped to max_grad_norm is the gradient that the optimizer uses."""
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, projector_freeze_after=0, max_grad_norm=0.5, kv_weight=50.0,
        kv_loss="mse", learning_rate=1.0,
    )  # fmt: skip
    before = {name: p.clone() for name, p in student.named_parameters()}
    trainer.train()
    step = torch.cat([(p - before[name]).flatten() for name, p in student.named_parameters()]).norm()
    assert trainer.state.log_history[0]["grad_norm"] > 0.5
    assert step.item() == pytest.approx(0.5, rel=1e-4)


def test_principal_components_never_change(tmp_path, tokenizer, rows, student, teacher):
    weights = copy.deepcopy(student)
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, projector="pca", max_steps=2, learning_rate=1e-2,
        others={"eval_dataset": rows.select(range(3))}, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    before = copy.deepcopy(projector_of(trainer))
    trainer.train()
    after = projector_of(trainer).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    assert before.matrix.abs().sum() > 0
    loss, means = by_hand(weights, teacher, before, rows, mapping_of(trainer))
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["kv/cosine"] == pytest.approx(means["kv/cosine"], rel=1e-4)


def test_principal_components_are_fitted_to_the_students_own_keys_and_values(tmp_path, tokenizer, rows, teacher):
    """A teacher that is the student: its components, all of them, turn into the student's features."""
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, rows, tokenizer, projector="pca", kd_weight=1.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["kv/cosine"] == pytest.approx(1, abs=1e-3)
    assert log["kv/magnitude_ratio"] == pytest.approx(1, abs=1e-3)
    assert log["loss"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_whatever_stops_training_the_projector_is_saved_with_the_student(
    tmp_path, tokenizer, rows, student, teacher, error
):
    def stop():
        raise error

    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"callbacks": [At(3, stop)]}, max_steps=5
    )
    before = copy.deepcopy(projector_of(trainer).state_dict())
    with pytest.raises(type(error)):
        trainer.train()
    saved, state = load_projector(tmp_path / "emergency").state_dict(), projector_of(trainer).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())
    assert any(not torch.equal(value, before[name]) for name, value in saved.items())
    assert not any("projectors" in name for name in load_file(tmp_path / "emergency" / "model.safetensors"))
    assert not hasattr(trainer.student, "projectors")


def test_student_can_be_trained_again(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, learning_rate=1e-2)
    trainer.train()
    before = copy.deepcopy(projector_of(trainer).state_dict())
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in projector_of(trainer).state_dict().items())
    assert not hasattr(trainer.student, "projectors")


# ------------------------------------------------------------------------- several teachers, and prompts of their own


@pytest.fixture
def teachers(teacher):
    """Of different depths, widths of their keys and families."""
    return {"a": teacher, "b/2": make_model("gpt2", seed=3), "b_2": make_model("qwen3", seed=4, num_hidden_layers=4)}


OF_TEACHERS = {"kv_positions": "post", "projector_dropout": 0.0}
SHARES = (0.2, 0.3, 0.5)


def kv_of_teachers(student, teachers, trainer, rows):
    """The term of keys and values alone: the weighted mean of what it is with each teacher."""
    terms = [
        by_hand(student, teacher, source.projector, rows, source.mapping, kv_positions="post", kd_weight=0.0, **options)
        for teacher, source in zip(teachers.values(), trainer.sources.values(), strict=True)
        for options in ({}, {"kv_weight": 0.0})
    ]
    parts = [whole - without for (whole, _), (without, _) in zip(terms[::2], terms[1::2], strict=True)]
    return sum(share * part for share, part in zip(SHARES, parts, strict=True))


@pytest.mark.parametrize("combination", ["mixture", "sum"])
def test_each_teacher_has_its_projector_and_its_share(tmp_path, tokenizer, rows, student, teachers, combination):
    weights = copy.deepcopy(student)
    capture = Gradients()
    trainer = make_trainer(
        tmp_path, student, teachers, rows, tokenizer, others={"callbacks": [capture]}, teacher_weights=[2, 3, 5],
        teacher_combination=combination, per_device_train_batch_size=2, gradient_accumulation_steps=4, **OF_TEACHERS,
    )  # fmt: skip
    assert [len(source.mapping) for source in trainer.sources.values()] == [2, 2, 2]
    # Letters that no file name should have are replaced, and what would then be one name is not.
    assert list(trainer.projectors) == ["projector_a", "projector_b_2", "projector_b_2_2"]
    pairs = list(zip(teachers.values(), SHARES, strict=True))
    loss = kd_by_hand(weights, rows, [pairs] if combination == "mixture" else pairs)
    loss = loss + kv_of_teachers(weights, teachers, trainer, rows)
    loss.backward()
    named = [*weights.named_parameters(), *trainer.projectors.named_parameters(prefix="projectors")]
    expected = {name: p.grad.clone() for name, p in named if p.grad is not None}
    trainer.projectors.zero_grad()
    trainer.train()
    assert_same_gradients(capture.updates[0], expected, rtol=2e-5)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"kv/cosine", "kv/cosine_a_layer_0", "kv/cosine_b/2_layer_1", "kv/cosine_b_2_layer_1"} <= set(log)


@pytest.mark.parametrize("projector", ["mlp", "pca"])
def test_projectors_of_several_teachers_are_saved_and_resumed(tmp_path, tokenizer, rows, teachers, projector):
    def run(folder, seed, **kwargs):
        student = make_model("llama", seed=seed)
        trainer = make_trainer(
            folder, student, teachers, rows, tokenizer, projector=projector, kv_positions="post", max_steps=4,
            optim="adamw_torch", learning_rate=1e-2, per_device_train_batch_size=2, projector_dropout=0.3,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        trainer.train(**kwargs)
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return student.state_dict() | trainer.projectors.state_dict(prefix="projectors."), losses

    whole, losses = run(tmp_path / "whole", seed=2)
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2" / "projectors").iterdir()}
    names = ("projector_a", "projector_b_2", "projector_b_2_2")
    assert {f"{name}.{kind}" for name in names for kind in ("safetensors", "json")} <= files
    assert "projector.json" not in files
    resumed, own = run(tmp_path / "resumed", seed=9, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert own == losses
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_teacher_without_weight_has_no_keys_and_values(tmp_path, tokenizer, rows, student, teacher, teachers):
    weights = copy.deepcopy(student)
    trainer = make_trainer(tmp_path, student, teachers, rows, tokenizer, teacher_weights=[1, 0, 0], **OF_TEACHERS)
    assert list(trainer.projectors) == ["projector_a"]
    source = trainer.sources["a"]
    loss, _ = by_hand(weights, teacher, source.projector, rows, source.mapping, kv_positions="post")
    expected = loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_keys_and_values_of_the_students_own_base(tmp_path, tokenizer, rows, student):
    base = copy.deepcopy(student)
    student = with_adapters(student)
    for options in ({}, {"gradient_checkpointing": True}):
        found, log, projector, trainer = first_update(tmp_path, student, "base", rows, tokenizer, **options)
        loss, means = by_hand(student, base, projector, rows, mapping_of(trainer))
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log["kv/cosine"] == pytest.approx(means["kv/cosine"], rel=1e-4)
        assert_same_gradients(found, gradients_by_hand(loss, student, projector))


def test_rows_with_a_teacher_each_are_refused(tmp_path, tokenizer, rows, student, teachers):
    with pytest.raises(ValueError, match="gives each row one teacher, whose keys and values only that"):
        make_trainer(
            tmp_path, student, teachers, rows.add_column("teacher", ["a"] * len(rows)), tokenizer,
            teacher_combination="route",
        )  # fmt: skip


@pytest.mark.parametrize("kv_positions", ["pre", "post"])
def test_prompts_of_the_teachers_own_are_left_out_of_what_is_compared(
    tmp_path, tokenizer, rows, student, teacher, kv_positions
):
    """Longer ones, shorter ones and none: keys and values face each other on the completion."""
    prompted = [{"input_ids": row["input_ids"], "labels": [-100] * 4 + row["labels"][4:]} for row in rows]
    own = [[7 + i] * (5 * i) if i % 3 else prompted[i]["input_ids"][:4] for i in range(len(rows))]
    views = [
        {"input_ids": ids + row["input_ids"][4:], "labels": [-100] * len(ids) + row["labels"][4:]}
        for ids, row in zip(own, prompted, strict=True)
    ]
    texts = [tokenizer.decode(ids) if i % 3 else None for i, ids in enumerate(own)]
    dataset = Dataset.from_list([{**row, "teacher_prompt": t} for row, t in zip(prompted, texts, strict=True)])
    for size, steps in ((8, 1), (2, 4)):
        found, log, projector, trainer = first_update(
            tmp_path, student, teacher, dataset, tokenizer, kv_positions=kv_positions, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )  # fmt: skip
        assert [row["teacher_input_ids"] for row in trainer.train_dataset] == [view["input_ids"] for view in views]
        loss, means = by_hand(
            student, teacher, projector, prompted, mapping_of(trainer), kv_positions=kv_positions, views=views
        )
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log["kv/cosine"] == pytest.approx(means["kv/cosine"], rel=1e-4)
        assert_same_gradients(found, gradients_by_hand(loss, student, projector))
    evaluation = trainer.evaluate(dataset)
    loss, _ = by_hand(
        trainer.model, teacher, projector_of(trainer), prompted, mapping_of(trainer), kv_positions=kv_positions,
        views=views,
    )  # fmt: skip
    assert evaluation["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_principal_components_are_fitted_on_the_completion(tmp_path, tokenizer, rows, teacher):
    """A teacher that is the student, and reads the same: its components turn into the student's features."""
    prompted = [{"input_ids": row["input_ids"], "labels": [-100] * 4 + row["labels"][4:]} for row in rows]
    # The same texts, padded to another length by one row that only the teacher reads more of.
    other = [{**row, **{f"teacher_{name}": value for name, value in row.items()}} for row in prompted[1:]]
    extra = {
        "teacher_input_ids": [9] * 60 + prompted[0]["input_ids"],
        "teacher_labels": [-100] * 60 + prompted[0]["labels"],
    }
    dataset = Dataset.from_list([{**prompted[0], **extra}, *other])
    trainer = make_trainer(
        tmp_path, copy.deepcopy(teacher), teacher, dataset, tokenizer, projector="pca", kd_weight=1.0, kv_layers="cka"
    )
    assert all(max(weights, key=weights.get) == layer for layer, weights in mapping_of(trainer).items())
    assert trainer.evaluate(dataset.select(range(1, 8)))["eval_kv/cosine"] > 0.9


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_an_evaluation_are_those_by_hand(tmp_path, tokenizer, rows, student, teacher):
    held_out = rows.select(range(5))
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"eval_dataset": held_out}, per_device_eval_batch_size=8
    )
    metrics = trainer.evaluate()
    loss, means = by_hand(student, teacher, projector_of(trainer), held_out, mapping_of(trainer))
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in means.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    assert {"eval_kv/cosine", "eval_kv/cosine_layer_0", "eval_kv/cosine_layer_1"} <= set(metrics)
    assert {f"eval_{name}" for name in DIAGNOSTICS} <= set(metrics)


def test_metrics_are_in_the_logs_of_training_and_evaluation(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"eval_dataset": rows.select(range(3))}, max_steps=4,
        logging_steps=2, eval_strategy="steps", eval_steps=2, learning_rate=1e-3, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    names = ["kv/cosine", "kv/cosine_layer_0", "kv/cosine_layer_1", *DIAGNOSTICS]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == len(evaluations) == 2
    for log in logs:
        assert all(math.isfinite(log[name]) for name in names)
    for log in evaluations:
        assert all(math.isfinite(log[f"eval_{name}"]) for name in names)


def test_evaluation_has_no_dropout_whenever_it_is_called(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, others={"eval_dataset": rows.select(range(3))},
        projector_dropout=0.5, learning_rate=1e-3,
    )  # fmt: skip
    for _ in range(2):
        first, second = trainer.evaluate(), trainer.evaluate()
        for name in ("eval_loss", "eval_kv/cosine", "eval_kv/magnitude_ratio"):
            assert first[name] == second[name], name
        trainer.train()


def test_dropout_of_the_projector_is_on_in_training(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, projector_dropout=0.5, learning_rate=0.0,
        projector_learning_rate=1e-12, max_steps=3, others={"eval_dataset": rows}, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    cosines = [log["kv/cosine"] for log in trainer.state.log_history if "loss" in log]
    assert len({round(value, 6) for value in cosines}) == 3
    held_out = [log["eval_kv/cosine"] for log in trainer.state.log_history if "eval_loss" in log]
    assert max(held_out) - min(held_out) < 1e-6


def found(cosine, kd, cka, rank=10.0):
    return {"kv/cosine": cosine, "kd": kd, "kv/cka": cka, "kv/target_effective_rank": rank}


WARNINGS = {
    "the cosine rises and nothing is learnt": ([found(0.1, 2.0, 0.5), found(0.9, 2.0, 0.5)], True),
    "the cosine rises and the likeness is lost": ([found(0.1, 2.0, 0.5), found(0.9, 1.0, 0.2)], True),
    "the divergence rises": ([found(0.1, 2.0, 0.5), found(0.3, 2.5, 0.5)], True),
    "against the first, not the last": ([found(0.1, 2.0, 0.5), found(0.13, 2.0, 0.5), found(0.16, 2.0, 0.5)], True),
    "the target loses its directions": ([found(0.1, 2.0, 0.5), found(0.9, 1.0, 0.6, rank=6.0)], True),
    "both get better": ([found(0.1, 2.0, 0.5), found(0.9, 1.0, 0.6)], False),
    "the cosine stays": ([found(0.5, 2.0, 0.5), found(0.51, 2.0, 0.5)], False),
    "the cosine falls": ([found(0.5, 2.0, 0.5), found(0.1, 3.0, 0.1)], False),
    "only one evaluation": ([found(0.99, 9.0, 0.0)], False),
}


def test_a_weight_beside_which_nothing_counts_and_a_projector_that_nobody_watches_are_warned_of(
    tmp_path, tokenizer, rows, student, teacher, caplog
):
    for changes, words in {
        (("projector", "mlp"),): ["without an eval_dataset"],
        (("projector", "mlp"), ("kv_weight", 1000.0)): ["without an eval_dataset", "kv_weight=1000 leaves next to"],
        (("projector", "pca"), ("kv_weight", 1000.0)): [],
    }.items():
        caplog.clear()
        make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, tokenizer, **dict(changes))
        messages = [m for m in caplog.messages if "eval_dataset nobody" in m or "leaves next to nothing" in m]
        assert len(messages) == len(words)
        assert all(word in message for word, message in zip(words, messages, strict=True))


def test_collapse_is_warned_of_once_and_only_then(tmp_path, tokenizer, rows, student, teacher, caplog):
    fresh = make_trainer(tmp_path, student, teacher, rows, tokenizer, projector="mlp")
    for case, (evaluations, warns) in WARNINGS.items():
        trainer = copy.copy(fresh)
        trainer._first = {}
        caplog.clear()
        for evaluation in [*evaluations, evaluations[-1]]:
            trainer._warn_of_collapse(evaluation)
        messages = [message for message in caplog.messages if "cosine of keys and values rose" in message]
        assert len(messages) == warns, case
        assert all("projector='pca'" in m and "projector_freeze_after" in m for m in messages)


def test_two_held_out_sets_are_not_compared_with_each_other(tmp_path, tokenizer, rows, student, teacher, caplog):
    """Nothing is trained, so nothing has risen, however different the sets are."""
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    cosines, kd = [], []
    for row in range(len(rows)):
        trainer._first = {}
        metrics = trainer.evaluate(rows.select([row]))
        cosines.append(metrics["eval_kv/cosine"])
        kd.append(metrics["eval_kd"])
    pairs = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if kd[b] > kd[a]]
    low, high = max(pairs, key=lambda pair: cosines[pair[1]] - cosines[pair[0]])
    assert cosines[high] > cosines[low] + 0.05
    trainer._first, trainer._has_warned = {}, False
    caplog.clear()
    trainer.evaluate({"low": rows.select([low]), "high": rows.select([high])})
    assert "cosine of keys and values rose" not in caplog.text


def test_model_card_names_the_layers(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, kv_weight=0.25)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "mercator, weight 0.25, projector mlp" in card
    assert "0 <- 1" in card
    assert "1 <- 2" in card


# ------------------------------------------------------------------------------------------------------------ bad input


CONFIGS = [
    ("kv_loss has to be one of", {"kv_loss": "cosine"}),
    ("kv_positions has to be one of pre, post", {"kv_positions": "before"}),
    ("projector has to be one of mlp, pca", {"projector": "linear"}),
    ("kv_layers has to be one of uniform, last, cka", {"kv_layers": "first"}),
    ("kv_weight has to be at least 0 and finite, got -1", {"kv_weight": -1.0}),
    ("kv_weight has to be at least 0 and finite, got inf", {"kv_weight": math.inf}),
    ("direction_weight has to be at least 0", {"direction_weight": -0.1}),
    ("magnitude_weight has to be at least 0 and finite, got nan", {"magnitude_weight": math.nan}),
    ("projector_mlp_ratio has to be above 0", {"projector_mlp_ratio": 0.0}),
    (r"projector_dropout in \[0, 1\)", {"projector_dropout": 1.0}),
    ("projector_learning_rate has to be above 0 and finite, got 0", {"projector_learning_rate": 0.0}),
    ("projector_learning_rate has to be above 0.*nan", {"projector_learning_rate": math.nan}),
    ("projector_freeze_after has to be at least 0", {"projector_freeze_after": -1}),
    ("reentrant gradient checkpointing", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("reentrant gradient checkpointing", {f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}),
    ("the student has 2 layers, there is no layer 2", {"kv_layers": [[2, 0]]}),
    ("the teacher has 3 layers, there is no layer -4", {"kv_layers": "[[0, -4]]"}),
    ("layers have to be pairs", {"kv_layers": [[0, 1, 2]]}),
    ("kd_weight has to lie in", {"kd_weight": 2.0}),
    # What is no list of pairs.
    ("layers", {"kv_layers": []}),
    ("layers", {"kv_layers": [0, 1]}),
    ("kv_layers", {"kv_layers": "[[0, 1"}),
    ("layer", {"kv_layers": [[0.5, 1]]}),
]


@pytest.mark.parametrize(("message", "changes"), CONFIGS)
def test_bad_settings_are_refused_at_construction_in_words(
    tmp_path, tokenizer, rows, student, teacher, message, changes
):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, **changes)


def test_other_refusals(tmp_path, tokenizer, rows, student, teacher):
    with pytest.raises(ValueError, match="args has to be a KVProjectionConfig, got KDConfig"):
        KVProjectionTrainer(student, teacher, KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), rows)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers are not taken"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, others={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="teacher_model is missing"):
        make_trainer(tmp_path, student, None, rows, tokenizer)


def hybrid(family, **settings):
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_teacher_without_keys_and_values_is_refused_in_words(tmp_path, tokenizer, rows, student):
    with pytest.raises(ValueError, match=r"layer \d of the teacher \(MambaForCausalLM\) has no keys and values"):
        make_trainer(tmp_path, student, hybrid("mamba", state_size=4), rows, tokenizer)


def test_layers_of_a_hybrid_that_have_keys_and_values_can_be_chosen(tmp_path, tokenizer, rows, student):
    """As the refusal of the others says."""
    teacher = hybrid("lfm2", layer_types=["full_attention", "conv"])
    with pytest.raises(ValueError, match=r"layer 1 of the teacher .* choose other layers with kv_layers"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer)
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, kv_layers=[[1, 0]])
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["kv/cosine_layer_1"])


def test_teacher_that_cannot_embed_the_students_padding_token(tmp_path, rows, teacher):
    extended = make_tokenizer(added_tokens=("<extra>", "<mypad>"))
    extended.pad_token = "<mypad>"
    student = make_model("llama", seed=2, vocab_size=VOCAB + 2)
    assert teacher.get_input_embeddings().num_embeddings <= extended.pad_token_id
    trainer = KVProjectionTrainer(
        student, teacher, KVProjectionConfig(**settings(tmp_path)), rows, processing_class=extended,
        teacher_processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_mapped_layers_of_different_widths_are_refused(tmp_path, tokenizer, rows, student, teacher, monkeypatch):
    monkeypatch.setattr(
        "hf_distill.trainers.keys_values.kv_widths",
        lambda model, layers, name, positions: {layer: 16 + 16 * (layer == 0) for layer in layers},
    )
    with pytest.raises(ValueError, match="mapped layers have keys of widths"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, kv_layers=[[0, 0], [1, 1]])
