"""The runs that test_vision_ddp.py compares: in its own process, and as a script under torchrun with two of them.

Usage: torchrun --standalone --nproc_per_node 2 vision_runs.py FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer
from tests.distributed.kd_runs import Gradients, make_settings
from tests.vision import chats, make_processor, make_vlm


def run(folder: Path, num_processes: int) -> dict[str, dict]:
    """Logs, evaluation, gradients and weights: of all weights, of adapters, and of a teacher with a view of its own."""
    results = {}
    for name in ("full", "lora", "own view"):
        own = make_processor("idefics3", do_image_splitting=name == "own view")
        trainer = KDTrainer(
            make_vlm("idefics3", 1), make_vlm("idefics3", 2), KDConfig(**make_settings(folder / name, num_processes)),
            # Five rows: the last batches of two processes are filled up.
            chats(8), chats(5, seed=300), make_processor("idefics3"), teacher_processing_class=own,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if name == "lora" else None,
            callbacks=[Gradients()],
        )  # fmt: skip
        trainer.train()
        captured = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Gradients))
        results[name] = {
            "num_processes": trainer.accelerator.num_processes,
            "gradients": {n.removeprefix("module."): g for n, g in captured.found.items()},
            "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad},
            "logs": [_only(("loss", "kd", "ce"), entry) for entry in trainer.state.log_history],
            "evaluation": _only(("eval_kd", "eval_ce", "eval_agreement"), trainer.evaluate()),
        }  # fmt: skip
    return results


def _only(names: tuple[str, ...], found: dict) -> dict:
    return {name: value for name, value in found.items() if name in names}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = run(folder, num_processes=2)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
