"""The insides of transformers models: backbone, head, true vocabulary, cache. No other file looks past `model(...)`.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy
import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_distill.losses.fused_linear import Head

# Where a configuration keeps the factor of its logits, and whether the logits are divided by it.
LOGIT_SCALES = {"logit_scale": False, "output_multiplier": False, "lm_head_multiplier": False, "logits_scaling": True}
MULTIPLIES_BY_LOGITS_SCALING = {"hyperclovax"}
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The checks that a model has passed when something was called with it that needs them.
_PASSED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, adapters included; the model itself where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would keep the cache empty; afterwards all is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trying(action: str) -> Iterator[None]:
    """Within it a model is tried out; an error becomes a `ValueError` that begins with what the model cannot do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{action}: {type(error).__name__}: {error}") from error


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings, (V, D)."""
    with trying(f"{type(model).__name__} has no table of token embeddings and cannot read texts"):
        return model.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its inputs; of an offloaded one, whose weights are elsewhere, where it is computed."""
    weight = embedding_weight(model)
    if weight.device.type != "meta":
        return weight.device
    return torch.device(model.get_input_embeddings()._hf_hook.execution_device)  # pyright: ignore


def num_token_ids(model: PreTrainedModel) -> int:
    """How many token ids a model has embeddings for, split by ZeRO-3 or not."""
    weight = embedding_weight(model)
    return getattr(weight, "ds_shape", weight.shape)[0]


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Within it, models that ZeRO-3 has split are whole on every process; all processes have to come here."""
    split = [parameter for model in models for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module that any engine may have split, whole and on the CPU; all processes have to come here."""
    with gathered(module):
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
            for name, tensor in module.state_dict().items()
        }


def head_of(model: PreTrainedModel) -> Head:
    """The output layer of a causal language model with its bias, logit scale and soft-cap."""
    layer, config = _output_layer(model), model.config.get_text_config()
    return Head(layer.weight, getattr(layer, "bias", None), _logit_scale(config), _softcap(config))


def head_layer(model: PreTrainedModel) -> nn.Module:
    """The layer whose weight `head_of` takes; of a head that PEFT trains (`modules_to_save`) its own copy."""
    layer = _output_layer(model)
    return next((part for part in layer.modules() if part._parameters.get("weight") is layer.weight), layer)


def readable(input_ids: Tensor, num_ids: int) -> Tensor:
    """Token ids with 0 for those that a model of `num_ids` embeddings has none for: padding, which nobody reads.

    A pad token is often added without a row for it, and -1 pads, too. Everything that reads tokens comes through here.
    """
    return input_ids.masked_fill((input_ids < 0) | (input_ids >= num_ids), 0)


def drop_unreadable_padding(model: PreTrainedModel) -> None:
    """Takes a pad token that has no embedding out of the configurations: a model saved with it would not load."""
    for config in (model.config.get_text_config(), model.generation_config):
        pad = getattr(config, "pad_token_id", None)
        if pad is not None and not 0 <= pad < num_token_ids(model):
            config.pad_token_id = None  # pyright: ignore[reportOptionalMemberAccess]


def _output_layer(model: PreTrainedModel) -> Any:
    layer = model.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), Tensor):  # several for audio codes, or none
        raise ValueError(f"{type(model).__name__} has not one output layer over tokens; it is not supported")
    return layer


def backbone(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head is applied to.

    Where `base_model` is the model itself, because its class gives that part another name (Llama 4, Mllama), it is the
    part with the input embeddings.

    Raises:
        `ValueError`: there is no such part.
    """
    if model.base_model is not model:
        return model.base_model
    embeddings = model.get_input_embeddings()
    for part in model.children():
        if part is not embeddings and any(module is embeddings for module in part.modules()):
            return part
    raise ValueError(
        f"{type(model).__name__} has no module of its own before its output layer, whose hidden states could be taken; "
        "this architecture is not supported"
    )


def last_hidden_states(model: PreTrainedModel, *, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """What the head is applied to, (B, T, D), without running the head."""
    return backbone(model)(
        input_ids=readable(input_ids, num_token_ids(model)), **inputs, use_cache=False
    ).last_hidden_state


def cache_keyword(model: nn.Module) -> str:
    """The keyword by which a model's forward takes a cache: `cache` since transformers 5.24, not so in remote code."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def label_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict a label-bearing token, and those tokens.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): as a causal language model takes them, not shifted, -100 is masked.

    Returns:
        Indices `(N,)` into the flattened (B * T) positions, and the labels `(N,)` of the tokens that follow them.
    """
    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    positions = (following != -100).nonzero().squeeze(-1)
    return positions, following[positions]


def select_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (B, T, D) at flat positions (N,), as (N, D)."""
    return hidden.flatten(0, 1).index_select(0, positions.to(hidden.device))


def num_layers(config: PreTrainedConfig) -> int:
    """How many layers a configuration has; `ValueError` where it does not say."""
    number = getattr(config, "num_hidden_layers", None)
    if number is None:
        raise ValueError(
            f"{config.model_type} does not say how many layers it has (num_hidden_layers), so none can be chosen"
        )
    return number


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's layers: the outermost list with as many modules as its configuration has layers."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, blocks) for name, blocks in lists if name.count(".") == depth]
    if len(outermost) != 1 or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has not one list of {number} layers: only decoder-only models have")
    return outermost[0]


def hidden_widths(model: PreTrainedModel, layers: Iterable[int], name: str) -> dict[int, int]:
    """The width of the hidden states after each layer, found with a few tokens.

    Raises:
        `ValueError`: what comes out of a layer is no vector per token, or not what transformers returns as the hidden
            states after that layer (after the last one: after the final norm).
    """
    called = f"the {name} ({type(model).__name__})"
    blocks = decoder_layers(model)[1]
    ids = torch.arange(8, 13, device=input_device(model)).unsqueeze(0) % num_token_ids(model)
    found: dict[int, list[Any]] = {index: [] for index in range(len(blocks))}
    with torch.no_grad(), evaluating(model), ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(
                block.register_forward_hook(
                    lambda _, __, output, index=index: found[index].append(layer_output(output))
                )
            )
        with trying(f"{called} does not return its hidden states, which hidden_weight compares"):
            outputs = backbone(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
            states = outputs.hidden_states
            found[len(blocks) - 1][-1:] = [outputs.last_hidden_state]
            right = {
                index: outputs[0].shape[:-1] == ids.shape
                and len(outputs) == 1
                and len(states) == len(blocks) + 1
                and torch.equal(states[index + 1].to(outputs[0].device), outputs[0])
                for index, outputs in found.items()
            }
    if strange := [layer for layer in layers if not right[layer]]:
        raise ValueError(
            f"what comes out of layer {strange[0]} of {called} is not the hidden states that it returns for it, "
            "one vector per token: choose other layers with hidden_layers, or set hidden_weight to 0"
        )
    return {layer: found[layer][0].shape[-1] for layer in layers}


def layer_output(output: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    return output if isinstance(output, Tensor) else output[0]


def expose_hidden_states(model: PreTrainedModel) -> None:
    """Lets `model(..., with_hidden=function)` return `function(backbone_outputs, head)`, called as the head's forward.

    A loss that reads the head's weight runs in the place of the head, inside the forward of the outermost wrapper: only
    there DDP, FSDP and ZeRO have the weight whole, and only so do they see its gradient. Without `with_hidden` the
    forward is the one it was.
    """
    original_forward = model.forward
    num_ids = num_token_ids(model)  # here: in a forward, ZeRO-3 would gather the embeddings to look at their shape

    @functools.wraps(original_forward)
    def forward(self, *args, with_hidden: Callable | None = None, **kwargs):
        if isinstance(ids := kwargs.get("input_ids"), Tensor):
            kwargs["input_ids"] = readable(ids, num_ids)
        if with_hidden is None:
            return original_forward(*args, **kwargs)
        kwargs.pop("labels", None)
        outputs = backbone(self)(*args, **kwargs, use_cache=False)
        layer = head_layer(self)

        def in_place_of_logits(hidden: Tensor):
            outputs.last_hidden_state = hidden  # engines mark what enters a layer
            return with_hidden(outputs, head_of(self))

        with patch.object(layer, "forward", in_place_of_logits):
            return layer(outputs.last_hidden_state)

    model.forward = types.MethodType(forward, model)


class WholeCopy:
    """A model that its engine will split over processes, whole on each of them for a while: to write text with.

    The engine's hooks stay behind, so the copy's forwards need no other process, which may make more or fewer of them.
    Between uses it has no weights.

    Args:
        model (`PreTrainedModel` or `PeftModel`): not prepared by the engine yet; ZeRO-3 may have split it.
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
        """Within it the copy is there, its floating-point weights in `dtype`; all processes have to come here."""
        whole: dict[int, nn.Parameter] = {}  # tied weights once
        try:
            with gathered(self._model):
                for name, parameter in self._model.named_parameters(remove_duplicate=False):
                    if (slot := self._slots.get(name.replace("_checkpoint_wrapped_module.", ""))) is None:
                        continue  # of a projector
                    if id(parameter) not in whole:
                        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
                        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
                        whole[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
                    slot[0]._parameters[slot[1]] = whole[id(parameter)]
                self._copy.to(next(iter(whole.values())).device)  # buffers
                copy_ = causal_lm(self._copy)
                # The copy of a checked model need not be checked, and could not be: its `forward` is the original's.
                _PASSED[copy_] = _PASSED.get(causal_lm(self._model), set())
                yield copy_
        finally:
            for module, name in self._slots.values():
                module._parameters[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


class CachedReader:
    """Reads B texts of different lengths, a few tokens at a time, and takes the last of them back, row by row.

    Keys and values stay flush right in the cache: the tokens of a row fill its last slots without a gap. So left
    padding is all there is to mask, and a distance in slots is one in tokens, which is what sliding windows count.

    Args:
        model (`PreTrainedModel`): a causal language model whose cache is nothing but keys and values.
        ids (`torch.Tensor` of shape `(B, P)`), mask (`torch.Tensor` of shape `(B, P)`): texts, left-padded.
    """

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self._model = causal_lm(model)
        self.head = head_of(self._model)
        self.device = input_device(self._model)
        self.lengths = mask.sum(1).to(self.device)  # (R,) tokens of each text, those not read yet included
        self._unread = ids.to(self.device)
        self._cache = DynamicCache()
        self._cache_keyword = cache_keyword(backbone(self._model))

    def read(self, ids: Tensor | None = None) -> Tensor:
        """Reads what is not read yet, then `ids` (R, q), which every text gets; the last hidden states (R, n, D)."""
        tokens = self._unread if ids is None else torch.cat([self._unread, ids.to(self.device)], 1)
        self.lengths = self.lengths + tokens.shape[1] - self._unread.shape[1]
        self._unread = tokens[:, :0]
        slots = self._cache.get_seq_length() + tokens.shape[1]
        order = torch.arange(slots, device=self.device) - (slots - self.lengths[:, None])  # (R, slots); padding < 0
        outputs = backbone(self._model)(
            input_ids=readable(tokens, num_token_ids(self._model)),
            attention_mask=(order >= 0).long(),
            position_ids=order[:, -tokens.shape[1] :].clamp(min=0),
            use_cache=True,
            **{self._cache_keyword: self._cache},
        )
        if self._cache.get_seq_length() != slots:
            raise RuntimeError(f"its forward does not fill the cache that it is given as {self._cache_keyword}")
        return outputs.last_hidden_state

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """Goes on with some rows, which forget their last tokens and get another one, to be read next.

        Args:
            rows (`torch.Tensor` of shape `(r,)`): the rows to keep.
            counts (`torch.Tensor` of shape `(r,)`): how many of the tokens read each of them forgets.
            following (`torch.Tensor` of shape `(r,)`): the token that each of them goes on with.
        """
        rows = rows.to(self.device)
        lengths = self.lengths[rows] - counts.to(self.device)
        slots = int(lengths.max())
        first = self._cache.get_seq_length() - self.lengths[rows]  # the slot of each text's first token
        order = torch.arange(slots, device=self.device) - (slots - lengths[:, None])
        taken = (order + first[:, None]).clamp(min=0)  # (r, slots): what is clamped is padding
        for layer in self._cache.layers:
            layer.keys, layer.values = (self._taken(tensor, rows, taken) for tensor in (layer.keys, layer.values))  # pyright: ignore
        self.lengths = lengths + 1
        self._unread = following.to(self.device).unsqueeze(1)

    @staticmethod
    def _taken(tensor: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Keys or values (R, heads, S, width) of some rows (r,) at their own slots (r, s)."""
        # Two indices around a slice come first: (r, s, heads, width).
        return tensor[rows.to(tensor.device)[:, None], :, slots.to(tensor.device)].transpose(1, 2)


class KVCapture:
    """Keys and values of some layers of a causal language model, as its attention gets them, with their gradient.

    They are taken where every family hands them to the attention function, after key norms, fused projections and
    adapters, before heads are repeated; so there is one way for all families, with and without gradient checkpointing,
    and no cache. Keys before the rotary embedding are what the family's own rotary function is given.

        with capture(positions):
            model(**inputs)
        keys, values = capture.features(layer)  # (N, F) each

    Args:
        model (`PreTrainedModel`): with softmax attention in all captured layers.
        layers (`Iterable[int]`): which layers.
        kv_positions (`str`): "pre" or "post": keys before or after the rotary embedding.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int], kv_positions: str = "pre") -> None:
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (B, H, T, E) of each layer
        self.positions: Tensor | None = None
        self._layers = set(layers)
        self._pre = kv_positions == "pre"
        self._modules = {id(module) for module in model.modules()}
        self._files = {sys.modules[type(m).__module__] for m in model.modules() if hasattr(m, "layer_idx")}
        self._unrotated: Tensor | None = None
        self.num_calls: Counter[int] = Counter()  # of each layer's attention

    @contextmanager
    def __call__(self, positions: Tensor | None = None) -> Iterator[None]:
        """Within it, the model's forwards are watched; of each layer only flat `positions` (N,) of (B * T) are kept."""
        self.heads, self.positions, self._unrotated = {}, positions, None
        with ExitStack() as stack:
            choose = ALL_ATTENTION_FUNCTIONS.get_interface
            watched = lambda *args: functools.partial(self._attend, choose(*args))  # noqa: E731
            stack.enter_context(patch.object(ALL_ATTENTION_FUNCTIONS, "get_interface", watched))
            for file in self._files:
                if rotate := getattr(file, "apply_rotary_pos_emb", None):
                    # Of two models of one file, the second finds the first one's in its place, and its signature.
                    watched = functools.update_wrapper(functools.partial(self._rotate, rotate), rotate)
                    stack.enter_context(patch.object(file, "apply_rotary_pos_emb", watched))
            yield

    def _rotate(self, rotate: Callable, *args, **kwargs):
        # Most families rotate queries and keys together; some one by one, the keys last.
        one_by_one = next(iter(inspect.signature(rotate).parameters)) == "x"
        key = args[0] if one_by_one else args[1]
        self._unrotated = key.transpose(1, 2) if kwargs.get("unsqueeze_dim") == 2 else key  # (B, H, T, E)
        return rotate(*args, **kwargs)

    def _attend(self, attend: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        layer = getattr(module, "layer_idx", None)
        unrotated, self._unrotated = self._unrotated, None
        if id(module) in self._modules and layer in self._layers:
            kept = key
            if self._pre and unrotated is not None:
                # Of a partial rotary embedding only the first numbers of each head go through it.
                kept = torch.cat([unrotated, key[..., unrotated.shape[-1] :]], -1)
            # Nothing that autograd would remember may happen here: checkpointing would miss it when it recomputes.
            self.heads[layer] = kept, value
            self.num_calls[layer] += 1
        return attend(module, query, key, value, *args, **kwargs)

    def features(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H * E) of a layer, at the positions asked for."""
        keys, values = (heads.transpose(1, 2).flatten(2) for heads in self.heads[layer])  # (B, T, H * E)
        if self.positions is None:
            return keys.flatten(0, 1), values.flatten(0, 1)
        return select_positions(keys, self.positions), select_positions(values, self.positions)


def kv_widths(model: PreTrainedModel, layers: Iterable[int], name: str, kv_positions: str = "pre") -> dict[int, int]:
    """The width of the keys of each layer, found by capturing those of a few tokens.

    Raises:
        `ValueError`: a layer has no keys and values that can be captured: latent (MLA) or no softmax attention.
    """
    layers = list(layers)
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"the {name} ({type(model).__name__}) has multi-head latent attention: its keys are made anew from a "
            "latent vector, so keys and values cannot be compared; distil hidden states instead"
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
        # Differential attention attends twice, with halves of its values.
        if len(keys) != 5 or keys.shape != values.shape or capture.num_calls[i] > 1
    ]
    if missing or strange:
        raise ValueError(
            f"layer {(missing + strange)[0]} of the {name} ({type(model).__name__}) has no keys and values of one "
            "width per token (a state-space or another attention layer); choose other layers with kv_layers"
        )
    return {layer: keys.shape[1] for layer, (keys, _) in found.items()}


def load_balancing_loss(model: PreTrainedModel, outputs, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss of a mixture-of-experts model, without its coefficient (Switch, 2101.03961, eq. 4)."""
    # Nearly every family takes this function from Mixtral; `check_load_balancing` finds the others.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(outputs.router_logits, num_experts, config.num_experts_per_tok, attention_mask)  # pyright: ignore


def check_load_balancing(model: PreTrainedModel, name: str) -> None:
    """Compares `load_balancing_loss` with the auxiliary loss that the model itself returns for a few tokens.

    Raises:
        `ValueError`: the model has another one, or none.
    """
    called = f"the load-balancing loss of the {name} ({type(model).__name__})"
    remedy = "set router_aux_loss_coef=0.0 to train without it"
    ids = torch.arange(8, 12, device=input_device(model)).unsqueeze(0) % num_token_ids(model)
    inputs: Any = {"input_ids": ids, "use_cache": False, "output_router_logits": True}
    with torch.no_grad(), evaluating(model), trying(f"{called} cannot be computed; {remedy}"):
        expected = torch.as_tensor(model(**inputs).aux_loss)
        found = load_balancing_loss(model, backbone(model)(**inputs), None)
    if not (found - expected).abs() <= 0.02 * expected.abs():
        raise ValueError(f"{called} is not that of Mixtral; {remedy}")


def _remembered(check: Callable[[PreTrainedModel, str], None]) -> Callable[[PreTrainedModel, str], None]:
    """A check that notes which models have passed it."""

    @functools.wraps(check)
    def checked(model: PreTrainedModel, name: str) -> None:
        check(model, name)
        _PASSED.setdefault(model, set()).add(check.__name__)

    return checked


def ensure(check: Callable[[PreTrainedModel, str], None], model: PreTrainedModel, name: str) -> None:
    """Runs `check(model, name)` unless this model has passed it: what is called in a loop checks a model once."""
    if check.__name__ not in _PASSED.get(model, ()):
        check(model, name)


@_remembered
def check_head(model: PreTrainedModel, name: str) -> None:
    """Compares `head_of(model)` with the logits that the model itself returns for a few tokens.

    Raises:
        `ValueError`: the model computes its logits in a way that `head_of` does not know, so that every loss would be
            wrong; it reads ahead; or it does not read plain token ids at all.
    """
    called = f"the {name} ({type(model).__name__})"
    ids = torch.tensor([[8, 9, 10, 11], [8, 9, 10, 12]], device=input_device(model)) % num_token_ids(model)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    mixed = f" (its weights are {' and '.join(sorted(dtypes))}: load it in one dtype)" if len(dtypes) > 1 else ""
    unfit = f"{called} cannot be read as a backbone and an output layer{mixed}"
    with trying(unfit):
        head = head_of(model)
    if not head.weight.is_floating_point():
        raise ValueError(f"the {name}'s output layer is quantised; load it with the output layer left out (lm_head)")
    with torch.no_grad(), evaluating(model), trying(unfit):
        hidden = last_hidden_states(model, input_ids=ids)
        # A head of another dtype than the body's is no hindrance to the losses, but to the model by itself.
        lower = min(hidden.dtype, head.weight.dtype, key=lambda dtype: dtype.itemsize)
        is_mixed = hidden.dtype != head.weight.dtype
        is_exact = lower == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        with torch.autocast(hidden.device.type, dtype=lower) if is_mixed else nullcontext():
            expected = model(input_ids=ids, use_cache=False).logits.float()
            found = head.logits(hidden.to(head.weight.device)).float()
    if not expected.isfinite().all():
        raise ValueError(f"the {name}'s logits are not finite: its weights are damaged, or its dtype cannot hold them")
    scale = expected.abs().max().clamp(min=1.0)
    # In float32, TF32 included, a soft-cap far above the logits shows as well.
    tolerance = (2e-3 if is_exact else 0.05) * scale.to(found.device)
    if expected.shape != found.shape or not (expected.to(found.device) - found).abs().max() <= tolerance:
        raise ValueError(
            f"{called} does not compute its logits as its output layer, bias, logit scale and soft-cap say, so losses "
            "on hidden states would be wrong; this architecture is not supported"
        )
    # Nothing but the last token differs; where it cannot be seen, the difference is 0.
    if (hidden[0, :3] - hidden[1, :3]).abs().max() > 5e-3 * hidden.abs().max():
        raise ValueError(
            f"{called} reads ahead: it knows the tokens that it is to predict. It is no causal language model"
        )


def check_length(model: PreTrainedModel, name: str, length: int) -> None:
    """Tries a text of one token more than a model was made for, if `length` goes beyond that.

    Rotary positions go on, more or less well. Learned ones are a table that ends, and on a GPU its end kills the run.

    Raises:
        `ValueError`: the model cannot read as much.
    """
    limit = num_positions(model)
    if limit is None or length <= limit:
        return
    ids = torch.zeros(1, limit + 1, dtype=torch.long, device=input_device(model))
    refusal = f"the {name} ({type(model).__name__}) has {limit} positions, and a text has {length} tokens"
    with torch.no_grad(), evaluating(model), trying(f"{refusal}: set max_length to at most {limit}"):
        last_hidden_states(model, input_ids=ids).sum().item()  # which waits for what has failed


@_remembered
def check_cache(model: PreTrainedModel, name: str) -> None:
    """Reads two short texts in pieces, takes some of it back, and compares with reading them at once.

    Raises:
        `ValueError`: the model remembers more than keys and values (a recurrent state, say), or not one per token.
    """
    device = input_device(model)
    texts = torch.arange(14, device=device).view(2, 7) % num_token_ids(model)
    refusal = f"the {name} ({type(model).__name__}) cannot take back what it has read, which rollouts need"
    remedy = "only models whose cache is keys and values can be used"
    with torch.no_grad(), evaluating(model), trying(f"{refusal} ({remedy})"):
        mask = torch.tensor([[1, 1, 1], [0, 0, 1]], device=device)
        reader = CachedReader(model, texts[:, :3], mask)
        reader.read(texts[:, 3:6])
        reader.rewind(torch.tensor([1, 0]), torch.tensor([1, 2]), texts[[1, 0], [5, 4]])
        found = reader.read(texts[[1, 0], [6, 5]].unsqueeze(1))[:, -1]
        rows = texts[1:, 2:7], texts[:1, :6]
        expected = torch.cat([last_hidden_states(model, input_ids=row)[:, -1] for row in rows])
    if not (found - expected).abs().max() <= 0.05 * expected.abs().max():
        raise ValueError(f"{refusal}: its hidden states are others than those of the whole text; {remedy}")


def keep_4bit_weights(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place on CPUs with avx512_bf16.

    It does so in the first forward in eval mode; gradients are zero from then on, and saves and merges wrong.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def num_positions(model: nn.Module) -> int | None:
    """How many tokens a model was made for, at most, if its configuration says so; stretched rotary positions count."""
    config = causal_lm(model).config.get_text_config()
    size, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    factors = [part.get("factor") or 1 for part in (rope, *rope.values()) if isinstance(part, dict)]
    return None if size is None else int(size * max(1, *factors))


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """How many token ids, from 0 on, mean the same to both tokenizers.

    Tokens that one side has added at the end (`<pad>`) do not make another vocabulary.

    Raises:
        `ValueError`: the vocabularies differ before one of them ends.
    """
    student_tokens = {index: token for token, index in student.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher.get_vocab().items()}
    size = min(max(student_tokens), max(teacher_tokens)) + 1
    different = [i for i in range(size) if student_tokens.get(i) != teacher_tokens.get(i)]
    if different:
        examples = ", ".join(f"{i}: {student_tokens.get(i)!r} / {teacher_tokens.get(i)!r}" for i in different[:5])
        raise ValueError(
            f"student and teacher have different vocabularies: {len(different):,} of {size:,} token ids do not mean "
            f"the same (id: student / teacher: {examples}). Choose a student and a teacher of one family, or let "
            "KDTrainer align their texts (cross_tokenizer='auto')"
        )
    return size


def shared_parameters(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the student's trainable parameters whose memory is also the teacher's."""
    taken = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad and p.numel()]
    return [name for name, parameter in trainable if parameter.data_ptr() in taken]


def _logit_scale(config) -> float:
    for name, divides in LOGIT_SCALES.items():
        scale = getattr(config, name, None)
        if scale is not None:
            return 1 / scale if divides and config.model_type not in MULTIPLIES_BY_LOGITS_SCALING else scale
    return 1.0


def _softcap(config) -> float | None:
    return next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None)) is not None), None)
