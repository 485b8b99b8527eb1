"""The devices of a teacher's weights in each process."""

from collections.abc import Sequence
from typing import Any

import torch

# The values of `teacher_device` that are no names of devices:
#   auto      laid out, layer by layer, over the devices that are no student's
#   paired    one more device for each student: the teacher of the n-th student is on the n-th of these devices
#   offload   in the CPU's memory; each layer visits the student's device while it is computed
#   sharded   split over all processes, as the student is by FSDP2 or ZeRO-3
LAYOUTS = ("auto", "paired", "offload", "sharded")


def teacher_devices(
    setting: str | None, student: str, local_rank: int = 0, num_local_ranks: int = 1, devices: Sequence[str] = ()
) -> list[str]:
    """The devices that the teacher of one process is loaded to; several where its layers are spread over them.

    Args:
        setting (`str`, *optional*): the name of a device, or one of [`LAYOUTS`]; by default the student's device.
        student (`str`): the student's device, such as "cuda:1".
        local_rank (`int`): of the process, on this machine.
        num_local_ranks (`int`): the processes on this machine.
        devices (`Sequence[str]`): all accelerators of this machine. The students' are the first `num_local_ranks`.

    Raises:
        `ValueError`: there is no device left for the teacher.
    """
    if setting is None:
        return [student]
    if setting in ("offload", "sharded"):
        return ["cpu"]
    if setting not in LAYOUTS:
        return [setting]
    free = [device for device in devices[num_local_ranks:] if device != student]
    if setting == "paired":
        if len(free) < num_local_ranks:
            raise ValueError(
                f"teacher_device='paired' needs two devices per process: {num_local_ranks} processes on this machine "
                f"see {len(devices)}. Start half as many as devices, or take teacher_device=None or 'offload'"
            )
        return [free[local_rank]]
    # The free devices in equal parts; some of the first ranks have one more.
    share = free[local_rank::num_local_ranks]
    if not share:
        raise ValueError(
            f"teacher_device='auto' finds no device for the teacher of process {local_rank}: this machine has "
            f"{len(devices)} and {num_local_ranks} are students'. Start fewer processes, or take "
            "teacher_device=None or 'offload'"
        )
    return share


def check_device_names(setting: Any) -> None:
    """Raises `ValueError` for a `teacher_device` that names no device, whatever this machine has; None passes."""
    if setting is None:
        return
    if not isinstance(setting, str):
        is_number = isinstance(setting, int) and not isinstance(setting, bool)
        name = f"'cuda:{setting}'" if is_number else "'cuda:1', and of several teachers 'cuda:1,cuda:2'"
        raise ValueError(f"teacher_device has to be text such as {name}, got {setting!r}")
    for name in (name.strip() for name in setting.split(",")):
        if name and name not in LAYOUTS:
            try:
                if torch.device(name).type == "meta":
                    raise ValueError(f"teacher_device={setting!r}: the meta device holds no weights")
            except RuntimeError as error:
                layouts = ", ".join(LAYOUTS)
                raise ValueError(
                    f"teacher_device={setting!r} is no device such as 'cuda:1' or 'cpu', nor one of {layouts}"
                ) from error
