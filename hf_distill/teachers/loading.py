"""A teacher's model, loaded in its layout: any dtype, 4-bit, on the student's device or on others."""

import logging
import os
from typing import Any
from unittest.mock import patch

import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import is_bitsandbytes_available

from hf_distill.model_files import auto_class
from hf_distill.modeling import is_split
from hf_distill.saving import base_and_adapter
from hf_distill.teachers.placement import LAYOUTS, teacher_devices

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("4bit", "8bit")


def load_teacher(
    model: str | PreTrainedModel,
    *,
    device: str | None,
    student_device: str | torch.device = "cpu",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    init_kwargs: dict[str, Any] | None = None,
    called: str = "teacher_model=",
) -> PreTrainedModel:
    """The teacher in its place, in the dtype it was saved in, quantised only if asked.

    Args:
        model (`str` or `PreTrainedModel`): hub id, local path, or a model.
        device (`str`, *optional*):
            What `teacher_device` says ([`teacher_devices`]). A model that is dispatched over devices (`device_map`),
            quantised or split by ZeRO-3 stays where it is.
        student_device (`torch.device`): the default, and where an offloaded teacher is computed.
        quantization (`str`, *optional*): "4bit" (NF4, double quantisation) or "8bit", through bitsandbytes.
        init_kwargs (`dict`, *optional*): for `AutoModelForCausalLM.from_pretrained`.
        called (`str`): what stands before the model's name in errors.

    Raises:
        `ValueError`: no such device; quantisation of a model that is already loaded or without bitsandbytes; a model
            without weights.
    """
    devices = _devices(device, student_device)
    if quantization is not None and device in ("offload", "sharded"):
        raise ValueError(f"teacher_quantization={quantization!r} and teacher_device={device!r} exclude each other")
    if isinstance(model, str):
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            model = _from_pretrained(model, devices, quantization, device == "sharded", options, init_kwargs)
        except OSError as error:
            raise ValueError(f"{called}{model!r} cannot be loaded: {error}") from error
    else:
        if quantization is not None:
            raise ValueError(
                f"teacher_quantization={quantization!r} needs the teacher as a hub id or path; this one is already "
                "loaded. Pass its name, or load it with a quantization_config yourself"
            )
        if init_kwargs:
            raise ValueError(
                "teacher_model_init_kwargs needs the teacher as a hub id or path; this one is already loaded"
            )
        if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
            raise ValueError("the teacher is on the meta device: it has no weights. Load it with from_pretrained")
        stays = getattr(model, "hf_device_map", None) or getattr(model, "quantization_method", None) or is_split(model)
        if not stays:
            model = _laid_out(model, devices)
    if device == "offload" and not getattr(model, "hf_device_map", None):
        cpu_offload(model.eval(), torch.device(student_device))
    return model


def _devices(setting: str | None, student_device: str | torch.device) -> list[str]:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = teacher_devices(setting, str(student_device), local_rank, num_local_ranks, accelerators)
    for device in devices:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"teacher_device={setting!r} is not a device of this machine, nor one of {', '.join(LAYOUTS)}: {error}"
            ) from error
    return devices


def _from_pretrained(
    name: str,
    devices: list[str],
    quantization: str | None,
    sharded: bool,
    kwargs: dict[str, Any],
    init_kwargs: dict[str, Any] | None,
) -> PreTrainedModel:
    kwargs |= {"dtype": "auto", "device_map": {"": devices[0]}}
    if len(devices) > 1:
        kwargs |= {"device_map": "auto", "max_memory": _free_memory(devices)}
    kwargs |= init_kwargs or {}
    if quantization is not None:
        kwargs["quantization_config"] = _quantization_config(quantization, torch.device(devices[0]))
    base, adapter = base_and_adapter(name)
    if sharded and deepspeed_integration.is_deepspeed_zero3_enabled():
        del kwargs["device_map"]  # Each process keeps its part only.
        return auto_class(name, kwargs).from_pretrained(name, **kwargs)
    # ZeRO-3 would split it.
    with patch.object(deepspeed_integration, "_hf_deepspeed_config_weak_ref", None):
        model = auto_class(base, kwargs).from_pretrained(base, **kwargs)
    if adapter is not None:
        model.load_adapter(adapter)
    if quantization is not None:
        size = model.get_memory_footprint() / 2**20
        logger.warning("teacher loaded in %s by bitsandbytes: %.1f MiB on %s", quantization, size, devices[0])
    return model


def _laid_out(model: Any, devices: list[str]) -> PreTrainedModel:
    """A model on a device, or layer by layer over several."""
    if len(devices) == 1:
        return model.to(devices[0])
    whole: Any = model._no_split_modules
    device_map = infer_auto_device_map(model, max_memory=_free_memory(devices), no_split_module_classes=whole)
    laid_out: Any = dispatch_model(model, device_map)
    return laid_out


def _free_memory(devices: list[str]) -> dict[int | str, int | str]:
    return {torch.device(device).index: torch.cuda.mem_get_info(device)[0] for device in devices}


def check_quantization(quantization: str | None) -> None:
    """Raises `ValueError` for an unknown quantisation, and for any where bitsandbytes is missing."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"teacher_quantization has to be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if not is_bitsandbytes_available():
        raise ValueError(
            f"teacher_quantization={quantization!r} needs bitsandbytes: pip install 'hf_distill[quantization]'"
        )


def _quantization_config(quantization: str, device: torch.device) -> BitsAndBytesConfig:
    check_quantization(quantization)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
    )
