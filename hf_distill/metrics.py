"""Names and directions of the metrics, and running means that need no synchronisation until they are read."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# All metrics that are logged or reported: True if higher is better, False if lower is better, None if neither is.
MORE_IS_BETTER = {
    **dict.fromkeys(("loss", "kd", "ce", "kl", "hidden", "kv", "aux_loss"), False),
    **dict.fromkeys(("bits_per_character", "nats_per_token"), False),
    **dict.fromkeys(("perplexity", "student_perplexity", "teacher_perplexity", "runtime"), False),
    **dict.fromkeys(("agreement", "expected_acceptance", "samples_per_second", "steps_per_second"), True),
    **dict.fromkeys(("kv/cosine", "kv/centered_cosine", "kv/cka"), True),
    **dict.fromkeys((f"rollout/{n}" for n in ("acceptance_rate", "first_token_acceptance", "full_block_rate")), True),
    "rollout/tokens_per_second": True,
    "rollout/positions_per_token": False,
    **dict.fromkeys(f"rollout/draft_length_{name}" for name in ("mean", "min", "max", "std")),
    **dict.fromkeys(f"rollout/tokens_{name}" for name in ("drafted", "accepted", "corrected")),
    **dict.fromkeys(("rollout/hard_label_fraction", "rollout/value_of_privilege")),
    **dict.fromkeys(("alignment/exact_fraction", "alignment/compared_fraction")),
    **dict.fromkeys(
        f"teacher/{name}" for name in ("exact_mass", "requests", "retries", "seconds", "positions", "megabytes")
    ),
    **dict.fromkeys(("student_entropy", "kv/magnitude_ratio", "kv/target_effective_rank", "num_tokens", "epoch")),
}


def metric_name(logged: str, sets: Iterable[str] | None = None) -> str | None:
    """The key in `MORE_IS_BETTER` for the logged name of a metric; None if hf_distill does not log such a metric.

    Args:
        logged (`str`): `kd`, `eval_kd`, or `eval_<set>_kd` with several evaluation sets.
        sets (iterable of `str`, *optional*): the names of the evaluation sets. By default, any name is accepted.
    """
    logged = logged.removeprefix("eval_")
    # `kv/cosine_layer_3`, `perplexity/stories`
    logged = re.sub(r"(kv/cosine)_\S*layer_\d+$", r"\1", re.sub(r"(perplexity)/.*", r"\1", logged))
    found = [name for name in MORE_IS_BETTER if logged == name or logged.endswith(f"_{name}")]
    found = [name for name in found if sets is None or logged.removesuffix(name).removesuffix("_") in sets]
    return max(found, key=len, default=None)


def more_is_better(logged: str) -> bool | None:
    """True if higher is better, False if lower is better, None if neither is.

    Metrics of other libraries follow the rule of transformers: lower is better if the name ends with "loss".
    """
    name = metric_name(logged)
    return not logged.endswith("loss") if name is None else MORE_IS_BETTER[name]


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
