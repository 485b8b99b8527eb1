"""What each of two processes keeps of a student under an engine, for test_plan.py.

Usage: torchrun --standalone --nproc_per_node 2 plan_runs.py ENGINE FOLDER
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed import engines

if __name__ == "__main__":
    engines.use(sys.argv[1])

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.conftest import make_model
from tests.distributed.kd_runs import make_trainer

# Made before the first arguments are: from then on, ZeRO-3 splits every model that is made.
STUDENT, TEACHER = make_model(seed=2, hidden_size=36), make_model(seed=1, hidden_size=48)


class Kept(TrainerCallback):
    """The bytes of weights and of the optimizer's states on this process, after an update."""

    trainer = None

    def on_step_end(self, *args, **kwargs):
        weights = [self._part(parameter) for parameter in self.trainer.model.parameters()]
        self.weights = sum(part.nbytes for part in weights)
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer") and not hasattr(optimizer, "fp32_partitioned_groups_flat"):
            if hasattr(optimizer, "single_partition_of_fp32_groups"):
                break
            optimizer = optimizer.optimizer
        copies = getattr(optimizer, "single_partition_of_fp32_groups", [])  # ZeRO-2
        copies = copies or getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
        inner = getattr(optimizer, "optimizer", optimizer)
        states = [
            value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)
        ]
        self.states = sum(self._part(value).nbytes for value in states) + sum(part.nbytes for part in copies)

    @staticmethod
    def _part(tensor):
        if hasattr(tensor, "ds_tensor"):
            return tensor.ds_tensor
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main(engine: str, folder: Path) -> None:
    trainer = make_trainer(
        folder / "run", 2, copy.deepcopy(STUDENT), copy.deepcopy(TEACHER), optim="adamw_torch",
        **engines.settings(engine),
    )  # fmt: skip
    kept = Kept()
    kept.trainer = trainer
    trainer.add_callback(kept)
    trainer.train()
    found = {"engine": engines.engine_of(trainer), "weights": kept.weights, "states": kept.states}
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
