"""A student made of some of a model's own layers. The removed layers are kept in bundles and can be put back.

Layers have the numbers that they have in the model at hand; in bundles and in `config.pruned_from`, those of the first
model.

Shapes: B batch, T tokens, D hidden width, L layers.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.modeling import (
    causal_lm,
    check_function,
    check_layers,
    decoder_layers,
    evaluating,
    input_device,
    keep_4bit_weights,
    last_hidden_states,
    layer_settings,
    layer_states,
    named_tensors,
    num_positions,
    num_token_ids,
    public_name,
    rebuilt,
    set_layer_settings,
    trying,
)
from hf_distill.rows import tokenized_row
from hf_distill.token_rows import Limits, check_row, pad

MANIFEST = "manifest.json"


class LayerSpan(NamedTuple):
    """Consecutive layers and how much they turn the hidden states."""

    start: int
    distance: float  # 0: the direction stays; 0.5: the output is orthogonal to the input
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

    The distance of a span is the angle between its input and its output, `arccos(cosine) / pi`, at the last token of
    each row, averaged over rows (Gromov et al., 2403.17887, eq. 7). Only the last token has read the whole row. First
    tokens would make all spans alike: their hidden states are huge, and no layer turns them much.
    `rank_layers(...)[0].layers` are the layers to drop.

    Args:
        model (`PreTrainedModel`): may have adapters or 4-bit weights; each row is read once.
        dataset: a few hundred rows like those that the student will read: `text`, `messages`, `prompt` and
            `completion`, or `input_ids`. A progress bar counts them.
        tokenizer: the model's.
        num_layers (`int`): the number of layers to remove, at least 1, not all.
        batch_size (`int`): rows per forward, of which (batch_size, L + 1, D) numbers are kept.
        max_length (`int`): rows are cut at this many tokens, and at the number of positions of the model.

    Raises:
        `ValueError`: too many layers or none, no row, or a row without any of the columns above; layers that do not
            return one vector per token, or do not run once each.
    """
    model = causal_lm(model)
    keep_4bit_weights(model)
    depth = len(decoder_layers(model)[1])
    if not 1 <= num_layers < depth:
        raise ValueError(f"num_layers has to be at least 1 and below {depth}, all layers; got {num_layers}")
    max_length = min(max_length, num_positions(model) or max_length)
    total, count = torch.zeros(depth - num_layers + 1, dtype=torch.float64), 0
    device = input_device(model)
    refusal = f"the layers of a {type(model).__name__} cannot be ranked by how they turn the hidden states"
    with torch.no_grad(), evaluating(model):
        for ids, is_token in _batches(dataset, tokenizer, num_token_ids(model), batch_size, max_length):
            states: list[Tensor] = []
            with layer_states(model, _last_states(states, is_token)), trying(refusal):
                last_hidden_states(model, input_ids=ids.to(device), attention_mask=is_token.long().to(device))
            if len(states) != depth + 1:
                raise ValueError(f"{refusal}: they do not run once each")
            hidden = nn.functional.normalize(torch.stack(states).double(), dim=-1)  # (L + 1, B, D)
            cosine = (hidden[:-num_layers] * hidden[num_layers:]).sum(-1)  # (spans, B)
            total += cosine.clamp(-1, 1).arccos().sum(1) / torch.pi
            count += len(ids)
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
    """A copy of a model without these layers, an ordinary model of its family. The model itself stays as it is.

    The layers' settings leave the configuration as well, so that it builds the layers that are left. Two checks follow:
    the configuration builds these layers, and the student computes what the model computes when it skips the others.
    `config.pruned_from` holds the name of the model and the numbers of the layers that are left.

    Args:
        model (`PreTrainedModel`): a decoder-only model without adapters, not quantised, on one device.
        layers (sequence of `int`): the layers to drop, counted from 0.
        bundle_dir (*optional*): a folder for the removed layers, from which [`restore_layers`] takes them.
        groups (mapping of names to layers, *optional*):
            Bundles of layers that can be restored separately; by default there is one with all of them, "B".
        share_weights (`bool`):
            By default the kept weights are copied: model and student are independent, and both take memory. With True
            the student uses the model's own tensors and takes no memory. Then everything that changes the weights of
            one (training, merging adapters) changes those of the other. This is fine if the model is deleted, or if
            the student only gets adapters that are not merged in place.

    Returns:
        The student, on the model's device and in its dtype. All of it is trainable, even if the model is frozen. It
        has no name (`config.name_or_path`) before it is saved and loaded.

    Raises:
        `ValueError`: layers that do not exist, occur twice, or are all layers; groups that do not hold just these
            layers; a folder with bundles; adapters, quantised weights or several devices; an architecture in which the
            number of a layer decides what it computes, in a way that the configuration cannot express.
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
    settings = layer_settings(source)
    student = _with_layers(
        model,
        {**origin, "layers": [origin["layers"][i] for i in kept]},
        {name: [values[i] for i in kept] for name, values in settings.items()},
        [dict(named_tensors(blocks[i])) for i in kept],
        share_weights,
    )
    check_layers(student, {i: blocks[old] for i, old in enumerate(kept)})
    check_function(model, layers, student)
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
    """A copy of a model with the layers of some bundles back in their places. The model itself stays as it is.

    The other layers, the embeddings and the head are the model's, trained or not. If none of them has changed and all
    bundles are restored, the result is the original: weights, configuration and logits, bit for bit.

    Args:
        model (`PreTrainedModel`): made by [`drop_layers`]; it may have been trained, merged, saved and loaded since.
        bundle_dir: the folder with the bundles.
        groups (sequence of names, *optional*): the bundles to restore; by default all that the model lacks.
        share_weights (`bool`): as in [`drop_layers`], for the weights that come from the model.

    Raises:
        `ValueError`: bundles of another model, damaged or missing ones, unknown names, layers that the model already
            has, and what [`drop_layers`] refuses.
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

    tensors = dict(zip(origin["layers"], (dict(named_tensors(block)) for block in blocks), strict=True))
    for name in groups:
        tensors |= _load_bundle(Path(bundle_dir), name, bundles[name], model, manifest["dtype"])
    settings = {
        name: dict(zip(origin["layers"], values, strict=True))
        for name, values in layer_settings(source, bundles[groups[0]]["config"]).items()
    }
    for group in (bundles[name] for name in groups):
        for name, values in settings.items():
            values.update(zip(group["layers"], group["config"][name], strict=True))
    layers = sorted(tensors)
    whole = _with_layers(
        model,
        {**origin, "layers": layers},
        {name: [values[layer] for layer in layers] for name, values in settings.items()},
        [tensors[layer] for layer in layers],
        share_weights,
    )
    check_layers(whole, {layers.index(old): block for old, block in zip(origin["layers"], blocks, strict=True)})
    return whole


def original_layers(model: PreTrainedModel) -> list[int]:
    """For each layer of a model, its number in the model that it was pruned from."""
    model = causal_lm(model)
    origin = getattr(model.config.get_text_config(), "pruned_from", None)
    return list(range(len(decoder_layers(model)[1]))) if origin is None else list(origin["layers"])


def missing_bundles(model: PreTrainedModel, bundle_dir: str | PathLike[str]) -> list[str]:
    """The names of the bundles whose layers a model lacks, in the order in which they were given."""
    present = set(original_layers(model))
    bundles = read_manifest(bundle_dir)["bundles"]
    return [name for name, bundle in bundles.items() if not present & set(bundle["layers"])]


def read_manifest(bundle_dir: str | PathLike[str]) -> dict[str, Any]:
    """The contents of a folder of bundles; `ValueError` where there are none."""
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
    """Raises `ValueError` for groups that do not hold each layer once, or whose names cannot be those of files."""
    if bad := [name for name in groups if not name.replace("_", "").replace("-", "").isalnum()]:
        raise ValueError(f"groups are named by letters and digits (they become files), not {bad[0]!r}")
    if sorted(layer for group in groups.values() for layer in group) != sorted(layers) or not all(groups.values()):
        raise ValueError(
            f"groups have to hold each of the layers {sorted(layers)} once, none empty; got {dict(groups)}"
        )


def refuse_bundles(bundle_dir: str | PathLike[str]) -> None:
    """Raises `ValueError` for a folder with bundles: their layers may exist nowhere else."""
    if (Path(bundle_dir) / MANIFEST).exists():
        raise ValueError(f"{bundle_dir} has bundles already; choose another folder, or delete it")


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


def _with_layers(
    model: PreTrainedModel,
    origin: dict[str, Any],
    settings: dict[str, list[Any]],
    layers: list[dict[str, Tensor]],
    share_weights: bool,
) -> PreTrainedModel:
    """A copy of a model with these layers and their settings; `origin` is noted where some are still missing."""
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    set_layer_settings(text_config, len(layers), settings)
    if len(layers) < origin["num_layers"]:
        text_config.pruned_from = origin
    else:
        delattr(text_config, "pruned_from")
    return rebuilt(model, config, layers, share_weights=share_weights)


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
    """The tensors of each layer of a bundle, on the model's device, and in its dtype if that has changed since."""
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
    """A hash of the first numbers of every weight, whatever its dtype: it tells a model from others of its shape."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        first = parameter.detach().flatten()[:16].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + first.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ rows to rank with


def _last_states(states: list[Tensor], is_token: Tensor) -> Callable[[Tensor], None]:
    """A function that appends the hidden states (B, D) at the last token of each row, `is_token` (B, T)."""
    last = is_token.sum(1) - 1  # (B,)

    def keep(hidden: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[:2] != is_token.shape:
            raise ValueError(f"{tuple(hidden.shape)} is not one vector per token")
        rows = torch.arange(len(last), device=hidden.device)
        states.append(hidden[rows, last.to(hidden.device)].cpu())

    return keep


def _batches(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    num_ids: int,
    batch_size: int,
    max_length: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded token ids (B, T), and a mask (B, T) that is True at tokens."""
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
