"""What really runs, in which order, and what the trainer says of it."""

import logging

import pytest
import torch
from accelerate.state import PartialState

from hf_distill import KDConfig
from hf_distill.trainers.checks import refuse_lost_processes
from tests.conftest import make_model
from tests.distributed.kd_runs import make_trainer


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, 1, make_model(seed=2), make_model(seed=1, hidden_size=48), disable_tqdm=False)


def test_a_run_is_described_once_before_it_starts_and_its_tokens_at_the_first_log(trainer, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        trainer.train()
    (described,) = [message for message in caplog.messages if message.startswith("processes: ")]
    assert described == (
        "processes: 1, engine: none, student: torch.float32, mixed precision no, cpu, "
        "teacher LlamaForCausalLM: torch.float32, cpu, rows per update: 8 (4 micro-batches)"
    )
    (tokens,) = [message for message in caplog.messages if "tokens per update" in message]
    assert tokens == f"about {trainer.state.log_history[0]['num_tokens']:,.0f} tokens per update"
    assert "processes: 1" not in capsys.readouterr().err


def test_who_has_not_turned_the_log_on_sees_it_on_the_console(trainer, caplog, capsys):
    with caplog.at_level(logging.WARNING, logger="hf_distill"):
        trainer.train()
    assert capsys.readouterr().err.replace("\n", " ").count("processes: 1, engine: none") == 1


def test_a_resumed_run_counts_its_own_tokens_and_a_fresh_one_is_warned_of_anothers_checkpoints(tmp_path, caplog):
    def run(**kwargs):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        trainer = make_trainer(tmp_path, 1, make_model(seed=2), make_model(seed=1), **options)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_distill"):
            trainer.train(**kwargs)
        return trainer.state.log_history[-2]["num_tokens"], [m for m in caplog.messages if "tokens per update" in m]

    run()
    assert "checkpoints of another run" not in caplog.text
    tokens, (told,) = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert told == f"about {tokens:,.0f} tokens per update"
    assert "checkpoints of another run" not in caplog.text
    run()
    assert "holds checkpoints of another run, up to checkpoint-3" in caplog.text


def test_offloaded_teacher_is_described(tmp_path):
    trainer = make_trainer(tmp_path, 1, make_model(seed=2), make_model(seed=1), teacher_device="offload")
    assert "the CPU's memory, layer by layer" in trainer.describe_run()["teacher LlamaForCausalLM"]
    trainer.train()


def test_accelerate_launch_that_starts_one_process_of_several_is_warned_of(tmp_path, monkeypatch, caplog):
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    refuse_lost_processes(args)
    assert "--cpu starts one process, whatever --num_processes says" in caplog.text
    assert PartialState().num_processes == 1


def test_nothing_touches_the_teachers_answer_before_the_students_backbone_is_launched(trainer):
    # A copy from the teacher's device would make the student's wait for it.
    events = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            events.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    def watched(*args):
        events.append("teacher")
        signal = teacher(*args)
        return signal._replace(hidden=signal.hidden.as_subclass(Watched))

    teacher, trainer.teacher = trainer.teacher, watched
    trainer.student.model.register_forward_hook(lambda *_: events.append("student"))
    trainer.train()
    assert events[:3] == ["teacher", "student", "to"]
