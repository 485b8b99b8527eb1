"""Micro-batches on fake tensors: tokens, and pixels of pictures.

A model that sees looks at its inputs to find out where its pictures are and how large: it reads places, cuts tensors,
counts windows. So in a batch with pictures the inputs are real, and so are the whole numbers and truth values that are
made of them; what weights make of them is fake.

Shapes: B rows, T tokens, P tokens of a row that stand for its picture.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hf_distill.planning.ledger import known_device

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of a process.

    Args:
        rows, length (`int`): B and T.
        labels (`int`): N, label-bearing positions.
        padded (`bool`): whether some rows are shorter, so that the attention needs a mask.
        packed (`bool`): whether rows are joined into one, so that the attention needs a mask.
        pictures (`int`): P, the tokens of each row that a picture takes; 0 for rows of text alone.
    """

    rows: int
    length: int
    labels: int
    padded: bool = False
    packed: bool = False
    pictures: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def with_pictures(self, tokens: int) -> "Batch":
        """The same text beside pictures that take another number of tokens."""
        return replace(self, length=self.length - self.pictures + tokens, pictures=tokens)

    def numbers(self) -> AbstractContextManager:
        """The context that a model of these inputs is made and run in."""
        return RealNumbers() if self.pictures else nullcontext()

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The inputs of a model.

        Raises:
            `ValueError`: no such inputs are known of a model that sees.
        """
        shape = (1, self.tokens) if self.packed else (self.rows, self.length)
        inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        if self.packed:
            inputs["position_ids"] = torch.zeros(shape, dtype=torch.long)
        elif self.padded:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        return _with_pictures(inputs, model, self.pictures) if self.pictures else inputs


class RealNumbers(TorchDispatchMode):
    """Within it tensors of whole numbers and truth values are real, and all that is made of real tensors alone."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes longer than the mode itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (device := known_device(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in INDEXING:
            args = args[0], [index for each in args[1] for index in _places(each)], *args[2:]
        out = func(*args, **kwargs)
        if tensors or not isinstance(out, Tensor) or out.is_floating_point():
            return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """Truth values as numbers of places, whose count fake tensors would not know."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero().unbind(1))


# ------------------------------------------------------------------------------------------------------------- pictures


def _with_pictures(inputs: dict[str, Tensor], model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    """The inputs with one picture at the beginning of each row, in about as many `tokens`, and never in more."""
    config: Any = model.config
    vision, rows = config.vision_config, len(inputs["input_ids"])
    wanted = signature(type(model).forward).parameters
    if "image_grid_thw" in wanted:
        number, pixels = _patches(vision, rows, tokens)
    elif "pixel_values" in wanted and isinstance(getattr(vision, "image_size", None), int | list | tuple):
        number, pixels = _tiles(model, rows, tokens)
    else:
        raise ValueError(f"pictures of a {config.model_type} cannot be planned: leave picture_tokens out")
    image = getattr(config, "image_token_id", None)
    image = config.image_token_index if image is None else image
    ids = inputs["input_ids"] + int(image == 0)  # no token of the text stands for a picture
    ids[:, :number] = image
    kinds = {name: (ids == image).long() for name in ("mm_token_type_ids", "token_type_ids") if name in wanted}
    return {**inputs, "input_ids": ids, **pixels, **kinds}


def _patches(vision: Any, rows: int, tokens: int) -> tuple[int, dict[str, Tensor]]:
    """The number of tokens of a picture that is cut into patches of its own size (Qwen-VL), and these patches."""
    merged = vision.spatial_merge_size
    height = math.isqrt(tokens)
    width = tokens // height
    numbers = _channels(vision) * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, height * merged, width * merged]]).repeat(rows, 1)
    pixels = _real(rows * height * width * merged**2, numbers)
    return height * width, {"pixel_values": pixels, "image_grid_thw": grid}


def _tiles(model: PreTrainedModel, rows: int, tokens: int) -> tuple[int, dict[str, Tensor]]:
    """The number of tokens of a picture that is cut into tiles of one size, and these tiles."""
    vision: Any = model.config.vision_config
    side = vision.image_size
    tile = _channels(vision), *((side, side) if isinstance(side, int) else side)
    # Some models take the tiles of all rows in one line, others those of each row.
    for apart in (False, True):
        try:
            each = _tokens_of(model, _real(*((1, 1) if apart else (1,)), *tile))
        except (AttributeError, IndexError, TypeError, ValueError):
            continue
        if tokens < each:
            raise ValueError(
                f"a picture takes at least {each} tokens of a {model.config.model_type}, got picture_tokens={tokens}"
            )
        number = tokens // each
        pixels = _real(*((rows, number) if apart else (rows * number,)), *tile)
        return number * each, {"pixel_values": pixels}
    raise ValueError(f"pictures of a {model.config.model_type} cannot be planned: leave picture_tokens out")


def _tokens_of(model: Any, pixels: Tensor) -> int:
    """The number of tokens in whose place a model puts a picture."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels, return_dict=True)
    features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    return sum(leaf.numel() // leaf.shape[-1] for leaf in tree_leaves(features))


def _channels(vision: Any) -> int:
    names = ("num_channels", "in_channels", "in_chans")
    return next((getattr(vision, name) for name in names if hasattr(vision, name)), 3)


def _real(*shape: int) -> Tensor:
    """Pixels with memory."""
    with unset_fake_temporarily():
        return torch.ones(shape)
