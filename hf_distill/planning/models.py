"""Models made of configurations alone, on fake tensors: their parameters have shapes and dtypes, and no memory."""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from hf_distill.modeling import decoder_layers, head_layer, is_vision_language, trying

# bitsandbytes keeps a scale for each block of this many 4-bit weights; with double quantisation the scales are bytes,
# and each of their own blocks has a float32.
BLOCK, BLOCK_OF_SCALES = 64, 256
CODES = {4: 16 * 4, 8: 256 * 4}  # the values that 4 and 8 bits stand for, in float32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """A model as a run loads it.

    Args:
        source (`str`): hub id, folder, or path of a `config.json`.
        dtype (`str`, *optional*): of its weights; None or "auto" for the one it was saved in.
        bits (`int`, *optional*): 4 or 8, to which bitsandbytes quantises the linear layers.
        double_quant (`bool`): whether the scales of 4-bit weights are quantised, too.
        attention (`str`, *optional*): `attn_implementation`.
        options: of `AutoConfig.from_pretrained`.
    """

    source: str
    dtype: str | None = "auto"
    bits: int | None = None
    double_quant: bool = False
    attention: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        """The configuration; `ValueError` if there is none or it is of no causal language model."""
        return read_config(self.source, self.options)


def read_config(source: str, options: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The configuration under a hub id, in a folder or in a file.

    Raises:
        `ValueError`: there is none.
    """
    try:
        if os.path.isfile(source):
            settings = json.loads(Path(source).read_text(encoding="utf-8"))
            return AutoConfig.for_model(**settings)
        return AutoConfig.from_pretrained(source, **(options or {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no configuration of {source!r} ({reason}). A config.json is enough: pass its path, or its folder"
        ) from error


@contextmanager
def no_memory() -> Iterator[None]:
    """Within it every tensor that is made is fake. They pose as the CPU's: without a GPU, autograd knows no others."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        yield


def make_model(spec: ModelSpec) -> PreTrainedModel:
    """The model of a specification; to be called within `no_memory`.

    Raises:
        `ValueError`: no such configuration, or a model that cannot be made of it.
    """
    config = spec.config()
    kwargs: dict[str, Any] = {"dtype": dtype_of(spec, config)}
    if spec.attention is not None:
        kwargs["attn_implementation"] = spec.attention
    # A run loads all of a model that sees, whatever its rows are.
    sees = is_vision_language(config)
    cls, config = (AutoModelForImageTextToText, config) if sees else (AutoModelForCausalLM, config.get_text_config())
    # Some random weights are drawn by the values of others, which fake tensors have none of.
    with trying(f"{spec.source} cannot be made from its configuration"), no_init_weights():
        model = cls.from_config(config, **kwargs)
        model.tie_weights()
    if spec.bits is not None:
        quantise_(model, spec.bits, double_quant=spec.double_quant)
    return model


def with_adapters(model: PreTrainedModel, config: LoraConfig) -> Any:
    """The model with adapters, as PEFT makes them; to be called within `no_memory`."""
    # PEFT would move its adapters, which fake tensors refuse. They begin in float32, and PEFT keeps them so.
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        return get_peft_model(model, copy.deepcopy(config))


def dtype_of(spec: ModelSpec, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that the weights are loaded in."""
    if spec.dtype not in (None, "auto"):
        return DTYPES[str(spec.dtype).removeprefix("torch.")]
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found or torch.float32


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight takes the bytes of `bits`, and that of its dtype while it is multiplied."""

    bits: int
    double_quant: bool

    def forward(self, input: Tensor) -> Tensor:
        return _Dequantised.apply(input, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """The bytes of the weight and of what bitsandbytes needs to restore it."""
        numbers = self.weight.numel()
        if self.bits == 8:
            return numbers + 4 * self.out_features
        blocks = -(-numbers // BLOCK)
        if not self.double_quant:
            return -(-numbers // 2) + 4 * blocks + CODES[4]
        return -(-numbers // 2) + blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + 4 + CODES[4] + CODES[8]


class _Dequantised(torch.autograd.Function):
    """A product with a weight that exists only during the product, in forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(input.to(weight.dtype), weight.clone(), bias).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        gradient = gradients[0]
        return (gradient.to(weight.dtype) @ weight.clone()).to(gradient.dtype), None, None


def quantise_(model: PreTrainedModel, bits: int, *, double_quant: bool) -> None:
    """Makes the linear layers quantised ones, all but the head, as transformers does it with bitsandbytes."""
    head = head_layer(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module) is nn.Linear and module is not head and module.weight is not head.weight:
            module.__class__ = QuantisedLinear
            module.bits, module.double_quant = bits, double_quant  # pyright: ignore[reportArgumentType]
            module.weight.requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, tied ones once."""
    quantised = {id(m.weight): m.nbytes for m in model.modules() if isinstance(m, QuantisedLinear)}
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    return sum(quantised.get(key, tensor.nbytes) for key, tensor in tensors.items())


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of parameters, tied ones once; those that are trained, if asked."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


class ParameterShape(NamedTuple):
    """A parameter: its shape, the bytes of a number, and whether it is trained."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def parameter_shapes(model: nn.Module) -> tuple[ParameterShape, ...]:
    """All parameters, tied ones once."""
    return tuple(ParameterShape(tuple(p.shape), p.itemsize, p.requires_grad) for p in model.parameters())


def layer_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """The bytes of the largest layer, and of all parameters that belong to none: embeddings, final norm, head.

    Layers are what engines gather at a time, those of a tower among them: the modules that transformers never splits.
    """
    whole = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in whole] or [*decoder_layers(model)[1]]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return max(map(weight_bytes, layers)), sum(p.nbytes for p in model.parameters() if id(p) not in inside)
