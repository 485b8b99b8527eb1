"""Running means over label-bearing tokens that cost no synchronisation until they are read."""

from collections.abc import Callable

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of long sums: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


class TokenMeans:
    """Sums of per-token values, kept on the device and reduced over all processes only when they are read.

    A mean of per-batch means weighs a token more the emptier its batch is. Here every token of every process since the
    last reading counts the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, count: Tensor | int, **sums: Tensor) -> None:
        """Adds detached scalar sums over `count` tokens."""
        device = next(iter(sums.values())).device
        for name, value in {"count": torch.as_tensor(count, device=device), **sums}.items():
            value = value.detach().to(sum_dtype(device))
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def pop(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> dict[str, float]:
        """The means since the last call, and a fresh start. Empty when there was no token.

        Args:
            reduce (`Callable`): sums a vector over all processes; called once, if this process has counted anything.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        count, *sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: value / count for name, value in zip(names[1:], sums, strict=True)} if count else {}
