"""A teacher in this process: any dtype, 4-bit, on the student's device or on another one, or the student's own base."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from hf_distill.losses.fused_linear import Head, TeacherSignal
from hf_distill.modeling import (
    causal_lm,
    check_head,
    embedding_weight,
    evaluating,
    head_of,
    keep_4bit_weights,
    select_positions,
)

logger = logging.getLogger(__name__)

BASE = "base"  # the name of a teacher that is the student's own base model
QUANTIZATIONS = ("4bit", "8bit")


class LocalTeacher:
    """A frozen causal language model in eval mode. Only hidden states leave its device; its head is copied once.

    Args:
        model (`PreTrainedModel`): frozen and put into eval mode here.
        signal_device (`torch.device`): where the losses are computed, the student's device.
    """

    def __init__(self, model: PreTrainedModel, signal_device: torch.device) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = public_name(model)
        self._causal_lm = causal_lm(model)
        keep_4bit_weights(model)  # A teacher is left as it came.
        check_head(self._causal_lm, "teacher")
        head = head_of(self._causal_lm)
        bias = None if head.bias is None else head.bias.to(signal_device)
        self.head = head._replace(weight=head.weight.to(signal_device), bias=bias)
        self.signal_device = signal_device
        self.layers: tuple[int, ...] = ()  # inner layers whose output is part of the signal

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], positions: Tensor) -> list[TeacherSignal]:
        self.model.eval()
        embeddings = embedding_weight(self._causal_lm)
        inputs = {
            name: value.to(embeddings.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
            if not name.startswith("teacher_")  # what others read
        }
        # The student's padding token may be one that the teacher has no embedding for.
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] >= len(embeddings), 0)
        return [signal_of(self._causal_lm, self.head, inputs, positions, self.layers, self.signal_device)]


class BaseTeacher:
    """The base model of a student with adapters, which are switched off while it is asked: no second copy in memory.

    Args:
        student (`PeftModel`): trained in its adapters alone.

    Raises:
        `ValueError`: the student has no adapters, or trains parameters of its base model.
    """

    def __init__(self, student: Any) -> None:
        if not isinstance(student, PeftModel):
            raise ValueError("teacher_model='base' needs a student with adapters: pass a peft_config")
        prefix = student.base_model.prefix
        if trained := [n for n, p in student.named_parameters() if p.requires_grad and prefix not in n]:
            raise ValueError(
                f"teacher_model='base' needs a base model that stays as it is, but {trained[0]} is trained: remove "
                "modules_to_save and bias from the peft_config, or pass the teacher by name"
            )
        self.model = student
        self.name = f"{public_name(causal_lm(student))} without adapters"
        self.layers: tuple[int, ...] = ()

    @property
    def head(self) -> Head:
        return head_of(causal_lm(self.model))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], positions: Tensor) -> list[TeacherSignal]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            with evaluating(self.model), self.model.disable_adapter():
                return [signal_of(causal_lm(self.model), self.head, inputs, positions, self.layers, positions.device)]
        finally:
            # PEFT switches all of the adapters' gradients on again, those of frozen parts (LoRA-FA), too.
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)


def signal_of(
    model: PreTrainedModel,
    head: Head,
    inputs: dict[str, Tensor],
    positions: Tensor,
    layers: Sequence[int],
    device: torch.device,
) -> TeacherSignal:
    """What a model says at flat `positions` (N,) of a batch, moved to `device`."""
    outputs = model.base_model(**inputs, use_cache=False, **({"output_hidden_states": True} if layers else {}))

    def at_positions(hidden: Tensor) -> Tensor:
        return select_positions(hidden, positions).to(device)

    inner = {layer: at_positions(outputs.hidden_states[layer + 1]) for layer in layers}
    return TeacherSignal(at_positions(outputs.last_hidden_state), head, layers=inner)


def load_teacher(
    model: str | PreTrainedModel,
    *,
    device: str | torch.device,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    init_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The teacher on its device, in the dtype it was saved in, quantised only if asked.

    Args:
        model (`str` or `PreTrainedModel`): hub id, local path, or a model.
        device: where it runs; a model that is dispatched over devices (`device_map`) or quantised stays where it is.
        quantization (`str`, *optional*): "4bit" (NF4, double quantisation) or "8bit", through bitsandbytes.
        init_kwargs (`dict`, *optional*): for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        `ValueError`: quantisation of a model that is already loaded or without bitsandbytes; a model without weights.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"teacher_device={str(device)!r} is not a device of this machine: {error}") from error
    if isinstance(model, str):
        defaults = {"dtype": "auto", "device_map": {"": str(device)}, "trust_remote_code": trust_remote_code}
        kwargs = {**defaults, **(init_kwargs or {})}
        if quantization is not None:
            kwargs["quantization_config"] = _quantization_config(quantization, torch.device(device))
        try:
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        except OSError as error:
            raise ValueError(f"teacher_model={model!r} cannot be loaded: {error}") from error
        if quantization is not None:
            size = model.get_memory_footprint() / 2**20
            logger.warning("teacher loaded in %s by bitsandbytes: %.1f MiB on %s", quantization, size, device)
        return model
    if quantization is not None:
        raise ValueError(
            f"teacher_quantization={quantization!r} needs the teacher as a hub id or path; this one is already loaded. "
            "Pass its name, or load it with a quantization_config yourself"
        )
    if init_kwargs:
        raise ValueError("teacher_model_init_kwargs needs the teacher as a hub id or path; this one is already loaded")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the teacher is on the meta device: it has no weights. Load it with from_pretrained")
    stays = getattr(model, "hf_device_map", None) or getattr(model, "quantization_method", None)
    return model if stays else model.to(device)  # pyright: ignore


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


def public_name(model: str | PreTrainedModel) -> str:
    """What a model is called in logs and on model cards: its hub id, or the last part of its path."""
    name = (model if isinstance(model, str) else model.config.name_or_path) or ""
    # A local path is nobody's business on a model card; its last part usually is the model's name.
    return (os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name) or type(model).__name__
