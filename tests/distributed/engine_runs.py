"""The runs that test_engines.py compares: in its own process, and as a script under torchrun with two of them.

A cell is a trainer, and whether its student has adapters. Each is trained for two updates, saved, and resumed from the
checkpoint after the first.

A student of a family whose checkpoints have other names than its modules is trained apart, with the best model loaded.

Usage: torchrun --standalone --nproc_per_node 2 engine_runs.py ENGINE FOLDER [cells|mixtures]
"""

import copy
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distributed import engines

if __name__ == "__main__":
    engines.use(sys.argv[1])

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, MixtralConfig, TrainerCallback

from hf_distill import KDTrainer
from hf_distill.modeling import whole_state
from hf_distill.teachers.kinds import own_models
from tests.conftest import SENTENCES, leave_imports_to_themselves, make_model, make_tokenizer
from tests.distributed.kd_runs import make_kv, make_speculative, make_trainer, students

TRAINERS = {
    "KDTrainer": make_trainer, "KVProjectionTrainer": make_kv, "SpeculativeKDTrainer": make_speculative
}  # fmt: skip
CELLS = list(product(TRAINERS, ("full", "lora")))
# Made before the first arguments are: from then on, ZeRO-3 splits every model that is made.
STUDENTS, TEACHER = students(), make_model(seed=1, hidden_size=48)
MIXTURE = AutoModelForCausalLM.from_config(
    MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    ),
    dtype=torch.float32,
)  # fmt: skip
MIXTURES = {"full": MIXTURE, "lora": get_peft_model(copy.deepcopy(MIXTURE), LoraConfig(target_modules=["q_proj"]))}
OTHER_TOKENIZER = make_tokenizer(corpus=[sentence[::-1] for sentence in SENTENCES])
MODELS = {
    "student": STUDENTS["full"], "one": TEACHER, "other": make_model(seed=4),
    "foreign": make_model(seed=5, hidden_size=48),
}  # fmt: skip
# Who teaches, with which settings.
TEACHERS = {
    "one": (["one"], {}),
    "mixture": (["one", "other"], {"teacher_weights": [1.0, 2.0]}),
    "route": (["one", "other"], {"teacher_combination": "route"}),
    "foreign": (["one", "foreign"], {"teacher_combination": "sum", "tokenizers": {"foreign": OTHER_TOKENIZER}}),
}
# Where the teachers are matters to engines that split the student. To ask split ones by rows is refused.
TAUGHT = [
    ("KDTrainer", "mixture", "whole"), ("KDTrainer", "route", "whole"),
    ("KDTrainer", "one", "sharded"), ("KDTrainer", "mixture", "sharded"), ("KDTrainer", "foreign", "sharded"),
    ("KVProjectionTrainer", "one", "sharded"), ("KVProjectionTrainer", "mixture", "sharded"),
]  # fmt: skip


def make(cell: tuple[str, str], folder, num_processes: int, **changes) -> KDTrainer:
    student, teacher = copy.deepcopy(STUDENTS[cell[1]]), copy.deepcopy(TEACHER)
    return with_momentum(TRAINERS[cell[0]](folder, num_processes, student, teacher, **changes))


def with_momentum(trainer: KDTrainer) -> KDTrainer:
    """An optimizer that is linear in the gradients, whose size Adam would not show, and has a state to save."""
    trainer.get_optimizer_cls_and_kwargs = lambda args, model=None: (  # pyright: ignore[reportAttributeAccessIssue]
        torch.optim.SGD, {"lr": args.learning_rate, "momentum": 0.9}
    )  # fmt: skip
    return trainer


def weights_of(trainer: KDTrainer) -> dict[str, torch.Tensor]:
    """All weights, whole, those of a projector included; all processes have to come here."""
    return whole_state(torch.nn.ModuleList([trainer.model, trainer.projectors]))


def run_cell(cell: tuple[str, str], folder: Path, num_processes: int, **changes) -> dict:
    trainer = make(cell, folder, num_processes, save_strategy="steps", save_steps=1, **changes)
    results = {"before": weights_of(trainer)}
    trainer.train()
    results |= {
        "num_processes": trainer.accelerator.num_processes,
        "engine": engines.engine_of(trainer),
        "weights": weights_of(trainer),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "kept": kept_bytes(trainer),
        "eval": trainer.evaluate(),
    }
    trainer.save_model(str(folder / "saved"))
    assert trainer.state.global_step == 2
    return results


def kept_bytes(trainer: KDTrainer) -> dict[str, int]:
    """Bytes that this process keeps after a training: the student's weights and buffers; what its optimizer has."""
    optimizer: Any = trainer.optimizer
    copies: list[Any] = []
    while hasattr(optimizer, "optimizer"):  # the wrappers of accelerate and DeepSpeed
        copies += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 lends them for a step
        optimizer = optimizer.optimizer
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    own = {id(parameter) for parameter in weights}
    copies += [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "weights": sum(own_part(tensor).nbytes for tensor in weights),
        "optimizer": sum(own_part(tensor).nbytes for tensor in (*states, *copies) if isinstance(tensor, torch.Tensor)),
    }


def own_part(tensor: Any) -> torch.Tensor:
    """The part of a tensor that is on this process."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def resume_cell(cell: tuple[str, str], folder: Path, num_processes: int, **changes) -> dict[str, torch.Tensor]:
    """The weights of the second update, made by another trainer from the checkpoint after the first."""
    trainer = make(cell, folder, num_processes, **changes)
    for parameter in (*trainer.model.parameters(), *trainer.projectors.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.01  # from these weights, two updates would lead elsewhere
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return weights_of(trainer)


def run_mixture(student: str, folder: Path, num_processes: int, **changes) -> dict:
    """The weights after each of two updates, those loaded as the best, which the first are, and a resumed run's."""

    def made(**more) -> KDTrainer:
        model, teacher = copy.deepcopy(MIXTURES[student]), copy.deepcopy(TEACHER)
        return with_momentum(make_trainer(folder, num_processes, model, teacher, **changes | more))

    trainer = made(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="kd", greater_is_better=False,
    )  # fmt: skip
    measure = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: measure(*args, **kwargs) | {"eval_kd": float(trainer.state.global_step)}
    watch = AtStepEnd(lambda: weights_of(trainer))
    trainer.add_callback(watch)
    trainer.train()
    results = {"engine": engines.engine_of(trainer), "steps": watch.found, "best": weights_of(trainer)}
    resumed = made()
    for parameter in resumed.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return results | {"resumed": weights_of(resumed)}


def difference(found: dict, expected: dict, before: dict) -> float:
    """How far two updates are apart, by the tensor where it is most, in units of what the expected one has changed.

    Of the weights themselves a wrong gradient would be a small part.
    """
    assert found.keys() == expected.keys() == before.keys()
    parts = [0.0]
    for name, value in expected.items():
        distance, change = (found[name] - value).norm(), (value - before[name]).norm()
        parts.append(float(distance / change) if change > 1e-6 else float(distance > 1e-6))
    return max(parts)


def launch(engine: str, folder: Path, what: str = "cells") -> list[dict]:
    """The results of both processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, engine, str(folder), what], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def saved_weights(cell: tuple[str, str], folder: Path) -> dict[str, torch.Tensor]:
    """What `save_model` wrote, read as a user does, under the names of `weights_of`."""
    if cell[1] == "lora":
        model = PeftModel.from_pretrained(copy.deepcopy(STUDENTS["full"]), folder / "saved")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "saved", dtype="auto")
    found = {f"0.{name}": tensor for name, tensor in model.state_dict().items()}
    if cell[0] == "KVProjectionTrainer":
        projector = load_file(folder / "saved" / "projectors" / "projector.safetensors")
        found |= {f"1.projector.{name}": tensor for name, tensor in projector.items()}
    return found


class SentBytes(TorchDispatchMode):
    """Adds up what collectives send from this process, as rings do it, by what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {"gather": 0.0, "reduce": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            largest = max((tensor.nbytes for tensor in tensors), default=0)
            name, share = func.name(), (torch.distributed.get_world_size() - 1) / torch.distributed.get_world_size()
            if "_c10d_functional::all_gather" in name:
                self.found["gather"] += largest * share * torch.distributed.get_world_size()  # given its part only
            elif "allgather" in name:
                self.found["gather"] += largest * share
            elif "reduce_scatter" in name:
                self.found["reduce"] += largest * share
            elif "allreduce" in name:
                self.found["reduce"] += 2 * largest * share
        return func(*args, **(kwargs or {}))


def count_bytes(cell: tuple[str, str], folder: Path, **changes) -> dict[str, float]:
    """What a process really sends in the second update: starting and ending a training sends something, too."""
    trainer = make(cell, folder, 2, logging_strategy="no", **changes)
    sizes = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    first = ("embed_tokens", "layers.0.input_layernorm", *(f"layers.0.self_attn.{part}_proj" for part in "qkv"))
    found = {
        "parameters": sum(sizes.values()),
        "trainable": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
        "last": sum(size for name, size in sizes.items() if "lm_head" in name or ".norm." in name),
        # With LoRA nothing before the first adapters has a backward.
        "first": sum(
            size for name, size in sizes.items() if any(part in name for part in first) and "lora" not in name
        ),
    }
    with SentBytes() as sent:
        watch = AtStepEnd(lambda: dict(sent.found))
        trainer.add_callback(watch)
        trainer.train()
    before, after = watch.found
    return found | {name: after[name] - before[name] for name in after}


class AtStepEnd(TrainerCallback):
    def __init__(self, look) -> None:
        self.look, self.found = look, []

    def on_step_end(self, *args, **kwargs):
        self.found.append(self.look())


def taught_by_one(folder: Path) -> dict[tuple[str, str, str], dict]:
    """All of these in one process, which splits nothing."""
    found = {case: run_taught((*case, "whole"), folder, 1) for case in {case[:2] for case in TAUGHT}}
    return {case: found[case[:2]] for case in TAUGHT}


def run_taught(case: tuple[str, str, str], folder: Path, num_processes: int, **changes) -> dict:
    """Sharded: student and teachers by name; the teachers are split over the processes, too."""
    trainer_name, teachers, place = case
    names, settings = TEACHERS[teachers]
    models = {name: copy.deepcopy(MODELS[name]) for name in ("student", *names)}
    if place == "sharded":
        if torch.distributed.get_rank() == 0:
            for name, model in models.items():
                model.save_pretrained(folder / name)
        torch.distributed.barrier()
        models = {name: str(folder / name) for name in models}
        changes["teacher_device"] = "sharded"
    student = models.pop("student")
    trainer = with_momentum(TRAINERS[trainer_name](folder, num_processes, student, models, **settings | changes))
    results = {"before": weights_of(trainer)}
    trainer.train()
    results |= {"weights": weights_of(trainer), "eval": trainer.evaluate()}
    results["shares"] = [share_of(teacher.model) for teacher in own_models(trainer.teachers).values()]
    return results


def share_of(teacher: torch.nn.Module) -> float:
    """How much of a teacher's layers is on this process."""
    layers = [parameter for name, parameter in teacher.named_parameters() if ".layers." in name]
    return sum(own_part(p).numel() for p in layers) / sum(p.numel() or p.ds_numel for p in layers)


def main(engine: str, folder: Path, what: str = "cells") -> None:
    changes = engines.settings(engine)
    run = run_mixtures if what == "mixtures" else run_cells
    torch.save(run(engine, folder, changes), folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_mixtures(engine: str, folder: Path, changes: dict) -> dict:
    return {student: run_mixture(student, folder / student, 2, **changes) for student in MIXTURES}


def run_cells(engine: str, folder: Path, changes: dict) -> dict:
    results = {}
    for cell in CELLS:
        own = folder / "-".join(cell)
        results[cell] = run_cell(cell, own, 2, **changes)
        results[cell]["resumed"] = resume_cell(cell, own, 2, **changes)
    for cell in (("KDTrainer", "full"), ("KDTrainer", "lora"), ("SpeculativeKDTrainer", "full")):
        results["bytes", *cell] = count_bytes(cell, folder / "bytes", **changes)
    for case in TAUGHT if engine in ("fsdp2", "zero3") else ():
        results[case] = run_taught(case, folder / "taught", 2, **changes)
    return results


if __name__ == "__main__":
    leave_imports_to_themselves()
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
