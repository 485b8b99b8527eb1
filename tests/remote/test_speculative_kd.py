"""SpeculativeKDTrainer with a teacher at an address, against the same update with it in this process, or by hand."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_distill import SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.teachers import TeacherAway
from tests.conftest import SENTENCES, make_model
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

EVERYTHING = {"speculative": 0.4, "student": 0.2, "teacher": 0.2, "dataset": 0.2}
ENTRIES = 60  # as many as top_k
SEED_OF_ALL_SOURCES = 0  # eight rows of this mix have each source at least once


@pytest.fixture(scope="module")
def rows():
    words = [sentence.split() for sentence in SENTENCES]
    pairs = {"prompt": [" ".join(w[: 2 + i % 3]) for i, w in enumerate(words)]}
    return Dataset.from_dict(pairs | {"completion": [" " + " ".join(w[2 + i % 3 :]) for i, w in enumerate(words)]})


@pytest.fixture(scope="module")
def privileged(rows):
    return rows.map(lambda row: {"teacher_prompt": f"{SENTENCES[0]} {row['prompt']}"})


@pytest.fixture
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture
def stub(teacher, tokenizer):
    with Stub(ServedModel(teacher, tokenizer), max_logprobs=-1) as stub:
        yield stub


class Watch(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rows.append(copy.deepcopy(self.trainer.last_rows))


def make(folder, teacher, dataset, tokenizer, student=None, *, callbacks=(), eval_dataset=None, **changes):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1,
        "save_strategy": "no", "max_new_tokens": 10, "top_k": 60, "teacher_temperature": 0.0, **changes,
    }  # fmt: skip
    if isinstance(teacher, str):
        settings = {"teacher_logprobs": ENTRIES, "teacher_timeout": 90.0, **settings}
    else:
        settings.pop("teacher_logprobs", None)
    watch = Watch()
    watch.trainer = SpeculativeKDTrainer(
        student or make_model("llama", seed=2), teacher, SpeculativeKDConfig(**settings), dataset, eval_dataset,
        tokenizer, teacher_processing_class=tokenizer, callbacks=[watch, *callbacks],
    )  # fmt: skip
    return watch.trainer, watch


def log_of(trainer):
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


# ---------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("data", [pytest.param("rows", marks=pytest.mark.slow), "privileged"])
def test_five_updates_with_the_whole_vocabulary_are_those_with_a_local_teacher(
    tmp_path, tokenizer, stub, teacher, data, request
):
    data, found = request.getfixturevalue(data), []
    for given in (stub.url, teacher):
        trainer, watch = make(
            tmp_path, given, data, tokenizer, max_steps=5, draft_length=4, adaptive=True, rollout_mix=EVERYTHING,
            kd_weight=0.8, temperature=2.0, teacher_logprobs=-1, eval_dataset=data.select(range(3)),
            eval_strategy="steps", eval_steps=5,
        )  # fmt: skip
        trainer.train()
        found.append((trainer, watch))
    (remote, written), (local, expected) = found
    assert [[r.completion_ids for r in update] for update in written.rows] == [
        [r.completion_ids for r in update] for update in expected.rows
    ]
    assert {row.source for update in written.rows for row in update} == EVERYTHING.keys()
    for name, value in local.model.state_dict().items():
        assert torch.allclose(remote.model.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    for own, log in zip(remote.state.log_history, local.state.log_history, strict=True):
        for name in log.keys() & {"loss", "kd", "ce", "agreement", "eval_kd", "rollout/acceptance_rate"}:
            assert own[name] == pytest.approx(log[name], rel=1e-4), name


def test_update_with_the_most_likely_tokens_is_the_one_by_hand(tmp_path, tokenizer, privileged, stub, teacher):
    plain = make_model("llama", seed=2)
    trainer, watch = make(
        tmp_path, stub.url, privileged, tokenizer, rollout_mix=EVERYTHING, divergence="reverse_kl",
        teacher_logprobs=ENTRIES, seed=SEED_OF_ALL_SOURCES,
    )  # fmt: skip
    trainer.train()
    total, count = 0.0, 0
    for row in watch.rows[0]:
        completion = torch.tensor(row.completion_ids)
        log_probs = []
        for model, prompt in ((plain, row.student_prompt_ids), (teacher, row.teacher_prompt_ids)):
            text = torch.tensor([prompt + row.completion_ids])
            log_probs.append(model(input_ids=text).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1))
        student_log_probs, teacher_log_probs = log_probs
        ids = teacher_log_probs.topk(ENTRIES).indices
        known = [side.gather(-1, ids).exp() for side in (student_log_probs, teacher_log_probs)]
        student, told = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], -1) for side in known)
        total = total + (student * (student / told).log()).sum()
        count += len(completion)
    assert {row.source for row in watch.rows[0]} == EVERYTHING.keys()
    assert log_of(trainer)["loss"] == pytest.approx(float(total) / count, rel=1e-4)
    (total / count).backward()
    for name, parameter in plain.named_parameters():
        moved = (parameter - 0.1 * parameter.grad).detach()
        assert torch.allclose(dict(trainer.model.named_parameters())[name].detach(), moved, atol=1e-5), name


# ---------------------------------------------------------------------------------- costs, and what they are told by


def test_drafts_go_to_the_end_and_costs_are_logged(tmp_path, tokenizer, rows, stub, caplog):
    caplog.set_level("INFO", "hf_distill")
    trainer, watch = make(tmp_path, stub.url, rows, tokenizer)
    assert "drafts go on to the end of the text" in caplog.text
    asked, sent = stub.counts["requests"], len(stub.prompts())
    trainer.train()
    log = log_of(trainer)
    texts = [row for row in stub.prompts()[sent:] if row != tuple(trainer.teacher.server.watched.text)]
    written = sum(len(row.completion_ids) for row in watch.rows[0])
    rejections = sum(not drafted for row in watch.rows[0] for drafted in row.drafted)
    ends = sum(not row.drafted[-1] for row in watch.rows[0])
    assert len(texts) == len(watch.rows[0]) + rejections - ends
    assert rejections > 0
    assert log["rollout/positions_per_token"] * written >= sum(map(len, texts))
    assert log["teacher/requests"] == stub.counts["requests"] - asked
    assert log["teacher/positions"] > 0
    assert log["teacher/seconds"] > 0
    assert "draft 10" in trainer.describe()["speculation"]


@pytest.mark.slow
def test_value_of_privilege_is_measured_where_it_is_asked_for(tmp_path, tokenizer, privileged, stub, teacher, caplog):
    caplog.set_level("INFO", "hf_distill")
    values = {}
    for entries, asked in ((-1, None), (-1, True), (ENTRIES, True)):
        trainer, _ = make(tmp_path, stub.url, privileged, tokenizer, value_of_privilege=asked, teacher_logprobs=entries)
        assert ("value_of_privilege=True asks" in caplog.text) == (asked is None)
        caplog.clear()
        trainer.train()
        values[entries, asked] = log_of(trainer).get("rollout/value_of_privilege")
    local, _ = make(tmp_path, teacher, privileged, tokenizer, draft_length=10)
    local.train()
    assert values[-1, None] is None
    assert values[-1, True] == pytest.approx(log_of(local)["rollout/value_of_privilege"], rel=1e-3)
    assert 0 < values[ENTRIES, True] <= values[-1, True] + 1e-6


# ---------------------------------------------------------------------------------- refusals and outages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 61}, r"top_k=61 needs .* vllm serve t --max-logprobs 61"),
        ({"min_prob": 0.1, "teacher_temperature": 0.7}, r"min_prob=0.1 is a probability at teacher_temperature=0.7"),
        ({"max_new_tokens": 250}, r"do not fit the teacher's 255 positions"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:9],
)
def test_what_a_server_cannot_do_is_refused_at_construction(tmp_path, tokenizer, rows, stub, changes, message):
    student = make_model("llama", seed=2, max_position_embeddings=512)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, stub.url, rows, tokenizer, student, **changes)


def test_the_student_and_the_data_set_need_no_rule(tmp_path, tokenizer, rows, stub):
    """Nothing is rejected there, so few entries are enough."""
    trainer, watch = make(
        tmp_path,
        stub.url,
        rows,
        tokenizer,
        rollout_mix={"student": 0.5, "dataset": 0.5},
        teacher_logprobs=4,
        max_steps=2,
    )
    trainer.train()
    assert {row.source for update in watch.rows for row in update} == {"student", "dataset"}


class Outage(TrainerCallback):
    """Kills the server after an update."""

    def __init__(self, stub, after):
        self.stub, self.after = stub, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.stub.kill()


def test_an_outage_ends_in_a_checkpoint_that_the_run_goes_on_from(tmp_path, tokenizer, rows, stub):
    settings = {"max_steps": 4, "rollout_mix": EVERYTHING, "teacher_timeout": 6.0, "optim": "adamw_torch"}
    whole, expected = make(tmp_path / "whole", stub.url, rows, tokenizer, **settings)
    whole.train()
    trainer, _ = make(tmp_path / "run", stub.url, rows, tokenizer, callbacks=[Outage(stub, after=2)], **settings)
    with pytest.raises(TeacherAway, match=r"update 2 is finished and saved"):
        trainer.train()
    stub.restart()
    trainer, watch = make(tmp_path / "run", stub.url, rows, tokenizer, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert [[r.completion_ids for r in update] for update in watch.rows] == [
        [r.completion_ids for r in update] for update in expected.rows[2:]
    ]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
