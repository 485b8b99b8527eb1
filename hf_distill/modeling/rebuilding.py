"""A model rebuilt with other layers: its configuration, its weights, and whether it computes what it should.

Shapes: B batch, T tokens, D hidden width.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.modeling.parts import decoder_layers, embedding_weight, evaluating, layer_input

# Settings of single layers that are not a list with one entry per layer: the numbers of the layers, or how many of the
# first ones. What else a family computes from the number of a layer is found by comparing (`check_layers`).
WHICH_LAYERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")

# Attributes in which a layer may differ from one that is made anew: its number, and what training switches on and off.
CHANGES_FREELY = {"layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing", "p"}


def layer_settings(config: PreTrainedConfig, names: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The settings of a configuration that have a value for each layer, as lists of these values.

    Args:
        names (iterable of `str`, *optional*): the settings to read; by default all that can be found.
    """
    if names is None:
        lists = [
            name
            for name, value in vars(config).items()
            if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
        ]
        ignored = {"architectures", "eos_token_id", *WHICH_LAYERS}
        named = [name for name in (*WHICH_LAYERS, *FIRST_LAYERS) if getattr(config, name, None) is not None]
        names = [name for name in lists if not name.startswith("_") and name not in ignored] + named
    return {name: _per_layer(config, name) for name in names}


def set_layer_settings(config: PreTrainedConfig, num_layers: int, settings: Mapping[str, list[Any]]) -> None:
    """Makes a configuration one of `num_layers` layers with these settings, in the form that it had them in."""
    config.num_hidden_layers = num_layers
    for name, values in settings.items():
        if _per_layer(config, name) == values:
            continue  # keeps what was written: mlp_only_layers in any order, more dense layers than there are
        if name in WHICH_LAYERS:
            setattr(config, name, [i for i, chosen in enumerate(values) if chosen])
        else:
            setattr(config, name, sum(values) if name in FIRST_LAYERS else values)


def _per_layer(config: PreTrainedConfig, name: str) -> list[Any]:
    value, layers = getattr(config, name), range(config.num_hidden_layers)
    if name in WHICH_LAYERS:
        return [i in value for i in layers]
    return [i < value for i in layers] if name in FIRST_LAYERS else list(value)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, saved or not, under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def rebuilt(
    model: PreTrainedModel, config: PreTrainedConfig, layers: Sequence[Mapping[str, Tensor]], *, share_weights: bool
) -> PreTrainedModel:
    """A model of this configuration with the tensors of these layers, and everything else from `model`.

    It is made as `from_pretrained` makes it, so that whatever is computed from the configuration fits it.

    Raises:
        `ValueError`: the configuration does not survive saving and loading, builds no model, or builds one with weights
            of other names or shapes.
    """
    config.name_or_path = ""  # otherwise adapters would name the original as their base model
    built = _without_weights(model, config)
    prefix = decoder_layers(model)[0]
    tensors = {key: tensor for key, tensor in named_tensors(model) if not key.startswith(f"{prefix}.")}
    tensors |= {f"{prefix}.{i}.{key}": tensor for i, layer in enumerate(layers) for key, tensor in layer.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, parameter in built.named_parameters(remove_duplicate=False):
        if shapes.get(key) != tuple(parameter.shape):
            raise ValueError(
                f"{type(model).__name__} cannot have these layers only: its configuration asks for {key} "
                f"{tuple(parameter.shape)}, there is {shapes.get(key, 'none')}"
            )
    if not share_weights:
        tensors = copy.deepcopy(tensors)  # all at once, so that tied weights are copied once
    for key, old in list(named_tensors(built)):
        if key not in tensors or shapes[key] != tuple(old.shape):
            continue  # an unsaved buffer of a layer from a bundle, or of layers of a kind that is new
        owner, _, leaf = key.rpartition(".")
        module, tensor = built.get_submodule(owner), tensors.pop(key).detach()
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            module._buffers[leaf] = tensor
    built.tie_weights()
    built.generation_config = copy.deepcopy(model.generation_config)
    nn.Module.to(built, model.device)  # pyright cannot read the signature of transformers' own
    return built.train(model.training)


def _without_weights(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device, with its buffers."""
    try:
        if type(config).from_dict(config.to_dict()).to_dict() != config.to_dict():
            raise ValueError("it is another one after loading")
        with init_empty_weights(include_buffers=False):
            return type(model)._from_config(config)
    except (ValueError, IndexError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot have these layers only, its configuration does not allow it: {error}"
        ) from error


def check_layers(built: PreTrainedModel, originals: Mapping[int, nn.Module]) -> None:
    """Compares layers that a configuration has built with their originals: submodules, and every plain attribute.

    Raises:
        `ValueError`: they differ (a window, no rotary embedding, ...): the family builds a layer by its number.
    """
    blocks = decoder_layers(built)[1]
    for i, original in originals.items():
        new, old = _contents(blocks[i]), _contents(original)
        if different := sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key)):
            key = different[0]
            raise ValueError(
                f"{type(built).__name__} cannot have these layers only: layer {i} would be made with {key} = "
                f"{new.get(key)}, but that layer has {old.get(key)}; its configuration decides it by the layer's number"
            )


def _contents(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[name or "layer"] = type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and key not in CHANGES_FREELY and not key.startswith("_"):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def check_function(model: PreTrainedModel, skipped: Sequence[int], student: PreTrainedModel) -> None:
    """Compares the logits of a student with those of the model when it skips the layers that the student lacks.

    Raises:
        `ValueError`: they differ: what a layer computes depends on its number.
    """
    embeddings = embedding_weight(model)
    ids = torch.arange(8, device=embeddings.device).unsqueeze(0) % len(embeddings)
    blocks = decoder_layers(model)[1]
    hooks = [blocks[i].register_forward_hook(_pass_through, with_kwargs=True) for i in skipped]
    try:
        with torch.no_grad(), evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad(), evaluating(student):
        found = student(input_ids=ids, use_cache=False).logits
    if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        raise ValueError(
            f"{type(model).__name__} cannot do without these layers: what the others compute depends on their number"
        )


def _pass_through(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    hidden = layer_input(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
