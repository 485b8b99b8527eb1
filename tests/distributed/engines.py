"""Engines on two CPU processes: what each takes in the trainer's arguments, and what it takes to run without a GPU.

This file is imported before transformers, which asks for its device when it is imported.
"""

import os
import socket
import sys

# What `engine_of` finds under each: accelerate's name for it, DeepSpeed's stage, and whether the student is split.
FOUND = {
    "none": "NO, whole", "ddp": "MULTI_CPU, whole", "fsdp2": "FSDP, split", "zero2": "DEEPSPEED 2, whole",
    "zero3": "DEEPSPEED 3, split",
}  # fmt: skip


def environments(name: str) -> list[dict[str, str]]:
    """What torchrun tells each process of a run; an engine that is none has one process, which is told nothing."""
    if name == "none":
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [{**same, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def use(name: str) -> None:
    """Prepares this process, which has its environment, for an engine."""
    if name == "fsdp2":
        # accelerate knows FSDP only on GPUs: it is told that gloo is a backend of theirs, and the CPU their device.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if name.startswith("zero"):
        import deepspeed

        # It would compile an operator for processes that share memory, which takes gcc and more than a minute.
        # `deepspeed.comm.torch` itself is PyTorch.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        deepspeed.init_distributed(dist_backend="gloo")  # ZeRO-3 needs it before the first model


def settings(name: str) -> dict:
    """What the trainer's arguments say to run on an engine."""
    if name == "fsdp2":
        return {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    if name.startswith("zero"):
        zero = {
            "zero_optimization": {
                "stage": int(name[-1]),
                # Everything is split, however small.
                "stage3_param_persistence_threshold": 0,
                # Nothing stays gathered from a forward to its backward, as with a model that is no toy.
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        }
        return {"use_cpu": True, "deepspeed": zero}
    return {"use_cpu": True}


def engine_of(trainer) -> str:
    """Which engine really runs, and that it really splits what it says."""
    # Any: after an evaluation FSDP leaves the outermost parameters gathered.
    split = any(
        hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()
    )
    stage = f" {trainer.accelerator.deepspeed_plugin.zero_stage}" if trainer.is_deepspeed_enabled else ""
    distributed_type = str(trainer.accelerator.distributed_type).removeprefix("DistributedType.")
    return f"{distributed_type}{stage}, {'split' if split else 'whole'}"
