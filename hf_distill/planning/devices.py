"""Differences between devices, for fake tensors, which always pose as the CPU's."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hf_distill.losses import loop
from hf_distill.losses.head import HEAD_ROWS, Head


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """Within it the loss and the attention take the memory that they take on "cuda" or "cpu".

    The element-wise part of the loss runs on one of its blocks, whose memory every other block takes again. Compiled,
    as on CUDA, it makes no tensor of a block's size.
    """
    whole = loop._differentiate_chunk_
    is_cuda = device == "cuda"

    def first_block(rows: tuple[Tensor, ...], *args: Any, compiled: bool, block: int) -> Tensor:
        if compiled and is_cuda:
            return rows[0].new_zeros(5)
        return whole(tuple(x[:block] for x in rows), *args, compiled=False, block=block)

    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "_differentiate_chunk_", first_block))
        if is_cuda:
            stack.enter_context(patch.object(Head, "product_dtype", _product_dtype))
            stack.enter_context(patch.dict(HEAD_ROWS, cpu=HEAD_ROWS["cuda"]))
            attend = nn.functional.scaled_dot_product_attention
            stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", _flash(attend)))
        yield


def _product_dtype(self: Head, hidden: Tensor) -> torch.dtype:
    """As `Head.product_dtype` on CUDA, which multiplies in half precision and keeps sums in float32."""
    if self.dtype is not None:
        return self.dtype
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype


def _flash(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attention by a kernel that takes keys and values as they are, where CUDA has one: without a mask."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None or query.shape[1] == key.shape[1] or not kwargs.pop("enable_gqa", False):
            return attend(query, key, value, attn_mask=attn_mask, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False), scale=kwargs.get("scale")
        )[0]

    return attention
