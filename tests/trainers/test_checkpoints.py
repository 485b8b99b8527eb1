"""Runs that are killed, told to stop, or find the disk full: which checkpoint they leave, and where they go on."""

import errno
import gc
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill.trainers import checkpoints as module
from hf_distill.trainers.checkpoints import (
    MARK,
    find_checkpoint,
    noticing_sigterm,
    problem_of,
    replacing,
    rotate,
    settle_leftovers,
)
from tests.conftest import SENTENCES, make_model

STATE = "trainer_state.json"


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    ids = [tokenizer(text)["input_ids"][: 6 + 2 * i] for i, text in enumerate(SENTENCES)]
    return Dataset.from_dict({"input_ids": ids})


@pytest.fixture(scope="module")
def teacher():
    return make_model("gpt2", seed=1)


def make_trainer(folder, rows, tokenizer, teacher, callbacks=(), seed=2, **changes) -> KDTrainer:
    """A student with dropout, so that every lost random number shows; epochs of two updates."""
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 5, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    return KDTrainer(
        student, teacher, KDConfig(**settings | changes), rows, rows, tokenizer, teacher_processing_class=tokenizer,
        callbacks=list(callbacks),
    )  # fmt: skip


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


class At(TrainerCallback):
    """Does something in the middle of an update."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.action()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows, tokenizer, teacher) -> Path:
    """The output directory of a run of two updates, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, rows, tokenizer, teacher, max_steps=2).train()
    return folder


@pytest.fixture
def out(tmp_path, finished) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------- which are whole


NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE]


@pytest.mark.parametrize("marked", [True, False])
def test_what_the_trainer_writes_is_whole_with_the_mark_and_as_another_tools_without(out, marked):
    if not marked:
        (out / "checkpoint-2" / MARK).unlink()
    assert problem_of(out / "checkpoint-2") is None


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_checkpoint_without_a_file_or_with_half_of_it_is_passed_over_for_an_older_one(
    out, caplog, name, damage, marked
):
    if not marked:
        (out / "checkpoint-2" / MARK).unlink()
    file = out / "checkpoint-2" / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "cut" else 0)
    assert find_checkpoint(True, out) == str(out / "checkpoint-1")
    assert "checkpoint-2 has " in caplog.text
    assert "it is skipped" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-2 has .*for the newest whole one"):
        find_checkpoint(str(out / "checkpoint-2"), out)


def test_a_shard_that_the_index_names_has_to_be_there(out):
    checkpoint = out / "checkpoint-2"
    (checkpoint / MARK).unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert problem_of(checkpoint) == "has no model-00002-of-00002.safetensors"


def test_what_transformers_says_is_incomplete_is_not_whole(out):
    (out / "checkpoint-2" / MARK).unlink()
    (out / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()
    assert "half-written" in problem_of(out / "checkpoint-2")


def test_the_newest_checkpoint_is_that_of_the_largest_step_not_of_the_last_name(out):
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-10")
    (out / "checkpoint-best").mkdir()
    assert find_checkpoint(True, out) == str(out / "checkpoint-10")


def test_nothing_to_resume_from_is_told_in_words(tmp_path, out):
    with pytest.raises(ValueError, match=r"no checkpoint to resume from in .*: start without resuming"):
        find_checkpoint(True, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no checkpoint 'nowhere' to resume from"):
        find_checkpoint("nowhere", out)
    assert find_checkpoint(None, out) is find_checkpoint(False, out) is None


def test_resuming_starts_at_the_newest_whole_checkpoint(out, rows, tokenizer, teacher, finished):
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    trainer = make_trainer(out, rows, tokenizer, teacher, seed=9, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert_same(
        load_file(out / "checkpoint-2" / "model.safetensors"),
        load_file(finished / "checkpoint-2" / "model.safetensors"),
    )
    assert problem_of(out / "checkpoint-2") is None  # written anew, in the place of the broken one


def test_a_checkpoint_without_projector_is_passed_over_by_the_trainer_that_needs_one(
    tmp_path, rows, tokenizer, teacher
):
    def make(seed):
        args = KVProjectionConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_steps=1,
            save_strategy="steps", max_steps=2, gradient_checkpointing=False,
        )  # fmt: skip
        student = make_model("gpt2", seed=seed)
        return KVProjectionTrainer(student, teacher, args, rows, None, tokenizer, teacher_processing_class=tokenizer)

    make(2).train()
    expected = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for name in ("projectors/projector.json", "projectors/projector.safetensors", MARK):
        (tmp_path / "checkpoint-2" / name).unlink()
    assert problem_of(tmp_path / "checkpoint-2") is None  # whole, but KDTrainer's
    trainer, steps = make(9), []
    trainer.add_callback(At(2, lambda: steps.append(2)))
    trainer.train(resume_from_checkpoint=True)
    assert steps == [2]
    assert_same(load_file(tmp_path / "checkpoint-2" / "model.safetensors"), expected)


# -------------------------------------------------------------------------------------------------------------- writing


def dying_at(call: int, action) -> bool:
    """Whether a process that runs `action` dies; it does so right before its n-th look at the disk."""
    process = os.fork()
    if not process:
        left = [call]

        def watched(function):
            def countdown(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return countdown

        os.fsync, os.rename, os.unlink, os.rmdir = map(watched, (os.fsync, os.rename, os.unlink, os.rmdir))
        Path.write_text, Path.rename = watched(Path.write_text), watched(Path.rename)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_and_never_a_half(tmp_path, finished, replaces):
    def save(source: Path, final: Path):
        with replacing(final) as staged:
            shutil.copytree(source, staged, ignore=shutil.ignore_patterns(MARK))

    call, outcomes = 0, []
    while True:
        out = tmp_path / str(call)
        shutil.copytree(finished / "checkpoint-1", out / ("checkpoint-2" if replaces else "checkpoint-1"))
        died = dying_at(call, lambda out=out: save(finished / "checkpoint-2", out / "checkpoint-2"))
        settle_leftovers(out)
        steps = [json.loads((path / STATE).read_text())["global_step"] for path in module.checkpoints(out)]
        assert all(problem_of(path) is None for path in module.checkpoints(out))
        assert steps in ([[1], [2]] if replaces else [[1], [1, 2]])
        assert not list(out.glob("_tmp-*"))
        outcomes.append(steps[-1])
        call += 1
        if not died:
            break
    assert call > 10
    assert outcomes == sorted(outcomes)  # first the old, from some moment on the new
    assert set(outcomes) == {1, 2}


def test_a_disk_that_is_full_for_the_mark_alone_leaves_no_half_marked_folder(out, monkeypatch):
    def no_space(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    def save():
        with replacing(out / "checkpoint-3") as staged:
            shutil.copytree(out / "checkpoint-2", staged, ignore=shutil.ignore_patterns(MARK))
            monkeypatch.setattr(Path, "write_text", no_space)

    with pytest.raises(OSError, match=r"checkpoint-3 could not be saved: .*No space left"):
        save()
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}


def make_checkpoints(folder: Path, source: Path, steps) -> None:
    for i, step in enumerate(steps):
        shutil.copytree(source, folder / f"checkpoint-{step}")
        os.utime(folder / f"checkpoint-{step}", (1e9 + i, 1e9 + i))


def test_rotation_removes_the_oldest_whole_ones_and_keeps_the_named(tmp_path, finished):
    make_checkpoints(tmp_path, finished / "checkpoint-1", [900, 1, 2, 3, 4])  # 900 is of an earlier run
    rotate(tmp_path, 3, {tmp_path / "checkpoint-4", tmp_path / "checkpoint-1"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
    rotate(tmp_path, 1, {tmp_path / "checkpoint-4", tmp_path / "checkpoint-1"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-4"}
    for limit in (None, 0):
        rotate(tmp_path, limit, ())
    assert len(list(tmp_path.iterdir())) == 2


def test_half_written_checkpoints_neither_count_nor_go(tmp_path, finished):
    make_checkpoints(tmp_path, finished / "checkpoint-1", [1, 2, 3, 4])
    for step in (1, 4):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    rotate(tmp_path, 1, {tmp_path / "checkpoint-3"})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}


def test_a_kill_in_the_middle_of_a_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, finished):
    call, died = 0, True
    while died:
        out = tmp_path / str(call)
        make_checkpoints(out, finished / "checkpoint-1", [1, 2])
        died = dying_at(call, lambda out=out: rotate(out, 1, {out / "checkpoint-2"}))
        assert all(problem_of(path) is None for path in module.checkpoints(out))
        settle_leftovers(out)
        assert {path.name for path in out.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        call += 1
    assert call > len(list((finished / "checkpoint-1").iterdir()))


def test_the_best_checkpoint_is_known_by_its_place_and_survives_rotation(tmp_path, rows, tokenizer, teacher):
    trainer = make_trainer(
        tmp_path, rows, tokenizer, teacher, save_total_limit=1, max_steps=4, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="kd", greater_is_better=True, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    found = {log["step"]: log["eval_kd"] for log in trainer.state.log_history if "eval_kd" in log}
    best = tmp_path / f"checkpoint-{max(found, key=found.get)}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / STATE).read_text())["best_model_checkpoint"] == str(best)
    assert_same(weights(trainer) | load_file(best / "model.safetensors"), weights(trainer))
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {best.name}


def test_what_is_pushed_to_the_hub_is_in_its_place(tmp_path, rows, tokenizer, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, max_steps=2)
    trainer.args.push_to_hub = True
    pushed = []
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        SFTTrainer, "_push_from_checkpoint", lambda _, folder: pushed.append((folder, problem_of(Path(folder))))
    )
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]


# ------------------------------------------------------------------------------------------------------------ disk full


def test_a_full_disk_is_told_with_the_folder_and_leaves_the_older_checkpoint(
    tmp_path, rows, tokenizer, teacher, monkeypatch, caplog
):
    def fill():
        def no_space(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", no_space)

    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, [At(2, fill)], save_total_limit=1)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be saved: .*No space left.*MiB are free"):
        trainer.train()
    assert "the student is not saved: OSError('" in caplog.text  # one line; the error above is what is raised
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "checkpoint-1"}
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-1")
    with pytest.raises(OSError, match=r"final could not be saved: .*No space left.*MiB are free on that disk\)$"):
        trainer.save_model(str(tmp_path / "final"))


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_files_that_really_cannot_grow_stop_the_run_in_the_same_words(tmp_path, rows, tokenizer, teacher, limit):
    """The system refuses what is beyond half of the weights, or, of a file twice as large, the optimizer's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        size = (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * limit), before[1]))

    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, [At(2, fill)])
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be saved: "):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-1")
    # The student alone is half as large as its optimizer.
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "checkpoint-1"} | (
        {"emergency"} if limit > 1 else set()
    )
    if limit > 1:
        assert_same(weights(trainer) | load_file(tmp_path / "emergency" / "model.safetensors"), weights(trainer))


def test_a_failed_emergency_leaves_the_student_of_an_earlier_one(out):
    (out / "emergency").mkdir()
    (out / "emergency" / "model.safetensors").write_text("earlier")

    def save():
        with replacing(out / "emergency") as staged:
            staged.mkdir(parents=True)
            (staged / "model.safetensors").write_text("half")
            raise OSError("disk")

    with pytest.raises(OSError, match=r"emergency could not be saved: disk"):
        save()
    assert (out / "emergency" / "model.safetensors").read_text() == "earlier"
    assert not list(out.glob("_tmp-*"))


@pytest.mark.parametrize("error", [RuntimeError("of one process"), FloatingPointError("of all")])
def test_a_student_spread_over_processes_is_collected_only_when_all_have_stopped_at_the_same_place(
    tmp_path, rows, tokenizer, teacher, error
):
    """From anywhere else the others would be waited for in vain."""
    saved = []

    def fail():
        trainer.is_fsdp_enabled, trainer.save_model = True, lambda *_, **__: saved.append(1)
        raise error

    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, [At(2, fail)], save_strategy="no")
    with pytest.raises(type(error)):
        trainer.train()
    assert len(saved) == isinstance(error, FloatingPointError)


# -------------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, rows, tokenizer, teacher):
    """Weights after five updates, with an evaluation after each epoch, which draws random numbers."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), rows, tokenizer, teacher, eval_strategy="epoch")
    trainer.train()
    return weights(trainer)


@pytest.mark.parametrize(
    ("step", "save_strategy"), [(1, "no"), (2, "epoch"), (2, "steps"), (3, "epoch"), (5, "no")],
    ids=["first", "last of an epoch", "last of an epoch, saved", "in an epoch", "last"],
)  # fmt: skip
def test_sigterm_ends_the_run_with_a_checkpoint_and_the_resumed_run_is_bit_identical(
    tmp_path, rows, tokenizer, teacher, uninterrupted, caplog, step, save_strategy
):
    settings = {"eval_strategy": "epoch", "save_strategy": save_strategy, "save_total_limit": 1}
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, [At(step, terminate)], **settings)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert trainer.state.global_step == step
    assert f"saved in {tmp_path}/checkpoint-{step}. Resume it with trainer.train(resume_from" in caplog.text
    assert not (tmp_path / "emergency").exists()
    assert find_checkpoint(True, tmp_path) == str(tmp_path / f"checkpoint-{step}")

    resumed = make_trainer(tmp_path, rows, tokenizer, teacher, seed=9, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert_same(weights(resumed), uninterrupted)


@pytest.mark.parametrize("step", [2, 5])
def test_a_checkpoint_of_every_update_leads_to_the_same_weights(
    tmp_path, rows, tokenizer, teacher, uninterrupted, step
):
    """Of the last of an epoch, after which random numbers are drawn, and of the last of all, in an epoch's middle."""
    make_trainer(tmp_path, rows, tokenizer, teacher, eval_strategy="epoch").train()
    resumed = make_trainer(tmp_path, rows, tokenizer, teacher, seed=9, eval_strategy="epoch")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 5
    assert_same(weights(resumed), uninterrupted)


def test_sigterm_stops_a_run_that_saves_its_best_where_this_update_is_not(tmp_path, rows, tokenizer, teacher):
    falling = iter(range(9, 0, -1))
    trainer = make_trainer(
        tmp_path, rows, tokenizer, teacher, [At(3, terminate)], eval_strategy="steps", eval_steps=1,
        save_strategy="best", metric_for_best_model="value",
    )  # fmt: skip
    trainer.args.greater_is_better = True
    measure = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: measure(*args, **kwargs) | {"eval_value": float(next(falling))}
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 1
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-3")


def test_sigterm_for_all_processes_leaves_the_workers_that_bring_the_rows(tmp_path, rows, tokenizer, teacher):
    """As a scheduler sends it, from outside: torch's own workers would die of it, and the run with them."""
    many = Dataset.from_list(rows.to_list() * 20)
    alive = []

    def terminate_all():
        workers = multiprocessing.active_children()
        for process in (os.getpid(), *(worker.pid for worker in workers)):
            subprocess.run(["kill", "-TERM", str(process)], check=True)
        time.sleep(0.2)
        alive.extend(worker.is_alive() for worker in workers)

    trainer = make_trainer(
        tmp_path, many, tokenizer, teacher, [At(2, terminate_all)], dataloader_num_workers=2, eval_strategy="no"
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert alive == [True, True]
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    del trainer  # and with it the workers
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("ends", ["train", "train with an evaluation", "evaluate"])
def test_workers_that_are_kept_end_with_what_they_were_kept_for(tmp_path, rows, tokenizer, teacher, ends):
    """Left to the garbage collector, each holds up a later run for 5 seconds."""
    seen = []
    trainer = make_trainer(
        tmp_path, rows, tokenizer, teacher, [At(2, lambda: seen.extend(multiprocessing.active_children()))],
        dataloader_num_workers=2, dataloader_persistent_workers=True, save_strategy="no",
        eval_strategy="steps" if ends == "train with an evaluation" else "no", eval_steps=1,
    )  # fmt: skip
    trainer.evaluate() if ends == "evaluate" else trainer.train()
    assert not multiprocessing.active_children()
    assert len(seen) == {"train": 2, "train with an evaluation": 4, "evaluate": 0}[ends]
    assert trainer.evaluate()["eval_loss"] > 0  # with new ones


def test_a_trainer_that_was_stopped_can_go_on_itself(tmp_path, rows, tokenizer, teacher, uninterrupted):
    """As in a notebook, where SystemExit ends the cell and not the process."""
    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, [At(3, terminate)], eval_strategy="epoch")
    with pytest.raises(SystemExit):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), uninterrupted)


def test_a_callback_that_asks_for_a_checkpoint_gets_it_when_the_epoch_has_ended(tmp_path, rows, tokenizer, teacher):
    class Saves(TrainerCallback):
        def __init__(self):
            self.saved = []

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            self.saved.append((state.global_step, sum("eval_kd" in log for log in state.log_history)))

    saves = Saves()
    trainer = make_trainer(tmp_path, rows, tokenizer, teacher, max_steps=4, save_strategy="no", eval_strategy="epoch")
    trainer.add_callback(saves)
    trainer.train()
    assert saves.saved == [(1, 0), (2, 1), (3, 1), (4, 2)]


def test_a_signal_that_came_too_late_for_an_update_goes_to_the_handler_of_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("before"))
    try:
        with noticing_sigterm() as noticed:
            terminate()
            assert noticed
            assert not received
        assert received == ["before"]
        with suppress(SystemExit), noticing_sigterm():
            terminate()
            raise SystemExit(0)
        assert received == ["before"]  # acted upon
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_another_thread_leaves_signals_alone(tmp_path, rows, tokenizer, teacher):
    handler, found = signal.getsignal(signal.SIGTERM), []
    trainer = make_trainer(
        tmp_path, rows, tokenizer, teacher, [At(1, lambda: found.append(signal.getsignal(signal.SIGTERM)))], max_steps=1
    )
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert found == [handler]
    assert (tmp_path / "checkpoint-1").exists()


def test_saving_in_the_middle_of_an_update_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"enable_jit_checkpoint=True saves in the middle .* SIGTERM makes"):
        KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, enable_jit_checkpoint=True)


def test_leftovers_of_a_killed_run_are_removed_when_the_next_one_starts(out, rows, tokenizer, teacher, caplog):
    caplog.set_level(logging.WARNING)
    shutil.copytree(
        out / "checkpoint-2", out / "_tmp-checkpoint-3" / "checkpoint-3", ignore=shutil.ignore_patterns(MARK)
    )
    for name in ("_tmp-trial-x1", "_tmp-data"):
        (out / name / "rows").mkdir(parents=True)
    make_trainer(out, rows, tokenizer, teacher, max_steps=2).train(resume_from_checkpoint=True)
    assert "checkpoint-3 was left by a killed run" in caplog.text
    assert [path.name for path in out.glob("_tmp-*")] == ["_tmp-data"]  # which is the user's
    assert not (out / "checkpoint-3").exists()
