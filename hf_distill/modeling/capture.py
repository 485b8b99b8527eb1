"""The output of inner layers: hidden states, and keys and values on their way into the attention.

Shapes: B batch, T tokens, N positions, H heads of keys, E width of a head.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.modeling.parts import (
    backbone,
    decoder_layers,
    evaluating,
    input_device,
    last_hidden_states,
    layer_input,
    layer_output,
    num_token_ids,
    select_positions,
    trying,
)


class KVCapture:
    """Keys and values of some layers of a causal language model, as its attention receives them, with their gradient.

    They are captured where a family calls transformers' attention function: after key norms, fused projections and
    adapters, before heads are repeated. So one way serves all these families, with and without gradient checkpointing,
    and no cache is needed. Families with an attention of their own (BLOOM, GPT-J, Falcon) hand keys and values to a
    cache, if they have one: they get one that only looks at them. Keys before the rotary embedding are captured where
    the family calls its own rotary function.

        with capture(positions):
            model(**inputs)
        keys, values = capture.features(layer)  # (N, F) each

    Args:
        model (`PreTrainedModel`): has softmax attention in all captured layers.
        layers (`Iterable[int]`): the layers to capture.
        kv_positions (`str`): "pre" or "post": keys before or after the rotary embedding.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int], kv_positions: str = "pre") -> None:
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (B, H, T, E) of each layer
        self.positions: Tensor | None = None
        self._layers = set(layers)
        self._pre = kv_positions == "pre"
        self._modules = {id(module) for module in model.modules()}
        self._files = {sys.modules[type(m).__module__] for m in model.modules() if hasattr(m, "layer_idx")}
        self._cached = {m: name for m in model.modules() if (name := _cache_of_its_own(m)) is not None}
        self._unrotated: Tensor | None = None
        self.num_calls: Counter[int] = Counter()  # of each layer's attention

    @contextmanager
    def __call__(self, positions: Tensor | None = None) -> Iterator[None]:
        """Captures the model's forwards for a while; `features` returns flat `positions` (N,) of (B * T) only."""
        self.heads, self.positions, self._unrotated = {}, positions, None
        with ExitStack() as stack:
            choose = ALL_ATTENTION_FUNCTIONS.get_interface
            watched = lambda *args: functools.partial(self._attend, choose(*args))  # noqa: E731
            stack.enter_context(patch.object(ALL_ATTENTION_FUNCTIONS, "get_interface", watched))
            for module, keyword in self._cached.items():
                hook = functools.partial(self._lend_cache, keyword=keyword)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for file in self._files:
                if rotate := getattr(file, "apply_rotary_pos_emb", None):
                    # For two models of one file, the second wraps the wrapper of the first, and needs its signature.
                    watched = functools.update_wrapper(functools.partial(self._rotate, rotate), rotate)
                    stack.enter_context(patch.object(file, "apply_rotary_pos_emb", watched))
            yield

    def _rotate(self, rotate: Callable, *args, **kwargs):
        # Most families rotate queries and keys in one call; some in two, the keys last, or first (GPT-J).
        first = next(iter(inspect.signature(rotate).parameters))
        if first != "tensor":
            key = args[0] if first == "x" else args[1]
            self._unrotated = key.transpose(1, 2) if kwargs.get("unsqueeze_dim") == 2 else key  # (B, H, T, E)
        elif self._unrotated is None:
            self._unrotated = args[0].transpose(1, 2)  # (B, H, T, E)
        return rotate(*args, **kwargs)

    def _lend_cache(self, module: nn.Module, args: tuple, kwargs: dict, keyword: str) -> tuple[tuple, dict]:
        return args, kwargs if kwargs.get(keyword) is not None else {**kwargs, keyword: _LookingCache(self._keep)}

    def _attend(self, attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        if id(module) in self._modules:
            self._keep(getattr(module, "layer_idx", None), key, value)
        return attend(module, query, key, value, *args, **kwargs)

    def _keep(self, layer: int | None, key: Tensor, value: Tensor) -> None:
        unrotated, self._unrotated = self._unrotated, None
        if layer in self._layers:
            kept = key
            if self._pre and unrotated is not None:
                # A partial rotary embedding turns only the first numbers of each head.
                kept = torch.cat([unrotated, key[..., unrotated.shape[-1] :]], -1)
            # No operation here may be recorded by autograd: checkpointing would not find it again when it recomputes.
            self.heads[layer] = kept, value
            self.num_calls[layer] += 1

    def features(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H * E) of a layer, at the chosen positions."""
        keys, values = (heads.transpose(1, 2).flatten(2) for heads in self.heads[layer])  # (B, T, H * E)
        if self.positions is None:
            return keys.flatten(0, 1), values.flatten(0, 1)
        return select_positions(keys, self.positions), select_positions(values, self.positions)


class _LookingCache:
    """Stands in for a cache without history: hands keys and values on as they come, after `keep(layer, ...)`."""

    def __init__(self, keep: Callable[[int, Tensor, Tensor], None]) -> None:
        self._keep = keep

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self._keep(layer, key, value)
        return key, value

    def get_seq_length(self, *_: object) -> int:
        return 0


def _cache_of_its_own(module: nn.Module) -> str | None:
    """The keyword of the cache of an attention layer that does not call transformers' attention function, else None."""
    numbered = hasattr(module, "layer_idx") or hasattr(module, "layer_id")
    if "attention" not in type(module).__name__.lower():
        return None  # a state-space layer, whose cache holds other states (Mamba)
    if not numbered or hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return None
    names = inspect.signature(module.forward).parameters
    return next((name for name in ("layer_past", "past_key_values", "cache") if name in names), None)


def kv_widths(model: PreTrainedModel, layers: Iterable[int], name: str, kv_positions: str = "pre") -> dict[int, int]:
    """The width of the keys of each layer, measured by capturing those of a few tokens.

    Raises:
        `ValueError`: the keys and values of a layer cannot be captured: latent attention (MLA), or no softmax.
    """
    layers = list(layers)
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"the {name} ({type(model).__name__}) has multi-head latent attention: its keys are computed from a latent "
            "vector, so keys and values cannot be compared; distil hidden states instead"
        )
    ids = torch.arange(5, device=input_device(model)).unsqueeze(0) % num_token_ids(model)
    capture = KVCapture(model, layers, kv_positions)
    refusal = (
        f"the keys and values of the {name} ({type(model).__name__}) cannot be captured {kv_positions} rotary embedding"
    )
    with torch.no_grad(), evaluating(model), capture(), trying(refusal):
        last_hidden_states(model, input_ids=ids)
    missing = [layer for layer in layers if layer not in capture.heads]
    found = {layer: capture.features(layer) for layer in capture.heads}
    strange = [
        i
        for i, (keys, values) in found.items()
        # Differential attention calls its attention twice, with halves of its values.
        if len(keys) != 5 or keys.shape != values.shape or capture.num_calls[i] > 1
    ]
    if missing or strange:
        raise ValueError(
            f"layer {(missing + strange)[0]} of the {name} ({type(model).__name__}) has no keys and values of one "
            "width per token that it hands to an attention function or a cache (a state-space layer, or an attention "
            "of its own); choose other layers with kv_layers"
        )
    return {layer: keys.shape[1] for layer, (keys, _) in found.items()}


@contextmanager
def layer_states(model: PreTrainedModel, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `keep(hidden)`, during a forward, with the input of every layer and then with the output of the last."""
    blocks = decoder_layers(model)[1]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: keep(layer_input(args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda _, __, output: keep(layer_output(output))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def layer_outputs(model: PreTrainedModel, layers: Iterable[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `keep(layer, hidden)`, during a forward, with the output of each of these layers."""
    layers = list(layers)
    blocks = decoder_layers(model)[1] if layers else []
    hooks = [
        blocks[layer].register_forward_hook(lambda _, __, output, layer=layer: keep(layer, layer_output(output)))
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hidden_widths(model: PreTrainedModel, layers: Iterable[int], name: str) -> dict[int, int]:
    """The width of the hidden states after each layer, measured with a few tokens.

    Raises:
        `ValueError`: the output of a layer is not one vector per token, or not what transformers returns as the hidden
            states of that layer (those of the last layer come after the final norm).
    """
    called = f"the {name} ({type(model).__name__})"
    depth = len(decoder_layers(model)[1])
    ids = torch.arange(8, 13, device=input_device(model)).unsqueeze(0) % num_token_ids(model)
    found: dict[int, list[Tensor]] = {layer: [] for layer in range(depth)}
    refusal = f"{called} does not return its hidden states, which hidden_weight compares"
    with torch.no_grad(), evaluating(model), trying(refusal):
        with layer_outputs(model, found, lambda layer, hidden: found[layer].append(hidden)):
            outputs = backbone(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = outputs.hidden_states
        found[depth - 1][-1:] = [outputs.last_hidden_state]
        right = {
            layer: hidden[0].shape[:-1] == ids.shape
            and len(hidden) == 1
            and len(states) == depth + 1
            and torch.equal(states[layer + 1].to(hidden[0].device), hidden[0])
            for layer, hidden in found.items()
        }
    if strange := [layer for layer in layers if not right[layer]]:
        raise ValueError(
            f"the output of layer {strange[0]} of {called} is not the hidden states that the model returns for it, one "
            "vector per token: choose other layers with hidden_layers, or set hidden_weight to 0"
        )
    return {layer: found[layer][0].shape[-1] for layer in layers}
