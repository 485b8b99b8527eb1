"""Reports of what a LoraConfig trains and of what training has changed, and merging an adapter into its model.

Shapes: a module from I to O features gets A (r, I) and B (O, r); its update is B @ A * scaling.
"""

import copy
import difflib
import logging
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.losses.feature import effective_rank_of
from hf_distill.model_files import auto_class
from hf_distill.modeling import causal_lm, is_vision_language, without_values
from hf_distill.named import load_processor
from hf_distill.report import Part, Shown
from hf_distill.saved_weights import ADAPTER_FILES, lacking
from hf_distill.saving import (
    ADAPTER_CONFIG,
    base_of,
    refuse_folder,
    refuse_moving,
    refuse_unrepeatable,
    save_tokenizer,
    set_aside,
    try_saving,
)

logger = logging.getLogger(__name__)

# Kinds of modules by patterns in their paths; the part nearest to the module's own name decides.
KINDS = {"attention": r"attn|attention", "mlp": r"mlp|ffn|feed_forward|moe|expert|^fc\d"}


# ------------------------------------------------------------------------------------------------- before the training


@dataclass(frozen=True)
class TrainedModule:
    """A module that a LoraConfig trains: by an adapter, or directly (`rank` is None): all of it, or its bias."""

    name: str
    kind: str  # attention, mlp, embedding, head, other
    in_features: int | None
    out_features: int | None
    rank: int | None
    parameters: int  # trainable ones
    a_shape: tuple[int, ...] | None = None  # (r, I)
    b_shape: tuple[int, ...] | None = None  # (O, r)


@dataclass(frozen=True, repr=False)
class LoraReport(Shown):
    """The result of `describe_lora`. It shows itself as a table with one line for the same module of all layers."""

    modules: list[TrainedModule]
    trainable_parameters: int
    total_parameters: int  # of the model without adapters
    warnings: list[str]

    def shown(self) -> list[Part]:
        def line(place: str, group: list[TrainedModule]) -> dict[str, Any]:
            parameters = sum(module.parameters for module in group)
            return {
                "": place,
                "kind": group[0].kind,
                "count": len(group),
                "in→r→out": _shapes(group[0]),
                "trainable": f"{parameters:,}",
                "share": f"{parameters / self.total_parameters:.2%}",
            }

        groups = _grouped(self.modules, lambda module: (module.kind, module.a_shape, module.b_shape))
        share = self.trainable_parameters / self.total_parameters
        total = f"{self.trainable_parameters:,} trainable parameters, {share:.2%} of {self.total_parameters:,}"
        rows = [line(place, group) for place, group in groups]
        return [_table(rows), total, *(f"warning: {warning}" for warning in self.warnings)]


def describe_lora(model: PreTrainedModel, config: LoraConfig) -> LoraReport:
    """The modules of a model that a LoraConfig trains, their shapes, and warnings of likely mistakes.

    PEFT itself adapts a copy of the model that has shapes but no values, so every setting has the effect that it has in
    `get_peft_model`. No memory is allocated, and model and config are not changed. The model may be on the meta device.

    Args:
        model (`PreTrainedModel`): without adapters; quantised or not.
        config (`LoraConfig`): as for `get_peft_model` and `KDTrainer(peft_config=...)`.

    Returns:
        [`LoraReport`] with `.modules`, `.trainable_parameters`, `.total_parameters` and `.warnings`.

    Raises:
        `ValueError`: another kind of config, a model with adapters, or whatever PEFT refuses: no module matches, there
            is no default for this family, settings exclude each other.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config has to be a LoraConfig, got {type(config).__name__}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has adapters already: describe it before get_peft_model; then describe_updates")
    asked, config = config, copy.deepcopy(config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = _adapted_without_values(model, config)
    modules = _trained_modules(causal_lm(adapted), model)
    heard = dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning | RuntimeWarning))
    return LoraReport(
        modules=modules,
        trainable_parameters=sum(module.parameters for module in modules),
        total_parameters=model.num_parameters(),
        warnings=[
            *_mistakes(modules, model, _target_names(asked, config)),
            *(message for message in heard if "fan_in_fan_out" not in message),  # PEFT corrects it
        ],
    )


def refuse_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raises `ValueError` for a LoraConfig that PEFT refuses for a model, which may be on the meta device.

    What cannot be tried out on a copy without values is left to the training.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _adapted_without_values(model, copy.deepcopy(config))
    except ValueError as error:
        head = model.get_output_embeddings()
        linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
        names = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        reason = " ".join(str(error).split())
        raise ValueError(
            f"peft_config does not fit the student: {reason} The linear layers of {type(model).__name__}: {names}"
        ) from error
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError):
        return


def _adapted_without_values(model: PreTrainedModel, config: LoraConfig) -> PeftModel | PeftMixedModel:
    """A copy of a model that PEFT has adapted, on the meta device; `config` is changed."""
    config.base_model_name_or_path = None
    if config.init_lora_weights != "mica":
        config.init_lora_weights = True  # Other ways need data or weights; of these, only MiCA changes what is trained.
    return get_peft_model(without_values(model), config, low_cpu_mem_usage=True)


def _trained_modules(adapted: nn.Module, model: PreTrainedModel) -> list[TrainedModule]:
    modules, originals = dict(adapted.named_modules()), dict(model.named_modules())
    owners: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            paths = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
            wrapped = (path for path in paths if isinstance(modules[path], LoraLayer | AuxiliaryTrainingWrapper))
            owners[next(wrapped, paths[0])].append(parameter)
    found = []
    for path, parameters in owners.items():
        module, name = modules[path], _name(path, modules[path])
        sizes: dict[str, Any] = {side: getattr(module, side, None) for side in ("in_features", "out_features")}
        sizes |= {"rank": None, "parameters": sum(parameter.numel() for parameter in parameters)}
        if isinstance(module, LoraLayer):
            ((adapter, rank),) = module.r.items()
            b, a, _ = _factors(module, adapter)
            sizes |= {"rank": rank, "a_shape": tuple(a.shape), "b_shape": tuple(b.shape)}
        kind = _kind(name, originals.get(name), model.get_output_embeddings())
        found.append(TrainedModule(name, kind, **sizes))
    return found


def _name(path: str, module: nn.Module | LoraLayer) -> str:
    """The name of a module before PEFT wrapped it. Parameters of one module are wrapped one inside the other."""
    name = path.replace(".base_layer", "")
    return f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name


def _kind(name: str, module: nn.Module | None, head: nn.Module | None) -> str:
    if module is not None and module is head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    found = (kind for part in reversed(name.split(".")) for kind, form in KINDS.items() if re.search(form, part))
    return next(found, "other")


def _mistakes(modules: list[TrainedModule], model: PreTrainedModel, names: list[str]) -> Iterator[str]:
    adapted = [module for module in modules if module.rank is not None]
    matches = {name: [m for m in adapted if f".{m.name}".endswith(f".{name}")] for name in names}
    for name, matched in matches.items():
        kinds = Counter(module.kind for module in matched)
        if not matched:
            known = sorted({path.rpartition(".")[2] for path, module in model.named_modules()})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            left_out = "exclude_modules, layers_to_transform or modules_to_save leave it out"
            hint = left_out if name in near else f"near it: {', '.join(near)}" if near else "nothing is near it"
            yield f"{name!r} matches no module; {hint}"
        if len(kinds) > 1:
            counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
            longer = sorted({".".join(module.name.split(".")[-2 - name.count(".") :]) for module in matched})
            meant = " or ".join(map(repr, longer))
            yield f"{name!r} matches modules of different kinds: {counts}; name those that are meant, such as {meant}"
    if heads := [module.name for module in adapted if module.kind == "head"]:
        yield (
            f"the output layer {heads[0]} gets an adapter: trainers that read its weight (TRL's, hf_distill's) refuse "
            "that; leave it out, or train it as a whole with modules_to_save"
        )
    smaller = {module.name: min(module.in_features or 0, module.out_features or 0) for module in adapted}
    if wide := [module for module in adapted if (module.rank or 0) > smaller[module.name]]:
        yield (
            f"rank {wide[0].rank} is above the smaller width of {len(wide)} modules ({wide[0].name}: "
            f"{smaller[wide[0].name]}): a full update would take fewer parameters"
        )
    weights = {name: parameter for name, parameter in model.named_parameters() if "expert" in name}
    fused = [name for name, weight in weights.items() if weight.dim() == 3 and name not in smaller]
    if fused and (not all(matches.values()) or any(module.kind == "mlp" for module in adapted)):
        example = ".".join(fused[0].split(".")[-2:])
        yield (
            f"{len(fused)} weights of several experts such as {fused[0]} are out of reach of target_modules and stay "
            f"as they are; target_parameters=[{example!r}] adapts them"
        )


def _target_names(asked: LoraConfig, used: LoraConfig) -> list[str]:
    """The names that were listed one by one; a pattern or "all-linear" lists none."""
    names = set(used.target_parameters or ())
    if not isinstance(asked.target_modules, str):
        # PEFT may have replaced some.
        names |= set(used.target_modules or ()) & set(asked.target_modules or used.target_modules or ())
    return sorted(names)


# -------------------------------------------------------------------------------------------------- after the training


@dataclass(frozen=True)
class ModuleUpdate:
    """The update that an adapter adds to one weight."""

    name: str
    rank: int
    effective_rank: float  # if one weight holds several experts, their mean
    norm: float  # Frobenius
    relative_norm: float | None  # norm / norm of the weight; None where that is unknown


@dataclass(frozen=True, repr=False)
class UpdateReport(Shown):
    """The result of `describe_updates`. It shows itself as a table of means over the same module of all layers."""

    modules: list[ModuleUpdate]

    def shown(self) -> list[Part]:
        def line(place: str, group: list[ModuleUpdate]) -> dict[str, Any]:
            known = [update.relative_norm for update in group if update.relative_norm is not None]
            return {
                "": place,
                "count": len(group),
                "rank": group[0].rank,
                "effective": f"{mean(update.effective_rank for update in group):.1f}",
                "norm": f"{mean(update.norm for update in group):.2g}",
                "of weight's": f"{mean(known):.2%}" if known else "-",
                "least": f"{min(known):.2%}" if known else "-",
                "most": f"{max(known):.2%}" if known else "-",
            }

        return [_table([line(place, group) for place, group in _grouped(self.modules, lambda update: update.rank)])]


@torch.no_grad()
def describe_updates(model: PeftModel | PreTrainedModel) -> UpdateReport:
    """Effective rank and norm of every update B @ A * scaling of a model with LoRA adapters.

    The effective rank is `exp` of the entropy of the normalised singular values (Roy and Vetterli, 2007), at most r. If
    it is far below r, a smaller rank would have been enough. It is computed from A and B without their product. For the
    relative norm, 4-bit and 8-bit weights are dequantised one at a time. DoRA's magnitudes are not counted.

    Raises:
        `ValueError`: the model has no LoRA adapter.
    """
    updates = []
    for path, layer in causal_lm(model).named_modules():
        if isinstance(layer, LoraLayer):
            weight_norm = _weight_norm(layer)
            for adapter, rank in layer.r.items():
                experts = isinstance(layer, ParamWrapper)
                b, a, scaling = layer.get_delta_factors(adapter) if experts else _factors(layer, adapter)
                values = abs(scaling) * _singular_values(b, a)
                norm = values.norm().item()
                relative = None if weight_norm is None else norm / weight_norm
                name = _name(path, layer) + (f" ({adapter})" if len(layer.r) > 1 else "")
                effective_rank = effective_rank_of(values).mean().item()
                updates.append(ModuleUpdate(name, rank, effective_rank, norm, relative))
    if not updates:
        raise ValueError("the model has no LoRA adapter; describe_updates takes what get_peft_model has made")
    return UpdateReport(updates)


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, float]:
    """B (O, r), A (r, I) and the scaling of an adapter."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter], layer.scaling[adapter]
    sides: tuple[Any, Any] = layer.lora_B, layer.lora_A
    b, a = (side[adapter].weight.flatten(1) for side in sides)
    return b, a, layer.scaling[adapter]


def _singular_values(b: Tensor, a: Tensor) -> Tensor:
    """The singular values (..., r) of B @ A, for B (..., O, r) and A (..., r, I), by way of an (r, r) matrix."""
    right_b, right_a = (torch.linalg.qr(side.float(), mode="r").R for side in (b, a.mT))
    return torch.linalg.svdvals(right_b @ right_a.mT)


def _weight_norm(layer: LoraLayer) -> float | None:
    base = layer.get_base_layer()
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else getattr(base, "weight", None)
    # On some CPUs bitsandbytes repacks weights into an order that its own dequantisation does not support.
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return None
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        weight = dequantize_module_weight(base)
    return weight.float().norm().item() or None if weight is not None and weight.is_floating_point() else None


# ------------------------------------------------------------------------------------------------------------- merging


def merge_adapter(
    adapter_folder: str | PathLike[str],
    output_folder: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Merges a saved LoRA adapter into its unquantised base model, and saves the model with its tokenizer.

    An adapter that was trained on 4-bit weights is merged into the weights that these were quantised from. If it were
    merged into the 4-bit weights, it would be rounded with them. Files of an earlier run in the output folder are moved
    aside.

    Args:
        adapter_folder: a folder written by `trainer.save_model()`, or a checkpoint.
        output_folder: the folder of the merged model, which `from_pretrained` loads without PEFT.
        base (*optional*): hub id or path of the base model, by default the one that the adapter was trained on.
        dtype (*optional*): dtype of the merged model, by default the one that the base was saved in.

    Raises:
        `ValueError`: no adapter, or one that cannot be loaded as it was; no base; a base that is quantised, has no
            tokenizer, or does not fit the adapter; an output folder with an adapter, which loading would add again, or
            that is the base's folder, or that cannot be written to, or from which base or adapter would be moved aside.
    """
    adapter_folder, output_folder = Path(adapter_folder), Path(output_folder)
    if (output_folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{output_folder} has an adapter, which loading would add again: choose another folder")
    config = _saved_config(adapter_folder)
    base = str(base or base_of(adapter_folder, config.base_model_name_or_path or ""))
    if not base:
        raise ValueError(f"{adapter_folder} does not say which model it was trained on: name it with base")
    refuse_folder(output_folder, {"the base model": base})
    refuse_moving(output_folder, {"the base model": base, "the adapter": adapter_folder})
    try:
        if getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is not None:
            raise ValueError(f"base {base!r} is quantised: name the model that it was made from with base")
        model = auto_class(base).from_pretrained(base, dtype=dtype or "auto")
    except OSError as error:
        raise ValueError(f"base {base!r} is no folder or hub id of a model: {_short(error)}") from error
    folders = [folder for folder in (adapter_folder, Path(base)) if any(folder.glob("tokenizer*"))]
    if not folders and Path(base).is_dir():  # transformers would make an empty tokenizer
        raise ValueError(f"neither {adapter_folder} nor base {base!r} has a tokenizer")
    tokenizer = _processing_class(model, [str(folder) for folder in folders or [base]])

    try_saving(model, tokenizer, output_folder)
    adapted = _with_adapter(model, config, adapter_folder, base)
    _untie(adapted)
    merged = adapted.merge_and_unload()
    set_aside(output_folder)
    merged.save_pretrained(output_folder)
    save_tokenizer(tokenizer, output_folder)


def _saved_config(folder: Path) -> LoraConfig:
    """The configuration of the LoRA adapter in a folder; `ValueError` for a folder without one that can be merged."""
    if not (folder / ADAPTER_CONFIG).exists() or not any((folder / name).exists() for name in ADAPTER_FILES):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        raise ValueError(
            f"{folder} has no adapter: there is no {ADAPTER_CONFIG} with {ADAPTER_FILES[0]}"
            + (f"; there is one in {', '.join(inside)}" if inside else "")
        )
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} has a {config.peft_type} adapter; only LoRA can be merged here")
    refuse_unrepeatable(config.init_lora_weights, f"the adapter in {folder}")
    return config


def _with_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path, base: str) -> PeftModel:
    config.inference_mode = True
    try:
        adapted = PeftModel(model, config)
        found = adapted.load_adapter(str(folder), "default")
    except (KeyError, RuntimeError, ValueError) as error:  # KeyError: from modules_to_save
        raise ValueError(f"the adapter in {folder} does not fit base {base!r}: {_short(error)}") from error
    # If the base has more or fewer layers, PEFT loads the layers that both have.
    if differing := [*found.missing_keys, *found.unexpected_keys] or lacking(adapted, folder):
        raise ValueError(
            f"the adapter in {folder} does not fit base {base!r}: {len(differing)} of its weights have no counterpart "
            f"({differing[0]}, ...). Name the very model that it was trained on, with as many layers, with base"
        )
    return adapted


def _processing_class(model: PreTrainedModel, names: Sequence[str]) -> Any:
    """The first processor of a model that sees, of the folders or hub ids `names`; or else their first tokenizer."""
    for name in names if is_vision_language(model) else ():
        try:
            return load_processor(name, None, False)
        except (ImportError, OSError, TypeError, ValueError) as error:
            logger.warning("no processor of %s works here, and none is saved from there: %s", name, _short(error))
    return AutoTokenizer.from_pretrained(names[0])


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 300)


def _untie(adapted: PeftModel) -> None:
    """Separates the weights of embedding and output layer where they are tied and an adapter makes them differ."""
    model = causal_lm(adapted)
    config = model.config.get_text_config()
    sides: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = sides
    if not config.tie_word_embeddings:
        return
    # Trainable tokens and whole modules give the weight that they will be merged to; LoRA gives that of its base.
    if any(isinstance(side, BaseTunerLayer) for side in sides) or not torch.equal(embedding.weight, head.weight):
        layer: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        config.tie_word_embeddings = False


# -------------------------------------------------------------------------------------------------------------- tables


def _grouped(modules: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[str, list[Any]]]:
    """Groups of the same module of all layers that have the same key: the path within a layer, and the modules."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for module in modules:
        parts = ["*" if part.isdigit() else part for part in module.name.split(".")]
        place = parts[parts.index("*") + 1 :] if "*" in parts[:-1] else parts
        groups[".".join(place), key(module)].append(module)
    return [(place, group) for (place, _), group in groups.items()]


def _shapes(module: TrainedModule) -> str:
    if module.a_shape is None or module.b_shape is None:
        return "-"
    return f"{module.a_shape[1]}→{module.a_shape[0]}→{module.b_shape[0]}"


def _table(rows: list[dict[str, Any]]) -> Part:
    return (rows, None) if rows else "nothing is trained"
