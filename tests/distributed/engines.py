"""Engines on two CPU processes: what each takes in the trainer's arguments, and what it takes to run without a GPU.

This file is imported before transformers, which asks for its device when it is imported.
"""

import os


def use(name: str) -> None:
    """Prepares this process, started by torchrun, for an engine."""
    if name == "fsdp2":
        # accelerate knows FSDP only on GPUs: it is told that gloo is a backend of theirs, and the CPU their device.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    if name.startswith("zero"):
        import deepspeed

        # It would compile an operator for processes that share memory, which takes gcc and more than a minute.
        deepspeed.comm.torch.build_shm_op = lambda: None
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
