"""Training with a teacher at an address: the updates of the same teacher in this process, and nothing lost."""

import copy
import json
import logging
import pickle
import threading
import time
from itertools import product

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from hf_distill import KDConfig, KDTrainer
from hf_distill.losses.sparse import TopKSignal
from hf_distill.servers import TeacherAway
from hf_distill.teachers.remote import RemoteTeacher
from tests.conftest import SENTENCES, make_model
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub


@pytest.fixture(scope="module")
def teacher():
    model = make_model(seed=1)
    model.lm_head.weight.data.mul_(8)
    return model


@pytest.fixture(scope="module")
def served(teacher, tiny):
    return ServedModel(teacher, tiny.tokenizer, name="t")


@pytest.fixture
def stub(served):
    with Stub(served, max_logprobs=-1) as stub:
        yield stub


ROWS = Dataset.from_dict({"text": SENTENCES * 2})


def make_trainer(folder, teacher, tokenizer, rows=ROWS, callbacks=(), **settings):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "max_length": 12, "dataloader_num_workers": 0, "teacher_timeout": 60,
    }  # fmt: skip
    args = KDConfig(**{**defaults, **settings})
    held_out = rows if settings.get("eval_strategy") or folder.name.startswith("eval") else None
    return KDTrainer(make_model(seed=2), teacher, args, rows, held_out, tokenizer, callbacks=list(callbacks))


def trained(folder, teacher, tokenizer, *, resume=None, **settings):
    trainer = make_trainer(folder, teacher, tokenizer, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.student.parameters()])


def worst(one, other):
    """The largest difference of a weight, relative to the largest weight."""
    return float((weights(one) - weights(other)).abs().max() / weights(other).abs().max())


PROMPTS = Dataset.from_dict({
    "prompt": [s.split()[0] for s in SENTENCES], "completion": [" " + " ".join(s.split()[1:]) for s in SENTENCES]
})  # fmt: skip
OWN_PROMPTS = PROMPTS.add_column("teacher_prompt", [f"once {s.split()[0]}" for s in SENTENCES])
VARIANTS = {
    "a temperature": {"temperature": 2.0, "kd_weight": 1.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "a schedule": {"schedule": {"temperature": [3, 1], "kd_weight": [1, 0.2]}},
    "packed": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "prompts of its own": {"rows": OWN_PROMPTS},
    "workers": {"dataloader_num_workers": None},
}


def quick(names, *chosen):
    """Values of a parameter; all but the chosen ones make a slow test."""
    marks = {False: pytest.mark.slow, True: ()}
    return [
        pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=marks[name in chosen]) for name in names
    ]


@pytest.mark.parametrize("variant", quick(VARIANTS, "a temperature", "workers"))
def test_the_whole_vocabulary_makes_the_updates_of_the_local_teacher(tmp_path, teacher, stub, tiny, variant):
    settings = VARIANTS[variant]
    local = trained(tmp_path / "local", copy.deepcopy(teacher), tiny.tokenizer, **settings)
    remote = trained(tmp_path / "remote", stub.url, tiny.tokenizer, teacher_logprobs=-1, **settings)
    assert worst(remote, local) < 1e-4
    kd = [[entry["kd"] for entry in each.state.log_history if "kd" in entry] for each in (local, remote)]
    assert kd[1] == pytest.approx(kd[0], rel=1e-4)


def test_a_stream_is_asked_about_as_it_comes(tmp_path, teacher, stub, tiny):
    def rows():
        return IterableDataset.from_generator(lambda: iter([{"text": s} for s in SENTENCES]))

    local = trained(tmp_path / "local", copy.deepcopy(teacher), tiny.tokenizer, rows=rows())
    remote = trained(tmp_path / "remote", stub.url, tiny.tokenizer, rows=rows(), teacher_logprobs=-1)
    assert worst(remote, local) < 1e-4


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_the_signal_is_the_top_of_the_teachers_own(tmp_path, teacher, served, tiny, dialect):
    with Stub(served, dialect=dialect) as stub:
        trainer = make_trainer(tmp_path, stub.url, tiny.tokenizer, teacher_logprobs=7)
        batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 16))
        _, positions, _ = trainer.take_labels(batch)
        signal = trainer.teacher(batch, positions)
    assert isinstance(signal, TopKSignal)
    with torch.no_grad():
        logits = teacher(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.flatten(0, 1)
    expected = logits[positions].log_softmax(-1).topk(7)
    torch.testing.assert_close(signal.log_probs, expected.values, atol=1e-5, rtol=0)
    assert (signal.ids == expected.indices).all()


def test_a_padded_head_has_its_probability_in_the_tail(tmp_path, tiny):
    padded = make_model(seed=1, vocab_size=400)
    padded.lm_head.weight.data.mul_(8)
    with Stub(ServedModel(padded, tiny.tokenizer, name="t"), max_logprobs=-1) as stub:
        remote = trained(tmp_path / "a", stub.url, tiny.tokenizer, teacher_logprobs=-1, temperature=2.0)
        some = make_trainer(tmp_path / "b", stub.url, tiny.tokenizer, teacher_logprobs=30)
        batch = some.batch_collator()(some.first_rows(some.train_dataset, 4))
        signal = some.teacher(batch, some.take_labels(batch)[1])
    assert signal.ids.max() < 384
    assert (signal.ids == -1).any()
    local = trained(tmp_path / "c", copy.deepcopy(padded), tiny.tokenizer, temperature=2.0)
    assert worst(remote, local) < 1e-4


def test_two_servers_are_one_teacher_and_a_sum_has_two(tmp_path, served, teacher, tiny):
    with Stub(served, max_logprobs=-1) as one, Stub(served, max_logprobs=-1) as two:
        trainer = trained(tmp_path / "a", [one.url, two.url], tiny.tokenizer, teacher_logprobs=-1)
        assert list(trainer.teachers) == ["t"]
        assert one.counts["positions"] > 0 < two.counts["positions"]
        alone = trained(tmp_path / "b", one.url, tiny.tokenizer, teacher_logprobs=-1)
        assert worst(trainer, alone) < 1e-6
        both = trained(
            tmp_path / "c", {"x": one.url, "y": copy.deepcopy(teacher)}, tiny.tokenizer, teacher_logprobs=-1,
            teacher_combination="sum",
        )  # fmt: skip
        assert worst(both, alone) < 1e-4


def test_what_was_asked_is_logged(tmp_path, stub, tiny):
    rows = ROWS.select(range(6))
    trainer = make_trainer(
        tmp_path, stub.url, tiny.tokenizer, rows, teacher_logprobs=5, max_steps=-1, num_train_epochs=1
    )
    stub.fail("status", status=503, times=3)
    before = stub.counts["positions"]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "teacher/requests" in entry]
    assert sum(entry["teacher/positions"] for entry in logs) == stub.counts["positions"] - before
    assert sum(entry["teacher/retries"] for entry in logs) == 3
    assert sum(entry["teacher/requests"] for entry in logs) == 3 + 3
    assert all(entry["teacher/megabytes"] > 0 < entry["teacher/seconds"] for entry in logs)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_asked_where_the_divergence_has_no_weight(tmp_path, teacher, stub, tiny, workers):
    settings = {"kd_weight": 0.0, "dataloader_num_workers": workers}
    trainer = make_trainer(tmp_path / "eval", stub.url, tiny.tokenizer, ROWS.select(range(8)), **settings)
    asked = dict(stub.counts)
    trainer.train()
    metrics = trainer.evaluate()
    assert stub.counts == asked
    local = make_trainer(
        tmp_path / "eval", copy.deepcopy(teacher), tiny.tokenizer, ROWS.select(range(8)), **settings
    )  # fmt: skip
    local.train()
    assert torch.equal(weights(trainer), weights(local))
    assert metrics["eval_loss"] == local.evaluate()["eval_loss"]


def test_a_schedule_that_begins_at_zero_asks_about_all_rows(tmp_path, stub, tiny):
    """Workers ask ahead of the updates, and do not know for which one."""
    trainer = make_trainer(tmp_path, stub.url, tiny.tokenizer, schedule={"kd_weight": [0, 1]}, max_steps=8)
    asked = stub.counts["requests"]
    trainer.train()
    assert stub.counts["requests"] - asked == 8  # an epoch of batches of two


def test_an_evaluation_asks_and_its_numbers_are_the_local_ones(tmp_path, teacher, stub, tiny):
    local = make_trainer(tmp_path / "eval_a", copy.deepcopy(teacher), tiny.tokenizer, ROWS.select(range(8))).evaluate()
    remote = make_trainer(tmp_path / "eval_b", stub.url, tiny.tokenizer, ROWS.select(range(8)), teacher_logprobs=-1)
    remote = remote.evaluate()
    for name in ("eval_loss", "eval_kd", "eval_ce", "eval_agreement"):
        assert remote[name] == pytest.approx(local[name], rel=1e-5), name


# ------------------------------------------------------------------------------------------------- a teacher that fails


class Restarting(TrainerCallback):
    """Ends the server before some updates, and starts it again a little later."""

    def __init__(self, stub, steps):
        self.stub, self.steps, self.timer = stub, steps, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            if self.timer is not None:
                self.timer.join()
            self.stub.kill()
            self.timer = threading.Timer(0.3, self.stub.restart)
            self.timer.start()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_restarts_changes_no_bit(tmp_path, stub, tiny, workers):
    settings = {"teacher_logprobs": 9, "max_steps": 22, "dataloader_num_workers": workers}
    whole = trained(tmp_path / "a", stub.url, tiny.tokenizer, **settings)
    restarting = Restarting(stub, range(1, 21))
    broken = trained(tmp_path / "b", stub.url, tiny.tokenizer, callbacks=[restarting], **settings)
    restarting.timer.join()
    assert torch.equal(weights(broken), weights(whole))


class Dying(TrainerCallback):
    """Ends the server, or lets it fail, when some updates are finished."""

    def __init__(self, stub, step, *fault, **settings):
        self.stub, self.step, self.fault, self.settings = stub, step, fault, settings

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.fault:
                self.stub.fail(*self.fault, times=None, **self.settings)
            else:
                self.stub.kill()


FAILURES = {
    "killed": ((), {}, "has not answered for"),
    "busy": (("status",), {"status": 503}, "HTTP 503"),
    "locked": (("status",), {"status": 401}, "HTTP 401"),
    "NaN": (("value",), {"value": "nan"}, "nan is no log-probability"),
}


@pytest.mark.parametrize(
    ("failure", "workers"),
    quick(list(product(FAILURES, (0, 2))), ("killed", 2), ("NaN", 0), ("busy", 0)),
)
def test_a_server_that_is_gone_stops_the_run_and_nothing_is_lost(tmp_path, stub, tiny, failure, workers):
    fault, settings, message = FAILURES[failure]
    options = {"teacher_logprobs": 9, "max_steps": 14, "dataloader_num_workers": workers, "teacher_timeout": 1.5}
    whole = trained(tmp_path / "whole", stub.url, tiny.tokenizer, **options)
    dying = Dying(stub, 3, *fault, **settings)
    start = time.monotonic()
    with pytest.raises(TeacherAway, match=message) as error:
        trained(tmp_path / "run", stub.url, tiny.tokenizer, callbacks=[dying], **options)
    assert time.monotonic() - start < 30
    (step,) = [int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert f"update {step} is finished and saved" in str(error.value)
    assert not (tmp_path / "run" / "emergency").exists()
    stub.heal()
    if failure == "killed":
        stub.restart()
    stub.requests.clear()
    resumed = trained(tmp_path / "run", stub.url, tiny.tokenizer, resume=True, **options)
    assert torch.equal(weights(resumed), weights(whole))
    asked = [len(seen.body["prompt"]) for seen in stub.requests if seen.path == "/v1/completions"]
    trained_on = [number for number in asked if number == 3]  # two rows and the watched text
    ahead = 2 + 2 * workers  # batches that are asked for before they are used
    assert 14 - step <= len(trained_on) <= 14 - step + ahead


def test_a_server_that_is_gone_in_an_evaluation_stops_the_run_whole(tmp_path, stub, tiny):
    class AtEvaluation(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                stub.fail("status", status=503, times=None)

    options = {
        "teacher_logprobs": 9, "teacher_timeout": 1.5, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4
    }  # fmt: skip
    with pytest.raises(TeacherAway, match="update 2 is finished and saved"):
        trained(tmp_path, stub.url, tiny.tokenizer, callbacks=[AtEvaluation()], **options)
    assert (tmp_path / "checkpoint-2").exists()
    stub.heal()
    resumed = trained(tmp_path, stub.url, tiny.tokenizer, resume=True, **options)
    assert resumed.state.global_step == 4


def test_a_server_that_is_gone_before_the_first_update_leaves_no_checkpoint(tmp_path, stub, tiny):
    trainer = make_trainer(tmp_path / "eval", stub.url, tiny.tokenizer, teacher_logprobs=9, teacher_timeout=1.5)
    stub.kill()
    with pytest.raises(TeacherAway, match="no update has been finished"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(TeacherAway) as error:
        trainer.evaluate()
    assert "update" not in str(error.value)


# ----------------------------------------------------------------------------------------------- rows, secrets, workers


def test_rows_that_are_too_long_are_named_or_dropped(tmp_path, served, tiny):
    short = copy.copy(served)
    short.max_model_len = 12
    rows = Dataset.from_dict({"text": ["a b", "one two three four five six seven eight nine ten", "c d e f"]})
    with Stub(short) as stub:
        with pytest.raises(ValueError, match=r"row 1 of the train dataset has \d+ tokens, and t reads 11 at most"):
            make_trainer(tmp_path, stub.url, tiny.tokenizer, rows=rows)
        trainer = make_trainer(tmp_path, stub.url, tiny.tokenizer, rows=rows, drop_long_rows=True)
        assert len(trainer.train_dataset) == 2


def test_large_answers_have_to_be_asked_for(tmp_path, stub, tiny, monkeypatch):
    monkeypatch.setattr("hf_distill.teachers.remote.ANSWER_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"teacher_logprobs=-1 asks for 384 .* or say the number, teacher_logprobs=384"
    ):
        make_trainer(tmp_path, stub.url, tiny.tokenizer, teacher_logprobs=-1)
    assert make_trainer(tmp_path, stub.url, tiny.tokenizer, teacher_logprobs=384).teacher.is_whole


def test_no_secret_is_written_anywhere(tmp_path, served, tiny, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TEACHER_KEY", "sk-secret-key")
    with Stub(served, api_key="sk-secret-key") as stub:
        url = stub.url.replace("http://", "http://me:sk-secret-password@")
        settings = {"teacher_key_variable": "TEACHER_KEY", "save_strategy": "steps", "save_steps": 2}
        trainer = trained(tmp_path, url.replace("me:sk-secret-password@", ""), tiny.tokenizer, **settings)
        trainer.save_model()
        trainer.create_model_card()
        assert b"sk-secret" not in pickle.dumps(trainer.teacher.collate)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"sk-secret" not in path.read_bytes(), path
    card = (tmp_path / "README.md").read_text()
    assert "from a server: vLLM" in card
    assert "127.0.0.1" not in card
    assert "sk-secret" not in caplog.text
    assert "sk-secret" not in json.dumps(trainer.state.log_history)


def test_workers_are_set_unless_the_user_chose(tmp_path, stub, tiny, caplog):
    chosen = make_trainer(tmp_path, stub.url, tiny.tokenizer, dataloader_num_workers=0)
    assert chosen.args.dataloader_num_workers == 0
    assert "each step waits for the answers of t" in caplog.text
    default = make_trainer(tmp_path, stub.url, tiny.tokenizer, dataloader_num_workers=None)
    assert (default.args.dataloader_num_workers, default.args.dataloader_persistent_workers) == (2, True)
    assert (
        make_trainer(tmp_path, make_model(), tiny.tokenizer, dataloader_num_workers=None).args.dataloader_num_workers
        == 0
    )


def test_hidden_layers_and_other_terms_are_refused_by_name(tmp_path, stub, tiny):
    with pytest.raises(
        ValueError, match=r"hidden_weight needs one teacher that is a model in this process.*t \(RemoteTeacher\)"
    ):
        make_trainer(tmp_path, stub.url, tiny.tokenizer, hidden_weight=0.5)


def test_a_teacher_of_your_own_may_be_away_too(tmp_path, tiny, stub):
    class Own(RemoteTeacher):
        @property
        def collate(self):
            return away

    args = make_trainer(tmp_path, stub.url, tiny.tokenizer).args
    with pytest.raises(TeacherAway, match="on holiday; no update has been finished"):
        trained(tmp_path, Own([stub.url], args, index=0), tiny.tokenizer)


def away(rows):
    raise TeacherAway("on holiday")
