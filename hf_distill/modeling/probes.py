"""Checks that run the model itself: whether its head, its length and its load-balancing loss are what we assume.

A table of families would be outdated with every release of transformers, and remote code is in no table.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_distill.modeling.parts import (
    backbone,
    evaluating,
    head_of,
    input_device,
    last_hidden_states,
    load_balancing_loss,
    num_positions,
    num_token_ids,
    trying,
)

# The checks that each model has passed. A copy of a checked model (`WholeCopy`) inherits its entry.
PASSED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def remembered(check: Callable[[PreTrainedModel, str], None]) -> Callable[[PreTrainedModel, str], None]:
    """A check that records the models that pass it."""

    @functools.wraps(check)
    def checked(model: PreTrainedModel, name: str) -> None:
        check(model, name)
        PASSED.setdefault(model, set()).add(check.__name__)

    return checked


def ensure(check: Callable[[PreTrainedModel, str], None], model: PreTrainedModel, name: str) -> None:
    """Runs `check(model, name)` unless this model has passed it, so that functions called in a loop check only once."""
    if check.__name__ not in PASSED.get(model, ()):
        check(model, name)


@remembered
def check_head(model: PreTrainedModel, name: str) -> None:
    """Compares `head_of(model)` with the logits that the model itself returns for a few tokens.

    Raises:
        `ValueError`: the model computes its logits in a way that `head_of` does not know, so that every loss would be
            wrong; it reads ahead; or it does not take plain token ids.
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
        # The losses accept a head of another dtype than the backbone's; the model by itself does not.
        lower = min(hidden.dtype, head.weight.dtype, key=lambda dtype: dtype.itemsize)
        is_mixed = hidden.dtype != head.weight.dtype
        is_exact = lower == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
        with torch.autocast(hidden.device.type, dtype=lower) if is_mixed else nullcontext():
            expected = model(input_ids=ids, use_cache=False).logits.float()
            found = head.logits(hidden.to(head.weight.device)).float()
    if not expected.isfinite().all():
        raise ValueError(f"the {name}'s logits are not finite: its weights are damaged, or its dtype cannot hold them")
    scale = expected.abs().max().clamp(min=1.0)
    # Float32, even as TF32, is precise enough to notice a soft-cap far above the logits.
    tolerance = (2e-3 if is_exact else 0.05) * scale.to(found.device)
    if expected.shape != found.shape or not (expected.to(found.device) - found).abs().max() <= tolerance:
        raise ValueError(
            f"{called} does not compute its logits as its output layer, bias, logit scale and soft-cap say, so losses "
            "on hidden states would be wrong; this architecture is not supported"
        )
    # The two rows differ in their last token only, so a causal model has equal hidden states before it.
    if (hidden[0, :3] - hidden[1, :3]).abs().max() > 5e-3 * hidden.abs().max():
        raise ValueError(
            f"{called} reads ahead: it sees the tokens that it has to predict, so it is no causal language model"
        )


def check_length(model: PreTrainedModel, name: str, length: int, text: str = "a text", remedy: str = "") -> None:
    """If `length` exceeds the number of positions of a model, tries a text of one token more than that number.

    Rotary embeddings go on, more or less well. A table of positions ends, and on a GPU that ends the process.

    Args:
        length (`int`): the number of tokens of the longest text.
        text (`str`): its name in the message.
        remedy (`str`): what to do, by default a lower `max_length`.

    Raises:
        `ValueError`: the model cannot read beyond its number of positions.
    """
    limit = num_positions(model)
    if limit is None or length <= limit:
        return
    ids = torch.zeros(1, limit + 1, dtype=torch.long, device=input_device(model))
    refusal = f"the {name} ({type(model).__name__}) has {limit} positions, and {text} has {length} tokens"
    with torch.no_grad(), evaluating(model), trying(f"{refusal}: {remedy or f'set max_length to at most {limit}'}"):
        last_hidden_states(model, input_ids=ids).sum().item()  # waits for the device, where errors come late


def check_load_balancing(model: PreTrainedModel, name: str) -> None:
    """Compares `load_balancing_loss` with the auxiliary loss that the model itself returns for a few tokens.

    Raises:
        `ValueError`: the model has another loss, or none.
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
