"""The share of each of W processes under an engine, and the parts that are gathered for a while."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_distill.planning.models import ParameterShape, no_memory
from hf_distill.planning.steps import state_bytes, step_optimizer

# DeepSpeed's defaults, in numbers: `reduce_bucket_size` and `stage3_max_live_parameters`.
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Share:
    """The bytes of the first process of an engine, which has the most.

    Args:
        weights, gradients, optimizer: what it keeps; a copy in float32 that is stepped on is one of the states.
        buffers: what it keeps beside them, by name.
        gathered: whole weights and gradients, at their most.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: Mapping[str, int]
    gathered: int = 0


def share_of(
    engine: str,
    num: int,
    parameters: Sequence[ParameterShape],
    optimizer: tuple[Any, Mapping[str, Any]],
    *,
    mixed: bool,
    layer: int,
    root: int,
    buffers: int = 0,
) -> Share:
    """The share of an engine that splits.

    Args:
        engine (`str`): "fsdp2", "zero2" or "zero3".
        num (`int`): W, the number of processes.
        parameters: of the student, in the dtype that it computes in.
        optimizer: class and keyword arguments.
        mixed (`bool`): whether it computes in half precision and steps in float32.
        layer, root (`int`): bytes of the largest layer and of all that belongs to no layer, in the dtype of parameters.
        buffers (`int`): bytes of the student's buffers, which are whole everywhere.
    """
    trained = [p for p in parameters if p.trained]
    if engine == "fsdp2":
        shards = [_shard(p, num, widen=mixed and p.trained) for p in parameters]
        own = [shard for shard in shards if shard.trained]
        gradients = sum(p.nbytes for p in own)
        gathered = root + 2 * layer + (max(root, layer) if trained else 0)
        states = fake_states(optimizer, [p.shape for p in own], own[0].itemsize if own else 4)
        return Share(sum(p.nbytes for p in shards) + buffers, gradients, states, {}, gathered)
    whole = sum(p.nbytes for p in parameters)
    numbers = sum(p.numel for p in trained)
    part = math.ceil(numbers / num)
    states = 4 * part + fake_states(optimizer, [(part,)], 4)
    itemsize = max((p.itemsize for p in parameters), default=0)
    # DeepSpeed allocates the whole bucket, even for a small model.
    bucket = {"ZeRO's bucket of gradients": REDUCE_BUCKET * itemsize}
    if engine == "zero2":
        return Share(whole + buffers, 4 * part, states, bucket)
    live = min(sum(p.numel for p in parameters), MAX_LIVE) * itemsize
    return Share(math.ceil(whole / num) + buffers, 4 * part, states, bucket, live)


def _shard(parameter: ParameterShape, num: int, *, widen: bool) -> ParameterShape:
    """The first process's rows of a parameter, as FSDP2 splits it."""
    first, *rest = parameter.shape or (1,)
    itemsize = 4 if widen else parameter.itemsize
    return ParameterShape((math.ceil(first / num), *rest), itemsize, parameter.trained)


def fake_states(optimizer: tuple[Any, Mapping[str, Any]], shapes: Sequence[tuple[int, ...]], itemsize: int) -> int:
    """The bytes of an optimizer's states for parameters of these shapes."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    if not shapes:
        return 0
    with no_memory():
        parameters = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        return state_bytes(step_optimizer(optimizer, parameters))
