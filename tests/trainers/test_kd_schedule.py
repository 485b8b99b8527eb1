"""Settings that change over the training: their values, the updates that they make, and runs that are resumed.

A student that is not trained (learning rate 0) answers the same in every step: only the schedule changes its loss.
"""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import HfArgumentParser

from hf_distill import KDConfig, KVProjectionConfig, KVProjectionTrainer, SpeculativeKDConfig
from tests.conftest import SENTENCES, make_model
from tests.losses.oracle import alpha_beta, kl, taid
from tests.trainers.test_kd import make_trainer, settings
from tests.trainers.test_kd_teachers import answers


def config(**changes) -> KDConfig:
    return KDConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **changes})


# ---------------------------------------------------------------------------------------------------------- the values


def test_values_lie_on_straight_lines_between_evenly_spaced_ones():
    args = config(schedule={"kd_weight": [1, 0.5], "temperature": [4, 2, 1], "hidden_weight": [3]})
    for progress, kd_weight, temperature in (
        (0, 1, 4),
        (0.25, 0.875, 3),
        (0.5, 0.75, 2),
        (0.75, 0.625, 1.5),
        (1, 0.5, 1),
    ):
        assert args.scheduled("kd_weight", progress) == kd_weight
        assert args.scheduled("temperature", progress) == temperature
        assert args.scheduled("hidden_weight", progress) == 3
    for outside, inside in ((-1.0, 0.0), (1.5, 1.0)):
        assert args.scheduled("temperature", outside) == args.scheduled("temperature", inside)


def test_values_are_those_of_numpy_and_exact_where_they_are_given():
    torch.manual_seed(0)
    for number in range(1, 8):
        values = torch.rand(number, dtype=torch.float64).tolist()
        args = config(schedule={"kd_weight": values})
        places = np.linspace(0, 1, number) if number > 1 else np.zeros(1)
        for progress in np.linspace(0, 1, 23):
            expected = np.interp(progress, places, values)
            assert args.scheduled("kd_weight", progress) == pytest.approx(expected, rel=1e-12)
        assert args.scheduled("kd_weight", 0.0) == values[0]
        assert args.scheduled("kd_weight", 1.0) == values[-1]


def test_taid_rises_to_the_teacher_unless_it_is_told_otherwise():
    assert config(divergence="taid").schedule == {"t": [0.4, 1.0]}
    given = {"kd_weight": [1, 0]}
    assert config(divergence="taid", schedule=given).schedule == {"kd_weight": [1, 0], "t": [0.4, 1.0]}
    assert given == {"kd_weight": [1, 0]}
    assert config(divergence="taid", schedule={"t": [0, 1]}).schedule == {"t": [0, 1]}
    assert config(divergence="taid", divergence_params={"t": 0.3}).schedule is None
    assert config().schedule is None


# --------------------------------------------------------------------------------------------------------- the updates


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    ids = [tokenizer(text)["input_ids"][: 6 + 2 * i] for i, text in enumerate(SENTENCES)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})


@pytest.fixture
def student():
    return make_model("llama", seed=2)


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1, hidden_size=48)


def loss_by_hand(student, teacher, rows, divergence, *, kd_weight=0.5, temperature=1.0, **params) -> float:
    with torch.no_grad():
        ours, theirs = answers(student, rows), answers(teacher, rows)
        q, p = (ours / temperature).softmax(-1), (theirs / temperature).softmax(-1)
        kd = {"forward_kl": kl, "taid": taid, "alpha_beta": alpha_beta}[divergence](p, q, **params).mean()
        labels = torch.tensor([label for row in rows for label in row["labels"][1:]])
        ce = nn.functional.cross_entropy(ours, labels)
    return (kd_weight * temperature**2 * kd + (1 - kd_weight) * ce).item()


RUNS = {
    "kd_weight": ("forward_kl", {"kd_weight": [1.0, 0.2]}),
    "temperature": ("forward_kl", {"temperature": [4, 2, 1]}),
    "taid": ("taid", {"t": [0.2, 1.0]}),
    "all of it": (
        "alpha_beta", {"alpha": [0.2, 0.6], "beta": [0.9, 0.5], "kd_weight": [0.4, 0.8], "temperature": [1, 3]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("case", RUNS)
def test_each_update_has_its_values_and_each_evaluation_the_last(
    tmp_path, tokenizer, rows, student, teacher, case, size, steps
):
    divergence, schedule = RUNS[case]
    values = [
        {name: float(np.interp(place, np.linspace(0, 1, len(ends)), ends)) for name, ends in schedule.items()}
        for place in (0, 1 / 3, 2 / 3, 1)
    ]
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, divergence=divergence, schedule=schedule, learning_rate=0.0,
        max_steps=4, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=size,
        gradient_accumulation_steps=steps, trainer_settings={"eval_dataset": rows},
    )  # fmt: skip
    final = loss_by_hand(student, teacher, rows, divergence, **values[-1])
    evaluations = [trainer.evaluate()["eval_loss"]]
    trainer.train()
    evaluations.append(trainer.evaluate()["eval_loss"])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log, value in zip(logs, values, strict=True):
        expected = loss_by_hand(student, teacher, rows, divergence, **value)
        assert log["loss"] == pytest.approx(expected, rel=1e-5), log["step"]
        for name in schedule:
            assert log[f"schedule/{name}"] == pytest.approx(value[name])
    evaluations += [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations == pytest.approx([final] * len(evaluations), rel=1e-5)


def test_epochs_are_a_training_too(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, schedule={"kd_weight": [0.0, 1.0]}, learning_rate=0.0,
        max_steps=-1, num_train_epochs=2,
    )  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    expected = [loss_by_hand(student, teacher, rows, "forward_kl", kd_weight=weight) for weight in (0.0, 1.0)]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_weight_of_hidden_states_starts_at_zero_with_its_projector_there(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, schedule={"hidden_weight": [0, 2]}, learning_rate=0.0,
        projector_learning_rate=1e-12, max_steps=4, kd_weight=0.0, trainer_settings={"eval_dataset": rows},
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, weight in zip(logs, (0, 2 / 3, 4 / 3, 2), strict=True):
        assert log["loss"] == pytest.approx(log["ce"] + weight * log["hidden"], rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"] + 2 * metrics["eval_hidden"], rel=1e-5)


def test_weight_of_keys_and_values_changes(tmp_path, tokenizer, rows, student, teacher):
    args = settings(tmp_path, schedule={"kv_weight": [3, 1]}, learning_rate=0.0, max_steps=2, kd_weight=0.0)
    args |= {"direction_weight": 1.0, "magnitude_weight": 0.0}
    trainer = KVProjectionTrainer(
        student, teacher, KVProjectionConfig(**args), rows, eval_dataset=rows, processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, weight in zip(logs, (3, 1), strict=True):
        assert log["loss"] == pytest.approx(log["ce"] + weight * (1 - log["kv/cosine"]), rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"] + 1 - metrics["eval_kv/cosine"], rel=1e-5)


RUN = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 2}


def run(folder, tokenizer, rows, teacher, seed=2, **changes):
    """Weights and losses of a run with dropout."""
    student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    trainer = make_trainer(
        folder, student, teacher, rows, tokenizer, gradient_accumulation_steps=2, lr_scheduler_type="cosine",
        max_grad_norm=1.0, **RUN, **changes,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    names = ("loss", "kd", "ce", "grad_norm", "schedule/kd_weight", "schedule/temperature", "schedule/t")
    logs = [[log.get(name) for name in names] for log in trainer.state.log_history if "loss" in log]
    return student.state_dict(), logs


def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, tokenizer, rows, teacher):
    options = {"divergence": "taid", "schedule": {"kd_weight": [1, 0.3], "temperature": [3, 1, 2], "t": [0, 0.7, 1]}}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole, logs = run(tmp_path / "whole", tokenizer, rows, teacher, **options)
    resume = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-3")}
    resumed, own_logs = run(tmp_path / "resumed", tokenizer, rows, teacher, seed=9, **options, **resume)
    assert own_logs == logs
    assert None not in logs[0]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_schedule_that_stays_is_none_bit_for_bit(tmp_path, tokenizer, rows, teacher):
    constant = {"kd_weight": 0.3, "temperature": 1.7}
    params = {"divergence": "alpha_beta"}
    plain, logs = run(
        tmp_path, tokenizer, rows, teacher, **params, **constant, divergence_params={"alpha": 0.2, "beta": 0.7}
    )
    for number in (1, 3):
        schedule = {name: [value] * number for name, value in {**constant, "alpha": 0.2, "beta": 0.7}.items()}
        found, own_logs = run(tmp_path, tokenizer, rows, teacher, **params, schedule=schedule)
        assert [log[:4] for log in own_logs] == [log[:4] for log in logs]
        assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_model_card_names_the_schedule(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, schedule={"temperature": [4, 1]})
    assert trainer.describe()["temperature over the training"] == "[4, 1]"


# -------------------------------------------------------------------------------------------------------- the settings


SCHEDULE = {"kd_weight": [1, 0.5], "temperature": [4.0, 2.0, 1.0], "t": [0.2, 1]}


def test_schedule_comes_from_command_lines_and_files(tmp_path):
    words = ["--output_dir", "unused", "--use_cpu", "--bf16", "False", "--report_to", "none", "--divergence", "taid"]
    (parsed,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses([*words, "--schedule", json.dumps(SCHEDULE)])
    assert parsed.schedule == SCHEDULE
    values = {"output_dir": "unused", "use_cpu": True, "bf16": False, "divergence": "taid", "schedule": SCHEDULE}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (read,) = HfArgumentParser(KDConfig).parse_json_file(str(tmp_path / "config.json"))
    assert read.schedule == SCHEDULE
    assert dataclasses.replace(parsed, temperature=3.0).schedule == SCHEDULE
    assert json.loads(parsed.to_json_string())["schedule"] == SCHEDULE


REFUSED = {
    "an unknown name": ({"learning_rate": [1, 0]}, {}, r"'learning_rate': 1; it takes kd_weight, temperature, hidden"),
    "a parameter of another divergence": ({"beta": [0.1, 0.9]}, {}, "beta, but forward_kl has no parameters"),
    "a parameter out of range": ({"beta": [0.1, 1]}, {"divergence": "jensen_shannon"}, r"beta in \(0, 1\), got 1"),
    "t above 1": ({"t": [0, 1.5]}, {"divergence": "taid"}, r"taid needs t in \[0, 1\], got 1.5"),
    "a weight out of range": ({"kd_weight": [0.5, 1.1]}, {}, r"schedule\['kd_weight'\] has 1.1.*out of the range"),
    "a weight that is no number": ({"kd_weight": [0.5, float("nan")]}, {}, r"\['kd_weight'\] has nan"),
    "a temperature of 0": ({"temperature": [1, 0]}, {}, r"schedule\['temperature'\] has 0, which is out of the range"),
    "an infinite temperature": ({"temperature": [float("inf"), 1]}, {}, r"\['temperature'\] has inf"),
    "a negative weight": ({"hidden_weight": [-1, 1]}, {}, r"\['hidden_weight'\] has -1"),
    "a number": ({"kd_weight": 0.5}, {}, r"schedule\['kd_weight'\] has to be a list of numbers.*got 0.5"),
    "no values": ({"kd_weight": []}, {}, r"has to be a list of numbers, from first to last, got \[\]"),
    "words": ({"kd_weight": ["high", "low"]}, {}, "has to be a list of numbers"),
    "keys without quotes": ("{kd_weight: [1]}", {}, r"schedule has to be JSON, got '\{kd_weight: \[1\]\}'"),
    "a word": ("kd_weight", {}, "schedule has to be JSON such as .*, got 'kd_weight'"),
    "a list": ([1, 0], {}, r"schedule has to be JSON such as .*, got \[1, 0\]"),
    "a word with taid": ("t", {"divergence": "taid"}, "schedule has to be JSON such as .*, got 't'"),
    "a list with taid": ([0, 1], {"divergence": "taid"}, r"schedule has to be JSON such as .*, got \[0, 1\]"),
    "a term of another trainer": ({"kv_weight": [1, 0]}, {}, "'kv_weight': 1; it takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_schedule_is_refused_in_words(case):
    schedule, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(schedule=copy.deepcopy(schedule), **changes)


def test_rollouts_without_hard_labels_keep_the_whole_weight_for_the_teacher():
    options = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": []}
    with pytest.raises(ValueError, match=r"kd_weight=0.5 leaves 0.5 for hard labels"):
        SpeculativeKDConfig(**options, schedule={"kd_weight": [1, 0.5]})
    SpeculativeKDConfig(**options, schedule={"kd_weight": [1, 0.5]}, rollout_mix={"speculative": 1, "teacher": 1})
