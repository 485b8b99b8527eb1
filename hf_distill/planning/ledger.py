"""Bytes and FLOPs of code that runs on fake tensors, which have shapes, dtypes and lifetimes, but no memory.

A plan runs the real model, the real loss and the real optimizer on such tensors. So what autograd keeps, what a
checkpoint drops and what a kernel returns is asked of the code itself, and no table of formulas has to follow it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The caching allocator of CUDA hands out multiples of this.
CUDA_GRAIN = 512
GRADIENTS = "gradients"


def _product(left: Tensor, right: Tensor, *_: Any) -> int:
    """FLOPs of `left @ right`."""
    return 2 * left.numel() * right.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """FLOPs of an attention (B, H, T, E); those that a causal kernel skips are counted."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: lambda _, left, right, *__: _product(left, right),
    aten.baddbmm: lambda _, left, right, *__: _product(left, right),
}
for _name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"):
    FLOPS[getattr(aten, _name)] = _attention
    # Five products in place of two: the probabilities are computed again.
    FLOPS[getattr(aten, f"{_name}_backward")] = lambda _, *inputs: 5 * _attention(*inputs) // 2


def _accumulates() -> bool:
    """True while autograd gives a parameter its gradient."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _owners(tensor: Tensor) -> tuple[int, int]:
    """The numbers of references to a tensor and to its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore


@cache
def _owners_of_a_sum() -> tuple[int, int]:
    """`_owners` of the first operand, while autograd adds up two gradients that nothing else holds."""
    found = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is aten.add.Tensor:
                found.append(_owners(args[0]))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Sums():
        torch.autograd.grad([(2 * x).sum(), (3 * x).sum()], x)
    return found[0]


def _sums_in_place(left: Tensor) -> bool:
    """True while autograd adds a gradient to another one that it alone holds: real ones are added in place."""
    return (
        torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]
        and not torch.is_grad_enabled()  # else a checkpoint runs its forward again
        and _owners(left) == _owners_of_a_sum()
        and left.nbytes == left.untyped_storage().nbytes()  # a number of an expanded gradient has many places
    )


class Peak(NamedTuple):
    """The most bytes that were alive at one time, by label."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def but_gradients(self) -> int:
        """Bytes of everything but the gradients of parameters, which engines split."""
        return self.total - self.parts.get(GRADIENTS, 0)


def known_device(func: Any, args: Any) -> torch.device | None:
    """The device of a fake tensor, if `func` asks for it: more than half of all calls do, each through all modes."""
    if func is not torch.ops.prim.device.default or not isinstance(args[0], FakeTensor):
        return None
    return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device


class LiveBytes(TorchDispatchMode):
    """Within it, every storage that an operation returns is counted under the current label until it is freed.

    Memory that a kernel takes and gives back within one operation is not seen.

    Attributes:
        live (`Counter`): bytes alive now, by label.
        flops (`Counter`): FLOPs of matrix products and attention, by label.
        peak, peak_but_gradients ([`Peak`]): the highest sum since `begin`, of all labels, and of all but `GRADIENTS`.

    Args:
        grain (`int`): storages are counted in multiples of this.
    """

    def __init__(self, grain: int = 1) -> None:
        super().__init__()
        self.grain, self.label = grain, "other"
        _owners_of_a_sum()  # within a backward it could not be asked
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self._sizes: dict[int, tuple[str, int]] = {}  # label and bytes of each storage alive
        self._total = 0  # of `live`
        self.begin()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes longer than the mode itself

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (device := known_device(func, args)) is not None:
            return device
        if func is aten.index.Tensor and any(isinstance(i, FakeTensor) and i.dtype == torch.bool for i in args[1]):
            out = args[0].clone()  # fake tensors have no values: every position counts
        elif func is aten.clone.default and _accumulates():
            out = aten.alias.default(args[0])  # a real gradient becomes the parameter's; a fake one would be copied
        elif func is aten.add.Tensor and _sums_in_place(args[0]):
            out = aten.alias.default(args[0])
        elif func is aten.addmm.dtype_out:
            out = (kwargs or {})["out"]  # torch 2.9 has no such product of fake tensors
        else:
            out = func(*args, **(kwargs or {}))
        self.add([out] if isinstance(out, Tensor) else (x for x in tree_leaves(out) if isinstance(x, Tensor)))
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops[self.label] += count(*args)
        return out

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Counts what is made inside of it under a label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def add(self, tensors: Iterable[Tensor], label: str | None = None) -> None:
        """Counts tensors that are alive; those that are counted already get the label, if one is given."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                if label is not None:
                    before, size = self._sizes[key]
                    self.live[before] -= size
                    self.live[label] += size
                    self._sizes[key] = label, size
                continue
            size = -(-storage.nbytes() // self.grain) * self.grain
            self._sizes[key] = label or self.label, size
            self.live[label or self.label] += size
            self._total += size
            weakref.finalize(storage, self._free, key)
        if self._total > self._highest:
            self.peak, self._highest = self._now(), self._total
        if (rest := self._total - self.live[GRADIENTS]) > self._highest_rest:
            self.peak_but_gradients, self._highest_rest = self._now(), rest

    def _now(self) -> Peak:
        return Peak({label: size for label, size in self.live.items() if size})

    def _free(self, key: int) -> None:
        label, size = self._sizes.pop(key)
        self.live[label] -= size
        self._total -= size

    def begin(self) -> None:
        """Forgets the peaks so far."""
        self.peak = self.peak_but_gradients = self._now()
        self._highest, self._highest_rest = self.peak.total, self.peak.but_gradients
