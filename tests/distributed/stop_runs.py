"""Two processes of which one is told to stop, fails, or dies.

Usage: torchrun --standalone --nproc_per_node 2 stop_runs.py FOLDER sigterm|error|death|disk|error_while_stuck RANK
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers.modeling_utils
from transformers import TrainerCallback

from tests.conftest import leave_imports_to_themselves, make_model
from tests.distributed.kd_runs import make_trainer

STEP = 3


class At(TrainerCallback):
    """Does something in the middle of update `STEP` of one process, and notes when."""

    def __init__(self, folder: Path, rank: int, action: str) -> None:
        self.folder, self.rank, self.action = folder, rank, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 != STEP:
            return
        if args.process_index == self.rank:
            (self.folder / "time.txt").write_text(str(time.time()))
            ACTIONS[self.action]()
        elif self.action == "error_while_stuck":
            time.sleep(1000)  # as in a collective of NCCL, which does not notice that the others are gone


def fail():
    raise RuntimeError("this process has failed")


def fill_the_disk():
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    transformers.modeling_utils.safe_save_file = no_space


ACTIONS = {
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "error": fail,
    "error_while_stuck": fail,
    "death": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "disk": fill_the_disk,
}


def train(folder: Path, seed: int = 2, resume: bool = False, callback: TrainerCallback | None = None):
    """Six updates with dropout, from a student of its own; the trainer afterwards."""
    student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    teacher = make_model("gpt2", seed=1)
    trainer = make_trainer(
        folder, 2, student, teacher, optim="adamw_torch", learning_rate=1e-2, max_steps=6, save_strategy="steps",
        save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    if callback is not None:
        trainer.add_callback(callback)
    stopped = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except SystemExit as error:
        stopped = error.code
    return trainer, stopped


if __name__ == "__main__":
    leave_imports_to_themselves()
    folder, action, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    expected = {}
    if action == "sigterm":
        expected = train(folder / "whole")[0].model.state_dict()
    trainer, stopped = train(folder / "stopped", callback=At(folder, rank, action))
    result = {"step": trainer.state.global_step, "code": stopped}
    trainer, _ = train(folder / "stopped", seed=9, resume=True)
    found = trainer.model.state_dict()
    result["identical"] = all(torch.equal(value, expected[name]) for name, value in found.items())
    Path(folder, f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
