"""Log lines of a run on the console: a few values each. The rest is in `trainer_state.json` and in the trackers."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback

from hf_distill.metric_names import brief


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
