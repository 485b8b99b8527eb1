"""A student made of some of a model's own layers. The removed ones are kept as bundles and can be put back.

Layers are numbered as they are in the model at hand; in bundles and in `config.pruned_from`, as in the first model.

Shapes: B batch, T tokens, D hidden width, L layers.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.modeling import (
    causal_lm,
    decoder_layers,
    embedding_weight,
    evaluating,
    keep_4bit_weights,
    last_hidden_states,
    layer_output,
    num_positions,
    num_token_ids,
    public_name,
    trying,
)
from hf_distill.rows import tokenized_row
from hf_distill.token_rows import Limits, check_row, pad

MANIFEST = "manifest.json"

# Settings that speak of single layers, but are not lists with an entry for each: which layers, and how many from the
# first on. Everything else that families compute from the number of a layer is found by comparing (`_check_layers`).
WHICH_LAYERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")

# What a layer may have otherwise than one that is made anew: its place, and what a training switches on and off.
CHANGES_FREELY = {"layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing", "p"}


class LayerSpan(NamedTuple):
    """Consecutive layers and how much they change."""

    start: int
    distance: float  # 0: the same direction comes out; 0.5: an orthogonal one
    layers: list[int]


def rank_layers(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    num_layers: int,
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> list[LayerSpan]:
    """All spans of `num_layers` consecutive layers, those that change their input least first.

    The distance is the angle between what goes into the first layer of a span and what comes out of the last one,
    `arccos(cosine) / pi`, at the last token of each row, averaged over rows (Gromov et al., 2403.17887, eq. 7): the one
    token that has read the whole row. First tokens, whose hidden states are huge and hardly turn in any layer, would
    make all spans alike. `rank_layers(...)[0].layers` are the layers to drop.

    Args:
        model (`PreTrainedModel`): also with adapters or in 4 bits; each row is read once.
        dataset: a few hundred rows of what the student will read: `text`, `messages`, `prompt` and `completion`, or
            `input_ids`; a progress bar counts them.
        tokenizer: the model's.
        num_layers (`int`): how many layers are to go, at least 1, not all.
        batch_size (`int`): rows per forward; (batch_size, L + 1, D) is all that is kept of it.
        max_length (`int`): tokens at which rows are cut, at most as many as the model has positions.

    Raises:
        `ValueError`: too many layers or none, no row, or a row without any of the columns above; layers that do not
            hand on one vector per token, once each.
    """
    model = causal_lm(model)
    keep_4bit_weights(model)
    _, blocks = decoder_layers(model)
    if not 1 <= num_layers < len(blocks):
        raise ValueError(f"num_layers has to be at least 1 and below {len(blocks)}, all layers; got {num_layers}")
    max_length = min(max_length, num_positions(model) or max_length)
    total, count = torch.zeros(len(blocks) - num_layers + 1, dtype=torch.float64), 0
    device = embedding_weight(model).device
    refusal = f"the layers of a {type(model).__name__} cannot be ranked by how they turn the hidden states"
    with torch.no_grad(), evaluating(model):
        for ids, is_token in _batches(dataset, tokenizer, num_token_ids(model), batch_size, max_length):
            states: list[Tensor] = []
            last = is_token.sum(1) - 1  # (B,)
            with _watching(blocks, states, last, ids.shape[1]), trying(refusal):
                last_hidden_states(model, input_ids=ids.to(device), attention_mask=is_token.long().to(device))
            if len(states) != len(blocks) + 1:
                raise ValueError(f"{refusal}: they do not run once each")
            hidden = nn.functional.normalize(torch.stack(states).double(), dim=-1)  # (L + 1, B, D)
            cosine = (hidden[:-num_layers] * hidden[num_layers:]).sum(-1)  # (spans, B)
            total += cosine.clamp(-1, 1).arccos().sum(1) / torch.pi
            count += len(last)
    if not count:
        raise ValueError("the dataset has no row with a token to rank layers on")
    spans = [
        LayerSpan(start, distance, list(range(start, start + num_layers)))
        for start, distance in enumerate((total / count).tolist())
    ]
    return sorted(spans, key=lambda span: span.distance)


def drop_layers(
    model: PreTrainedModel,
    layers: Sequence[int],
    bundle_dir: str | PathLike[str] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    share_weights: bool = False,
) -> PreTrainedModel:
    """A new model without these layers, an ordinary one of its family; the model itself stays as it is.

    The layers' settings go with them, so that the student's configuration makes just the layers that it has; whether it
    does is checked, and whether the student computes what the model computes when it skips these layers.
    `config.pruned_from` says which layers of which model are left.

    Args:
        model (`PreTrainedModel`): a decoder-only model without adapters, not quantised, on one device.
        layers (sequence of `int`): the layers to drop, from 0.
        bundle_dir (*optional*): a folder in which the removed layers are kept for [`restore_layers`].
        groups (mapping of names to layers, *optional*):
            Bundles into which the layers are sorted, restored one by one; by default all are in one, "B".
        share_weights (`bool`):
            By default the kept weights are copied: model and student are independent, and both are in memory. With True
            the student uses the model's own tensors and takes no memory; then whatever changes the weights of one
            (training, merging adapters) changes the other. Fine if the model is deleted or the student only gets
            adapters that are not merged in place.

    Returns:
        The student, on the model's device and in its dtype; all of it is trainable, also that of a frozen model. It
        has no name (`config.name_or_path`) before it is saved and loaded.

    Raises:
        `ValueError`: layers that do not exist, twice or all of them; groups that are not the layers; a folder with
            bundles; adapters, quantised weights or several devices; and an architecture in which a layer's number
            decides what it computes, in a way that its configuration cannot say of the layers that are left.
    """
    _refuse_unfit(model, "drop layers of")
    _, blocks = decoder_layers(model)
    if invalid := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise ValueError(f"the model has layers 0 to {len(blocks) - 1}, there is no layer {invalid[0]}")
    if not layers or len(set(layers)) != len(layers) or len(layers) == len(blocks):
        raise ValueError(f"layers have to be some of 0 to {len(blocks) - 1}, each once, not all; got {list(layers)}")
    if groups is not None and bundle_dir is None:
        raise ValueError("groups name the bundles in bundle_dir, which is missing")
    groups = {"B": list(layers)} if groups is None else groups
    check_groups(layers, groups)
    if bundle_dir is not None:
        refuse_bundles(bundle_dir)

    source = model.config.get_text_config()
    origin = getattr(source, "pruned_from", None) or {
        "model": public_name(model), "fingerprint": _fingerprint(model),
        "num_layers": len(blocks), "layers": list(range(len(blocks))),
    }  # fmt: skip
    kept = [i for i in range(len(blocks)) if i not in layers]
    settings = {name: _per_layer(source, name) for name in _per_layer_names(source)}
    config = copy.deepcopy(model.config)
    _set_layers(
        config.get_text_config(),
        {name: [values[i] for i in kept] for name, values in settings.items()},
        {**origin, "layers": [origin["layers"][i] for i in kept]},
    )
    student = _assemble(model, config, [dict(_tensors(blocks[i])) for i in kept], share_weights)
    _check_layers(student, {i: blocks[old] for i, old in enumerate(kept)})
    _check_function(model, layers, student)
    if bundle_dir is not None:
        bundles = {
            name: {
                "layers": [origin["layers"][i] for i in sorted(group)],
                "config": {key: [values[i] for i in sorted(group)] for key, values in settings.items()},
            }
            for name, group in groups.items()
        }
        tensors = {origin["layers"][i]: blocks[i].state_dict() for i in layers}
        _save_bundles(Path(bundle_dir), model, origin, bundles, tensors)
    return student


def restore_layers(
    model: PreTrainedModel,
    bundle_dir: str | PathLike[str],
    groups: Sequence[str] | None = None,
    *,
    share_weights: bool = False,
) -> PreTrainedModel:
    """A new model with the layers of some bundles back in their places; the model itself stays as it is.

    The other layers, embeddings and head are the model's, trained or not. With none of them changed and all bundles
    restored it is the original: weights, configuration and logits, bit for bit.

    Args:
        model (`PreTrainedModel`): what [`drop_layers`] has made, also after training, merging, saving and loading.
        bundle_dir: the folder with the bundles.
        groups (sequence of names, *optional*): which bundles; by default all that the model does not have yet.
        share_weights (`bool`): as in [`drop_layers`], for the weights that come from the model.

    Raises:
        `ValueError`: bundles of another model, damaged or missing ones, names that there are not, layers that the model
            has already, and what [`drop_layers`] refuses.
    """
    _refuse_unfit(model, "restore layers of")
    manifest = read_manifest(bundle_dir)
    _, blocks = decoder_layers(model)
    source = model.config.get_text_config()
    origin = getattr(source, "pruned_from", None)
    if origin is None:
        raise ValueError(
            "the model has no pruned_from in its configuration: drop_layers has not made it, or it is whole"
        )
    if (manifest["architecture"], manifest["fingerprint"]) != (type(model).__name__, origin["fingerprint"]):
        raise ValueError(
            f"the bundles in {bundle_dir} are of {manifest['architecture']} {manifest['base_model']!r}, the model is a "
            f"{type(model).__name__} made of another one, {origin['model']!r}"
        )
    if len(blocks) != len(origin["layers"]):
        raise ValueError(f"the model has {len(blocks)} layers, but pruned_from in its configuration says {origin}")
    bundles = manifest["bundles"]
    if groups is None:
        groups = missing_bundles(model, bundle_dir)
    for name in groups:
        if name not in bundles:
            raise ValueError(f"there is no bundle {name!r} in {bundle_dir}; it has {', '.join(bundles)}")
    restored = [layer for name in groups for layer in bundles[name]["layers"]]
    if not restored or len(set(origin["layers"] + restored)) < len(origin["layers"]) + len(restored):
        raise ValueError(f"the model has layers {origin['layers']} already; there is nothing to restore from {groups}")

    tensors = dict(zip(origin["layers"], (dict(_tensors(block)) for block in blocks), strict=True))
    for name in groups:
        tensors |= _load_bundle(Path(bundle_dir), name, bundles[name], model, manifest["dtype"])
    settings = {
        name: dict(zip(origin["layers"], _per_layer(source, name), strict=True))
        for name in bundles[groups[0]]["config"]
    }
    for group in (bundles[name] for name in groups):
        for name, values in settings.items():
            values.update(zip(group["layers"], group["config"][name], strict=True))
    layers = sorted(tensors)
    config = copy.deepcopy(model.config)
    _set_layers(
        config.get_text_config(),
        {name: [values[layer] for layer in layers] for name, values in settings.items()},
        {**origin, "layers": layers},
    )
    whole = _assemble(model, config, [tensors[layer] for layer in layers], share_weights)
    _check_layers(whole, {layers.index(old): block for old, block in zip(origin["layers"], blocks, strict=True)})
    return whole


def original_layers(model: PreTrainedModel) -> list[int]:
    """For each of a model's layers, its number in the model that layers have been dropped of."""
    config = causal_lm(model).config.get_text_config()
    origin = getattr(config, "pruned_from", None)
    return list(range(config.num_hidden_layers)) if origin is None else list(origin["layers"])


def missing_bundles(model: PreTrainedModel, bundle_dir: str | PathLike[str]) -> list[str]:
    """The bundles whose layers a model does not have, in the order in which they were named."""
    present = set(original_layers(model))
    bundles = read_manifest(bundle_dir)["bundles"]
    return [name for name, bundle in bundles.items() if not present & set(bundle["layers"])]


def read_manifest(bundle_dir: str | PathLike[str]) -> dict[str, Any]:
    """What is in a folder of bundles; `ValueError` for one without."""
    path = Path(bundle_dir) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = {"base_model", "architecture", "fingerprint", "dtype", "bundles"} <= manifest.keys() and all(
            {"layers", "sha256", "config"} <= bundle.keys() for bundle in manifest["bundles"].values()
        )
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable list of bundles as drop_layers writes it: {error}") from error
    if not complete:
        raise ValueError(f"{path} is not a complete list of bundles as drop_layers writes it")
    return manifest


def check_groups(layers: Sequence[int], groups: Mapping[str, Sequence[int]]) -> None:
    """Raises `ValueError` for groups that do not hold each of the layers once, or cannot be names of files."""
    if bad := [name for name in groups if not name.replace("_", "").replace("-", "").isalnum()]:
        raise ValueError(f"groups are named by letters and digits (they become files), not {bad[0]!r}")
    if sorted(layer for group in groups.values() for layer in group) != sorted(layers) or not all(groups.values()):
        raise ValueError(
            f"groups have to hold each of the layers {sorted(layers)} once, none empty; got {dict(groups)}"
        )


def refuse_bundles(bundle_dir: str | PathLike[str]) -> None:
    """Raises `ValueError` for a folder that has bundles: the layers in them may be nowhere else."""
    if (Path(bundle_dir) / MANIFEST).exists():
        raise ValueError(f"{bundle_dir} has bundles already; choose another folder, or delete it")


# ------------------------------------------------------------------------------------------ the insides of a model


def _refuse_unfit(model: PreTrainedModel, action: str) -> None:
    name = type(model).__name__
    if causal_lm(model) is not model or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"cannot {action} a {name} with adapters, which are numbered with the layers: merge them first "
            "(model.merge_and_unload()), or prune before there are any"
        )
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"cannot {action} a {name} with quantised weights, bundles hold those of the checkpoint: load it "
            "unquantised, save the result and load that in 4 bits"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"cannot {action} a {name} on {', '.join(sorted(devices))}: load all of it on one device")
    if getattr(model.config, "is_heterogeneous", False):
        raise ValueError(f"cannot {action} a {name} with a per_layer_config")


def _per_layer_names(config: PreTrainedConfig) -> list[str]:
    """The settings that have a value for each layer."""
    lists = [
        name
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
    ]
    ignored = {"architectures", "eos_token_id", *WHICH_LAYERS}
    named = [name for name in (*WHICH_LAYERS, *FIRST_LAYERS) if getattr(config, name, None) is not None]
    return [name for name in lists if not name.startswith("_") and name not in ignored] + named


def _per_layer(config: PreTrainedConfig, name: str) -> list[Any]:
    value, layers = getattr(config, name), range(config.num_hidden_layers)
    if name in WHICH_LAYERS:
        return [i in value for i in layers]
    return [i < value for i in layers] if name in FIRST_LAYERS else list(value)


def _set_layers(config: PreTrainedConfig, settings: dict[str, list[Any]], origin: dict[str, Any]) -> None:
    """Makes a configuration that of `origin["layers"]`, with the values of `_per_layer` for each of them."""
    config.num_hidden_layers = len(origin["layers"])
    for name, values in settings.items():
        if _per_layer(config, name) == values:
            continue  # as it was written: mlp_only_layers in any order, more dense layers than there are
        if name in WHICH_LAYERS:
            setattr(config, name, [i for i, chosen in enumerate(values) if chosen])
        else:
            setattr(config, name, sum(values) if name in FIRST_LAYERS else values)
    if len(origin["layers"]) < origin["num_layers"]:
        config.pruned_from = origin
    else:
        delattr(config, "pruned_from")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, saved or not, by all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _assemble(
    model: PreTrainedModel, config: PreTrainedConfig, layers: list[dict[str, Tensor]], share_weights: bool
) -> PreTrainedModel:
    """A model of this configuration with these layers, and everything else from `model`.

    It is made as `from_pretrained` makes it, so that what is computed from the configuration fits it.
    """
    name = type(model).__name__
    config.name_or_path = ""  # adapters would give the model of that name as the one they belong to
    try:
        if type(config).from_dict(config.to_dict()).to_dict() != config.to_dict():
            raise ValueError("it is another one after loading")
        with init_empty_weights(include_buffers=False):
            built = type(model)._from_config(config)
    except (ValueError, IndexError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"{name} cannot have these layers only, its configuration does not allow it: {error}"
        ) from error
    prefix = decoder_layers(model)[0]
    tensors = {key: tensor for key, tensor in _tensors(model) if not key.startswith(f"{prefix}.")}
    tensors |= {f"{prefix}.{i}.{key}": tensor for i, layer in enumerate(layers) for key, tensor in layer.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, parameter in built.named_parameters(remove_duplicate=False):
        if shapes.get(key) != tuple(parameter.shape):
            raise ValueError(
                f"{name} cannot have these layers only: its configuration asks for {key} {tuple(parameter.shape)}, "
                f"there is {shapes.get(key, 'none')}"
            )
    if not share_weights:
        tensors = copy.deepcopy(tensors)  # at once, so that tied weights are copied once
    for key, old in list(_tensors(built)):
        if key not in tensors or shapes[key] != tuple(old.shape):
            continue  # a buffer that is not saved, of a layer from a bundle or of layers of a kind that is new
        owner, _, leaf = key.rpartition(".")
        module, tensor = built.get_submodule(owner), tensors.pop(key).detach()
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            module._buffers[leaf] = tensor
    built.tie_weights()
    built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).train(model.training)  # pyright: ignore[reportArgumentType]


def _check_layers(built: PreTrainedModel, originals: dict[int, nn.Module]) -> None:
    """Compares layers that a configuration has made with those they are to be: submodules, and every plain attribute.

    Raises:
        `ValueError`: they differ (a window, no rotary embedding, ...): the family makes a layer by its number.
    """

    def contents(layer: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in layer.named_modules():
            found[name or "layer"] = type(module).__name__
            for key, value in vars(module).items():
                plain = value is None or isinstance(value, (bool, int, float, str))
                if plain and key not in CHANGES_FREELY and not key.startswith("_"):
                    found[f"{name}.{key}".lstrip(".")] = value
        return found

    blocks = decoder_layers(built)[1]
    for i, original in originals.items():
        new, old = contents(blocks[i]), contents(original)
        if different := sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key)):
            key = different[0]
            raise ValueError(
                f"{type(built).__name__} cannot have these layers only: layer {i} would be made with {key} = "
                f"{new.get(key)}, but that layer has {old.get(key)}; its configuration decides it by the layer's number"
            )


def _check_function(model: PreTrainedModel, skipped: Sequence[int], student: PreTrainedModel) -> None:
    """Compares the student with the model when it skips layers.

    Raises:
        `ValueError`: they compute something else: what a layer computes depends on its number.
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
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


# ------------------------------------------------------------------------------------------------ files of bundles


def _save_bundles(
    folder: Path,
    model: PreTrainedModel,
    origin: dict[str, Any],
    bundles: dict[str, dict[str, Any]],
    layers: dict[int, dict[str, Tensor]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, bundle in bundles.items():
        path = folder / f"{name}.safetensors"
        tensors = {f"{i}.{key}": tensor for i in bundle["layers"] for key, tensor in layers[i].items()}
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        bundle["sha256"] = _hash(path)
    manifest = {
        "base_model": origin["model"], "architecture": type(model).__name__, "fingerprint": origin["fingerprint"],
        "num_layers": origin["num_layers"], "dtype": str(model.dtype).removeprefix("torch."), "bundles": bundles,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _load_bundle(
    folder: Path, name: str, bundle: dict[str, Any], model: PreTrainedModel, dtype: str
) -> dict[int, dict[str, Tensor]]:
    """The tensors of each layer of a bundle, on the model's device; in its dtype, where it has another than it had."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing: {folder / MANIFEST} says that it holds layers {bundle['layers']}")
    if _hash(path) != bundle["sha256"]:
        raise ValueError(f"{path} is damaged, or another one than {folder / MANIFEST} says: its sha256 is different")
    layers: dict[int, dict[str, Tensor]] = {i: {} for i in bundle["layers"]}
    for key, tensor in load_file(path).items():
        index, _, key = key.partition(".")
        if tensor.is_floating_point() and f"torch.{dtype}" != str(model.dtype):
            tensor = tensor.to(model.dtype)
        layers[int(index)][key] = tensor.to(model.device)
    return layers


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(model: PreTrainedModel) -> str:
    """Tells a model from others of its shape: a hash of the first numbers of every weight, whatever its dtype."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().flatten()[:16].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + first.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ rows to rank with


@contextmanager
def _watching(blocks: nn.ModuleList, states: list[Tensor], last: Tensor, length: int) -> Iterator[None]:
    """Within it, a forward of (B, `length`) tokens appends what goes into each layer, and comes out of the last.

    Of both, what is at `last` (B,) of each row.
    """

    def keep(hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[:2] != (len(last), length):
            raise ValueError(f"{tuple(hidden.shape)} is not one vector per token")
        rows = torch.arange(len(last), device=hidden.device)
        states.append(hidden[rows, last.to(hidden.device)].cpu())  # (B, D)

    def before(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(layer: nn.Module, args: tuple, output: Any) -> None:
        keep(layer_output(output))

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _batches(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    num_ids: int,
    batch_size: int,
    max_length: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded token ids (B, T), and where they are (B, T)."""
    rows: list[list[int]] = []
    limits = Limits(num_ids, known_to="the model has embeddings only for")
    for index, row in enumerate(tqdm(dataset, desc="ranking layers", unit="row", leave=False)):
        name = f"row {index} of the dataset"
        tokens = tokenized_row(row, tokenizer, name)
        check_row({key: tokens.get(key) for key in ("input_ids", "attention_mask")}, name, limits)
        if ids := tokens["input_ids"][:max_length]:
            rows.append(ids)
        if len(rows) == batch_size:
            yield pad(rows, 0)
            rows = []
    if rows:
        yield pad(rows, 0)
