"""Log lines of a run on the console: a few values each. The rest is in `trainer_state.json` and in the trackers."""

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback

SHOWN = 8
# Values in the order in which they are shown; others follow while there is room. Those of an evaluation have `eval_` in
# front of these names.
FIRST = (
    "loss", "kd", "ce", "agreement", "hidden", "kv", "kv/cosine", "rollout/acceptance_rate", "epoch", "learning_rate",
    "grad_norm", "rollout/tokens_per_second", "aux_loss", "runtime",
)  # fmt: skip


def brief(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The at most eight values of a log that say most about a run, in the order of `FIRST`."""

    def rank(name: str) -> int:
        name = name.removeprefix("eval_").removeprefix("train_")
        return FIRST.index(name) if name in FIRST else len(FIRST)

    names = sorted((name for name in logs if name != "total_flos"), key=rank)[:SHOWN]
    return {name: logs[name] for name in names}


class BriefProgress(ProgressCallback):
    """The progress bar, with brief logs."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=brief(logs or {}), **kwargs)


class BriefPrinter(PrinterCallback):
    """Logs without a progress bar, brief ones."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=brief(logs or {}), **kwargs)


def shorten_logs(trainer: Any) -> None:
    """Makes the log lines of a trainer brief, on the console alone."""
    for usual, short in ((ProgressCallback, BriefProgress), (PrinterCallback, BriefPrinter)):
        if trainer.pop_callback(usual) is not None:
            trainer.add_callback(short)
