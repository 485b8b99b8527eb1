"""Running means that need no synchronisation until they are read."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of long sums: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_json(value: Any) -> Any:
    """A logged value as a JSON value, or as a string. Other values would fail when a checkpoint is saved."""
    value = value.tolist() if hasattr(value, "tolist") else value  # tensors, and numbers and arrays of numpy
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


class TokenMeans:
    """Means over tokens. Their sums stay on the device and are reduced over all processes only when they are read.

    A mean of per-batch means gives a token more weight in a batch with fewer tokens. Here every token of every process
    since the last reading has the same weight.
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
        """The means since the last call; empty if there was no token. Resets the sums.

        Args:
            reduce (`Callable`): sums a vector over all processes; called once, if this process has counted a token.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        count, *sums = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: value / count for name, value in zip(names[1:], sums, strict=True)} if count else {}


class RolloutMeans:
    """Sums over rollouts, and their rates over all processes."""

    _SUMS = (
        "tokens seconds positions blocks drafted accepted corrected first full length length_squared privilege "
        "privileged"
    )

    def __init__(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(self._SUMS.split(), 0.0)
        self._shortest, self._longest = float("inf"), 0.0

    def add(self, stats: Any, num_tokens: int, is_speculative: bool) -> None:
        """Adds the tokens and seconds of one rollout (`RolloutStats`), and its blocks if it is speculative."""
        self._sums["tokens"] += num_tokens
        self._sums["seconds"] += stats.seconds
        self._sums["positions"] += stats.asked.positions
        if not is_speculative:
            return
        blocks = stats.blocks
        length = blocks.draft_length.double()
        found = {
            "blocks": len(length), "drafted": blocks.drafted.sum(), "accepted": blocks.accepted.sum(),
            "corrected": blocks.corrected.sum(), "first": (blocks.accepted > 0).sum(),
            "full": (blocks.accepted == blocks.drafted).sum(), "length": length.sum(),
            "length_squared": length.square().sum(),
        }  # fmt: skip
        for name, value in found.items():
            self._sums[name] += float(value)
        self._shortest = min(self._shortest, float(length.min()))
        self._longest = max(self._longest, float(length.max()))

    def add_privilege(self, kl: Tensor, num_tokens: int) -> None:
        """Adds the divergence between the teacher with knowledge and the teacher without, summed over tokens."""
        self._sums["privilege"] += float(kl)
        self._sums["privileged"] += num_tokens

    def pop(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The rates since the last call; empty if no text was generated. Resets the sums.

        Args:
            gather (`Callable`): stacks a row (1, n) of every process; called once, by every process.
        """
        values = [*self._sums.values(), self._shortest, self._longest]
        rows = gather(torch.tensor([values], dtype=sum_dtype(device), device=device))
        total = dict(zip(self._sums, rows.sum(0).tolist(), strict=False))
        shortest, longest = rows[:, -2].min().item(), rows[:, -1].max().item()
        self.__init__()
        found = {}
        if total["seconds"]:
            found["tokens_per_second"] = total["tokens"] / total["seconds"] * len(rows)
            found["positions_per_token"] = total["positions"] / max(total["tokens"], 1)
        if total["blocks"]:
            mean = total["length"] / total["blocks"]
            found |= {
                "acceptance_rate": total["accepted"] / max(total["drafted"], 1),
                "first_token_acceptance": total["first"] / total["blocks"],
                "full_block_rate": total["full"] / total["blocks"],
                "draft_length_mean": mean,
                "draft_length_min": shortest,
                "draft_length_max": longest,
                "draft_length_std": max(total["length_squared"] / total["blocks"] - mean**2, 0.0) ** 0.5,
                **{f"tokens_{name}": total[name] for name in ("drafted", "accepted", "corrected")},
            }
        if total["privileged"]:
            found["value_of_privilege"] = total["privilege"] / total["privileged"]
        return {f"rollout/{name}": value for name, value in found.items()}
