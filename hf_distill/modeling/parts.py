"""The parts of a transformers model: backbone, head, layers, positions, vocabulary, device.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.losses.fused_linear import Head
from hf_distill.losses.groups import places_of
from hf_distill.modeling.vision import language_part, merges_outside

# Settings of configurations that scale the logits, and whether the logits are divided by them.
LOGIT_SCALES = {"logit_scale": False, "output_multiplier": False, "lm_head_multiplier": False, "logits_scaling": True}
MULTIPLIES_BY_LOGITS_SCALING = {"hyperclovax"}
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Settings that hold the number of positions.
LENGTHS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
# Types of rotary embeddings whose configurations hold the length before stretching. Those of llama3 and longrope hold
# the stretched length; those of YaRN hold either.
STRETCHED_BY_FACTOR = {"linear", "dynamic", "proportional"}


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, adapters included; without a wrapper, the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if unwrap is None else unwrap())


def public_name(model: str | PreTrainedModel) -> str:
    """The name of a model in logs, model cards and manifests: its hub id, or the last part of its path.

    A local path is nobody's business in what is published, and its last part usually is the model's name.
    """
    name = (model if isinstance(model, str) else model.config.name_or_path) or ""
    return (os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name) or type(model).__name__


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while: no dropout, and no gradient checkpointing, which would leave the cache empty."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trying(action: str) -> Iterator[None]:
    """Turns errors of a model that is tried out into a `ValueError` that begins with `action`, what it cannot do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{action}: {type(error).__name__}: {error}") from error


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embeddings, (V, D)."""
    with trying(f"{type(model).__name__} has no table of token embeddings and cannot read texts"):
        embeddings: Any = model.get_input_embeddings()
        return embeddings.weight


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs. An offloaded model computes on another device than its weights are on."""
    weight = embedding_weight(model)
    if weight.device.type != "meta":
        return weight.device
    embeddings: Any = model.get_input_embeddings()
    return torch.device(embeddings._hf_hook.execution_device)


def num_token_ids(model: PreTrainedModel) -> int:
    """The number of token ids that a model has embeddings for, also where ZeRO-3 has split them."""
    weight = embedding_weight(model)
    return getattr(weight, "ds_shape", weight.shape)[0]


def backbone(model: PreTrainedModel) -> nn.Module:
    """The module whose output the head is applied to.

    Some classes do not name that part as `base_model` promises (Llama 4, Mllama): `base_model` is then the model
    itself, and the backbone is the part that holds the input embeddings.

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
    """The hidden states (B, T, D) that the head is applied to; the head is not run."""
    inputs = {"input_ids": readable(input_ids, num_token_ids(model)), **inputs, "use_cache": False}  # pyright: ignore
    if merges_outside(model, body := backbone(model)):
        return in_place_of_head(model, lambda hidden: hidden, model.forward, **inputs)
    return body(**inputs).last_hidden_state


def in_place_of_head(
    model: PreTrainedModel, function: Callable[[Tensor], Any], forward: Callable[..., Any], *args: Any, **inputs: Any
) -> Any:
    """`function` of the hidden states (B, T, D), called in the place of the head, within a `forward` of the model."""
    found = []

    def in_place_of_logits(hidden: Tensor) -> Tensor:
        found.append(function(hidden))
        return hidden[..., :0]  # what the model would make its logits of

    with patch.object(head_layer(model), "forward", in_place_of_logits):
        forward(*args, **inputs)
    return found[0]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model: the output layer's weight and bias, logit scale and soft-cap.

    Of an offloaded model it is a copy, on the device that computes.
    """
    layer, config = _output_layer(model), model.config.get_text_config()
    with align_module_device(head_layer(model)):
        return Head(layer.weight, getattr(layer, "bias", None), _logit_scale(config), _softcap(config))


def head_layer(model: PreTrainedModel) -> nn.Module:
    """The layer whose weight `head_of` takes. Where PEFT trains the head (`modules_to_save`), that is PEFT's copy."""
    layer = _output_layer(model)
    return next((part for part in layer.modules() if part._parameters.get("weight") is layer.weight), layer)


def _output_layer(model: PreTrainedModel) -> Any:
    layer = model.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), Tensor):  # several for audio codes, or none
        raise ValueError(f"{type(model).__name__} has no single output layer over tokens; it is not supported")
    return layer


def _logit_scale(config: PreTrainedConfig) -> float:
    for name, divides in LOGIT_SCALES.items():
        scale = getattr(config, name, None)
        if scale is not None:
            return 1 / scale if divides and config.model_type not in MULTIPLIES_BY_LOGITS_SCALING else scale
    return 1.0


def _softcap(config: PreTrainedConfig) -> float | None:
    return next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None)) is not None), None)


def readable(input_ids: Tensor, num_ids: int) -> Tensor:
    """Token ids, with 0 in place of those without an embedding, in a model of `num_ids` embeddings.

    Only padding has such ids: a pad token is often added without an embedding for it, and some rows are padded with -1.
    Whatever passes tokens to a model calls this first.
    """
    return input_ids.masked_fill((input_ids < 0) | (input_ids >= num_ids), 0)


def drop_unreadable_padding(model: PreTrainedModel) -> None:
    """Removes a pad token without an embedding from the configurations: a model saved with it would not load."""
    for config in (model.config.get_text_config(), model.generation_config):
        pad = getattr(config, "pad_token_id", None)
        if config is not None and pad is not None and not 0 <= pad < num_token_ids(model):
            config.pad_token_id = None


def label_positions(labels: Tensor, number: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions that predict a label-bearing token, and those tokens.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): not shifted, as causal language models take them; -100 is masked.
        number (`int`, *optional*): N, if it is known: then the host does not wait for the device.

    Returns:
        Indices `(N,)` into the flattened (B * T) positions, and the labels `(N,)` of the tokens that follow them.
    """
    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    bears_label = following != -100
    positions = bears_label.nonzero().squeeze(-1) if number is None else places_of(bears_label, number)
    return positions, following[positions]


def select_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (B, T, D) at flat positions (N,), as (N, D)."""
    return hidden.flatten(0, 1).index_select(0, positions.to(hidden.device))


def num_layers(config: PreTrainedConfig) -> int:
    """The number of layers in a configuration; `ValueError` where it has none."""
    number = getattr(config, "num_hidden_layers", None)
    if number is None:
        raise ValueError(
            f"{config.model_type} does not say how many layers it has (num_hidden_layers), so none can be chosen"
        )
    return number


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The layers of a model, with their name: the outermost list whose length is the configuration's number of layers.

    Of a model that reads pictures they are those of its language part, whose depth the vision tower may share.

    Raises:
        `ValueError`: there is no such list, or several.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    within, part = language_part(model)
    named = ((f"{within}.{n}".lstrip("."), m) for n, m in part.named_modules())
    lists = [(n, m) for n, m in named if isinstance(m, nn.ModuleList) and len(m) == number]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, blocks) for name, blocks in lists if name.count(".") == depth]
    if len(outermost) != 1 or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has no single list of {number} layers: only decoder-only models do")
    return outermost[0]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states in the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def layer_output(output: Any) -> Tensor:
    """The hidden states in the output of a layer."""
    return output if isinstance(output, Tensor) else output[0]


def num_positions(model: nn.Module | PreTrainedConfig) -> int | None:
    """The number of tokens that a model was made to read; None where there is no limit (ALiBi, recurrent models).

    A table of positions ends there: a longer text is an error or, on a GPU, ends the process. Rotary embeddings go on
    beyond it, with poor predictions. Some configurations hold the length that the rotary embedding is stretched to,
    others the length before. If types of layers differ, the shortest length counts.

    Args:
        model (`nn.Module` or `PreTrainedConfig`):
            In a model, tables are found whose first rows are for padding (RoBERTa); a configuration does not say so.
    """
    config = model if isinstance(model, PreTrainedConfig) else causal_lm(model).config
    config = config.get_text_config()
    size = next((size for name in LENGTHS if (size := getattr(config, name, None))), None)
    if size is None or size < 0 or getattr(config, "alibi", False):
        return None
    size = min(_stretched(size, rope) for rope in _rotations(config))
    if isinstance(model, nn.Module):
        size = min([size, *_table_lengths(model)])
    return size


def num_steady_positions(model: nn.Module | PreTrainedConfig) -> int | None:
    """The tokens of the longest text that can be read in pieces: `num_positions`, or fewer.

    Dynamic scaling and longrope rotate all tokens of a longer text in another way, also those in a cache already, and
    those of the texts beside it.

    Args:
        model (`nn.Module` or `PreTrainedConfig`): as in [`num_positions`].
    """
    config = (model if isinstance(model, PreTrainedConfig) else causal_lm(model).config).get_text_config()
    limits = [num_positions(model)]
    for rope in _rotations(config):
        rope_type = rope.get("rope_type") or rope.get("type")
        if rope_type == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope_type == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return min((limit for limit in limits if limit is not None), default=None)


def _rotations(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The settings of the rotary embeddings: one, or one for each type of layer that has any."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _stretched(size: int, rope: Mapping[str, Any]) -> int:
    """The length that a rotary embedding is stretched to, in a configuration that says `size`."""
    factor = rope.get("factor") or 1.0
    rope_type = rope.get("rope_type") or rope.get("type")
    if rope_type == "yarn":
        # In Qwen's configurations `size` is a length before stretching, in DeepSeek's the one after it.
        return max(size, int((rope.get("original_max_position_embeddings") or size) * factor))
    # transformers recomputes dynamic scaling for any length; its factor is how far it is meant to go.
    return max(size, int(size * factor)) if rope_type in STRETCHED_BY_FACTOR else size


def _table_lengths(model: nn.Module) -> Iterator[int]:
    """The usable lengths of tables of positions whose first rows, up to `padding_idx`, are for padding."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            yield table.num_embeddings - table.padding_idx - 1


def load_balancing_loss(model: PreTrainedModel, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss of a mixture-of-experts model, without its coefficient (Switch, 2101.03961, eq. 4)."""
    # Nearly every family takes this function from Mixtral; `check_load_balancing` finds the others.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    return torch.as_tensor(
        load_balancing_loss_func(outputs.router_logits, num_experts, config.num_experts_per_tok, attention_mask)
    )


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """The number of token ids, counted from 0, that mean the same to both tokenizers.

    Tokens that one tokenizer adds at the end (`<pad>`) do not make another vocabulary.

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
    """The names of the student's trainable parameters that share memory with the teacher."""
    taken = {parameter.data_ptr() for parameter in teacher.parameters() if parameter.numel()}
    trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad and p.numel()]
    return [name for name, parameter in trainable if parameter.data_ptr() in taken]
