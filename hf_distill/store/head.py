"""The teacher's output layer, and the transform of its hidden states, in the folder of a store."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from hf_distill.hidden_bytes import Rounding
from hf_distill.losses.head import Head
from hf_distill.store.shards import REMEDY, write_file

HEAD, ROUNDING = "head.safetensors", "rounding.safetensors"


def write_head(folder: Path, head: Head) -> dict[str, Any]:
    """Writes a head; returns what the manifest has to say of it."""
    data = _write(folder / HEAD, {"weight": head.weight, "bias": head.bias})
    return {
        "rows": head.weight.shape[0],
        "width": head.weight.shape[1],
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "bytes": len(data),
        "checksum": zlib.crc32(data),
    }


def read_head(folder: Path, about: Mapping[str, Any]) -> Head:
    """The head of a store; `about` is what its manifest says of it.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    path = folder / HEAD
    data = path.read_bytes() if path.is_file() else b""
    if len(data) != about["bytes"] or zlib.crc32(data) != about["checksum"]:
        raise ValueError(f"{path} is missing or damaged: {REMEDY}")
    tensors = load(data)
    return Head(tensors["weight"], tensors.get("bias"), about["logit_scale"], about["softcap"])


def write_rounding(folder: Path, rounding: Rounding) -> dict[str, Any]:
    """Writes the transform that later writers need; returns what the manifest has to say of it."""
    data = _write(folder / ROUNDING, {"transform": rounding.transform, "inverse": rounding.inverse})
    return {"rounding": rounding.name, "checksum": zlib.crc32(data)}


def read_rounding(folder: Path, dtype: str, chosen: Mapping[str, Any]) -> Rounding:
    """The rounding of a store of hidden states in `dtype`; `chosen` is what its manifest says of it.

    Raises:
        `ValueError`: the file is missing or damaged. It cannot be made again, because it depends on a probe.
    """
    path = folder / ROUNDING
    data = path.read_bytes() if path.is_file() else b""
    if zlib.crc32(data) != chosen["checksum"]:
        raise ValueError(
            f"{path} is missing or damaged, and nothing can be added to the store without it: take it from a copy, or "
            "take another output_dir"
        )
    tensors = load(data)
    return Rounding(dtype, chosen["rounding"], tensors.get("transform"), tensors.get("inverse"))


def _write(path: Path, tensors: Mapping[str, Tensor | None]) -> bytes:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None})
    write_file(path, data)
    return data
