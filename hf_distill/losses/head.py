"""The output layer of a language model: logits of a chunk of positions, and the gradients of hidden states and head.

Products are never rounded below float32, and a head is converted to another dtype a slice at a time.

Shapes: N positions, n of them in a chunk, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of one chunk's logits in float32. Large enough for matrix products at full speed, small beside a model.
CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
# Blocks of rows in a chunk, for the element-wise part where it is not compiled. It holds up to 30 tensors of a block's
# size, together no larger than one chunk.
BLOCKS_PER_CHUNK = 32
# Logits of a block on the CPU, so that some tensors stay in a core's own cache. With a cache of 2 MB, half and twice as
# many are as fast, and eight times as many take a third longer.
CACHE_BLOCK = 2**16
# Rows of a head that are multiplied at a time: on the CPU what stays in the cache (an eighth faster than the whole head
# for chunks of 192 positions), on CUDA the whole head, unless it has to be converted to another dtype.
HEAD_ROWS = {"cpu": 2**11, "cuda": 2**14}


class Head(NamedTuple):
    """The output layer of a language model: `softcap(logit_scale * (hidden @ weight.T + bias))`, a (V, D) weight."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None  # of products, where `with_product_dtype` has settled it

    def truncated(self, vocab_size: int) -> "Head":
        """The head of the first `vocab_size` tokens, a view."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        return self._replace(weight=self.weight[:vocab_size], bias=bias)

    def to(self, device: torch.device) -> "Head":
        """The head on `device`; itself, if it is there."""
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

    def with_product_dtype(self, hidden: Tensor) -> "Head":
        """The head with the dtype that products with `hidden` have now, to keep it when autocast is switched off."""
        return self._replace(dtype=self.product_dtype(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32 or better of hidden states (..., D)."""
        dtype = self.product_dtype(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = flat.new_empty(len(flat), len(self.weight), dtype=torch.promote_types(dtype, torch.float32))
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            self.project_(logits, flat.to(dtype))
            return self.finish_logits_(logits).view(*hidden.shape[:-1], len(self.weight))

    def product_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which hidden states and weight are multiplied; results are never below float32."""
        if self.dtype is not None:
            return self.dtype
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # Only CUDA can multiply in half precision and keep float32 sums; elsewhere the result would be rounded too.
        return dtype if device == "cuda" else torch.promote_types(dtype, torch.float32)

    def weight_slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in `dtype`, `HEAD_ROWS` at a time, with the vocabulary slice that they stand for."""
        whole = self.weight.is_cuda and self.weight.dtype == dtype
        rows = len(self.weight) if whole else HEAD_ROWS.get(self.weight.device.type, HEAD_ROWS["cuda"])
        for start in range(0, len(self.weight), rows):
            part = slice(start, min(start + rows, len(self.weight)))
            yield part, self.weight[part].to(dtype)

    def project_(self, out: Tensor, hidden: Tensor) -> None:
        """Overwrites `out` (n, V) with `hidden @ weight.T`, multiplied in the dtype of `hidden`."""
        for part, weight in self.weight_slices(hidden.dtype):
            add_product_(out[:, part], hidden, weight.t(), beta=0)

    def finish_logits_(self, products: Tensor) -> Tensor:
        """Turns `hidden @ weight.T` into logits, in place."""
        if self.bias is not None:
            products.add_(self.bias)
        if self.logit_scale != 1:
            products.mul_(self.logit_scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def products_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient with respect to `hidden @ weight.T` from the one with respect to the logits."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.logit_scale == 1 else gradient * self.logit_scale


def default_chunk_size(device: torch.device, vocab_size: int) -> int:
    """The number of positions whose float32 logits fit `CHUNK_BYTES`: a multiple of 16, where products are fast."""
    rows = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    return rows if rows < 16 else rows - rows % 16


def even_chunks(num_rows: int, chunk_size: int) -> int:
    """A chunk size up to `chunk_size` with which the last chunk is about as large as the others.

    A small one would read the whole head for a few positions. It is a multiple of 16.
    """
    even = math.ceil(num_rows / math.ceil(num_rows / chunk_size)) if num_rows else chunk_size
    return min(chunk_size, math.ceil(even / 16) * 16)


def block_rows(device: torch.device, chunk_size: int, vocab_size: int, *, caches: int = 1) -> int:
    """The number of positions in a block of the element-wise part, where it is not compiled.

    On a CPU, a block has at most `caches * CACHE_BLOCK` logits.
    """
    rows = chunk_size // BLOCKS_PER_CHUNK
    if device.type == "cpu":
        rows = min(rows, caches * CACHE_BLOCK // vocab_size)
    return max(1, rows)


class HeadGradients:
    """Gradients of hidden states (N, D), of a head's weight and of its bias, summed up in float32 chunk by chunk.

    Args:
        head (`Head`): truncated to the V tokens that count.
        inputs: hidden states, weight and bias as autograd knows them; rows of the last two past V get no gradient.
        needed: which of the three need one.
    """

    def __init__(self, head: Head, inputs: tuple[Tensor, Tensor, Tensor | None], needed: Sequence[bool]) -> None:
        self.head = head
        self.dtype = head.product_dtype(inputs[0])
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self._dtypes = [None if x is None else x.dtype for x in inputs]
        self._sums: list[Tensor | None] | None = [
            torch.zeros_like(x, dtype=self.sum_dtype) if need and x is not None else None
            for x, need in zip(inputs, needed, strict=True)
        ]

    def add_(self, rows: slice, hidden: Tensor, gradient: Tensor) -> None:
        """Adds those of some positions: hidden states (n, D) in `dtype`, and the gradient (n, V) of their products."""
        assert self._sums is not None
        of_hidden, of_weight, of_bias = self._sums
        rounded, vocab_size = gradient.to(self.dtype), len(self.head.weight)
        if of_hidden is not None:
            for part, weight in self.head.weight_slices(self.dtype):
                add_product_(of_hidden[rows], rounded[:, part], weight)
        if of_weight is not None:
            add_product_(of_weight[:vocab_size], rounded.t(), hidden)
        if of_bias is not None:
            of_bias[:vocab_size] += gradient.sum(0)

    def handed_out(self, scale: Tensor) -> list[Tensor | None]:
        """The three, times `scale`, in the dtypes of the inputs; they are given away, so this works once."""
        if self._sums is None:
            raise RuntimeError("the loss can be differentiated once; compute it again")
        sums, self._sums = self._sums, None
        # Scaled last and in float32: a scaled logit gradient would lose its small entries in half precision.
        return [None if x is None else x.mul_(scale).to(dtype) for x, dtype in zip(sums, self._dtypes, strict=True)]


def add_product_(out: Tensor, left: Tensor, right: Tensor, *, beta: int = 1) -> None:
    """`out = beta * out + left @ right`, without rounding the product to the dtype of its factors."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    else:
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
