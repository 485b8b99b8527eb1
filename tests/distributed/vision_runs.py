"""The runs that test_vision_engines.py compares: in its own process, and as a script in two of them.

Usage: vision_runs.py ENGINE FOLDER, with the environment of `engines.environments`
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed import engines

if __name__ == "__main__":
    engines.use(sys.argv[1])

import torch
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer
from hf_distill.modeling import whole_state
from tests.conftest import leave_imports_to_themselves
from tests.distributed.kd_runs import make_settings
from tests.vision import chats, make_processor, make_vlm

RUNS = ("full", "lora", "own view")
# Made before the first arguments are: from then on, ZeRO-3 splits every model that is made.
STUDENT, TEACHER = make_vlm("idefics3", 1), make_vlm("idefics3", 2)


def run(folder: Path, num_processes: int, engine: str = "none") -> dict[str, dict]:
    """Logs, evaluation and weights: of all weights, of adapters, and with a teacher that has a view of its own."""
    results = {}
    for name in RUNS:
        own = make_processor("idefics3", do_image_splitting=name == "own view")
        changes = engines.settings(engine)
        trainer = KDTrainer(
            copy.deepcopy(STUDENT), copy.deepcopy(TEACHER),
            KDConfig(**make_settings(folder / name, num_processes) | changes),
            # Five rows: the last batches of two processes are filled up.
            chats(8), chats(5, seed=300), make_processor("idefics3"), teacher_processing_class=own,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if name == "lora" else None,
        )  # fmt: skip
        before = whole_state(trainer.model)
        trainer.train()
        results[name] = {
            "num_processes": trainer.accelerator.num_processes,
            "engine": engines.engine_of(trainer),
            "before": before,
            "weights": whole_state(trainer.model),
            "logs": [_only(("loss", "kd", "ce"), entry) for entry in trainer.state.log_history],
            "evaluation": _only(("eval_kd", "eval_ce", "eval_agreement"), trainer.evaluate()),
        }
    return results


def _only(names: tuple[str, ...], found: dict) -> dict:
    return {name: value for name, value in found.items() if name in names}


if __name__ == "__main__":
    leave_imports_to_themselves()
    folder = Path(sys.argv[2])
    found = run(folder, 2, sys.argv[1])
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
