"""Two processes with a teacher at an address, of which one loses its server.

Usage: torchrun --standalone --nproc_per_node 2 remote_runs.py FOLDER
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import TrainerCallback

from hf_distill.teachers import TeacherAway
from tests.conftest import leave_imports_to_themselves, make_model, make_tokenizer
from tests.distributed.kd_runs import make_trainer
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

STEP = 3


class LosingIt(TrainerCallback):
    def __init__(self, stub: Stub) -> None:
        self.stub = stub

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEP and args.process_index == 1:
            self.stub.kill()


def train(folder: Path, stub: Stub, *, resume: bool = False, callbacks=()):
    """Six updates; the weights, and what has stopped them before."""
    trainer = make_trainer(
        folder, 2, make_model(seed=2), stub.url, tokenizers={}, teacher_logprobs=9, temperature=1.0, max_steps=6,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, teacher_timeout=2.0, optim="adamw_torch",
        learning_rate=1e-2,
    )  # fmt: skip
    for callback in callbacks:
        trainer.add_callback(callback)
    reason = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except TeacherAway as error:
        reason = str(error)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.student.parameters()]), reason


if __name__ == "__main__":
    leave_imports_to_themselves()
    folder = Path(sys.argv[1])
    with Stub(ServedModel(make_model(seed=1), make_tokenizer(), name="t")) as stub:
        whole, _ = train(folder / "whole", stub)
        _, reason = train(folder / "run", stub, callbacks=[LosingIt(stub)])
        rank = int(torch.distributed.get_rank())
        if rank == 1:
            stub.restart()
        torch.distributed.barrier()
        found = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
        resumed, again = train(folder / "run", stub, resume=True)
        results = {"reason": reason, "checkpoints": found, "again": again, "same": torch.equal(whole, resumed)}
        (folder / f"rank{rank}.json").write_text(json.dumps(results))
