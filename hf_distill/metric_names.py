"""Names of the metrics: whether lower or higher is better, and which say most about a run."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

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

SHOWN = 8  # values of a brief log
# The order in which `brief` shows values; others follow while there is room. Those of an evaluation have `eval_` in
# front of these names.
FIRST = (
    "loss", "kd", "ce", "agreement", "hidden", "kv", "kv/cosine", "kv/cka", "rollout/acceptance_rate",
    "rollout/value_of_privilege", "epoch", "learning_rate", "grad_norm", "rollout/tokens_per_second", "aux_loss",
    "runtime",
)  # fmt: skip


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


def brief(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The at most eight values of a log that say most about a run, in the order of `FIRST`."""
    names = sorted((name for name in logs if name != "total_flos"), key=_rank)[:SHOWN]
    return {name: logs[name] for name in names}


def telling(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that say how well the student learns; the brief log if there are none."""
    shown = brief(logs)
    return {name: value for name, value in shown.items() if _rank(name) < FIRST.index("epoch")} or shown


def _rank(name: str) -> int:
    name = name.removeprefix("eval_").removeprefix("train_")
    return FIRST.index(name) if name in FIRST else len(FIRST)
