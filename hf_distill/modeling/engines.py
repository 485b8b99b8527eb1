"""Weights that are split or quantised (FSDP2, ZeRO-3, bitsandbytes), and a loss inside a model's forward."""

import copy
import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_distill.modeling.parts import (
    backbone,
    causal_lm,
    head_layer,
    head_of,
    in_place_of_head,
    num_token_ids,
    readable,
)
from hf_distill.modeling.probes import PASSED
from hf_distill.modeling.vision import merges_outside

SAMPLED_VALUES = 64  # of each parameter, in a fingerprint


def is_split(model: nn.Module) -> bool:
    """True if ZeRO-3 has split a model, as it does while it loads one."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Makes models that ZeRO-3 has split whole on every process for a while; all processes have to come here."""
    split = [parameter for model in models for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module that an engine may have split, whole and on the CPU; all processes have to come here."""
    with gathered(module):
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
            for name, tensor in module.state_dict().items()
        }


class WholeCopy:
    """A copy of a split model that is whole on each process for a while, to generate text.

    It has none of the engine's hooks, so its forwards involve no other process: processes may make different numbers of
    forwards. Between uses it has no weights.

    Args:
        model (`PreTrainedModel` or `PeftModel`): not prepared by the engine yet; ZeRO-3 may have split it already.
    """

    def __init__(self, model: nn.Module) -> None:
        nowhere = torch.empty(0, device="meta")
        memo = {id(p): nn.Parameter(nowhere.to(p.dtype), requires_grad=False) for p in model.parameters()}
        self._copy = copy.deepcopy(model, memo)
        self._model = model
        self._slots = {
            f"{prefix}.{name}" if prefix else name: (module, name)
            for prefix, module in self._copy.named_modules(remove_duplicate=False)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    @contextmanager
    def __call__(self, dtype: torch.dtype | None = None) -> Iterator[PreTrainedModel]:
        """The copy, with its floating-point weights in `dtype`; all processes have to come here."""
        whole: dict[int, nn.Parameter] = {}  # tied weights once
        try:
            with gathered(self._model):
                for name, parameter in self._model.named_parameters(remove_duplicate=False):
                    if (slot := self._slots.get(name.replace("_checkpoint_wrapped_module.", ""))) is None:
                        continue  # a projector's parameter
                    if id(parameter) not in whole:
                        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
                        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
                        whole[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
                    slot[0]._parameters[slot[1]] = whole[id(parameter)]
                self._copy.to(next(iter(whole.values())).device)  # buffers
                copy_ = causal_lm(self._copy)
                # A copy inherits the checks of its model. It could not be checked: its `forward` is the original's.
                PASSED[copy_] = PASSED.get(causal_lm(self._model), set())
                yield copy_
        finally:
            for module, name in self._slots.values():
                module._parameters[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


def expose_hidden_states(model: PreTrainedModel) -> None:
    """Lets `model(..., with_hidden=function)` return `function(backbone_outputs, head)`, called as the head's forward.

    So a loss that reads the head's weight runs in place of the head, inside the forward of the outermost wrapper. Only
    there DDP, FSDP and ZeRO hold the whole weight, and only there do they see its gradient. Without `with_hidden` the
    forward is unchanged.
    """
    original_forward = model.forward
    num_ids = num_token_ids(model)  # not in the forward, where ZeRO-3 would gather the embeddings for it

    @functools.wraps(original_forward)
    def forward(self, *args, with_hidden: Callable | None = None, **kwargs):
        if isinstance(ids := kwargs.get("input_ids"), Tensor):
            kwargs["input_ids"] = readable(ids, num_ids)
        if with_hidden is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)
        layer, body = head_layer(self), backbone(self)
        if merges_outside(self, body):

            def terms_of(hidden: Tensor):
                return with_hidden(BaseModelOutput(last_hidden_state=hidden), head_of(self))

            return in_place_of_head(self, terms_of, original_forward, *args, **kwargs, use_cache=False)
        outputs = body(*args, **kwargs, use_cache=False)

        def in_place_of_logits(hidden: Tensor):
            outputs.last_hidden_state = hidden  # engines wrap the inputs of a layer
            return with_hidden(outputs, head_of(self))

        with patch.object(layer, "forward", in_place_of_logits):
            return layer(outputs.last_hidden_state)

    model.forward = types.MethodType(forward, model)


def without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device, in which 4-bit and 8-bit layers are plain linear layers."""
    copies: dict[int, Any] = {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            shape = module.in_features, module.out_features
            copies[id(module)] = nn.Linear(*shape, module.bias is not None, device="meta")
    return copy.deepcopy(model, copies)


def weights_kind(model: nn.Module) -> str:
    """The kind of a model's weights, for people: their dtype, or the bits that they are quantised to."""
    base: Any = causal_lm(model)
    config = getattr(base.config, "quantization_config", None)
    if config is None:
        return str(base.dtype)
    config = config if isinstance(config, dict) else config.to_dict()
    bits = next((bits for bits in (4, 8) if config.get(f"load_in_{bits}bit")), config.get("bits"))
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    return f"{bits}-bit ({method})" if bits else str(method)


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters: their names, shapes and dtypes, and some values of each.

    Adapters that are switched off with `teacher_model='base'`, and whatever else is trained, do not count. All
    processes have to come here. Offloaded and split weights are read a module at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, module in model.named_modules():
        named = {name: p for name, p in module.named_parameters(recurse=False) if not p.requires_grad}
        if not named:
            continue
        with gathered(module), align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                if name not in named:
                    continue
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                flat = whole.detach().flatten()
                places = torch.arange(SAMPLED_VALUES, device=flat.device) * (len(flat) - 1) // (SAMPLED_VALUES - 1)
                values = flat[places].cpu().view(torch.uint8) if len(flat) else flat.cpu()
                digest.update(f"{path}.{name} {tuple(whole.shape)} {whole.dtype}".replace(".base_layer", "").encode())
                digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def keep_4bit_weights(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place on CPUs with avx512_bf16.

    It does so in the first forward in eval mode. From then on gradients are zero, and saved or merged weights wrong.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
